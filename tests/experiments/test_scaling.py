"""The benchmark: who takes turns with whom, what was asked for, and what comes out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import scaling
from experiments.common import chunked
from experiments.common.memory import peak_memory
from experiments.common.timing import Times, take_turns
from experiments.scaling import BACKWARD, FORWARD, Longest, Results, Row, Settings

SMALL = Settings(
    lengths=(16, 32),
    memory_lengths=(),
    heads=2,
    head_dim=8,
    clusters=4,
    topk=4,
    rounds=2,
    longest=Longest(16, 16, 32, 16, 32),
    longest_backward=Longest(16, 16, 16, 0, 16),
)


def row(attention, length, seconds, measured=FORWARD, peak_bytes=None):
    return Row(attention, measured, length, Times((seconds, seconds)), 100, peak_bytes)


def test_rivals_take_turns_and_only_the_second_run_of_a_turn_counts():
    calls, turns = [], []
    rivals = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = take_turns(rivals, 3, lambda: turns.append(len(calls)))
    assert calls == list("aabb" * 3)
    assert turns == [2, 4, 6, 8, 10, 12]
    assert {name: len(found.seconds) for name, found in times.items()} == {"a": 3, "b": 3}


def test_a_rival_beyond_its_budget_has_two_turns():
    calls, turns = [], []
    rivals = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = take_turns(rivals, 4, lambda: turns.append(len(calls)), budget=0)
    assert calls == list("aabb" * 2)
    assert len(turns) == 8
    assert {name: len(found.seconds) for name, found in times.items()} == {"a": 2, "b": 2}


def test_median_and_quartiles():
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert times.median == 3.0
    assert times.quartiles == (2.0, 4.0)


def _allocate(size):
    return lambda: bytearray(size) and None


@pytest.mark.once
def test_peak_memory_is_that_of_the_run_alone():
    taken = peak_memory(_allocate, 100 * 2**20)
    assert taken == pytest.approx(100 * 2**20, rel=0.05)


@pytest.mark.once
@pytest.mark.parametrize(("num_queries", "num_keys"), [(40, 70), (1024, 4096)])
def test_chunked_attention_is_exact(num_queries, num_keys):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, n, 2, 8)), jnp.float32)
        for n in (num_queries, num_keys, num_keys)
    )

    def outputs(attention):
        return attention(query, key, value), *scaling.with_gradient(attention)(query, key, value)

    expected = outputs(jax.nn.dot_product_attention)
    for actual, each in zip(outputs(chunked.chunked_attention), expected, strict=True):
        np.testing.assert_allclose(actual, each, atol=2e-6)


def test_chunked_attention_refuses_lengths_that_leave_a_rest():
    query = jnp.zeros((1, 600, 1, 4))
    with pytest.raises(ValueError, match="length of query must be a multiple of 512, got 600"):
        chunked.chunked_attention(query, query, query)


def test_speed_up_is_against_the_fastest_exact_attention():
    seconds = {scaling.JAX_EXACT: 6.0, scaling.TORCH_EXACT: 4.0, scaling.IMPROVED: 2.0}
    results = Results([row(name, 64, s) for name, s in seconds.items()])
    assert results.speed_up(FORWARD, 64, scaling.IMPROVED) == 2.0
    assert results.speed_up(FORWARD, 64, scaling.JAX_EXACT) == pytest.approx(2 / 3)
    assert results.speed_up(BACKWARD, 64, scaling.IMPROVED) is None
    assert Results([row(scaling.IMPROVED, 64, 2.0)]).speed_up(FORWARD, 64, "improved") is None


@pytest.mark.parametrize(
    ("improved", "expected"),
    [
        ((2.0, 2.0, 2.0), 64.0),  # 1 s at 32, 4 s at 128, so 2 s in the middle
        ((2.0, 8.0, 8.0), 256.0),
        ((0.5, 2.0, 8.0), 32.0),
        ((2.0, 8.0, 32.0), None),
    ],
)
def test_crossover_is_on_a_line_between_lengths(improved, expected):
    rows = [row(scaling.CHUNKED, n, s) for n, s in ((32, 1.0), (128, 4.0), (512, 16.0))]
    rows += [row(scaling.IMPROVED, n, s) for n, s in zip((32, 128, 512), improved, strict=True)]
    found = Results(rows).crossover(FORWARD, scaling.IMPROVED)
    assert found == (expected and pytest.approx(expected))


def test_acceptance_has_what_was_asked_and_what_was_reached():
    rows = [
        row(scaling.TORCH_EXACT, 4096, 0.14),
        row(scaling.CLUSTERED, 4096, 0.016),
        row(scaling.IMPROVED, 4096, 0.02, peak_bytes=4096 * 100),
        row(scaling.IMPROVED, 32768, 0.24, peak_bytes=32768 * 120),
        row(scaling.TORCH_EXACT, 4096, 0.5, BACKWARD),
        row(scaling.IMPROVED, 4096, 0.2, BACKWARD),
    ]
    found = scaling.acceptance(Settings(), Results(rows))
    assert [(each.asked, each.reached, each.is_met) for each in found] == [
        ("≥ 7", pytest.approx(7), True),
        ("≥ 5", pytest.approx(2.5), False),
        ("≥ 1.3", pytest.approx(1.25), False),
        ("≤ 1.3", pytest.approx(1.5), False),
        ("≤ 1.1", pytest.approx(1.2), False),
    ]
    layer = [row(scaling.IMPROVED, 32768, 1.0, BACKWARD, peak_bytes=32768 * 20_000)]
    (memory,) = scaling.acceptance(Settings(measures="layer"), Results(layer))
    assert (memory.asked, memory.reached, memory.is_met) == ("≤ 24.0", 20.0, True)


@pytest.mark.once
@pytest.mark.parametrize("name", scaling.attentions(SMALL))
def test_every_rival_runs(name):
    arrays = scaling.make_arrays(SMALL, 16)
    rival = scaling.prepare(SMALL, name, FORWARD, arrays)
    rival.run()
    assert rival.compiled_bytes is not None
    assert rival.compiled_bytes > 0


def test_rivals_are_left_out_beyond_their_longest():
    torch = [scaling.TORCH_EXACT] if scaling.has_torch(SMALL) else []
    assert scaling.rivals(SMALL, FORWARD, 32) == [
        scaling.CHUNKED,
        *(scaling.LSH_4, scaling.LSH_1, scaling.CLUSTERED, scaling.IMPROVED, scaling.DEFAULT),
    ]
    assert scaling.rivals(SMALL, FORWARD, 16) == [
        scaling.JAX_EXACT,
        *torch,
        scaling.CHUNKED,
        *scaling.RIVALS[3:],
    ]
    assert scaling.rivals(SMALL, BACKWARD, 32) == []
    assert scaling.ORACLE not in scaling.rivals(SMALL, BACKWARD, 16)


@pytest.mark.once
@pytest.mark.parametrize(
    ("measures", "passes"), [("attention", scaling.PASSES), ("layer", (BACKWARD,))]
)
def test_a_small_run_writes_every_figure(tmp_path, measures, passes, monkeypatch):
    monkeypatch.setattr(scaling, "peak_memory", lambda *args: 1000 * args[-1])
    settings = dataclasses.replace(
        SMALL,
        measures=measures,
        attentions=(scaling.JAX_EXACT, scaling.TORCH_EXACT, scaling.IMPROVED),
        passes=passes,
        memory_lengths=(16,),
        output=tmp_path / "scaling",
    )
    console = Console(record=True, width=200)
    scaling.run(settings, console)
    record = json.loads((tmp_path / "scaling.json").read_text())
    measured = {(row["attention"], row["measured"], row["length"]) for row in record["rows"]}
    assert measured == {
        (name, which, length)
        for which in passes
        for length in (16, 32)
        for name in scaling.rivals(settings, which, length)
    }
    for each in record["rows"]:
        assert each["median_seconds"] > 0
        assert each["runs"] == 2
        assert (each["compiled_bytes"] is None) == (each["attention"] == scaling.TORCH_EXACT)
        assert each["peak_bytes"] == (16_000 if each["length"] == 16 else None)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "Milliseconds, forward and backward" in console.export_text()
    assert not (tmp_path / "scaling.partial.jsonl").exists()


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    settings = dataclasses.replace(
        SMALL,
        attentions=(scaling.JAX_EXACT,),
        lengths=(16,),
        passes=(FORWARD,),
        memory_lengths=(16,),
        output=tmp_path / "scaling",
    )

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "peak_memory", kill)
    with pytest.raises(KeyboardInterrupt):
        scaling.run(settings, Console(quiet=True))
    monkeypatch.setattr(scaling, "peak_memory", lambda *_: 7)
    monkeypatch.setattr(scaling, "measure_times", kill)
    scaling.run(settings, Console(quiet=True))
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert {each["peak_bytes"] for each in record["rows"]} == {7}


@pytest.mark.once
def test_torch_and_jax_measure_the_same(monkeypatch):
    torch = pytest.importorskip("torch")
    settings = dataclasses.replace(SMALL, measures="layer")
    (hidden,) = scaling.make_arrays(settings, 16)
    assert hidden.shape == (1, 16, 16)
    seen = []
    layer = torch.nn.TransformerEncoderLayer
    monkeypatch.setattr(
        torch.nn, "TransformerEncoderLayer", lambda *a, **k: seen.append(layer(*a, **k)) or seen[0]
    )
    for measured in scaling.PASSES:
        scaling.torch_exact(settings, measured, [hidden])()
    (graph, params) = _layer_of(settings)
    assert sum(p.numel() for p in seen[0].parameters()) == params
    assert graph.attention.num_heads == seen[0].self_attn.num_heads == 2


def _layer_of(settings):
    from flax import nnx

    width = settings.heads * settings.head_dim
    layer = scaling.EncoderLayer(
        width, settings.heads, scaling.FEED_FORWARD * width, rngs=nnx.Rngs(0)
    )
    return layer, sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))


@pytest.mark.parametrize("preset", scaling.PRESETS)
def test_presets_measure_what_the_issue_asks_for(preset):
    settings = scaling.PRESETS[preset][1]
    assert set(settings.memory_lengths) <= set(settings.lengths)
    assert (settings.clusters, settings.topk, settings.num_bits) == (100, 32, 64)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        Settings(rounds=1)
    with pytest.raises(ValueError, match="lengths"):
        Settings(lengths=())
    with pytest.raises(ValueError, match=r"attentions must be of .* got \['other'\]"):
        Settings(attentions=("improved", "other"))
    with pytest.raises(ValueError, match="lengths must be different"):
        Settings(lengths=(16, 16))
