"""Clustered attention as a Flax Linen module."""

from functools import partial
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, Int

from clustax.attention_fn import ClusteredAttention
from clustax.clustering import Clusters


class ClusteredMultiHeadAttention(nn.MultiHeadDotProductAttention):
    """Multi-head attention with clustered attention between the projections.

    It is ``flax.linen.MultiHeadDotProductAttention`` with another attention: fields and parameters
    are the same, so that parameters of exact attention can be loaded, and the other way round.
    Padding is a mask of shape (*B, 1, 1, S), or lengths. Decoding, where there is one query, is
    exact.

    Attributes:
      attention_fn: the settings of the attention. The other attributes are those of
        ``flax.linen.MultiHeadDotProductAttention``.

    Source: paper, section 3; its experiments on GLUE and SQuAD load parameters of exact attention.

    >>> import jax
    >>> attention = ClusteredAttention(num_clusters=25)
    >>> layer = ClusteredMultiHeadAttention(num_heads=4, attention_fn=attention)
    >>> x = jax.random.normal(jax.random.key(0), (2, 256, 32))
    >>> variables = layer.init(jax.random.key(1), x)
    >>> clusters = layer.apply(variables, x, method="cluster")
    >>> layer.apply(variables, x, clusters=clusters).shape
    (2, 256, 32)
    """

    attention_fn: ClusteredAttention = ClusteredAttention()  # pyright: ignore[reportIncompatibleMethodOverride]

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
        found = []

        def attention_fn(query, key, value, mask=None):
            clusters = self.attention_fn.cluster(
                query,
                key,
                mask,
                query_seq_lengths=query_seq_lengths,
                key_value_seq_lengths=key_value_seq_lengths,
            )
            found.append(clusters)
            return query  # it has the right shape, and the outputs are not used

        settings = {"attention_fn": attention_fn, "decode": False, "dropout_rate": 0.0}
        self._call(settings, inputs_q, inputs_k, mask=mask)
        return found[0]

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
          **kwargs: the other arguments of ``flax.linen.MultiHeadDotProductAttention``: ``mask``,
            and so on.

        Returns:
          The outputs. Padded queries get the bias of the last projection.

        Raises:
          ValueError: if an argument is not as above.
          NotImplementedError: for dropout of attention weights, ``sow_weights``, other einsums.
        """
        attention_fn = partial(
            self.attention_fn,
            clusters=clusters,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        )
        return self._call({"attention_fn": attention_fn}, inputs_q, inputs_k, inputs_v, **kwargs)

    @nn.compact
    def _call(self, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Array:
        """Calls Flax's module, of the same parameters, with some settings replaced."""
        layer = self.clone(parent=self.scope, **settings)
        return nn.MultiHeadDotProductAttention.__call__(layer, *args, **kwargs)
