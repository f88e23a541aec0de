"""Attention of tiles of queries over the top-k keys of their clusters, on GPUs.

A block of threads has one tile: 64 queries of one cluster against its k keys, which are in shared
memory at once, and the merge with the tail. In the backward pass each tile has gradients of its
own for the keys of its cluster; those of a cluster are summed up afterwards, in one order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Int

from clustax.kernels import gpu
from clustax.kernels.common import masked_bias
from clustax.kernels.gpu import products
from clustax.kernels.gpu.products import Factors

STEP_TILES = 1  # what the number of tiles has to be a multiple of
MULTIPLE = 32  # of the number of keys


def tile_size(num_queries: int, num_clusters: int, dtype: jnp.dtype) -> int:
    """The number of queries in a tile, whatever the shapes."""
    del num_queries, num_clusters, dtype
    return gpu.HEIGHT


def grouped_attention(
    query: BFloat16[Array, "G L 64 H"],
    cluster: Int[Array, "G L"],
    key: BFloat16[Array, "G C k H"],
    value: BFloat16[Array, "G C k V"],
    bias: Float[Array, "G C k"] | None = None,
    valid: Bool[Array, "G C k"] | None = None,
    tail_mean: Float[Array, "G C V"] | None = None,
    tail_lse: Float[Array, "G L 64"] | None = None,
    top_lse: Float[Array, "G L 64"] | None = None,
    *,
    scale: float | Float[Array, ""],
) -> BFloat16[Array, "G L 64 V"]:
    """Attention of each query over the keys of its tile's cluster, merged with the tail.

    Args:
      query: queries, in tiles of one cluster each.
      cluster: the cluster of each tile.
      key: the top-k keys of each cluster; keys that do not count hold zeros.
      value: their values, likewise.
      bias: what is added to their logits.
      valid: which of them count.
      tail_mean: attention of each cluster over all other keys; None if there are none.
      tail_lse: for each query the log-sum-exp of the logits of these; given with ``tail_mean``.
      top_lse: for each query what the top-k keys weigh against the tail; its own log-sum-exp of
        their logits if None.
      scale: factor of the logits.
    """
    addend = masked_bias(bias, valid)
    if addend is None:
        addend = jnp.zeros(key.shape[:3], jnp.float32)
    rows = _attend(
        gpu.pad(query, 3, gpu.WIDTH),
        Keys(
            gpu.pad(gpu.pad(key, 2, MULTIPLE), 3, gpu.WIDTH),
            gpu.pad(gpu.pad(value, 2, MULTIPLE), 3, gpu.WIDTH),
            gpu.pad(addend, 2, MULTIPLE, -jnp.inf),
            None if tail_mean is None else gpu.pad(tail_mean, 2, gpu.WIDTH),
        ),
        tail_lse,
        top_lse,
        jnp.asarray(scale, jnp.float32),
        cluster,
    )
    return rows[..., : value.shape[-1]]


class Keys(NamedTuple):
    """What each cluster has, or each tile, or a tile in shared memory: its keys and its tail."""

    key: Any  # k H
    value: Any  # k V
    addend: Any  # k; to logits
    tail_mean: Any  # V, or None


@jax.custom_vjp
def _attend(
    query: BFloat16[Array, "G L 64 H"],
    keys: Keys,
    tail_lse: Float[Array, "G L 64"] | None,
    top_lse: Float[Array, "G L 64"] | None,
    scale: Float[Array, ""],
    cluster: Int[Array, "G L"],
) -> BFloat16[Array, "G L 64 V"]:
    """The same of padded arrays."""

    def work(tile: Tile, scratch, refs):
        _, weights, lse = tile.softmax()
        scratch.weight[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        shape = scratch.out.shape
        rows = products.product(shape, Factors(scratch.weight, tile.keys.value))
        if keys.tail_mean is not None:
            mass = tile.mass(lse)
            rest = gpu.of_columns(tile.keys.tail_mean, shape) * gpu.of_rows(1 - mass, shape)
            rows = rows * gpu.of_rows(mass, shape) + rest
        tile.store(rows, scratch.out, refs[0].at[tile.place])

    output = jax.ShapeDtypeStruct((*query.shape[:3], keys.value.shape[-1]), jnp.bfloat16)
    args = (query, keys, tail_lse, top_lse, scale, cluster)
    return _launch("grouped_attention", work, args, [output])[0]


def _attend_forward(*args):
    return _attend(*args), args


def _attend_backward(residuals, d_rows):
    query, keys, _, top_lse, _, cluster = residuals
    num_heads, num_tiles, height, head_dim = query.shape
    topk, value_dim = keys.value.shape[2:]
    has_tail = keys.tail_mean is not None

    def work(tile: Tile, scratch, refs):
        d_query, d_key, d_value, d_addend, d_scale, *d_tail = refs
        of_tail: Any = d_tail or (None, None)
        d_tail_mean, d_tail_lse = of_tail
        logits_shape = height, topk
        scores, weights, lse = tile.softmax()
        own = tile.d_rows
        d_weights = products.product(logits_shape, Factors(own, tile.keys.value.transpose((1, 0))))
        d_mean = (weights * d_weights).sum(axis=1)
        d_logits = weights * (d_weights - gpu.of_rows(d_mean, logits_shape))
        if has_tail:
            mass = tile.mass(lse)
            shape = height, value_dim
            rows = gpu.load(own, plgpu.Layout.WGMMA).astype(jnp.float32)
            d_rest = (rows * gpu.of_columns(tile.keys.tail_mean, shape)).sum(axis=1)
            d_lse = mass * (1 - mass) * (d_mean - d_rest)
            scratch.d_tail_mean[...] = (rows * gpu.of_rows(1 - mass, shape)).sum(axis=0)
            d_tail_lse[tile.place] = -d_lse
            d_logits *= gpu.of_rows(mass, logits_shape)
            if top_lse is None:
                d_logits += weights * gpu.of_rows(d_lse, logits_shape)
            weights *= gpu.of_rows(mass, logits_shape)
        scratch.d_addend[...] = d_logits.sum(axis=0)
        d_scale[tile.place] = (d_logits * scores).sum(axis=1)
        scratch.weight[...] = weights.astype(jnp.bfloat16)
        scratch.d_logit[...] = (tile.scale * d_logits).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.d_addend, d_addend.at[tile.place])
        if has_tail:
            plgpu.copy_smem_to_gmem(scratch.d_tail_mean, d_tail_mean.at[tile.place])
        # 64 dims at a time, which come first: then there may be fewer than 64 keys.
        for left, right, ref in (
            (tile.query, scratch.d_logit, d_key),
            (own, scratch.weight, d_value),
        ):
            for first in range(0, left.shape[1], gpu.WIDTH):
                dims = slice(first, first + gpu.WIDTH)
                rows = products.product(
                    (gpu.WIDTH, topk), Factors(left.at[:, dims].transpose((1, 0)), right)
                )
                to = (*tile.place, pl.ds(first, gpu.WIDTH))
                tile.store(rows, scratch.d_keys, ref.at[to])
        rows = products.product((height, head_dim), Factors(scratch.d_logit, tile.keys.key))
        tile.store(rows, scratch.out, d_query.at[tile.place])

    def of_tiles(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((num_heads, num_tiles, *shape), dtype)

    outputs = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        of_tiles(head_dim, topk, dtype=jnp.bfloat16),
        of_tiles(value_dim, topk, dtype=jnp.bfloat16),
        of_tiles(topk),
        of_tiles(height),
    ]
    if has_tail:
        outputs += [of_tiles(value_dim), of_tiles(height)]
    name = "grouped_attention_backward"
    d_query, d_key, d_value, d_addend, d_scale, *d_tail = _launch(
        name, work, residuals, outputs, d_rows
    )
    d_tail_mean, d_tail_lse = d_tail or (None, None)

    def of_clusters(x):  # G L … -> G C …
        # A product with this, unlike indexing, sums up in one order.
        indicator = jax.nn.one_hot(cluster, keys.key.shape[1], dtype=jnp.float32)
        # What was bfloat16 keeps all bits in the matrix unit's float32.
        exact = x.dtype == jnp.bfloat16
        precision = lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST
        x = x.astype(jnp.float32)
        return jnp.einsum("glc,gl...->gc...", indicator, x, precision=precision)

    d_keys = Keys(
        jnp.swapaxes(of_clusters(d_key), 2, 3).astype(keys.key.dtype),
        jnp.swapaxes(of_clusters(d_value), 2, 3).astype(keys.value.dtype),
        of_clusters(d_addend),
        d_tail_mean if d_tail_mean is None else of_clusters(d_tail_mean),
    )
    d_top_lse = None if top_lse is None or d_tail_lse is None else -d_tail_lse
    return d_query, d_keys, d_tail_lse, d_top_lse, d_scale.sum(), None


_attend.defvjp(_attend_forward, _attend_backward)


class Tile(NamedTuple):
    """What a block of threads works on."""

    place: tuple[Array, Array]  # its head and its number
    query: Any  # 64 H
    keys: Keys
    d_rows: Any  # 64 V, or None
    scale: Float[Array, ""]
    tail_lse: Any  # 64, or None
    top_lse: Any  # 64, or None

    def softmax(self) -> tuple[Array, Array, Array]:
        """Products of queries and keys (64 k), softmax over keys (64 k), log-sum-exp (64)."""
        shape = self.query.shape[0], self.keys.key.shape[0]
        scores = products.product(shape, Factors(self.query, self.keys.key.transpose((1, 0))))
        logits = self.scale * scores + gpu.of_columns(self.keys.addend, shape)
        shift = logits.max(axis=1)
        weights = jnp.exp(logits - gpu.of_rows(shift, shape))
        total = weights.sum(axis=1)
        return scores, weights * gpu.of_rows(1 / total, shape), shift + jnp.log(total)

    def mass(self, lse: Float[Array, " 64"]) -> Float[Array, " 64"]:
        """What the top-k keys weigh against the tail."""
        return 1 / (1 + jnp.exp(self.tail_lse - (lse if self.top_lse is None else self.top_lse)))

    def store(self, rows: Float[Array, "64 n"], memory: Any, ref: Any) -> None:
        """Moves rows to global memory."""
        memory[...] = rows.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, ref)
        plgpu.wait_smem_to_gmem(0)


class Scratch(NamedTuple):
    """Shared memory for what comes out of registers."""

    out: Any  # 64 n; what is moved to global memory
    weight: Any  # 64 k
    d_logit: Any = None  # 64 k; like all that follows, for the backward pass
    d_addend: Any = None  # k
    d_tail_mean: Any = None  # V
    d_keys: Any = None  # 64 k


def _launch(
    name: str,
    work: Callable[[Tile, Scratch, Any], None],
    args: tuple,
    outputs: list[jax.ShapeDtypeStruct],
    d_rows: BFloat16[Array, "G L 64 V"] | None = None,
) -> list[Array]:
    """Has a block of threads work on each tile, whose queries and keys are in shared memory."""
    query, keys, tail_lse, top_lse, scale, cluster = args
    num_heads, num_tiles, height, head_dim = query.shape
    topk, value_dim = keys.value.shape[2:]
    # All rows are multiples of this, and operands of a product have to have the same.
    swizzle = 128 if topk % gpu.WIDTH == 0 else 64

    def matrices(*shape):
        return products.matrices(*shape, swizzle=swizzle)

    scratch = Scratch(matrices(height, outputs[0].shape[-1]), matrices(height, topk))
    if d_rows is not None:
        scratch = scratch._replace(
            d_logit=matrices(height, topk),
            d_addend=plgpu.SMEM((topk,), jnp.float32),
            d_tail_mean=plgpu.SMEM((value_dim,), jnp.float32),
            d_keys=matrices(gpu.WIDTH, topk),
        )
    of_slots = [x for x in (tail_lse, top_lse) if x is not None]
    moved = {
        "query": (query, matrices(height, head_dim)),
        "key": (keys.key, matrices(topk, head_dim)),
        "value": (keys.value, matrices(topk, value_dim)),
        "addend": (keys.addend, plgpu.SMEM((topk,), jnp.float32)),
    }
    if keys.tail_mean is not None:
        moved["tail_mean"] = (keys.tail_mean, plgpu.SMEM((value_dim,), jnp.float32))
    if d_rows is not None:
        moved["d_rows"] = (d_rows, matrices(height, value_dim))
    arrays = [cluster, scale[None], *(x for x, _ in moved.values()), *of_slots]

    def body(cluster_ref, scale_ref, *refs):
        moved_refs, refs = dict(zip(moved, refs, strict=False)), refs[len(moved) :]
        lse_refs, output_refs = refs[: len(of_slots)], refs[len(of_slots) :]
        place = head, tile = lax.axis_index("head"), lax.axis_index("tile")
        own = cluster_ref[place]

        def in_shared_memory(memory, scratch, ready):
            for what, ref in moved_refs.items():
                at = tile if what in ("query", "d_rows") else own
                plgpu.copy_gmem_to_smem(ref.at[head, at], memory[what], ready)
            plgpu.barrier_wait(ready)
            lse = [gpu.load_rows(ref.at[place]) for ref in lse_refs] + [None, None]
            keys = Keys(*(memory.get(what) for what in Keys._fields))
            d_rows = memory.get("d_rows")
            work(
                Tile(place, memory["query"], keys, d_rows, scale_ref[0], lse[0], lse[1]),
                scratch,
                output_refs,
            )

        pl.run_scoped(
            in_shared_memory,
            memory={what: memory for what, (_, memory) in moved.items()},
            scratch=scratch,
            ready=plgpu.Barrier(num_arrivals=len(moved)),
        )

    grid = {"head": num_heads, "tile": num_tiles}
    return gpu.launch(name, body, arrays, outputs, grid)
