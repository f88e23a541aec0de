"""The k largest of each row, against ``lax.top_k``."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from clustax import topk, xla
from tests.helpers import others_once


def expected(x, k):
    return np.sort(jax.lax.top_k(x, k)[1], axis=-1)


def rows_with_ties(length: int) -> np.ndarray:
    """Also rows with several of the largest in a block, and with fewer than k not masked."""
    rng = np.random.default_rng(6)
    x = rng.geometric(0.3, size=(6, length)).astype(np.float32)
    x[0] = np.repeat(x[0], 7)[:length] - (rng.random(length) < 0.5)
    x[1] = rng.standard_normal(length)
    x[2] = xla.MASKED
    x[3, 7:] = xla.MASKED
    x[4, 7:] = -np.inf
    return x


SIZES = [(12_003, 8), (4096, 1), (4096, 8), (12_003, 30), (33, 33), (31, 1), (700, 500)]


@pytest.mark.parametrize(("length", "k"), others_once(*SIZES))
def test_largest_are_those_of_top_k(length, k):
    x = rows_with_ties(length)
    np.testing.assert_array_equal(topk.largest(jnp.asarray(x), k), expected(x, k))


@pytest.mark.parametrize(("length", "k"), others_once((700, 500), (12_003, 8)))
def test_largest_are_those_of_top_k_on_accelerators(accelerator, length, k):
    x = rows_with_ties(length)
    np.testing.assert_array_equal(jax.jit(topk.largest, static_argnums=1)(x, k), expected(x, k))


NUMBERS = st.one_of(
    # A CPU may take subnormal numbers for zeros.
    st.floats(width=32, allow_nan=False, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf]),
)


@pytest.mark.once
@hypothesis.given(
    st.lists(NUMBERS, min_size=40, max_size=40), st.sampled_from([1, 2, 3, 7, 20, 39, 40])
)
def test_order_is_that_of_numbers(numbers, k):
    x = np.asarray(numbers, np.float32)[None]
    order = np.argsort(-x, axis=-1, stable=True)  # zeros of both signs are equal
    np.testing.assert_array_equal(topk.largest(jnp.asarray(x), k), np.sort(order[:, :k]))


@pytest.mark.once
def test_columns_of_many_heads_are_independent():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 200)), jnp.float32)
    found = jax.vmap(lambda x: topk.largest(x, 9))(x)
    np.testing.assert_array_equal(found, expected(x, 9))


def test_nth_bit_counts_ones_from_the_lowest():
    word = jnp.uint32(0b1000_0000_0000_0001_0000_0000_0010_0100)
    assert [int(topk.nth_bit(word, jnp.int32(n))) for n in range(4)] == [2, 5, 16, 31]


@pytest.mark.once
def test_doubles_are_told_apart_where_floats_are_not():
    with jax.enable_x64(True):
        x = jnp.asarray([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 0.5]])
        assert topk.largest(x, 1).tolist() == [[1]]


def test_none_are_asked_for():
    assert topk.largest(jnp.ones((3, 4)), 0).shape == (3, 0)
