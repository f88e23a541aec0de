"""The copy task: its sequences, its grid, and what a run writes."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import dataclasses
import json

import pytest

for package in ("matplotlib", "optax", "orbax.checkpoint", "rich", "tensorboardX", "tyro"):
    pytest.importorskip(package)

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from experiments import copy_task
from experiments.common import training
from experiments.copy_task import Cell, Model, Settings

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
