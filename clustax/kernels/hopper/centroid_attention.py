"""Attention of centroids over all keys on Hopper GPUs: top-k keys, and attention over the others.

Several sweeps over the keys compute the same logits, each for one thing that the next one needs:

1. with sub-clusters, the log-sum-exp of the logits of each, so that their softmax can be averaged;
2. the largest rank among every 64 keys. The k-th largest of these bounds the ranks of the top-k
   keys from below, and few other keys reach it;
3. those which do, from which the top-k keys are sorted out;
4. the log-sum-exp of the logits of the other keys;
5. the mean of the values, weighted by their softmax.

A block of threads has 64 clusters and a stretch of keys, so there is no C x S array. The backward
pass is XLA's, and has one for each head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped

from clustax import xla
from clustax.kernels import hopper
from clustax.kernels.common import bfloat16_parts, masked_bias

KEYS = 64  # at a time
TILE = (hopper.HEIGHT, KEYS)
TILES = 16  # of a block
SLOTS = 2  # tiles of keys in flight
LOWEST = float(jnp.finfo(jnp.float32).min)


class CentroidAttention(NamedTuple):
    """What there is to know about each cluster."""

    top_keys: Int[Array, "G C k"]  # best first
    tail_mean: Float[Array, "G C V"]  # attention over the other keys
    tail_lse: Float[Array, "G C R"]  # log-sum-exp of their logits, of each sub-cluster


class Operands(NamedTuple):
    """What all sweeps read; dims, clusters and keys are padded."""

    centroids: Sequence[BFloat16[Array, "G R C H"]]  # parts of the scaled centroids
    key: BFloat16[Array, "J S H"]
    value: BFloat16[Array, "J S V"] | None
    addend: Float[Array, "G|1 S"]  # to logits: bias, MASKED, or -inf for padding

    @property
    def num_subclusters(self) -> int:
        """R."""
        return self.centroids[0].shape[1]


class Softmax(NamedTuple):
    """Weights of sub-clusters: factor times the exponential of logits less a shift.

    One number, shift - log(factor), would do but for rounding where logits are huge.
    """

    shift: Float[Array, "G R C"]
    factor: Float[Array, "G R C"]


class Top(NamedTuple):
    """The k-th key of each cluster: those that come before it in rank, then in order, are top."""

    rank: Float[Array, "G 1 C"]
    position: Int[Array, "G 1 C"]


class Tile(NamedTuple):
    """What a sweep sees of a tile of keys."""

    logits: Callable[[Any], Float[Array, "64 keys"]]  # of sub-cluster r of 64 clusters
    rows: Callable[[str, Any], Array]  # what belongs to the clusters, of sub-cluster r
    position: Int[Array, "64 keys"]  # of each key
    number: Int[Array, ""]  # of the tile
    weigh: Callable[[Float[Array, "64 keys"]], None]  # adds weights times values
    write: Callable[..., None]  # to an output, what belongs to the clusters


def centroid_attention(
    centroids: Float[Array, "G C R H"],
    key: BFloat16[Array, "J S H"],
    value: BFloat16[Array, "J S V"],
    bias: Float[Array, "G S"] | None,
    valid: Bool[Array, "G S"] | None,
    share: Float[Array, "G C R"] | None,
    *,
    topk: int,
    scale: float | Float[Array, ""],
) -> CentroidAttention:
    """The top-k keys of each cluster, and the attention of its centroids over the other keys.

    Args:
      centroids: centroids of sub-clusters.
      key: keys; those that do not count hold zeros.
      value: their values, likewise.
      bias: what is added to the logits of keys.
      valid: which keys count.
      share: the share of its cluster that each sub-cluster has; None if R is 1.
      topk: k, less than S.
      scale: factor of the logits.
    """
    return _attend(scale * centroids, key, value, masked_bias(bias, valid), share, topk)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    centroids: Float[Array, "G C R H"],
    key: BFloat16[Array, "J S H"],
    value: BFloat16[Array, "J S V"],
    addend: Float[Array, "G S"] | None,
    share: Float[Array, "G C R"] | None,
    topk: int,
) -> CentroidAttention:
    num_clusters, value_dim = centroids.shape[1], value.shape[-1]
    tiles = min(TILES, -(-key.shape[1] // KEYS))
    block = tiles * KEYS
    if addend is None:
        addend = jnp.zeros((1, key.shape[1]), jnp.float32)
    key, value = (
        hopper.pad(hopper.pad(x, 1, block), 2, hopper.WIDTH).astype(jnp.bfloat16)
        for x in (key, value)
    )
    centroids = hopper.pad(centroids, 3, hopper.WIDTH)

    def of_subclusters(x):  # G C R … -> G R C …
        return hopper.pad(jnp.swapaxes(x, 1, 2), 2, hopper.HEIGHT)

    operands = Operands(
        bfloat16_parts(of_subclusters(centroids)),
        key,
        value,
        hopper.pad(addend, 1, block, -jnp.inf),
    )
    shares = 1.0 if share is None else of_subclusters(share)
    ranking = top = None
    if operands.num_subclusters > 1 and topk:
        shift, total = _log_sum_exp(operands, None, None, tiles=tiles)
        ranking = Softmax(shift, shares / total)
    index = jnp.zeros((*centroids.shape[:2], 0), jnp.int32)
    if topk:
        best, index = _select(operands, ranking, topk, tiles=tiles)
        top = Top(best[:, None, :, -1], index[:, None, :, -1])
    shift, total = _log_sum_exp(operands, ranking, top, tiles=tiles)
    tail_mean = _average(operands, ranking, top, Softmax(shift, shares / total), tiles=tiles)
    tail_lse = jnp.swapaxes(shift + jnp.log(total), 1, 2)
    return CentroidAttention(
        index[:, :num_clusters],
        tail_mean[:, :num_clusters, :value_dim],
        tail_lse[:, :num_clusters],
    )


def _attend_forward(centroids, key, value, addend, share, topk):
    attended: CentroidAttention = _attend(centroids, key, value, addend, share, topk)
    return attended, (centroids, key, value, addend, share, attended.top_keys)


def _attend_backward(topk, residuals, gradients):
    del topk
    *differentiable, share, index = residuals
    _, vjp = jax.vjp(partial(_dense_tail, share=share, index=index), *differentiable)
    return *vjp((gradients.tail_mean, gradients.tail_lse)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _dense_tail(
    centroids: Float[Array, "G C R H"],
    key: BFloat16[Array, "J S H"],
    value: BFloat16[Array, "J S V"],
    addend: Float[Array, "G S"] | None,
    *,
    share: Float[Array, "G C R"] | None,
    index: Int[Array, "G C k"],
) -> tuple[Float[Array, "G C V"], Float[Array, "G C R"]]:
    """Attention over keys that are not top in plain JAX, for the backward pass."""
    group = len(centroids) // len(key)
    share = jnp.ones(centroids.shape[:3]) if share is None else share

    def head(centroids, key, value, addend, share, index):
        keys = xla.Keys(key.astype(jnp.float32), value.astype(jnp.float32), addend, None)
        logits = xla.attention_logits(centroids, keys, 1.0)
        in_tail = xla.outside(index, len(key))
        logits = jnp.where(in_tail[:, None], logits, -jnp.inf)
        return xla.attend_subclusters(logits, keys.value, share)

    heads = jax.tree.map(
        lambda x: x.reshape(len(key), group, *x.shape[1:]), (centroids, addend, share, index)
    )
    of_group = jax.vmap(head, in_axes=(0, None, None, 0, 0, 0))
    mean, lse = jax.vmap(of_group)(heads[0], key, value, *heads[1:])
    return mean.reshape(-1, *mean.shape[2:]), lse.reshape(-1, *lse.shape[2:])


def _select(
    operands: Operands, ranking: Softmax | None, topk: int, *, tiles: int
) -> tuple[Float[Array, "G C k"], Int[Array, "G C k"]]:
    """The top-k keys of each cluster, in order, with their ranks."""
    most = jnp.swapaxes(_maxima(operands, ranking, tiles=tiles), 1, 2)  # G C tiles
    if most.shape[-1] < topk:
        least = jnp.full(most.shape[:2], LOWEST)
    else:
        least = lax.top_k(most, topk)[0][..., -1]
    # G blocks C list
    ranks, index = _collect(
        operands, ranking, jnp.maximum(least, LOWEST)[:, None], topk, tiles=tiles
    )

    def of_cluster(x):
        return jnp.swapaxes(x, 1, 2).reshape(*most.shape[:2], -1)

    ranks, index = lax.sort((-of_cluster(ranks), of_cluster(index)), num_keys=2)
    return -ranks[..., :topk], index[..., :topk]


def _rank(tile: Tile, num_subclusters: int) -> Float[Array, "64 keys"]:
    """What the top-k keys have most of: logits, or the mean weight of sub-clusters."""
    if num_subclusters == 1:
        return tile.logits(0)
    return _weights(tile, num_subclusters, "rank")


def _weights(tile: Tile, num_subclusters: int, softmax: str) -> Float[Array, "64 keys"]:
    """The sum over sub-clusters of their weights."""

    def add(r, total):
        shift, factor = (tile.rows(f"{softmax}_{name}", r) for name in Softmax._fields)
        weights = jnp.exp(tile.logits(r) - hopper.of_rows(shift, TILE))
        return total + hopper.of_rows(factor, TILE) * weights

    return lax.fori_loop(0, num_subclusters, add, _constant(0.0, TILE))


def _is_top(tile: Tile, num_subclusters: int) -> Bool[Array, "64 keys"]:
    rank = _rank(tile, num_subclusters)
    least = hopper.of_rows(tile.rows("top_rank", 0), TILE)
    last = hopper.of_rows(tile.rows("top_position", 0), TILE)
    return (rank > least) | ((rank == least) & (tile.position <= last))


def _constant(value: float, shape: tuple[int, ...]) -> Float[Array, "..."]:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else hopper.ROWS
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _named(**groups: Softmax | Top | None) -> dict[str, Array]:
    """What belongs to rows, by the name of its group and its own."""
    return {
        f"{group}_{name}": x
        for group, fields in groups.items()
        if fields is not None
        for name, x in fields._asdict().items()
    }


def _log_sum_exp(
    operands: Operands, ranking: Softmax | None, top: Top | None, *, tiles: int
) -> tuple[Float[Array, "G R C"], Float[Array, "G R C"]]:
    """The largest logit of each sub-cluster, and the sum of their exponentials less this.

    Only of keys that are not top, if these are given.
    """
    num_subclusters = operands.num_subclusters

    def init():
        height = (hopper.HEIGHT,)
        return ((_constant(LOWEST, height), _constant(0.0, height)),) * num_subclusters

    def visit(tile, carry):
        is_top = None if top is None else _is_top(tile, num_subclusters)

        def add(r, carry):
            here = plgpu.layout_cast(jnp.full(hopper.HEIGHT, r, jnp.int32), hopper.ROWS)
            shift, total = carry[0]
            for other, (of_shift, of_total) in enumerate(carry[1:], start=1):
                shift = jnp.where(here == other, of_shift, shift)
                total = jnp.where(here == other, of_total, total)
            logits = tile.logits(r)
            if is_top is not None:
                logits = jnp.where(is_top, -jnp.inf, logits)
            new = jnp.maximum(shift, logits.max(axis=1))
            weights = jnp.exp(logits - hopper.of_rows(new, TILE))
            total = total * jnp.exp(shift - new) + weights.sum(axis=1)
            return tuple(
                (jnp.where(here == other, new, of_shift), jnp.where(here == other, total, of_total))
                for other, (of_shift, of_total) in enumerate(carry)
            )

        # Not unrolled: the logits of several sub-clusters at a time would not fit registers.
        return lax.fori_loop(0, num_subclusters, add, carry)

    def finish(write, block, carry, _):
        for r, (shift, total) in enumerate(carry):
            write(0, shift, block, r)
            write(1, total, block, r)

    shape = ("blocks", num_subclusters, "clusters")
    shift, total = _sweep(
        "log_sum_exp",
        operands._replace(value=None),
        _named(rank=ranking, top=top),
        [(shape, jnp.float32)] * 2,
        visit,
        finish,
        init,
        tiles=tiles,
    )
    most = shift.max(axis=1)
    return most, jnp.sum(total * jnp.exp(shift - most[:, None]), axis=1)


def _maxima(
    operands: Operands, ranking: Softmax | None, *, tiles: int
) -> Float[Array, "G tiles C"]:
    """The largest rank in each tile of keys."""

    def visit(tile, carry):
        tile.write(0, _rank(tile, operands.num_subclusters).max(axis=1), tile.number)
        return carry

    return _sweep(
        "largest_ranks",
        operands._replace(value=None),
        _named(rank=ranking),
        [(("tiles", "clusters"), jnp.float32)],
        visit,
        tiles=tiles,
    )[0]


def _collect(
    operands: Operands,
    ranking: Softmax | None,
    least: Float[Array, "G 1 C"],
    topk: int,
    *,
    tiles: int,
) -> list[Array]:
    """The top-k keys of each block among those that rank at least so high: ranks and positions.

    They are in no order. Where there are fewer, the ranks of the others are -inf.
    """
    shape = (hopper.HEIGHT, -(-topk // 8) * 8)

    def init():
        slots = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        return _constant(-jnp.inf, shape), -1 - slots

    def visit(tile, carry):
        def better(ranks, best):  # of equal ranks the earlier ones are there already
            return jnp.where(ranks > hopper.of_rows(best.min(axis=1), TILE), ranks, -jnp.inf)

        def any_left(ranks):
            return ranks.max(axis=1).max() > -jnp.inf

        def insert(state):  # the best of the tile in place of the worst that is there
            ranks, _, best, index = state
            new = ranks.max(axis=1)
            is_new = ranks == hopper.of_rows(new, TILE)
            position = jnp.where(is_new, tile.position, jnp.int32(2**31 - 1)).min(axis=1)
            ranks = jnp.where(tile.position == hopper.of_rows(position, TILE), -jnp.inf, ranks)
            worst = best.min(axis=1)
            is_worst = best == hopper.of_rows(worst, shape)
            last = jnp.where(is_worst, index, jnp.int32(-(2**31))).max(axis=1)
            here = (index == hopper.of_rows(last, shape)) & hopper.of_rows(new > worst, shape)
            best = jnp.where(here, hopper.of_rows(new, shape), best)
            index = jnp.where(here, hopper.of_rows(position, shape), index)
            ranks = better(ranks, best)
            return ranks, any_left(ranks), best, index

        best, index = carry
        ranks = _rank(tile, operands.num_subclusters)
        ranks = jnp.where(ranks >= hopper.of_rows(tile.rows("least", 0), TILE), ranks, -jnp.inf)
        ranks = better(ranks, best)
        state = ranks, any_left(ranks), best, index
        return lax.while_loop(lambda state: state[1], insert, state)[2:]

    def finish(write, block, carry, _):
        for output, x in enumerate(carry):
            write(output, x, block)

    shape_of_lists = ("blocks", "clusters", shape[1])
    return _sweep(
        "collect_top_keys",
        operands._replace(value=None),
        _named(rank=ranking) | {"least": least},
        [(shape_of_lists, jnp.float32), (shape_of_lists, jnp.int32)],
        visit,
        finish,
        init,
        tiles=tiles,
    )


def _average(
    operands: Operands,
    ranking: Softmax | None,
    top: Top | None,
    tail: Softmax,
    *,
    tiles: int,
) -> Float[Array, "G C V"]:
    """The sum of the values of keys that are not top, times their weights."""
    num_subclusters = operands.num_subclusters

    def visit(tile, carry):
        weights = _weights(tile, num_subclusters, "tail")
        if top is not None:
            weights = jnp.where(_is_top(tile, num_subclusters), 0.0, weights)
        tile.weigh(weights)
        return carry

    def finish(write, block, _, total):
        write(0, total[...], block)

    return _sweep(
        "average_values",
        operands,
        _named(rank=ranking, top=top, tail=tail),
        [(("blocks", "clusters", "value_dim"), jnp.float32)],
        visit,
        finish,
        tiles=tiles,
    )[0].sum(axis=1)


def _sweep(
    name: str,
    operands: Operands,
    rows: dict[str, Shaped[Array, "G n C"]],
    outputs: list[tuple[tuple[int | str, ...], Any]],
    visit: Callable[[Tile, Any], Any],
    finish: Callable[..., None] = lambda *_: None,
    init: Callable[[], Any] = lambda: jnp.int32(0),
    *,
    tiles: int,
) -> list[Array]:
    """Shows 64 clusters all tiles of a block of keys, for each head, 64 clusters and block.

    Args:
      name: what profilers call it.
      operands: what it reads; without values where it weighs none.
      rows: what belongs to clusters.
      outputs: shapes, after the axis of heads, and dtypes.
      visit: makes the next carry of a tile and a carry.
      finish: gets a function that writes, the block, the last carry, and the weighted values.
      init: makes the first carry.
      tiles: number of tiles of a block.
    """
    centroids, key, value, addend = operands
    num_parts = len(centroids)
    num_heads, num_subclusters, num_clusters, head_dim = centroids[0].shape
    group, block = num_heads // len(key), tiles * KEYS
    sizes: dict[Any, int] = {"blocks": key.shape[1] // block, "tiles": key.shape[1] // KEYS}
    sizes |= {"clusters": num_clusters, "value_dim": 0 if value is None else value.shape[-1]}
    tiled = [key, addend] if value is None else [key, addend, value]
    arrays = [*centroids, *tiled, *rows.values()]

    def body(*refs):
        centroid_refs, refs = refs[:num_parts], refs[num_parts:]
        tiled_refs, refs = refs[: len(tiled)], refs[len(tiled) :]
        row_refs, output_refs = dict(zip(rows, refs, strict=False)), refs[len(rows) :]
        head, number = lax.axis_index("head"), lax.axis_index("block")
        clusters = pl.ds(lax.axis_index("clusters") * hopper.HEIGHT, hopper.HEIGHT)
        heads = [lax.div(head, jnp.int32(group)), head if len(addend) > 1 else 0]
        heads += [heads[0]] * (value is not None)

        def write(output, x, *where):
            at = (head, *where, clusters)
            output_refs[output][at] = x

        def work(total, centroid, buffers, weight, ready, loaded):
            def load(i):
                slot = lax.rem(i, jnp.int32(SLOTS))
                keys = pl.ds(number * block + i * KEYS, KEYS)
                for ref, at, buffer in zip(tiled_refs, heads, buffers, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[at, keys], buffer.at[slot], loaded.at[slot])

            for i in range(min(SLOTS, tiles)):
                load(jnp.int32(i))
            for part, ref in enumerate(centroid_refs):
                for r in range(num_subclusters):
                    to = centroid.at[part, r]
                    plgpu.copy_gmem_to_smem(ref.at[head, r, clusters], to, ready)
            plgpu.barrier_wait(ready)

            def step(i, carry):
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])

                def logits(r):
                    def multiply(products):
                        for part in range(num_parts):
                            right = buffers[0].at[slot].transpose((1, 0))
                            plgpu.wgmma(products, centroid.at[part, r], right)
                        return products[...]

                    products = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(TILE))
                    return products + hopper.of_columns(buffers[1].at[slot], TILE)

                def weigh(weights):
                    weight[...] = weights.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.wgmma(total, weight, buffers[2].at[slot])
                    plgpu.wgmma_wait(0)

                position = plgpu.broadcasted_iota(jnp.int32, TILE, 1, layout=plgpu.Layout.WGMMA)
                tile = Tile(
                    logits=logits,
                    rows=lambda name, r: hopper.load_rows(row_refs[name].at[head, r, clusters]),
                    position=position + (number * block + i * KEYS),
                    number=number * tiles + i,
                    weigh=weigh,
                    write=write,
                )
                carry = visit(tile, carry)
                plgpu.commit_smem()  # all are done with what is loaded anew

                @pl.when(i + SLOTS < tiles)
                def _():
                    load(i + SLOTS)

                return carry

            finish(write, number, lax.fori_loop(0, tiles, step, init()), total)

        def allocate(total):
            buffers = [
                hopper.matrices(SLOTS, KEYS, head_dim),
                plgpu.SMEM((SLOTS, KEYS), jnp.float32),
            ]
            if value is not None:
                buffers.append(hopper.matrices(SLOTS, KEYS, value.shape[-1]))
            pl.run_scoped(
                partial(work, total),
                centroid=hopper.matrices(num_parts, num_subclusters, hopper.HEIGHT, head_dim),
                buffers=buffers,
                weight=hopper.matrices(*TILE),
                ready=plgpu.Barrier(num_arrivals=num_parts * num_subclusters),
                loaded=plgpu.Barrier(num_arrivals=len(buffers), num_barriers=SLOTS),
            )

        if value is None:
            allocate(None)
        else:
            pl.run_scoped(allocate, plgpu.WGMMAAccumulatorRef((hopper.HEIGHT, value.shape[-1])))

    out = [
        jax.ShapeDtypeStruct((num_heads, *(sizes.get(size, size) for size in shape)), dtype)
        for shape, dtype in outputs
    ]
    grid = {"head": num_heads, "clusters": num_clusters // hopper.HEIGHT, "block": sizes["blocks"]}
    return hopper.launch(name, body, arrays, out, grid)
