"""Clustered attention as a Flax NNX module."""

import copy
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.attention_fn import ClusteredAttention
from clustax.clustering import Clusters


class ClusteredMultiHeadAttention(nnx.MultiHeadAttention):
    """Multi-head attention with clustered attention between the projections.

    It is ``flax.nnx.MultiHeadAttention`` with another attention: arguments and parameters are the
    same, so that parameters of exact attention can be loaded, and the other way round. Padding is a
    mask of shape (*B, 1, 1, S), or lengths. Decoding, where there is one query, is exact.

    Args:
      *args, **kwargs: those of ``flax.nnx.MultiHeadAttention``, without ``attention_fn``.
      attention: the settings of the attention; ``ClusteredAttention()`` if None. The module keeps
        them as ``attention_fn``, where they can be replaced.

    Source: paper, section 3; its experiments on GLUE and SQuAD load parameters of exact attention.

    >>> import jax
    >>> layer = ClusteredMultiHeadAttention(
    ...     num_heads=4,
    ...     in_features=32,
    ...     attention=ClusteredAttention(num_clusters=25),
    ...     decode=False,
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> x = jax.random.normal(jax.random.key(0), (2, 256, 32))
    >>> clusters = layer.cluster(x)
    >>> layer(layer(x, clusters=clusters), clusters=clusters).shape  # two layers share clusters
    (2, 256, 32)
    """

    attention_fn: ClusteredAttention

    def __init__(self, *args: Any, attention: ClusteredAttention | None = None, **kwargs: Any):
        super().__init__(*args, attention_fn=attention or ClusteredAttention(), **kwargs)

    def cluster(
        self,
        inputs_q: Float[Array, "*B T in"],
        inputs_k: Float[Array, "*B S kv"] | None = None,
        *,
        mask: Array | None = None,
        query_seq_lengths: Int[Array, "*B"] | None = None,
        key_value_seq_lengths: Int[Array, "*B"] | None = None,
    ) -> Clusters:
        """Finds the clusters that a call with these arguments uses, for this layer or others.

        Args:
          inputs_q, inputs_k, mask, query_seq_lengths, key_value_seq_lengths: as for
            :meth:`__call__`.

        Returns:
          The clusters, as int32, of each head of this layer.

        Raises:
          ValueError: if an argument is not as there.
        """
        query = self.query(inputs_q)
        key = self.key(inputs_q if inputs_k is None else inputs_k)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        return self.attention_fn.cluster(
            query,
            key,
            mask,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        )

    def __call__(
        self,
        inputs_q: Float[Array, "*B T in"],
        inputs_k: Float[Array, "*B S kv"] | None = None,
        inputs_v: Float[Array, "*B S kv"] | None = None,
        *,
        clusters: Clusters | None = None,
        query_seq_lengths: Int[Array, "*B"] | None = None,
        key_value_seq_lengths: Int[Array, "*B"] | None = None,
        **kwargs: Any,
    ) -> Float[Array, "*B T out"]:
        """Projects, attends, and projects back.

        Args:
          inputs_q: what queries are projected from.
          inputs_k: what keys are projected from; ``inputs_q`` if None.
          inputs_v: what values are projected from; ``inputs_k`` if None.
          clusters: clusters of the queries, from :meth:`cluster` or
            :func:`clustax.cluster_queries`, of all heads or fewer (see
            :class:`clustax.ClusteredAttention`); found if None.
          query_seq_lengths: number of valid queries of each batch entry; the rest is padding. All
            if None.
          key_value_seq_lengths: the same for keys and values.
          **kwargs: the other arguments of ``flax.nnx.MultiHeadAttention``: ``mask``, ``decode``,
            and so on.

        Returns:
          The outputs. Padded queries get the bias of the last projection.

        Raises:
          ValueError: if an argument is not as above.
          NotImplementedError: for causal attention, dropout of attention weights, ``sow_weights``.
        """
        # A shallow copy has the same Variables. It is changed past setattr, which Flax forbids
        # where a transform has closed over the layer.
        layer = copy.copy(self)
        vars(layer)["attention_fn"] = partial(
            self.attention_fn,
            clusters=clusters,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        )
        return nnx.MultiHeadAttention.__call__(layer, inputs_q, inputs_k, inputs_v, **kwargs)
