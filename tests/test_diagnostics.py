"""The diagnostics against dense float64 computations, and in models that run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import clustax
from clustax import ClusteredAttention, Clusters, baselines, diagnostics
from clustax.diagnostics import approximation_error, measure_layers, operations, recommend
from clustax.models import Encoder
from clustax.nnx import ClusteredMultiHeadAttention
from tests import oracle
from tests.cases import BY_NAME, Case, clusters_of, make_clusters, make_inputs

pytestmark = pytest.mark.once

EVERYTHING = BY_NAME["everything"]  # grouped heads, masks, biases of -inf, padding
LARGE = 1000  # a sample of all queries
ROUGH = ClusteredAttention(num_clusters=4, topk=3, num_iterations=2)


def with_junk(inputs):
    """NaN in all keys and values that are masked, and in padded queries."""
    keys = ~np.asarray(inputs.mask).any(axis=(0, 1, 2))[None, :]  # S, for all heads
    padded_keys = np.arange(inputs.key.shape[1]) >= inputs.key_value_seq_lengths[:, None]
    padded = np.arange(inputs.query.shape[1]) >= inputs.query_seq_lengths[:, None]
    junk = (keys | padded_keys)[..., None, None]
    return inputs._replace(
        query=jnp.where(padded[..., None, None], jnp.nan, inputs.query),
        key=jnp.where(junk, jnp.nan, inputs.key),
        value=jnp.where(junk, jnp.nan, inputs.value),
    )


def dense_weights(inputs, clusters=None, **settings):
    """The matrices (*B N T S) of clustered attention, or of exact attention without clusters."""
    num_keys, num_key_heads = inputs.key.shape[-3:-1]
    identity = np.broadcast_to(
        np.eye(num_keys)[:, None], (*inputs.key.shape[:-3], num_keys, num_key_heads, num_keys)
    )
    weights = oracle.attend(inputs._replace(value=identity), clusters, **settings)
    return np.swapaxes(weights, -3, -2)


def by_head(x):
    """Queries or keys (*B T N H) as float64 (*B N T H)."""
    return np.swapaxes(np.asarray(x, np.float64), -3, -2)


def lengths(inputs):
    return {
        "query_seq_lengths": inputs.query_seq_lengths,
        "key_value_seq_lengths": inputs.key_value_seq_lengths,
    }


@partial(jax.jit, static_argnames=("topk", "sample"))
def figures_at_sample(inputs, clusters, scale, topk, sample):
    """Mass and bounds."""
    arguments = (inputs.query, inputs.key, inputs.bias, inputs.mask)
    settings = {"clusters": clusters, "scale": scale, "sample": sample, **lengths(inputs)}
    return (
        diagnostics.kept_mass(*arguments, topk=topk, **settings),
        diagnostics.distance_bound(*arguments, **settings),
        diagnostics.improvement_bound(*arguments, topk=topk, **settings),
    )


def dense_figures(inputs, clusters, scale, topk):
    """Mass at centroids and queries, and both sides of both bounds, at all queries (*B N T)."""
    exact = dense_weights(inputs, scale=scale)
    clustered = dense_weights(inputs, clusters, scale=scale)
    improved = dense_weights(inputs, clusters, scale=scale, topk=topk)
    order = np.argsort(-clustered, axis=-1, kind="stable")[..., :topk]
    at_queries = np.take_along_axis(exact, order, axis=-1).sum(axis=-1)
    of_centroids = np.take_along_axis(clustered, order, axis=-1).sum(axis=-1)
    at_centroids = np.zeros(clusters.counts.shape)
    query, key = by_head(inputs.query), by_head(inputs.key)
    key = np.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
    bound = np.zeros(at_queries.shape)
    for head in np.ndindex(query.shape[:-2]):
        assignment = np.asarray(clusters.assignment)[head]
        keys = key[head][(exact[head] > 0).any(axis=0)]
        norm = np.linalg.norm(keys - keys.mean(axis=0), 2) if len(keys) else 0
        for cluster in np.unique(assignment[assignment < clusters.counts.shape[-1]]):
            members = np.flatnonzero(assignment == cluster)
            at_centroids[head][cluster] = of_centroids[head][members[0]]
            difference = query[head][members] - query[head][members].mean(axis=0)
            bound[head][members] = scale / 2 * np.linalg.norm(difference, axis=-1) * norm
    distance = (
        np.linalg.norm(exact - clustered, axis=-1),
        bound,
        np.abs(improved - exact).sum(axis=-1),
        np.abs(clustered - exact).sum(axis=-1),
    )
    return at_centroids, at_queries, *distance


@pytest.mark.parametrize(
    ("name", "topk"), [("everything", 5), ("plain", 0), ("padding_to_nothing", 24)]
)
def test_mass_and_bounds(name, topk):
    """Against dense figures: of all queries, and of a sample, which is drawn from valid ones."""
    case = BY_NAME[name]
    inputs, clusters = make_inputs(case), make_clusters(case)
    expected = dense_figures(inputs, clusters, 0.7, topk)
    given_inputs = with_junk(inputs) if name == "everything" else inputs
    for sample in (LARGE, 4) if name == "everything" else (LARGE,):
        mass, near, better = figures_at_sample(given_inputs, clusters, 0.7, topk, sample)
        positions = np.asarray(mass.positions)
        valid = np.arange(case.T) < np.reshape(case.query_lengths or (case.T,) * 2, (2, 1))
        for entry in range(2):
            found = positions[entry][positions[entry] < case.T]
            assert len(set(found)) == len(found) == min(sample, valid[entry].sum())
            assert valid[entry][found].all()
        np.testing.assert_allclose(mass.at_centroids, expected[0], atol=2e-6)
        actual = (mass.at_queries, near.measured, near.bound, better.measured, better.bound)
        for one, dense in zip(actual, expected[1:], strict=True):
            padded = np.concatenate([dense, np.zeros((*dense.shape[:-1], 1))], axis=-1)
            dense = np.take_along_axis(padded, positions[:, None], axis=-1)
            np.testing.assert_allclose(one, dense, rtol=1e-5, atol=2e-6)


def test_mass_of_sub_clusters():
    """Chosen and weighed by the mean of attention at their centroids."""
    case = BY_NAME["plain"]
    inputs, clusters = make_inputs(case), make_clusters(case)
    mass = diagnostics.kept_mass(
        inputs.query, inputs.key, clusters=clusters, topk=5, num_subclusters=3, sample=LARGE
    )
    clustered = dense_weights(inputs, clusters, num_subclusters=3)
    top = np.argsort(-clustered, axis=-1, kind="stable")[..., :5]
    at_queries = np.take_along_axis(dense_weights(inputs), top, axis=-1).sum(axis=-1)
    np.testing.assert_allclose(mass.at_queries, at_queries, rtol=1e-5)
    of_queries = np.take_along_axis(clustered, top, axis=-1).sum(axis=-1)
    at_centroids = np.take_along_axis(
        np.asarray(mass.at_centroids), np.asarray(clusters.assignment), axis=-1
    )
    np.testing.assert_allclose(at_centroids, of_queries, rtol=1e-5)


@given(
    seed=st.integers(0, 2**31 - 1),
    magnitude=st.sampled_from([0.1, 1.0, 5.0]),
    num_clusters=st.integers(1, 6),
    scale=st.sampled_from([-1.0, 0.3, 2.0]),
)
def test_propositions_hold(seed, magnitude, num_clusters, scale):
    case = Case("", T=12, S=10, H=4, K=1, C=6, bias="batch")
    inputs = make_inputs(case, seed=seed)
    inputs = inputs._replace(query=magnitude * inputs.query)
    assignment = np.random.default_rng(seed).integers(num_clusters, size=(2, 2, 12))
    _, *bounds = figures_at_sample(inputs, clusters_of(assignment, 6), scale, 3, LARGE)
    for measured, bound, _ in bounds:
        assert (measured <= bound + 1e-5).all()
        assert (bound > 0).any()


def dense_error(out, exact, query_lengths):
    """Relative error, cosine and largest error of the valid queries, each (*B N)."""
    found = np.zeros((3, *out.shape[:-3], out.shape[-2]))
    for entry, head in np.ndindex(found.shape[1:]):
        a, b = (x[entry][: query_lengths[entry], head] for x in (out, exact))
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        found[:, entry, head] = (
            np.linalg.norm(a - b) / np.linalg.norm(b),
            ((a * b).sum(axis=-1) / norms).mean(),
            np.abs(a - b).max(),
        )
    return found


def error_of(inputs, attention, sample=LARGE, **others):
    return approximation_error(
        *inputs[:5], attention=attention, sample=sample, **lengths(inputs), **others
    )


@pytest.mark.parametrize("sample", [LARGE, 6])
def test_approximation_error(sample):
    inputs = make_inputs(EVERYTHING)
    junk = with_junk(inputs)
    attention = ClusteredAttention(4, 3, "mass", num_subclusters=2, scale=0.7)
    clusters = attention.cluster(junk.query, junk.key, junk.mask, bias=junk.bias, **lengths(junk))
    out = oracle.attend(inputs, clusters, 3, "mass", 2, scale=0.7)
    exact = oracle.attend(inputs, scale=0.7)
    rows = [np.arange(length) for length in EVERYTHING.query_lengths]
    if sample < LARGE:
        positions = figures_at_sample(inputs, clusters, 0.7, 3, sample)[0].positions
        rows = np.asarray(positions)
    sampled = [
        np.stack([x[i][rows[i]] for i in range(2)]) if sample < LARGE else x for x in (out, exact)
    ]
    expected = dense_error(*sampled, [len(row) for row in rows])
    jitted = jax.jit(error_of, static_argnames=("attention", "sample"))
    actual = jitted(junk, attention, sample)
    assert expected[0].min() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)
    exact_settings = ClusteredAttention(num_clusters=4, topk=100, scale=0.7)
    assert error_of(junk, exact_settings).relative.max() < 1e-5


def test_any_attention_is_compared():
    """One that is off by a known factor, and takes no lengths."""
    inputs = make_inputs(BY_NAME["plain"])

    def off(query, key, value, bias=None, mask=None):
        assert bias is None
        assert mask is None
        return -1.5 * jax.nn.dot_product_attention(query, key, value)

    error = error_of(inputs, off, sample=5)
    np.testing.assert_allclose(error.relative, np.full((2, 2), 2.5), rtol=1e-5)
    np.testing.assert_allclose(error.cosine, np.full((2, 2), -1), rtol=1e-5)
    scaled = partial(jax.nn.dot_product_attention, scale=0.1)
    assert error_of(inputs, scaled, scale=0.1).relative.max() < 1e-5
    assert error_of(inputs, scaled).relative.min() > 0.1


def test_rounding_is_an_error():
    inputs = make_inputs(BY_NAME["plain"], jnp.bfloat16)
    error = error_of(inputs, jax.nn.dot_product_attention).relative
    assert error.dtype == jnp.float32
    assert 1e-4 < error.min() <= error.max() < 0.02


def test_nothing_to_compare_is_no_error():
    inputs = make_inputs(BY_NAME["padding_to_nothing"])  # no queries, and then no keys
    for figure, expected in zip(error_of(inputs, ROUGH), (0, 1, 0), strict=True):
        np.testing.assert_array_equal(figure, np.full((2, 2), expected))


def test_other_draws_are_other_samples():
    inputs = make_inputs(BY_NAME["plain"])
    errors = [error_of(inputs, ROUGH, 3, rng=jax.random.key(seed)).relative for seed in (0, 0, 1)]
    np.testing.assert_array_equal(errors[0], errors[1])
    assert (errors[0] != errors[2]).any()


def test_no_matrix_of_all_queries_and_keys_is_formed():
    length = 512
    query, key, value = jnp.ones((3, length, 1, 4))
    clusters = make_clusters(Case("", batch=(), T=length, N=1, C=4))

    def everything(query, key, value, clusters):
        return (
            approximation_error(query, key, value, attention=ROUGH, sample=8),
            diagnostics.kept_mass(query, key, clusters=clusters, topk=3, sample=8),
            diagnostics.distance_bound(query, key, clusters=clusters, sample=8),
            diagnostics.improvement_bound(query, key, clusters=clusters, topk=3, sample=8),
        )

    text = str(jax.make_jaxpr(everything)(query, key, value, clusters))
    assert f"{length},{length}" not in text
    assert f"8,{length}" in text


def test_attention_weights():
    inputs = make_inputs(EVERYTHING)
    junk, clusters = with_junk(inputs), make_clusters(EVERYTHING)
    arguments = (junk.query, junk.key, junk.bias, junk.mask)
    weights = partial(diagnostics.attention_weights, *arguments, **lengths(junk))
    exact = weights(attention=baselines.exact)
    np.testing.assert_allclose(exact, dense_weights(inputs), atol=2e-6)
    for merge in ("mass", "lse"):
        settings = {"topk": 3, "merge": merge}
        found = weights(attention=partial(clustax.attend, clusters=clusters, **settings))
        np.testing.assert_allclose(found, dense_weights(inputs, clusters, **settings), atol=2e-6)


def test_occupancy():
    counts = jnp.array([[[4, 0, 4, 0], [1, 2, 0, 5]], [[0, 0, 0, 0], [8, 0, 0, 0]]])
    found = diagnostics.occupancy(Clusters(jnp.zeros((2, 2, 8), int), counts))
    np.testing.assert_array_equal(found.empty, [[2, 1], [4, 3]])
    np.testing.assert_array_equal(found.smallest, [[4, 1], [0, 8]])
    np.testing.assert_array_equal(found.largest, [[4, 5], [0, 8]])
    np.testing.assert_allclose(found.mean, [[4, 8 / 3], [0, 8]], rtol=1e-6)
    entropy = -sum(share * np.log(share) for share in (1 / 8, 2 / 8, 5 / 8))
    np.testing.assert_allclose(found.effective, [[2, np.exp(entropy)], [0, 1]], rtol=1e-6)


def test_inertia():
    """In query space and in logit space, which is a mean over keys, with padding and masks."""
    case = EVERYTHING
    inputs, clusters = make_inputs(case), make_clusters(case)
    junk = with_junk(inputs)
    found = jax.jit(diagnostics.inertia)(
        junk.query, clusters=clusters, query_seq_lengths=junk.query_seq_lengths
    )
    of_logits = jax.jit(diagnostics.inertia)(
        junk.query, junk.key, clusters=clusters, mask=junk.mask, **lengths(junk)
    )
    query, key = by_head(inputs.query), by_head(inputs.key)
    for entry, head in np.ndindex(2, case.N):
        valid = case.query_lengths[entry]
        points = query[entry, head, :valid]
        assignment = np.asarray(clusters.assignment)[entry, head, :valid]
        expected = oracle.inertia(points, assignment, case.C, majority=False) / valid
        np.testing.assert_allclose(found[entry, head], expected, rtol=1e-5)
        keys = np.asarray(inputs.mask)[entry, head, 0] & (
            np.arange(case.S) < case.key_lengths[entry]
        )
        keys = key[entry, head * case.K // case.N, keys]
        logits = (points @ (keys - keys.mean(axis=0)).T) / np.sqrt(len(keys))
        expected = oracle.inertia(logits, assignment, case.C, majority=False) / valid
        np.testing.assert_allclose(of_logits[entry, head], expected, rtol=1e-3)  # has a ridge


def test_operations():
    """By hand, at T = 10, S = 20, H = 3 and V = 5."""
    count = partial(operations, num_queries=10, num_keys=20, head_dim=3, value_dim=5)
    assert count(None) == count(ClusteredAttention(num_clusters=10)) == 10 * 20 * 8
    short = [ClusteredAttention(num_clusters=4, exact_below=length) for length in (10, 11)]
    assert count(short[0]) == count(ClusteredAttention(num_clusters=4)) != count(short[1])
    assert count(short[1]) == count(None)
    paper = ClusteredAttention.paper(num_clusters=4, topk=0, num_bits=33, num_iterations=3)
    plain = 10 * 33 * 3 + 3 * 10 * 4 * 2 + 2 * 10 * 33 + 10 * 3 + 4 * 20 * 8
    assert count(paper) == plain
    default = ClusteredAttention(num_clusters=4, topk=100, num_iterations=3)
    kmeans = 3 * 10 * 4 * 3 + 2 * 10 * 3
    centroids = 4 * 20 * (4 * 3 + 5)  # four sub-clusters
    assert count(default) == 30 * 9 + kmeans + 10 * 3 + centroids + 10 * 20 * 8


def test_recommend():
    """The cheapest of all that meet the target, and nothing tried beyond it."""
    query, key, value = 2 * jax.random.normal(jax.random.key(0), (3, 64, 2, 4))
    grid = [
        ClusteredAttention(num_clusters=clusters, topk=topk, num_iterations=2)
        for topk in (8, 0)
        for clusters in (16, 4)
    ][:3]
    cost = {attention: operations(attention, 64, 64, 4, 4) for attention in grid}
    arguments = {"sample": LARGE, "rng": jax.random.key(1)}
    errors = {
        attention: float(
            approximation_error(query, key, value, attention=attention, **arguments).relative.mean()
        )
        for attention in grid
    }
    ordered = sorted(errors.values())
    find = partial(recommend, query, key, value, candidates=grid, **arguments)
    for target in (ordered[0], (ordered[1] + ordered[2]) / 2, 10):
        found = find(target_error=target)
        met = [attention for attention in grid if errors[attention] <= target]
        assert found.attention == min(met, key=cost.__getitem__)
        assert found.error.relative.mean() <= target
        assert found.operations == cost[found.attention]
        tried = sorted(cost, key=cost.__getitem__)
        assert [each.attention for each in found.tried] == tried[: len(found.tried)]
        assert found.tried[-1].attention == found.attention
        assert found.exact_operations == 64 * 64 * 8
        assert found.exact_is_cheaper == (found.operations >= 64 * 64 * 8)
    mixed = recommend(query, key, value.astype(jnp.bfloat16), target_error=10, candidates=grid)
    assert mixed.attention == min(grid, key=cost.__getitem__)
    best = min(errors, key=errors.__getitem__)
    with pytest.raises(ValueError, match=rf"3 candidates.*{ordered[0]:.3g}, of ClusteredAttention"):
        find(target_error=ordered[0] / 2)
    assert best.topk == 8
    with pytest.raises(ValueError, match="candidates must be at least one"):
        find(target_error=1, candidates=[])
    with pytest.raises(ValueError, match="target_error must be above 0"):
        find(target_error=0)


def test_mistakes_are_explained():
    query = jnp.ones((5, 1, 2))
    clusters = Clusters(jnp.zeros((1, 5), int), jnp.array([[5]]))
    with pytest.raises(ValueError, match="sample must be at least 1, got 0"):
        approximation_error(query, query, query, sample=0)
    with pytest.raises(ValueError, match="topk must be at least 0"):
        diagnostics.kept_mass(query, query, clusters=clusters, topk=-1)
    with pytest.raises(ValueError, match=r"clusters must be clustax\.Clusters"):
        diagnostics.inertia(query, clusters=query)
    with pytest.raises(ValueError, match="mask is about keys, got it without key"):
        diagnostics.inertia(query, clusters=clusters, mask=jnp.ones((1, 1, 5), bool))
    with pytest.raises(ValueError, match=r"clusters.assignment must have shape .* \(1, 4\)"):
        diagnostics.distance_bound(query[:4], query, clusters=clusters)


HIDDEN = jax.random.normal(jax.random.key(0), (2, 12, 8))
LENGTHS = jnp.array([12, 7])


def assert_equal_figures(actual, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected
    )


def figures_of(attention, query, key, value, **given):
    """What a layer's figures should be."""
    clusters = attention.cluster(
        query, key, given.get("mask"), **{k: v for k, v in given.items() if k != "mask"}
    )
    return diagnostics.LayerFigures(
        approximation_error(query, key, value, attention=attention, **given),
        diagnostics.occupancy(clusters),
        diagnostics.kept_mass(
            query,
            key,
            clusters=clusters,
            topk=attention.topk,
            num_subclusters=attention.num_subclusters,
            **given,
        ),
    )


def test_layers_of_an_encoder():
    """Measured where it runs, after another layer, under jit; not where it does not run."""
    encoder = Encoder(2, 8, 2, norm_first=True, rngs=nnx.Rngs(0))
    encoder.eval()
    encoder = encoder.with_attention([jax.nn.dot_product_attention, ROUGH])

    @nnx.jit
    def measure(encoder, hidden, lengths):
        measured = measure_layers(encoder, lambda model: model(hidden, lengths))
        query_key_value = encoder.projections(hidden, lengths, 1)
        given = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        return measured, encoder(hidden, lengths), figures_of(ROUGH, *query_key_value, **given)

    (out, layers), expected_out, expected = measure(encoder, HIDDEN, LENGTHS)
    np.testing.assert_allclose(out, expected_out, rtol=1e-4, atol=1e-5)
    assert layers[0] is None
    assert_equal_figures(layers[1], expected)
    assert layers[1].error.relative.min() > 1e-3
    assert encoder.attention_fns == (jax.nn.dot_product_attention, ROUGH)


def test_layers_of_flax():
    """``nnx.MultiHeadAttention`` with a float mask, as Flax makes them, under jit."""
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    mask = nnx.make_attention_mask(jnp.ones((2, 1)), jnp.arange(12) < LENGTHS[:, None])

    def measure(layer, hidden):
        return measure_layers(layer, lambda model: model(hidden, mask=mask), attention=ROUGH)

    out, (figures,) = nnx.jit(measure)(layer, HIDDEN)
    np.testing.assert_allclose(out, layer(HIDDEN, mask=mask), rtol=1e-4, atol=1e-5)
    arguments = (layer.query(HIDDEN), layer.key(HIDDEN), layer.value(HIDDEN))
    assert_equal_figures(figures, figures_of(ROUGH, *arguments, mask=mask > 0))
    assert layer.attention_fn is nnx.dot_product_attention
    with pytest.raises(ValueError, match="got 1 calls of other attentions; pass attention="):
        measure_layers(layer, lambda model: model(HIDDEN, mask=mask))
    with pytest.raises(NotImplementedError, match="is_causal"):
        measure_layers(layer, lambda model: model(HIDDEN, is_causal=True), attention=ROUGH)


def test_layers_that_share_clusters():
    """The figures are of the clusters that the model gives."""
    layer = ClusteredMultiHeadAttention(2, 8, attention=ROUGH, decode=False, rngs=nnx.Rngs(0))
    assignment = jnp.tile(jnp.array([0] * 9 + [1] * 3), (2, 1, 1))  # one head for both
    clusters = Clusters(assignment, jnp.tile(jnp.array([9, 3]), (2, 1, 1)))
    _, (figures,) = measure_layers(layer, lambda model: model(HIDDEN, clusters=clusters))
    np.testing.assert_array_equal(figures.occupancy.largest, np.full((2, 2), 9))
    own = measure_layers(layer, lambda model: model(HIDDEN, clusters=model.cluster(HIDDEN)))[1][0]
    assert_equal_figures(own, measure_layers(layer, lambda model: model(HIDDEN))[1][0])
