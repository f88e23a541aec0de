"""What settings cost, and which would do for given activations."""

import itertools
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clustax import validation
from clustax.attention import is_short
from clustax.attention_fn import ClusteredAttention, promoted
from clustax.diagnostics.errors import ApproximationError, approximation_error
from clustax.diagnostics.sample import SAMPLE

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
    8.2
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

    >>> import jax
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 512, 2, 16))  # N = 2
    >>> sizes = [ClusteredAttention(num_clusters=50, topk=topk) for topk in (0, 64, 256)]
    >>> found = recommend(query, key, value, target_error=0.5, candidates=sizes)
    >>> found.attention.topk, found.exact_is_cheaper
    (64, False)
    """
    if not target_error > 0:
        raise ValueError(f"target_error must be above 0, got {target_error}.")
    query, key, value = promoted(None, query, key, value)
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
