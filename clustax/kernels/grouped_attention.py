"""Attention of tiles of queries over the top-k keys of their clusters, merged with the tail.

A step of the grid takes several tiles, each from another head, or from another stretch of the tiles
of a head. The keys of a tile's cluster are found through the cluster's index, which is there before
the step begins, so that the pipeline fetches them ahead, and once for all the tiles of a cluster:
these come one after another. Logits are kept transposed, keys by queries: the softmax then runs
over sublanes, and what belongs to a query fills lanes.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from clustax import kernels
from clustax.kernels.common import VMEM_BYTES, dot, masked_bias, round_up

# Half of the scalar memory of a TPU, which holds a number for each tile of all heads.
MAX_TILES = 2**17
STEP_TILES = 4


@dataclasses.dataclass(frozen=True)
class GroupedBlocks:
    """How much of the problem a step of the grid takes.

    Attributes:
      tiles: the number of tiles, at least 1. More of them hide what a step costs besides, and need
        more memory.
    """

    tiles: int

    def __post_init__(self):
        """Refuses sizes that make no sense."""
        if self.tiles < 1:
            raise ValueError(f"tiles must be at least 1, got {self.tiles}.")

    @classmethod
    def default(cls, query: Float[Array, "G L M H"], value: Float[Array, "G C k V"]):
        """As many as fit on the chip, within reason."""
        tile_size, head_dim = query.shape[2:]
        topk, value_dim = value.shape[2:]
        size = _bytes_per_tile(tile_size, topk, head_dim, value_dim, query.dtype)
        most = STEP_TILES if query.dtype.itemsize == 2 else STEP_TILES // 2  # or registers spill
        return cls(max(1, min(VMEM_BYTES // size, most)))


def tile_size(num_queries: int, num_clusters: int, dtype: jnp.dtype) -> int:
    """About the mean size of a cluster, as far as registers and their packing make it worth while.

    So about half of all slots, at most, stay empty where clusters are not tiny.
    """
    mean = max(1, num_queries // num_clusters)
    return min(256 // dtype.itemsize, max(16, 1 << (mean.bit_length() - 1)))


def _bytes_per_tile(
    tile_size: int, topk: int, head_dim: int, value_dim: int, dtype: jnp.dtype
) -> int:
    """On-chip memory of a step of the backward pass, which needs the most."""
    itemsize = dtype.itemsize
    rows, keys = round_up(tile_size, 32 // itemsize), round_up(topk, 32 // itemsize)
    width = round_up(head_dim, 128) + round_up(value_dim, 128)
    moved = 2 * rows * width * itemsize + keys * width * (itemsize + 4)  # what goes in or out
    return 2 * moved + 8 * keys * round_up(tile_size, 128) * 4  # moved while the last is worked on


def refusal(
    num_queries: int,
    num_clusters: int,
    topk: int,
    head_dim: int,
    value_dim: int,
    dtype: jnp.dtype,
) -> str | None:
    """Why the kernel cannot serve these shapes and this dtype, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"its kernels take float32 and bfloat16, not {dtype.name}"
    size = tile_size(num_queries, num_clusters, dtype)
    if _bytes_per_tile(size, topk, head_dim, value_dim, dtype) > VMEM_BYTES:
        return f"topk={topk} keys and values of dims {head_dim} and {value_dim} exceed its memory"
    return None


class Slots(NamedTuple):
    """What each slot of the tiles has."""

    query: Float[Array, "G L M H"]
    tail_lse: Float[Array, "G L 1 M"] | None
    top_lse: Float[Array, "G L 1 M"] | None


class Keys(NamedTuple):
    """What each cluster has: its keys with all that belongs to them, and its tail."""

    key: Float[Array, "G C k H"]
    value: Float[Array, "G C k V"]
    bias: Float[Array, "G C 1 k"] | None
    tail_mean: Float[Array, "G C 1 V"] | None


def grouped_attention(
    query: Float[Array, "G L M H"],
    cluster: Int[Array, "G L"],
    key: Float[Array, "G C k H"],
    value: Float[Array, "G C k V"],
    bias: Float[Array, "G C k"] | None = None,
    valid: Bool[Array, "G C k"] | None = None,
    tail_mean: Float[Array, "G C V"] | None = None,
    tail_lse: Float[Array, "G L M"] | None = None,
    top_lse: Float[Array, "G L M"] | None = None,
    *,
    scale: float | Float[Array, ""],
    blocks: GroupedBlocks | None = None,
) -> Float[Array, "G L M V"]:
    """Attention of each query over the keys of its tile's cluster, merged with the tail.

    Args:
      query: queries, in tiles of one cluster each; multiples of 16 slots waste no memory.
      cluster: the cluster of each tile; those of a head must not decrease.
      key: the top-k keys of each cluster; keys that do not count hold zeros.
      value: their values, likewise.
      bias: what is added to their logits.
      valid: which of them count.
      tail_mean: attention of each cluster over all other keys; None if there are none.
      tail_lse: for each query the log-sum-exp of the logits of these; given with ``tail_mean``.
      top_lse: for each query what the top-k keys weigh against the tail; its own log-sum-exp of
        their logits if None.
      scale: factor of the logits.
      blocks: what a step of the grid takes; chosen from the shapes if None.

    Returns:
      The outputs, in the dtype of ``query``.

    Raises:
      ValueError: if tiles have one slot only, or ``blocks`` do not go with the shapes.
    """
    num_heads, num_tiles, tile_size, _ = query.shape
    if tile_size < 2:
        raise ValueError(f"tiles must have at least 2 slots M, got {tile_size}; pad them.")
    if blocks is None:
        blocks = GroupedBlocks.default(query, value)

    def as_rows(x):
        return None if x is None else x[:, :, None]

    slots = Slots(query, as_rows(tail_lse), as_rows(top_lse))
    keys = Keys(key, value, as_rows(masked_bias(bias, valid)), as_rows(tail_mean))
    scale = jnp.asarray(scale, jnp.promote_types(query.dtype, jnp.float32))

    # Where heads do not fill steps, they are cut into stretches, which are heads of the same keys.
    stretches = blocks.tiles // math.gcd(num_heads, blocks.tiles)
    added = -num_tiles % stretches

    def stretch(x):  # G L … -> G·stretches …
        if added:  # tiles of the last cluster
            x = jnp.pad(x, ((0, 0), (0, added), *((0, 0),) * (x.ndim - 2)), mode="edge")
        return x.reshape(num_heads * stretches, -1, *x.shape[2:])

    slots, cluster = jax.tree.map(stretch, (slots, cluster))

    interpret = kernels.interpret.value is not None

    def attend_heads(heads) -> Float[Array, "G_ L_ M V"]:
        return _attend(*heads, scale, blocks.tiles, interpret)

    calls = _num_calls(cluster, len(cluster) // blocks.tiles)
    if calls == 1:
        rows = attend_heads((slots, cluster, keys))
    else:
        in_turn = jax.tree.map(lambda x: x.reshape(calls, -1, *x.shape[1:]), (slots, cluster, keys))
        rows = lax.map(attend_heads, in_turn)
    return rows.reshape(num_heads, -1, *rows.shape[-2:])[:, :num_tiles]


def _num_calls(cluster: Int[Array, "G L"], steps: int) -> int:
    """Into how many calls heads are split, so that the clusters of their tiles have room."""
    divisors = (n for n in range(1, steps + 1) if steps % n == 0)
    return next((n for n in divisors if cluster.size <= n * MAX_TILES), steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    slots: Slots,
    cluster: Int[Array, "G L"],
    keys: Keys,
    scale: Float[Array, ""],
    step_tiles: int,
    interpret: bool,
) -> Float[Array, "G L M V"]:
    """The same where keys may have fewer heads, each of them for several heads of tiles."""
    grid = _Grid(cluster.shape, len(keys.key), step_tiles)
    rows = jax.ShapeDtypeStruct((*slots.query.shape[:3], keys.value.shape[-1]), slots.query.dtype)
    return pl.pallas_call(
        _forward,
        out_shape=rows,
        grid_spec=grid.spec(
            in_specs=(jax.tree.map(grid.tile, slots), grid.keys(keys)), out_specs=grid.tile(rows)
        ),
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
        name="grouped_attention",
    )(cluster.reshape(-1), scale[None], slots, (keys,) * step_tiles)


def _attend_forward(slots, cluster, keys, scale, step_tiles, interpret):
    rows = _attend(slots, cluster, keys, scale, step_tiles, interpret)
    return rows, (slots, cluster, keys, scale)


def _attend_backward(step_tiles, interpret, residuals, d_rows):
    slots, cluster, keys, scale = residuals
    grid = _Grid(cluster.shape, len(keys.key), step_tiles)
    num_heads, num_tiles, tile_size, _ = slots.query.shape

    def summed(x):  # over the tiles of a cluster
        return jax.ShapeDtypeStruct((num_heads // step_tiles, *x.shape[1:]), scale.dtype)

    d_scale = jax.ShapeDtypeStruct((num_heads, num_tiles, 1, tile_size), scale.dtype)
    tile_specs = jax.tree.map(grid.tile, slots)
    d_slots, d_keys, d_scale = pl.pallas_call(
        _backward,
        out_shape=(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), slots),
            (jax.tree.map(summed, keys),) * step_tiles,
            d_scale,
        ),
        grid_spec=grid.spec(
            in_specs=(tile_specs, grid.keys(keys), grid.tile(d_rows)),
            out_specs=(tile_specs, grid.d_keys(keys), grid.tile(d_scale)),
        ),
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
        name="grouped_attention_backward",
    )(cluster.reshape(-1), scale[None], slots, (keys,) * step_tiles, d_rows)

    every = jnp.arange(keys.key.shape[1])[:, None]
    has_tiles = jnp.any(cluster[:, None] == every, axis=-1)[..., None, None]  # G C 1 1

    def joined(key, *d_key):  # nothing was written where a cluster has no tiles
        d_key = jnp.stack(d_key, axis=1).reshape(num_heads, *key.shape[1:])
        d_key = jnp.where(has_tiles, d_key, 0)
        return d_key.reshape(len(key), -1, *key.shape[1:]).sum(axis=1).astype(key.dtype)

    return d_slots, None, jax.tree.map(joined, keys, *d_keys), d_scale.sum()


_attend.defvjp(_attend_forward, _attend_backward)

# The tiles of a head are worked on in their order, in which the sums of a cluster stay on the chip.
_COMPILER_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


class _Grid(NamedTuple):
    """Blocks of arrays on a grid: a step takes a tile of each of some heads."""

    shape: tuple[int, ...]  # G L
    num_key_heads: int
    step_tiles: int

    def spec(self, **specs) -> pltpu.PrefetchScalarGridSpec:
        """The grid; all clusters of tiles, and the scale, are there before the first step."""
        grid = (self.shape[0] // self.step_tiles, self.shape[1])
        return pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=grid, **specs)

    def tile(self, x) -> pl.BlockSpec:
        """A tile of each head."""
        block = (self.step_tiles, None, *x.shape[2:])
        return pl.BlockSpec(block, lambda g, step, *_: (g, step, 0, 0))

    def keys(self, keys: Keys) -> tuple[Keys, ...]:
        """The keys of the cluster of each tile."""
        heads_per_key_head = self.shape[0] // self.num_key_heads
        return self._of_cluster(
            keys, lambda g, tile: lax.div(g * self.step_tiles + tile, heads_per_key_head)
        )

    def d_keys(self, keys: Keys) -> tuple[Keys, ...]:
        """The same in arrays of all first tiles of steps, all second ones, ..."""
        return self._of_cluster(keys, lambda g, _: g)

    def _of_cluster(self, keys, place):
        def spec(tile, x):
            def index(g, step, cluster, _):
                own = cluster[(g * self.step_tiles + tile) * self.shape[1] + step]
                return place(g, tile), own, 0, 0

            return pl.BlockSpec((None, None, *x.shape[2:]), index)

        tiles = range(self.step_tiles)
        return tuple(jax.tree.map(functools.partial(spec, tile), keys) for tile in tiles)


def _forward(cluster, scale, slots, keys, rows):
    del cluster  # was for the pipeline
    for tile, own in enumerate(keys):
        of_tile = _attend_tile(_read(slots, tile), _read(own), scale[0])
        rows[tile] = of_tile.astype(rows.dtype)


def _backward(cluster, scale, slots, keys, d_rows, d_slots, d_keys, d_scale):
    step, num_steps = pl.program_id(1), pl.num_programs(1)
    for tile, (own, d_own) in enumerate(zip(keys, d_keys, strict=True)):
        place = (pl.program_id(0) * len(keys) + tile) * num_steps + step
        starts = (step == 0) | (cluster[place] != cluster[jnp.maximum(place - 1, 0)])
        pl.when(starts)(functools.partial(_zero, d_own))
        of_slots, of_keys, of_scale = _tile_gradients(
            _read(slots, tile), _read(own), scale[0], d_rows[tile]
        )
        of_tile = jax.tree.leaves((of_slots, of_scale))
        for ref, x in zip(jax.tree.leaves((d_slots, d_scale)), of_tile, strict=True):
            ref[tile] = x.astype(ref.dtype)
        for ref, x in zip(jax.tree.leaves(d_own), jax.tree.leaves(of_keys), strict=True):
            ref[...] += x


def _read(refs, index: Any = ...):
    return jax.tree.map(lambda ref: ref[index], refs)


def _zero(refs):
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros_like(ref)


def _attend_tile(slots: Slots, keys: Keys, scale):
    """The outputs of a tile (M V)."""
    _, weights, lse = _softmax(slots, keys, scale)
    mass = None if keys.tail_mean is None else _mass(lse, slots.top_lse, slots.tail_lse)
    shares, values = _with_tail(weights, mass, keys)
    return dot(shares, values, 0, 0)


def _tile_gradients(slots: Slots, keys: Keys, scale, d_rows):
    """Gradients of what the slots have, of what the keys have, and, for each slot, of the scale."""
    products, weights, lse = _softmax(slots, keys, scale)
    mass = None if keys.tail_mean is None else _mass(lse, slots.top_lse, slots.tail_lse)
    shares, values = _with_tail(weights, mass, keys)
    d_shares, d_values = dot(values, d_rows, 1, 1), dot(shares, d_rows, 1, 0)  # p+k M, p+k V
    first = len(values) - len(weights)
    d_weights = d_shares[first:]
    d_mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
    d_logits = weights * (d_weights - d_mean)
    d_tail_lse = d_top_lse = d_tail_mean = None
    if mass is not None:
        d_tail = d_shares[0:1] + d_shares[1:2]  # of its mean, and the rest of that
        d_lse = mass * (1 - mass) * (d_mean - d_tail)
        d_logits = mass * d_logits
        if slots.top_lse is None:
            d_logits += weights * d_lse
        else:
            d_top_lse = d_lse
        d_tail_lse = -d_lse
        d_tail_mean = d_values[0:1] + d_values[2:3]  # by its weight, and the rest of that
    d_bias = None if keys.bias is None else jnp.sum(d_logits, axis=1, keepdims=True).T
    d_products = (scale * d_logits).astype(slots.query.dtype)
    return (
        Slots(dot(d_products, keys.key, 0, 0), d_tail_lse, d_top_lse),
        Keys(dot(d_products, slots.query, 1, 0), d_values[first:], d_bias, d_tail_mean),
        jnp.sum(d_logits * products, axis=0, keepdims=True),
    )


def _with_tail(weights, mass, keys: Keys):
    """What all keys weigh (p+k M) and their values (p+k V); the first p stand for the tail.

    Both its weight and its mean value are what rounding makes of them and a rest: one key has both,
    the next one the rest of the mean, a third one that of the weight. Zeros fill up registers.
    """
    dtype, mean = keys.value.dtype, keys.tail_mean
    if mean is None:
        return weights.astype(dtype), keys.value
    row = lax.broadcasted_iota(jnp.int32, (32 // dtype.itemsize, 1), 0)

    def rest(x):
        return x - x.astype(dtype).astype(x.dtype)

    weight = 1 - mass
    of_tail = jnp.where(row < 2, weight, jnp.where(row == 2, rest(weight), 0)).astype(dtype)
    means = jnp.where(row == 1, rest(mean), jnp.where(row < 3, mean, 0)).astype(dtype)
    return (
        jnp.concatenate([of_tail, (mass * weights).astype(dtype)]),
        jnp.concatenate([means, keys.value]),
    )


def _softmax(slots: Slots, keys: Keys, scale):
    """Products of keys and queries (k M), softmax over keys (k M), log-sum-exp (1 M)."""
    products = dot(keys.key, slots.query, 1, 1)
    logits = scale * products
    if keys.bias is not None:
        logits += keys.bias.T
    shift = jnp.max(logits, axis=0, keepdims=True)
    weights = jnp.exp(logits - shift)
    total = jnp.sum(weights, axis=0, keepdims=True)
    return products, weights / total, shift + jnp.log(total)


def _mass(lse, top_lse, tail_lse):
    """What the top-k keys weigh against the tail (1 M)."""
    return jax.nn.sigmoid((lse if top_lse is None else top_lse) - tail_lse)
