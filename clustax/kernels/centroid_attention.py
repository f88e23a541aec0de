"""Attention of centroids over all keys: their top-k keys, and attention over the other ones.

On TPU it is one kernel that reads the keys in blocks, once a phase:

1. with sub-clusters: the log-sum-exp of the logits of each, so that their softmax can be averaged;
2. the top-k keys of each cluster. Those found so far stay on chip, best first. As long as a key of
   the next ones is better than the k-th, the best of each cluster is inserted: this takes about
   k · log(S / k) rounds for keys in random order, and k for every 256 keys at most;
3. attention over the keys that are left, with an online softmax.

A tile of logits has keys along sublanes and clusters along lanes, so that all reductions over keys
are sums or maxima of vectors, and what belongs to a cluster is one row.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LANES, SUBLANES = 128, 8
# Keys that are in registers at a time. A bit of an int32 for each eight of them says what is taken.
TILE = 32 * SUBLANES
# Stands for -inf in the logits of masked keys, as in ``clustax.xla``.
MASKED = 0.7 * float(jnp.finfo(jnp.float32).min)
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class CentroidBlocks:
    """Block sizes.

    Attributes:
      keys: the number of keys, and of values, that are read at a time; a multiple of 256.
    """

    keys: int

    def __post_init__(self):
        """Refuses sizes that the kernels cannot work with."""
        if self.keys < TILE or self.keys % TILE:
            raise ValueError(
                f"keys must be a multiple of {TILE}, got {self.keys}; take {TILE} or 2048."
            )


class CentroidAttention(NamedTuple):
    """What the kernel finds out about each cluster."""

    index: Int[Array, "G C k"]  # its top-k keys, best first
    tail_mean: Float[Array, "G C V"]  # attention over the other keys
    tail_lse: Float[Array, "G C R"]  # log-sum-exp of their logits, of each sub-cluster


class _Settings(NamedTuple):
    topk: int
    blocks: CentroidBlocks
    interpret: bool


def centroid_attention(
    centroids: Float[Array, "G C R H"],
    key: Float[Array, "J S H"],
    value: Float[Array, "J S V"],
    bias: Float[Array, "G S"] | None,
    valid: Bool[Array, "G S"] | None,
    share: Float[Array, "G C R"] | None,
    *,
    topk: int,
    scale: float | Float[Array, ""],
    blocks: CentroidBlocks,
    interpret: bool = False,
) -> CentroidAttention:
    r"""The top-k keys of each cluster, and the attention of its centroids over the other keys."""
    num_heads, num_clusters, num_subclusters, head_dim = centroids.shape
    num_tiles = -(-num_clusters // LANES)

    def tile(x):  # G C R … -> G·tiles R lanes …
        padding = [(0, 0), (0, num_tiles * LANES - num_clusters)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(num_heads * num_tiles, LANES, *x.shape[2:])
        return jnp.moveaxis(x, 1, 2)

    def untile(x):  # G·tiles n lanes … -> G C n …
        x = jnp.moveaxis(x, 2, 1).reshape(num_heads, num_tiles * LANES, x.shape[1], *x.shape[3:])
        return x[:, :num_clusters]

    settings = _Settings(topk, blocks, interpret)
    shares = None if num_subclusters == 1 else tile(share)
    index, mean, lse = _attend(
        settings, tile(scale * centroids), key, value, _addend(bias, valid), shares
    )
    mean = untile(mean)  # G C R V
    mean = mean[:, :, 0] if share is None else jnp.einsum("gcr,gcrv->gcv", share, mean)
    return CentroidAttention(untile(index), mean, untile(lse))


def _addend(
    bias: Float[Array, "G S"] | None, valid: Bool[Array, "G S"] | None
) -> Float[Array, "G 1 S"] | None:
    """What is added to the logits of a key: its bias, or -inf if it does not count."""
    if valid is None:
        return None if bias is None else bias[:, None]
    return jnp.where(valid, 0.0 if bias is None else bias, -jnp.inf)[:, None]


def _parts(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "parts ..."]:
    """A float32 array as a sum of arrays of a dtype: bfloat16 takes two, for 16 bits of mantissa."""
    if dtype != jnp.bfloat16:
        return x[None]
    high = lax.reduce_precision(x, 8, 7)  # XLA may leave out a conversion there and back
    return jnp.stack([high, x - high]).astype(dtype)


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Float[Array, "_ _"]:
    """A product over these axes, accumulated in float32."""
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _iota(shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Positions along the first axis."""
    return lax.broadcasted_iota(jnp.int32, shape, 0)


def _attend(settings, centroids, key, value, addend, share):
    """Index, means and log-sum-exps for tiles of clusters; centroids are scaled."""
    return _attend_tpu(settings, centroids, key, value, addend, share)


class _Tile(NamedTuple):
    """Where a tile of keys is."""

    number: Int[Array, ""]  # in its block
    start: Int[Array, ""]  # in the sequence
    length: int  # of the sequence

    @property
    def rows(self) -> pl.Slice:
        """Where it is in its block."""
        return pl.ds(pl.multiple_of(self.number * TILE, TILE), TILE)

    def load(self, ref: Array) -> Float[Array, "keys _"]:
        """These rows of a block; those beyond the sequence are zero."""
        rows = ref[0, self.rows]
        if self.length % TILE:
            position = self.start + _iota(rows.shape)
            rows = jnp.where(position < self.length, rows, jnp.zeros_like(rows))
        return rows

    def logits(
        self, key: Float[Array, "keys H"], parts: Array, r: int, addend: Array | None
    ) -> Float[Array, "32 8 lanes"]:
        """The logits of sub-cluster r; -inf for what is beyond the sequence."""
        logits = sum(_dot(key, parts[0, p, r], (1, 1)) for p in range(parts.shape[1]))
        if addend is not None:
            row = addend[0, :, self.rows]  # 1 keys
            column = jnp.broadcast_to(row, (LANES, TILE)).T
            logits = jnp.maximum(logits + column, MASKED)
        if self.length % TILE:
            position = self.start + _iota(logits.shape)
            logits = jnp.where(position < self.length, logits, -jnp.inf)
        return logits.reshape(-1, SUBLANES, LANES)


def _for_tiles(block: Int[Array, ""], blocks: CentroidBlocks, length: int, body) -> None:
    """Calls ``body`` with each tile of a block that holds keys."""
    per_block = blocks.keys // TILE
    if length % blocks.keys:
        num_tiles = jnp.minimum(per_block, -(-length // TILE) - block * per_block)
    else:
        num_tiles = per_block

    def step(i, _):
        body(_Tile(i, block * blocks.keys + i * TILE, length))

    lax.fori_loop(0, num_tiles, step, None)


def _slots(index: Int[Array, "k lanes"]) -> tuple[Int[Array, "k lanes"], Int[Array, "k lanes"]]:
    """Which row of all the tiles' words stands for a key, and the bit in it."""
    return index // TILE * SUBLANES + index % SUBLANES, 1 << (index // SUBLANES % 32)


def _words(tile: _Tile, slot: Array, bit: Array) -> Int[Array, "8 lanes"]:
    """Which keys of a tile are top-k keys: bit b of row s for key 8 b + s."""
    own = tile.start // TILE * SUBLANES + _iota((SUBLANES, LANES))

    def add(j, words):
        j = pl.multiple_of(j * SUBLANES, SUBLANES)
        for i in range(SUBLANES):
            here = slot[pl.ds(j + i, 1)] == own
            words = words | jnp.where(here, bit[pl.ds(j + i, 1)], 0)
        return words

    return lax.fori_loop(
        0, len(slot) // SUBLANES, add, jnp.zeros((SUBLANES, LANES), jnp.int32), unroll=True
    )


def _forward_kernel(settings: _Settings, length: int, has_addend: bool, has_share: bool, *refs):
    topk, blocks, _ = settings
    refs = iter(refs)
    parts, keys, values = (next(refs) for _ in range(3))
    addend = next(refs) if has_addend else None
    share = next(refs) if has_share else None
    index, mean, lse, ranks, top_rank, slot, bit, words, shift, total, sums = refs
    phase, block = pl.program_id(1), pl.program_id(2)
    num_subclusters = parts.shape[2]
    bits = _iota((TILE // SUBLANES, SUBLANES, LANES))
    eighth = bits.astype(jnp.float32)
    sublane = _iota((SUBLANES, LANES)).astype(jnp.float32)
    first_row = _iota(top_rank.shape) == 0

    for_tiles = partial(_for_tiles, block, blocks, length)

    def for_subclusters_and_tiles(body):
        def step(r, _):
            for_tiles(partial(body, r))

        lax.fori_loop(0, num_subclusters, step, None)

    def start_softmax():
        shift[...] = jnp.full_like(shift, LOWEST)
        total[...] = jnp.zeros_like(total)

    def add_weights(r, logits):
        """Of the online softmax of sub-cluster r; gives weights and how the sums are to shrink."""
        row = pl.ds(r, 1)
        before = shift[row]
        after = jnp.maximum(before, jnp.max(jnp.max(logits, axis=0), axis=0, keepdims=True))
        weights = jnp.exp(logits - after)
        shrink = jnp.exp(before - after)
        added = jnp.sum(jnp.sum(weights, axis=0), axis=0, keepdims=True)
        total[row] = shrink * total[row] + added
        shift[row] = after
        return weights, shrink

    def normalise():
        def start():
            start_softmax()

        def of_block():
            @for_subclusters_and_tiles
            def _(r, tile):
                add_weights(r, tile.logits(tile.load(keys), parts, r, addend))

        def finish():
            total[...] = share[0] / total[...]

        return start, of_block, finish

    def select():
        def start():
            top_rank[...] = jnp.full_like(top_rank, -jnp.inf)
            index[0] = jnp.zeros_like(index[0])

        def rank_keys():
            if num_subclusters > 1:
                ranks[...] = jnp.zeros_like(ranks)

            @for_subclusters_and_tiles
            def _(r, tile):
                logits = tile.logits(tile.load(keys), parts, r, addend)
                if num_subclusters == 1:
                    ranks[tile.number] = logits
                else:
                    row = pl.ds(r, 1)
                    ranks[tile.number] += total[row] * jnp.exp(logits - shift[row])

        def best_of(rank):
            best = jnp.max(jnp.max(rank, axis=0), axis=0, keepdims=True)
            better = jnp.where(best > top_rank[topk - 1 : topk], 1.0, 0.0)
            return best, jnp.max(better) > 0

        def insert_keys(tile):
            def insert(state):
                best, _ = state
                rank = ranks[tile.number]
                # The lowest position of the best, which is then left out.
                place = jnp.min(jnp.where(rank == best, eighth, TILE), axis=0)
                place = SUBLANES * place + sublane
                first = jnp.min(place, axis=0, keepdims=True)
                hit = jnp.where(place == first, (first - sublane) / SUBLANES, -1)
                left = jnp.where(eighth == hit, -jnp.inf, rank)
                ranks[tile.number] = left
                # Keys of equal rank come in order, so those which are there already stay in front.
                old_rank, old_index = top_rank[...], index[0]
                shifted_rank, shifted_index = (pltpu.roll(x, 1, 0) for x in (old_rank, old_index))
                stays = old_rank >= best
                enters = (shifted_rank >= best) | first_row
                new_index = tile.start + first.astype(jnp.int32)
                top_rank[...] = jnp.where(stays, old_rank, jnp.where(enters, best, shifted_rank))
                index[0] = jnp.where(stays, old_index, jnp.where(enters, new_index, shifted_index))
                return best_of(left)

            lax.while_loop(lambda state: state[1], insert, best_of(ranks[tile.number]))

        def of_block():
            rank_keys()
            for_tiles(insert_keys)

        def finish():
            row = _iota(slot.shape)
            slots, bits = _slots(index[0])
            slot[...] = jnp.where(row < topk, slots, -1)
            bit[...] = bits

        return start, of_block, finish

    def attend_rest():
        def start():
            start_softmax()
            sums[...] = jnp.zeros_like(sums)

        def of_block():
            if topk:

                @for_tiles
                def _(tile):
                    words[tile.number] = _words(tile, slot, bit)

            @for_subclusters_and_tiles
            def _(r, tile):
                logits = tile.logits(tile.load(keys), parts, r, addend)
                if topk:
                    taken = words[tile.number] >> bits & 1 == 1
                    logits = jnp.where(taken, -jnp.inf, logits)
                weights, shrink = add_weights(r, logits)
                weights = weights.reshape(TILE, LANES).astype(values.dtype)
                sums[r] = shrink * sums[r] + _dot(tile.load(values), weights, (0, 0))  # V lanes

        def finish():
            for r in range(num_subclusters):
                mean[0, r] = (sums[r] / total[r : r + 1]).T
            lse[0] = shift[...] + jnp.log(total[...])

        return start, of_block, finish

    phases = [normalise] * (topk > 0 and has_share) + [select] * (topk > 0) + [attend_rest]
    for number, make in enumerate(phases):

        def run(make=make):
            start, of_block, finish = make()
            pl.when(block == 0)(start)
            of_block()
            pl.when(block == pl.num_programs(2) - 1)(finish)

        pl.when(phase == number)(run)


def _attend_tpu(settings, centroids, key, value, addend, share):
    topk, blocks, interpret = settings
    num_tiles, num_subclusters = centroids.shape[:2]
    (num_key_heads, length, head_dim), value_dim = key.shape, value.shape[-1]
    parts = jnp.moveaxis(_parts(centroids, key.dtype), 0, 1)  # G·tiles parts R lanes H
    num_phases = 1 + (topk > 0) * (1 if share is None else 2)
    rows = -(-max(topk, 1) // SUBLANES) * SUBLANES
    tiles_per_key_head = num_tiles // num_key_heads

    def of_tile(*shape):
        return pl.BlockSpec((1, *shape), lambda g, p, i: (g, *(0 for _ in shape)))

    def of_values(g, p, i):
        return g // tiles_per_key_head, jnp.where(p == num_phases - 1, i, 0), 0

    arrays = [parts, key, value]
    specs = [
        of_tile(*parts.shape[1:]),
        pl.BlockSpec((1, blocks.keys, head_dim), lambda g, p, i: (g // tiles_per_key_head, i, 0)),
        pl.BlockSpec((1, blocks.keys, value_dim), of_values),
    ]
    if addend is not None:
        tiles_per_head = num_tiles // len(addend)
        arrays.append(addend)
        specs.append(pl.BlockSpec((1, 1, blocks.keys), lambda g, p, i: (g // tiles_per_head, 0, i)))
    if share is not None:
        arrays.append(share)
        specs.append(of_tile(num_subclusters, LANES))
    shapes = [
        ((rows, LANES), jnp.int32),
        ((num_subclusters, LANES, value_dim), jnp.float32),
        ((num_subclusters, LANES), jnp.float32),
    ]
    index, mean, lse = pl.pallas_call(
        partial(_forward_kernel, settings, length, addend is not None, share is not None),
        grid=(num_tiles, num_phases, -(-length // blocks.keys)),
        in_specs=specs,
        out_specs=[of_tile(*shape) for shape, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct((num_tiles, *shape), dtype) for shape, dtype in shapes],
        scratch_shapes=[
            pltpu.VMEM((blocks.keys // TILE, TILE // SUBLANES, SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.int32),
            pltpu.VMEM((rows, LANES), jnp.int32),
            pltpu.VMEM((blocks.keys // TILE, SUBLANES, LANES), jnp.int32),
            pltpu.VMEM((num_subclusters, LANES), jnp.float32),
            pltpu.VMEM((num_subclusters, LANES), jnp.float32),
            pltpu.VMEM((num_subclusters, value_dim, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
    )(*arrays)
    return index[:, :topk], mean, lse
