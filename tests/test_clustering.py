"""``cluster_codes``, ``cluster_queries``, and K-means below them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster
from hypothesis import given
from hypothesis import strategies as st

import clustax
from clustax import kernels, kmeans, lsh
from clustax.clustering import _dot_by_parts, key_covariance, to_logit_space
from clustax.heads import map_heads
from tests import oracle
from tests.cases import BY_NAME, make_inputs

BATCH, HEADS, LENGTH, CLUSTERS = 2, 2, 40, 6
LENGTHS = np.array([40, 23])
SEEDS = st.integers(0, 2**31 - 1)


def random_codes(seed, num_bits):
    """Packed codes, and their bits. Few bits make for many ties and equal codes."""
    bits = np.random.default_rng(seed).random((BATCH, HEADS, LENGTH, num_bits)) < 0.5
    return lsh.pack_bits(jnp.asarray(bits), axis=-1), bits


def random_positions(seed):
    """Positions of valid queries; some of them may be the same, which leaves clusters empty."""
    return np.random.default_rng(seed).integers(LENGTHS.min(), size=CLUSTERS)


def by_hand(points, start, num_iterations, majority):
    """The assignments of all batch entries and heads."""
    assignment = np.zeros(points.shape[:3], int)
    for entry, head in np.ndindex(*points.shape[:2]):
        assignment[entry, head] = oracle.kmeans(
            points[entry, head],
            start,
            LENGTHS[entry],
            num_iterations=num_iterations,
            majority=majority,
        )
    return assignment


def assert_counts(clusters, num_clusters=CLUSTERS):
    """Counts are those of the assignment, which has C in place of padding."""
    for row, counts, length in zip(
        np.asarray(clusters.assignment).reshape(-1, LENGTH),
        np.asarray(clusters.counts).reshape(-1, num_clusters),
        np.repeat(LENGTHS, HEADS),
        strict=True,
    ):
        assert (row[:length] < num_clusters).all()
        assert (row >= 0).all()
        assert (row[length:] == num_clusters).all()
        np.testing.assert_array_equal(np.bincount(row[:length], minlength=num_clusters), counts)
        assert counts.sum() == length


@pytest.mark.parametrize("num_bits", [4, 40])
@given(seed=SEEDS)
def test_codes_are_clustered_as_by_hand(implementation, num_bits, seed):
    codes, bits = random_codes(seed, num_bits)
    start = random_positions(seed)
    clusters = clustax.cluster_codes(
        codes,
        num_bits=num_bits,
        num_clusters=CLUSTERS,
        num_iterations=4,
        initial_positions=jnp.asarray(start),
        query_seq_lengths=jnp.asarray(LENGTHS),
        implementation=implementation,
    )
    expected = by_hand(bits, start, num_iterations=4, majority=True)
    np.testing.assert_array_equal(clusters.assignment, expected)
    assert clusters.assignment.dtype == clusters.counts.dtype == jnp.int32
    assert_counts(clusters)


def test_cases_with_ties_and_empty_clusters_are_among_those():
    """What makes the test above worth running."""
    empty = ties = 0
    for seed in range(10):
        _, bits = random_codes(seed, num_bits=4)
        assignment = by_hand(bits, random_positions(seed), num_iterations=4, majority=True)
        empty += np.setdiff1d(np.arange(CLUSTERS), assignment[0, 0]).size
        for cluster in range(CLUSTERS):
            members = bits[0, 0][assignment[0, 0] == cluster]
            ties += (members.mean(axis=0) == 0.5).sum() if len(members) else 0
    assert empty > 0
    assert ties > 0


def cluster_points(points, start, implementation):
    return clustax.cluster_queries(
        jnp.asarray(points).swapaxes(1, 2),
        num_clusters=CLUSTERS,
        num_iterations=4,
        metric="euclidean",
        initial_positions=jnp.asarray(start),
        query_seq_lengths=jnp.asarray(LENGTHS),
        implementation=implementation,
    )


@given(seed=SEEDS)
def test_points_are_clustered_as_by_hand(implementation, seed):
    """Well separated points: their clusters do not hang on rounding."""
    rng = np.random.default_rng(seed)
    centres = 20 * rng.standard_normal((CLUSTERS, 3))
    points = centres[rng.integers(CLUSTERS, size=(BATCH, HEADS, LENGTH))]
    points = (points + rng.standard_normal(points.shape)).astype(np.float32)
    start = random_positions(seed)
    clusters = cluster_points(points, start, implementation)
    expected = by_hand(points, start, num_iterations=4, majority=False)
    np.testing.assert_array_equal(clusters.assignment, expected)
    assert_counts(clusters)


def test_random_points_are_clustered_as_well_as_by_hand(implementation):
    points = np.random.default_rng(0).standard_normal((BATCH, HEADS, LENGTH, 3)).astype(np.float32)
    start = random_positions(1)
    clusters = cluster_points(points, start, implementation)
    expected = by_hand(points, start, num_iterations=4, majority=False)
    for entry, head in np.ndindex(BATCH, HEADS):
        cost, cost_by_hand = (
            oracle.inertia(points[entry, head], assignment[entry, head], CLUSTERS, majority=False)
            for assignment in (clusters.assignment, expected)
        )
        np.testing.assert_allclose(cost, cost_by_hand, rtol=0.01)


@pytest.mark.once
@given(seed=SEEDS, metric=st.sampled_from(["hamming", "euclidean"]))
def test_cost_never_rises(seed, metric):
    query = jnp.asarray(
        np.random.default_rng(seed).standard_normal((BATCH, LENGTH, HEADS, 3)), jnp.float32
    )
    planes = lsh.hash_planes(jax.random.key(seed), num_bits=9, head_dim=3)
    points = jnp.swapaxes(query, 1, 2)
    if metric == "hamming":
        points = oracle.unpack(clustax.hash_codes(query, planes), 9)
    costs = []
    for num_iterations in (1, 2, 4, 10):
        clusters = clustax.cluster_queries(
            query,
            num_clusters=CLUSTERS,
            num_iterations=num_iterations,
            metric=metric,
            planes=planes if metric == "hamming" else None,
            query_seq_lengths=jnp.asarray(LENGTHS),
        )
        costs.append(
            [
                oracle.inertia(
                    points[entry, head],
                    clusters.assignment[entry, head],
                    CLUSTERS,
                    metric == "hamming",
                )
                for entry, head in np.ndindex(BATCH, HEADS)
            ]
        )
    assert (np.diff(costs, axis=0) <= 1e-4).all()


@pytest.mark.once
def test_accelerators_find_the_same_nearest_centroids(accelerator):
    """A minimum over all centroids at once in place of a loop over them."""
    codes, bits = random_codes(0, num_bits=4)
    centroids = codes[0, 1, :CLUSTERS]
    distances = (bits[0, 0][:, None] != bits[0, 1][:CLUSTERS]).sum(axis=-1)
    assert (np.sort(distances, axis=1)[:, 0] == np.sort(distances, axis=1)[:, 1]).any()
    nearest, distance = kmeans._nearest_code(codes[0, 0], centroids)
    np.testing.assert_array_equal(nearest, distances.argmin(axis=1))
    np.testing.assert_array_equal(distance, distances.min(axis=1))

    points = np.random.default_rng(0).integers(-2, 3, size=(LENGTH, 2)).astype(np.float32)
    distances = ((points[:, None] - points[:CLUSTERS]) ** 2).sum(axis=-1)
    assert (np.sort(distances, axis=1)[:, 0] == np.sort(distances, axis=1)[:, 1]).any()
    nearest, distance = kmeans._nearest_point(jnp.asarray(points), jnp.asarray(points[:CLUSTERS]))
    np.testing.assert_array_equal(nearest, distances.argmin(axis=1))
    np.testing.assert_array_equal(distance, distances.min(axis=1))


@pytest.mark.once
def test_cpus_find_the_nearest_centroids():
    test_accelerators_find_the_same_nearest_centroids(None)


@pytest.mark.once
@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
def test_accelerators_find_the_same_clusters(metric, request):
    inputs = make_inputs(BY_NAME["everything"])
    cluster = functools.partial(
        clustax.cluster_queries,
        inputs.query,
        inputs.key,
        num_clusters=5,
        metric=metric,
        query_seq_lengths=inputs.query_seq_lengths,
    )
    expected = cluster()
    request.getfixturevalue("accelerator")
    clusters = cluster()
    np.testing.assert_array_equal(clusters.assignment, expected.assignment)
    np.testing.assert_array_equal(clusters.counts, expected.counts)


@pytest.mark.once
@pytest.mark.parametrize("num_iterations", [3, 5, 10])
@pytest.mark.parametrize("num_clusters", [25, 100])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_inertia_of_real_queries_is_that_of_scikit_learn(num_clusters, num_iterations):
    """From one start and with as many iterations; both start empty clusters anew."""
    query = np.load(Path(__file__).parent / "golden" / "minilm.npz")["query"].astype(np.float32)
    start = np.random.default_rng(0).integers(100, size=num_clusters)  # some come twice
    assert len(np.unique(start)) < num_clusters
    clusters = clustax.cluster_queries(
        jnp.asarray(query),
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        metric="euclidean",
        initial_positions=jnp.asarray(start),
    )
    assert (clusters.counts > 0).all()
    for head in range(query.shape[1]):
        points = query[:, head]
        rival = sklearn.cluster.KMeans(
            num_clusters, init=points[start], n_init=1, max_iter=num_iterations - 1, tol=0
        ).fit(points)
        inertia, rivals_inertia = (
            oracle.inertia(points, assignment, num_clusters, majority=False)
            for assignment in (clusters.assignment[head], rival.labels_)
        )
        assert inertia <= 1.03 * rivals_inertia


@pytest.mark.once
@pytest.mark.parametrize("head_bytes", [1, 2 * 2**20, 2**30])
def test_heads_are_mapped_one_or_more_at_a_time(head_bytes):
    x = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    y = {"a": jnp.arange(6.0).reshape(2, 3)}

    def head(x, y):
        return {"out": jnp.sin(x) * y["a"]}

    def mapped(x, y):
        return map_heads(head, x, y, head_bytes=head_bytes)["out"]

    np.testing.assert_allclose(mapped(x, y), jnp.sin(x) * y["a"][..., None], rtol=1e-6)
    gradient = jax.grad(lambda x: mapped(x, y).sum())(x)
    np.testing.assert_allclose(gradient, jnp.cos(x) * y["a"][..., None], rtol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("head_bytes", [1, 2**19, 2**30])
def test_heads_are_mapped_wherever_their_axis_is(head_bytes):
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal(())  # B T N H
    y, none = rng.standard_normal((2, 4, 7)), None  # B N S

    def head(scale, x, y, none):  # T H, S
        assert none is None
        return scale * jnp.outer(y, jnp.sin(x).sum(axis=1))  # S T

    def mapped(scale, x, y):
        settings = {"in_axes": (2, 1, 1), "out_axis": 3, "head_bytes": head_bytes}
        return map_heads(head, x, y, none, shared=(scale,), **settings)

    def at_once(scale, x, y):
        return scale * jnp.einsum("bns,btnh->bstn", y, jnp.sin(x))

    given = [jnp.asarray(array, jnp.float32) for array in (scale, x, y)]
    np.testing.assert_allclose(mapped(*given), at_once(*given), rtol=1e-5, atol=1e-6)
    found, expected = (
        jax.grad(lambda *args, f=f: jnp.sum(f(*args) ** 2), (0, 1, 2))(*given)
        for f in (mapped, at_once)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )
    tangents = [jnp.ones_like(array) for array in given]
    found, expected = (jax.jvp(f, given, tangents)[1] for f in (mapped, at_once))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head_bytes", "loops"), [(2**10, 0), (2**26, 1)])
def test_a_tpu_takes_heads_in_turn_where_they_are_large(head_bytes, loops):
    mapped = jax.jit(functools.partial(map_heads, jnp.sin, head_bytes=head_bytes))
    program = mapped.trace(jnp.ones((2, 3, 4))).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("stablehlo.while") == loops


@pytest.mark.once
@pytest.mark.parametrize("width", [16, 32])
def test_ones_are_counted_in_fields_of_any_width(width):
    """Sequences of 2^16 and more codes need fields of 32 bits, shorter ones 16."""
    codes, bits = random_codes(0, num_bits=40)
    assignment = np.random.default_rng(0).integers(CLUSTERS + 1, size=LENGTH)
    ones = kmeans._count_ones(
        kmeans._spread(codes[0, 0], width), jnp.asarray(assignment, jnp.int32), CLUSTERS, 40, width
    )
    expected = [bits[0, 0][assignment == cluster].sum(axis=0) for cluster in range(CLUSTERS)]
    np.testing.assert_array_equal(ones, expected)


@pytest.mark.once
@pytest.mark.parametrize("length", [2**16 - 1, 2**16 + 4])
def test_majorities_of_long_clusters_do_not_overflow(length):
    """Nearly all codes are 1, and both centroids start there: the first one gets all and keeps the
    ones; the second one starts anew at a zero.
    """
    codes = (jnp.arange(length) >= 3).astype(jnp.uint32)[:, None]
    cluster = functools.partial(kmeans.hamming, num_bits=1, num_iterations=2)
    _, counts = jax.jit(cluster)(codes, jnp.array([5, 6]), jnp.ones(length, bool))
    assert counts.tolist() == [length - 3, 3]


@pytest.mark.once
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padding_starts_no_centroid_whatever_it_holds(implementation):
    query = np.random.default_rng(0).standard_normal((1, LENGTH, 2, 3)).astype(np.float32)
    settings = {
        "num_clusters": 3,
        "num_iterations": 2,
        "metric": "euclidean",
        "query_seq_lengths": jnp.array([12]),
        "implementation": implementation,
    }
    expected = clustax.cluster_queries(
        jnp.asarray(query), initial_positions=jnp.array([11, 3, 11]), **settings
    )
    query[:, 12:] = np.nan
    clusters = clustax.cluster_queries(
        jnp.asarray(query), initial_positions=jnp.array([30, 3, 12]), **settings
    )
    np.testing.assert_array_equal(clusters.assignment, expected.assignment)
    assert (clusters.counts[:, :, 1] > 0).all()


@pytest.mark.once
def test_bits_beyond_the_last_one_do_not_count():
    codes, bits = random_codes(0, num_bits=64)
    settings = {
        "num_bits": 40,
        "num_clusters": CLUSTERS,
        "initial_positions": random_positions(0),
        "query_seq_lengths": LENGTHS,
    }
    expected = clustax.cluster_codes(
        lsh.pack_bits(jnp.asarray(bits[..., :40]), axis=-1), **settings
    )
    found = clustax.cluster_codes(codes, **settings)
    np.testing.assert_array_equal(found.assignment, expected.assignment)


def test_planes_say_how_many_bits_there_are(monkeypatch):
    """What decides whether a kernel serves the call, too."""
    query = make_inputs(BY_NAME["plain"]).query
    planes = lsh.hash_planes(jax.random.key(0), num_bits=200, head_dim=query.shape[-1])
    widths = []

    def refusal(length, width, dtype, num_clusters):
        widths.append((length, width, num_clusters))
        return "it is not asked for"

    kernel = type("Kernel", (), {"refusal": staticmethod(refusal)})
    monkeypatch.setattr("clustax.kernels.of", lambda _: kernel)
    refused = pytest.raises(NotImplementedError, match="it is not asked for")
    with kernels.interpret("tpu"), refused:
        clustax.cluster_queries(query, num_clusters=5, planes=planes, implementation="pallas")
    assert widths == [(query.shape[-3], 7, 5)]


@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
def test_more_clusters_than_queries_need_no_points(metric, monkeypatch):
    monkeypatch.setattr("clustax.clustering.to_logit_space", None)
    monkeypatch.setattr("clustax.lsh.hash_planes", None)
    query, key = jnp.zeros((2, 3, 1, 4)), jnp.zeros((2, 50, 1, 4))
    clusters = clustax.cluster_queries(query, key, num_clusters=9, metric=metric)
    np.testing.assert_array_equal(clusters.assignment, [[[0, 1, 2]]] * 2)
    np.testing.assert_array_equal(clusters.counts, [[[1, 1, 1]]] * 2)


@pytest.mark.once
def test_start_is_where_it_is_told():
    """One assignment, to the queries at the positions that are given."""
    query = jnp.asarray(np.random.default_rng(0).standard_normal((LENGTH, 2, 3)), jnp.float32)
    start = np.array([7, 3, 30])
    clusters = clustax.cluster_queries(
        query,
        num_clusters=3,
        num_iterations=1,
        metric="euclidean",
        initial_positions=jnp.asarray(start),
    )
    for head in range(2):
        points = np.asarray(query[:, head])
        distances = ((points[:, None] - points[start]) ** 2).sum(axis=-1)
        np.testing.assert_array_equal(clusters.assignment[head], distances.argmin(axis=1))
        np.testing.assert_array_equal(clusters.assignment[head, start], [0, 1, 2])


def cluster_some(rng, **settings):
    query = make_inputs(BY_NAME["plain"]).query
    return np.asarray(
        clustax.cluster_queries(query, num_clusters=5, rng=rng, **settings).assignment
    )


@pytest.mark.once
@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
def test_clusters_depend_on_the_rng_alone(metric):
    cluster = functools.partial(cluster_some, metric=metric)
    np.testing.assert_array_equal(cluster(None), cluster(jax.random.key(0)))
    np.testing.assert_array_equal(cluster(jax.random.key(7)), cluster(jax.random.key(7)))
    np.testing.assert_array_equal(cluster(jax.random.key(7)), cluster(jax.random.PRNGKey(7)))
    assert (cluster(jax.random.key(7)) != cluster(jax.random.key(8))).any()


@pytest.mark.once
def test_rng_moves_both_planes_and_start():
    query = make_inputs(BY_NAME["plain"]).query
    planes = lsh.hash_planes(jax.random.key(0), num_bits=64, head_dim=query.shape[-1])
    start = jnp.arange(5)
    for fixed in ({"planes": planes}, {"initial_positions": start}):
        assert (
            cluster_some(jax.random.key(1), **fixed) != cluster_some(jax.random.key(2), **fixed)
        ).any()
    both = {"planes": planes, "initial_positions": start}
    np.testing.assert_array_equal(
        cluster_some(jax.random.key(1), **both), cluster_some(jax.random.key(2), **both)
    )


@given(seed=SEEDS)
def test_start_is_spread_over_the_valid_queries(seed):
    """With as many groups of neighbours as clusters, each group becomes a cluster."""
    groups = np.repeat(np.arange(4), 5)
    query = jnp.asarray(np.concatenate([10 * groups, np.full(20, 1e6)]), jnp.float32)
    clusters = clustax.cluster_queries(
        query.reshape(40, 1, 1),
        num_clusters=4,
        num_iterations=1,
        metric="euclidean",
        query_seq_lengths=jnp.asarray(20),
        rng=jax.random.key(seed),
    )
    np.testing.assert_array_equal(clusters.assignment[0, :20], groups)
    np.testing.assert_array_equal(clusters.counts[0], 5)


@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
@pytest.mark.parametrize("num_clusters", [10, 13])
def test_each_query_is_a_cluster_where_there_are_enough(num_clusters, metric, implementation):
    query = make_inputs(BY_NAME["more_clusters_than_queries"]).query  # T = 10
    clusters = clustax.cluster_queries(
        query,
        num_clusters=num_clusters,
        metric=metric,
        query_seq_lengths=jnp.array([10, 6]),
        implementation=implementation,
    )
    assert clusters.assignment.dtype == clusters.counts.dtype == jnp.int32
    assert clusters.counts.shape == (2, 2, 10)
    for entry, length in enumerate([10, 6]):
        expected = np.where(np.arange(10) < length, np.arange(10), 10)
        np.testing.assert_array_equal(clusters.assignment[entry], np.stack([expected] * 2))
        np.testing.assert_array_equal(clusters.counts[entry], np.stack([expected < 10] * 2))


@pytest.mark.once
@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
def test_padded_queries_have_no_influence(metric):
    case = BY_NAME["padding"]
    inputs = make_inputs(case)
    padded = np.arange(case.T)[:, None, None] >= np.reshape(case.query_lengths, (2, 1, 1, 1))
    cluster = functools.partial(
        clustax.cluster_queries,
        num_clusters=case.C,
        metric=metric,
        query_seq_lengths=inputs.query_seq_lengths,
        key=inputs.key,
    )
    expected = cluster(inputs.query)
    for junk in (np.nan, np.inf, 1e30):
        clusters = cluster(jnp.where(padded, junk, inputs.query))
        np.testing.assert_array_equal(clusters.assignment, expected.assignment)
        np.testing.assert_array_equal(clusters.counts, expected.counts)
    # Nor has their number: a shorter batch entry is clustered as if it was alone.
    alone = clustax.cluster_queries(
        inputs.query[1, :13], inputs.key[1], num_clusters=case.C, metric=metric
    )
    np.testing.assert_array_equal(alone.assignment, expected.assignment[1, :, :13])


@pytest.mark.once
@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("metric", ["hamming", "euclidean"])
def test_fewer_valid_queries_than_clusters(metric, length):
    query = make_inputs(BY_NAME["plain"]).query
    clusters = clustax.cluster_queries(
        query, num_clusters=5, metric=metric, query_seq_lengths=jnp.full(2, length)
    )
    assert (np.asarray(clusters.assignment[..., :length]) < 5).all()
    assert (np.asarray(clusters.assignment[..., length:]) == 5).all()
    np.testing.assert_array_equal(clusters.counts.sum(axis=-1), length)


def _multiply_as_matrix_units_do(x, y, precision):
    assert precision == jax.lax.Precision.DEFAULT
    x, y = (jax.lax.reduce_precision(each, exponent_bits=8, mantissa_bits=7) for each in (x, y))
    return x @ y


class TestLogitSpace:
    """Distances between queries that are distances between their logits."""

    @given(seed=SEEDS)
    def test_distances_are_those_between_centred_logits(self, seed):
        rng = np.random.default_rng(seed)
        query = rng.standard_normal((2, 9, 4, 5))
        key = rng.standard_normal((2, 30, 2, 5)) @ rng.standard_normal((5, 5)) + 3
        transformed = to_logit_space(
            jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32), None, None
        )
        for entry, head in np.ndindex(2, 4):
            logits = query[entry, :, head] @ key[entry, :, head // 2].T  # T S
            logits = logits - logits.mean(axis=1, keepdims=True)
            expected = ((logits[:, None] - logits) ** 2).mean(axis=-1)
            points = np.asarray(transformed[entry, :, head], np.float64)
            distances = ((points[:, None] - points) ** 2).sum(axis=-1)
            np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-4 * expected.max())

    def test_bfloat16_is_as_far_apart_as_the_same_in_float32(self):
        rng = np.random.default_rng(0)
        query, key = (
            jnp.asarray(rng.standard_normal((1, length, 2, 5)) + 3, jnp.bfloat16)
            for length in (9, 30)
        )
        expected = to_logit_space(query.astype(jnp.float32), key.astype(jnp.float32), None, None)
        found = to_logit_space(query, key, None, None)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_products_by_parts_are_exact_in_matrix_units(self, monkeypatch):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((9, 5)), jnp.bfloat16).astype(jnp.float32)
        y = jnp.asarray(rng.standard_normal((5, 5)), jnp.float32)
        expected = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
        monkeypatch.setattr(jnp, "matmul", _multiply_as_matrix_units_do)
        np.testing.assert_allclose(_dot_by_parts(x, y), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.once
    @pytest.mark.parametrize("metric", ["hamming", "euclidean"])
    def test_what_no_key_sees_does_not_count(self, metric):
        """The first axis makes groups of queries, the others are loud but all keys are 0 there."""
        rng = np.random.default_rng(0)
        groups = rng.integers(2, size=64)
        query = np.concatenate(
            [4.0 * groups[:, None] - 2, 50 * rng.standard_normal((64, 7))], axis=1
        )
        key = np.zeros((20, 8))
        key[:, 0] = rng.standard_normal(20)
        query, key = (jnp.asarray(x[:, None], jnp.float32) for x in (query, key))
        cluster = functools.partial(clustax.cluster_queries, query, num_clusters=2, metric=metric)

        def agreement(clusters):
            share = (np.asarray(clusters.assignment[0]) == groups).mean()
            return max(share, 1 - share)

        assert agreement(cluster(key=key)) > 0.95
        assert agreement(cluster()) < 0.8

    @pytest.mark.once
    @pytest.mark.parametrize("metric", ["hamming", "euclidean"])
    def test_masked_keys_have_no_influence(self, metric):
        inputs = make_inputs(BY_NAME["everything"])
        lengths = inputs.key_value_seq_lengths
        cluster = functools.partial(
            clustax.cluster_queries,
            inputs.query,
            num_clusters=5,
            metric=metric,
            mask=inputs.mask[:, :1],
            key_value_seq_lengths=lengths,
        )
        expected = cluster(inputs.key)
        counted = inputs.mask[:, 0, 0] & (jnp.arange(30) < lengths[:, None])
        for junk in (np.nan, np.inf, 1e30):
            clusters = cluster(jnp.where(counted[..., None, None], inputs.key, junk))
            np.testing.assert_array_equal(clusters.assignment, expected.assignment)
        for entry in range(2):  # as if there were no others
            alone = clustax.cluster_queries(
                inputs.query[entry],
                inputs.key[entry][np.asarray(counted[entry])],
                num_clusters=5,
                metric=metric,
            )
            np.testing.assert_array_equal(alone.assignment, expected.assignment[entry])

    @pytest.mark.parametrize("metric", ["hamming", "euclidean"])
    def test_what_all_queries_have_in_common_does_not_count(self, metric):
        """It is the same for all logits of a key."""
        inputs = make_inputs(BY_NAME["plain"])
        cluster = functools.partial(
            clustax.cluster_queries, key=inputs.key, num_clusters=5, metric=metric
        )
        np.testing.assert_array_equal(
            cluster(inputs.query + 4).assignment, cluster(inputs.query).assignment
        )

    @pytest.mark.once
    def test_each_head_has_a_mask_of_its_own(self):
        inputs = make_inputs(BY_NAME["everything"])
        clusters = clustax.cluster_queries(
            inputs.query, inputs.key, mask=inputs.mask, num_clusters=5, metric="euclidean"
        )
        for head in range(4):
            alone = clustax.cluster_queries(
                inputs.query[:, :, head, None],
                inputs.key[:, :, head // 2, None],
                mask=inputs.mask[:, head, None],
                num_clusters=5,
                metric="euclidean",
            )
            np.testing.assert_array_equal(clusters.assignment[:, head], alone.assignment[:, 0])

    @pytest.mark.once
    @pytest.mark.parametrize("metric", ["hamming", "euclidean"])
    @pytest.mark.parametrize(
        "keys", ["equal", "zero", "one", "low_rank", "none_valid", "tiny", "huge"]
    )
    def test_degenerate_keys_give_clusters(self, keys, metric):
        inputs = make_inputs(BY_NAME["plain"])
        key = {
            "equal": jnp.broadcast_to(inputs.key[:, :1], inputs.key.shape),
            "zero": jnp.zeros_like(inputs.key),
            "one": inputs.key[:, :1],
            "low_rank": jnp.outer(inputs.key[..., 0], jnp.ones(8)).reshape(inputs.key.shape),
            "none_valid": inputs.key,
            "tiny": 1e-15 * inputs.key,
            "huge": 1e15 * inputs.key,
        }[keys]
        lengths = jnp.zeros(2, jnp.int32) if keys == "none_valid" else None
        transformed = to_logit_space(
            inputs.query,
            key,
            None,
            None if lengths is None else jnp.zeros((2, 1, key.shape[1]), bool),
        )
        assert np.isfinite(transformed).all()
        clusters = clustax.cluster_queries(
            inputs.query, key, num_clusters=5, metric=metric, key_value_seq_lengths=lengths
        )
        np.testing.assert_array_equal(clusters.counts.sum(axis=-1), 24)


@pytest.mark.once
def test_half_precision_is_clustered_in_single_precision():
    """bfloat16 holds 8 bits: distances of neighbours would be lost."""
    query = jnp.asarray(256 + np.arange(0, 40, 2), jnp.bfloat16).reshape(20, 1, 1)
    clusters = clustax.cluster_queries(query, num_clusters=4, metric="euclidean")
    exact = clustax.cluster_queries(query.astype(jnp.float32), num_clusters=4, metric="euclidean")
    np.testing.assert_array_equal(clusters.assignment, exact.assignment)
    assert len(np.unique(clusters.assignment)) == 4


@pytest.mark.parametrize("masked", [False, True])
def test_covariance_of_keys(masked):
    key = jax.random.normal(jax.random.key(0), (2, 9, 2, 3), jnp.bfloat16) + 5  # B S K H
    valid = np.ones((2, 4, 9), bool)  # of N = 4 heads
    if masked:
        valid[:, :, 6:] = False
        key = key.at[:, 6:].set(jnp.nan)
    found = key_covariance(key, jnp.asarray(valid) if masked else None, 4)
    for entry, head in np.ndindex(2, 4):
        rows = np.asarray(key[entry, :, head // 2], np.float64)[valid[entry, head]]
        expected = np.cov(rows, rowvar=False, bias=True)
        np.testing.assert_allclose(found[entry, head], expected, atol=1e-4)
