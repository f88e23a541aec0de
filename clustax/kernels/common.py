"""What several kernels need: bounds, roundings, the products of matrix units."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int

from clustax import kernels
from clustax.xla import MASKED

# Of the 16 MiB that every TPU since v4 gives a kernel unasked, the rest is the compiler's.
VMEM_BYTES = 12 * 2**20


def round_up(size: int, multiple: int) -> int:
    """The lowest multiple that is at least ``size``."""
    return -(-size // multiple) * multiple


def masked_bias(
    bias: Float[Array, "*n S"] | None, valid: Bool[Array, "*n S"] | None
) -> Float[Array, "*n S"] | None:
    """What is added to the logits of keys; those that do not count hold zeros, and get MASKED."""
    return bias if valid is None else jnp.where(valid, 0.0 if bias is None else bias, MASKED)


def bfloat16_parts(x: Float[Array, "*n"]) -> tuple[BFloat16[Array, "*n"], BFloat16[Array, "*n"]]:
    """Float32 as a sum of two, which has 16 bits of its mantissa."""
    # XLA may leave out a conversion there and back, but not this.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def sum_runs(
    rows: Float[Array, "n ..."], index: Int[Array, " n"], size: int, dtype: Any = None
) -> Float[Array, "size ..."]:
    """Sums of the rows of each index, which must not decrease; in one order. Perhaps rounded."""
    dtype = rows.dtype if dtype is None else dtype
    if kernels.device() not in kernels.GPUS:
        return jax.ops.segment_sum(rows, index, size, indices_are_sorted=True).astype(dtype)

    # GPUs would add to a sum as threads happen to come.
    def add(left, right):
        is_same = (left[0] == right[0]).reshape(-1, *[1] * (rows.ndim - 1))
        return right[0], jnp.where(is_same, left[1], 0) + right[1]

    _, sums = lax.associative_scan(add, (index, rows))
    is_last = jnp.append(index[1:] != index[:-1], True)
    out = jnp.zeros((size, *rows.shape[1:]), dtype)
    sums = sums.astype(dtype)  # before they go to their places, of which there are more
    return out.at[jnp.where(is_last, index, size)].set(sums, mode="drop", unique_indices=True)


def dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "_ _"]:
    """The product over an axis of each, accumulated in float32."""
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
