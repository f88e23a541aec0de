"""Clustered attention, as users call it: arguments are checked, made canonical, attended to."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustax import implementations, masks, reference, validation, xla
from clustax.clustering import METRICS, Clusters, cluster_queries

MERGES = ("mass", "lse")
SPACES = ("query", "logit")
CHOICES = {"merge": MERGES, "metric": METRICS, "space": SPACES}
LOWEST = {
    "num_clusters": 1,
    "topk": 0,
    "num_subclusters": 1,
    "num_bits": 1,
    "num_iterations": 1,
    "exact_below": 1,
}


def _attend_pallas(*args, **settings):
    from clustax.kernels import attend  # only now: Pallas takes longer to import than clustax

    return attend.attend(*args, **settings)


_ATTEND = {"xla": xla.attend, "pallas": _attend_pallas, "reference": reference.attend}


def attend(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    clusters: Clusters,
    topk: int = 32,
    merge: str = "mass",
    num_subclusters: int = 1,
    scale: float | Float[Array, ""] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Attention of queries that are grouped into clusters: (improved) clustered attention.

    The centroid of cluster j is the mean :math:`Q^c_j` of its queries, with the attention weights
    :math:`A^c_j = \mathrm{softmax}(s\, Q^c_j K^T + b)`. A query i of the cluster takes these
    weights for all keys but the k of them, :math:`T_j`, where :math:`A^c_j` is largest. For those
    its own logits :math:`s_{il} = s\, Q_i \cdot K_l + b_l` are computed:

    .. math:: V_i = w_i \sum_{l \in T_j} \mathrm{softmax}_{T_j}(s_i)_l \, V_l
                  + (1 - w_i) \sum_{l \notin T_j} \mathrm{softmax}_{\bar T_j}(s\, Q^c_j K^T + b)_l
                  \, V_l

    where :math:`w_i` is the mass of the top-k keys: that which they have at the centroid,
    :math:`\sum_{l \in T_j} A^c_{jl}`, with ``merge="mass"`` (the paper's improved clustered
    attention), or each query's own, from the log-sum-exp of its exact logits against that of the
    centroid's other logits, with ``merge="lse"``. ``topk=0`` is the paper's plain clustered
    attention; ``topk=S``, or one query a cluster, is exact attention. The cost is O(T · max(C, k) ·
    max(H, V)).

    A centroid says little about keys that matter to a few of its queries only. With
    ``num_subclusters=R`` the members of each cluster are cut, in the order of the sequence, into R
    runs of about equal size, each with a centroid of its own. The weights :math:`A^c_j` by which
    keys are chosen are then the mean of the softmax at these R centroids, and so are the weights
    of the tail; the split :math:`w_i` is that of the query's own run. It costs R times as many
    logits at centroids, and their exponentials.

    Everything but ``clusters`` is differentiable. Products are accumulated and the softmax is taken
    in at least float32. A key that is masked, padding, or biased by -inf has no influence on
    outputs or gradients, whatever it and its value hold. Padded queries, and queries without keys,
    get zeros.

    Args:
      query: queries: batch axes, length T, N heads, head dim H; of any floating dtype.
      key: keys of the same dtype: length S, K heads. Each of them serves N / K consecutive query
        heads.
      value: values of the same dtype: value dim V.
      bias: what is added to the logits of a key, the same for all queries.
      mask: True for the keys to attend to, the same for all queries.
      clusters: the clusters of these queries, from :func:`clustax.cluster_queries`.
      topk: k, the number of keys with exact logits, at least 0. It is clamped to S.
      merge: "mass" or "lse".
      num_subclusters: R, the number of sub-clusters that choose the keys of a cluster, at least 1;
        with 1, the cluster itself.
      scale: factor s of the logits; 1 / sqrt(H) if None.
      query_seq_lengths: number of valid queries of each batch entry; the rest is padding. All if
        None.
      key_value_seq_lengths: the same for keys and values.
      implementation: "xla", "pallas", "reference", several of these to try in order, or None to let
        clustax choose; :func:`clustax.implementations.choose` says which one the device is for. If
        none but "pallas" is named and it cannot serve the call, the reason is raised.

    Returns:
      The attended values, in the dtype of ``query``.

    Raises:
      ValueError: if an argument is not as above.
      NotImplementedError: if ``implementation`` cannot serve the call.

    Source: paper, sections 3.2 and 3.3; ``merge="lse"`` and ``num_subclusters`` are clustax's own.

    >>> from clustax import cluster_queries
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 256, 2, 16))  # T N H
    >>> clusters = cluster_queries(query, num_clusters=16)
    >>> exact = jax.nn.dot_product_attention(query, key, value)
    >>> for topk in (0, 64, 256):
    ...     out = attend(query, key, value, clusters=clusters, topk=topk)
    ...     print(f"{float(jnp.abs(out - exact).max()):.2f}")
    0.69
    0.29
    0.00
    """
    arrays = checked_arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    check_settings(topk=topk, merge=merge, num_subclusters=num_subclusters, scale=scale)
    query, key, value = arrays[:3]
    clusters = Clusters(*validation.clusters(clusters, query))
    topk = min(topk, key.shape[-3])

    def unfit() -> str | None:
        from clustax.kernels.attend import refusal

        settings = {"topk": topk, "num_subclusters": num_subclusters}
        return refusal(query, value, clusters.counts, **settings)

    return _attend(
        *arrays,
        clusters,
        query.shape[-1] ** -0.5 if scale is None else scale,
        topk=topk,
        merge=merge,
        num_subclusters=num_subclusters,
        implementation=implementations.choose(implementation, unfit).name,
    )


def checked_arrays(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
) -> tuple[Any, ...]:
    """The arrays of a call, checked against each other."""
    query, key = validation.query_key(query, key)
    batch, num_keys = query.shape[:-3], key.shape[-3]
    return (
        query,
        key,
        validation.value_of_key(value, key),
        validation.of_keys("bias", bias, query, num_keys),
        validation.of_keys("mask", mask, query, num_keys),
        validation.lengths("query_seq_lengths", query_seq_lengths, batch),
        validation.lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
    )


def check_settings(
    *, scale: Any = None, exact_below: Any = None, implementation: Any = None, **others: Any
) -> None:
    """Checks settings, under the names that they have in :func:`clustered_attention`."""
    if scale is not None:
        validation.scalar("scale", scale)
    if exact_below is not None:
        others["exact_below"] = exact_below
    for name, value in others.items():
        if name in CHOICES:
            validation.choice(name, value, CHOICES[name])
        else:
            validation.at_least(name, value, LOWEST[name])
    implementations.names(implementation)


@partial(jax.jit, static_argnames=("topk", "merge", "num_subclusters", "implementation"))
def _attend(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None,
    mask: Bool[Array, "*#B #N 1 S"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    key_value_seq_lengths: Int[Array, "*B"] | None,
    clusters: Clusters,
    scale: float | Float[Array, ""],
    *,
    topk: int,
    merge: str,
    num_subclusters: int,
    implementation: str,
) -> Float[Array, "*B T N V"]:
    out = _ATTEND[implementation](
        *canonical(
            query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths, clusters
        ),
        topk=topk,
        merge=merge,
        num_subclusters=num_subclusters,
        scale=scale,
    )
    return out.reshape(*query.shape[:-1], value.shape[-1]).astype(query.dtype)


class CanonicalKeys(NamedTuple):
    """Keys and what belongs to them, with one batch axis.

    Bias and validity are None or of full shape. Keys, values and bias hold zeros where keys do not
    count.
    """

    key: Float[Array, "B S heads H"]
    value: Float[Array, "B S heads V"]
    bias: Float[Array, "B N S"] | None
    valid: Bool[Array, "B N S"] | None


class Canonical(NamedTuple):
    """Arguments as the implementations take them: padded queries are in no cluster."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S heads H"]
    value: Float[Array, "B S heads V"]
    bias: Float[Array, "B N S"] | None
    valid: Bool[Array, "B N S"] | None
    assignment: Int[Array, "B N T"]
    counts: Int[Array, "B N C"]


def canonical(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None,
    mask: Bool[Array, "*#B #N 1 S"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    key_value_seq_lengths: Int[Array, "*B"] | None,
    clusters: Clusters,
) -> Canonical:
    """Makes checked arguments canonical."""
    length, num_heads = query.shape[-3:-1]
    if query_seq_lengths is not None:
        clusters = _leave_out(clusters, masks.valid_positions(query_seq_lengths, length))
    clusters = Clusters(*(x.astype(jnp.int32) for x in clusters))
    return Canonical(
        query.reshape(-1, *query.shape[-3:]),
        *canonical_keys(key, value, bias, mask, key_value_seq_lengths, num_heads),
        clusters.assignment.reshape(-1, num_heads, length),
        clusters.counts.reshape(-1, *clusters.counts.shape[-2:]),
    )


def canonical_keys(
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None,
    mask: Bool[Array, "*#B #N 1 S"] | None,
    lengths: Int[Array, "*B"] | None,
    num_heads: int,
) -> CanonicalKeys:
    """Makes checked keys canonical, for this number of query heads."""
    *batch, num_keys, _, _ = key.shape
    valid = masks.valid_keys(mask, bias, lengths, num_keys)
    key, value = (masks.drop_keys(x, valid, num_heads) for x in (key, value))

    def of_heads(x):  # *B|1 N|1 S -> B N S
        if x is None:
            return None
        return jnp.broadcast_to(x, (*batch, num_heads, num_keys)).reshape(-1, num_heads, num_keys)

    if bias is not None:
        bias = bias[..., 0, :].astype(jnp.promote_types(bias.dtype, jnp.float32))
        bias = bias if valid is None else jnp.where(valid, bias, 0)
    key, value = (x.reshape(-1, *x.shape[-3:]) for x in (key, value))
    return CanonicalKeys(key, value, of_heads(bias), of_heads(valid))


def is_short(num_queries: int, exact_below: int | None) -> bool:
    """Whether so few queries take exact attention."""
    return exact_below is not None and num_queries < exact_below


@jax.jit
def attend_exactly(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None,
    mask: Bool[Array, "*#B #N 1 S"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    key_value_seq_lengths: Int[Array, "*B"] | None,
    scale: float | Float[Array, ""],
) -> Float[Array, "*B T N V"]:
    """Exact attention of checked arguments, by ``jax.nn.dot_product_attention``."""
    num_heads, value_dim = query.shape[-2], value.shape[-1]
    key, value, bias, valid = canonical_keys(
        key, value, bias, mask, key_value_seq_lengths, num_heads
    )
    width = max(query.shape[-1], value_dim)
    # On a CPU or a TPU jax.nn has no products of float16.
    dtype = jnp.float32 if query.dtype == jnp.float16 else query.dtype

    def widen(x):  # jax.nn has one dim for all three
        return jnp.pad(x.astype(dtype), [(0, 0)] * 3 + [(0, width - x.shape[-1])])

    def for_queries(x):
        return None if x is None else x[:, :, None]

    queries = masks.drop_queries(query, query_seq_lengths)
    out = jax.nn.dot_product_attention(
        widen(queries.reshape(-1, *query.shape[-3:])),
        widen(key),
        widen(value),
        for_queries(xla.raise_bias(bias)),
        for_queries(valid),
        scale=cast(float, scale),  # a traced one serves as well
    )
    out = out[..., :value_dim].reshape(*query.shape[:-1], value_dim).astype(query.dtype)
    return masks.drop_queries(out, query_seq_lengths)


def _leave_out(clusters: Clusters, valid: Bool[Array, "*B T"]) -> Clusters:
    """Clusters without the queries that are not valid."""
    num_clusters = clusters.counts.shape[-1]
    assignment = jnp.where(valid[..., None, :], clusters.assignment, num_clusters)
    count = partial(jnp.bincount, length=num_clusters)  # what is assigned to C falls out
    counts = jnp.vectorize(count, signature="(t)->(c)")(assignment)
    return Clusters(assignment, counts)


def clustered_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    num_clusters: int = 100,
    topk: int = 32,
    merge: str = "mass",
    num_subclusters: int = 1,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
    num_bits: int = 64,
    num_iterations: int = 10,
    metric: str = "hamming",
    space: str = "query",
    rng: Array | None = None,
    exact_below: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Approximates softmax attention in time and memory linear in T and S.

    Groups the queries of each head into clusters (:func:`clustax.cluster_queries`), then attends by
    cluster (:func:`clustax.attend`). The arguments of ``jax.nn.dot_product_attention`` have their
    names here, so that one can stand in for the other. Where T <= C every query is a cluster of its
    own, and the result exact.

    Args:
      query: queries: batch axes, length T, N heads, head dim H; of any floating dtype.
      key: keys of the same dtype: length S, K heads. Each of them serves N / K consecutive query
        heads.
      value: values of the same dtype: value dim V.
      bias: what is added to the logits of a key, the same for all queries.
      mask: True for the keys to attend to, the same for all queries.
      num_clusters: C, the number of clusters of each head, at least 1.
      topk: k, the number of keys with exact logits, at least 0; 0 is plain clustered attention.
      merge: "mass" or "lse"; see :func:`clustax.attend`.
      num_subclusters: R, the number of sub-clusters that choose the keys of a cluster, at least 1;
        see :func:`clustax.attend`.
      scale: factor of the logits; 1 / sqrt(H) if None.
      is_causal: must be False: centroids and top-k keys mix in later positions.
      query_seq_lengths: number of valid queries of each batch entry; the rest is padding. All if
        None.
      key_value_seq_lengths: the same for keys and values.
      num_bits: bits in a hash code, at least 1. Only with ``metric="hamming"``.
      num_iterations: number of assignments in K-means, at least 1.
      metric: "hamming" (the paper's) or "euclidean".
      space: what distances between queries are: those between the queries (the paper's, "query"),
        or those between their logits ("logit"), which costs O((T + S) H²) more.
      rng: a key for hash planes and starting centroids; ``jax.random.key(0)`` if None.
      exact_below: exact attention is computed instead, and no clusters, where T is below this:
        short sequences take less time so. It is a switch by shape, at least 1, and looks at no
        lengths. What is supported stays the same. Never if None.
      implementation: see :func:`clustax.attend`. Exact attention has one only, whatever is named.

    Returns:
      The attended values, in the dtype of ``query``.

    Raises:
      ValueError: if an argument is not as above.
      NotImplementedError: if ``is_causal``, or if ``implementation`` cannot serve the call.

    Source: paper, section 3.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))  # B = 2, N = 4
    >>> out = jax.jit(clustered_attention)(query, key, value)
    >>> out.shape
    (2, 512, 4, 16)
    >>> out = clustered_attention(query, key, value, exact_below=1024)
    >>> bool(jnp.allclose(out, jax.nn.dot_product_attention(query, key, value), atol=1e-5))
    True
    """
    validation.not_causal(is_causal)
    check_settings(
        num_clusters=num_clusters,
        topk=topk,
        merge=merge,
        num_subclusters=num_subclusters,
        scale=scale,
        num_bits=num_bits,
        num_iterations=num_iterations,
        metric=metric,
        space=space,
        exact_below=exact_below,
        implementation=implementation,
    )
    rng = validation.rng_key("rng", rng)
    arrays = checked_arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    query, key, value, bias, mask, *_ = arrays
    if is_short(query.shape[-3], exact_below):
        return attend_exactly(*arrays, query.shape[-1] ** -0.5 if scale is None else scale)
    about_keys: dict[str, Any] = {}
    if space == "logit":
        about_keys = {
            "key": key,
            "mask": masks.without_biased_out(mask, bias),
            "key_value_seq_lengths": key_value_seq_lengths,
        }
    clusters = cluster_queries(
        query,
        num_clusters=num_clusters,
        num_bits=num_bits,
        num_iterations=num_iterations,
        metric=metric,
        rng=rng,
        query_seq_lengths=query_seq_lengths,
        implementation=implementation,
        **about_keys,
    )
    # Where each query is a cluster its centroid has the exact weights of all keys already.
    alone = query.shape[-3] <= num_clusters
    return attend(
        query,
        key,
        value,
        bias,
        clusters=clusters,
        topk=0 if alone else topk,
        merge=merge,
        num_subclusters=1 if alone else num_subclusters,
        scale=scale,
        key_value_seq_lengths=key_value_seq_lengths,
        mask=mask,
        implementation=implementation,
    )
