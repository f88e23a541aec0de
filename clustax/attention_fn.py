"""Clustered attention as one object that holds its settings: the ``attention_fn`` of a model."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from clustax import masks, validation
from clustax.attention import attend, check_settings, clustered_attention, is_short
from clustax.clustering import Clusters, cluster_queries

ATTENDING = ("topk", "merge", "num_subclusters", "scale")
CLUSTERING = ("num_clusters", "num_bits", "num_iterations", "metric", "implementation")


@dataclasses.dataclass(frozen=True)
class ClusteredAttention:
    """Clustered attention with fixed settings, to be called where a model calls its attention.

    It can stand for ``jax.nn.dot_product_attention``, and be the ``attention_fn`` of
    ``flax.nnx.MultiHeadAttention`` and ``flax.linen.MultiHeadDotProductAttention``. Objects of
    equal settings are equal and have equal hashes, so they share compiled programs.

    The defaults are on the frontier of error against time that was measured on 30 s of speech; on
    that of 512 tokens of text they are with 25 clusters. Those of the functions, and of
    :meth:`paper`, are the paper's.

    Clusters can be shared: a call takes those of :meth:`cluster`, or any other of its queries, as
    ``clusters``. They may be of M heads, where M divides N: each serves N / M consecutive heads.

    Attributes:
      num_clusters, topk, merge, num_subclusters, scale, num_bits, num_iterations, metric, space,
      exact_below, implementation: as in :func:`clustax.clustered_attention`; a sequence of
        implementations is a tuple.
      seed: what hash planes and starting centroids are drawn from, the same ones at every call.

    Raises:
      ValueError: if a setting is not as there.

    >>> attention = ClusteredAttention(num_clusters=25)
    >>> attention == ClusteredAttention(num_clusters=25)
    True
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))
    >>> attention(query, key, value, key_value_seq_lengths=jnp.array([512, 300])).shape
    (2, 512, 4, 16)

    Tokens may be clustered once by what they are, instead of by their queries in every head:

    >>> tokens = jax.random.normal(jax.random.key(1), (2, 512, 1, 64))  # N = 1
    >>> clusters = attention.cluster(tokens, tokens)
    >>> attention(query, key, value, clusters=clusters).shape
    (2, 512, 4, 16)
    """

    num_clusters: int = 100
    topk: int = 32
    merge: str = "lse"
    num_subclusters: int = 4
    scale: float | None = None
    num_bits: int = 64
    num_iterations: int = 3
    metric: str = "euclidean"
    space: str = "logit"
    seed: int = 0
    exact_below: int | None = None
    implementation: str | tuple[str, ...] | None = None

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """The method in the paper's setting: hashed queries, and the mass of the centroid.

        >>> ClusteredAttention.paper(num_clusters=25).metric
        'hamming'

        Args:
          **settings: what is to be otherwise, as for the class.
        """
        paper: dict[str, Any] = {
            "metric": "hamming",
            "space": "query",
            "merge": "mass",
            "num_subclusters": 1,
            "num_iterations": 10,
        }
        return cls(**paper | settings)

    def __post_init__(self):
        settings = dataclasses.asdict(self)
        del settings["seed"]
        check_settings(**settings)
        validation.integer("seed", self.seed)
        if isinstance(self.implementation, list):  # It has to have a hash.
            object.__setattr__(self, "implementation", tuple(self.implementation))

    def cluster(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        mask: Array | None = None,
        *,
        bias: Float[Array, "*#B #N 1 S"] | None = None,
        query_seq_lengths: Int[Array, "*B"] | None = None,
        key_value_seq_lengths: Int[Array, "*B"] | None = None,
    ) -> Clusters:
        """Finds the clusters that a call with these arguments uses.

        It finds them below ``exact_below``, too, where the call makes no use of any.

        Args:
          query, key, mask, query_seq_lengths, key_value_seq_lengths: as for :meth:`__call__`.
          bias: the same; it matters only where it is -inf, as the key then does not count.

        Returns:
          The clusters, as int32.

        Raises:
          ValueError: if an argument is not as there.
          NotImplementedError: if ``implementation`` cannot serve the call.
        """
        query, key = promoted(None, query, key)
        about_keys: dict[str, Any] = {
            "key": key,
            "mask": masks.without_biased_out(as_bool(mask), bias),
            "key_value_seq_lengths": key_value_seq_lengths,
        }
        return cluster_queries(
            query,
            query_seq_lengths=query_seq_lengths,
            **self._clustering(),
            **(about_keys if self.space == "logit" else {}),
        )

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K V"],
        bias: Float[Array, "*#B #N 1 S"] | None = None,
        mask: Array | None = None,
        *,
        clusters: Clusters | None = None,
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
        """Attends, as :func:`clustax.clustered_attention` does.

        Args:
          query, key, value, bias, query_seq_lengths, key_value_seq_lengths: as there.
          mask: as there, or the same in another dtype, as Flax makes masks.
          clusters: the clusters of the queries; they are found if None. Below ``exact_below`` they
            are not looked at.
          is_causal: must be False, unless there is one query, as in decoding: its mask says what it
            sees.
          dtype: what query, key, and value are converted to first; their common dtype if None.
          precision: that of the products in attention, a name or a ``jax.lax.Precision``; that of
            ``jax.default_matmul_precision`` if None. Clustering has its own.
          deterministic, dropout_rate: dropout of attention weights is not supported: either
            ``deterministic`` or a rate of 0 is needed.
          dropout_rng, broadcast_dropout, force_fp32_for_softmax: without effect, as there is no
            dropout and the softmax is always in at least float32.
          module, input_positions, qk_attn_weights_einsum, attn_weights_value_einsum: must be None.
            They are what Flax passes to sow attention weights, to rotate queries and keys, and to
            quantise.

        Returns:
          The attended values, in that dtype.

        Raises:
          ValueError: if an argument is not as above.
          NotImplementedError: if a setting of Flax is not supported.
        """
        validation.not_causal(is_causal and jnp.shape(query)[-3] > 1)
        refuse_unsupported(
            dropout_rate=0.0 if deterministic else dropout_rate,
            module=module,
            input_positions=input_positions,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        query, key, value = promoted(dtype, query, key, value)
        arguments = (query, key, value, bias, as_bool(mask))
        lengths: dict[str, Any] = {
            "query_seq_lengths": query_seq_lengths,
            "key_value_seq_lengths": key_value_seq_lengths,
        }
        attending = {name: getattr(self, name) for name in ATTENDING}
        with matmul_precision(precision):
            if clusters is None or is_short(query.shape[-3], self.exact_below):
                return clustered_attention(
                    *arguments,
                    space=self.space,
                    exact_below=self.exact_below,
                    **self._clustering(),
                    **attending,
                    **lengths,
                )
            clusters = of_heads(clusters, query.shape[-2])
            return attend(
                *arguments,
                clusters=clusters,
                implementation=self.implementation,
                **attending,
                **lengths,
            )

    def _clustering(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in CLUSTERING}
        return settings | {"rng": jax.random.key(self.seed)}


def refuse_unsupported(*, dropout_rate: float, **settings: Any) -> None:
    """Checks that Flax does not ask for dropout of attention weights, nor for what hooks into them.

    Args:
      dropout_rate: the rate in this call, 0 where it is deterministic.
      **settings: ``module``, ``input_positions``, ``qk_attn_weights_einsum`` and
        ``attn_weights_value_einsum``, which must be None.
    """
    if dropout_rate > 0:
        raise NotImplementedError(
            f"dropout_rate={dropout_rate} is not supported, as it is of attention weights; build "
            "the module with dropout_rate=0, and drop out its output instead."
        )
    instead = {
        "module": "there are no attention weights to sow: leave sow_weights at False",
        "input_positions": "rotate queries and keys before attention",
    }
    for name, given in settings.items():
        if given is not None:
            raise NotImplementedError(
                f"{name} is not supported, got one of type {type(given).__name__}; "
                f"{instead.get(name, 'leave it at None')}."
            )


def promoted(dtype: Any, *arrays: Array) -> tuple[Array, ...]:
    """The arrays in this dtype; in their common one if None. One that comes twice stays one."""
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    converted = {id(x): jnp.asarray(x, dtype) for x in arrays}
    return tuple(converted[id(x)] for x in arrays)


def as_bool(mask: Array | None) -> Bool[Array, "..."] | None:
    """The mask, which Flax may have made a floating one."""
    return None if mask is None else jnp.asarray(mask, bool)


def of_heads(clusters: Clusters, num_heads: int) -> Clusters:
    """Clusters for all heads, where those of one serve several; others are left to be checked."""
    is_whole = isinstance(clusters, Clusters) and all(jnp.ndim(x) > 1 for x in clusters)
    heads = clusters.assignment.shape[-2] if is_whole else 0
    if heads == 0 or num_heads % heads:
        return clusters
    return jax.tree.map(lambda x: jnp.repeat(x, num_heads // heads, axis=-2), clusters)


def matmul_precision(
    precision: str | lax.Precision | None,
) -> contextlib.AbstractContextManager:
    """A context in which products have this precision."""
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, lax.Precision):
        precision = precision.name.lower()
    if not isinstance(precision, str):
        raise NotImplementedError(
            f"precision={precision!r} is not supported; pass one name or jax.lax.Precision for all "
            "products."
        )
    return jax.default_matmul_precision(precision)
