"""Clusters of queries: what they are, and how they are found (paper, section 3.2.1)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int, UInt32

from clustax import implementations, kernels, kmeans, lsh, masks, reference, validation
from clustax.heads import map_heads

METRICS = ("hamming", "euclidean")
_KMEANS = {"xla": kmeans, "reference": reference}


class Clusters(NamedTuple):
    """A clustering of the queries of each batch entry and head.

    Attributes:
      assignment: the cluster of each query, in [0, C); padded queries hold C.
      counts: the number of queries in each cluster.
    """

    assignment: Int[Array, "*B N T"]
    counts: Int[Array, "*B N C"]


def cluster_codes(
    codes: UInt32[Array, "*B N T W"],
    *,
    num_bits: int,
    num_clusters: int,
    num_iterations: int = 10,
    rng: Array | None = None,
    initial_positions: Int[Array, " C"] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Clusters:
    r"""Clusters hash codes by K-means in Hamming space.

    Lloyd's algorithm lowers :math:`\sum_i |h_i \oplus c_{j(i)}|`, the number of bits in which codes
    :math:`h_i` differ from the centroids :math:`c_j` of their clusters :math:`j(i)`: codes are
    assigned to the nearest centroid (ties to the lowest index), and a centroid becomes the majority
    of its members in each bit (a draw gives 0). A centroid that has lost all its members moves to a
    code that is far from its own: of each C-th code, from the index of the cluster on, the
    farthest.

    Args:
      codes: codes of :func:`clustax.hash_codes`, for each batch entry, head and query.
      num_bits: bits in a code, at least 1.
      num_clusters: C, at least 1. It is clamped to T, where each query is a cluster.
      num_iterations: number of assignments, at least 1; updates of the centroids stand between
        them.
      rng: a key for the queries whose codes start the centroids, one drawn from each of C equal
        stretches of the valid ones; ``jax.random.key(0)`` if None.
      initial_positions: these queries instead, the same for every batch entry and head.
      query_seq_lengths: number of valid queries of each batch entry; the rest is padding. All if
        None.
      implementation: see :func:`clustax.attend`.

    Returns:
      The clusters, as int32.

    Raises:
      ValueError: if an argument is not as above.
      NotImplementedError: if ``implementation`` cannot serve the call.

    Source: paper, section 3.2.1.

    >>> codes = jnp.array([[[0b0000], [0b1111], [0b0001], [0b0111]]], jnp.uint32)  # N = 1, T = 4
    >>> clusters = cluster_codes(
    ...     codes, num_bits=4, num_clusters=2, initial_positions=jnp.array([0, 1])
    ... )
    >>> clusters.assignment, clusters.counts
    (Array([[0, 1, 0, 1]], dtype=int32), Array([[2, 2]], dtype=int32))
    """
    validation.at_least("num_bits", num_bits, 1)
    codes = validation.codes("codes", codes, num_bits, lsh.num_words(num_bits))
    settings = _checked_settings(
        codes.shape[:-3],
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        rng=rng,
        initial_positions=initial_positions,
        query_seq_lengths=query_seq_lengths,
        implementation=implementation,
        of=(codes.shape[-2], codes.shape[-1], codes.dtype),
    )
    # What stands in a word after the last bit is none of the code.
    codes &= lsh.pack_bits(jnp.arange(lsh.WORD * codes.shape[-1]) < num_bits, axis=0)
    return _run_kmeans(codes, metric="hamming", num_bits=num_bits, **settings)


def cluster_queries(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"] | None = None,
    *,
    num_clusters: int,
    num_bits: int = 64,
    num_iterations: int = 10,
    metric: str = "hamming",
    planes: Float[Array, "bits H+1"] | None = None,
    rng: Array | None = None,
    initial_positions: Int[Array, " C"] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Clusters:
    r"""Groups the queries of each batch entry and head into clusters.

    With ``metric="hamming"`` queries are hashed by :func:`clustax.hash_codes` and their codes
    clustered by :func:`clustax.cluster_codes`; with ``metric="euclidean"`` the queries themselves
    are, and centroids are means. With ``key``, the distance between two queries is that between
    their logits,

    .. math:: \sum_l ((Q_i - Q_j) \cdot (K_l - \bar K))^2 / S = |L^T (Q_i - Q_j)|^2,
       \quad L L^T = \mathrm{cov}(K),

    which is what has to be alike within a cluster: queries are centred and multiplied by the
    Cholesky factor L of the covariance of their keys first. No gradient flows through clustering.

    Args:
      query: queries, of any floating dtype.
      key: keys of the same dtype; K divides N.
      num_clusters: C, at least 1. It is clamped to T, where each query is a cluster.
      num_bits: bits in a hash code, at least 1; that of ``planes`` where these are given.
      num_iterations: number of assignments in K-means, at least 1.
      metric: "hamming" or "euclidean".
      planes: planes of :func:`clustax.hash_planes`; drawn from ``rng`` if None. Only with
        "hamming".
      rng: a key for planes and starting centroids; ``jax.random.key(0)`` if None.
      initial_positions: positions of the queries that start the centroids; see
        :func:`clustax.cluster_codes`.
      query_seq_lengths: number of valid queries of each batch entry; the rest is padding. All if
        None.
      key_value_seq_lengths: the same for ``key``.
      mask: True for the keys that count, the same for all queries. Only with ``key``.
      implementation: see :func:`clustax.attend`.

    Returns:
      The clusters, as int32.

    Raises:
      ValueError: if an argument is not as above.
      NotImplementedError: if ``implementation`` cannot serve the call.

    Source: paper, section 3.2.1, for "hamming" without ``key``; the rest is clustax's own.

    >>> query = jnp.array([1.0, 9.0, 2.0, 8.0]).reshape(4, 1, 1)  # T = 4, N = 1, H = 1
    >>> clusters = cluster_queries(query, num_clusters=2, metric="euclidean")
    >>> clusters.assignment[0, 0] == clusters.assignment[0, 2]
    Array(True, dtype=bool)
    """
    validation.choice("metric", metric, METRICS)
    validation.at_least("num_bits", num_bits, 1)
    if key is None:
        query = validation.floating("query", query, "*B T N H")
        validation.no_keys(mask=mask, key_value_seq_lengths=key_value_seq_lengths)
    else:
        query, key = validation.query_key(query, key)
        mask = validation.of_keys("mask", mask, query, key.shape[-3])
        key_value_seq_lengths = validation.lengths(
            "key_value_seq_lengths", key_value_seq_lengths, query.shape[:-3]
        )
    if metric != "hamming" and planes is not None:
        raise ValueError(f"planes are for metric='hamming', got metric={metric!r}; leave them out.")
    if planes is not None:
        planes = validation.planes("planes", planes, query.shape[-1])
        num_bits = len(planes)
    if metric == "hamming":
        width, dtype = lsh.num_words(num_bits), jnp.dtype(jnp.uint32)
    else:
        width, dtype = query.shape[-1], jnp.promote_types(query.dtype, jnp.float32)
    settings = _checked_settings(
        query.shape[:-3],
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        rng=rng,
        initial_positions=initial_positions,
        query_seq_lengths=query_seq_lengths,
        implementation=implementation,
        of=(query.shape[-3], width, dtype),
    )
    planes_rng, settings["rng"] = jax.random.split(settings["rng"])
    if num_clusters >= query.shape[-3]:  # Each query is a cluster, whatever lies where.
        return _run_kmeans(jnp.swapaxes(query, -3, -2), metric=metric, **settings)
    if metric == "hamming" and planes is None:
        planes = lsh.hash_planes(planes_rng, num_bits=num_bits, head_dim=query.shape[-1])
    covariance = None
    if key is not None:
        valid_keys = masks.valid_keys(mask, None, key_value_seq_lengths, key.shape[-3])
        is_pallas = settings["implementation"] == "pallas"
        if metric == "euclidean" and is_pallas and query.dtype == jnp.bfloat16:
            # Kernels take queries as they are, and the covariance of their keys besides.
            covariance = key_covariance(key, valid_keys, query.shape[-2])
        else:
            query = to_logit_space(query, key, settings["query_seq_lengths"], valid_keys)
    if planes is None:
        points = jnp.swapaxes(query, -3, -2)
        return _run_kmeans(points, covariance=covariance, metric=metric, **settings)
    codes = lsh.hash_codes(query, planes)
    return _run_kmeans(codes, metric=metric, num_bits=num_bits, **settings)


@jax.jit
def to_logit_space(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    query_seq_lengths: Int[Array, "*B"] | None,
    valid_keys: Bool[Array, "*#B #N S"] | None,
) -> Float[Array, "*B T N H"]:
    """Queries between which Euclidean distances are distances between their logits."""
    shape, dtype = query.shape, jnp.promote_types(query.dtype, jnp.float32)
    length, num_heads, head_dim = shape[-3:]
    key = masks.drop_keys(key, valid_keys, num_heads)
    num_keys, num_key_heads = key.shape[-3:-1]
    # What was bfloat16 keeps all bits in matrix units, whatever the precision.
    has_few_bits = query.dtype == jnp.bfloat16
    query = lax.stop_gradient(query).astype(dtype).reshape(-1, *query.shape[-3:])  # B T N H
    key = lax.stop_gradient(key).astype(dtype).reshape(-1, *key.shape[-3:])  # B S K H

    def means(valid, *heads_and_length):  # weights whose products with valid rows are their mean
        valid = jnp.broadcast_to(valid, (*shape[:-3], *heads_and_length))
        valid = valid.reshape(-1, *heads_and_length)
        return valid / jnp.maximum(valid.sum(axis=-1, keepdims=True), 1).astype(dtype)

    lengths = jnp.array(length) if query_seq_lengths is None else query_seq_lengths[..., None]
    query_weights = means(masks.valid_positions(lengths, length), num_key_heads, length)
    key_weights = means(True if valid_keys is None else valid_keys, num_key_heads, num_keys)

    def key_head(query, key, query_weight, key_weight):  # T G H, S H, T, S
        dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        centred = key - dot(key_weight, key)
        covariance = dot((key_weight[:, None] * centred).T, centred)  # H H
        # Keys that fill only a subspace still get a factor, one that is small in the other
        # directions.
        ridge = 1e-5 * jnp.trace(covariance) / head_dim + jnp.finfo(dtype).tiny
        factor = jnp.linalg.cholesky(covariance + ridge * jnp.eye(head_dim, dtype=dtype))
        query = jnp.where(query_weight[:, None, None] > 0, query, 0)
        mean = dot(query_weight, query.reshape(length, -1)).reshape(query.shape[1:])
        if not has_few_bits:
            return dot(query - mean, factor)
        moved = lax.platform_dependent(query, factor, tpu=_dot_by_parts, default=dot)
        return moved - dot(mean, factor)

    out = map_heads(
        key_head,
        query.reshape(len(query), length, num_key_heads, -1, head_dim),
        key,
        query_weights,
        key_weights,
        in_axes=(2, 2, 1, 1),
        out_axis=2,
        head_bytes=8 * (length + num_keys) * head_dim,
    )  # B T K G H
    return out.reshape(shape)


def _dot_by_parts(x: Float[Array, "... H"], y: Float[Array, "H D"]) -> Float[Array, "... D"]:
    """The product in full precision where x was bfloat16: y is a sum of three such arrays.

    That is half of the work, and libtpu takes a minute to compile the other way.
    """
    total = jnp.zeros((), y.dtype)
    for _ in range(3):
        part = lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)
        total += jnp.matmul(x, part, precision=lax.Precision.DEFAULT)
        y = y - part
    return total


@partial(jax.jit, static_argnames="num_heads")
def key_covariance(
    key: BFloat16[Array, "*B S K H"], valid_keys: Bool[Array, "*#B #N S"] | None, num_heads: int
) -> Float[Array, "*B N H H"]:
    """The covariance of the keys of each head, from one read of them."""
    key = lax.stop_gradient(masks.drop_keys(key, valid_keys, num_heads))
    count: Any = key.shape[-3]
    if valid_keys is not None:
        count = jnp.maximum(valid_keys.sum(axis=-1), 1)[..., None, None]  # #B #N 1 1

    def of_heads(x):  # sums of K heads are those of N
        return jnp.repeat(x, num_heads // x.shape[-3], axis=-3) / count

    key = key.astype(jnp.float32)
    # What was bfloat16 keeps all bits in the matrix unit's float32.
    product = partial(jnp.einsum, precision=lax.Precision.DEFAULT)
    mean = of_heads(key.sum(axis=-3)[..., None, :])  # *B N 1 H
    square = of_heads(product("...skh,...ski->...khi", key, key))
    return square - jnp.swapaxes(mean, -1, -2) * mean


def _checked_settings(
    batch: tuple[int, ...],
    *,
    num_clusters: int,
    num_iterations: int,
    rng: Array | None,
    initial_positions: Int[Array, " C"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    implementation: str | Sequence[str] | None,
    of: tuple[int, int, Any],
) -> dict[str, Any]:
    """Checks the settings of K-means, of points or codes of this length, width and dtype."""

    def unfit() -> str | None:
        return kernels.of("kmeans").refusal(*of, num_clusters)

    validation.at_least("num_clusters", num_clusters, 1)
    validation.at_least("num_iterations", num_iterations, 1)
    return {
        "num_clusters": num_clusters,
        "num_iterations": num_iterations,
        "rng": validation.rng_key("rng", rng),
        "initial_positions": validation.positions(
            "initial_positions", initial_positions, num_clusters
        ),
        "query_seq_lengths": validation.lengths("query_seq_lengths", query_seq_lengths, batch),
        "implementation": implementations.choose(implementation, unfit).name,
    }


@partial(
    jax.jit,
    static_argnames=("metric", "num_bits", "num_clusters", "num_iterations", "implementation"),
)
def _run_kmeans(
    points: UInt32[Array, "*B N T W"] | Float[Array, "*B N T H"],
    rng: Array,
    initial_positions: Int[Array, " C"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    *,
    covariance: Float[Array, "*B N H H"] | None = None,
    metric: str,
    num_bits: int | None = None,
    num_clusters: int,
    num_iterations: int,
    implementation: str,
) -> Clusters:
    *batch, num_heads, length, width = points.shape
    points = lax.stop_gradient(points).reshape(-1, num_heads, length, width)
    lengths = jnp.full(batch, length) if query_seq_lengths is None else query_seq_lengths
    lengths = jnp.broadcast_to(jnp.clip(lengths, 0, length).reshape(-1, 1), points.shape[:2])  # B N
    valid = masks.valid_positions(lengths, length)  # B N T
    if num_clusters >= length:  # each query is a cluster
        assignment = jnp.where(valid, jnp.arange(length, dtype=jnp.int32), length)
        counts = valid.astype(jnp.int32)
    else:
        if initial_positions is None:  # one query from each of C equal stretches of the valid ones
            place = jnp.arange(num_clusters) + jax.random.uniform(rng, (num_clusters,))
            start = (place / num_clusters * lengths[..., None]).astype(jnp.int32)
        else:
            start = jnp.broadcast_to(initial_positions, (*points.shape[:2], num_clusters))
        # Padding starts no centroid, whatever it holds.
        start = jnp.minimum(start, jnp.maximum(lengths[..., None] - 1, 0))  # B N C
        settings: dict[str, Any] = {"num_iterations": num_iterations}
        if metric == "hamming":
            settings["num_bits"] = num_bits
            numbers_per_query = lsh.WORD * width
        else:
            if covariance is None:
                points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
            else:
                settings["covariance"] = covariance.reshape(-1, width, width)
            numbers_per_query = num_clusters
        if implementation == "pallas":  # all heads at once
            arrays = (x.reshape(-1, *x.shape[2:]) for x in (points, start, valid))
            assignment, counts = getattr(kernels.of("kmeans"), metric)(*arrays, **settings)
        else:
            assignment, counts = map_heads(
                partial(getattr(_KMEANS[implementation], metric), **settings),
                points,
                start,
                valid,
                head_bytes=4 * length * numbers_per_query,
            )
    return Clusters(
        assignment.reshape(*batch, num_heads, length), counts.reshape(*batch, num_heads, -1)
    )
