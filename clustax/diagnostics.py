"""What clustered attention loses and costs on given activations, and which settings would do.

Everything is compared with exact attention at a sample of the queries, so that no array of T×S is
formed. A sample is drawn for each batch entry from its valid queries, the same ones for all heads.
With ``sample`` of T or more it is all of them, and the figures are exact. Where products are part
of a figure they are taken in float32 at least, at the highest precision. All but
:func:`recommend` can be used under ``jax.jit``.

>>> from clustax import ClusteredAttention, diagnostics
>>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))  # B = 2, N = 4
>>> clusters = ClusteredAttention(num_clusters=50).cluster(query, key)
>>> diagnostics.occupancy(clusters).largest.shape
(2, 4)
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from clustax import baselines, masks, validation, xla
from clustax.attention import canonical, checked_arrays, is_short
from clustax.attention_fn import ClusteredAttention, as_bool, of_heads
from clustax.clustering import Clusters, to_logit_space
from clustax.heads import map_heads
from clustax.topk import largest

Model = TypeVar("Model", bound=nnx.Module)
Out = TypeVar("Out")

SAMPLE = 256
CANDIDATES = tuple(
    settings(num_clusters=num_clusters, topk=topk)
    for settings, num_clusters, topk in itertools.product(
        (
            ClusteredAttention,
            partial(ClusteredAttention, num_subclusters=1),
            ClusteredAttention.paper,
        ),
        (25, 50, 100, 200, 400),
        (0, 16, 32, 64, 128),
    )
)
"""What :func:`recommend` tries, unless it is told what."""


class ApproximationError(NamedTuple):
    """How far an attention is from exact attention, over the sampled queries of a head.

    Where there is nothing to compare, there is no error.

    Attributes:
      relative: the L2 norm of the difference over that of exact attention.
      cosine: the mean over queries of the cosine between both; that of two zero vectors is 1.
      largest: the largest absolute difference of two numbers.
    """

    relative: Float[Array, "*B N"]
    cosine: Float[Array, "*B N"]
    largest: Float[Array, "*B N"]


class Occupancy(NamedTuple):
    """How the queries of a head are spread over its clusters.

    Attributes:
      empty: the number of clusters without queries.
      smallest, mean, largest: the number of queries of those clusters that have any.
      effective: the exponential of the entropy of the clusters' shares of the queries: as many
        clusters of one size would be as diverse. 0 where there are no queries.
    """

    empty: Int[Array, "*B N"]
    smallest: Int[Array, "*B N"]
    mean: Float[Array, "*B N"]
    largest: Int[Array, "*B N"]
    effective: Float[Array, "*B N"]


class KeptMass(NamedTuple):
    """The share of attention that falls on the top-k keys of the clusters.

    Attributes:
      at_centroids: :math:`m_j`, the share at the centroid, of each cluster; 0 for an empty one.
      at_queries: the true share of exact attention, of each sampled query; 0 for none.
      positions: which queries these are, in order; T for none, where there are fewer valid ones.
    """

    at_centroids: Float[Array, "*B N C"]
    at_queries: Float[Array, "*B N n"]
    positions: Int[Array, "*B n"]


class Bound(NamedTuple):
    """What is bounded, and by what, at each sampled query; 0 and 0 for none.

    Attributes:
      measured, bound: the two sides, measured <= bound but for rounding.
      positions: as in :class:`KeptMass`.
    """

    measured: Float[Array, "*B N n"]
    bound: Float[Array, "*B N n"]
    positions: Int[Array, "*B n"]


def approximation_error(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Array | None = None,
    *,
    attention: Callable[..., Array] | None = None,
    scale: float | Float[Array, ""] | None = None,
    sample: int = SAMPLE,
    rng: Array | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> ApproximationError:
    """Compares an attention with exact attention, at a sample of the queries.

    Exact attention is computed in at least float32 whatever the dtype, so that rounding counts.

    Args:
      query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths: as for
        :class:`clustax.ClusteredAttention`.
      attention: what is compared; ``ClusteredAttention()`` if None. It is called as
        ``attention(query, key, value, bias, mask)``, and with lengths where these are given.
      scale: factor of the logits in exact attention; if None that of ``attention``, where it is a
        ``ClusteredAttention``, or else 1 / sqrt(H).
      sample: n, how many queries of each batch entry are compared, at least 1.
      rng: a key to draw them with; ``jax.random.key(0)`` if None.

    Returns:
      The errors of each batch entry and head.

    Raises:
      ValueError: if an argument is not as above.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 512, 2, 16))  # N = 2
    >>> for topk in (0, 32, 512):
    ...     attention = ClusteredAttention(num_clusters=50, topk=topk)
    ...     error = approximation_error(query, key, value, attention=attention)
    ...     print(f"{float(error.relative.mean()):.2f}")
    0.65
    0.48
    0.00
    """
    attention = ClusteredAttention() if attention is None else attention
    if scale is None and isinstance(attention, ClusteredAttention):
        scale = attention.scale
    query = validation.floating("query", query, "*B T N H")
    positions = _draw(query, sample, rng, query_seq_lengths)
    dtype = jnp.result_type(query, key, value, jnp.float32)
    with jax.default_matmul_precision("highest"):
        exact = baselines.exact(
            _take(query, positions).astype(dtype),
            jnp.asarray(key, dtype),
            jnp.asarray(value, dtype),
            bias,
            as_bool(mask),
            scale=scale,
            key_value_seq_lengths=key_value_seq_lengths,
        )
    lengths: dict[str, Any] = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    given = {name: length for name, length in lengths.items() if length is not None}
    return _compare(attention(query, key, value, bias, mask, **given), exact, positions)


@jax.jit
def _compare(
    out: Float[Array, "*B T N V"],
    exact: Float[Array, "*B n N V"],
    positions: Int[Array, "*B n"],
) -> ApproximationError:
    found = positions < out.shape[-3]  # *B n
    out = _take(out, positions).astype(exact.dtype)
    exact = jnp.where(found[..., None, None], exact, 0)
    tiny = jnp.finfo(exact.dtype).tiny

    def norm(x, axis):
        return jnp.sqrt(jnp.sum(x**2, axis=axis))

    norms = norm(out, -1) * norm(exact, -1)  # *B n N
    cosine = jnp.sum(out * exact, axis=-1) / jnp.maximum(norms, tiny)
    cosine = jnp.where((out == 0).all(axis=-1) & (exact == 0).all(axis=-1), 1, cosine)
    queries = jnp.maximum(found.sum(axis=-1), 1)[..., None]  # *B 1
    difference = jnp.abs(out - exact)
    return ApproximationError(
        relative=norm(difference, (-3, -1)) / jnp.maximum(norm(exact, (-3, -1)), tiny),
        cosine=1 - jnp.sum(1 - cosine, axis=-2) / queries,
        largest=difference.max(axis=(-3, -1)),
    )


def attention_weights(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Array | None = None,
    *,
    attention: Callable[..., Array],
    **options: Any,
) -> Float[Array, "*B N T S"]:
    """The matrix that an attention stands for, row by row what it gives each key: T×S, to look at.

    It is what the attention makes of values that are the identity.

    Args:
      query, key, bias, mask: as for :class:`clustax.ClusteredAttention`.
      attention: called as ``attention(query, key, value, bias, mask, **options)``: a
        ``ClusteredAttention``, a rival of ``clustax.baselines``, or a
        ``partial(clustax.attend, clusters=clusters, topk=32)`` with clusters that are there.
      **options: lengths, clusters, or what else it takes.

    Returns:
      The weights, of at least float32.

    >>> query, key = jax.random.normal(jax.random.key(0), (2, 9, 1, 4))  # T = S = 9, N = 1
    >>> weights = attention_weights(query, key, attention=ClusteredAttention(num_clusters=3))
    >>> weights.shape, bool(jnp.allclose(weights.sum(axis=-1), 1))
    ((1, 9, 9), True)
    """
    dtype = jnp.result_type(query, key, jnp.float32)
    query, key = jnp.asarray(query, dtype), jnp.asarray(key, dtype)
    identity = jnp.eye(key.shape[-3], dtype=dtype)[:, None]  # S 1 S
    identity = jnp.broadcast_to(identity, (*key.shape[:-1], key.shape[-3]))
    return jnp.swapaxes(attention(query, key, identity, bias, mask, **options), -3, -2)


@jax.jit
def occupancy(clusters: Clusters) -> Occupancy:
    """Says how queries are spread over clusters.

    Args:
      clusters: of any queries.

    Returns:
      The figures of each batch entry and head.

    >>> counts = jnp.array([[4, 0, 4, 0]])  # N = 1, C = 4
    >>> occupancy(Clusters(jnp.array([[0, 0, 0, 0, 2, 2, 2, 2]]), counts)).effective
    Array([2.], dtype=float32)
    """
    counts = clusters.counts
    some, total = counts > 0, counts.sum(axis=-1)
    share = counts / jnp.maximum(total, 1)[..., None]
    entropy = -jnp.sum(jnp.where(some, share * jnp.log(jnp.where(some, share, 1)), 0), axis=-1)
    largest = counts.max(axis=-1)
    return Occupancy(
        empty=(~some).sum(axis=-1),
        smallest=jnp.where(some, counts, largest[..., None]).min(axis=-1),
        mean=total / jnp.maximum(some.sum(axis=-1), 1),
        largest=largest,
        effective=jnp.where(total > 0, jnp.exp(entropy), 0),
    )


def inertia(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"] | None = None,
    *,
    clusters: Clusters,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
) -> Float[Array, "*B N"]:
    """The mean squared distance of queries to the centroids of their clusters.

    With ``key`` the distance is that between logits before scaling, a mean over keys: what
    :func:`clustax.cluster_queries` minimises when it is given ``key``.

    Args:
      query, key, query_seq_lengths, key_value_seq_lengths, mask: as there.
      clusters: the clusters of these queries.

    Returns:
      The inertia of each batch entry and head; 0 where there are no queries.

    Raises:
      ValueError: if an argument is not as above.

    >>> query = jnp.array([1.0, 3.0, 8.0]).reshape(3, 1, 1)  # T = 3, N = 1, H = 1
    >>> inertia(query, clusters=Clusters(jnp.array([[0, 0, 1]]), jnp.array([[2, 1]])))
    Array([0.6666667], dtype=float32)
    """
    keys = query if key is None else key
    query, keys, _, _, mask, query_seq_lengths, key_value_seq_lengths = checked_arrays(
        query, keys, keys, None, mask, query_seq_lengths, key_value_seq_lengths
    )
    clusters = Clusters(*validation.clusters(clusters, query))
    if key is not None:
        valid = masks.valid_keys(mask, None, key_value_seq_lengths, keys.shape[-3])
        query = to_logit_space(query, keys, query_seq_lengths, valid)
    return _inertia(query, query_seq_lengths, clusters)


@jax.jit
def _inertia(
    query: Float[Array, "*B T N H"], query_seq_lengths: Int[Array, "*B"] | None, clusters: Clusters
) -> Float[Array, "*B N"]:
    query = query.astype(jnp.promote_types(query.dtype, jnp.float32))
    each = canonical(query, query, query, None, None, query_seq_lengths, None, clusters)

    def head(query, assignment, counts):
        centroids, _ = _centroids(query, assignment, counts)
        centroid = centroids[assignment, 0]  # T H
        in_cluster = (assignment < len(counts))[:, None]
        difference = jnp.where(in_cluster, query - centroid, 0)
        return jnp.sum(difference**2) / jnp.maximum(counts.sum(), 1)

    length, head_dim = query.shape[-3], query.shape[-1]
    queries = jnp.swapaxes(each.query, 1, 2)
    out = map_heads(head, queries, each.assignment, each.counts, head_bytes=8 * length * head_dim)
    return out.reshape(*query.shape[:-3], query.shape[-2])


def kept_mass(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    clusters: Clusters,
    topk: int = 32,
    num_subclusters: int = 1,
    scale: float | Float[Array, ""] | None = None,
    sample: int = SAMPLE,
    rng: Array | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> KeptMass:
    """How much of attention falls on the top-k keys: at the centroids, and at a sample of queries.

    With ``merge="mass"`` a query gets the share of its centroid in place of its own, so the two
    should agree; where both are small, k is.

    Args:
      query, key, bias, mask, clusters, topk, num_subclusters, scale, query_seq_lengths,
        key_value_seq_lengths: as for :func:`clustax.attend`.
      sample, rng: as for :func:`approximation_error`.

    Returns:
      The masses of all clusters, and of the sampled queries.

    Raises:
      ValueError: if an argument is not as above.

    Source: paper, section 3.3.

    >>> query, key = jax.random.normal(jax.random.key(0), (2, 512, 2, 16))  # N = 2
    >>> clusters = ClusteredAttention(num_clusters=50).cluster(query, key)
    >>> mass = kept_mass(query, key, clusters=clusters)
    >>> mass.at_centroids.shape, mass.at_queries.shape
    ((2, 50), (2, 256))
    """
    lengths = (query_seq_lengths, key_value_seq_lengths)
    arguments = (query, key, bias, mask, *lengths, clusters, scale, sample, rng)
    sizes = {"topk": topk, "num_subclusters": num_subclusters}
    return KeptMass(*_at_sample(_kept_mass, *arguments, **sizes))


def distance_bound(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    clusters: Clusters,
    scale: float | Float[Array, ""] | None = None,
    sample: int = SAMPLE,
    rng: Array | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> Bound:
    r"""Both sides of the paper's first proposition: queries near their centroid attend like it.

    .. math:: \|\mathrm{softmax}(s\, Q_i K^T + b) - \mathrm{softmax}(s\, Q^c_j K^T + b)\|_2 \le
       \tfrac12\, |s|\, \|Q_i - Q^c_j\|_2\, \|K - \bar K\|_2

    with the spectral norm of the keys that count. The paper has 1 for ½, which is the largest
    spectral norm that the Jacobian of softmax can have, and keys that are not centred, which
    softmax cannot tell from those that are.

    Args:
      query, key, bias, mask, clusters, scale, query_seq_lengths, key_value_seq_lengths: as for
        :func:`clustax.attend`.
      sample, rng: as for :func:`approximation_error`.

    Returns:
      Both sides at the sampled queries.

    Raises:
      ValueError: if an argument is not as above.

    Source: paper, proposition 1.

    >>> query, key = jax.random.normal(jax.random.key(0), (2, 512, 2, 16))  # N = 2
    >>> clusters = ClusteredAttention(num_clusters=50).cluster(query, key)
    >>> measured, bound, _ = distance_bound(query, key, clusters=clusters)
    >>> bool((measured <= bound + 1e-5).all())
    True
    """
    lengths = (query_seq_lengths, key_value_seq_lengths)
    arguments = (query, key, bias, mask, *lengths, clusters, scale, sample, rng)
    return Bound(*_at_sample(_distance_bound, *arguments, topk=0))


def improvement_bound(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    clusters: Clusters,
    topk: int = 32,
    scale: float | Float[Array, ""] | None = None,
    sample: int = SAMPLE,
    rng: Array | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> Bound:
    r"""Both sides of the paper's second proposition: exact weights for some keys never harm.

    .. math:: \|A^t_i - A_i\|_1 \le \|A^c_j - A_i\|_1

    where :math:`A` is exact attention, :math:`A^c` clustered attention, and :math:`A^t` improved
    clustered attention with ``merge="mass"``. It holds in the L1 norm only.

    Args:
      query, key, bias, mask, clusters, topk, scale, query_seq_lengths, key_value_seq_lengths: as
        for :func:`clustax.attend`.
      sample, rng: as for :func:`approximation_error`.

    Returns:
      Both sides at the sampled queries.

    Raises:
      ValueError: if an argument is not as above.

    Source: paper, proposition 2.

    >>> query, key = jax.random.normal(jax.random.key(0), (2, 512, 2, 16))  # N = 2
    >>> clusters = ClusteredAttention(num_clusters=50).cluster(query, key)
    >>> measured, bound, _ = improvement_bound(query, key, clusters=clusters)
    >>> bool((measured <= bound + 1e-5).all())
    True
    """
    lengths = (query_seq_lengths, key_value_seq_lengths)
    arguments = (query, key, bias, mask, *lengths, clusters, scale, sample, rng)
    return Bound(*_at_sample(_improvement_bound, *arguments, topk=topk))


class _Head(NamedTuple):
    """One head: its sampled queries with their clusters, all centroids, the keys.

    Empty slots of the sample hold zeros, of cluster C.
    """

    query: Float[Array, "n H"]
    cluster: Int[Array, " n"]
    centroids: Float[Array, "C R H"]
    subclusters: xla.Subclusters
    keys: xla.Keys
    scale: float | Float[Array, ""]
    topk: int

    @property
    def found(self) -> Bool[Array, " n"]:
        """Which slots hold a query."""
        return self.cluster < len(self.centroids)

    def logits(self, query: Float[Array, "*m H"]) -> Float[Array, "*m S"]:
        return xla.attention_logits(query, self.keys, self.scale)

    def weights(self, query: Float[Array, "*m H"]) -> Float[Array, "*m S"]:
        """Exact attention; zeros where there are no keys."""
        return self.softmax(jnp.ones(len(self.keys.key), bool), self.logits(query))

    def top(self) -> Bool[Array, "C S"]:
        """Which keys are the top-k ones of each cluster, as ``clustax.attend`` chooses them."""
        ranks = xla.rank_keys(self.logits(self.centroids), self.subclusters.share)
        return ~xla.outside(largest(ranks, self.topk), ranks.shape[1])

    def clustered(self) -> Float[Array, "C S"]:
        """Clustered attention: the mean of exact attention at the centroids of a cluster."""
        return jnp.sum(self.subclusters.share[..., None] * self.weights(self.centroids), axis=1)

    def softmax(
        self, where: Bool[Array, "... S"], logits: Float[Array, "*m S"]
    ) -> Float[Array, "*m S"]:
        """Softmax over those of the keys ``where`` that count."""
        where = where if self.keys.valid is None else where & self.keys.valid
        some = where.any(axis=-1, keepdims=True)
        return jnp.where(some, jax.nn.softmax(logits, axis=-1, where=where | ~some), 0)


def _kept_mass(head: _Head) -> tuple[Array, Array]:
    top = head.top()
    at_centroids = jnp.sum(head.clustered(), axis=-1, where=top)
    at_queries = jnp.sum(head.weights(head.query), axis=-1, where=top[head.cluster])
    return at_centroids, jnp.where(head.found, at_queries, 0)


def _distance_bound(head: _Head) -> tuple[Array, Array]:
    key, valid = head.keys.key, head.keys.valid
    valid = jnp.ones(len(key), bool) if valid is None else valid
    centred = key - jnp.mean(key, axis=0, where=valid[:, None], keepdims=True)
    centred = jnp.where(valid[:, None], centred, 0)
    # The square of the spectral norm is the largest eigenvalue of an H×H matrix.
    square = jnp.linalg.eigvalsh(centred.T @ centred)[-1]
    centroid = head.centroids[head.cluster, 0]
    distance = jnp.linalg.norm(head.query - centroid, axis=-1)
    bound = 0.5 * jnp.abs(head.scale) * distance * jnp.sqrt(jnp.maximum(square, 0))
    measured = jnp.linalg.norm(head.weights(head.query) - head.weights(centroid), axis=-1)
    return jnp.where(head.found, measured, 0), jnp.where(head.found, bound, 0)


def _improvement_bound(head: _Head) -> tuple[Array, Array]:
    top = head.top()[head.cluster]  # n S
    exact, clustered = head.weights(head.query), head.clustered()[head.cluster]
    mass = jnp.sum(clustered, axis=-1, keepdims=True, where=top)
    improved = jnp.where(top, mass * head.softmax(top, head.logits(head.query)), clustered)

    def distance(weights):
        return jnp.where(head.found, jnp.abs(weights - exact).sum(axis=-1), 0)

    return distance(improved), distance(clustered)


def _at_sample(
    figure: Callable[[_Head], tuple[Array, Array]],
    query: Any,
    key: Any,
    bias: Any,
    mask: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    clusters: Any,
    scale: Any,
    sample: int,
    rng: Any,
    *,
    topk: int,
    num_subclusters: int = 1,
) -> tuple[Array, Array, Int[Array, "*B n"]]:
    """Checks the arguments, finds the figure of each head, and says at which queries."""
    validation.at_least("topk", topk, 0)
    validation.at_least("num_subclusters", num_subclusters, 1)
    if scale is not None:
        validation.scalar("scale", scale)
    query, key, _, *others = checked_arrays(
        query, key, key, bias, mask, query_seq_lengths, key_value_seq_lengths
    )
    clusters = Clusters(*validation.clusters(clusters, query))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sizes = (min(topk, key.shape[-3]), num_subclusters)
    positions = _draw(query, sample, rng, query_seq_lengths)
    with jax.default_matmul_precision("highest"):
        return *_figure(figure, query, key, *others, clusters, scale, positions, *sizes), positions


@partial(jax.jit, static_argnames=("figure", "topk", "num_subclusters"))
def _figure(
    figure: Callable[[_Head], tuple[Array, Array]],
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    bias: Float[Array, "*#B #N 1 S"] | None,
    mask: Bool[Array, "*#B #N 1 S"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    key_value_seq_lengths: Int[Array, "*B"] | None,
    clusters: Clusters,
    scale: float | Float[Array, ""],
    positions: Int[Array, "*B n"],
    topk: int,
    num_subclusters: int,
) -> tuple[Array, Array]:
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query, key = query.astype(dtype), key.astype(dtype)
    lengths = (query_seq_lengths, key_value_seq_lengths)
    each = canonical(query, key, key, bias, mask, *lengths, clusters)
    *batch, _, num_heads, _ = query.shape
    num_keys, num_clusters = key.shape[-3], each.counts.shape[-1]
    key = jnp.swapaxes(each.key, 1, 2)
    key = jnp.repeat(key, num_heads // key.shape[1], axis=1)  # B N S H
    positions = positions.reshape(-1, positions.shape[-1])  # B n
    bias = xla.raise_bias(each.bias)

    def head(scale, query, key, bias, valid, assignment, counts, positions):
        return figure(
            _Head(
                query.at[positions].get(mode="fill", fill_value=0),
                assignment.at[positions].get(mode="fill", fill_value=num_clusters),
                *_centroids(query, assignment, counts, num_subclusters),
                xla.Keys(key, key, bias, valid),
                scale,
                topk,
            )
        )

    out = map_heads(
        head,
        jnp.swapaxes(each.query, 1, 2),
        key,
        bias,
        each.valid,
        each.assignment,
        each.counts,
        jnp.repeat(positions[:, None], num_heads, axis=1),
        shared=(scale,),
        head_bytes=4 * (num_clusters * num_subclusters + positions.shape[-1]) * num_keys,
    )
    return jax.tree.map(lambda x: x.reshape(*batch, num_heads, -1), out)


def _centroids(
    query: Float[Array, "T H"],
    assignment: Int[Array, " T"],
    counts: Int[Array, " C"],
    num_subclusters: int = 1,
) -> tuple[Float[Array, "C R H"], xla.Subclusters]:
    tiles = xla.tile_queries(assignment, counts)
    subclusters = xla.split_clusters(tiles, counts, num_subclusters)
    return xla.pool(xla.fill_tiles(query, tiles), tiles, subclusters), subclusters


def _draw(
    query: Float[Array, "*B T N H"],
    sample: int,
    rng: Array | None,
    query_seq_lengths: Int[Array, "*B"] | None,
) -> Int[Array, "*B n"]:
    """Positions of valid queries, in order; T in place of those that there are not."""
    validation.at_least("sample", sample, 1)
    rng = validation.rng_key("rng", rng)
    *batch, length = query.shape[:-2]
    lengths = validation.lengths("query_seq_lengths", query_seq_lengths, tuple(batch))
    lengths = jnp.full(batch, length) if lengths is None else lengths
    return _draw_positions(rng, lengths, length, min(sample, length))


@partial(jax.jit, static_argnames=("length", "sample"))
def _draw_positions(
    rng: Array, lengths: Int[Array, "*B"], length: int, sample: int
) -> Int[Array, "*B n"]:
    valid = masks.valid_positions(lengths, length)
    # Without replacement: those of the largest random numbers.
    order = jnp.where(valid, jax.random.uniform(rng, valid.shape), -1)
    positions = jax.lax.top_k(order, sample)[1]
    valid = jnp.take_along_axis(valid, positions, axis=-1)
    return jnp.sort(jnp.where(valid, positions, length), axis=-1)


def _take(x: Float[Array, "*B T N D"], positions: Int[Array, "*B n"]) -> Float[Array, "*B n N D"]:
    """What is at the positions; zeros at T."""
    positions = positions[..., None, None]
    return jnp.take_along_axis(x, positions, axis=-3, mode="fill", fill_value=0)


def operations(
    attention: ClusteredAttention | None,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    value_dim: int,
) -> int:
    """Counts the multiply-adds of one head.

    They are, with R sub-clusters, L iterations, B bits in W words of 32, and sizes as in
    :func:`clustax.clustered_attention`:

    ======================  ====================================================
    exact                   T·S·(H + V); also where T <= C, or below ``exact_below``
    ``space="logit"``       (T + S)·H², for the covariance of keys and its factor
    ``metric="hamming"``    T·B·H for hashing, L·T·C·W + (L - 1)·T·B for K-means
    ``metric="euclidean"``  L·T·C·H + (L - 1)·T·H for K-means
    centroids               T·H, for the means; C·S·(R·H + V), for attention
    top-k keys              T·k·(H + V)
    ======================  ====================================================

    An exclusive or of words with its count of bits is taken for one. Exponentials, sorting and the
    movement of memory are left out, so this orders settings, and does not tell seconds.

    Args:
      attention: the settings; None for exact attention.
      num_queries, num_keys, head_dim, value_dim: T, S, H and V.

    Returns:
      The count.

    >>> sizes = (4096, 4096, 64, 64)
    >>> round(operations(None, *sizes) / operations(ClusteredAttention(), *sizes), 1)
    6.8
    """
    both_dims = head_dim + value_dim
    if (
        attention is None
        or num_queries <= attention.num_clusters
        or is_short(num_queries, attention.exact_below)
    ):
        return num_queries * num_keys * both_dims
    clusters, updates = attention.num_clusters, attention.num_iterations - 1
    if attention.metric == "hamming":
        words = -(-attention.num_bits // 32)
        per_query = attention.num_bits * (head_dim + updates)
        per_query += attention.num_iterations * clusters * words
    else:
        per_query = (attention.num_iterations * clusters + updates) * head_dim
    transformed = num_queries + num_keys if attention.space == "logit" else 0
    centroid_logits = clusters * attention.num_subclusters * num_keys * head_dim
    topk = min(attention.topk, num_keys)
    return (
        transformed * head_dim**2
        + num_queries * (per_query + head_dim + topk * both_dims)
        + centroid_logits
        + clusters * num_keys * value_dim
    )


class Tried(NamedTuple):
    """Settings that were tried.

    Attributes:
      attention: the settings.
      operations: what a head costs (:func:`operations`).
      error: what it loses.
    """

    attention: ClusteredAttention
    operations: int
    error: ApproximationError

    @property
    def mean_error(self) -> float:
        """The mean relative error of the batch entries and heads."""
        return float(self.error.relative.mean())


class Recommendation(NamedTuple):
    """The cheapest settings that meet a target.

    Attributes:
      attention: the settings.
      operations: what a head costs (:func:`operations`).
      exact_operations: what exact attention costs.
      error: what the settings lose, for each batch entry and head.
      tried: all that was tried, from the cheapest up to these settings.
    """

    attention: ClusteredAttention
    operations: int
    exact_operations: int
    error: ApproximationError
    tried: tuple[Tried, ...]

    @property
    def exact_is_cheaper(self) -> bool:
        """Whether exact attention costs no more: then use that."""
        return self.exact_operations <= self.operations


def recommend(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Array | None = None,
    *,
    target_error: float,
    candidates: Iterable[ClusteredAttention] = CANDIDATES,
    sample: int = SAMPLE,
    rng: Array | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> Recommendation:
    """Finds the cheapest settings whose error on these activations is small enough.

    Settings are tried one by one, from the cheapest, until one meets the target. Each is compiled,
    which takes seconds. This one is a Python loop: it cannot be used under ``jax.jit``.

    Args:
      query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths: as for
        :class:`clustax.ClusteredAttention`; of one layer of a model, for example.
      target_error: the largest relative error that will do, in the mean over batch entries and
        heads (:attr:`ApproximationError.relative`).
      candidates: the settings to choose from; :data:`CANDIDATES` vary C and k of the default, also
        without sub-clusters, and of the paper's settings.
      sample, rng: as for :func:`approximation_error`.

    Returns:
      The settings, their cost and error, and what else was tried.

    Raises:
      ValueError: if an argument is not as above, or if no candidate meets the target; the message
        names the one that comes nearest.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 512, 2, 16))  # N = 2
    >>> sizes = [ClusteredAttention(num_clusters=50, topk=topk) for topk in (0, 64, 256)]
    >>> found = recommend(query, key, value, target_error=0.5, candidates=sizes)
    >>> found.attention.topk, found.exact_is_cheaper
    (64, False)
    """
    if not target_error > 0:
        raise ValueError(f"target_error must be above 0, got {target_error}.")
    shapes = tuple(map(jnp.shape, (query, key, value)))
    validation.value_of_key(value, validation.query_key(query, key)[1])
    sizes = (shapes[0][-3], shapes[1][-3], shapes[0][-1], shapes[2][-1])
    tried: list[Tried] = []
    for attention in sorted(candidates, key=lambda attention: operations(attention, *sizes)):
        error = approximation_error(
            query,
            key,
            value,
            bias,
            mask,
            attention=attention,
            sample=sample,
            rng=rng,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        )
        tried.append(Tried(attention, operations(attention, *sizes), error))
        if tried[-1].mean_error <= target_error:
            cost = (tried[-1].operations, operations(None, *sizes))
            return Recommendation(attention, *cost, error, tuple(tried))
    if not tried:
        raise ValueError("candidates must be at least one ClusteredAttention, got none.")
    best = min(tried, key=lambda each: each.mean_error)
    raise ValueError(
        f"target_error={target_error} is met by none of the {len(tried)} candidates: the smallest "
        f"relative error is {best.mean_error:.3g}, of {best.attention}; raise the target, or pass "
        "candidates with more clusters or a larger topk."
    )


class LayerFigures(NamedTuple):
    """The figures of one call of attention in a model.

    Where the call is below ``exact_below`` there is no error but that of rounding, and the other
    figures are of the clusters that would be used above.

    Attributes:
      error: see :func:`approximation_error`.
      occupancy: see :func:`occupancy`.
      kept: see :func:`kept_mass`.
    """

    error: ApproximationError
    occupancy: Occupancy
    kept: KeptMass


def measure_layers(
    model: Model,
    run: Callable[[Model], Out],
    *,
    attention: ClusteredAttention | None = None,
    sample: int = SAMPLE,
    rng: Array | None = None,
) -> tuple[Out, list[LayerFigures | None]]:
    """Runs an NNX model and measures each call of its attention.

    What the model computes stays as it is: each of its attentions is watched, and measured on the
    queries, keys and values that it gets. So clustered attention can be measured in the model that
    runs with it, where the errors of the layers below have changed its inputs; or, as
    ``attention``, before it is swapped in, each layer on its own.

    It is a pure function: what it returns are the figures of this run, also under ``jax.jit`` or
    ``nnx.jit`` around it. Layers must not be transformed within (``nnx.scan``, ``nnx.remat``, a
    ``jit`` of their own), as figures could not leave the transform. Changes of the model's state
    in the run are dropped.

    Args:
      model: one of ``clustax.models``, or any with ``flax.nnx.MultiHeadAttention`` or other modules
        whose attention is called ``attention_fn``.
      run: called with a copy of the model; ``lambda model: model(x)``, for example.
      attention: what is measured, in all layers; if None what the model attends with itself.
      sample, rng: as for :func:`approximation_error`.

    Returns:
      What ``run`` returns, and the figures of all calls in their order: one a layer in most models.
      None stands for a call of an attention that is not a ``ClusteredAttention``.

    Raises:
      ValueError: if there is nothing to measure.
      NotImplementedError: if ``attention`` is to stand for causal attention.

    >>> from clustax.models import Encoder
    >>> encoder = Encoder(2, 32, 4, rngs=nnx.Rngs(0))  # 2 layers, with exact attention
    >>> encoder.eval()
    >>> hidden = jax.random.normal(jax.random.key(0), (1, 200, 32))
    >>> out, layers = measure_layers(
    ...     encoder, lambda model: model(hidden), attention=ClusteredAttention(num_clusters=50)
    ... )
    >>> jnp.stack([layer.error.relative for layer in layers]).shape  # layers, B, N
    (2, 1, 4)
    """
    figures: list[LayerFigures | None] = []

    def watched(attention_fn):
        return _Watched(attention_fn, attention or attention_fn, sample, rng, figures)

    other = nnx.merge(*nnx.split(model))
    modules: list[Any] = [module for _, module in nnx.iter_modules(other)]
    for module in modules:
        if "attention_fns" in vars(module):
            module.attention_fns = tuple(map(watched, module.attention_fns))
        elif "attention_fn" in vars(module):
            module.attention_fn = watched(module.attention_fn)
    out = run(other)
    if all(each is None for each in figures):
        raise ValueError(
            f"model must call a ClusteredAttention in this run, got {len(figures)} calls of other "
            "attentions; pass attention=ClusteredAttention(...) to measure that in their place."
        )
    return out, figures


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched:
    """An attention whose calls are measured."""

    attention_fn: Any  # what attends
    measured: Any  # what the figures are of
    sample: int
    rng: Array | None
    figures: list[LayerFigures | None]

    def cluster(self, *args: Any, **kwargs: Any) -> Clusters:
        """Finds clusters, where a layer asks for them."""
        return self.attention_fn.cluster(*args, **kwargs)

    def __call__(self, query, key, value, bias=None, mask=None, **options: Any) -> Array:
        self.figures.append(self._measure(query, key, value, bias, mask, options))
        return self.attention_fn(query, key, value, bias, mask, **options)

    def _measure(self, query, key, value, bias, mask, options) -> LayerFigures | None:
        if not isinstance(self.measured, ClusteredAttention):
            return None
        validation.not_causal(options.get("is_causal", False) and query.shape[-3] > 1)
        mask = as_bool(mask)
        names = ("query_seq_lengths", "key_value_seq_lengths")
        lengths: dict[str, Any] = {name: options.get(name) for name in names}
        # Clusters that the model shares are its own: another attention finds others.
        clusters = options.get("clusters") if self.measured is self.attention_fn else None
        if clusters is None:
            clusters = self.measured.cluster(query, key, mask, **lengths)
        clusters = of_heads(clusters, query.shape[-2])
        common: dict[str, Any] = {
            "scale": self.measured.scale,
            "sample": self.sample,
            "rng": self.rng,
            **lengths,
        }
        attend = partial(self.measured, clusters=clusters)
        return LayerFigures(
            approximation_error(query, key, value, bias, mask, attention=attend, **common),
            occupancy(clusters),
            kept_mass(
                query,
                key,
                bias,
                mask,
                clusters=clusters,
                topk=self.measured.topk,
                num_subclusters=self.measured.num_subclusters,
                **common,
            ),
        )
