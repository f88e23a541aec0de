"""The method as the paper writes it: dense, slow, obvious; ground truth for all others.

Nothing here is clever. Every step forms the whole matrix that its equation names, for all heads at
once: T×S logits, T×C memberships, T×C×bits differences. Give it float64 inputs to get a float64
oracle.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from clustax import lsh

einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


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
    """Steps 3 to 8 of the method (``clustax.attend``), for canonical arguments."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    groups = query.shape[2] // key.shape[2]
    in_cluster = assignment < counts.shape[-1]  # B N T
    query = jnp.swapaxes(query, 1, 2).astype(dtype)  # B N T H
    query = jnp.where(in_cluster[..., None], query, 0)
    key = jnp.repeat(jnp.swapaxes(key, 1, 2), groups, axis=1).astype(dtype)  # B N S H
    value = jnp.repeat(jnp.swapaxes(value, 1, 2), groups, axis=1).astype(dtype)  # B N S V

    def logits(query: Float[Array, "B N n H"]) -> Float[Array, "B N n S"]:
        products = scale * einsum("...nh,...sh->...ns", query, key)
        return products if bias is None else products + bias[:, :, None, :].astype(dtype)

    def softmax(
        logits: Float[Array, "... S"], where: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        """Softmax over the keys of ``where``; zeros where there are none."""
        some = jnp.any(where, axis=-1, keepdims=True)
        return jnp.where(some, jax.nn.softmax(logits, axis=-1, where=where | ~some), 0.0)

    keys = jnp.ones((*query.shape[:2], 1, key.shape[2]), bool)  # B N 1 S
    if valid is not None:
        keys = valid[:, :, None, :]
    # A place among the members of a cluster is in one of R runs: the sub-clusters.
    membership = jax.nn.one_hot(assignment, counts.shape[-1], dtype=dtype)  # B N T C
    members = jnp.maximum(counts, 1)[..., None, :]  # B N 1 C
    places = jnp.cumsum(membership, axis=-2).astype(int) - 1  # B N T C
    runs = jax.nn.one_hot(places * num_subclusters // members, num_subclusters, dtype=dtype)
    runs = membership[..., None] * runs  # B N T C R
    share = jnp.sum(runs, axis=-3) / members.swapaxes(-1, -2)  # B N C R

    def of_cluster(x: Float[Array, "B N C S"]) -> Float[Array, "B N T S"]:
        return einsum("...tc,...cs->...ts", membership, x)

    def of_subcluster(x: Float[Array, "B N C R S"]) -> Float[Array, "B N T S"]:
        return einsum("...tcr,...crs->...ts", runs, x)

    # 3. Pool.
    sums = einsum("...tcr,...th->...crh", runs, query)
    centroids = sums / jnp.maximum(jnp.sum(runs, axis=-3), 1)[..., None]  # B N C R H

    # 4. Attend at the centroids.
    centroid_logits = logits(centroids.reshape(*query.shape[:2], -1, query.shape[-1]))
    centroid_logits = centroid_logits.reshape(*centroids.shape[:-1], -1)  # B N C R S

    def mean_weights(where: Bool[Array, "B N #C S"]) -> Float[Array, "B N C S"]:
        weights = softmax(centroid_logits, where[..., None, :])
        return einsum("...cr,...crs->...cs", share, weights)

    # 5. Plain clustered attention has these weights for all queries of a cluster: topk is 0.

    # 6. The top-k keys of each cluster.
    ranked = centroid_logits[..., 0, :] if num_subclusters == 1 else mean_weights(keys)
    ranked = lax.stop_gradient(jnp.where(keys, ranked, -jnp.inf))
    index = lax.top_k(ranked, topk)[1]  # B N C k
    is_top = jnp.any(jax.nn.one_hot(index, key.shape[2], dtype=bool), axis=-2)  # B N C S
    is_top_query = of_cluster(is_top.astype(dtype)) > 0.5  # B N T S; all False for padded queries

    # 7. The exact softmax over the top-k keys, times their mass …
    if merge == "mass":  # … at the centroid
        split = of_subcluster(softmax(centroid_logits, keys[..., None, :]))  # B N T S
    else:  # … for each query, beside the centroid's logits of all other keys.
        merged = jnp.where(is_top_query, logits(query), of_subcluster(centroid_logits))
        split = softmax(merged, keys)
    mass = jnp.sum(jnp.where(is_top_query, split, 0), axis=-1, keepdims=True)  # B N T 1
    tail_mass = jnp.sum(jnp.where(is_top_query, 0, split), axis=-1, keepdims=True)
    top_weights = softmax(logits(query), keys & is_top_query) * mass
    tail_weights = of_cluster(mean_weights(keys & ~is_top)) * tail_mass
    weights = jnp.where(is_top_query, top_weights, tail_weights)

    # 8. Padded queries belong to no cluster and get zeros.
    weights = jnp.where(in_cluster[..., None], weights, 0.0)
    return jnp.swapaxes(einsum("...ts,...sv->...tv", weights, value), 1, 2)


def hamming(
    codes: UInt32[Array, "T W"],
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    *,
    num_bits: int,
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """Step 2 of the method; arguments and results as of ``clustax.kmeans.hamming``."""
    bits = lsh.unpack_bits(codes, num_bits)  # T bits

    def distances(centroids: Bool[Array, "C bits"]) -> Int[Array, "T C"]:
        return jnp.sum(bits[:, None] != centroids, axis=-1)

    def update(membership: Int[Array, "T C"]) -> Bool[Array, "C bits"]:
        return 2 * (membership.T @ bits.astype(int)) > membership.sum(axis=0)[:, None]

    return _lloyd(bits, start, valid, distances, update, num_iterations)


def euclidean(
    points: Float[Array, "T H"],
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    *,
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """K-means of points; arguments and results as of ``clustax.kmeans.euclidean``."""
    points = jnp.where(valid[:, None], points, 0)

    def distances(centroids: Float[Array, "C H"]) -> Float[Array, "T C"]:
        return jnp.sum((points[:, None] - centroids) ** 2, axis=-1)

    def update(membership: Int[Array, "T C"]) -> Float[Array, "C H"]:
        members = jnp.maximum(membership.sum(axis=0), 1)[:, None]
        return einsum("tc,th->ch", membership.astype(points.dtype), points) / members

    return _lloyd(points, start, valid, distances, update, num_iterations)


def _lloyd(
    points: Array,
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    distances: Callable[[Array], Array],
    update: Callable[[Int[Array, "T C"]], Array],
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """Lloyd's algorithm, one assignment and one update after the other."""
    length, num_clusters = len(points), len(start)
    centroids = points[start]
    for _ in range(num_iterations - 1):
        from_all = distances(centroids)  # T C
        membership = _membership(from_all, valid)  # T C
        centroids = jnp.where(membership.any(axis=0)[:, None], update(membership), centroids)
        # An empty cluster starts anew at the worst served of each C-th query.
        served = jnp.where(valid, from_all.min(axis=-1), -1)  # T
        own = jnp.arange(length)[:, None] % num_clusters == jnp.arange(num_clusters)  # T C
        worst = jnp.argmax(jnp.where(own, served[:, None], -2), axis=0)  # C
        empty = ~membership.any(axis=0) & (served[worst] >= 0)
        centroids = jnp.where(empty[:, None], points[worst], centroids)
    return _clusters(_membership(distances(centroids), valid))


def _membership(distances: Array, valid: Bool[Array, " T"]) -> Int[Array, "T C"]:
    """1 where a point is in a cluster: that of the nearest centroid, ties to the lowest index."""
    nearest = jnp.argmin(distances, axis=-1)
    return jax.nn.one_hot(nearest, distances.shape[-1], dtype=int) * valid[:, None]


def _clusters(membership: Int[Array, "T C"]) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """The cluster of each point, C for one that is in none, and how many are in each cluster."""
    in_one = membership.sum(axis=-1) > 0
    assignment = jnp.where(in_one, jnp.argmax(membership, axis=-1), membership.shape[-1])
    return assignment.astype(jnp.int32), membership.sum(axis=0, dtype=jnp.int32)
