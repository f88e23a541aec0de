"""Training: the step, its parts on several devices, and what a run leaves when it ends early."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

for package in ("optax", "orbax.checkpoint", "rich", "tensorboardX"):
    pytest.importorskip(package)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from tensorboardX.proto import event_pb2

from experiments.common import training
from experiments.common.checkpoints import CheckpointError, Checkpoints
from experiments.common.scalars import Scalars
from experiments.common.training import Optimisation, TrainingError
from tests.helpers import largest_file

ROOT = Path(__file__).parents[2]
SETTINGS = Optimisation(
    steps=16, batch_size=8, learning_rate=0.03, warmup_steps=4, log_every=2, checkpoint_every=4
)


class Small(nnx.Module):
    """A network of two layers, with dropout between them."""

    def __init__(self, dropout_rate, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.output = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(jnp.tanh(self.hidden(x))))[:, 0]


def small(dropout_rate=0.2):
    return Small(dropout_rate, nnx.Rngs(0))


def squares(model, batch):
    weighted = batch["weight"] * (model(batch["x"]) - batch["y"]) ** 2
    return {"weight": jnp.sum(batch["weight"]), "loss": jnp.sum(weighted)}


def batch(step, size=8):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    weight = rng.uniform(size=size).astype(np.float32)
    return {"x": x, "y": x.sum(1), "weight": weight}


def train(folder, batches=batch, settings=SETTINGS):
    with training.progress_bar(Console(quiet=True)) as progress:
        return training.train(small(), squares, batches, settings, folder, progress)


def numbers(model, rows):
    """What has to be the same in two runs: all but the speed."""
    timeless = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]
    return timeless, jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def assert_same(found, expected):
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_step_is_that_of_the_mean_gradient():
    model, transformation = small(0.0), optax.sgd(0.5)
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def mean(params):
        sums = squares(nnx.merge(graph, params, others, copy=True), batch(0))
        return sums["loss"] / sums["weight"]

    loss, gradient = jax.value_and_grad(mean)(params)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    step = training.make_step(model, squares, transformation, training.data_mesh())
    state, sums, norm = step.apply(step.state, batch(0))
    np.testing.assert_allclose(norm, optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"] / sums["weight"], loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.params, expected)


def on_devices():
    """Trains on one and on all devices; run in a process of its own, which has 8."""
    found = []
    meshes = [Mesh(np.array(jax.devices()[:count]), (training.DATA,)) for count in (1, 8)]
    for mesh in meshes:
        step = training.make_step(small(0.0), squares, optax.sgd(0.1), mesh)
        state = step.state
        for number in range(3):
            state, sums, norm = step.apply(state, training.divide(batch(number, 16), mesh))
        model = step.model(state)
        means = training.evaluate(model, squares, [batch(n, 16) for n in (7, 8)], mesh)
        found.append((jax.device_get((state.params, sums, norm)), means))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), *found)
    with pytest.raises(TrainingError, match="batch of 12 cannot be divided among 8 devices"):
        training.divide(batch(0, 12), meshes[1])

    # The same example everywhere: dropout has to make a difference between devices.
    def outputs(model, batch):
        values = model(batch["x"])
        return {"weight": jnp.float32(1), "loss": jnp.sum(values), "square": jnp.sum(values**2)}

    step = training.make_step(small(0.5), outputs, optax.sgd(0.1), meshes[1])
    alike = {"x": np.tile(batch(0, 1)["x"], (8, 1))}
    _, sums, _ = step.apply(step.state, training.divide(alike, meshes[1]))
    assert sums["square"] / 8 - (sums["loss"] / 8) ** 2 > 1e-4


def child(call):
    """Runs a function of this module in another process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    code = f"from tests.experiments import test_training as t; t.{call}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env |= {"XLA_FLAGS": flags} if call == "on_devices()" else {}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.mark.once
def test_eight_devices_train_as_one():
    done = child("on_devices()")
    assert done.returncode == 0, done.stderr


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(folder, fatal):
    """Trains until the batch of a step is asked for."""
    train(Path(folder), lambda step: die() if step == fatal else batch(step))


def die_in_checkpoint(folder, fatal):
    """Trains until the checkpoint of a step is partly there."""
    checkpoints, save = Path(folder) / "checkpoints", Checkpoints.save

    def watch():
        while not any(path.name.startswith(f"{fatal}.") for path in checkpoints.iterdir()):
            pass
        die()

    def dying_save(self, step, state):
        if step == fatal:
            threading.Thread(target=watch, daemon=True).start()
        save(self, step, state)
        if step == fatal:
            die()  # It was too quick for the other thread.

    Checkpoints.save = dying_save
    train(Path(folder))


@pytest.mark.once
def test_killed_run_ends_with_the_numbers_of_another(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    for call in (f"die_in_step({str(killed)!r}, 9)", f"die_in_checkpoint({str(killed)!r}, 12)"):
        assert child(call).returncode == -signal.SIGKILL
        assert (killed / "checkpoints" / "8").is_dir()
    assert_same(numbers(*train(killed)), numbers(*train(whole)))


@pytest.mark.once
def test_nothing_is_done_again_when_all_is_done(tmp_path):
    first = numbers(*train(tmp_path))
    assert_same(numbers(*train(tmp_path, lambda step: pytest.fail("a step was made"))), first)
    assert [row["step"] for row in first[0]] == list(range(2, 17, 2))
    assert first[0][0]["learning_rate"] == pytest.approx(0.03 / 4)


@pytest.mark.once
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"y": np.full(8, 1e30, np.float32)}, "diverged before step 10: loss is inf"),
        ({"y": np.full(8, np.nan, np.float32)}, r"step 10 are bad: batch\['y'\] .* not finite"),
        ({"weight": np.zeros(8, np.float32)}, "step 10 are bad: all examples have a weight of 0"),
        ({"y": np.zeros(16, np.float32)}, r"one number of examples, got \[8, 8, 16\]"),
    ],
    ids=["diverged", "nan", "weightless", "uneven"],
)
def test_run_that_cannot_go_on_says_why_and_keeps_what_was_good(tmp_path, replaced, message):
    def bad(number):
        return batch(number) | (replaced if number >= 9 else {})

    with pytest.raises(TrainingError, match=message) as caught:
        train(tmp_path, bad)
    if "uneven" not in message and "number of" not in message:
        assert "The checkpoint of step 8 and the log up to here" in str(caught.value)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"4", "8"}
    assert [row["step"] for row in read_rows(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.once
def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def full(self, step, **options):
        if step == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=r"step 12 cannot be written.*No space left"):
            train(tmp_path)
    _, rows = train(tmp_path, lambda step: batch(step) if step >= 8 else pytest.fail("again"))
    assert [row["step"] for row in rows] == list(range(2, 17, 2))


def test_broken_checkpoint_is_named_and_the_one_before_goes_on(tmp_path):
    expected = numbers(*train(tmp_path))
    newest = tmp_path / "checkpoints" / "16"
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"checkpoints/16 cannot be read.*from step 12"):
        train(tmp_path)
    newest.rename(tmp_path / "broken")
    assert_same(numbers(*train(tmp_path)), expected)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    state = {"x": jnp.arange(1000.0), "count": jnp.int32(7)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(state), (3, state))
    data = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"3 cannot be read.*from the beginning"),
    ):
        checkpoints.restore(state)


def test_folder_of_another_run_is_refused(tmp_path):
    training.claim(tmp_path, {"seed": 0, "lengths": (16, 32)})
    training.claim(tmp_path, {"seed": 0, "lengths": (16, 32)})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(TrainingError, match=r"other settings \(seed\)"):
        training.claim(tmp_path, {"seed": 1, "lengths": (16, 32)})
    assert (tmp_path / "run.json").read_bytes() == before


def test_scalars_drop_what_comes_after_and_tensorboard_reads_them(tmp_path):
    with Scalars(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.add(step, {"loss": step / 2})
    with (tmp_path / "scalars.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo')
    with Scalars(tmp_path, 2) as log:
        assert log.rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
        log.add(3, {"loss": 9.0})
    assert [row["loss"] for row in read_rows(tmp_path)] == [0.5, 1.0, 9.0]
    (newest,) = tmp_path.glob("events*.2")
    _, start, scalar = read_events(newest.read_bytes())
    assert (start.step, start.session_log.status) == (3, event_pb2.SessionLog.START)
    assert (scalar.step, scalar.summary.value[0].tag) == (3, "loss")
    assert scalar.summary.value[0].simple_value == 9.0


def test_scalars_that_cannot_be_written_name_the_file_and_leave_the_log_whole(tmp_path):
    with Scalars(tmp_path, 0) as log:
        log.add(1, {"loss": 0.5})
    before = (tmp_path / "scalars.jsonl").read_bytes()
    size = len(before) + 5  # room for a part of the next line
    full = pytest.raises(OSError, match=r"too large: .*scalars\.jsonl")
    with full, Scalars(tmp_path, 1) as log, largest_file(size):
        log.add(2, {"loss": 0.25})
    with Scalars(tmp_path, 1) as log:
        assert (tmp_path / "scalars.jsonl").read_bytes() == before
        log.add(2, {"loss": 0.25})
    assert read_rows(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    with largest_file(5), pytest.raises(OSError, match=r"too large: .*scalars\.jsonl"):
        Scalars(tmp_path, 2).__enter__()


def read_rows(folder):
    return [json.loads(line) for line in (folder / "scalars.jsonl").read_text().splitlines()]


def read_events(data):
    """The messages of an event file: each has its length and a checksum before it, one after it."""
    events = []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_means_are_over_the_weight_of_all():
    sums = [{"weight": 1.0, "loss": 5.0}, {"weight": 3.0, "loss": 3.0}]
    assert training.means(sums) == {"loss": 2.0}


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [0, 0.5, 1, 1]), ("cosine", [0, 0.5, 1, 0])]
)
def test_learning_rate(schedule, expected):
    settings = Optimisation(steps=10, learning_rate=1.0, warmup_steps=2, schedule=schedule)
    rate = training.learning_rate(settings)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 10)], expected, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warmup_steps": 5000}, "warmup_steps must be from 0 to below steps"),
        ({"checkpoint_every": 75}, "multiple of log_every = 50, got 75"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimisation(**settings)
