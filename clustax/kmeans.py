"""Lloyd's K-means of the queries of one head, in Hamming and in Euclidean space.

``num_iterations`` counts assignments; an update of the centroids stands between every two of them.
Ties go to the centroid of lowest index. A centroid that lost all its members moves to a query that
is served badly: of each C-th one, from its own index on, the farthest from its centroid.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

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

    def update(assignment, counts):
        ones = _count_ones(spread, assignment, len(start), num_bits, width)  # C bits
        return lsh.pack_bits(2 * ones > counts[:, None], axis=-1)  # C W

    return _lloyd(codes, start, valid, partial(_nearest_code, codes), update, num_iterations)


def euclidean(
    points: Float[Array, "T H"],
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    *,
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """Clusters points: a centroid is the mean of its members; the rest is as in :func:`hamming`."""

    def update(assignment, counts):
        sums = _segment_sum(points, assignment, len(start))  # C H
        return sums / jnp.maximum(counts, 1)[:, None]

    return _lloyd(points, start, valid, partial(_nearest_point, points), update, num_iterations)


def _lloyd(
    points: Array,
    start: Int[Array, " C"],
    valid: Bool[Array, " T"],
    nearest: Callable[[Array], tuple[Int[Array, " T"], Array]],
    update: Callable[[Int[Array, " T"], Int[Array, " C"]], Array],
    num_iterations: int,
) -> tuple[Int[Array, " T"], Int[Array, " C"]]:
    """Alternates the two steps.

    Args:
      points: points, or codes.
      start: positions of those that start the centroids.
      valid: which of them count.
      nearest: for each point the nearest of given centroids, and the distance to it.
      update: the centroids of clusters, given their members and how many these are.
      num_iterations: number of assignments.
    """
    num_clusters = len(start)

    def assign(centroids):
        assignment, distance = nearest(centroids)
        assignment = jnp.where(valid, assignment, num_clusters)
        counts = _segment_sum(jnp.ones_like(assignment), assignment, num_clusters)
        return assignment, counts, jnp.where(valid, distance, -1)

    def step(state):
        iteration, centroids, _ = state
        assignment, counts, distance = assign(centroids)
        index, distance = farthest(distance, num_clusters)
        reseeded = jnp.where(distance[:, None] >= 0, points[index], centroids)
        updated = jnp.where(counts[:, None] > 0, update(assignment, counts), reseeded)
        return iteration + 1, updated, jnp.any(updated != centroids)

    def goes_on(state):  # where nothing changes any more, more iterations would find the same
        iteration, _, has_changed = state
        return (iteration < num_iterations) & has_changed

    first = (jnp.int32(1), points[start], jnp.bool_(True))
    _, centroids, _ = lax.while_loop(goes_on, step, first)
    return assign(centroids)[:2]


def farthest(
    distance: Shaped[Array, " T"], num_clusters: int
) -> tuple[Int[Array, " C"], Shaped[Array, " C"]]:
    """The largest distance of each C-th query from j on, for every j, and where it is."""
    rows = -(-len(distance) // num_clusters)
    padding = (0, rows * num_clusters - len(distance))
    distance = jnp.pad(distance, padding, constant_values=-1).reshape(rows, num_clusters)
    row = jnp.argmax(distance, axis=0)
    return row * num_clusters + jnp.arange(num_clusters), jnp.max(distance, axis=0)


def _segment_sum(values: Array, assignment: Int[Array, " T"], num_clusters: int) -> Array:
    """Sums the rows of each cluster; rows that are assigned to ``num_clusters`` are in none."""
    return jax.ops.segment_sum(values, assignment, num_segments=num_clusters)


def _nearest_code(
    codes: UInt32[Array, "T W"], centroids: UInt32[Array, "C W"]
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
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

    distance, index = jnp.divmod(lax.platform_dependent(cpu=loop, default=fused), num_clusters)
    return index, distance


def _nearest_point(
    points: Float[Array, "T H"], centroids: Float[Array, "C H"]
) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """The nearest centroid by |c|² - 2 x·c, as |x|² is the same for all; the squared distance."""
    products = lax.dot(centroids, points.T, precision=lax.Precision.HIGHEST)  # C T
    distances = jnp.sum(centroids**2, axis=-1)[:, None] - 2 * products

    def loop():
        def nearer(j, best):
            distance, index = best
            closer = distances[j] < distance
            return jnp.where(closer, distances[j], distance), jnp.where(closer, j, index)

        first = (distances[0], jnp.zeros(len(points), jnp.int32))
        return lax.fori_loop(1, len(centroids), nearer, first, unroll=8)

    def fused():
        return jnp.min(distances, axis=0), jnp.argmin(distances, axis=0).astype(jnp.int32)

    distance, index = lax.platform_dependent(cpu=loop, default=fused)
    return index, jnp.maximum(distance + jnp.sum(points**2, axis=-1), 0)


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
