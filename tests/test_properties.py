"""What holds for any inputs: limits that are exact, invariances, bounds, and what has no influence.

All tests share one shape, with every argument given, so that one program serves them all.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clustax
from tests import oracle
from tests.cases import Inputs, clusters_of
from tests.helpers import as_numpy, largest_error, outputs_and_gradients, random_like_output

B, T, S, N, K, H, V, C = 2, 12, 10, 2, 1, 4, 10, 12  # C = T, and V = S for values that show weights
SCALE = H**-0.5
# k, how top and tail are merged, and the number of sub-clusters

pytestmark = pytest.mark.once

EXACT = [(S, "mass", 1), (S, "lse", 1)]
IMPROVED = [(3, "mass", 1), (3, "lse", 1)]
PLAIN = [(0, "mass", 1)]
SPLIT = [(0, "mass", 2), (3, "mass", 2), (3, "lse", 3)]
ALL = (*PLAIN, *IMPROVED, *SPLIT, *EXACT)
JUNK = st.sampled_from([np.nan, np.inf, -np.inf, 1e38])


class Problem(NamedTuple):
    inputs: Inputs  # NumPy arrays, all of them given
    assignment: np.ndarray
    drawn: str  # what it was made from

    def __repr__(self):
        return f"<problem {self.drawn}>"

    def run(self, setting, implementation, **replaced):
        """Outputs and gradients."""
        inputs = self.inputs._replace(**replaced)
        inputs = Inputs(*map(jnp.asarray, inputs))
        evaluated = outputs_and_gradients(
            inputs,
            clusters_of(self.assignment, C),
            random_like_output(inputs),
            jnp.float32(SCALE),
            settings=ALL,
            implementation=implementation,
        )
        return as_numpy(evaluated[ALL.index(setting)])

    def centroids(self):
        """The centroid of its cluster in place of each query."""
        query = np.array(self.inputs.query, np.float64)
        for entry, head in np.ndindex(B, N):
            for cluster in np.unique(self.assignment[entry, head]):
                members = self.assignment[entry, head] == cluster
                query[entry, members, head] = query[entry, members, head].mean(axis=0)
        return query


@st.composite
def problems(draw, *, full=False, masked=True):
    """Random problems; ``full`` ones have no padding, ``masked`` ones a mask and biases of -inf."""
    seed = draw(st.integers(0, 2**31 - 1))
    magnitude = draw(st.sampled_from([0.3, 1.0, 4.0]))
    num_clusters = draw(st.sampled_from([1, 2, 4]))
    mask_of_heads = draw(st.booleans())
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    mask = np.ones((B, N, 1, S), bool)
    bias = normal(B, N, 1, S)
    if masked:
        mask &= rng.random((B, N if mask_of_heads else 1, 1, S)) < 0.7
        bias[rng.random(bias.shape) < 0.2] = -np.inf
    lowest = (T, S) if full else (1, 1)
    lengths = rng.integers(lowest, (T + 1, S + 1), size=(B, 2)).T
    inputs = Inputs(
        magnitude * normal(B, T, N, H),
        normal(B, S, K, H),
        normal(B, S, K, V),
        bias,
        mask,
        *lengths,
    )
    assignment = rng.integers(num_clusters, size=(B, N, T))
    valid = np.arange(T) < np.reshape(inputs.query_seq_lengths, (B, 1, 1))
    drawn = f"{seed=} {magnitude=} {num_clusters=} {mask_of_heads=} {full=} {masked=}"
    return Problem(inputs, np.where(valid, assignment, C), drawn)


def counted(inputs):
    """Which keys count for which head, (B, N, S)."""
    positions = np.arange(S) < np.reshape(inputs.key_value_seq_lengths, (B, 1, 1))
    return inputs.mask[:, :, 0] & (inputs.bias[:, :, 0] > -np.inf) & positions


def attending(inputs):
    """Which queries are valid and have keys that count, (B, T, N): the sums of their weights."""
    valid = np.arange(T) < inputs.query_seq_lengths[:, None]
    return (valid[..., None] & counted(inputs).any(axis=-1)[:, None]).astype(float)


def showing_weights():
    """Values for which outputs are attention matrices."""
    return np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, S, K, V)).copy()


def settings(*choices):
    return st.sampled_from(functools.reduce(operator.iadd, choices, []))


@given(problem=problems(), setting=settings(EXACT))
def test_topk_of_all_keys_is_exact_attention(implementation, problem, setting):
    out, _ = problem.run(setting, implementation)
    assert largest_error(out, oracle.attend(problem.inputs, scale=SCALE)) <= 1e-5


@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT))
def test_one_query_per_cluster_is_exact_attention(implementation, problem, setting):
    order = np.random.default_rng(0).permutation(T)
    alone = problem._replace(assignment=np.where(problem.assignment < C, order, C))
    out, _ = alone.run(setting, implementation)
    assert largest_error(out, oracle.attend(problem.inputs, scale=SCALE)) <= 1e-5


@pytest.mark.parametrize("num_clusters", [T, T + 1])
@pytest.mark.parametrize(("metric", "space"), [("hamming", "query"), ("euclidean", "logit")])
def test_as_many_clusters_as_queries_are_exact_attention(
    implementation, metric, space, num_clusters
):
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, B, T, N, H))
    out = clustax.clustered_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value)),
        num_clusters=num_clusters,
        metric=metric,
        space=space,
        implementation=implementation,
    )
    inputs = Inputs(query, key, value, None, None, None, None)
    assert largest_error(out, oracle.attend(inputs)) <= 1e-5


@given(problem=problems())
def test_topk_of_no_keys_is_exact_attention_of_centroids(implementation, problem):
    out, _ = problem.run((0, "mass", 1), implementation)
    at_centroids = problem.inputs._replace(query=problem.centroids())
    assert largest_error(out, oracle.attend(at_centroids, scale=SCALE)) <= 1e-5


@given(problem=problems(full=True), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_order_of_keys_does_not_matter(implementation, problem, setting):
    order = np.random.default_rng(0).permutation(S)
    inputs = problem.inputs
    out, gradients = problem.run(setting, implementation)
    moved_out, moved = problem.run(
        setting,
        implementation,
        key=inputs.key[:, order],
        value=inputs.value[:, order],
        bias=inputs.bias[..., order],
        mask=inputs.mask[..., order],
    )
    assert largest_error(moved_out, out) <= 1e-5
    assert largest_error(moved.query, gradients.query) <= 1e-4
    assert largest_error(moved.key, gradients.key[:, order]) <= 1e-4
    assert largest_error(moved.bias, gradients.bias[..., order]) <= 1e-4


@given(problem=problems(full=True), setting=settings(PLAIN, IMPROVED, EXACT))
def test_order_of_queries_is_that_of_outputs(implementation, problem, setting):
    order = np.random.default_rng(0).permutation(T)
    out, _ = problem.run(setting, implementation)
    moved = problem._replace(assignment=problem.assignment[..., order])
    moved_out, _ = moved.run(setting, implementation, query=problem.inputs.query[:, order])
    assert largest_error(moved_out, out[:, order]) <= 1e-5


@given(problem=problems(full=True), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_names_of_clusters_do_not_matter(implementation, problem, setting):
    names = np.random.default_rng(0).permutation(C)
    out, _ = problem.run(setting, implementation)
    renamed = problem._replace(assignment=names[problem.assignment])
    assert largest_error(renamed.run(setting, implementation)[0], out) <= 1e-5


@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT), junk=JUNK)
def test_masked_keys_have_no_influence(implementation, problem, setting, junk):
    inputs = problem.inputs
    for_any = counted(inputs).any(axis=1)[..., None, None]  # B S 1 1: the heads share their keys
    masked = inputs._replace(mask=counted(inputs)[:, :, None])
    dropped = problem._replace(inputs=masked).run(
        setting,
        implementation,
        key=np.where(for_any, inputs.key, 0),
        value=np.where(for_any, inputs.value, 0),
        bias=np.where(counted(inputs)[:, :, None], inputs.bias, 0),
    )
    junked = problem._replace(inputs=masked).run(
        setting,
        implementation,
        key=np.where(for_any, inputs.key, np.float32(junk)),
        value=np.where(for_any, inputs.value, np.float32(junk)),
        bias=np.where(counted(inputs)[:, :, None], inputs.bias, np.float32(junk)),
    )
    as_given = problem.run(setting, implementation)
    for x, y, z in zip(
        (dropped[0], *dropped[1]), (junked[0], *junked[1]), (as_given[0], *as_given[1]), strict=True
    ):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(z, x)
    _, gradients = junked
    for gradient in (gradients.key, gradients.value):
        np.testing.assert_array_equal(gradient[~for_any[..., 0, 0]], 0)
    np.testing.assert_array_equal(gradients.bias[:, :, 0][~counted(inputs)], 0)


@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT), junk=JUNK)
def test_padded_queries_get_zeros_and_have_no_influence(implementation, problem, setting, junk):
    inputs = problem.inputs
    padded = np.arange(T) >= inputs.query_seq_lengths[:, None]  # B T
    expected = problem.run(setting, implementation)
    out, gradients = problem.run(
        setting,
        implementation,
        query=np.where(padded[..., None, None], np.float32(junk), inputs.query),
    )
    for x, y in zip((out, *gradients), (expected[0], *expected[1]), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(out[padded], 0)
    np.testing.assert_array_equal(gradients.query[padded], 0)


@pytest.mark.parametrize("by", ["mask", "bias", "key_value_seq_lengths", "all"])
@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_queries_without_keys_get_zeros(implementation, by, problem, setting):
    inputs = problem.inputs
    none = {
        "mask": np.zeros_like(inputs.mask),
        "bias": np.full_like(inputs.bias, -np.inf),
        "key_value_seq_lengths": np.zeros_like(inputs.key_value_seq_lengths),
    }
    replaced = none if by == "all" else {by: none[by]}
    out, gradients = problem.run(setting, implementation, **replaced)
    for x in (out, *gradients):
        np.testing.assert_array_equal(x, 0)


@given(problem=problems(), setting=settings(IMPROVED, SPLIT[1:]))
def test_all_keys_of_the_tail_masked_is_exact_attention(implementation, problem, setting):
    mask = np.zeros_like(problem.inputs.mask)
    mask[..., [1, 4, 5]] = True  # no more than k
    out, _ = problem.run(setting, implementation, mask=mask)
    expected = oracle.attend(problem.inputs._replace(mask=mask), scale=SCALE)
    assert largest_error(out, expected) <= 1e-5


@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_lowest_number_as_bias_is_weaker_than_a_mask(implementation, problem, setting):
    """Libraries mask by adding the lowest finite number. Masked keys still have no influence."""
    lowest = np.full_like(problem.inputs.bias, np.finfo(np.float32).min)
    out, _ = problem.run(setting, implementation, bias=lowest, value=showing_weights())
    np.testing.assert_allclose(
        out.sum(axis=-1), attending(problem.inputs._replace(bias=lowest)), atol=1e-5
    )


@given(problem=problems(masked=False))
def test_proposition_1(implementation, problem):
    """Attention weights move by no more than queries times the spectral norm of the keys."""
    inputs = problem.inputs
    exact, _ = problem.run((S, "mass", 1), implementation, value=showing_weights())
    plain, _ = problem.run((0, "mass", 1), implementation, value=showing_weights())
    centroids = problem.centroids()
    for entry, head in np.ndindex(B, N):
        valid = inputs.query_seq_lengths[entry]
        keys = inputs.key[entry, : inputs.key_value_seq_lengths[entry], 0]
        lipschitz = (
            0.5 * SCALE * np.linalg.norm(keys, 2)
        )  # the softmax itself has a constant of 1/2
        query, weights = inputs.query[entry, :valid, head], exact[entry, :valid, head]
        moved = np.linalg.norm(weights[:, None] - weights, axis=-1)
        apart = np.linalg.norm(query[:, None] - query, axis=-1)
        assert (moved <= lipschitz * apart + 1e-5).all()
        off_centre = np.linalg.norm(query - centroids[entry, :valid, head], axis=-1)
        moved = np.linalg.norm(weights - plain[entry, :valid, head], axis=-1)
        assert (moved <= lipschitz * off_centre + 1e-5).all()


@given(problem=problems())
def test_proposition_2(implementation, problem):
    """Exact logits of the top-k keys take no query's weights further from the exact ones, in L1."""
    exact, plain, improved = (
        problem.run(setting, implementation, value=showing_weights())[0]
        for setting in ((S, "mass", 1), (0, "mass", 1), (3, "mass", 1))
    )
    error, plain_error = (np.abs(x - exact).sum(axis=-1) for x in (improved, plain))
    assert (error <= plain_error + 1e-5).all()


@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_weights_are_a_distribution_over_the_keys_that_count(implementation, problem, setting):
    out, _ = problem.run(setting, implementation, value=showing_weights())
    keys = np.broadcast_to(counted(problem.inputs)[:, None], out.shape)
    assert (out >= 0).all()
    np.testing.assert_array_equal(out[~keys], 0)
    np.testing.assert_allclose(out.sum(axis=-1), attending(problem.inputs), atol=1e-5)


@given(problem=problems())
def test_merges_agree_where_queries_are_their_centroids(implementation, problem):
    query = problem.centroids().astype(np.float32)
    mass, lse = (problem.run(setting, implementation, query=query)[0] for setting in IMPROVED)
    assert largest_error(mass, lse) <= 1e-5
    exact = oracle.attend(problem.inputs._replace(query=query), scale=SCALE)
    assert largest_error(mass, exact) <= 1e-5


@given(problem=problems(full=True), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_equal_queries_get_equal_exact_outputs(implementation, problem, setting):
    query = np.broadcast_to(problem.inputs.query[:, :1], problem.inputs.query.shape)
    one = problem._replace(assignment=np.zeros_like(problem.assignment))
    out, _ = one.run(setting, implementation, query=query)
    exact = oracle.attend(problem.inputs._replace(query=query), scale=SCALE)
    assert largest_error(out, exact) <= 1e-5


@pytest.mark.parametrize("magnitude", [1e4, 1e9, 1e17])
@given(problem=problems(), setting=settings(PLAIN, IMPROVED, SPLIT, EXACT))
def test_huge_logits_do_not_overflow(implementation, magnitude, problem, setting):
    query, key = (np.float32(magnitude) * x for x in (problem.inputs.query, problem.inputs.key))
    out, gradients = problem.run(
        setting, implementation, query=query, key=key, value=showing_weights()
    )
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out.sum(axis=-1), attending(problem.inputs), atol=1e-5)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
