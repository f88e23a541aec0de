"""Which queries and keys count. Where it is all of them, None says so, and no work is done."""

import functools
import operator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def valid_positions(lengths: Int[Array, "*B"], length: int) -> Bool[Array, "*B T"]:
    """True for the first ``lengths`` positions of each batch entry."""
    return jnp.arange(length) < lengths[..., None]


def valid_keys(
    mask: Bool[Array, "*#B #N 1 S"] | None,
    bias: Float[Array, "*#B #N 1 S"] | None,
    lengths: Int[Array, "*B"] | None,
    num_keys: int,
) -> Bool[Array, "*#B #N S"] | None:
    """True for keys that are neither masked, nor padding, nor biased by -inf."""
    conditions = []
    if mask is not None:
        conditions.append(mask[..., 0, :])
    if bias is not None:
        conditions.append(bias[..., 0, :] > -jnp.inf)
    if lengths is not None:
        conditions.append(valid_positions(lengths, num_keys)[..., None, :])
    return functools.reduce(operator.and_, conditions) if conditions else None


def without_biased_out(
    mask: Bool[Array, "*#B #N 1 S"] | None, bias: Float[Array, "*#B #N 1 S"] | None
) -> Bool[Array, "*#B #N 1 S"] | None:
    """The mask, which leaves keys out that are biased by -inf, too."""
    if bias is None:
        return mask
    valid = bias > -jnp.inf
    return valid if mask is None else mask & valid


def drop_keys(
    x: Float[Array, "*B S K D"], valid: Bool[Array, "*#B #N S"] | None, num_heads: int
) -> Float[Array, "*B S heads D"]:
    """Zeros in place of keys (or values) that do not count, whatever they hold.

    Query heads that share a key head but mask it differently get copies of their own.
    """
    if valid is None:
        return x
    valid = jnp.swapaxes(valid, -1, -2)[..., None]  # *B|1 S N|1 1
    if valid.shape[-2] > 1 and x.shape[-2] < num_heads:
        x = jnp.repeat(x, num_heads // x.shape[-2], axis=-2)
    return jnp.where(valid, x, 0)


def drop_queries(
    x: Float[Array, "*B T N D"], lengths: Int[Array, "*B"] | None
) -> Float[Array, "*B T N D"]:
    """Zeros in place of padded queries (or their outputs), whatever they hold."""
    if lengths is None:
        return x
    return jnp.where(valid_positions(lengths, x.shape[-3])[..., None, None], x, 0)
