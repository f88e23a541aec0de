"""How far an attention is from exact attention, and what its weights are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clustax import baselines, validation
from clustax.attention_fn import ClusteredAttention, as_bool
from clustax.diagnostics.sample import SAMPLE, draw, take


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
    positions = draw(query, sample, rng, query_seq_lengths)
    dtype = jnp.result_type(query, key, value, jnp.float32)
    with jax.default_matmul_precision("highest"):
        exact = baselines.exact(
            take(query, positions).astype(dtype),
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
    out = take(out, positions).astype(exact.dtype)
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

    Raises:
      ValueError: if ``attention`` finds an argument that is not as it should be.

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
