"""Clustered attention in plain JAX: fast and portable, with memory linear in the sequence length.

Queries are sorted by cluster and cut into tiles that each belong to one cluster. The queries of a
cluster share its top-k keys, so these are gathered once per cluster and met in dense products.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from clustax.heads import map_heads

# Stands for -inf in the logits of masked keys. It is finite so that no difference of two is NaN.
# Masked values are zero, so a query without keys gets zeros whatever its weights are.
MASKED = 0.7 * float(jnp.finfo(jnp.float32).min)
# Biases are raised to this, so that keys which count are never below those which do not.
LOWEST_BIAS = 0.5 * float(jnp.finfo(jnp.float32).min)


class Keys(NamedTuple):
    """Keys with all that belongs to them; more axes may come first."""

    key: Float[Array, "*L S H"]
    value: Float[Array, "*L S V"]
    bias: Float[Array, "*L S"] | None
    valid: Bool[Array, "*L S"] | None


class Tiles(NamedTuple):
    """L tiles of M slots; all queries in a tile are of one cluster."""

    cluster: Int[Array, " L"]
    query: Int[Array, "L M"]  # the query in each slot, T in an empty one
    slot: Int[Array, " T"]  # the slot of each query, L·M for a padded one


class Attended(NamedTuple):
    """Attention over some of the keys, and what it takes to merge it with attention over others."""

    mean: Float[Array, "*L n V"]  # of the values, weighted by the softmax over these keys
    lse: Float[Array, "*L n"]  # log-sum-exp of the logits of these keys


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
    scale: float | Float[Array, ""],
) -> Float[Array, "B T N V"]:
    """Attention of clustered queries, for canonical arguments (see ``clustax.attention``)."""
    batch, _, num_heads, _ = query.shape
    num_clusters, num_keys, num_key_heads = counts.shape[-1], key.shape[1], key.shape[2]

    def grouped(x):  # B N … -> B K G …: G query heads share a key head
        return None if x is None else x.reshape(batch, num_key_heads, -1, *x.shape[2:])

    bias = raise_bias(bias)

    def attend_group(query, key, value, bias, valid, assignment, counts):
        def head(query, bias, valid, assignment, counts):
            keys = Keys(key, value, bias, valid)
            return attend_head(query, keys, assignment, counts, topk=topk, merge=merge, scale=scale)

        return jax.vmap(head)(query, bias, valid, assignment, counts)

    out = map_heads(
        attend_group,
        grouped(jnp.swapaxes(query, 1, 2)),
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        *map(grouped, (bias, valid, assignment, counts)),
        head_bytes=4 * (num_heads // num_key_heads) * num_clusters * num_keys,
    )
    return jnp.swapaxes(out.reshape(batch, num_heads, *out.shape[3:]), 1, 2)


def raise_bias(bias: Float[Array, "*L S"] | None) -> Float[Array, "*L S"] | None:
    """The bias, where it is too low for float32 the lowest that it may be; gradients are kept."""
    if bias is None:
        return None
    return bias + lax.stop_gradient(jnp.maximum(bias, LOWEST_BIAS) - bias)


def attend_head(
    query: Float[Array, "T H"],
    keys: Keys,
    assignment: Int[Array, " T"],
    counts: Int[Array, " C"],
    *,
    topk: int,
    merge: str,
    scale: float | Float[Array, ""],
) -> Float[Array, "T V"]:
    """Steps 3 to 8 of the method for one head."""
    tiles = tile_queries(assignment, counts)
    queries = fill_tiles(query, tiles)  # L M H
    centroids = pool(queries, tiles, counts)  # C H
    logits = attention_logits(centroids, keys, scale)  # C S
    if topk == 0:
        return empty_tiles(of_cluster(attend_keys(logits, keys.value).mean, tiles), tiles)

    index, in_tail = select_topk(lax.stop_gradient(logits), topk)  # C k, C S
    top_keys = jax.tree.map(lambda x: x[index], keys)  # C k …
    tile_keys = jax.tree.map(lambda x: x[tiles.cluster], top_keys)  # L k …
    top = attend_keys(attention_logits(queries, tile_keys, scale), tile_keys.value)  # L M …
    if topk == len(keys.key):
        return empty_tiles(top.mean, tiles)

    tail = attend_keys(jnp.where(in_tail, logits, -jnp.inf), keys.value)  # C …
    if merge == "mass":  # the split between top-k keys and tail is that of the centroid
        centroid_logits = attention_logits(centroids[:, None], top_keys, scale)[:, 0]  # C k
        top_lse = of_cluster(jax.nn.logsumexp(centroid_logits, axis=-1), tiles)  # L 1
    else:  # each query has its own
        top_lse = top.lse  # L M
    mass = jax.nn.sigmoid(top_lse - of_cluster(tail.lse, tiles))[..., None]
    return empty_tiles(mass * top.mean + (1 - mass) * of_cluster(tail.mean, tiles), tiles)


def tile_queries(assignment: Int[Array, " T"], counts: Int[Array, " C"]) -> Tiles:
    """Sorts queries by cluster and cuts the sorted sequence into tiles of one cluster each."""
    num_queries, num_clusters = len(assignment), len(counts)
    size = tile_size(num_queries, num_clusters)
    # Each cluster leaves at most size - 1 slots of its last tile empty.
    num_tiles = (num_queries + num_clusters * (size - 1)) // size

    tiles = -(-counts // size)
    tile_ends, ends = jnp.cumsum(tiles, dtype=jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)
    cluster = jnp.searchsorted(tile_ends, jnp.arange(num_tiles), side="right")
    # What separates the slots of a cluster from the places of its queries in the sorted sequence.
    shift = size * (tile_ends - tiles) - (ends - counts)

    positions = jnp.arange(num_queries, dtype=jnp.int32)
    if (num_clusters + 1) * num_queries < 2**31:  # one sort of cluster and position in one number
        sorted_cluster, order = jnp.divmod(
            lax.sort(assignment.astype(jnp.int32) * num_queries + positions), num_queries
        )
    else:
        sorted_cluster, order = lax.sort((assignment.astype(jnp.int32), positions), num_keys=1)
    padded = sorted_cluster == num_clusters
    sorted_slot = jnp.where(padded, num_tiles * size, positions + shift[sorted_cluster])
    query = jnp.full(num_tiles * size, num_queries, jnp.int32)
    query = query.at[sorted_slot].set(order, mode="drop")
    return Tiles(
        cluster=jnp.minimum(cluster, num_clusters - 1),  # an unused tile may be of any cluster
        query=query.reshape(num_tiles, size),
        slot=jnp.zeros_like(positions).at[order].set(sorted_slot),
    )


def tile_size(num_queries: int, num_clusters: int) -> int:
    """About the mean size of a cluster, so that at most about half of all slots stay empty."""
    mean = max(1, num_queries // num_clusters)
    return min(64, 1 << (mean.bit_length() - 1))


def fill_tiles(query: Float[Array, "T H"], tiles: Tiles) -> Float[Array, "L M H"]:
    """Puts queries into their slots; empty ones get zeros."""
    slots = jnp.zeros((tiles.query.size, query.shape[-1]), query.dtype)
    return slots.at[tiles.slot].set(query, mode="drop").reshape(*tiles.query.shape, -1)


def empty_tiles(rows: Float[Array, "L _ V"], tiles: Tiles) -> Float[Array, "T V"]:
    """Puts the rows of all slots where their queries are; padded queries get zeros."""
    rows = jnp.broadcast_to(rows, (*tiles.query.shape, rows.shape[-1]))
    out = jnp.zeros((len(tiles.slot), rows.shape[-1]), rows.dtype)
    return out.at[tiles.query].set(rows, mode="drop")


def of_cluster(x: Float[Array, "C ..."], tiles: Tiles) -> Float[Array, "L 1 ..."]:
    """For each tile what belongs to its cluster."""
    return x[tiles.cluster][:, None]


def pool(
    queries: Float[Array, "L M H"], tiles: Tiles, counts: Int[Array, " C"]
) -> Float[Array, "C H"]:
    """Centroids: the means of the queries of each cluster."""
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    sums = jax.ops.segment_sum(
        queries.sum(axis=1, dtype=dtype), tiles.cluster, len(counts), indices_are_sorted=True
    )
    return sums / jnp.maximum(counts, 1)[:, None].astype(dtype)


def attention_logits(
    query: Float[Array, "*L n H"], keys: Keys, scale: float | Float[Array, ""]
) -> Float[Array, "*L n S"]:
    """Scaled products of queries and keys with the bias of the keys, in at least float32."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = scale * jnp.einsum("...nh,...sh->...ns", query, keys.key, preferred_element_type=dtype)
    if keys.bias is not None:
        logits = logits + keys.bias[..., None, :]
    if keys.valid is not None:
        logits = jnp.where(keys.valid[..., None, :], logits, MASKED)
    return logits


def attend_keys(logits: Float[Array, "*L n S"], value: Float[Array, "*L S V"]) -> Attended:
    """Softmax over keys, times their values."""
    shift = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - shift)
    total = jnp.sum(weights, axis=-1)
    sums = jnp.einsum(
        "...ns,...sv->...nv",
        weights.astype(value.dtype),
        value,
        preferred_element_type=logits.dtype,
    )
    return Attended(sums / total[..., None], shift[..., 0] + jnp.log(total))


def select_topk(
    logits: Float[Array, "C S"], topk: int
) -> tuple[Int[Array, "C k"], Bool[Array, "C S"]]:
    """The top-k keys of each cluster, ties going to the lowest index, and which keys are left."""
    values, index = lax.optimization_barrier(stable_topk(logits, topk))
    lowest, last = values[:, -1:], index[:, -1:]
    positions = jnp.arange(logits.shape[-1])
    return index, (logits < lowest) | ((logits == lowest) & (positions > last))


def stable_topk(x: Float[Array, "C S"], k: int) -> tuple[Float[Array, "C k"], Int[Array, "C k"]]:
    """``lax.top_k`` by blocks: the top k are in the k blocks of largest maximum."""
    rows, length = x.shape
    block = 1 << max(0, round(math.log2(math.sqrt(length / k))))
    num_blocks = -(-length // block)
    if 8 * (num_blocks + k * block) > length:
        values, index = lax.top_k(x, k)
        return values, index
    padding = ((0, 0), (0, num_blocks * block - length))
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(rows, num_blocks, block)
    # In the order of the sequence, so that ties still go to the lowest index.
    best = jnp.sort(lax.top_k(jnp.max(blocks, axis=-1), k)[1], axis=-1)  # C k
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=1).reshape(rows, -1)
    values, place = lax.top_k(candidates, k)
    return values, jnp.take_along_axis(best, place // block, axis=-1) * block + place % block
