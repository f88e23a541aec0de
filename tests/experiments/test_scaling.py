"""The benchmark: who takes turns with whom, and what comes out."""

import json

import pytest
from rich.console import Console

from experiments import scaling
from experiments.common.timing import Times, take_turns


def test_rivals_take_turns_and_only_the_second_run_of_a_turn_counts():
    calls, turns = [], []
    rivals = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = take_turns(rivals, 3, lambda: turns.append(len(calls)))
    assert calls == list("aabb" * 3)
    assert turns == [2, 4, 6, 8, 10, 12]
    assert {name: len(found.seconds) for name, found in times.items()} == {"a": 3, "b": 3}


def test_median_and_quartiles():
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert times.median == 3.0
    assert times.quartiles == (2.0, 4.0)


def test_speed_up_is_against_the_fastest_exact_attention():
    seconds = {scaling.JAX_EXACT: 6.0, scaling.TORCH_EXACT: 4.0, scaling.IMPROVED: 2.0}
    rows = [scaling.Row(name, 64, Times((s, s)), None) for name, s in seconds.items()]
    assert scaling.speed_up(rows, 64, scaling.IMPROVED) == 2.0
    assert scaling.speed_up(rows, 64, scaling.JAX_EXACT) == pytest.approx(2 / 3)
    improved_alone = [row for row in rows if row.attention == scaling.IMPROVED]
    assert scaling.speed_up(improved_alone, 64, scaling.IMPROVED) is None


@pytest.mark.parametrize("gradient", [False, True])
def test_a_small_run_writes_every_figure(tmp_path, gradient):
    settings = scaling.Settings(
        lengths=(16, 32),
        heads=2,
        head_dim=8,
        clusters=4,
        topk=4,
        rounds=2,
        gradient=gradient,
        longest_exact=16,
        output=tmp_path / "scaling",
    )
    console = Console(record=True, width=120)
    scaling.run(settings, console)
    record = json.loads((tmp_path / "scaling.json").read_text())
    measured = {(row["attention"], row["length"]) for row in record["rows"]}
    assert {
        (name, n) for name in (scaling.CLUSTERED, scaling.IMPROVED) for n in (16, 32)
    } <= measured
    assert (scaling.JAX_EXACT, 16) in measured
    assert (scaling.JAX_EXACT, 32) not in measured
    assert all(row["median_seconds"] > 0 for row in record["rows"])
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert ("forward and backward" in console.export_text()) == gradient


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        scaling.Settings(rounds=1)
    with pytest.raises(ValueError, match="lengths"):
        scaling.Settings(lengths=())
