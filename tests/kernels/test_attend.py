"""What attention by kernels has to hold besides what the core suite asks of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustax import Clusters, attend, kernels
from clustax.kernels.attend import _take
from clustax.kernels.common import sum_runs
from tests.cases import BY_NAME, make_clusters, make_inputs
from tests.helpers import outputs_and_gradients, random_like_output, sizes_of

HEAD_DIM, CLUSTERS, TOPK = 8, 100, 32
on_gpus = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="this version of JAX does not interpret kernels for GPUs"
)


@pytest.mark.parametrize(
    ("device", "merge", "length", "dtype"),
    [
        ("tpu", "mass", 4096, jnp.float32),
        ("tpu", "lse", 4096, jnp.float32),
        pytest.param("hopper", "lse", 2**16, jnp.bfloat16, marks=on_gpus),  # dims are at least 64
    ],
)
def test_no_array_is_quadratic(device, merge, length, dtype):
    """Not even one of T·C elements, and on the chip none of the size of a sequence."""

    def loss(query, key, value, clusters):
        settings = {"topk": TOPK, "merge": merge, "num_subclusters": 4}
        out = attend(query, key, value, clusters=clusters, implementation="pallas", **settings)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    shape = jax.ShapeDtypeStruct((length, 1, HEAD_DIM), dtype)
    clusters = Clusters(
        jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, CLUSTERS), jnp.int32)
    )
    with kernels.interpret(device):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        jaxpr = gradient.trace(*(shape,) * 3, clusters).jaxpr
    sizes = list(sizes_of(jaxpr.jaxpr))
    assert CLUSTERS * TOPK * HEAD_DIM in sizes  # the keys of all clusters: inner programs are seen
    assert length * HEAD_DIM < max(sizes) < length * min(CLUSTERS, TOPK * HEAD_DIM)


@pytest.mark.once
def test_two_runs_are_bitwise_equal():
    inputs = make_inputs(BY_NAME["everything"])
    evaluate = functools.partial(
        outputs_and_gradients,
        inputs,
        make_clusters(BY_NAME["everything"]),
        random_like_output(inputs),
        jnp.float32(0.5),
        settings=((6, "lse", 3),),
        implementation="pallas",
    )
    with kernels.interpret("tpu"):
        jax.tree.map(np.testing.assert_array_equal, evaluate(), evaluate())


@pytest.mark.once
def test_gradients_of_taken_rows_are_summed():
    index = jnp.array([[2, 0, 2, 2], [1, 1, 1, 0]])
    rows, vjp = jax.vjp(lambda x: _take(x, index), jnp.arange(12.0).reshape(2, 3, 2))
    np.testing.assert_array_equal(rows[0, :, 0], [4, 0, 4, 4])
    (gradient,) = vjp(jnp.arange(1.0, 17.0).reshape(2, 4, 2))
    np.testing.assert_array_equal(gradient[..., 0], [[3, 0, 1 + 5 + 7], [15, 9 + 11 + 13, 0]])


@pytest.mark.once
@pytest.mark.parametrize("device", ["tpu", "hopper"])
def test_sums_of_runs(device):
    index = jnp.array([0, 0, 2, 3, 3, 3, 3, 6])
    rows = jnp.arange(1.0, 17.0).reshape(8, 2)
    with kernels.interpret(device):
        sums, vjp = jax.vjp(lambda rows: sum_runs(rows, index, 7), rows)
    np.testing.assert_array_equal(sums[:, 0], [1 + 3, 0, 5, 7 + 9 + 11 + 13, 0, 0, 15])
    cotangent = jnp.arange(14.0).reshape(7, 2)
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent[index])


@pytest.mark.once
def test_heads_are_not_mixed_by_vmap():
    case = BY_NAME["plain"]
    inputs, clusters = make_inputs(case), make_clusters(case)
    call = functools.partial(attend, topk=6, implementation="pallas")
    with kernels.interpret("tpu"):
        together = call(*inputs[:3], clusters=clusters)
        apart = jax.vmap(lambda q, k, v, clusters: call(q, k, v, clusters=clusters))(
            *inputs[:3], clusters
        )
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-6)
