"""Softmax attention over all keys, over the best ones of each query, and over those near it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from clustax import masks, validation, xla
from clustax.attention import attend_exactly, canonical_keys, checked_arrays
from clustax.heads import map_heads
from clustax.topk import largest
from clustax.xla import MASKED, Keys

QUERIES_AT_ONCE = 256  # whose logits for all keys are in memory, in the search for the best keys
SMALLEST_BLOCK = 16  # of positions; smaller ones have products that are too small to be fast


def exact(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Exact attention: what clustered attention approximates, in time and memory O(T S).

    .. math:: V_i = \sum_l \mathrm{softmax}(s\, Q_i K^T + b)_l \, V_l

    It is ``jax.nn.dot_product_attention``, but with any number of batch axes and any V, and with
    clustax's promises: a key that is masked, padding, or biased by -inf has no influence on outputs
    or gradients, whatever it and its value hold, and padded queries, and queries without keys, get
    zeros.

    Args:
      query, key, value, bias, mask, scale, query_seq_lengths, key_value_seq_lengths: as in
        :func:`clustax.attend`.

    Returns:
      The attended values, in the dtype of ``query``.

    Raises:
      ValueError: if an argument is not as there.

    Source: "full" in the paper.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 256, 4, 16))
    >>> out = exact(query, key, value, key_value_seq_lengths=jnp.array([256, 100]))
    >>> alone = exact(query[1], key[1, :100], value[1, :100])
    >>> bool(jnp.allclose(out[1], alone, atol=1e-5))
    True
    """
    arrays = checked_arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    return attend_exactly(*arrays, checked_scale(scale, arrays[0]))


def oracle_topk(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None = None,
    mask: Bool[Array, "*#B #N 1 S"] | None = None,
    *,
    topk: int = 32,
    scale: float | Float[Array, ""] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Softmax over the k keys that have the largest logits for each query, and over no others.

    .. math:: V_i = \sum_{l \in T_i} \mathrm{softmax}_{T_i}(s\, Q_i K^T + b)_l \, V_l

    where :math:`T_i` are the top-k keys of query i itself. To find them takes all logits, so it is
    no faster than exact attention: it says how good a method can get that sees k keys only. Memory
    is linear in T and S.

    Args:
      query, key, value, bias, mask, scale, query_seq_lengths, key_value_seq_lengths: as in
        :func:`clustax.attend`.
      topk: k, at least 1. It is clamped to S; ties go to the first key.

    Returns:
      The attended values, in the dtype of ``query``.

    Raises:
      ValueError: if an argument is not as there.

    Source: "oracle-top" in the paper.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 256, 2, 16))  # T N H
    >>> for topk in (8, 64, 256):
    ...     error = oracle_topk(query, key, value, topk=topk) - exact(query, key, value)
    ...     print(f"{float(jnp.abs(error).max()):.2f}")
    1.46
    0.29
    0.00
    """
    arrays = checked_arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    validation.at_least("topk", topk, 1)
    topk = min(topk, arrays[1].shape[-3])
    return _oracle_topk(arrays, checked_scale(scale, arrays[0]), topk=topk)


@partial(jax.jit, static_argnames="topk")
def _oracle_topk(
    arrays: tuple[Any, ...], scale: float | Float[Array, ""], *, topk: int
) -> Float[Array, "*B T N V"]:

    def head(
        scale: Float[Array, ""], queries: Float[Array, "T H"], keys: Keys
    ) -> Float[Array, "T V"]:
        @jax.checkpoint  # the gradient does not keep the logits either
        def attend(block: Float[Array, "block H"]) -> Float[Array, "block V"]:
            logits = xla.attention_logits(block, keys, scale)  # block S
            index = largest(lax.stop_gradient(logits), topk)
            is_other = xla.outside(index, len(keys.key))
            return xla.attend_keys(jnp.where(is_other, -jnp.inf, logits), keys.value).mean

        length, head_dim = queries.shape
        size = min(QUERIES_AT_ONCE, length)
        blocks = jnp.pad(queries, ((0, -length % size), (0, 0))).reshape(-1, size, head_dim)
        out = lax.map(attend, blocks)
        return out.reshape(-1, out.shape[-1])[:length]

    length, num_keys = arrays[0].shape[-3], arrays[1].shape[-3]
    head_bytes = 4 * min(QUERIES_AT_ONCE, length) * num_keys
    return attend_heads(head, *arrays, shared=(scale,), head_bytes=head_bytes)


def local(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K V"],
    bias: Float[Array, "*#B #N 1 T"] | None = None,
    mask: Bool[Array, "*#B #N 1 T"] | None = None,
    *,
    window: int,
    scale: float | Float[Array, ""] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Softmax over the keys that are near each query in the sequence: window attention.

    .. math:: V_i = \sum_{|l - i| \le w} \mathrm{softmax}_{|l - i| \le w}(s\, Q_i K^T + b)_l \, V_l

    Time and memory are O(T w). A query without keys in its window gets zeros.

    Args:
      query, key, value, bias, mask, scale, query_seq_lengths, key_value_seq_lengths: as in
        :func:`clustax.attend`. There are as many keys as queries, at the same positions.
      window: w, the number of positions that a query sees on either side of its own, at least 0.

    Returns:
      The attended values, in the dtype of ``query``.

    Raises:
      ValueError: if an argument is not as there.

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 256, 2, 16))  # T N H
    >>> out = local(query, key, value, window=10)
    >>> alone = exact(query[100:101], key[90:111], value[90:111])
    >>> bool(jnp.allclose(out[100:101], alone, atol=1e-5))
    True
    """
    arrays = checked_arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    query, key = arrays[:2]
    validation.at_least("window", window, 0)
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key must have the length T of query, {query.shape[-3]}, got {key.shape[-3]} (shape "
            f"{key.shape}): local attention is that of one sequence to itself; for another one use "
            "exact."
        )
    return _local(arrays, checked_scale(scale, query), window=window)


@partial(jax.jit, static_argnames="window")
def _local(
    arrays: tuple[Any, ...], scale: float | Float[Array, ""], *, window: int
) -> Float[Array, "*B T N V"]:
    length = arrays[0].shape[-3]
    block = min(max(window, SMALLEST_BLOCK), length)
    num_blocks = -(-length // block)
    offset = np.arange(3 * block) - block - np.arange(block)[:, None]  # from query to key

    def blocks(x: Array) -> Array:  # T … -> L+2 block …; the first and the last are empty
        ends = (block, (num_blocks + 1) * block - length)
        return jnp.pad(x, [ends] + [(0, 0)] * (x.ndim - 1)).reshape(-1, block, *x.shape[1:])

    def around(x: Array) -> Array:  # T … -> L 3·block …: each block between its neighbours
        x = blocks(x)
        return jnp.concatenate([x[:-2], x[1:-1], x[2:]], axis=1)

    def head(
        scale: Float[Array, ""], query: Float[Array, "T H"], keys: Keys
    ) -> Float[Array, "T V"]:
        valid = jnp.ones(length, bool) if keys.valid is None else keys.valid
        near = (jnp.abs(offset) <= window) & around(valid)[:, None]
        keys = jax.tree.map(around, keys._replace(valid=None))
        logits = xla.attention_logits(blocks(query)[1:-1], keys, scale)
        mean = xla.attend_keys(jnp.where(near, logits, MASKED), keys.value).mean
        out = jnp.where(jnp.any(near, axis=-1, keepdims=True), mean, 0)
        return out.reshape(-1, out.shape[-1])[:length]

    head_bytes = 4 * length * 3 * block
    return attend_heads(head, *arrays, shared=(scale,), head_bytes=head_bytes)


def checked_scale(scale: Any, query: Float[Array, "*B T N H"]) -> float | Float[Array, ""]:
    """The factor of the logits, 1 / sqrt(H) if None."""
    if scale is None:
        return query.shape[-1] ** -0.5
    validation.scalar("scale", scale)
    return scale


def attend_heads(
    head: Callable[..., Float[Array, "T V"]],
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "*#B #N 1 S"] | None,
    mask: Bool[Array, "*#B #N 1 S"] | None,
    query_seq_lengths: Int[Array, "*B"] | None,
    key_value_seq_lengths: Int[Array, "*B"] | None,
    *,
    shared: tuple[PyTree, ...],
    head_bytes: int,
) -> Float[Array, "*B T N V"]:
    """Applies ``head`` to what is ``shared``, and the queries and the keys of each head.

    It gets zeros in place of what does not count, and what it returns for padded queries is left
    out. Its intermediate arrays take ``head_bytes``.
    """
    num_heads = query.shape[-2]
    key, value, bias, valid = canonical_keys(
        key, value, bias, mask, key_value_seq_lengths, num_heads
    )

    def heads_first(x):
        return jnp.repeat(jnp.swapaxes(x, 1, 2), num_heads // x.shape[2], axis=1)

    queries = masks.drop_queries(query, query_seq_lengths).reshape(-1, *query.shape[-3:])
    keys = Keys(heads_first(key), heads_first(value), xla.raise_bias(bias), valid)
    out = map_heads(head, heads_first(queries), keys, shared=shared, head_bytes=head_bytes)
    out = jnp.swapaxes(out, 1, 2).reshape(*query.shape[:-1], value.shape[-1])
    return masks.drop_queries(out, query_seq_lengths).astype(query.dtype)
