"""Samples of queries, at which clustered and exact attention are compared."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clustax import masks, validation

SAMPLE = 256


def draw(
    query: Float[Array, "*B T N H"],
    sample: int,
    rng: Array | None,
    query_seq_lengths: Int[Array, "*B"] | None,
) -> Int[Array, "*B n"]:
    """Positions of valid queries, in order; T in place of those that there are not."""
    validation.at_least("sample", sample, 1)
    rng = validation.rng_key("rng", rng)
    *batch, length = query.shape[:-2]
    lengths = validation.lengths("query_seq_lengths", query_seq_lengths, tuple(batch))
    lengths = jnp.full(batch, length) if lengths is None else lengths
    return _draw_positions(rng, lengths, length, min(sample, length))


@partial(jax.jit, static_argnames=("length", "sample"))
def _draw_positions(
    rng: Array, lengths: Int[Array, "*B"], length: int, sample: int
) -> Int[Array, "*B n"]:
    valid = masks.valid_positions(lengths, length)
    # Without replacement: those of the largest random numbers.
    order = jnp.where(valid, jax.random.uniform(rng, valid.shape), -1)
    positions = jax.lax.top_k(order, sample)[1]
    valid = jnp.take_along_axis(valid, positions, axis=-1)
    return jnp.sort(jnp.where(valid, positions, length), axis=-1)


def take(x: Float[Array, "*B T N D"], positions: Int[Array, "*B n"]) -> Float[Array, "*B n N D"]:
    """What is at the positions; zeros at T."""
    positions = positions[..., None, None]
    return jnp.take_along_axis(x, positions, axis=-3, mode="fill", fill_value=0)
