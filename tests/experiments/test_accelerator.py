"""The command that checks and times an accelerator, without one."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from experiments import accelerator
from experiments.accelerator import PASSES, Row, Settings
from experiments.common.timing import Times

SETTINGS = Settings(lengths=(32,), heads=2, head_dim=8, clusters=4, topk=4, profiled=32, checked=32)


def test_the_profiled_length_is_one_of_those_that_run():
    with pytest.raises(ValueError, match=r"profiled must be one of lengths=\(32,\), got 64"):
        dataclasses.replace(SETTINGS, profiled=64)


def row(attention: str, seconds: float, measured: str = PASSES[1]) -> Row:
    return Row(attention, measured, 32, Times((seconds, seconds)), 0)


ROWS = [
    row("exact (cuDNN)", 2.0),
    row("exact (tokamax)", 1.0),
    row("default (xla)", 0.5),
    row("exact (cuDNN)", 9.0, PASSES[2]),
]


def test_the_fastest_exact_attention_is_of_the_same_length_and_passes():
    assert accelerator.fastest_exact(ROWS, ROWS[2]) == 1.0
    assert accelerator.fastest_exact(ROWS, ROWS[3]) == 9.0
    assert accelerator.fastest_exact(ROWS[2:3], ROWS[2]) is None


def test_table_says_how_many_times_faster():
    columns = accelerator.make_table(SETTINGS, ROWS, PASSES[1]).columns
    assert list(columns[3].cells) == ["500.00\n2.0×"]
    assert list(columns[1].cells) == ["2000.00"]


def test_times_on_the_device_are_added_up_by_name():
    def line(name, *events):
        events = [SimpleNamespace(name=name, duration_ns=ns) for name, ns in events]
        return SimpleNamespace(name=name, events=events)

    device = [line("Stream #1", ("a", 1000), ("b", 5000)), line("Stream #2", ("a", 2000))]
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[*device, line("XLA Modules", ("c", 9))]),
        SimpleNamespace(name="/host:CPU", lines=[line("Stream #1", ("d", 9))]),
    ]
    times = accelerator._device_times(SimpleNamespace(planes=planes))
    assert list(times.items()) == [("b", 5.0), ("a", 3.0)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is of what runs on a CPU")
def test_rivals_on_a_cpu():
    names = {f"{name} (xla)" for name in accelerator.settings_of(SETTINGS)}
    assert {name for name in accelerator.rivals(SETTINGS) if "exact" not in name} == names


@pytest.mark.once
def test_results_are_close_to_those_in_float32(monkeypatch):
    paper = accelerator.settings_of(SETTINGS)["paper"]
    monkeypatch.setattr(accelerator, "settings_of", lambda settings: {"paper": paper})
    (check,) = accelerator.check(SETTINGS)
    assert 1e-5 < check.output < 1e-2
    assert all(1e-5 < error < 3e-2 for error in check.gradients)
