"""Attention of centroids over all keys: their top-k keys, and attention over the other ones.

On TPU one kernel reads the keys in blocks, once a phase:

1. With sub-clusters, it sums up the softmax of each, so that their weights can be averaged.
2. It selects the top-k keys of each cluster. Those found so far stay on the chip, best first. As
   long as one of the next 256 keys beats the k-th of its cluster, the best one for each cluster is
   inserted. For keys in random order this takes about 2 k · ln(S / k) rounds in all; it cannot take
   more than k for every 256 keys.
3. It attends to the keys that are left, with an online softmax. These are told from the others by
   their index, so that no key can be lost or count twice, however logits are rounded.

The backward pass is that of exact attention over the keys that are left; it computes their weights
again. A tile of logits has keys along sublanes and clusters along lanes: whatever is summed over
keys is summed as vectors, and what belongs to the clusters is a row. A head has as many tiles of
clusters as it takes; each of them is worked on like a head.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from clustax import kernels
from clustax.kernels.common import VMEM_BYTES, bfloat16_parts, dot, round_up
from clustax.xla import MASKED

LANES, SUBLANES, BITS = 128, 8, 32
# The keys of a tile: a word of 32 bits for each sublane says which of them are top-k keys.
TILE = BITS * SUBLANES
MAX_KEYS = 2048
# A selection takes time in proportion to topk, and so do the words of a tile.
MAX_TOPK = 512
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class CentroidBlocks:
    """How much of the problem a step of the grid takes.

    Attributes:
      keys: the number of keys, with their values; a multiple of 256.
    """

    keys: int

    def __post_init__(self):
        """Checks what can be checked without shapes."""
        if self.keys < TILE or self.keys % TILE:
            raise ValueError(f"keys must be a positive multiple of {TILE}, got {self.keys}.")

    @classmethod
    def default(cls, num_keys: int, shape: "Shape"):
        """As many keys as fit on the chip, are there, and make the cost of a step small."""
        fit = (VMEM_BYTES - shape.fixed_bytes) // shape.bytes_per_key
        most = max(TILE, min(fit, MAX_KEYS, round_up(num_keys, TILE)))
        return cls(most // TILE * TILE)


class Shape(NamedTuple):
    """What the memory of a step depends on."""

    num_heads: int  # of queries, for each head of keys
    num_clusters: int
    num_subclusters: int
    topk: int
    head_dim: int
    value_dim: int
    dtype: jnp.dtype  # of keys and values

    @property
    def _widths(self) -> tuple[int, int]:
        return round_up(self.head_dim, LANES), round_up(self.value_dim, LANES)

    @property
    def bytes_per_key(self) -> int:
        """On-chip memory that each key of a step takes: going in and out, summed, and ranked."""
        return sum(self._widths) * (4 * self.dtype.itemsize + 4) + LANES * 4

    @property
    def fixed_bytes(self) -> int:
        """The on-chip memory that clusters take, most of it for the gradients of centroids."""
        head_width, value_width = self._widths
        tiles = self.num_heads * -(-self.num_clusters // LANES)
        widths = (2 * tiles + 2) * head_width + 4 * value_width + 4 * SUBLANES
        return 4 * LANES * (self.num_subclusters * widths + 4 * round_up(self.topk, SUBLANES))


def refusal(shape: Shape) -> str | None:
    """Why the kernel cannot serve such a call, or None."""
    if shape.dtype not in (jnp.float32, jnp.bfloat16):
        return f"its kernels take float32 and bfloat16, not {shape.dtype.name}"
    if shape.topk > MAX_TOPK:
        return f"its kernels select at most {MAX_TOPK} keys, not topk={shape.topk}"
    if shape.fixed_bytes + TILE * shape.bytes_per_key > VMEM_BYTES:
        return (
            f"{shape.num_clusters} clusters by {shape.num_subclusters} of dims {shape.head_dim} "
            f"and {shape.value_dim}, of {shape.num_heads} heads that share keys, exceed its memory"
        )
    return None


class CentroidAttention(NamedTuple):
    """What is found out about each cluster."""

    top_index: Int[Array, "G C k"]  # its top-k keys, best first; ties go to the lowest index
    tail_mean: Float[Array, "G C V"]  # attention over its other keys
    tail_lse: Float[Array, "G C R"]  # log-sum-exp of their logits, for each sub-cluster


def centroid_attention(
    centroids: Float[Array, "G C R H"],
    key: Float[Array, "J S H"],
    value: Float[Array, "J S V"],
    bias: Float[Array, "G S"] | None = None,
    valid: Bool[Array, "G S"] | None = None,
    share: Float[Array, "G C R"] | None = None,
    *,
    topk: int,
    scale: float | Float[Array, ""],
    blocks: CentroidBlocks | None = None,
) -> CentroidAttention:
    r"""The top-k keys of each cluster, and the attention of its centroids over the other keys.

    The keys are chosen by their mean weight, :math:`\sum_r p_r \mathrm{softmax}(s\, Q^c_r K^T +
    b)`, where :math:`p_r` is the share of sub-cluster r; with one sub-cluster this is the order of
    logits. The attention over the others is :math:`\sum_r p_r \mathrm{softmax}_{\bar T}(s\, Q^c_r
    K^T + b)\, V`. Differentiable in centroids, keys, values, bias and scale.

    Args:
      centroids: the means of R sub-clusters of each of C clusters, in float32.
      key: keys of J heads, each of which serves G / J consecutive heads of clusters; float32 or
        bfloat16.
      value: their values, of the same dtype.
      bias: what is added to their logits; finite, and at least ``clustax.xla.LOWEST_BIAS``.
      valid: which of them count.
      share: what share of its cluster each sub-cluster is; None if R is 1.
      topk: k, less than S and at most 512.
      scale: factor s of the products.
      blocks: block sizes; chosen from the shapes if None.

    Returns:
      The top-k keys, the mean of the values of the others, and the log-sum-exp of their logits.

    >>> centroids, key = jnp.eye(2)[None, :, None], jnp.array([[[0, 9], [1, 0], [2, 0]]], float)
    >>> with kernels.interpret("tpu"):
    ...     out = centroid_attention(centroids, key, key, topk=1, scale=1.0)
    >>> out.top_index.tolist()  # the last key for the first cluster, the first one for the second
    [[[2], [0]]]
    >>> out.tail_mean[0, 1].tolist()  # of the other two, which have the same logits there
    [1.5, 0.0]
    """
    num_heads, num_clusters, num_subclusters, head_dim = centroids.shape
    if blocks is None:
        shape = Shape(
            num_heads=num_heads // len(key),
            num_clusters=num_clusters,
            num_subclusters=num_subclusters,
            topk=topk,
            head_dim=head_dim,
            value_dim=value.shape[-1],
            dtype=key.dtype,
        )
        blocks = CentroidBlocks.default(key.shape[1], shape)

    def tile(x: Float[Array, "G C R *D"]) -> Float[Array, "g R lanes *D"]:
        padding = ((0, 0), (0, -num_clusters % LANES), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, padding)
        return jnp.swapaxes(x.reshape(-1, LANES, *x.shape[2:]), 1, 2)

    def untile(x: Array) -> Array:  # g n lanes … -> G C n …
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(num_heads, -1, *x.shape[2:])[:, :num_clusters]

    found: Any = _attend(
        tile(scale * centroids),
        key,
        value,
        _addend(bias, valid),
        None if share is None else tile(share),
        topk,
        blocks,
        kernels.interpret.value is not None,
    )
    top_index, mean, lse = map(untile, found)
    mean = mean[:, :, 0] if share is None else jnp.sum(share[..., None] * mean, axis=2)
    return CentroidAttention(top_index[..., :topk], mean, lse)


def _addend(
    bias: Float[Array, "G S"] | None, valid: Bool[Array, "G S"] | None
) -> Float[Array, "G 1 S"] | None:
    """What is added to the logits of a key: its bias, or -inf if it does not count."""
    if valid is None:
        return None if bias is None else bias[:, None]
    return jnp.where(valid, 0.0 if bias is None else bias, -jnp.inf)[:, None]


# g counts tiles of clusters: those of a head come one after another.
@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(
    centroids: Float[Array, "g R lanes H"],  # scaled
    key: Float[Array, "J S H"],
    value: Float[Array, "J S V"],
    addend: Float[Array, "G 1 S"] | None,
    share: Float[Array, "g R lanes"] | None,
    topk: int,
    blocks: CentroidBlocks,
    interpret: bool,
) -> tuple[Int[Array, "g rows lanes"], Float[Array, "g R lanes V"], Float[Array, "g R lanes"]]:
    """The top-k keys, filled up with -1; attention over the others; their log-sum-exp."""
    return _attend_forward(centroids, key, value, addend, share, topk, blocks, interpret)[0]


def _attend_forward(centroids, key, value, addend, share, topk, blocks, interpret):
    num_tiles, num_subclusters = centroids.shape[:2]
    num_keys, value_dim = value.shape[1:]
    rows = round_up(max(topk, 1), SUBLANES)
    operands = _Operands(_parts(centroids, key.dtype), key, value, addend)
    num_phases = 1 if topk == 0 else 2 if share is None else 3
    grid = _Grid(num_tiles, blocks, lambda tile, _, block: (tile, block))
    # Values stay where they are until the last phase, which alone needs them.
    of_values = _Grid(
        num_tiles, blocks, lambda tile, phase, block: (tile, block * (phase == num_phases - 1))
    )
    of_subclusters = jax.ShapeDtypeStruct((num_tiles, num_subclusters, LANES), jnp.float32)
    out = _Found(
        jax.ShapeDtypeStruct((num_tiles, rows, LANES), jnp.int32),
        jax.ShapeDtypeStruct((*of_subclusters.shape, value_dim), jnp.float32),
        of_subclusters,
        of_subclusters,
    )
    tiles = blocks.keys // TILE
    scratch = _Scratch(
        rank=pltpu.VMEM((tiles, BITS, SUBLANES, LANES), jnp.float32),
        top_rank=pltpu.VMEM((rows, LANES), jnp.float32),
        words=pltpu.VMEM((tiles, SUBLANES, LANES), jnp.int32),
        sums=pltpu.VMEM((num_subclusters, value_dim, LANES), jnp.float32),
    )
    found = pl.pallas_call(
        partial(_forward, topk, num_keys),
        grid=(num_tiles, num_phases, -(-num_keys // blocks.keys)),
        in_specs=(
            grid.operands(operands)._replace(value=of_values.keys(value)),
            jax.tree.map(grid.clusters, share),
        ),
        out_specs=(jax.tree.map(grid.clusters, out),),
        out_shape=(out,),
        scratch_shapes=(scratch,),
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
        name="centroid_attention",
    )(operands, share)[0]
    lse = found.shift + jnp.log(found.total)
    return (found.top_index, found.mean, lse), (centroids, key, value, addend, found)


def _attend_backward(topk, blocks, interpret, residuals, cotangents):
    centroids, key, value, addend, found = residuals
    _, d_mean, d_lse = cotangents
    num_tiles, num_keys = len(centroids), key.shape[1]
    num_sharing = num_tiles // len(key)
    operands = _Operands(_parts(centroids, key.dtype), key, value, addend)
    d_mean = d_mean.astype(value.dtype)
    rest = _Rest(found._replace(mean=d_mean), jnp.sum(d_mean * found.mean, axis=-1) - d_lse)
    # Tiles of clusters that share keys follow each other, so that gradients of keys are added up on
    # the chip; those of all their centroids stay there as well.
    grid = _Grid(num_tiles, blocks, lambda head, block, tile: (head * num_sharing + tile, block))
    d_centroids = jax.ShapeDtypeStruct((len(key), num_sharing, *centroids.shape[1:]), jnp.float32)
    d_addend = jax.ShapeDtypeStruct((num_tiles, 1, num_keys), jnp.float32)
    out = _Operands(
        d_centroids,
        jax.ShapeDtypeStruct(key.shape, key.dtype),
        jax.ShapeDtypeStruct(value.shape, value.dtype),
        None if addend is None else d_addend,
    )
    of_centroids = pl.BlockSpec((None, *d_centroids.shape[1:]), lambda head, *_: (head, 0, 0, 0, 0))
    d_centroids, d_key, d_value, d_addend = pl.pallas_call(
        partial(_backward, num_keys),
        grid=(len(key), -(-num_keys // blocks.keys), num_sharing),
        in_specs=(grid.operands(operands), jax.tree.map(grid.clusters, rest)),
        out_specs=(grid.operands(out)._replace(centroids=of_centroids),),
        out_shape=(out,),
        scratch_shapes=(
            pltpu.VMEM((blocks.keys, key.shape[2]), jnp.float32),
            pltpu.VMEM((blocks.keys, value.shape[2]), jnp.float32),
            pltpu.VMEM((blocks.keys // TILE, SUBLANES, LANES), jnp.int32),
        ),
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
        name="centroid_attention_backward",
    )(operands, rest)[0]
    if addend is not None:
        d_addend = d_addend.reshape(len(addend), -1, 1, num_keys).sum(axis=1)
    return d_centroids.reshape(centroids.shape), d_key, d_value, d_addend, None


_attend.defvjp(_attend_forward, _attend_backward)

_COMPILER_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def _parts(
    centroids: Float[Array, "g R lanes H"], dtype: jnp.dtype
) -> Float[Array, "g parts R lanes H"]:
    """Float32 as a sum of arrays of a dtype: bfloat16 takes two, to have 16 bits of mantissa."""
    if dtype == jnp.float32:
        return centroids[:, None]
    return jnp.stack(bfloat16_parts(centroids), axis=1)


class _Operands(NamedTuple):
    """The operands of both passes, or what belongs to each: blocks, their specs, gradients."""

    centroids: Any  # g parts R lanes H
    key: Any  # J S H
    value: Any  # J S V
    addend: Any  # G 1 S, or None


class _Grid(NamedTuple):
    """Blocks of arrays for steps that each take one tile of clusters and one block of keys."""

    num_tiles: int
    blocks: CentroidBlocks
    place: Callable  # which two a step takes

    def clusters(self, x) -> pl.BlockSpec:
        """What belongs to the clusters."""
        zeros = (0,) * (x.ndim - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda *step: (self.place(*step)[0], *zeros))

    def keys(self, x) -> pl.BlockSpec:
        """Rows that belong to keys, for each of their heads."""
        return self._of_head(x, (self.blocks.keys, x.shape[2]), lambda block: (block, 0))

    def addend(self, x) -> pl.BlockSpec:
        """Numbers that belong to keys."""
        return self._of_head(x, (1, self.blocks.keys), lambda block: (0, block))

    def operands(self, x: _Operands) -> _Operands:
        """All operands."""
        return _Operands(
            self.clusters(x.centroids),
            self.keys(x.key),
            self.keys(x.value),
            jax.tree.map(self.addend, x.addend),
        )

    def _of_head(self, x, shape, place) -> pl.BlockSpec:
        tiles_per_head = self.num_tiles // len(x)

        def index(*step):
            tile, block = self.place(*step)
            return tile // tiles_per_head, *place(block)

        return pl.BlockSpec((None, *shape), index)


class _Found(NamedTuple):
    """What the forward pass finds out.

    Log-sum-exps come in two: where no key counts, the logarithm would be lost beside the shift.
    """

    top_index: Any  # g rows lanes
    mean: Any  # g R lanes V
    shift: Any  # g R lanes: what a softmax subtracts from logits
    total: Any  # g R lanes: the sum of its weights


class _Scratch(NamedTuple):
    """What the forward pass keeps on the chip."""

    rank: Any  # tiles 32 8 lanes: of the keys of a block; -inf once they are inserted
    top_rank: Any  # rows lanes: of the top-k keys
    words: Any  # tiles 8 lanes: which keys of a block are top-k keys
    sums: Any  # R V lanes: the sum of the weighted values


class _Rest(NamedTuple):
    """What the backward pass has besides operands."""

    found: _Found  # with the gradient of the mean in its place
    d_shift: Any  # R lanes: what is subtracted from the gradients of weights


class _Tile(NamedTuple):
    """A tile of keys."""

    number: Int[Array, ""]  # in its block
    start: Int[Array, ""]  # in the sequence
    num_keys: int  # of the sequence

    @property
    def rows(self):
        """Where it is in its block."""
        return pl.ds(pl.multiple_of(self.number * TILE, TILE), TILE)

    def load(self, ref) -> Float[Array, "keys _"]:
        """Its rows; those beyond the sequence hold zeros."""
        rows = ref[self.rows]
        if self.num_keys % TILE == 0:
            return rows
        within = _iota(rows.shape) < self.num_keys - self.start
        return jnp.where(within, rows, jnp.zeros_like(rows))

    def logits(self, operands: _Operands, r: Int[Array, ""]) -> Float[Array, "32 8 lanes"]:
        """The logits of a sub-cluster; those of keys beyond the sequence are -inf."""
        key = self.load(operands.key)
        num_parts = operands.centroids.shape[0]
        logits = dot(key, operands.centroids[0, r], 1, 1)
        for part in range(1, num_parts):
            logits += dot(key, operands.centroids[part, r], 1, 1)
        if operands.addend is not None:
            column = jnp.broadcast_to(operands.addend[:, self.rows], (LANES, TILE)).T
            logits = jnp.maximum(logits + column, MASKED)
        logits = logits.reshape(BITS, SUBLANES, LANES)
        if self.num_keys % TILE == 0:
            return logits
        rest = self.num_keys - self.start - SUBLANES * _iota(logits.shape)
        return jnp.where(_iota((SUBLANES, LANES)) < rest, logits, -jnp.inf)


def _forward(topk: int, num_keys: int, operands, share, found, scratch) -> None:
    top_index, mean, shift, total = found
    rank, top_rank, words, sums = scratch
    phase, block = pl.program_id(1), pl.program_id(2)
    for_tiles = partial(_for_tiles, block, num_keys, operands.key.shape[0])
    for_all = partial(_for_all, operands.centroids.shape[1], for_tiles)
    sublane = _iota((SUBLANES, LANES)).astype(jnp.float32)

    def add_weights(r, logits):
        """Takes logits into the softmax: their weights, and the factor for sums made before."""
        row = pl.ds(r, 1)
        before = shift[row]
        after = jnp.maximum(before, _over_keys(jnp.max, logits))
        weights, shrink = jnp.exp(logits - after), jnp.exp(before - after)
        total[row] = shrink * total[row] + _over_keys(jnp.sum, weights)
        shift[row] = after
        return weights, shrink

    def start_softmax():
        shift[...] = jnp.full_like(shift, LOWEST)
        total[...] = jnp.zeros_like(total)

    def normalise():
        for_all(lambda r, tile: add_weights(r, tile.logits(operands, r)))

    def finish_normalising():
        total[...] = share[...] / total[...]

    def start_selection():
        top_rank[...] = jnp.full_like(top_rank, -jnp.inf)
        top_index[...] = jnp.full_like(top_index, -1)

    def select():
        if share is not None:
            rank[...] = jnp.zeros_like(rank)

        @for_all
        def _(r, tile):
            logits = tile.logits(operands, r)
            if share is None:
                rank[tile.number] = logits
            else:
                row = pl.ds(r, 1)
                rank[tile.number] += total[row] * jnp.exp(logits - shift[row])

        @for_tiles
        def _(tile):
            left = best_of(rank[tile.number])
            lax.while_loop(lambda left: left[1], partial(insert_best, tile), left)

    def best_of(ranks):
        best = _over_keys(jnp.max, ranks)
        better = jnp.where(best > top_rank[topk - 1 : topk], 1.0, 0.0)
        return best, jnp.max(better) > 0

    def insert_best(tile, left):
        best, _ = left
        ranks = rank[tile.number]
        # By constants, as a vector of all of them would be kept in registers, and spilled; in four
        # chains, which do not wait for one another.
        lowest = jnp.full_like(sublane, BITS)
        for start in range(0, BITS, SUBLANES):
            of_chain = jnp.full_like(sublane, BITS)
            for eighth in reversed(range(start, start + SUBLANES)):
                of_chain = jnp.where(ranks[eighth] == best, eighth, of_chain)
            lowest = jnp.minimum(lowest, of_chain)
        place = SUBLANES * lowest + sublane
        first = jnp.min(place, axis=0, keepdims=True)
        taken = jnp.where(place == first, lowest, -1)
        ranks = jnp.stack([jnp.where(taken == i, -jnp.inf, ranks[i]) for i in range(BITS)])
        rank[tile.number] = ranks

        # Keys of equal rank come in order, so those that are there stay before them.
        stays = top_rank[...] >= best
        next_rank, next_index = (pltpu.roll(x[...], 1, 0) for x in (top_rank, top_index))
        enters = (next_rank >= best) | (_iota(top_rank.shape) == 0)
        entering = tile.start + first.astype(jnp.int32)
        top_index[...] = jnp.where(stays, top_index[...], jnp.where(enters, entering, next_index))
        top_rank[...] = jnp.where(stays, top_rank[...], jnp.where(enters, best, next_rank))
        return best_of(ranks)

    def finish_selection():
        top_index[...] = jnp.where(_iota(top_index.shape) < topk, top_index[...], -1)

    def start_attending():
        start_softmax()
        sums[...] = jnp.zeros_like(sums)

    def attend():
        _find_taken(for_tiles, top_index, words)

        @for_all
        def _(r, tile):
            logits = jnp.where(_taken(words[tile.number]), -jnp.inf, tile.logits(operands, r))
            weights, shrink = add_weights(r, logits)
            value = tile.load(operands.value)
            weights = weights.reshape(TILE, LANES).astype(value.dtype)
            sums[r] = shrink * sums[r] + dot(value, weights, 0, 0)

    def finish_attending():
        for r in range(len(sums)):
            mean[r] = (sums[r] / total[r : r + 1]).T

    phases = [(start_attending, attend, finish_attending)]
    if topk:
        phases.insert(0, (start_selection, select, finish_selection))
    else:
        pl.when(block == 0)(start_selection)
    if topk and share is not None:
        phases.insert(0, (start_softmax, normalise, finish_normalising))
    for number, (start, of_block, finish) in enumerate(phases):

        @pl.when(phase == number)
        def _(start=start, of_block=of_block, finish=finish):
            pl.when(block == 0)(start)
            of_block()
            pl.when(block == pl.num_programs(2) - 1)(finish)


def _backward(num_keys, operands, rest, gradients, d_key, d_value, words) -> None:
    block, tile_of_clusters = pl.program_id(1), pl.program_id(2)
    for_tiles = partial(_for_tiles, block, num_keys, len(operands.key))
    d_centroids = gradients.centroids.at[tile_of_clusters]

    @pl.when(block == 0)
    def _():
        d_centroids[...] = jnp.zeros_like(d_centroids)

    @pl.when(tile_of_clusters == 0)
    def _():
        d_key[...] = jnp.zeros_like(d_key)
        d_value[...] = jnp.zeros_like(d_value)

    if operands.addend is not None:
        gradients.addend[...] = jnp.zeros_like(gradients.addend)
    _find_taken(for_tiles, rest.found.top_index, words)

    @partial(_for_all, operands.centroids.shape[1], for_tiles)
    def _(r, tile):
        row, rows = pl.ds(r, 1), tile.rows
        key, value, d_mean = tile.load(operands.key), tile.load(operands.value), rest.found.mean[r]
        logits = jnp.where(_taken(words[tile.number]), -jnp.inf, tile.logits(operands, r))
        logits = logits.reshape(TILE, LANES)
        weights = jnp.exp(logits - rest.found.shift[row]) * (1 / rest.found.total[row])
        d_logits = weights * (dot(value, d_mean, 1, 1) - rest.d_shift[row])
        if operands.addend is not None:
            d_logits = jnp.where(logits > MASKED, d_logits, 0)
            gradients.addend[:, rows] += jnp.sum(d_logits.T, axis=0, keepdims=True)
        d_logits = d_logits.astype(key.dtype)
        d_value[rows] += dot(weights.astype(value.dtype), d_mean, 1, 0)
        d_key[rows] += dot(d_logits, operands.centroids[0, r], 1, 0)
        d_centroids[r] += dot(d_logits, key, 0, 0)

    @pl.when(tile_of_clusters == pl.num_programs(2) - 1)
    def _():
        gradients.key[...] = d_key[...].astype(gradients.key.dtype)
        gradients.value[...] = d_value[...].astype(gradients.value.dtype)


def _for_tiles(
    block: Int[Array, ""], num_keys: int, keys_per_block: int, body: Callable[[_Tile], None]
) -> None:
    """Calls ``body`` for each tile of a block that has keys."""
    num_tiles = keys_per_block // TILE
    if num_keys % keys_per_block:
        num_tiles = jnp.minimum(num_tiles, -(-num_keys // TILE) - block * num_tiles)

    def step(number, _):
        body(_Tile(number, block * keys_per_block + number * TILE, num_keys))

    lax.fori_loop(0, num_tiles, step, None)


def _for_all(num_subclusters: int, for_tiles, body) -> None:
    """Calls ``body`` for each sub-cluster and each tile of a block."""

    def step(r, _):
        for_tiles(partial(body, r))

    lax.fori_loop(0, num_subclusters, step, None)


def _find_taken(for_tiles, index, words) -> None:
    """Sets in the words of a block the bits of the top-k keys: bit b of row s for key 8 b + s."""

    @for_tiles
    def _(tile):
        rows = tile.start // SUBLANES // BITS * SUBLANES + _iota((SUBLANES, LANES))

        def add(i, word):
            taken = index[pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)]
            row = taken // TILE * SUBLANES + taken % SUBLANES
            bit = 1 << (taken // SUBLANES % BITS)
            for j in range(SUBLANES):
                word |= jnp.where(row[j : j + 1] == rows, bit[j : j + 1], 0)
            return word

        word = jnp.zeros((SUBLANES, LANES), jnp.int32)
        words[tile.number] = lax.fori_loop(0, len(index) // SUBLANES, add, word, unroll=4)


def _taken(word: Int[Array, "8 lanes"]) -> Bool[Array, "32 8 lanes"]:
    """Which keys of a tile are top-k keys."""
    return word << (BITS - 1 - _iota((BITS, SUBLANES, LANES))) < 0  # its bit becomes the sign


def _over_keys(reduce, x: Float[Array, "32 8 lanes"]) -> Float[Array, "1 lanes"]:
    return reduce(reduce(x, axis=0), axis=0, keepdims=True)


def _iota(shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Positions along the first axis."""
    return lax.broadcasted_iota(jnp.int32, shape, 0)
