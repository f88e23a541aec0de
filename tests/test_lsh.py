"""Planes and codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustax import hash_codes, hash_planes
from clustax.lsh import pack_bits, unpack_bits
from tests import oracle
from tests.helpers import others_once

NUM_BITS = others_once(33, 1, 31, 32, 64, 100)


def test_planes_are_standard_normal():
    planes = np.asarray(hash_planes(jax.random.key(0), num_bits=500, head_dim=40))
    assert planes.shape == (500, 41)
    assert planes.dtype == np.float32
    for drawn in (planes[:, :-1], planes[:, -1]):
        assert abs(drawn.mean()) < 0.1
        assert abs(drawn.std() - 1) < 0.1


def test_planes_without_bias_pass_through_the_origin():
    rng = jax.random.key(0)
    planes = hash_planes(rng, num_bits=9, head_dim=4)
    centred = hash_planes(rng, num_bits=9, head_dim=4, bias=False)
    np.testing.assert_array_equal(centred[:, :-1], planes[:, :-1])
    np.testing.assert_array_equal(centred[:, -1], 0)
    assert (np.asarray(planes[:, -1]) != 0).all()


def test_planes_depend_on_the_rng_alone():
    def draw(rng):
        return np.asarray(hash_planes(rng, num_bits=9, head_dim=4))

    np.testing.assert_array_equal(draw(jax.random.key(1)), draw(jax.random.key(1)))
    np.testing.assert_array_equal(draw(jax.random.key(1)), draw(jax.random.PRNGKey(1)))
    assert (draw(jax.random.key(1)) != draw(jax.random.key(2))).all()


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_codes_are_the_sides_of_the_planes(num_bits):
    """Whole numbers have exact products, so that a query may lie on a plane: then its bit is 0."""
    rng = np.random.default_rng(num_bits)
    query = rng.integers(-2, 3, size=(2, 7, 3, 4)).astype(np.float32)
    planes = rng.integers(-2, 3, size=(num_bits, 5)).astype(np.float32)
    assert (query @ planes[:, :-1].T == planes[:, -1]).any()
    codes = hash_codes(jnp.asarray(query), jnp.asarray(planes))
    assert codes.shape == (2, 3, 7, -(-num_bits // 32))
    assert codes.dtype == jnp.uint32
    for entry, head in np.ndindex(2, 3):
        expected = oracle.hash_codes(query[entry, :, head], planes)
        np.testing.assert_array_equal(codes[entry, head], expected)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_codes_of_any_number_of_batch_axes(batch):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((*batch, 5, 2, 4)).astype(np.float32)
    planes = rng.standard_normal((40, 5)).astype(np.float32)
    codes = hash_codes(jnp.asarray(query), jnp.asarray(planes))
    assert codes.shape == (*batch, 2, 5, 2)
    for *entry, head in np.ndindex(*batch, 2):
        expected = oracle.hash_codes(query[(*entry, slice(None), head)], planes)
        np.testing.assert_array_equal(codes[(*entry, head)], expected)


@pytest.mark.parametrize("dtype", others_once(jnp.bfloat16, jnp.float16))
def test_half_precision_is_not_rounded_further(dtype):
    """Products are float32: the codes are those of the same queries in float32."""
    query = jax.random.normal(jax.random.key(0), (50, 2, 16), dtype)
    planes = hash_planes(jax.random.key(1), num_bits=64, head_dim=16)
    codes = hash_codes(query, planes)
    np.testing.assert_array_equal(codes, hash_codes(query.astype(jnp.float32), planes))
    for head in range(2):
        expected = oracle.hash_codes(np.asarray(query[:, head], np.float64), np.asarray(planes))
        np.testing.assert_array_equal(codes[head], expected)


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_packing_keeps_all_bits_and_fills_up_with_zeros(num_bits):
    bits = np.random.default_rng(num_bits).random((3, num_bits)) < 0.5
    codes = pack_bits(jnp.asarray(bits), axis=-1)
    np.testing.assert_array_equal(unpack_bits(codes, num_bits), bits)
    np.testing.assert_array_equal(oracle.unpack(codes, num_bits), bits)
    np.testing.assert_array_equal(oracle.unpack(codes, 32 * codes.shape[-1])[:, num_bits:], 0)
    np.testing.assert_array_equal(pack_bits(jnp.asarray(bits.T), axis=0), codes.T)


def test_hamming_distance_grows_with_euclidean_distance():
    rng = np.random.default_rng(0)
    centre, direction = rng.standard_normal((2, 16))
    steps = np.array([0, 0.2, 0.6, 2.0])[:, None]
    query = jnp.asarray(centre + steps * direction, jnp.float32)[:, None]
    planes = hash_planes(jax.random.key(0), num_bits=512, head_dim=16)
    bits = oracle.unpack(hash_codes(query, planes)[0], 512)
    distances = (bits != bits[0]).sum(axis=-1)
    assert (np.diff(distances) > 0).all()
