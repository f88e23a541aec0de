"""How queries are spread over clusters, and how far they are from their centroids."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustax import masks, validation, xla
from clustax.attention import canonical, checked_arrays
from clustax.clustering import Clusters, to_logit_space
from clustax.heads import map_heads


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
    :func:`clustax.cluster_queries` minimises when it is given ``key`` and
    ``metric="euclidean"``.

    Args:
      query, key, query_seq_lengths, key_value_seq_lengths, mask: as there; the last two only with
        ``key``.
      clusters: the clusters of these queries.

    Returns:
      The inertia of each batch entry and head; 0 where there are no queries.

    Raises:
      ValueError: if an argument is not as above.

    >>> query = jnp.array([1.0, 3.0, 8.0]).reshape(3, 1, 1)  # T = 3, N = 1, H = 1
    >>> inertia(query, clusters=Clusters(jnp.array([[0, 0, 1]]), jnp.array([[2, 1]])))
    Array([0.6666667], dtype=float32)
    """
    if key is None:
        validation.no_keys(mask=mask, key_value_seq_lengths=key_value_seq_lengths)
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
        centroids, _ = centroids_of(query, assignment, counts)
        centroid = centroids[assignment, 0]  # T H
        in_cluster = (assignment < len(counts))[:, None]
        difference = jnp.where(in_cluster, query - centroid, 0)
        return jnp.sum(difference**2) / jnp.maximum(counts.sum(), 1)

    length, head_dim = query.shape[-3], query.shape[-1]
    queries = jnp.swapaxes(each.query, 1, 2)
    out = map_heads(head, queries, each.assignment, each.counts, head_bytes=8 * length * head_dim)
    return out.reshape(*query.shape[:-3], query.shape[-2])


def centroids_of(
    query: Float[Array, "T H"],
    assignment: Int[Array, " T"],
    counts: Int[Array, " C"],
    num_subclusters: int = 1,
) -> tuple[Float[Array, "C R H"], xla.Subclusters]:
    """The centroids of sub-clusters, and how many queries each has."""
    tiles = xla.tile_queries(assignment, counts)
    subclusters = xla.split_clusters(tiles, counts, num_subclusters)
    return xla.pool(xla.fill_tiles(query, tiles), tiles, subclusters), subclusters
