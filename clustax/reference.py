"""The method as the paper writes it: dense, slow, obvious; ground truth for all others.

Nothing here is clever. Every step forms the whole matrix that its equation names, for all heads at
once: T×S logits, T×C memberships, T×C×bits differences. Give it float64 inputs to get a float64
oracle.
"""

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
    membership = jax.nn.one_hot(assignment, counts.shape[-1], dtype=dtype)  # B N T C

    # 3. Pool.
    members = jnp.maximum(counts, 1)[..., None].astype(dtype)  # B N C 1
    centroids = einsum("...tc,...th->...ch", membership, query) / members  # B N C H

    # 4. Attend at the centroids.
    centroid_logits = logits(centroids)  # B N C S
    centroid_weights = softmax(centroid_logits, keys)  # B N C S

    # 5. Plain clustered attention has these weights for all queries of a cluster: topk is 0.

    # 6. The top-k keys of each cluster.
    ranked = lax.stop_gradient(jnp.where(keys, centroid_logits, -jnp.inf))
    index = lax.top_k(ranked, topk)[1]  # B N C k
    is_top = jnp.any(jax.nn.one_hot(index, key.shape[2], dtype=bool), axis=-2)  # B N C S

    def of_cluster(x: Array) -> Array:  # B N C S -> B N T S
        return einsum("...tc,...cs->...ts", membership, x.astype(dtype))

    is_top_query = of_cluster(is_top) > 0.5  # B N T S; all False for padded queries
    if merge == "mass":
        # 7. The exact softmax over the top-k keys, times their mass at the centroid.
        mass = jnp.sum(jnp.where(is_top, centroid_weights, 0.0), axis=-1, keepdims=True)  # B N C 1
        top_weights = softmax(logits(query), keys & is_top_query) * of_cluster(mass)  # B N T S
        weights = jnp.where(is_top_query, top_weights, of_cluster(centroid_weights))
    else:
        # 7. One softmax over the exact logits of the top-k keys and the centroid's of all others.
        merged = jnp.where(is_top_query, logits(query), of_cluster(centroid_logits))
        weights = softmax(merged, keys)

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
    centroids = bits[start]  # C bits

    def assign(centroids: Bool[Array, "C bits"]) -> Int[Array, "T C"]:
        return _membership(jnp.sum(bits[:, None] != centroids, axis=-1), valid)

    for _ in range(num_iterations - 1):
        membership = assign(centroids)  # T C
        counts = membership.sum(axis=0)[:, None]  # C 1
        majority = 2 * (membership.T @ bits.astype(int)) > counts  # C bits
        centroids = jnp.where(counts > 0, majority, centroids)
    return _clusters(assign(centroids))


def euclidean(
    points: Float[Array, "T H"],
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    *,
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """K-means of points; arguments and results as of ``clustax.kmeans.euclidean``."""
    points = jnp.where(valid[:, None], points, 0)
    centroids = points[start]  # C H

    def assign(centroids: Float[Array, "C H"]) -> Int[Array, "T C"]:
        return _membership(jnp.sum((points[:, None] - centroids) ** 2, axis=-1), valid)

    for _ in range(num_iterations - 1):
        membership = assign(centroids)  # T C
        counts = membership.sum(axis=0)[:, None]  # C 1
        means = einsum("tc,th->ch", membership.astype(points.dtype), points) / jnp.maximum(
            counts, 1
        )
        centroids = jnp.where(counts > 0, means, centroids)
    return _clusters(assign(centroids))


def _membership(distances: Array, valid: Bool[Array, " T"]) -> Int[Array, "T C"]:
    """1 where a point is in a cluster: that of the nearest centroid, ties to the lowest index."""
    nearest = jnp.argmin(distances, axis=-1)
    return jax.nn.one_hot(nearest, distances.shape[-1], dtype=int) * valid[:, None]


def _clusters(membership: Int[Array, "T C"]) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """The cluster of each point, C for one that is in none, and how many are in each cluster."""
    in_one = membership.sum(axis=-1) > 0
    assignment = jnp.where(in_one, jnp.argmax(membership, axis=-1), membership.shape[-1])
    return assignment.astype(jnp.int32), membership.sum(axis=0, dtype=jnp.int32)
