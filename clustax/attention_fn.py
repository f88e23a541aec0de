"""Clustered attention as one object that holds its settings: the ``attention_fn`` of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clustax import implementations, validation
from clustax.attention import MERGES, SPACES, clustered_attention
from clustax.clustering import METRICS


@dataclasses.dataclass(frozen=True)
class ClusteredAttention:
    """Clustered attention with fixed settings, to be called where a model calls its attention.

    It can stand for ``jax.nn.dot_product_attention``, and be the ``attention_fn`` of
    ``flax.nnx.MultiHeadAttention`` and ``flax.linen.MultiHeadDotProductAttention``. Objects of
    equal settings are equal and have equal hashes, so they share compiled programs.

    Attributes:
      num_clusters, topk, merge, scale, num_bits, num_iterations, metric, space, implementation: as
        in :func:`clustax.clustered_attention`; a sequence of implementations is a tuple.
      seed: what hash planes and starting centroids are drawn from, the same ones at every call.

    Raises:
      ValueError: if a setting is not as there.

    >>> attention = ClusteredAttention(num_clusters=25)
    >>> attention == ClusteredAttention(num_clusters=25)
    True
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))
    >>> attention(query, key, value, key_value_seq_lengths=jnp.array([512, 300])).shape
    (2, 512, 4, 16)
    """

    num_clusters: int = 100
    topk: int = 32
    merge: str = "mass"
    scale: float | None = None
    num_bits: int = 64
    num_iterations: int = 10
    metric: str = "hamming"
    space: str = "query"
    seed: int = 0
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for name, minimum in {
            "num_clusters": 1,
            "topk": 0,
            "num_bits": 1,
            "num_iterations": 1,
        }.items():
            validation.at_least(name, getattr(self, name), minimum)
        for name, choices in {"merge": MERGES, "metric": METRICS, "space": SPACES}.items():
            validation.choice(name, getattr(self, name), choices)
        implementations.choose(self.implementation)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K V"],
        bias: Float[Array, "*#B #N 1 S"] | None = None,
        mask: Array | None = None,
        *,
        query_seq_lengths: Int[Array, "*B"] | None = None,
        key_value_seq_lengths: Int[Array, "*B"] | None = None,
        is_causal: bool = False,
        dtype: jnp.dtype | None = None,
        deterministic: bool = True,
        dropout_rate: float = 0.0,
        dropout_rng: Array | None = None,
        broadcast_dropout: bool = True,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
    ) -> Float[Array, "*B T N V"]:
        """Attends, as :func:`clustax.clustered_attention` does.

        Args:
          query, key, value, bias, query_seq_lengths, key_value_seq_lengths: as there.
          mask: as there, or the same in another dtype, as Flax makes masks.
          is_causal: must be False, unless there is one query, as in decoding: its mask says what it
          sees.
          dtype: what query, key, and value are converted to first, if not None.
          deterministic, dropout_rate: dropout of attention weights is not supported: either
            ``deterministic`` or a rate of 0 is needed.
          dropout_rng, broadcast_dropout, force_fp32_for_softmax: without effect, as there is no
          dropout and the
            softmax is always in at least float32.
          precision, module, qk_attn_weights_einsum, attn_weights_value_einsum: must be None. They
          are what
            Flax passes to set the precision, to sow attention weights, and to quantise.

        Returns:
          The attended values, in the dtype of ``query`` (or ``dtype``).

        Raises:
          ValueError: if an argument is not as above.
          NotImplementedError: if a setting of Flax is not supported.
        """
        if dropout_rate > 0 and not deterministic:
            raise NotImplementedError(
                f"dropout_rate={dropout_rate} is not supported in clustered attention; build the "
                "module with dropout_rate=0, and drop out its output instead."
            )
        unsupported = {
            "precision": precision,
            "module": module,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        for name, given in unsupported.items():
            if given is not None:
                raise NotImplementedError(
                    f"{name} is not supported in clustered attention, got {given!r}; leave it at "
                    "None (for the precision of products use jax.default_matmul_precision)."
                )
        if dtype is not None:
            query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return clustered_attention(
            query,
            key,
            value,
            bias,
            None if mask is None else jnp.asarray(mask, bool),
            is_causal=is_causal and jnp.shape(query)[-3] > 1,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            rng=jax.random.key(settings.pop("seed")),
            **settings,
        )
