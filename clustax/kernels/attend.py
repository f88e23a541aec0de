"""Clustered attention by Pallas kernels; the rest, which moves and sorts, is left to XLA.

All heads are worked on at once. Whatever moves rows does so by gathers, in gradients too, so that
sums have one order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from clustax import kernels, xla
from clustax.kernels import centroid_attention, grouped_attention
from clustax.kernels.common import sum_runs


def refusal(
    query: Float[Array, "*B T N H"],
    value: Float[Array, "*B S K V"],
    counts: Int[Array, "*B N C"],
    *,
    topk: int,
    num_subclusters: int,
) -> str | None:
    """Why the kernels of this device cannot serve such a call, or None."""
    length, num_heads, head_dim = query.shape[-3:]
    num_keys, num_key_heads, value_dim = value.shape[-3:]
    num_clusters = counts.shape[-1]
    shape = centroid_attention.Shape(
        num_heads // num_key_heads,
        num_clusters,
        num_subclusters,
        topk,
        head_dim,
        value_dim,
        query.dtype,
    )
    if kernels.device() in kernels.GPUS:
        from clustax.kernels import gpu  # only now: Pallas takes long to import

        return gpu.refusal(shape)
    reason = centroid_attention.refusal(shape) if topk < num_keys else None
    if topk > 0 and reason is None:
        reason = grouped_attention.refusal(
            length, num_clusters, topk, head_dim, value_dim, query.dtype
        )
    return reason


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    bias: Float[Array, "B N S"] | None,
    valid: Bool[Array, "B N S"] | None,
    assignment: Int[Array, "B N T"],
    counts: Int[Array, "B N C"],
    *,
    topk: int,
    merge: str,
    num_subclusters: int,
    scale: float | Float[Array, ""],
) -> Float[Array, "B T N V"]:
    """Attention of clustered queries, for canonical arguments (see ``clustax.attention``)."""
    batch, length, num_heads, _ = query.shape
    num_clusters = counts.shape[-1]
    centroid, grouped = map(kernels.of, ("centroid_attention", "grouped_attention"))
    bias, valid, assignment, counts = jax.tree.map(
        lambda x: x.reshape(-1, x.shape[-1]), (xla.raise_bias(bias), valid, assignment, counts)
    )
    query = _by_head(query)  # G T H
    keys = xla.Keys(_by_head(key), _by_head(value), bias, valid)  # those of J heads
    scale = jnp.asarray(scale, jnp.promote_types(query.dtype, jnp.float32))

    size = grouped.tile_size(length, num_clusters, query.dtype)
    tile = partial(xla.tile_queries, size=size, multiple=grouped.STEP_TILES)
    tiles = jax.vmap(tile)(assignment, counts)
    slots = tiles.query.reshape(len(query), -1)  # G L·M
    queries = _move(query, slots, tiles.slot).reshape(*tiles.query.shape, -1)  # G L M H

    def in_place(rows: Float[Array, "G L M V"]) -> Float[Array, "B T N V"]:
        rows = _move(rows.reshape(*slots.shape, -1), tiles.slot, slots)
        return jnp.swapaxes(rows.reshape(batch, num_heads, length, -1), 1, 2)

    if topk == key.shape[1]:  # all tiles have the same keys
        index = jnp.broadcast_to(jnp.arange(topk), (len(query), 1, topk))
        cluster = jnp.zeros_like(tiles.cluster)
        rows = grouped.grouped_attention(queries, cluster, *_top_keys(keys, index), scale=scale)
        return in_place(rows)

    split = partial(xla.split_clusters, num_subclusters=num_subclusters)
    subclusters = jax.vmap(split)(tiles, counts)
    pool = partial(xla.pool, sum_runs=sum_runs)
    centroids = jax.vmap(pool)(queries, tiles, subclusters)  # G C R H
    share = subclusters.share if num_subclusters > 1 else None
    index, tail_mean, tail_lse = centroid.centroid_attention(
        centroids, *keys, share, topk=topk, scale=scale
    )
    if topk == 0:
        rows = jax.vmap(xla.of_cluster)(tail_mean, tiles)
        return in_place(jnp.broadcast_to(rows, (*tiles.query.shape, rows.shape[-1])))

    def of_slots(x: Float[Array, "G C R"]) -> Float[Array, "G L M"]:
        return jax.vmap(xla.of_subcluster)(x, tiles, subclusters)

    top_keys = _top_keys(keys, index)
    top_lse = None  # each query has its own
    if merge == "mass":  # the split between top-k keys and tail is that of the centroid
        with jax.default_matmul_precision("highest"):
            logits = xla.attention_logits(centroids, top_keys, scale)  # G C R k
        top_lse = of_slots(jax.nn.logsumexp(logits, axis=-1))
    tail = (tail_mean, of_slots(tail_lse), top_lse)
    return in_place(
        grouped.grouped_attention(queries, tiles.cluster, *top_keys, *tail, scale=scale)
    )


def _by_head(x: Float[Array, "B T N D"]) -> Float[Array, "G T D"]:
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _top_keys(keys: xla.Keys, index: Int[Array, "G C k"]) -> xla.Keys:
    """The top-k keys of each cluster, of which those of J heads serve G."""

    def gather(x):  # J|G S … -> G C k …
        take = _take if jnp.issubdtype(x.dtype, jnp.floating) else _rows
        rows = take(x.reshape(*x.shape[:2], -1), index.reshape(len(x), -1))
        return rows.reshape(*index.shape, *x.shape[2:])

    return jax.tree.map(gather, keys)


def _rows(x: Shaped[Array, "J S D"], index: Int[Array, "J I"]) -> Shaped[Array, "J I D"]:
    return jax.vmap(lambda x, index: x[index])(x, index)


@jax.custom_vjp
def _take(x: Float[Array, "J S D"], index: Int[Array, "J I"]) -> Float[Array, "J I D"]:
    """Rows; their gradients are added in the order of ``index``."""
    return _rows(x, index)


def _take_forward(x, index):
    return _take(x, index), (x, index)


def _take_backward(residuals, d_rows):
    x, index = residuals

    def add(index, d_rows):
        index, order = lax.sort((index, jnp.arange(len(index))), num_keys=1)
        d_rows = d_rows[order].astype(jnp.promote_types(x.dtype, jnp.float32))
        return sum_runs(d_rows, index, x.shape[1], x.dtype)

    return jax.vmap(add)(index, d_rows), None


_take.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def _move(
    rows: Float[Array, "G A D"], source: Int[Array, "G B"], target: Int[Array, "G A"]
) -> Float[Array, "G B D"]:
    """Moves rows to their targets; two ways to say which go where. Other rows are zeros."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(rows, source)


def _move_forward(rows, source, target):
    return _move(rows, source, target), (source, target)


def _move_backward(residuals, d_rows):
    source, target = residuals
    return _move(d_rows, target, source), None, None


_move.defvjp(_move_forward, _move_backward)
