"""Attention of centroids over all keys on GPUs: top-k keys, and attention over the others.

Several sweeps over the keys compute the same logits, each for one thing that the next one needs:

1. with sub-clusters, the log-sum-exp of the logits of each, so that their softmax can be averaged;
2. the largest rank among every 64 keys. The k-th largest of these bounds the ranks of the top-k
   keys from below, and few other keys reach it;
3. those which do, from which the top-k keys are sorted out. From here on a bit for each cluster and
   key says which they are, so that no key can be lost or count twice, however logits are rounded;
4. the log-sum-exp of the logits of the other keys;
5. the mean of the values, weighted by their softmax.

A block of threads has 64 clusters and a stretch of keys, so there is no C x S array. The backward
pass has more sweeps: with sub-clusters, the mean slope of the weights of each; gradients of the
centroids; and those of keys and values, for which a block has 64 keys and goes over all clusters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped

from clustax.kernels import gpu
from clustax.kernels.common import bfloat16_parts, masked_bias
from clustax.kernels.gpu import products
from clustax.kernels.gpu.products import Factors

KEYS = 64  # at a time
TILE = (gpu.HEIGHT, KEYS)
WORD = 32  # bits that say which keys are top
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
    value: BFloat16[Array, "J S V"]
    addend: Float[Array, "G|1 S"]  # to logits: bias, MASKED, or -inf for padding
    top: Int[Array, "G tiles 2 C"] | None  # bits say which keys of a tile are top; None: no key is

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


class Gradient(NamedTuple):
    """Of logits: their exponential, less a shift, times (gain times its slope less loss)."""

    shift: Float[Array, "G R C"]
    gain: Float[Array, "G R C"]
    loss: Float[Array, "G R C"]


class Tile(NamedTuple):
    """What a sweep sees of a tile of keys."""

    logits: Callable[[], Iterator[Float[Array, "64 keys"]]]  # of each sub-cluster of 64 clusters
    rows: Mapping[str, Sequence[Array]]  # what belongs to the clusters, of each sub-cluster
    with_slopes: Callable[[], Sequence[Float[Array, "64 keys"]]]  # logits where R = 1; slopes
    outside: Callable[..., Float[Array, "64 keys"]]  # its argument, or another number at top keys
    position: Int[Array, "64 keys"]  # of each key
    number: Int[Array, ""]  # of the tile
    weigh: Callable[[Float[Array, "64 keys"]], None]  # adds weights times keys or values
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
    num_clusters, num_keys = centroids.shape[1], key.shape[1]
    block = gpu.tiles_of_block(num_keys) * KEYS
    addend = masked_bias(bias, valid)

    def of_subclusters(x):  # G C R … -> G R C …
        return gpu.pad(jnp.swapaxes(x, 1, 2), 2, gpu.HEIGHT)

    attended: Any = _attend(
        of_subclusters(gpu.pad(scale * centroids, 3, gpu.WIDTH)),
        gpu.pad(gpu.pad(key, 1, block), 2, gpu.WIDTH),
        gpu.pad(gpu.pad(value, 1, block), 2, gpu.WIDTH),
        None if addend is None else gpu.pad(addend, 1, block, -jnp.inf),
        None if share is None else of_subclusters(share),
        topk,
        num_clusters,
        num_keys,
    )
    index, mean, lse = attended
    return CentroidAttention(
        index[:, :num_clusters],
        mean[:, :num_clusters, : value.shape[-1]],
        jnp.swapaxes(lse, 1, 2)[:, :num_clusters],
    )


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(
    centroids: Float[Array, "G R C H"],  # scaled
    key: BFloat16[Array, "J S H"],
    value: BFloat16[Array, "J S V"],
    addend: Float[Array, "G S"] | None,
    share: Float[Array, "G R C"] | None,
    topk: int,
    num_clusters: int,  # others are padding
    num_keys: int,  # likewise
) -> tuple[Int[Array, "G C k"], Float[Array, "G C V"], Float[Array, "G R C"]]:
    """The same of padded arrays."""
    return _attend_forward(centroids, key, value, addend, share, topk, num_clusters, num_keys)[0]


def _attend_forward(centroids, key, value, addend, share, topk, num_clusters, num_keys):
    num_heads, num_subclusters, padded_clusters, _ = centroids.shape
    bias = addend
    if addend is None:
        bias = jnp.where(jnp.arange(key.shape[1]) < num_keys, 0.0, -jnp.inf)[None]
    operands = Operands(bfloat16_parts(centroids), key, value, bias, None)
    shares = 1.0 if share is None else share
    index = jnp.zeros((num_heads, padded_clusters, 0), jnp.int32)
    if topk:
        ranking = None
        if num_subclusters > 1:
            shift, total = _log_sum_exp(operands)
            ranking = Softmax(shift, shares / total)
        index = _select(operands, ranking, topk, num_clusters)
        operands = operands._replace(top=_bits(index, key.shape[1]))
    shift, total = _log_sum_exp(operands)
    softmax = Softmax(shift, shares / total)
    mean = _average(operands, softmax)
    out = index, mean, shift + jnp.log(total)
    return out, (operands, addend is not None, share, mean, Softmax(shift, 1 / total))


def _attend_backward(topk, num_clusters, num_keys, residuals, gradients):
    del topk, num_clusters, num_keys
    operands, has_addend, share, mean, softmax = residuals
    _, d_mean, d_lse = gradients
    # What the products of the kernels see.
    slope = d_mean.astype(jnp.bfloat16)
    if share is None:
        mean_slope = jnp.sum(slope.astype(jnp.float32) * mean, axis=-1)[:, None]
        share = jnp.ones_like(mean_slope)
    else:
        mean_slope = _mean_slopes(operands, softmax, slope)
    # The gradient of a logit is its exponential times (gain times its slope less loss).
    gradient = Gradient(
        softmax.shift, softmax.factor * share, softmax.factor * (share * mean_slope - d_lse)
    )
    d_centroids = _centroid_gradients(operands, gradient, slope)
    d_key, d_value, d_addend = _key_gradients(operands, gradient, slope)
    return d_centroids, d_key, d_value, d_addend if has_addend else None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _bits(index: Int[Array, "G C k"], num_keys: int) -> Int[Array, "G tiles 2 C"]:
    """For each tile of keys and each cluster 64 bits: which of them are among these."""
    num_heads, num_clusters, _ = index.shape
    head, cluster = (jnp.arange(n) for n in (num_heads, num_clusters))
    words = jnp.zeros((num_heads, num_keys // WORD, num_clusters), jnp.int32)
    words = words.at[head[:, None, None], index // WORD, cluster[:, None]].add(1 << index % WORD)
    return words.reshape(num_heads, -1, KEYS // WORD, num_clusters)


def _select(
    operands: Operands, ranking: Softmax | None, topk: int, num_clusters: int
) -> Int[Array, "G C k"]:
    """The top-k keys of each cluster, in order; any keys where clusters are padding."""
    most = jnp.swapaxes(_maxima(operands, ranking), 1, 2)  # G C tiles
    if most.shape[-1] < topk:
        least = jnp.full(most.shape[:2], LOWEST)
    else:
        least = lax.top_k(most, topk)[0][..., -1]
    # All keys are alike to padding: it would be long about it if any reached the bound.
    is_cluster = jnp.arange(least.shape[1]) < num_clusters
    least = jnp.where(is_cluster, jnp.maximum(least, LOWEST), jnp.inf)[:, None]
    ranks, index = _collect(operands, ranking, least, topk)  # G blocks C list

    def of_cluster(x):
        return jnp.swapaxes(x, 1, 2).reshape(*most.shape[:2], -1)

    ordered = lax.sort((-of_cluster(ranks), of_cluster(index)), num_keys=2, is_stable=False)
    return jnp.maximum(ordered[1][..., :topk], 0)


def _rank(tile: Tile, num_subclusters: int) -> Float[Array, "64 keys"]:
    """What the top-k keys have most of: logits, or the mean weight of sub-clusters."""
    if num_subclusters == 1:
        return next(tile.logits())
    return _weights(tile, "rank")


def _weights(tile: Tile, softmax: str) -> Float[Array, "64 keys"]:
    """The sum over sub-clusters of their weights."""
    total = _constant(0.0, TILE)
    of_subclusters = (tile.rows[f"{softmax}_{name}"] for name in Softmax._fields)
    for logits, shift, factor in zip(tile.logits(), *of_subclusters, strict=True):
        weights = jnp.exp(logits - gpu.of_rows(shift, TILE))
        total += gpu.of_rows(factor, TILE) * weights
    return total


def _constant(value: float, shape: tuple[int, ...]) -> Float[Array, "..."]:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else gpu.ROWS
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _named(**groups: Softmax | Gradient | None) -> dict[str, Array]:
    """What belongs to rows, by the name of its group and its own."""
    return {
        f"{group}_{name}": x
        for group, fields in groups.items()
        if fields is not None
        for name, x in fields._asdict().items()
    }


def _log_sum_exp(
    operands: Operands,
) -> tuple[Float[Array, "G R C"], Float[Array, "G R C"]]:
    """The largest logit of each sub-cluster, and the sum of their exponentials less this.

    Only of keys that are not top.
    """
    num_subclusters = operands.num_subclusters

    def init():
        height = (gpu.HEIGHT,)
        return ((_constant(LOWEST, height), _constant(0.0, height)),) * num_subclusters

    def visit(tile, carry):
        def add(logits, shift, total):
            logits = tile.outside(logits, -jnp.inf)
            new = jnp.maximum(shift, logits.max(axis=1))
            weights = jnp.exp(logits - gpu.of_rows(new, TILE))
            return new, total * jnp.exp(shift - new) + weights.sum(axis=1)

        return tuple(add(x, *of_x) for x, of_x in zip(tile.logits(), carry, strict=True))

    def finish(write, block, carry, _):
        for r, (shift, total) in enumerate(carry):
            write(0, shift, block, r)
            write(1, total, block, r)

    shape = ("blocks", num_subclusters, "clusters")
    shift, total = _sweep(
        "log_sum_exp",
        operands,
        {},
        [(shape, jnp.float32)] * 2,
        visit,
        finish,
        init,
    )
    most = shift.max(axis=1)
    return most, jnp.sum(total * jnp.exp(shift - most[:, None]), axis=1)


def _maxima(operands: Operands, ranking: Softmax | None) -> Float[Array, "G tiles C"]:
    """The largest rank in each tile of keys."""

    def visit(tile, carry):
        tile.write(0, _rank(tile, operands.num_subclusters).max(axis=1), tile.number)
        return carry

    return _sweep(
        "largest_ranks",
        operands,
        _named(rank=ranking),
        [(("tiles", "clusters"), jnp.float32)],
        visit,
    )[0]


def _collect(
    operands: Operands,
    ranking: Softmax | None,
    least: Float[Array, "G 1 C"],
    topk: int,
) -> list[Array]:
    """The top-k keys of each block among those that rank at least so high: ranks and positions.

    They are in no order. Where there are fewer, the ranks of the others are -inf.
    """
    shape = (gpu.HEIGHT, -(-topk // 8) * 8)

    def slots():
        return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)

    def init():
        return _constant(-jnp.inf, shape), -1 - slots(), jnp.int32(0)

    def visit(tile, carry):
        def any_left(ranks):
            return ranks.max(axis=1).max() > -jnp.inf

        def take(ranks):  # the best of a tile
            new = ranks.max(axis=1)
            is_new = ranks == gpu.of_rows(new, TILE)
            position = jnp.where(is_new, tile.position, jnp.int32(2**31 - 1)).min(axis=1)
            ranks = jnp.where(tile.position == gpu.of_rows(position, TILE), -jnp.inf, ranks)
            return new, position, ranks

        def put(here, new, position, best, index):
            best = jnp.where(here, gpu.of_rows(new, shape), best)
            return best, jnp.where(here, gpu.of_rows(position, shape), index)

        def append(state):  # in a slot of its own, as long as there are some
            ranks, _, best, index, taken = state
            new, position, ranks = take(ranks)
            here = (slots() == taken) & gpu.of_rows(new > -jnp.inf, shape)
            best, index = put(here, new, position, best, index)
            return ranks, any_left(ranks), best, index, taken + 1

        def replace(state):  # the worst that is there
            ranks, _, best, index, taken = state
            worst = best.min(axis=1)
            # Of equal ranks the earlier ones are there already.
            ranks = jnp.where(ranks > gpu.of_rows(worst, TILE), ranks, -jnp.inf)
            new, position, ranks = take(ranks)
            is_worst = best == gpu.of_rows(worst, shape)
            last = jnp.where(is_worst, index, jnp.int32(-(2**31))).max(axis=1)
            here = (index == gpu.of_rows(last, shape)) & gpu.of_rows(new > worst, shape)
            best, index = put(here, new, position, best, index)
            return ranks, any_left(ranks), best, index, taken

        ranks = _rank(tile, operands.num_subclusters)
        ranks = jnp.where(ranks >= gpu.of_rows(tile.rows["least"][0], TILE), ranks, -jnp.inf)
        state = ranks, any_left(ranks), *carry
        state = lax.while_loop(lambda state: state[1] & (state[4] < shape[1]), append, state)
        return lax.while_loop(lambda state: state[1], replace, state)[2:]

    def finish(write, block, carry, _):
        for output, x in enumerate(carry[:2]):
            write(output, x, block)

    shape_of_lists = ("blocks", "clusters", shape[1])
    return _sweep(
        "collect_top_keys",
        operands,
        _named(rank=ranking) | {"least": least},
        [(shape_of_lists, jnp.float32), (shape_of_lists, jnp.int32)],
        visit,
        finish,
        init,
    )


def _average(operands: Operands, softmax: Softmax) -> Float[Array, "G C V"]:
    """The sum of the values of keys that are not top, times their weights."""

    def visit(tile, carry):
        tile.weigh(tile.outside(_weights(tile, "tail"), 0.0))
        return carry

    def finish(write, block, _, total):
        write(0, products.read(total), block)

    return _sweep(
        "average_values",
        operands,
        _named(tail=softmax),
        [(("blocks", "clusters", "value_dim"), jnp.float32)],
        visit,
        finish,
        weighed="value",
    )[0].sum(axis=1)


def _apart(operands: Operands, *fields: Float[Array, "G R C"]) -> tuple[Operands, list[Array]]:
    """Sub-clusters as clusters of more heads, each of which has one."""

    def apart(x):  # G R C … -> G·R 1 C …
        return x.reshape(-1, 1, *x.shape[2:])

    centroids = [apart(part) for part in operands.centroids]
    return operands._replace(centroids=centroids), [apart(x) for x in fields]


def _mean_slopes(
    operands: Operands, softmax: Softmax, slope: BFloat16[Array, "G C V"]
) -> Float[Array, "G R C"]:
    """The products of values and ``slope``, weighted by the softmax of each sub-cluster."""
    apart, fields = _apart(operands, *softmax)

    def init():
        return _constant(0.0, (gpu.HEIGHT,))

    def visit(tile, total):
        logits, slopes = tile.with_slopes()
        shift, factor = (gpu.of_rows(tile.rows[f"tail_{x}"][0], TILE) for x in Softmax._fields)
        weights = tile.outside(factor * jnp.exp(logits - shift), 0.0)
        return total + (weights * slopes).sum(axis=1)

    def finish(write, block, total, _):
        write(0, total, block)

    return (
        _sweep(
            "mean_slopes",
            apart,
            _named(tail=Softmax(*fields)),
            [(("blocks", "clusters"), jnp.float32)],
            visit,
            finish,
            init,
            slope=slope,
        )[0]
        .sum(axis=1)
        .reshape(softmax.shift.shape)
    )


def _centroid_gradients(
    operands: Operands, gradient: Gradient, slope: BFloat16[Array, "G C V"]
) -> Float[Array, "G R C H"]:
    """The sum of keys that are not top, times the gradients of their logits."""
    apart, fields = _apart(operands, *gradient)

    def visit(tile, carry):
        shift, gain, loss = (
            gpu.of_rows(tile.rows[f"of_{name}"][0], TILE) for name in Gradient._fields
        )
        logits, slopes = tile.with_slopes()
        weights = tile.outside(jnp.exp(logits - shift), 0.0)
        tile.weigh(weights * (gain * slopes - loss))
        return carry

    def finish(write, block, _, total):
        write(0, products.read(total), block)

    return (
        _sweep(
            "centroid_gradients",
            apart,
            _named(of=Gradient(*fields)),
            [(("blocks", "clusters", "head_dim"), jnp.float32)],
            visit,
            finish,
            weighed="key",
            slope=slope,
        )[0]
        .sum(axis=1)
        .reshape(operands.centroids[0].shape)
    )


def _sweep(
    name: str,
    operands: Operands,
    rows: dict[str, Shaped[Array, "G n C"]],
    outputs: list[tuple[tuple[int | str, ...], Any]],
    visit: Callable[[Tile, Any], Any],
    finish: Callable[..., None] = lambda *_: None,
    init: Callable[[], Any] = lambda: jnp.int32(0),
    *,
    weighed: str | None = None,
    slope: BFloat16[Array, "_ C V"] | None = None,
) -> list[Array]:
    """Shows 64 clusters all tiles of a block of keys, for each head, 64 clusters and block.

    Args:
      name: what profilers call it.
      operands: what it reads.
      rows: what belongs to clusters.
      outputs: shapes, after the axis of heads, and dtypes.
      visit: makes the next carry of a tile and a carry.
      finish: gets a function that writes, the block, the last carry, and what was weighed.
      init: makes the first carry.
      weighed: "key" or "value": what ``Tile.weigh`` takes.
      slope: what clusters have for ``Tile.with_slopes``; its products with values are the slopes.
    """
    num_parts = len(operands.centroids)
    num_heads, num_subclusters, num_clusters, head_dim = operands.centroids[0].shape
    num_keys, value_dim = operands.value.shape[1:]
    tiles = gpu.tiles_of_block(num_keys)
    block = tiles * KEYS
    sizes: dict[Any, int] = {"blocks": num_keys // block, "tiles": num_keys // KEYS}
    sizes |= {"clusters": num_clusters, "head_dim": head_dim, "value_dim": value_dim}
    # What comes tile by tile.
    buffers = {
        "key": (operands.key, products.matrices(SLOTS, KEYS, head_dim)),
        "addend": (operands.addend, plgpu.SMEM((SLOTS, KEYS), jnp.float32)),
    }
    if weighed == "value" or slope is not None:
        buffers["value"] = (operands.value, products.matrices(SLOTS, KEYS, value_dim))
    if operands.top is not None:
        words = (SLOTS, KEYS // WORD, gpu.HEIGHT)
        buffers["top"] = (operands.top, plgpu.SMEM(words, jnp.int32))
    slopes = [] if slope is None else [slope]
    unknown_zero = jnp.zeros(1, jnp.int32)  # to the compiler of the kernel
    arrays = [unknown_zero, *operands.centroids, *(x for x, _ in buffers.values())]
    arrays += [*slopes, *rows.values()]

    def body(zero_ref, *refs):
        centroid_refs, refs = refs[:num_parts], refs[num_parts:]
        tiled_refs, refs = dict(zip(buffers, refs, strict=False)), refs[len(buffers) :]
        slope_refs, refs = refs[: len(slopes)], refs[len(slopes) :]
        row_refs, output_refs = dict(zip(rows, refs, strict=False)), refs[len(rows) :]
        head, number = lax.axis_index("head"), lax.axis_index("block")
        clusters = pl.ds(lax.axis_index("clusters") * gpu.HEIGHT, gpu.HEIGHT)

        def own(ref):  # several heads may share what a ref has
            return ref.at[lax.div(head, jnp.int32(num_heads // ref.shape[0]))]

        def write(output, x, *where):
            at = (head, *where, clusters)
            output_refs[output][at] = x

        def work(total, centroid, tiled, slope, weight, ready, loaded):
            def load(i):
                slot = lax.rem(i, jnp.int32(SLOTS))
                for what, ref in tiled_refs.items():
                    at = pl.ds(number * block + i * KEYS, KEYS)
                    if what == "top":
                        at = (number * tiles + i, slice(None), clusters)
                    to = tiled[what].at[slot]
                    plgpu.copy_gmem_to_smem(own(ref).at[at], to, loaded.at[slot])

            for i in range(min(SLOTS, tiles)):
                load(jnp.int32(i))
            for part, ref in enumerate(centroid_refs):
                for r in range(num_subclusters):
                    to = centroid.at[part, r]
                    plgpu.copy_gmem_to_smem(ref.at[head, r, clusters], to, ready)
            for ref in slope_refs:
                plgpu.copy_gmem_to_smem(own(ref).at[clusters], slope, ready)
            own_rows = {
                name: [gpu.load_rows(ref.at[head, r, clusters]) for r in range(ref.shape[1])]
                for name, ref in row_refs.items()
            }
            plgpu.barrier_wait(ready)
            column = plgpu.broadcasted_iota(jnp.int32, TILE, 1, layout=plgpu.Layout.WGMMA)

            def step(i, carry):
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])

                # Or else what the matrix unit is told of all sub-clusters, the same for every
                # tile, would stay in registers, and others would spill.
                zero = zero_ref[0]

                def of_logits(r):
                    right = tiled["key"].at[slot].transpose((1, 0))
                    return [Factors(centroid.at[p, zero + r], right) for p in range(num_parts)]

                def plus_addend(x):
                    return x + gpu.of_columns(tiled["addend"].at[slot], TILE)

                def logits():
                    for first in range(0, num_subclusters, products.at_once()):
                        some = range(num_subclusters)[first : first + products.at_once()]
                        yield from map(plus_addend, products.each(TILE, *map(of_logits, some)))

                def with_slopes():
                    of_slopes = Factors(slope, tiled["value"].at[slot].transpose((1, 0)))
                    logits, slopes = products.each(TILE, of_logits(0), [of_slopes])
                    return plus_addend(logits), slopes

                def weigh(weights):
                    weight[...] = weights.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    products.add(total, Factors(weight, tiled[weighed].at[slot]), anew=i == 0)

                def outside(x, instead):
                    if operands.top is None:
                        return x
                    words = (gpu.load(tiled["top"].at[slot, n], gpu.ROWS) for n in range(2))
                    return _outside(x, instead, [gpu.of_rows(x, TILE) for x in words], column)

                tile = Tile(
                    logits=logits,
                    rows=own_rows,
                    with_slopes=with_slopes,
                    outside=outside,
                    position=column + (number * block + i * KEYS),
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
            centroids = num_parts * num_subclusters
            pl.run_scoped(
                partial(work, total),
                centroid=products.matrices(num_parts, num_subclusters, gpu.HEIGHT, head_dim),
                tiled={what: memory for what, (_, memory) in buffers.items()},
                slope=None if slope is None else products.matrices(gpu.HEIGHT, value_dim),
                weight=None if weighed is None else products.matrices(*TILE),
                ready=plgpu.Barrier(num_arrivals=centroids + len(slopes)),
                loaded=plgpu.Barrier(num_arrivals=len(buffers), num_barriers=SLOTS),
            )

        if weighed is None:
            allocate(None)
        else:
            width = {"key": head_dim, "value": value_dim}[weighed]
            pl.run_scoped(allocate, products.accumulator((gpu.HEIGHT, width)))

    out = [
        jax.ShapeDtypeStruct((num_heads, *(sizes.get(size, size) for size in shape)), dtype)
        for shape, dtype in outputs
    ]
    grid = {"head": num_heads, "clusters": num_clusters // gpu.HEIGHT, "block": sizes["blocks"]}
    return gpu.launch(name, body, arrays, out, grid)


def _outside(
    x: Float[Array, "n m"], instead: float, words: Sequence[Int[Array, "n m"]], key: Array
) -> Float[Array, "n m"]:
    """Another number at the keys of a tile whose bits are set in these words."""
    word = jnp.where(key < WORD, *words)
    return jnp.where((word >> (key & (WORD - 1))) & 1 == 1, instead, x)


def _key_gradients(
    operands: Operands, gradient: Gradient, slope: BFloat16[Array, "G C V"]
) -> tuple[BFloat16[Array, "J S H"], BFloat16[Array, "J S V"], Float[Array, "G S"]]:
    """Gradients of keys, of values, and of what is added to logits.

    A tile has keys as rows, and clusters as columns: what belongs to clusters comes with them.
    """
    num_parts = len(operands.centroids)
    num_heads, num_subclusters, num_clusters, head_dim = operands.centroids[0].shape
    num_key_heads, num_keys, value_dim = operands.value.shape
    group = num_heads // num_key_heads
    # So many clusters at a time; with 64, Hopper's registers would spill if dims are 128.
    width = 64 if head_dim + value_dim <= 192 else 32
    tile = (KEYS, width)
    steps = num_clusters // width * num_subclusters  # of a head
    columns = jnp.stack(gradient, axis=2)  # G R 3 C
    top = [] if operands.top is None else [operands.top]
    moved = [*operands.centroids, slope, columns, *top]
    matrices = partial(products.matrices, swizzle=2 * width)
    memory = [matrices(SLOTS, width, head_dim) for _ in range(num_parts)]
    memory += [
        matrices(SLOTS, width, value_dim),
        plgpu.SMEM((SLOTS, len(gradient), width), jnp.float32),
    ]
    if top:
        memory.append(plgpu.SMEM((SLOTS, KEYS // WORD, width), jnp.int32))

    def body(key_ref, value_ref, addend_ref, *refs):
        refs, (d_key_ref, d_value_ref, d_addend_ref) = refs[: len(moved)], refs[len(moved) :]
        key_head, number = lax.axis_index("head"), lax.axis_index("tile")
        keys = pl.ds(number * KEYS, KEYS)

        def work(d_key, d_value, key, value, clusters, weight, d_logit, ready, loaded):
            def load(i):
                slot = lax.rem(i, jnp.int32(SLOTS))
                head, place = lax.div(i, jnp.int32(steps)), lax.rem(i, jnp.int32(steps))
                head += key_head * group
                r = lax.rem(place, jnp.int32(num_subclusters))
                of_tile = pl.ds(lax.div(place, jnp.int32(num_subclusters)) * width, width)
                at = [(head, r, of_tile)] * num_parts
                at += [(head, of_tile), (head, r, slice(None), of_tile)]
                at += [(head, number, slice(None), of_tile)] * len(top)
                for ref, where, to in zip(refs, at, clusters, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[where], to.at[slot], loaded.at[slot])

            plgpu.copy_gmem_to_smem(key_ref.at[key_head, keys], key, ready)
            plgpu.copy_gmem_to_smem(value_ref.at[key_head, keys], value, ready)
            for i in range(min(SLOTS, group * steps)):
                load(jnp.int32(i))
            plgpu.barrier_wait(ready)
            row = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=plgpu.Layout.WGMMA)

            def step(i, total, addend):
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])
                *centroid, own_slope, own = (x.at[slot] for x in clusters[: num_parts + 2])
                shift, gain, loss = (gpu.of_columns(own.at[n], tile) for n in range(3))
                logits, slopes = products.each(
                    tile,
                    [Factors(key, part.transpose((1, 0))) for part in centroid],
                    [Factors(value, own_slope.transpose((1, 0)))],
                )
                weights = jnp.exp(logits + gpu.of_rows(addend, tile) - shift)
                if top:
                    words = [gpu.of_columns(clusters[-1].at[slot, n], tile) for n in range(2)]
                    weights = _outside(weights, 0.0, words, row)
                gradients = weights * (gain * slopes - loss)
                weight[...] = (weights * gain).astype(jnp.bfloat16)
                d_logit[...] = gradients.astype(jnp.bfloat16)
                plgpu.commit_smem()
                factors = [Factors(weight, own_slope)], [Factors(d_logit, centroid[0])]
                products.add_each([d_value, d_key], factors, anew=i == 0)
                plgpu.commit_smem()  # all are done with what is loaded anew

                @pl.when(i + SLOTS < group * steps)
                def _():
                    load(i + SLOTS)

                return total + gradients.sum(axis=1)

            @pl.loop(0, group)
            def _(h):
                head = key_head * group + h
                addend = gpu.load_rows(addend_ref.at[head if len(operands.addend) > 1 else 0, keys])
                total = lax.fori_loop(
                    h * steps,
                    (h + 1) * steps,
                    lambda i, total: step(i, total, addend),
                    _constant(0.0, (KEYS,)),
                )
                d_addend_ref[head, keys] = total

            for sums, out, ref in ((d_key, key, d_key_ref), (d_value, value, d_value_ref)):
                out[...] = products.read(sums).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, ref.at[key_head, keys])
            plgpu.wait_smem_to_gmem(0)

        def allocate(d_key, d_value):
            pl.run_scoped(
                partial(work, d_key, d_value),
                key=matrices(KEYS, head_dim),
                value=matrices(KEYS, value_dim),
                clusters=memory,
                weight=matrices(*tile),
                d_logit=matrices(*tile),
                ready=plgpu.Barrier(num_arrivals=2),
                loaded=plgpu.Barrier(num_arrivals=len(moved), num_barriers=SLOTS),
            )

        pl.run_scoped(
            allocate,
            products.accumulator((KEYS, head_dim)),
            products.accumulator((KEYS, value_dim)),
        )

    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.key, operands.value)]
    outputs.append(jax.ShapeDtypeStruct((num_heads, num_keys), jnp.float32))
    arrays = [operands.key, operands.value, operands.addend, *moved]
    grid = {"head": num_key_heads, "tile": num_keys // KEYS}
    d_key, d_value, d_addend = gpu.launch("key_gradients", body, arrays, outputs, grid)
    return d_key, d_value, d_addend
