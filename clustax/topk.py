"""The k largest numbers of each row, for rows that are few and long.

``lax.top_k`` goes through rows one by one on a CPU, on one core, in time that hardly depends on
their length. The k-th largest number can be found in all rows at once instead, by bisection, where
a step is one pass of vector code over all numbers.
"""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from clustax.lsh import WORD, pack_bits


def largest(x: Float[Array, "C S"], k: int) -> Int[Array, "C k"]:
    """Where the k largest numbers of each row are, in order; ties go to the lowest index.

    >>> largest(jnp.array([[1.0, 5.0, 3.0, 5.0], [2.0, 2.0, 2.0, 2.0]]), 2)
    Array([[1, 3],
           [0, 1]], dtype=int32)
    """
    if k == 0:
        return jnp.zeros((len(x), 0), jnp.int32)
    return lax.platform_dependent(
        x,
        cpu=partial(_by_blocks, k=k, direct=_by_bisection, gain=2),
        default=partial(_by_blocks, k=k, direct=_by_sorting, gain=8),
    )


def _by_blocks(
    x: Float[Array, "C S"],
    k: int,
    direct: Callable[[Float[Array, "C n"], int], Int[Array, "C k"]],
    gain: int,
) -> Int[Array, "C k"]:
    """The k largest are in the k blocks with the largest maxima, if that leaves much less to do."""
    rows, length = x.shape
    block = 1 << max(0, round(math.log2(math.sqrt(length / k))))
    num_blocks = -(-length // block)
    if gain * (num_blocks + k * block) > length:
        return direct(x, k)
    padding = ((0, 0), (0, num_blocks * block - length))
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(rows, num_blocks, block)
    best = _by_blocks(jnp.max(blocks, axis=-1), k, direct, gain)  # in order, for the sake of ties
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=1).reshape(rows, -1)
    place = _by_blocks(candidates, k, direct, gain)
    return jnp.take_along_axis(best, place // block, axis=-1) * block + place % block


def _by_sorting(x: Float[Array, "C n"], k: int) -> Int[Array, "C k"]:
    return jnp.sort(lax.top_k(x, k)[1], axis=-1).astype(jnp.int32)


def _by_bisection(x: Float[Array, "C n"], k: int) -> Int[Array, "C k"]:
    x = ordered(x.T)  # n C: rows lie along vector lanes
    limit = kth_largest(x, k)
    above, equal = (pack_bits(bits, axis=0) for bits in (x > limit, x == limit))  # W C
    counts = _count(equal)
    before = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
    taken = jnp.sum(_count(above), axis=0, dtype=jnp.int32)
    room = jnp.maximum(k - taken - before, 0)  # for ties, in each word
    first = (jnp.uint32(1) << nth_bit(equal, room).astype(jnp.uint32)) - 1
    chosen = above | jnp.where(room < counts, equal & first, equal)  # W C

    counts = _count(chosen)
    ends = jnp.cumsum(counts, axis=0, dtype=jnp.int32)
    nth = jnp.arange(k, dtype=jnp.int32)[:, None]
    word = jnp.sum(ends <= nth[:, None], axis=1, dtype=jnp.int32)  # k C
    nth = nth - jnp.take_along_axis(ends - counts, word, axis=0)
    return (word * WORD + nth_bit(jnp.take_along_axis(chosen, word, axis=0), nth)).T


def kth_largest(x: Int[Array, "n C"], k: int) -> Int[Array, " C"]:
    """A number of which k in its column are at least as large, or more if some are equal to it."""
    low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)

    def halve(state):
        low, high, _ = state
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up
        count = jnp.sum(x >= middle, axis=0, dtype=jnp.int32)
        low = jnp.where(count >= k, middle, low)
        high = jnp.where(count == k, middle, jnp.where(count > k, high, middle - 1))
        return low, high, jnp.any(low < high)

    return lax.while_loop(lambda state: state[2], halve, (low, high, jnp.any(low < high)))[0]


def ordered(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Integers that have the same order, with one zero."""
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), dtype)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(dtype).max, bits)


def nth_bit(word: UInt32[Array, "*n"], nth: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The place of the n-th one in a word, counted from 0; 31 if there are fewer."""
    place = jnp.zeros_like(nth)
    width = WORD // 2
    while width:
        ones = _count(word & jnp.uint32((1 << width) - 1))
        is_higher = nth >= ones
        nth = jnp.where(is_higher, nth - ones, nth)
        word = jnp.where(is_higher, word >> width, word)
        place = jnp.where(is_higher, place + width, place)
        width //= 2
    return place


def _count(words: UInt32[Array, "*n"]) -> Int[Array, "*n"]:
    return lax.population_count(words).astype(jnp.int32)
