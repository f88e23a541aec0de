"""The kernel of K-means by blocks, which the core suite is too small for, against that of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from clustax import kernels, kmeans, lsh
from clustax.kernels import kmeans as kernel
from tests.helpers import assert_kernels_cluster_as_xla_does, others_once

LENGTH, CLUSTERS = 300, 7
BLOCKS = kernel.KmeansBlocks(queries=128, heads=2)


def arguments(points):
    rng = np.random.default_rng(1)
    start = rng.integers(90, size=(2, CLUSTERS))
    start[1] = start[1, 0]  # all but the first of the second head have no members
    valid = jnp.arange(LENGTH) < jnp.array([[LENGTH], [90]])
    return points, jnp.asarray(start, jnp.int32), valid


def assert_same(metric, *args, blocks=BLOCKS, **settings):
    with kernels.interpret("tpu"):
        actual = getattr(kernel, metric)(*args, **settings, blocks=blocks)
    expected = jax.vmap(functools.partial(getattr(kmeans, metric), **settings))(*args)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("num_bits", others_once(31, 64))
def test_codes(num_bits):
    bits = np.random.default_rng(0).random((2, LENGTH, num_bits)) < 0.5
    codes = lsh.pack_bits(jnp.asarray(bits), axis=-1)
    assert_same("hamming", *arguments(codes), num_bits=num_bits, num_iterations=4)


def test_points():
    points = np.random.default_rng(0).standard_normal((2, LENGTH, 7), np.float32)
    points[1, 90:] = np.nan
    args = arguments(jnp.asarray(points))
    assert_same("euclidean", *args, num_iterations=4)
    several = kernel.KmeansBlocks(queries=256, heads=1, chunk=128)  # two chunks in a step
    assert_same("euclidean", *args, num_iterations=4, blocks=several)


def test_points_in_logit_space():
    # Far from zero, where products without the mean would lose more than that to rounding.
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.standard_normal((2, LENGTH, 7)) + 8, jnp.bfloat16)
    factor = rng.standard_normal((2, 7, 7))
    points, start, valid = arguments(points.at[1, 90:].set(jnp.nan))
    covariance = jnp.asarray(np.einsum("gij,gkj->gik", factor, factor), jnp.float32)
    with kernels.interpret("tpu"):
        actual = kernel.euclidean(points, start, valid, covariance, num_iterations=4, blocks=BLOCKS)
    moved = jnp.asarray(np.einsum("gth,ghk->gtk", np.asarray(points, np.float64) - 8, factor))
    expected = jax.vmap(functools.partial(kmeans.euclidean, num_iterations=4))(moved, start, valid)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_clusters_of_bfloat16_in_logit_space_are_those_of_xla():
    with kernels.interpret("tpu"):
        assert_kernels_cluster_as_xla_does()


@pytest.mark.parametrize(("kind", "chunk"), [("TPU v4", 128), ("TPU v5 lite", 256)])
def test_fewer_queries_at_once_where_registers_are_few(kind, chunk):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert kernel.KmeansBlocks.default(8, 8192, 64, 4).chunk == chunk


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="queries must be a multiple of 128, got 100"):
        kernel.KmeansBlocks(queries=100)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        kernel.KmeansBlocks(queries=128, heads=0)
    with pytest.raises(ValueError, match="chunk must be a multiple of 128, got 64"):
        kernel.KmeansBlocks(queries=128, chunk=64)
    assert "exceed what it can count" in (kernel.refusal(2**24, 64, jnp.dtype("float32"), 9) or "")
    assert kernel.refusal(2**16, 128, jnp.dtype("float32"), 128) is None
