"""Error against time and operations: what is compared, counted, and kept."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import json

import pytest

for package in ("av", "jiwer", "matplotlib", "rich", "sklearn", "tokenizers", "tyro"):
    pytest.importorskip(package)

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from clustax import ClusteredAttention, baselines
from experiments import pareto
from experiments.common.packages import MINILM, PackageUnavailableError
from experiments.pareto import Candidate, RandomKeys

LENGTH, HEADS, HEAD_DIM = 64, 2, 8


@pytest.fixture
def inputs():
    return tuple(jax.random.normal(jax.random.key(0), (3, 1, LENGTH, HEADS, HEAD_DIM)))


def test_frontier_has_the_points_that_no_other_one_beats():
    costs = [4.0, 1.0, 2.0, 3.0, 2.0, 5.0]
    errors = [0.2, 0.9, 0.5, 0.6, 0.4, 0.2]  # the last one costs more for the same
    assert pareto.frontier(costs, errors) == [1, 4, 0]
    assert pareto.frontier([], []) == []


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (baselines.Exact(), 2 * 8 * 8 * 4),
        # K-means 2·8·2·4 and updates 8·4, means 8·4, centroids 2·8·(4 + 4), top-k keys 8·3·(4 + 4)
        (
            ClusteredAttention(2, 3, space="query", num_subclusters=1, num_iterations=2),
            128 + 32 + 32 + 128 + 192,
        ),
        (baselines.OracleTopk(topk=3), 8 * 8 * 4 + 8 * 3 * 4),
        (baselines.Local(window=1), 2 * 8 * 3 * 4),
        (RandomKeys(topk=3), 2 * 8 * 3 * 4),
        (
            baselines.Reformer(rounds=2, num_buckets=6, chunk_size=2),
            2 * (8 * 4 * 3 + 2 * 8 * 4 * 4),
        ),
    ],
)
def test_operations_counted_by_hand(attention, expected):
    assert pareto.operations(attention, length=8, head_dim=4) == expected


def test_candidates():
    compared = pareto.candidates(seed=3)
    assert compared[0] == Candidate(pareto.EXACT, baselines.Exact())
    assert len({candidate.label for candidate in compared}) == len(compared)
    assert len({candidate.attention for candidate in compared}) == len(compared)
    highlighted = [candidate.attention for candidate in compared if candidate.highlighted]
    assert highlighted == [ClusteredAttention(seed=3), ClusteredAttention.paper(seed=3)]
    sizes = {(c.size("num_clusters"), c.size("topk")) for c in compared if c.name == pareto.PAPER}
    assert sizes == {(count, topk) for count in pareto.CLUSTERS for topk in pareto.TOPK}


def test_errors_are_relative_to_the_first_and_means_over_heads(inputs):
    def exact(query, key, value):
        return value

    def wrong(query, key, value):  # by a half in one head, and by a vector at right angles
        turned = jnp.stack([-value[..., 1::2], value[..., ::2]], axis=-1).reshape(value.shape)
        return jnp.concatenate([1.5 * value[:, :, :1], (value + turned)[:, :, 1:]], axis=2)

    turns = []
    compared = [Candidate("exact", exact), Candidate("wrong", wrong)]
    first, second = pareto.compare(compared, inputs, 2, lambda: turns.append(1))
    assert (first["error"], first["cosine"]) == (0, pytest.approx(1))
    assert second["error"] == pytest.approx((0.5 + 1) / 2)
    assert second["cosine"] == pytest.approx((1 + 0.5**0.5) / 2)
    assert [len(found["seconds"]) for found in (first, second)] == [2, 2]
    assert len(turns) == 4


@pytest.mark.once
def test_random_keys_are_keys_of_each_head(inputs):
    value = inputs[2]
    out = np.asarray(RandomKeys(topk=1)(*inputs))
    assert (out == out[:, :1]).all()
    drawn = [
        np.flatnonzero((np.asarray(value[0, :, head]) == out[0, 0, head]).all(-1))
        for head in range(HEADS)
    ]
    assert [len(found) for found in drawn] == [1, 1]
    assert drawn[0] != drawn[1]
    exact = jax.nn.dot_product_attention(*inputs)
    np.testing.assert_allclose(RandomKeys(topk=LENGTH)(*inputs), exact, atol=1e-5)


@pytest.mark.once
def test_reformer_gets_queries_as_keys(inputs):
    query, key, value = inputs
    out = pareto.attend(baselines.Reformer(rounds=1), query, jnp.full_like(key, jnp.nan), value)
    assert bool(jnp.isfinite(out).all())


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Settings for a few small attentions on random data."""
    monkeypatch.setattr(pareto, "RANDOM_SHAPE", (1, LENGTH, HEADS, HEAD_DIM))
    few, many = ({"num_clusters": 8, "topk": topk, "num_bits": 8} for topk in (4, 48))
    compared = [
        Candidate(pareto.EXACT, baselines.Exact()),
        Candidate(pareto.PAPER, ClusteredAttention.paper(**few), True),
        Candidate(pareto.PAPER, ClusteredAttention.paper(**many)),
        Candidate("random keys", RandomKeys(topk=8)),
    ]
    monkeypatch.setattr(pareto, "candidates", lambda seed: compared)
    return pareto.Settings(sources=("random",), documents=2, output=tmp_path / "pareto")


@pytest.mark.once
def test_a_run_that_was_killed_goes_on_and_writes_every_figure(tiny, monkeypatch):
    compare, calls = pareto.compare, []

    def killed(compared, inputs, *others):
        calls.append(np.asarray(inputs[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(compared, inputs, *others)

    monkeypatch.setattr(pareto, "compare", killed)
    console = Console(record=True, width=120)
    with pytest.raises(KeyboardInterrupt):
        pareto.run(tiny, console)
    pareto.run(tiny, console)

    assert len(calls) == 3
    assert (calls[1] == calls[2]).all()
    assert (calls[0] != calls[1]).any()
    assert "Going on after 1" in console.export_text()
    folder = tiny.output.parent
    assert {path.name for path in folder.iterdir()} == {"pareto.json", "pareto.png"}
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")

    record = json.loads((folder / "pareto.json").read_text())
    assert record["shapes"] == {"random": [1, LENGTH, HEADS, HEAD_DIM]}
    exact, few, many, random_keys = record["rows"]
    assert exact["error"] == 0
    assert exact["frontiers"] == ["seconds", "operations"]  # nothing else has no error
    assert 0 < many["error"] < few["error"] < random_keys["error"]
    assert few["cosine"] < many["cosine"] < 1
    assert few["operations"] < exact["operations"] < many["operations"]
    assert "operations" in few["frontiers"]
    assert "operations" not in many["frontiers"]  # exact attention has fewer
    assert random_keys["num_clusters"] is None
    assert few["listed"]
    assert not exact["listed"]
    assert all(row["seconds"] > 0 for row in record["rows"])


def test_settings_are_checked():
    for wrong in ({"sources": ()}, {"sources": ("random",) * 2}, {"documents": 0}, {"rounds": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            pareto.Settings(**wrong)


def test_what_costs_more_than_exact_attention_is_on_no_frontier():
    def row(name, error, seconds, operations):
        return pareto.Row(
            "random", name, 8, 4, 1, error, 1.0, seconds, (seconds, seconds), operations, False
        )

    rows = [
        row(pareto.EXACT, 0.0, 2.0, 100),
        row("a", 0.1, 3.0, 50),
        row("b", 0.5, 1.0, 80),
        row(pareto.ORACLE, 0.01, 1.0, 10),
    ]
    both = ("seconds", "operations")
    found = [row.frontiers for row in pareto.with_frontiers(rows)]
    assert found == [both, ("operations",), ("seconds",), ()]
    shapes = {"random": [1, LENGTH, HEADS, HEAD_DIM]}
    pareto.draw(pareto.with_frontiers([rows[0], rows[1]._replace(operations=200)]), shapes)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (PackageUnavailableError(MINILM, "no network", "cache"), "Cannot get the package pyduck"),
        (PermissionError("the folder"), "the folder"),
        (KeyboardInterrupt(), "Interrupted: start it again to go on."),
    ],
)
def test_problems_end_it_with_their_message(monkeypatch, problem, message):
    def fail(settings, console):
        assert settings == pareto.Settings(sources=("random", "minilm"), documents=5)
        raise problem

    monkeypatch.setattr(pareto, "run", fail)
    arguments = ["--sources", "random", "minilm", "--documents", "5"]
    monkeypatch.setattr("sys.argv", ["pareto", *arguments])
    with pytest.raises(SystemExit) as error:
        pareto.main()
    assert str(error.value.code).startswith(message)
