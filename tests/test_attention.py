"""``attend`` and ``clustered_attention`` of every implementation, on the shared cases."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustax
from clustax import masks, xla
from tests import oracle
from tests.cases import BY_NAME, CASES, clusters_of, make_clusters, make_inputs
from tests.conftest import IMPLEMENTATIONS
from tests.helpers import (
    as_numpy,
    attend,
    double,
    largest_error,
    outputs_and_gradients,
    random_like_output,
)

SCALE = 0.5  # not the default one


SOME_CASES = [BY_NAME[name] for name in ("plain", "multi_query_bias", "everything")]
# On other Pythons one has to do, of two settings: most of the time is compilation.
ANYWHERE = BY_NAME["multi_query_infinite_bias_per_head"]
OF_CASES = [
    pytest.param(case, marks=[] if case == ANYWHERE else pytest.mark.once) for case in CASES
]


def settings_of(case):
    """Both merges, or one where they are the same for want of a top or of a tail; sub-clusters.

    Each merge with and without sub-clusters for some cases; the others have every merge, and both.
    """
    if case.topk >= case.S:
        return ((case.topk, "mass", 1),)
    if case.topk == 0:
        return ((0, "mass", 1), (0, "mass", 3))
    merges = ((case.topk, "mass", 1), (case.topk, "lse", 3))
    others = ((case.topk, "lse", 1), (case.topk, "mass", 2))
    return (*merges, *others) if case in SOME_CASES else merges


def evaluate(case, inputs, implementation):
    """Outputs and gradients for random clusters and the settings of a case."""
    return outputs_and_gradients(
        inputs,
        make_clusters(case),
        random_like_output(inputs),
        jnp.asarray(SCALE, inputs.query.dtype),
        settings=settings_of(case),
        implementation=implementation,
    )


@functools.cache
def expected(case):
    """Outputs and gradients of the reference in float64, one pair a setting."""
    with jax.enable_x64(True):
        return as_numpy(evaluate(case, double(make_inputs(case)), "reference"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)  # varies fastest: they share `expected`
@pytest.mark.parametrize("case", OF_CASES, ids=str)
def test_outputs_and_gradients(case, implementation):
    inputs = make_inputs(case)
    evaluated = evaluate(case, inputs, implementation)
    for setting, (out, gradients), (expected_out, expected_gradients) in zip(
        settings_of(case), evaluated, expected(case), strict=True
    ):
        by_hand = oracle.attend(inputs, make_clusters(case), *setting, scale=SCALE)
        np.testing.assert_allclose(expected_out, by_hand, rtol=0, atol=1e-12)
        assert out.dtype == jnp.float32
        assert largest_error(out, by_hand) <= 1e-5, setting
        assert (gradients.bias is None) == (inputs.bias is None)
        for name, gradient in gradients._asdict().items():
            if gradient is not None:
                assert largest_error(gradient, getattr(expected_gradients, name)) <= 1e-4, name


@functools.partial(jax.jit, static_argnames=("settings", "implementation"))
def outputs(inputs, clusters, settings, implementation):
    def of(topk, merge, num_subclusters):
        return attend(
            inputs,
            clusters=clusters,
            topk=topk,
            merge=merge,
            num_subclusters=num_subclusters,
            implementation=implementation,
        )

    return [of(*setting) for setting in settings]


@pytest.mark.once
@pytest.mark.parametrize(
    ("case", "dtype", "implementation"),
    [
        *((case, jnp.bfloat16, "xla") for case in CASES),
        *((case, jnp.float16, "xla") for case in SOME_CASES),
        *((case, jnp.bfloat16, "pallas") for case in SOME_CASES),
        *((case, jnp.bfloat16, "reference") for case in SOME_CASES),
        *((case, jnp.float16, "reference") for case in SOME_CASES),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_half_precision_is_as_accurate_as_exact_attention(case, dtype, implementation):
    inputs, clusters, settings = make_inputs(case, dtype), make_clusters(case), settings_of(case)
    exact_error = np.abs(as_numpy(exact_attention(inputs)) - oracle.attend(inputs)).max()
    for setting, out in zip(
        settings, outputs(inputs, clusters, settings, implementation), strict=True
    ):
        assert out.dtype == dtype
        by_hand = oracle.attend(inputs, clusters, *setting)
        assert np.abs(as_numpy(out) - by_hand).max() <= 2 * exact_error


@jax.jit
def exact_attention(inputs):
    """What ``jax.nn.dot_product_attention`` computes; it knows fewer batch axes and needs H = V."""
    query, key, value = inputs[:3]
    num_heads, num_keys = query.shape[-2], key.shape[-3]
    key, value = (jnp.repeat(x, num_heads // x.shape[-2], axis=-2) for x in (key, value))
    logits = jnp.einsum("...tnh,...snh->...nts", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if inputs.bias is not None:
        logits += inputs.bias
    if inputs.mask is not None:
        logits = jnp.where(inputs.mask, logits, -jnp.inf)
    if inputs.key_value_seq_lengths is not None:
        lengths = inputs.key_value_seq_lengths[..., None, None, None]
        logits = jnp.where(jnp.arange(num_keys) < lengths, logits, -jnp.inf)
    some = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
    weights = jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0.0)), 0.0).astype(value.dtype)
    out = jnp.einsum("...nts,...snv->...tnv", weights, value)
    if inputs.query_seq_lengths is not None:
        lengths = inputs.query_seq_lengths[..., None, None, None]
        out = jnp.where(jnp.arange(out.shape[-3])[:, None, None] < lengths, out, 0)
    return out


@pytest.mark.once
@pytest.mark.parametrize("implementation", ["xla", "reference"])  # kernels take no float64
@pytest.mark.parametrize("argument", ["query", "key", "value", "bias", "scale"])
def test_gradients_equal_finite_differences(argument, implementation):
    case = BY_NAME["everything"]
    clusters, settings = make_clusters(case), settings_of(case)
    with jax.enable_x64(True):
        inputs = double(make_inputs(case))
        cotangent = random_like_output(inputs)

        def evaluate(step):
            moved, scale = inputs, jnp.asarray(SCALE)
            if argument == "scale":
                scale += step
            else:
                moved = inputs._replace(**{argument: getattr(inputs, argument) + step})
            return outputs_and_gradients(
                moved, clusters, cotangent, scale, settings=settings, implementation=implementation
            )

        shape = () if argument == "scale" else getattr(inputs, argument).shape
        direction = np.random.default_rng(2).standard_normal(shape)
        for (_, gradients), (forward, _), (backward, _) in zip(
            evaluate(0 * direction),
            evaluate(1e-5 * direction),
            evaluate(-1e-5 * direction),
            strict=True,
        ):
            slope = jnp.vdot(cotangent, forward - backward) / 2e-5
            expected = np.vdot(getattr(gradients, argument), direction)
            assert abs(expected) > 0.1
            np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.once
def test_scale_is_by_default_one_over_root_of_head_dim(implementation):
    case = BY_NAME["plain"]
    inputs = make_inputs(case)
    call = functools.partial(
        attend, inputs, clusters=make_clusters(case), topk=case.topk, implementation=implementation
    )
    np.testing.assert_array_equal(call(), call(scale=case.H**-0.5))
    assert np.abs(call() - call(scale=1.0)).max() > 0.1


@pytest.mark.once
@pytest.mark.parametrize("space", ["query", "logit"])
@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
def test_clustered_attention_clusters_and_attends(metric, space):
    inputs = make_inputs(BY_NAME["everything"])
    rng = jax.random.key(3)
    lengths = {
        "query_seq_lengths": inputs.query_seq_lengths,
        "key_value_seq_lengths": inputs.key_value_seq_lengths,
    }
    clusters = clustax.cluster_queries(
        inputs.query,
        num_clusters=5,
        num_bits=40,
        num_iterations=4,
        metric=metric,
        rng=rng,
        query_seq_lengths=inputs.query_seq_lengths,
        **(
            {
                "key": inputs.key,
                "mask": masks.without_biased_out(inputs.mask, inputs.bias),
                "key_value_seq_lengths": inputs.key_value_seq_lengths,
            }
            if space == "logit"
            else {}
        ),
    )
    expected = attend(inputs, clusters=clusters, topk=6, merge="lse", scale=SCALE)
    out = clustax.clustered_attention(
        *inputs[:5],
        num_clusters=5,
        topk=6,
        merge="lse",
        scale=SCALE,
        num_bits=40,
        num_iterations=4,
        metric=metric,
        space=space,
        rng=rng,
        **lengths,
    )
    np.testing.assert_array_equal(out, expected)
    by_hand = oracle.attend(inputs, clusters, topk=6, merge="lse", scale=SCALE)
    assert largest_error(out, by_hand) <= 1e-5


@pytest.mark.once
def test_keys_biased_out_have_no_influence_on_clusters():
    """A bias by -inf is as good as a mask, whatever the keys hold."""
    inputs = make_inputs(BY_NAME["plain"])
    left_out = np.arange(inputs.key.shape[-3]) % 3 == 1
    bias = jnp.where(left_out, -jnp.inf, 0.5)[None, None, None]
    holding = lambda x, what: jnp.where(left_out[:, None, None], what, x)  # noqa: E731
    attention = clustax.ClusteredAttention(num_clusters=5, topk=4)
    expected = attention(*inputs[:3], mask=~left_out[None, None, None])
    for what in (0, 1e4, jnp.nan):
        key, value = holding(inputs.key, what), holding(inputs.value, what)
        np.testing.assert_allclose(
            attention(inputs.query, key, value, bias), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.once
def test_no_gradient_flows_through_clustering():
    inputs = make_inputs(BY_NAME["plain"])
    settings = {"num_clusters": 5, "num_iterations": 4, "metric": "euclidean"}
    clusters = clustax.cluster_queries(inputs.query, inputs.key, **settings)

    def loss(attention):
        return lambda *args: jnp.sum(attention(*args) ** 2)

    through = loss(
        functools.partial(clustax.clustered_attention, topk=6, space="logit", **settings)
    )
    fixed = loss(functools.partial(clustax.attend, clusters=clusters, topk=6))
    for gradient, expected in zip(
        *(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*inputs[:3]) for f in (through, fixed)),
        strict=True,
    ):
        assert largest_error(gradient, expected) <= 1e-6


@pytest.mark.once
def test_padding_is_left_out_of_given_clusters(implementation):
    """Clusters that were made without lengths serve a call with lengths."""
    case = BY_NAME["padding"]
    inputs = make_inputs(case)
    everyone = np.random.default_rng(4).integers(case.C, size=(2, case.N, case.T))
    left_out = np.where(
        np.arange(case.T) < np.reshape(case.query_lengths, (2, 1, 1)), everyone, case.C
    )
    settings = {"topk": case.topk, "implementation": implementation}
    np.testing.assert_array_equal(
        attend(inputs, clusters=clusters_of(everyone, case.C), **settings),
        attend(inputs, clusters=clusters_of(left_out, case.C), **settings),
    )
    # Queries that belong to no cluster are padding without being said to be.
    unsaid = inputs._replace(query_seq_lengths=None)
    np.testing.assert_array_equal(
        attend(unsaid, clusters=clusters_of(left_out, case.C), **settings),
        attend(inputs, clusters=clusters_of(left_out, case.C), **settings),
    )


@pytest.mark.once
def test_equal_logits_go_to_the_first_keys(implementation):
    """The top-k keys of a centroid at zero are the first k."""
    half = np.random.default_rng(5).standard_normal((4, 1, 8))
    query = jnp.asarray(np.concatenate([half, -half]), jnp.float32)
    inputs = make_inputs(BY_NAME["no_batch_axis_cross"])
    inputs = inputs._replace(query=query, key=inputs.key[:, :1], value=inputs.value[:, :1])
    clusters = clusters_of(np.tile(np.arange(4), 2)[None], 4)  # a query and its opposite
    out = attend(inputs, clusters=clusters, topk=6, implementation=implementation)
    assert largest_error(out, oracle.attend(inputs, clusters, topk=6)) <= 1e-5


@pytest.mark.once
@pytest.mark.parametrize("num_clusters", [3, 40_000])  # many of them sort in another way
def test_tiles_hold_each_query_once_with_its_cluster(num_clusters):
    num_queries = 60_000 if num_clusters > 3 else 50
    assignment = np.random.default_rng(8).integers(num_clusters + 1, size=num_queries)
    clusters = clusters_of(assignment, num_clusters)
    tiles = jax.tree.map(np.asarray, jax.jit(xla.tile_queries)(*clusters))
    assert tiles.query.shape[0] == len(tiles.cluster)
    slots = tiles.query.reshape(-1)
    filled = np.flatnonzero(slots < num_queries)
    valid = np.flatnonzero(assignment < num_clusters)
    np.testing.assert_array_equal(np.sort(slots[filled]), valid)
    np.testing.assert_array_equal(
        tiles.cluster[filled // tiles.query.shape[1]], assignment[slots[filled]]
    )
    np.testing.assert_array_equal(slots[tiles.slot[valid]], valid)
    assert (tiles.slot[assignment == num_clusters] >= slots.size).all()


@pytest.mark.parametrize("x64", [False, True])
def test_counting_finds_the_places_that_sorting_does(x64):
    with jax.enable_x64(x64):
        places = list(find_places())
    for found, counts, assignment in places:
        assert found.dtype == np.int32
        for cluster in range(5):
            np.testing.assert_array_equal(found[assignment == cluster], np.arange(counts[cluster]))


def find_places():
    assignment = np.random.default_rng(9).integers(6, size=1000, dtype=np.int32)
    counts = np.bincount(assignment, minlength=6)[:5]
    starts = jnp.asarray(np.cumsum(counts) - counts, jnp.int32)
    for find in (xla._places_by_sorting, xla._places_by_counting):
        yield np.asarray(find(jnp.asarray(assignment), starts)), counts, assignment


@pytest.mark.once
def test_clusters_are_attended_to_in_blocks(monkeypatch):
    """Where one head needs more memory than a CPU should touch at once."""
    case = BY_NAME["everything"]
    jax.clear_caches()
    monkeypatch.setattr("clustax.heads.CPU_BYTES_IN_BLOCK", 8 * case.S)  # two clusters, or one
    inputs = make_inputs(case)
    evaluated = evaluate(case, inputs, "xla")
    jax.clear_caches()
    for (out, gradients), (expected_out, expected_gradients) in zip(
        evaluated, expected(case), strict=True
    ):
        assert largest_error(out, expected_out) <= 1e-5
        for gradient, each in zip(gradients, expected_gradients, strict=True):
            assert gradient is None or largest_error(gradient, each) <= 1e-4


@pytest.mark.once
def test_accelerators_get_the_same_outputs_and_gradients(accelerator):
    """All heads at once, as accelerators take them."""
    case = BY_NAME["everything"]
    evaluated = evaluate(case, make_inputs(case), "xla")
    for (out, gradients), (expected_out, expected_gradients) in zip(
        evaluated, expected(case), strict=True
    ):
        assert largest_error(out, expected_out) <= 1e-5
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert largest_error(gradient, expected_gradient) <= 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_of_half_precision_are_moved_as_float32_on_a_tpu(dtype):
    index = jnp.array([[1], [0], [3]])

    def moved(x):
        return xla.scatter_rows(xla.take_rows(x, index)[:, 0], index[:, 0], 4)

    x = jnp.arange(8, dtype=dtype).reshape(4, 2)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(moved(x).astype(jnp.float32) ** 2)))
    np.testing.assert_array_equal(moved(x), x.at[2].set(0))
    np.testing.assert_array_equal(gradient(x), 2 * x.at[2].set(0))
    program = gradient.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    operands = re.findall(r'"stablehlo\.scatter"[\s\S]*?\}\) : \((.*?)\) ->', program)
    assert len(operands) == 2
    assert all(each.count("xf32>") == 2 for each in operands)
