"""The rivals as objects that hold their settings: the ``attention_fn`` of a model."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from clustax import validation
from clustax.attention_fn import as_bool, matmul_precision, promoted, refuse_unsupported
from clustax.baselines import lsh, softmax

BOTH_DIRECTIONS = "the rivals attend in both directions; use jax.nn.dot_product_attention"


class Rival(abc.ABC):
    """What can be called where a model calls its attention, as ``clustax.ClusteredAttention``.

    It can stand for ``jax.nn.dot_product_attention``, and be the ``attention_fn`` of
    ``flax.nnx.MultiHeadAttention``, of ``flax.linen.MultiHeadDotProductAttention``, and of
    ``clustax.models``. Objects of equal settings are equal and have equal hashes.
    """

    @abc.abstractmethod
    def _attend(
        self, query: Array, key: Array, value: Array, bias: Any, mask: Any, **lengths: Any
    ) -> Array:
        """Attends with the settings of this object."""

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
        dtype: Any = None,
        precision: str | lax.Precision | None = None,
        deterministic: bool = True,
        dropout_rate: float = 0.0,
        dropout_rng: Array | None = None,
        broadcast_dropout: bool = True,
        force_fp32_for_softmax: bool = False,
        module: Any = None,
        input_positions: Array | None = None,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
    ) -> Float[Array, "*B T N V"]:
        """Attends; all arguments are those of :class:`clustax.ClusteredAttention`.

        Returns:
          The attended values, in the dtype that is asked for.

        Raises:
          ValueError: if an argument is not as there.
          NotImplementedError: if a setting of Flax is not supported.
        """
        validation.not_causal(is_causal and jnp.shape(query)[-3] > 1, BOTH_DIRECTIONS)
        refuse_unsupported(
            dropout_rate=0.0 if deterministic else dropout_rate,
            module=module,
            input_positions=input_positions,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        query, key, value = promoted(dtype, query, key, value)
        with matmul_precision(precision):
            return self._attend(
                query,
                key,
                value,
                bias,
                as_bool(mask),
                query_seq_lengths=query_seq_lengths,
                key_value_seq_lengths=key_value_seq_lengths,
            )


@dataclasses.dataclass(frozen=True)
class Exact(Rival):
    """Exact attention: see :func:`clustax.baselines.exact`.

    Attributes:
      scale: as there.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))
    >>> Exact()(query, key, value, key_value_seq_lengths=jnp.array([512, 300])).shape
    (2, 512, 4, 16)
    """

    scale: float | None = None

    def _attend(self, *arrays: Any, **lengths: Any) -> Array:
        return softmax.exact(*arrays, scale=self.scale, **lengths)


@dataclasses.dataclass(frozen=True)
class OracleTopk(Rival):
    """The best k keys of each query: see :func:`clustax.baselines.oracle_topk`.

    Attributes:
      topk, scale: as there.

    >>> OracleTopk(topk=16) == OracleTopk(topk=16)
    True
    """

    topk: int = 32
    scale: float | None = None

    def __post_init__(self):
        validation.at_least("topk", self.topk, 1)

    def _attend(self, *arrays: Any, **lengths: Any) -> Array:
        return softmax.oracle_topk(*arrays, topk=self.topk, scale=self.scale, **lengths)


@dataclasses.dataclass(frozen=True)
class Local(Rival):
    """Window attention: see :func:`clustax.baselines.local`.

    Attributes:
      window, scale: as there.

    >>> Local(window=16) == Local(window=16)
    True
    """

    window: int
    scale: float | None = None

    def __post_init__(self):
        validation.at_least("window", self.window, 0)

    def _attend(self, *arrays: Any, **lengths: Any) -> Array:
        return softmax.local(*arrays, window=self.window, scale=self.scale, **lengths)


@dataclasses.dataclass(frozen=True)
class Reformer(Rival):
    """Reformer's LSH attention: see :func:`clustax.baselines.reformer`.

    Its keys are its queries, so a model must have one projection for both, as
    :class:`clustax.baselines.nnx.ReformerSelfAttention` has, and pass one and the same array as
    query and key. Others are refused.

    Attributes:
      rounds, num_buckets, chunk_size, merge, same_bucket, scale: as there.
      seed: what the hashing is drawn from, the same at every call.

    >>> query, value = jax.random.normal(jax.random.key(0), (2, 2, 512, 4, 16))
    >>> Reformer(rounds=2)(query, query, value).shape
    (2, 512, 4, 16)
    """

    rounds: int = 4
    num_buckets: int = 64
    chunk_size: int = 32
    merge: str = "lse"
    same_bucket: bool = True
    scale: float | None = None
    seed: int = 0

    def __post_init__(self):
        lsh.check_settings(self.rounds, self.num_buckets, self.chunk_size, self.merge)

    def _attend(self, query: Array, key: Array, *arrays: Any, **lengths: Any) -> Array:
        if key is not query:  # traced arrays cannot be compared in any other way
            raise NotImplementedError(
                "Reformer needs one projection for queries and keys, and one array as both query "
                "and key, got two; use clustax.baselines.nnx.ReformerSelfAttention."
            )
        settings = dataclasses.asdict(self)
        rng = jax.random.key(settings.pop("seed"))
        return lsh.reformer(query, *arrays, **settings, **lengths, rng=rng)
