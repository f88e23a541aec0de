"""The copy task: its sequences, its grid, and what a run writes."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("matplotlib", "optax", "orbax.checkpoint", "rich", "tensorboardX", "tyro"):
    pytest.importorskip(package)

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from experiments import copy_task
from experiments.common import training
from experiments.common.files import BrokenFileError
from experiments.copy_task import Cell, Model, Settings
from tests.helpers import largest_file

TINY = Settings(
    lengths=(8, 12),
    clusters=(3,),
    rounds=(1, 2),
    evaluated=16,
    model=Model(layers=1, heads=2, head_dim=4),
    attentions=copy_task.Attentions(topk=2, num_buckets=4, chunk_size=4),
    optimisation=training.Optimisation(steps=4, batch_size=8, log_every=2, checkpoint_every=4),
)


def test_masked_symbols_stand_in_the_other_half():
    batch = copy_task.draw_batch(np.random.default_rng(0), 50, 64, 0.2)
    first, second = (
        {name: array[:, start : start + 32] for name, array in batch.items()} for start in (0, 32)
    )
    np.testing.assert_array_equal(first["targets"], second["targets"])
    assert set(np.unique(batch["targets"][:, 1:32])) == set(range(1, 11))
    assert (batch["targets"][:, [0, 32]] == copy_task.SEPARATOR).all()
    for half, other in ((first, second), (second, first)):
        assert (half["masked"].sum(1) == 6).all()  # 0.2 · 31
        assert (half["inputs"][half["masked"]] == copy_task.MASK).all()
        assert (other["inputs"][half["masked"]] == half["targets"][half["masked"]]).all()
        assert (half["inputs"] == half["targets"])[~half["masked"]].all()
        assert len(np.unique(half["masked"], axis=0)) > 40


def test_batches_differ_but_for_the_same_one():
    cell = Cell("full", None, 8, 0)

    def drawn(*args):
        return copy_task.batch_of(TINY, *args)["targets"].tobytes()

    asked = [(cell, 0, 0), (cell, 0, 1), (cell, 1, 0), (cell._replace(seed=1), 0, 0)]
    assert len({drawn(*args) for args in asked}) == 4
    assert drawn(cell, 0, 1) == drawn(cell, 0, 1)


@pytest.mark.once
def test_positions_are_learned_where_asked():
    def trained(learned):
        model = dataclasses.replace(TINY.model, learned_positions=learned)
        model = copy_task.build(dataclasses.replace(TINY, model=model), Cell("full", None, 8, 0))
        return {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    assert trained(True) - trained(False) == {"positions"}


def test_accuracy_and_loss_are_those_of_masked_positions():
    batch = copy_task.draw_batch(np.random.default_rng(0), 4, 16, 0.2)
    right = jax.nn.one_hot(batch["targets"], 11) * 20
    wrong = jax.nn.one_hot((batch["targets"] + 1) % 11, 11) * 20

    def found(logits):
        return training.means([copy_task.copy_loss(lambda inputs: logits, batch)])

    where = batch["masked"][..., None]
    assert found(np.where(where, right, wrong))["accuracy"] == 1.0
    assert found(np.where(where, right, wrong))["loss"] < 1e-6
    assert found(np.where(where, wrong, right))["accuracy"] == 0.0
    assert found(np.where(where, wrong, right))["loss"] == pytest.approx(20, rel=1e-4)


def test_attention_of_each_method():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 4))

    def attention(method, size):
        return copy_task.attention_of(TINY, Cell(method, size, 12, 5))

    assert attention("full", None) is jax.nn.dot_product_attention
    clustered, improved = attention("clustered", 3), attention("improved", 3)
    assert (clustered.topk, improved.topk, improved.num_clusters) == (0, 2, 3)
    assert (improved.metric, improved.merge, improved.seed) == ("hamming", "mass", 5)
    lsh = attention("lsh", 2)
    assert lsh.attention.rounds == 2
    np.testing.assert_array_equal(lsh(query, key, value), lsh(query, value, value))
    np.testing.assert_array_equal(lsh(query, key, value), lsh.attention(query, query, value))


def test_grid_has_each_size_of_each_method():
    labels = [cell.label for cell in copy_task.cells(TINY) if cell.length == 12]
    assert labels == ["full", "clustered-3", "improved-3", "lsh-1", "lsh-2"]
    assert len({cell.name for cell in copy_task.cells(TINY)}) == 10


def test_run_writes_its_results_and_does_finished_cells_no_second_time(tmp_path, monkeypatch):
    settings = dataclasses.replace(
        TINY, methods=("full", "lsh"), rounds=(2,), lengths=(8,), output=tmp_path
    )
    console = Console(record=True, width=120)
    copy_task.run(settings, console)
    record = json.loads((tmp_path / "results.json").read_text())
    assert [(c["method"], c["size"]) for c in record["cells"]] == [("full", None), ("lsh", 2)]
    for cell in record["cells"]:
        assert 0 <= cell["accuracy"] <= 1
        assert cell["curve"]["step"] == [2, 4]
    assert record["commits"] == [copy_task.revision()]
    assert record["settings"]["optimisation"]["steps"] == 4
    for picture in ("heat_maps", "curves"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "lsh-2" in console.export_text()

    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trained again"))
    copy_task.run(settings, Console(quiet=True))
    assert json.loads((tmp_path / "results.json").read_text()) == record

    other = dataclasses.replace(settings, masked=0.4)
    with pytest.raises(training.TrainingError, match=r"other settings \(masked\)"):
        copy_task.run(other, Console(quiet=True))


def grid_of_two(output):
    return dataclasses.replace(TINY, methods=("full",), lengths=(8,), seeds=(0, 1), output=output)


def numbers(output):
    """All that a run finds."""
    return json.loads((output / "results.json").read_text())["cells"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run finds that nothing gets in the way of."""
    output = tmp_path_factory.mktemp("uninterrupted")
    copy_task.run(grid_of_two(output), Console(quiet=True))
    return numbers(output)


def die_in_second_cell(output):
    """Runs until the last step of the second model, which no checkpoint has; in a process."""
    draw = copy_task.batch_of

    def dying(settings, cell, part, number):
        if (cell.seed, part, number) == (1, 0, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(settings, cell, part, number)

    copy_task.batch_of = dying
    copy_task.run(grid_of_two(Path(output)), Console(quiet=True))


@pytest.mark.once
def test_killed_run_ends_with_the_numbers_of_another(tmp_path, uninterrupted):
    call = f"die_in_second_cell({str(tmp_path)!r})"
    code = f"from tests.experiments import test_copy_task as t; t.{call}"
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "runs/full_length-8_seed-0/result.json").exists()
    assert not (tmp_path / "runs/full_length-8_seed-1/result.json").exists()
    copy_task.run(grid_of_two(tmp_path), Console(quiet=True))
    assert numbers(tmp_path) == uninterrupted


@pytest.mark.once
def test_what_cannot_be_written_is_named_and_nothing_is_lost(
    tmp_path, uninterrupted, monkeypatch, caplog
):
    presets = {"tiny": ("", grid_of_two(tmp_path)), "other": ("", TINY)}
    monkeypatch.setattr(copy_task, "PRESETS", presets)
    monkeypatch.setattr(sys, "argv", ["copy_task", "tiny"])
    quiet = Console(quiet=True)  # pytest has a file for what is printed
    monkeypatch.setattr(copy_task, "Console", lambda: quiet)

    def assert_stops(size, file):
        with largest_file(size), pytest.raises(SystemExit, match=rf"{file}.*to go on") as caught:
            copy_task.main()
        assert "File too large" in str(caught.value)
        assert not [record for record in caplog.records if record.exc_info]

    assert_stops(0, "run.json")
    assert_stops(2000, "checkpoints")
    copy_task.main()
    assert numbers(tmp_path) == uninterrupted
    assert_stops(2000, "heat_maps.png")
    assert numbers(tmp_path) == uninterrupted


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one model."""
    output = tmp_path_factory.mktemp("finished")
    settings = dataclasses.replace(TINY, methods=("full",), lengths=(8,), output=output)
    copy_task.run(settings, Console(quiet=True))
    return output


@pytest.mark.once
@pytest.mark.parametrize("name", ["run.json", "result.json", "scalars.jsonl"])
def test_broken_files_are_named_and_left_as_they_are(tmp_path, finished, name):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    settings = dataclasses.replace(TINY, methods=("full",), lengths=(8,), output=tmp_path)
    folder = tmp_path / "runs" / "full_length-8_seed-0"
    if name == "scalars.jsonl":
        (folder / "result.json").unlink()
    broken = b"\0" * 100 + b"\n"
    (folder / name).write_bytes(broken)
    with pytest.raises(BrokenFileError, match=rf"{name} is damaged.*start again"):
        copy_task.run(settings, Console(quiet=True))
    assert (folder / name).read_bytes() == broken


def test_accuracies_are_means_over_seeds():
    cells = [Cell("lsh", 1, 8, seed) for seed in (0, 1)] + [Cell("full", None, 8, 0)]
    results = [
        cell._asdict() | {"accuracy": accuracy}
        for cell, accuracy in zip(cells, (0.25, 0.75, 1.0), strict=True)
    ]
    accuracies = copy_task.Accuracies(results)
    assert accuracies.of("lsh", 1, 8) == 0.5
    assert accuracies.columns == [("lsh", 1), ("full", None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (9,)}, "lengths must be even"),
        ({"methods": ()}, "methods must be different ones, at least one"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"clusters": (0,)}, "clusters must be at least 1"),
        ({"masked": 0.6}, "masked must be above 0 and at most 0.5"),
        ({"evaluated": 100}, "evaluated must be a multiple of batch_size = 32"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_paper_preset_is_as_far_as_the_paper_is_known():
    paper = copy_task.PRESETS["paper"][1]
    assert paper.lengths == (64, 128, 256, 512)
    assert dataclasses.astuple(paper.model)[:3] == (4, 6, 32)
    assert (paper.optimisation.learning_rate, paper.optimisation.batch_size) == (2e-4, 32)
    assert (paper.attentions.topk, paper.attentions.num_bits) == (32, 32)
