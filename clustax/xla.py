"""Clustered attention in plain JAX: fast and portable, with memory linear in the sequence length.

Queries are sorted by cluster and cut into tiles that each belong to one cluster. The queries of a
cluster share its top-k keys, so these are gathered once per tile and met in dense products.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from clustax.heads import map_heads, map_rows
from clustax.topk import largest

# Stands for -inf in the logits of masked keys. It is finite so that no difference of two is NaN.
# Masked values are zero, so a query without keys gets zeros whatever its weights are.
MASKED = 0.7 * float(jnp.finfo(jnp.float32).min)
# Biases are raised to this, so that keys which count are never below those which do not.
LOWEST_BIAS = 0.5 * float(jnp.finfo(jnp.float32).min)


_SUM_RUNS = partial(jax.ops.segment_sum, indices_are_sorted=True)


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
    place: Int[Array, "L M"]  # which of the queries of its cluster it is, at least counts if empty
    slot: Int[Array, " T"]  # the slot of each query, L·M for a padded one


class Subclusters(NamedTuple):
    """Each cluster's R sub-clusters; where R is 1, the clusters themselves."""

    run: Int[Array, "L M"]  # the sub-cluster of the query in each slot, R in an empty one
    counts: Int[Array, "C R"]  # the number of queries in each

    @property
    def share(self) -> Float[Array, "*L C R"]:
        """The share of its cluster's queries that each has."""
        members = jnp.sum(self.counts, axis=-1, keepdims=True)
        return self.counts / jnp.maximum(members, 1)


class Attended(NamedTuple):
    """Attention over some of the keys, and what it takes to merge it with attention over others."""

    mean: Float[Array, "*L n V"]  # of the values, weighted by the softmax over these keys
    lse: Float[Array, "*L n"]  # log-sum-exp of the logits of these keys


class AtCentroids(NamedTuple):
    """What the queries of each cluster share."""

    top_keys: Int[Array, "C k"] | None
    top_lse: Float[Array, "C R"] | None  # log-sum-exp of their logits at each sub-cluster
    tail: Attended  # over all other keys: mean C V, lse C R


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
    num_heads, num_clusters = query.shape[2], counts.shape[-1]
    num_keys, num_key_heads, head_dim = key.shape[1:]
    group = num_heads // num_key_heads  # query heads that share a key head

    def grouped(x, axis):  # … N … -> … K G …
        return (
            x
            if x is None or group == 1
            else jnp.reshape(x, (*x.shape[:axis], num_key_heads, group, *x.shape[axis + 1 :]))
        )

    def head(scale, query, key, value, bias, valid, assignment, counts):
        return attend_head(
            query,
            Keys(key, value, bias, valid),
            assignment,
            counts,
            topk=topk,
            merge=merge,
            num_subclusters=num_subclusters,
            scale=scale,
        )

    size = tile_size(query.shape[1], num_clusters)
    num_tiles = query.shape[1] // size + num_clusters
    gathered = num_tiles * topk * (head_dim + value.shape[-1])
    logits = num_clusters * num_subclusters * num_keys
    if group > 1:
        head = jax.vmap(head, (None, 1, None, None, 0, 0, 0, 0), 1)
    out = map_heads(
        head,
        grouped(query, 2),
        key,
        value,
        *(grouped(x, 1) for x in (raise_bias(bias), valid, assignment, counts)),
        in_axes=(2, 2, 2, 1, 1, 1, 1),
        out_axis=2,
        shared=(scale,),
        head_bytes=4 * group * max(logits, gathered),
    )  # B T K (G) V
    return out.reshape(*query.shape[:-1], -1)


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
    num_subclusters: int,
    scale: float | Float[Array, ""],
) -> Float[Array, "T V"]:
    """Steps 3 to 8 of the method for one head."""
    tiles = tile_queries(assignment, counts)
    queries = fill_tiles(query, tiles)  # L M H
    if topk == len(keys.key):  # there is no tail
        slots = queries.reshape(-1, queries.shape[-1])
        every = attend_keys(attention_logits(slots, keys, scale), keys.value)
        return empty_tiles(every.mean.reshape(*queries.shape[:2], -1), tiles)

    subclusters = split_clusters(tiles, counts, num_subclusters)
    centroids = pool(queries, tiles, subclusters)  # C R H
    at_centroids = map_rows(
        lambda centroids, share: attend_centroids(centroids, keys, share, topk, scale),
        centroids,
        subclusters.share,
        row_bytes=4 * num_subclusters * len(keys.key),
    )
    if topk == 0:
        return at_centroids.tail.mean.at[assignment].get(mode="fill", fill_value=0)

    tile_index = at_centroids.top_keys[tiles.cluster]  # L k
    tile_keys = jax.tree.map(lambda x: take_rows(x, tile_index), keys)  # L k …
    top = attend_keys(attention_logits(queries, tile_keys, scale), tile_keys.value)  # L M …
    tail_mean, tail_lse = at_centroids.tail
    if merge == "mass":  # the split between top-k keys and tail is that of the centroid
        top_lse = of_subcluster(at_centroids.top_lse, tiles, subclusters)
    else:  # each query has its own
        top_lse = top.lse
    mass = jax.nn.sigmoid(top_lse - of_subcluster(tail_lse, tiles, subclusters))[..., None]
    return empty_tiles(mass * top.mean + (1 - mass) * of_cluster(tail_mean, tiles), tiles)


def attend_centroids(
    centroids: Float[Array, "C R H"],
    keys: Keys,
    share: Float[Array, "C R"],
    topk: int,
    scale: float | Float[Array, ""],
) -> AtCentroids:
    """Chooses the top-k keys of clusters, and attends to the others."""
    logits = attention_logits(centroids, keys, scale)  # C R S
    if topk == 0:
        return AtCentroids(None, None, Attended(*attend_subclusters(logits, keys.value, share)))
    ranks = lax.stop_gradient(rank_keys(logits, share))  # C S
    index = largest(ranks, topk)
    top_logits, logits = split_keys(logits, index)  # C R k, C R S
    tail = Attended(*attend_subclusters(logits, keys.value, share))
    return AtCentroids(index, jax.nn.logsumexp(top_logits, axis=-1), tail)


def tile_queries(
    assignment: Int[Array, " T"],
    counts: Int[Array, " C"],
    size: int | None = None,
    multiple: int = 1,
) -> Tiles:
    """Sorts queries by cluster and cuts the sorted sequence into tiles of one cluster each.

    There are as many tiles of ``size`` slots as it may take, rounded up to a ``multiple``.
    """
    num_queries, num_clusters = len(assignment), len(counts)
    size = tile_size(num_queries, num_clusters) if size is None else size
    # Each cluster leaves at most size - 1 slots of its last tile empty.
    num_tiles = (num_queries + num_clusters * (size - 1)) // size
    num_tiles += -num_tiles % multiple

    tiles = -(-counts // size)
    tile_ends, ends = jnp.cumsum(tiles, dtype=jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)
    cluster = jnp.searchsorted(tile_ends, jnp.arange(num_tiles), side="right")
    cluster = jnp.minimum(cluster, num_clusters - 1)  # an unused tile may be of any cluster

    assignment = assignment.astype(jnp.int32)
    place = lax.platform_dependent(
        assignment, ends - counts, cuda=_places_by_counting, default=_places_by_sorting
    )
    first_slot = size * (tile_ends - tiles)
    padded = assignment == num_clusters
    slot = jnp.where(padded, num_tiles * size, first_slot.at[assignment].get(mode="clip") + place)
    query = jnp.full(num_tiles * size, num_queries, jnp.int32)
    query = query.at[slot].set(jnp.arange(num_queries, dtype=jnp.int32), mode="drop")
    tile_of_cluster = jnp.arange(num_tiles) - (tile_ends - tiles)[cluster]
    return Tiles(
        cluster=cluster,
        query=query.reshape(num_tiles, size),
        place=size * tile_of_cluster[:, None] + jnp.arange(size),
        slot=slot,
    )


def _places_by_sorting(assignment: Int[Array, " T"], starts: Int[Array, " C"]) -> Int[Array, " T"]:
    """Which of the queries of its cluster each one is, in the order of the sequence."""
    num_queries, num_clusters = len(assignment), len(starts)
    positions = jnp.arange(num_queries, dtype=jnp.int32)
    if (num_clusters + 1) * num_queries < 2**31:  # one sort of cluster and position in one number
        cluster, order = jnp.divmod(lax.sort(assignment * num_queries + positions), num_queries)
    else:
        cluster, order = lax.sort((assignment, positions), num_keys=1)
    place = positions - starts.at[cluster].get(mode="clip")
    return jnp.zeros_like(positions).at[order].set(place)


def _places_by_counting(assignment: Int[Array, " T"], starts: Int[Array, " C"]) -> Int[Array, " T"]:
    """The same without a sort: members in earlier blocks of queries, and earlier in the block."""
    block = 32
    num_blocks = -(-len(assignment) // block)
    padding = (0, num_blocks * block - len(assignment))
    blocks = jnp.pad(assignment, padding, constant_values=len(starts)).reshape(-1, block)
    row = jnp.arange(num_blocks)[:, None]
    members = jnp.zeros((num_blocks, len(starts)), jnp.int32).at[row, blocks].add(1, mode="drop")
    earlier = jnp.cumsum(members, axis=0, dtype=jnp.int32) - members
    is_same = blocks[:, :, None] == blocks[:, None]
    is_same &= jnp.arange(block)[:, None] > jnp.arange(block)
    place = earlier.at[row, blocks].get(mode="clip") + is_same.sum(axis=-1, dtype=jnp.int32)
    return place.reshape(-1)[: len(assignment)]


def tile_size(num_queries: int, num_clusters: int) -> int:
    """About the mean size of a cluster; products of fewer than 8 rows are as slow as those of 8."""
    mean = max(1, num_queries // num_clusters)
    return min(64, max(8, 1 << (mean.bit_length() - 1)))


def fill_tiles(query: Float[Array, "T H"], tiles: Tiles) -> Float[Array, "L M H"]:
    """Puts queries into their slots; empty ones get zeros."""
    return scatter_rows(query, tiles.slot, tiles.query.size).reshape(*tiles.query.shape, -1)


def empty_tiles(rows: Float[Array, "L M V"], tiles: Tiles) -> Float[Array, "T V"]:
    """Puts the rows of all slots where their queries are; padded queries get zeros."""
    rows = rows.reshape(-1, rows.shape[-1])
    return scatter_rows(rows, tiles.query.reshape(-1), len(tiles.slot))


def take_rows(x: Shaped[Array, "S ..."], index: Int[Array, "L k"]) -> Shaped[Array, "L k ..."]:
    """Some rows of an array."""
    return _move(lambda x, index: x[index], x, index)


def scatter_rows(
    rows: Float[Array, "n D"], index: Int[Array, " n"], size: int
) -> Float[Array, "size D"]:
    """Puts rows at different places of an array of zeros, or nowhere if that is beyond its end."""

    # Reading in order and writing anywhere is faster on a CPU than the other way round.
    def scatter(rows, index):
        out = jnp.zeros((size, rows.shape[-1]), rows.dtype)
        return out.at[index].set(rows, mode="drop", unique_indices=True)

    return _move(scatter, rows, index)


def _move(
    function: Callable[[Array, Array], Array], x: Shaped[Array, "..."], index: Int[Array, "..."]
) -> Shaped[Array, "..."]:
    """Moves rows; on a TPU those of half precision as float32.

    Two of them share a place there: libtpu takes minutes to compile what writes to one.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return function(x, index)

    def in_float32(x, index):
        return function(x.astype(jnp.float32), index).astype(x.dtype)

    return lax.platform_dependent(x, index, tpu=in_float32, default=function)


def of_cluster(x: Float[Array, "C ..."], tiles: Tiles) -> Float[Array, "L 1 ..."]:
    """For each tile what belongs to its cluster."""
    return x[tiles.cluster][:, None]


def split_clusters(tiles: Tiles, counts: Int[Array, " C"], num_subclusters: int) -> Subclusters:
    """Cuts the members of each cluster, in the order of the sequence, into R runs."""
    members = counts[tiles.cluster][:, None]
    run = tiles.place * num_subclusters // jnp.maximum(members, 1)
    run = jnp.where(tiles.place < members, run, num_subclusters)
    ends = -(-jnp.arange(1, num_subclusters + 1) * counts[:, None] // num_subclusters)  # C R
    return Subclusters(run, jnp.diff(ends, axis=-1, prepend=0))


def pool(
    queries: Float[Array, "L M H"],
    tiles: Tiles,
    subclusters: Subclusters,
    sum_runs: Callable[[Array, Array, int], Array] = _SUM_RUNS,
) -> Float[Array, "C R H"]:
    """Centroids: the means of the queries of each sub-cluster."""
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    num_clusters, num_subclusters = subclusters.counts.shape
    if num_subclusters == 1:
        sums = queries.sum(axis=1, keepdims=True, dtype=dtype)  # L 1 H
    else:
        sums = jnp.einsum(
            "lrm,lmh->lrh",
            jax.nn.one_hot(subclusters.run, num_subclusters, axis=1, dtype=queries.dtype),
            queries,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
    sums = sum_runs(sums, tiles.cluster, num_clusters)
    return sums / jnp.maximum(subclusters.counts, 1)[..., None].astype(dtype)


def of_subcluster(
    x: Float[Array, "C R"], tiles: Tiles, subclusters: Subclusters
) -> Float[Array, "L M"]:
    """For each slot what belongs to its sub-cluster; zero in an empty slot."""
    runs = jax.nn.one_hot(subclusters.run, x.shape[-1], dtype=bool)  # L M R
    return jnp.sum(jnp.where(runs, x[tiles.cluster][:, None], 0), axis=-1)


def attention_logits(
    query: Float[Array, "*L n H"], keys: Keys, scale: float | Float[Array, ""]
) -> Float[Array, "*L n S"]:
    """Scaled products of queries and keys with the bias of the keys, in at least float32."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if query.dtype == dtype:  # fewer numbers than their products
        query, scale = scale * query, 1
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
    return Attended(weigh(weights, value) / total[..., None], shift[..., 0] + jnp.log(total))


def attend_subclusters(
    logits: Float[Array, "C R S"], value: Float[Array, "S V"], share: Float[Array, "C R"]
) -> tuple[Float[Array, "C V"], Float[Array, "C R"]]:
    """The mean over sub-clusters of their softmax over keys, times values; log-sum-exp of each."""
    if logits.shape[1] == 1:
        mean, lse = attend_keys(logits[:, 0], value)
        return mean, lse[:, None]
    weights, lse = mean_softmax(logits, share)
    return weigh(weights, value), lse


def mean_softmax(
    logits: Float[Array, "C R S"], share: Float[Array, "C R"]
) -> tuple[Float[Array, "C S"], Float[Array, "C R"]]:
    """The mean over sub-clusters of their softmax over keys; log-sum-exp of each."""
    shift = lax.stop_gradient(jnp.max(logits, axis=-1))
    total = jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1)
    factor = share / total

    def weights(r: int) -> Float[Array, "C S"]:
        return factor[:, r, None] * jnp.exp(logits[:, r] - shift[:, r, None])

    # A sum over the middle axis in one go is ten times slower on a CPU.
    mean = sum((weights(r) for r in range(1, logits.shape[1])), weights(0))
    return mean, shift + jnp.log(total)


def weigh(weights: Float[Array, "*L n S"], value: Float[Array, "*L S V"]) -> Float[Array, "*L n V"]:
    """Sums of values, accumulated in the dtype of the weights."""
    return jnp.einsum(
        "...ns,...sv->...nv",
        weights.astype(value.dtype),
        value,
        preferred_element_type=weights.dtype,
    )


def rank_keys(logits: Float[Array, "C R S"], share: Float[Array, "C R"]) -> Float[Array, "C S"]:
    """What the top-k keys of a cluster have most of: weight, or logits, which is the same order."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return mean_softmax(logits, share)[0]


def split_keys(
    logits: Float[Array, "C R S"], index: Int[Array, "C k"]
) -> tuple[Float[Array, "C R k"], Float[Array, "C R S"]]:
    """The logits of these keys, and those of the others, with -inf in place of the former."""
    num_clusters, num_subclusters, num_keys = logits.shape
    rows = jnp.arange(num_clusters * num_subclusters)[:, None]
    index = jnp.repeat(index, num_subclusters, axis=0)
    logits = logits.reshape(-1, num_keys)
    others = logits.at[rows, index].set(-jnp.inf, unique_indices=True)
    shape = (num_clusters, num_subclusters, -1)
    return logits[rows, index].reshape(shape), others.reshape(shape)


def outside(index: Int[Array, "C k"], num_keys: int) -> Bool[Array, "C S"]:
    """Which keys are not among those of a cluster."""
    rows = jnp.arange(len(index))[:, None]
    return jnp.ones((len(index), num_keys), bool).at[rows, index].set(False)
