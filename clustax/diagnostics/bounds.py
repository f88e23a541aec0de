"""What the top-k keys hold of attention, and the paper's bounds, at a sample of the queries."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustax import validation, xla
from clustax.attention import canonical, checked_arrays
from clustax.clustering import Clusters
from clustax.diagnostics.clusters import centroids_of
from clustax.diagnostics.sample import SAMPLE, draw
from clustax.heads import map_heads
from clustax.topk import largest


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

    >>> from clustax import ClusteredAttention
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

    >>> from clustax import ClusteredAttention
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

    >>> from clustax import ClusteredAttention
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
    positions = draw(query, sample, rng, query_seq_lengths)
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
                *centroids_of(query, assignment, counts, num_subclusters),
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
