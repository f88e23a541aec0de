"""Exact attention that never holds all weights: a rival with memory linear in the length."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

QUERIES = 512
KEYS = 2048
"""Positions of a block: the fastest of those that were tried on two cores of a CPU."""


@dataclass(frozen=True)
class Chunked:
    """`chunked_attention` as the attention of a model, of any length.

    Attributes:
        queries, keys: the sizes of blocks, for lengths that they divide; others are one block.
    """

    queries: int = 256
    keys: int = KEYS

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N V"],
        *,
        query_seq_lengths: Int[Array, " B"] | None = None,
        key_value_seq_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T N V"]:
        """Attends; what comes of padded queries means nothing."""
        del query_seq_lengths
        queries, keys = query.shape[1], key.shape[1]
        blocks = (
            queries if queries % self.queries else self.queries,
            keys if keys % self.keys else self.keys,
        )
        return chunked_attention(query, key, value, key_value_seq_lengths, blocks=blocks)


def chunked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N V"],
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    *,
    blocks: tuple[int, int] = (QUERIES, KEYS),
) -> Float[Array, "B T N V"]:
    """Softmax attention by blocks of queries, over blocks of keys, with a softmax on the way.

    Of the keys so far only the largest logit, the sum of the exponentials and that of the values
    are kept. The gradient computes a block of queries again. The lengths of the arrays must be
    multiples of the blocks' sizes, or shorter than these.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n²) Memory".

    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 1024, 4, 16))
    >>> exact = jax.nn.dot_product_attention(query, key, value)
    >>> bool(jnp.allclose(chunked_attention(query, key, value), exact, atol=1e-5))
    True
    """
    batch, length, num_heads, _ = query.shape
    for name, array, size in zip(("query", "key"), (query, key), blocks, strict=True):
        if array.shape[1] > size and array.shape[1] % size:
            raise ValueError(
                f"the length of {name} must be a multiple of {size}, got {array.shape[1]}."
            )
    heads_first = (
        jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[-1]) for x in (query, key, value)
    )
    lengths = (
        None if key_value_seq_lengths is None else jnp.repeat(key_value_seq_lengths, num_heads)
    )
    out = lax.map(partial(_attend_head, blocks), (*heads_first, lengths))
    return jnp.swapaxes(out.reshape(batch, num_heads, length, -1), 1, 2)


def _attend_head(
    blocks: tuple[int, int],
    head: tuple[
        Float[Array, "T H"], Float[Array, "S H"], Float[Array, "S V"], Int[Array, ""] | None
    ],
) -> Float[Array, "T V"]:
    (queries, keys), (query, key, value, length) = blocks, head
    valid = None if length is None else _blocks(jnp.arange(len(key)) < length, keys)
    held = _blocks(key, keys), _blocks(value, keys), valid
    attend = jax.checkpoint(partial(_attend_block, *held))
    return lax.map(attend, _blocks(query, queries)).reshape(len(query), -1)


def _blocks(x: Array, size: int) -> Array:
    return x.reshape(-1, min(size, len(x)), *x.shape[1:])


def _attend_block(
    keys: Float[Array, "blocks S H"],
    values: Float[Array, "blocks S V"],
    valid: Bool[Array, "blocks S"] | None,
    query: Float[Array, "T H"],
) -> Float[Array, "T V"]:
    dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
    scale = query.shape[-1] ** -0.5

    def step(so_far, block):
        largest, total, weighted = so_far
        key, value, valid = block
        logits = scale * dot(query, key.T)  # T S
        if valid is not None:
            logits = jnp.where(valid, logits, -jnp.inf)
        shift = jnp.maximum(largest, lax.stop_gradient(jnp.max(logits, axis=-1)))
        weights, fade = jnp.exp(logits - shift[:, None]), jnp.exp(largest - shift)
        total = fade * total + jnp.sum(weights, axis=-1)
        weighted = fade[:, None] * weighted + dot(weights.astype(value.dtype), value)
        return (shift, total, weighted), None

    # Not infinite, as a block may have no valid key.
    start = (
        jnp.full(len(query), jnp.finfo(jnp.float32).min),
        jnp.zeros(len(query)),
        jnp.zeros((len(query), values.shape[-1])),
    )
    (_, total, weighted), _ = lax.scan(step, start, (keys, values, valid))
    return (weighted / total[:, None]).astype(query.dtype)
