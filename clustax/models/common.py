"""What the models share: how they take their attention, their norm and dropout."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

AttentionFn = Callable[..., Float[Array, "B T N H"]]
"""Called as `jax.nn.dot_product_attention` is: query, key, value, then keywords."""


def one_per_layer(
    attention_fn: AttentionFn | Sequence[AttentionFn], num_layers: int
) -> tuple[AttentionFn, ...]:
    """Returns one attention for each layer.

    Args:
        attention_fn: one for all layers, or a sequence of one per layer.
        num_layers: how many there are.

    Raises:
        ValueError: if a sequence has another length.
    """
    if callable(attention_fn):
        return (attention_fn,) * num_layers
    if len(attention_fn) != num_layers:
        raise ValueError(
            f"attention_fn must be one callable or a sequence of one per layer, here {num_layers}, "
            f"got {len(attention_fn)}."
        )
    return tuple(attention_fn)


def layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a norm that computes the variance in the accurate way."""
    # The fast one, E[x²] - E[x]², loses digits to cancellation.
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """Returns a dropout, without random state where it drops nothing."""
    return nnx.Dropout(rate, rngs=rngs if rate else None)


def sinusoids(length: int, size: int) -> Float[Array, "S D"]:
    """Returns fixed encodings of positions, whose waves are from 2π to 10 000 · 2π long."""
    frequencies = jnp.exp(-jnp.log(10_000) * jnp.linspace(0, 1, size // 2))
    angles = jnp.arange(length)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
