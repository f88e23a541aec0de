"""Kernels for Hopper GPUs, interpreted on a CPU, against the XLA implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from clustax import attend, cluster_queries, kernels, kmeans, lsh, xla
from clustax.implementations import choose
from clustax.kernels.hopper import centroid_attention, grouped_attention
from clustax.kernels.hopper import kmeans as hopper_kmeans
from clustax.topk import largest
from tests.cases import BY_NAME, make_clusters, make_inputs
from tests.helpers import largest_error, outputs_and_gradients, random_like_output

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of this version of JAX has no matrix products of Hopper GPUs",
)


@pytest.fixture(autouse=True)
def hopper_kernels():
    with kernels.interpret("hopper"):
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
    actual = hopper_kmeans.hamming(codes, START, VALID, **settings)
    expected = jax.vmap(lambda *args: kmeans.hamming(*args, **settings))(codes, START, VALID)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_euclidean_kmeans_is_that_of_xla():
    points = normal(0, 2, 150, 7).at[1, 97:].set(jnp.nan)
    actual = hopper_kmeans.euclidean(points, START, VALID, num_iterations=4)
    expected = jax.vmap(lambda *args: kmeans.euclidean(*args, num_iterations=4))(
        points, START, VALID
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_centroids_may_start_at_padding():
    points, start = normal(0, 2, 150, 7), START.at[1, 2].set(140)
    actual = hopper_kmeans.euclidean(points, start, VALID, num_iterations=3)
    expected = jax.vmap(lambda *args: kmeans.euclidean(*args, num_iterations=3))(
        points, start, VALID
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("num_subclusters", "topk", "has_addend"), [(1, 5, True), (1, 0, False), (2, 11, True)]
)
def test_centroid_attention_is_that_of_xla(num_subclusters, topk, has_addend):
    num_heads, num_clusters, num_keys = 2, 3, 150
    centroids = 2 * normal(0, num_heads, num_clusters, num_subclusters, 16)
    key, value = normal(1, 1, num_keys, 16, dtype=jnp.bfloat16), normal(2, 1, num_keys, 8)
    value = value.astype(jnp.bfloat16)
    addend = None
    if has_addend:
        addend = normal(3, num_heads, num_keys).at[:, ::3].set(xla.MASKED)
        addend = addend.at[1, 4:].set(xla.MASKED)  # fewer keys count than are chosen
    # The last cluster is empty, and its centroid makes all keys alike.
    centroids = centroids.at[:, -1].set(0)
    counts = jnp.arange(1, num_subclusters + 1) * jnp.array([[4], [7], [0]])
    subclusters = xla.Subclusters(jnp.zeros((1, 1), jnp.int32), counts)
    share = None if num_subclusters == 1 else jnp.stack([subclusters.share] * num_heads)
    index, mean, lse = centroid_attention.centroid_attention(
        centroids, key, value, addend, None, share, topk=topk, scale=1.0
    )

    def expected(head):
        keys = jax.tree.map(lambda x: x[0].astype(jnp.float32), xla.Keys(key, value, None, None))
        keys = keys._replace(bias=None if addend is None else addend[head])
        logits = xla.attention_logits(centroids[head], keys, 1.0)
        index = jnp.zeros((num_clusters, 0), jnp.int32)
        if topk:
            index = largest(xla.rank_keys(logits, subclusters.share), topk)
            _, logits = xla.split_keys(logits, index)
        return index, *xla.attend_subclusters(logits, keys.value, subclusters.share)

    expected_index, expected_mean, expected_lse = map(
        jnp.stack, zip(*map(expected, range(num_heads)), strict=True)
    )
    np.testing.assert_array_equal(jnp.sort(index), jnp.sort(expected_index))
    assert largest_error(mean, expected_mean) < 1e-2
    assert largest_error(lse, expected_lse) < 1e-4


@pytest.mark.parametrize(("merge", "topk"), [("lse", 5), ("mass", 40), (None, 5)])
def test_grouped_attention_is_that_of_xla(merge, topk):
    num_heads, num_tiles, num_clusters, value_dim = 2, 3, 4, 8
    query = normal(0, num_heads, num_tiles, 64, 16, dtype=jnp.bfloat16)
    key = normal(1, num_heads, num_clusters, topk, 16, dtype=jnp.bfloat16)
    value = normal(2, num_heads, num_clusters, topk, value_dim, dtype=jnp.bfloat16)
    addend = normal(3, num_heads, num_clusters, topk).at[..., 0].set(xla.MASKED)
    cluster = jnp.array([[0, 0, 2], [1, 3, 3]])
    tail_mean = normal(4, num_heads, num_clusters, value_dim)
    tail_lse = normal(5, num_heads, num_tiles, 64) + 2
    top_lse = normal(6, num_heads, num_tiles, 64) + 2 if merge == "mass" else None
    rows = grouped_attention.grouped_attention(
        query,
        cluster,
        key,
        value,
        addend,
        None,
        *((tail_mean, tail_lse, top_lse) if merge else ()),
        scale=0.3,
    )

    of_tile = jax.vmap(lambda x, cluster: x[cluster])
    values = of_tile(value, cluster).astype(jnp.float32)
    keys = xla.Keys(of_tile(key, cluster), values, of_tile(addend, cluster), None)
    top = xla.attend_keys(xla.attention_logits(query, keys, 0.3), keys.value)
    expected = top.mean
    if merge:
        mass = jax.nn.sigmoid((top.lse if top_lse is None else top_lse) - tail_lse)[..., None]
        expected = mass * expected + (1 - mass) * of_tile(tail_mean, cluster)[:, :, None]
    assert largest_error(rows, expected) < 1e-2


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


def test_they_have_to_be_asked_for():
    assert choose("pallas").name == choose(("pallas", "xla")).name == "pallas"
    assert "asked for" in choose().refused["pallas"]


def test_what_is_not_served_is_refused():
    inputs = make_inputs(BY_NAME["plain"])
    clusters = make_clusters(BY_NAME["plain"])
    with pytest.raises(NotImplementedError, match="for GPUs take bfloat16, not float32"):
        attend(*inputs[:3], clusters=clusters, implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"up to 128 clusters .* not 200 of 8"):
        cluster_queries(inputs.query, num_clusters=200, metric="euclidean", implementation="pallas")
