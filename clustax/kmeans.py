"""Lloyd's K-means of the queries of one head, in Hamming and in Euclidean space.

``num_iterations`` counts assignments; an update of the centroids stands between every two of them.
Ties go to the centroid of lowest index, and a centroid that lost all its members stays where it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from clustax import lsh


def hamming(
    codes: UInt32[Array, "T W"],
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    *,
    num_bits: int,
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """Clusters codes: a centroid is the majority of its members in each bit, and a draw gives 0.

    Args:
      codes: packed codes of ``num_bits`` bits.
      start: positions of the codes that start the centroids.
      valid: which codes count; the others are assigned to C.
      num_bits: number of bits in a code.
      num_iterations: number of assignments.

    Returns:
      The assignment, in [0, C], and the number of members of each cluster.
    """
    # Half words are enough to count fewer than 2^16 codes, and halve what an update has to read.
    width = lsh.WORD // 2 if len(codes) < 2 ** (lsh.WORD // 2) else lsh.WORD
    spread = _spread(codes, width)

    def update(assignment, centroids):
        counts = _segment_sum(jnp.ones_like(assignment), assignment, len(start))  # C
        ones = _count_ones(spread, assignment, len(start), num_bits, width)  # C bits
        majority = lsh.pack_bits(2 * ones > counts[:, None], axis=-1)  # C W
        return jnp.where(counts[:, None] > 0, majority, centroids)

    return _lloyd(codes[start], valid, lambda c: _nearest_code(codes, c), update, num_iterations)


def euclidean(
    points: Float[Array, "T H"],
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    *,
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """Clusters points: a centroid is the mean of its members; the rest is as in :func:`hamming`."""

    def update(assignment, centroids):
        counts = _segment_sum(jnp.ones_like(assignment), assignment, len(start))[:, None]  # C 1
        sums = _segment_sum(points, assignment, len(start))  # C H
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centroids)

    return _lloyd(points[start], valid, lambda c: _nearest_point(points, c), update, num_iterations)


def _lloyd(
    centroids: Array,
    valid: Bool[Array, " T"],
    nearest: Callable[[Array], Int[Array, " T"]],
    update: Callable[[Int[Array, " T"], Array], Array],
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    num_clusters = len(centroids)

    def assign(centroids):
        return jnp.where(valid, nearest(centroids), num_clusters)

    centroids = lax.fori_loop(0, num_iterations - 1, lambda _, c: update(assign(c), c), centroids)
    assignment = assign(centroids)
    return assignment, _segment_sum(jnp.ones_like(assignment), assignment, num_clusters)


def _segment_sum(values: Array, assignment: Int[Array, " T"], num_clusters: int) -> Array:
    """Sums the rows of each cluster; rows that are assigned to ``num_clusters`` are in none."""
    return jax.ops.segment_sum(values, assignment, num_segments=num_clusters)


def _nearest_code(codes: UInt32[Array, "T W"], centroids: UInt32[Array, "C W"]) -> Int[Array, " T"]:
    """The nearest centroid in Hamming distance, as one minimum over distance · C + index."""
    num_clusters = len(centroids)
    words = codes.T  # W T

    def ranked(j):
        differing = lax.population_count(words ^ centroids[j][:, None])  # W T
        return differing.sum(axis=0).astype(jnp.int32) * num_clusters + j

    # A CPU turns the loop over centroids into vector code; accelerators fuse the minimum over all.
    def loop():
        first = ranked(jnp.int32(0))
        return lax.fori_loop(
            1, num_clusters, lambda j, best: jnp.minimum(best, ranked(j)), first, unroll=4
        )

    def fused():
        return jnp.min(jax.vmap(ranked)(jnp.arange(num_clusters, dtype=jnp.int32)), axis=0)

    return lax.platform_dependent(cpu=loop, default=fused) % num_clusters


def _nearest_point(points: Float[Array, "T H"], centroids: Float[Array, "C H"]) -> Int[Array, " T"]:
    """The nearest centroid in Euclidean distance: |c|² - 2 x·c, as |x|² is the same for all."""
    products = lax.dot(centroids, points.T, precision=lax.Precision.HIGHEST)  # C T
    distances = jnp.sum(centroids**2, axis=-1)[:, None] - 2 * products

    def loop():
        def nearer(j, best):
            distance, index = best
            closer = distances[j] < distance
            return jnp.where(closer, distances[j], distance), jnp.where(closer, j, index)

        first = (distances[0], jnp.zeros(len(points), jnp.int32))
        return lax.fori_loop(1, len(centroids), nearer, first, unroll=4)[1]

    def fused():
        return jnp.argmin(distances, axis=0).astype(jnp.int32)

    return lax.platform_dependent(cpu=loop, default=fused)


def _spread(codes: UInt32[Array, "T W"], width: int) -> UInt32[Array, "T F"]:
    """Spreads bits out into fields of ``width`` bits.

    Word s of the ``width`` words for 32 bits holds the bits s, s + ``width``, …: adding such words
    counts the ones in each bit, as long as no count needs more than ``width`` bits.
    """
    lowest_of_each = jnp.uint32(sum(1 << place for place in range(0, lsh.WORD, width)))
    fields = (codes[..., None] >> jnp.arange(width, dtype=jnp.uint32)) & lowest_of_each
    return fields.reshape(len(codes), -1)


def _count_ones(
    spread: UInt32[Array, "T F"],
    assignment: Int[Array, " T"],
    num_clusters: int,
    num_bits: int,
    width: int,
) -> Int[Array, "C bits"]:
    """How many members of each cluster have a 1 in each bit."""
    sums = _segment_sum(spread, assignment, num_clusters).reshape(num_clusters, -1, 1, width)
    places = jnp.arange(0, lsh.WORD, width, dtype=jnp.uint32)[:, None]
    ones = (sums >> places) & jnp.uint32(2**width - 1)  # C W fields width
    return ones.reshape(num_clusters, -1)[:, :num_bits].astype(jnp.int32)
