"""Training on all local devices, which goes on where it was killed.

`train` makes all steps of a run, `evaluate` gives the means of a loss without dropout; `claim` says
that a folder is that run's.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import ReduceLROnPlateauState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from experiments.common.checkpoints import Checkpoints
from experiments.common.files import read_json, whole_file
from experiments.common.scalars import Scalars

Batch = Any
"""A pytree of arrays whose first axis is that of the examples."""
Sums = dict[str, jax.Array]
"""Sums over a batch: of "weight", of "loss", and of any others; they are reported over "weight"."""
Loss = Callable[[Any, Batch], Sums]
"""Called with the model and a batch, or what one device has of it."""

DATA = "data"
"""The axis of the devices among which a batch is divided."""


class TrainingError(Exception):
    """A run that cannot go on; the message says why, and what to do."""


@dataclass(frozen=True)
class Optimisation:
    """How a model is trained: RAdam, with clipped gradients."""

    steps: int = 5000
    """Steps to make."""
    batch_size: int = 32
    """Examples in a step; the number of devices divides it."""
    learning_rate: float = 2e-4
    """Its peak."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What comes after: the peak until the end, or a fall to zero."""
    max_norm: float = 1.0
    """The norm that gradients are clipped to."""
    log_every: int = 50
    """Steps between two lines of the log, each of means over them."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, a multiple of those between two lines of the log."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps must be from 0 to below steps = {self.steps}, "
                f"got {self.warmup_steps}."
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every must be a multiple of log_every = {self.log_every}, got "
                f"{self.checkpoint_every}: only a loss that was looked at may be kept."
            )


def learning_rate(settings: Optimisation) -> optax.Schedule:
    """The learning rate of each step, from 0."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    after = optax.constant_schedule(peak)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, settings.steps - warmup)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(settings: Optimisation) -> optax.GradientTransformation:
    """RAdam on gradients that are clipped to a global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_norm), optax.radam(learning_rate(settings))
    )


class State(NamedTuple):
    """All that a step changes."""

    params: nnx.State
    rest: nnx.State  # What else the model counts, as how often it has drawn dropout.
    optimizer: optax.OptState


class Step(NamedTuple):
    """A step of training, and what it starts from.

    Attributes:
        state: the initial one.
        apply: makes of a state, which is used up, and a batch the next state, the sums, and the
            norm of the gradient before it is clipped.
        model: makes the model of a state.
    """

    state: State
    apply: Callable[[State, Batch], tuple[State, Sums, jax.Array]]
    model: Callable[[State], Any]


def data_mesh() -> Mesh:
    """All local devices, among which batches are divided."""
    return Mesh(np.array(jax.local_devices()), (DATA,))


def divide(batch: Batch, mesh: Mesh) -> Batch:
    """Puts an equal part of a batch on each device.

    Raises:
        TrainingError: if the devices do not divide its size, or its arrays differ in theirs.
    """
    size, *others = map(len, jax.tree.leaves(batch))
    if set(others) - {size}:
        raise TrainingError(
            f"The arrays of a batch must have one number of examples, got {[size, *others]}."
        )
    if size % mesh.size:
        raise TrainingError(
            f"A batch of {size} cannot be divided among {mesh.size} devices: choose a batch_size "
            f"that is a multiple of {mesh.size}."
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(DATA)))


def make_step(
    model: nnx.Module, loss: Loss, transformation: optax.GradientTransformation, mesh: Mesh
) -> Step:
    """A compiled step of training that every device makes with its part of the batch.

    The gradient is that of the sum of losses over the sum of weights, of the whole batch: without
    dropout, that of a single device.

    Args:
        model: in training mode.
        loss: what to minimise.
        transformation: of the gradients; one that takes more is given the loss as `value`.
        mesh: as `data_mesh` has it.
    """
    transformation = optax.with_extra_args_support(transformation)
    graph, params, keys, rest = nnx.split(model, nnx.Param, nnx.RngKey, ...)
    everywhere, divided = PartitionSpec(), PartitionSpec(DATA)

    # Left to the compiler, loops over the batch, which attentions have, would gather it first.
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, everywhere, divided),
        out_specs=everywhere,
        check_vma=False,
    )
    def gradient(params, rest, batch):
        device = jax.lax.axis_index(DATA)
        own_keys = jax.tree.map(lambda key: jax.random.fold_in(key, device), keys)

        def total(params):
            replica = nnx.merge(graph, params, own_keys, rest, copy=True)
            sums = loss(replica, batch)
            *_, counted = nnx.split(replica, nnx.Param, nnx.RngKey, ...)
            return sums["loss"], (sums, counted)

        found, (sums, counted) = jax.grad(total, has_aux=True)(params)
        return *jax.lax.psum((found, sums), DATA), counted

    @partial(jax.jit, donate_argnums=0)
    def apply(state, batch):
        found, sums, counted = gradient(state.params, state.rest, batch)
        mean = jax.tree.map(lambda x: x / sums["weight"].astype(x.dtype), found)
        value = sums["loss"] / sums["weight"]
        updates, moments = transformation.update(mean, state.optimizer, state.params, value=value)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, counted, moments), sums, optax.tree.norm(mean)

    def model_of(state: State) -> Any:
        return nnx.merge(graph, state.params, keys, state.rest)

    return Step(State(params, rest, transformation.init(params)), apply, model_of)


def evaluate(
    model: Any, loss: Loss, batches: Iterable[Batch], mesh: Mesh | None = None
) -> dict[str, float]:
    """The means of a loss's sums over batches, without dropout.

    Args:
        model: what to evaluate; in which mode it is makes no difference.
        loss: what gives the sums.
        batches: of one size, which the devices divide.
        mesh: `data_mesh()` if None.
    """
    mesh = data_mesh() if mesh is None else mesh
    graph, state = nnx.split(model)
    everywhere, divided = PartitionSpec(), PartitionSpec(DATA)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, divided),
        out_specs=everywhere,
        check_vma=False,
    )
    def sums_of(state, batch):
        replica = nnx.merge(graph, state)
        replica.eval()
        return jax.lax.psum(loss(replica, batch), DATA)

    state = jax.device_put(state, NamedSharding(mesh, everywhere))
    return means([sums_of(state, divide(batch, mesh)) for batch in batches])


def means(sums: Iterable[Sums]) -> dict[str, float]:
    """The sums of several batches over the sum of their weights."""
    found = jax.device_get(list(sums))
    totals = {name: math.fsum(float(each[name]) for each in found) for name in found[0]}
    weight = totals.pop("weight")
    return {name: total / weight if weight else math.nan for name, total in totals.items()}


def progress_bar(console: Console) -> Progress:
    """A bar for `train` with steps, loss, speed, and what is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or finds that it is of this very run.

    Args:
        folder: where the run keeps what it has.
        identity: all that its results depend on, as JSON can hold it.

    Raises:
        TrainingError: if it is of another run.
        BrokenFileError: if what says so cannot be read.
    """
    path = folder / "run.json"
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        with whole_file(path) as new:
            new.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    found = read_json(path)
    if found != wanted:
        names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
        raise TrainingError(
            f"{folder} has a run with other settings ({', '.join(names)}): it was left as it is. "
            "Choose another output, or remove that folder."
        )


def train(
    model: nnx.Module,
    loss: Loss,
    batches: Callable[[int], Batch],
    settings: Optimisation,
    folder: Path,
    progress: Progress,
    description: str = "Training",
    mesh: Mesh | None = None,
    score: Callable[[Any], float] | None = None,
    transformation: optax.GradientTransformation | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains a model, from the last checkpoint on if there is one.

    Args:
        model: in training mode, with its initial weights; it is left as it is.
        loss: what to minimise.
        batches: gives the batch of each step, the same one whenever it is asked.
        settings: how.
        folder: of the checkpoints and the log; `claim` makes sure that they are of this run.
        progress: a `progress_bar` that is being shown.
        description: what it says at its left.
        mesh: `data_mesh()` if None.
        score: how good a model is; asked at each checkpoint, and logged as "score".
        transformation: of the gradients; `optimizer(settings)` if None.

    Returns:
        The trained model, which is the earliest of those with the highest score if there are
        scores, and the log: dictionaries of "step" and of means over the steps since the one
        before.

    Raises:
        TrainingError: if the loss or its gradient is no number, or batches cannot be divided.
        CheckpointError: if a checkpoint cannot be read or written.
        BrokenFileError: if the log cannot be read.
        OSError: if the log cannot be written.
    """
    mesh = data_mesh() if mesh is None else mesh
    transformation = optimizer(settings) if transformation is None else transformation
    start, apply, model_of = make_step(model, loss, transformation, mesh)
    # Copied, as the first step uses it up.
    start = jax.device_put(start, NamedSharding(mesh, PartitionSpec()), may_alias=False)
    rate = learning_rate(settings)
    with Checkpoints(folder / "checkpoints") as checkpoints, Checkpoints(folder / "best") as best:
        done, state = checkpoints.restore(start)
        best.forget_after(done)
        task = progress.add_task(description, total=settings.steps, completed=done, state="")
        with Scalars(folder, done) as log:
            window: list[tuple[Sums, jax.Array]] = []
            clock = time.perf_counter()
            for step in range(done + 1, settings.steps + 1):
                state, sums, norm = apply(state, divide(batches(step - 1), mesh))
                window.append((sums, norm))
                if step % settings.log_every and step < settings.steps:
                    continue
                scalars = _summarise(window)
                seconds = time.perf_counter() - clock
                if not all(map(math.isfinite, scalars.values())):
                    reason = _bad_data(step, window, batches) or _divergence(step, scalars)
                    raise TrainingError(f"{reason} {_kept(checkpoints.newest, folder)}")
                scalars["learning_rate"] = float(np.asarray(rate(step - 1))) * _scale(state)
                scalars["steps_per_second"] = len(window) / seconds
                kept = step % settings.checkpoint_every == 0 or step == settings.steps
                if kept and score is not None:
                    scalars["score"] = score(model_of(state))
                log.add(step, scalars)
                progress.update(
                    task,
                    completed=step,
                    state=f"loss {scalars['loss']:.3f}, {len(window) / seconds:.1f} steps/s",
                )
                if kept:
                    scores = [row["score"] for row in log.rows if "score" in row]
                    if scores and scores[-1] > max(scores[:-1], default=-math.inf):
                        best.save(step, (state.params, state.rest))
                    checkpoints.save(step, state)
                window, clock = [], time.perf_counter()
        if score is not None:
            params, rest = best.restore((state.params, state.rest))[1]
            state = state._replace(params=params, rest=rest)
    progress.update(task, completed=settings.steps)
    return model_of(state), log.rows


def _scale(state: State) -> float:
    """What plateaus have left of the learning rate."""

    def is_plateau(part: Any) -> bool:
        return isinstance(part, ReduceLROnPlateauState)

    parts = jax.tree.leaves(state.optimizer, is_leaf=is_plateau)
    return math.prod(float(part.scale) for part in parts if is_plateau(part))


def _summarise(window: list[tuple[Sums, jax.Array]]) -> dict[str, float]:
    sums, norms = zip(*window, strict=True)
    return {**means(sums), "gradient_norm": float(np.mean(jax.device_get(norms)))}


def _bad_data(
    step: int, window: list[tuple[Sums, jax.Array]], batches: Callable[[int], Batch]
) -> str | None:
    """What is wrong with the data of the steps up to one that failed, if it is the data."""
    for number, (sums, _) in enumerate(window, start=step - len(window)):
        if float(sums["weight"]) == 0:
            return f"The data of step {number + 1} are bad: all examples have a weight of 0."
        for path, array in jax.tree.leaves_with_path(batches(number)):
            if not np.isfinite(np.asarray(array, np.float32)).all():
                return (
                    f"The data of step {number + 1} are bad: batch{jax.tree_util.keystr(path)} "
                    "has values that are not finite."
                )
    return None


def _divergence(step: int, scalars: Mapping[str, float]) -> str:
    bad = ", ".join(f"{name} is {x}" for name, x in scalars.items() if not math.isfinite(x))
    return (
        f"The training diverged before step {step}: {bad}. Choose another output and a lower "
        "learning rate or max_norm, or a longer warm-up."
    )


def _kept(newest: int, folder: Path) -> str:
    if newest:
        return f"The checkpoint of step {newest} and the log up to here are in {folder}."
    return f"There is no checkpoint yet; the log up to here is in {folder}."
