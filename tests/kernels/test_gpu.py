"""Kernels for GPUs against the XLA implementation: interpreted, or run where there is such a GPU.

Most tests are of Hopper's: Blackwell's differ in how they multiply matrices, and in nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from clustax import attend, cluster_queries, kernels, kmeans, lsh, xla
from clustax.kernels.gpu import centroid_attention, grouped_attention
from clustax.kernels.gpu import kmeans as gpu_kmeans
from clustax.topk import largest
from tests.cases import BY_NAME, make_clusters, make_inputs
from tests.helpers import (
    assert_kernels_cluster_as_xla_does,
    largest_error,
    outputs_and_gradients,
    random_like_output,
)

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of this version of JAX has no matrix products of GPUs",
)


@pytest.fixture(autouse=True)
def gpu_kernels(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    wanted, own = parameters.get("device", "hopper"), kernels.device()
    # XLA's products of float32, which they are compared with, lack half of their bits on GPUs.
    with jax.default_matmul_precision("highest"):
        if own not in kernels.GPUS:
            with kernels.interpret(wanted):
                yield
        elif "device" in parameters and wanted != own:
            pytest.skip(f"a GPU that is at hand is not of {wanted}")
        else:
            yield


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


START = jnp.array([[3, 50, 51, 90, 11], [0, 1, 2, 3, 4]])
VALID = jnp.arange(150) < jnp.array([[150], [97]])


@pytest.mark.parametrize("num_bits", [31, 64])
def test_hamming_kmeans_is_that_of_xla(num_bits):
    # Few codes, so that draws, ties and empty clusters occur.
    few = np.random.default_rng(0).integers(2, size=(7, num_bits))
    bits = few[np.random.default_rng(1).integers(7, size=(2, 150))]
    codes = lsh.pack_bits(jnp.asarray(bits, bool), axis=-1)
    settings = {"num_bits": num_bits, "num_iterations": 4}
    actual = gpu_kmeans.hamming(codes, START, VALID, **settings)
    expected = jax.vmap(lambda *args: kmeans.hamming(*args, **settings))(codes, START, VALID)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("device", kernels.GPUS)
def test_euclidean_kmeans_is_that_of_xla(device):
    points = normal(0, 2, 150, 7).at[1, 97:].set(jnp.nan)
    actual = gpu_kmeans.euclidean(points, START, VALID, num_iterations=4)
    expected = jax.vmap(lambda *args: kmeans.euclidean(*args, num_iterations=4))(
        points, START, VALID
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_kmeans_in_logit_space_needs_no_other_points():
    # Far from zero, where products without the mean would lose more than that to rounding.
    points = (normal(0, 2, 150, 7) + 8).astype(jnp.bfloat16)
    factor = normal(1, 2, 7, 7)
    covariance = jnp.einsum("gij,gkj->gik", factor, factor)
    actual = gpu_kmeans.euclidean(
        points.at[1, 97:].set(jnp.nan), START, VALID, covariance, num_iterations=4
    )
    moved = jnp.einsum("gth,ghk->gtk", points.astype(jnp.float32) - 8, factor)
    expected = jax.vmap(lambda *args: kmeans.euclidean(*args, num_iterations=4))(
        moved, START, VALID
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_clusters_in_logit_space_are_those_of_xla():
    assert_kernels_cluster_as_xla_does()


@functools.partial(jax.jit, static_argnames="attention")
def evaluate(attention, given, cotangents):
    """Outputs that are differentiable, others, and gradients by name."""
    out, vjp, rest = jax.vjp(attention, given, has_aux=True)
    return out, rest, vjp(jax.tree.map(lambda x, d: d.astype(x.dtype), out, cotangents))[0]


def in_float32(given):
    return jax.tree.map(lambda x: x.astype(jnp.float32), given)


def assert_close(actual, expected, tolerance):
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        assert largest_error(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize(
    ("device", "num_subclusters", "topk", "has_bias", "head_dim", "value_dim"),
    [
        ("hopper", 1, 5, True, 16, 8),
        ("hopper", 2, 0, False, 100, 128),
        ("blackwell", 2, 11, True, 100, 128),
    ],
)
def test_centroid_attention_is_that_of_xla(
    device, num_subclusters, topk, has_bias, head_dim, value_dim
):
    num_heads, num_clusters, num_keys = 2, 3, 150
    # The last cluster is empty, and its centroid makes all keys alike.
    counts = jnp.arange(1, num_subclusters + 1) * jnp.array([[4], [7], [0]])
    subclusters = xla.Subclusters(jnp.zeros((1, 1), jnp.int32), counts)
    share = None if num_subclusters == 1 else jnp.stack([subclusters.share] * num_heads)
    given = {
        "centroids": normal(0, num_heads, num_clusters, num_subclusters, head_dim),
        "key": normal(1, 1, num_keys, head_dim, dtype=jnp.bfloat16),
        "value": normal(2, 1, num_keys, value_dim, dtype=jnp.bfloat16),
        "scale": jnp.float32(6 / head_dim**0.5),
    }
    given["centroids"] = given["centroids"].at[:, -1].set(0)
    if has_bias:
        bias = normal(3, num_heads, num_keys).at[:, ::3].set(xla.MASKED)
        given["bias"] = bias.at[1, 4:].set(xla.MASKED)  # fewer keys count than are chosen
    cotangents = (
        normal(4, num_heads, num_clusters, value_dim),
        normal(5, num_heads, num_clusters, num_subclusters),
    )

    def kernel(given):
        index, *out = centroid_attention.centroid_attention(
            given["centroids"],
            given["key"],
            given["value"],
            given.get("bias"),
            None,
            share,
            topk=topk,
            scale=given["scale"],
        )
        return tuple(out), index

    def plainly(given):
        def head(centroids, bias):
            keys = xla.Keys(given["key"][0], given["value"][0], bias, None)
            logits = xla.attention_logits(centroids, keys, given["scale"])
            index = jnp.zeros((num_clusters, 0), jnp.int32)
            if topk:
                ranks = jax.lax.stop_gradient(xla.rank_keys(logits, subclusters.share))
                index = largest(ranks, topk)
                _, logits = xla.split_keys(logits, index)
            return xla.attend_subclusters(logits, keys.value, subclusters.share), index

        return jax.vmap(head)(given["centroids"], given.get("bias"))

    (mean, lse), index, gradients = evaluate(kernel, given, cotangents)
    expected, expected_index, expected_gradients = evaluate(plainly, in_float32(given), cotangents)
    np.testing.assert_array_equal(jnp.sort(index), jnp.sort(expected_index))
    assert largest_error(mean, expected[0]) < 1e-2
    assert largest_error(lse, expected[1]) < 1e-4
    assert_close(gradients, expected_gradients, 2e-2)


@pytest.mark.parametrize(
    ("device", "merge", "topk"),
    [("hopper", "lse", 5), ("hopper", None, 5), ("blackwell", "mass", 40)],
)
def test_grouped_attention_is_that_of_xla(device, merge, topk):
    num_heads, num_tiles, num_clusters, value_dim = 2, 3, 4, 8
    given = {
        "query": normal(0, num_heads, num_tiles, 64, 16, dtype=jnp.bfloat16),
        "key": normal(1, num_heads, num_clusters, topk, 16, dtype=jnp.bfloat16),
        "value": normal(2, num_heads, num_clusters, topk, value_dim, dtype=jnp.bfloat16),
        "bias": normal(3, num_heads, num_clusters, topk).at[..., 0].set(xla.MASKED),
        "scale": jnp.float32(0.3),
    }
    if merge is not None:
        given["tail_mean"] = normal(4, num_heads, num_clusters, value_dim)
        given["tail_lse"] = normal(5, num_heads, num_tiles, 64) + 2
    if merge == "mass":
        given["top_lse"] = normal(6, num_heads, num_tiles, 64) + 2
    cluster = jnp.array([[0, 0, 2], [1, 3, 3]])  # one of them has no tiles
    cotangent = normal(7, num_heads, num_tiles, 64, value_dim)

    def kernel(given):
        return grouped_attention.grouped_attention(cluster=cluster, **given), ()

    def plainly(given):
        of_tile = jax.vmap(lambda x, cluster: x[cluster])
        keys = (of_tile(given[name], cluster) for name in ("key", "value", "bias"))
        keys = xla.Keys(*keys, None)
        top = xla.attend_keys(
            xla.attention_logits(given["query"], keys, given["scale"]), keys.value
        )
        if merge is None:
            return top.mean, ()
        mass = jax.nn.sigmoid(given.get("top_lse", top.lse) - given["tail_lse"])[..., None]
        return mass * top.mean + (1 - mass) * of_tile(given["tail_mean"], cluster)[:, :, None], ()

    rows, _, gradients = evaluate(kernel, given, cotangent)
    expected, _, expected_gradients = evaluate(plainly, in_float32(given), cotangent)
    assert largest_error(rows, expected) < 1e-2
    assert_close(gradients, expected_gradients, 2e-2)


@pytest.mark.parametrize(
    ("name", "settings"), [("everything", (7, "mass", 2)), ("topk_all", (24, "lse", 1))]
)
def test_attention_is_that_of_the_reference(name, settings):
    case = BY_NAME[name]
    inputs = make_inputs(case, jnp.bfloat16)

    def evaluate(implementation, dtype):
        arguments = jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (inputs, make_clusters(case), random_like_output(inputs), jnp.float32(0.4)),
        )
        (results,) = outputs_and_gradients(
            *arguments, settings=(settings,), implementation=implementation
        )
        return jax.tree.leaves(results)

    actual, expected = evaluate("pallas", jnp.bfloat16), evaluate("reference", jnp.float32)
    for each, exact in zip(actual, expected, strict=True):
        assert largest_error(each, exact) < 2e-2


def test_what_is_not_served_is_refused():
    inputs = make_inputs(BY_NAME["plain"])
    clusters = make_clusters(BY_NAME["plain"])
    with pytest.raises(NotImplementedError, match="for GPUs take bfloat16, not float32"):
        attend(*inputs[:3], clusters=clusters, implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"up to 128 clusters .* not 200 of 8"):
        cluster_queries(inputs.query, num_clusters=200, metric="euclidean", implementation="pallas")
