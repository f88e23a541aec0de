"""The paper's artificial task: which attention can look up a masked symbol in the other half.

A sequence 0w0w has a share of its symbols masked, at different places in its two halves, so that
each masked one stands unmasked in the other half. A model per cell of a grid learns to say what was
masked: one for each method, number of clusters or rounds, and length.

    python -m experiments.copy_task cpu
    python -m experiments.copy_task paper --help

A run that was killed goes on where it was when it is started again.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clustax.models.common import AttentionFn, sinusoids
from clustax.models.encoder import Encoder
from experiments.common import training
from experiments.common.attentions import Attentions
from experiments.common.command import RESUME, serve
from experiments.common.files import read_json, whole_file
from experiments.common.journal import revision
from experiments.common.training import Optimisation, Sums
from experiments.swap import shared

Method = Literal["full", "clustered", "improved", "lsh"]

SYMBOLS = 10
SEPARATOR, MASK = 0, SYMBOLS + 1
SOLVED = 0.99
"""The accuracy from which on a cell counts as solved."""


@dataclass(frozen=True)
class Model:
    """The size of the encoder."""

    layers: int = 4
    """Layers."""
    heads: int = 6
    """Heads of attention in each."""
    head_dim: int = 32
    """Their dimension; that of the model is heads · head_dim, and its quadruple in between."""
    norm_first: bool = False
    """Whether norms come before the parts of a layer instead of after them: trains sooner."""
    dropout_rate: float = 0.1
    """Dropout in training."""
    learned_positions: bool = False
    """Whether the encodings of positions are learned: from sinusoids, lsh hardly finds that places
    half a sequence apart are to be alike, as its queries are its keys."""


@dataclass(frozen=True)
class Settings:
    """Train a model for each cell of a grid to recover masked symbols of sequences 0w0w."""

    methods: tuple[Method, ...] = get_args(Method)
    """What is compared."""
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    """Lengths of the sequences, even."""
    clusters: tuple[int, ...] = (15, 30, 60, 100)
    """Numbers of clusters, of clustered and improved."""
    rounds: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of rounds, of lsh."""
    seeds: tuple[int, ...] = (0,)
    """One model for each: of its weights, its data, and the hashing."""
    masked: float = 0.2
    """Share of the symbols of a half that are masked, at most a half."""
    evaluated: int = 1024
    """Sequences that a trained model is tested with, a multiple of the batch size."""
    model: Model = dataclasses.field(default_factory=Model)
    attentions: Attentions = dataclasses.field(default_factory=Attentions)
    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)
    output: Path = Path("results/copy_task")
    """The folder of the results, and of the runs, which have their logs and checkpoints there."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("methods", "lengths", "clusters", "rounds", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, at least one, got {values}.")
        for name in ("clusters", "rounds"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for length in self.lengths:
            if length < 6 or length % 2:
                raise ValueError(f"lengths must be even and at least 6, got {length}.")
        if not 0 < self.masked <= 0.5:
            raise ValueError(f"masked must be above 0 and at most 0.5, got {self.masked}.")
        if self.evaluated < 1 or self.evaluated % self.optimisation.batch_size:
            raise ValueError(
                f"evaluated must be a multiple of batch_size = {self.optimisation.batch_size}, "
                f"got {self.evaluated}."
            )


# Lengths, clusters, buckets and chunks are the paper's over four, without its longest. As there, k
# is about the number of queries in a cluster where these are largest.
CPU = Settings(
    lengths=(16, 32, 64),
    clusters=(4, 8, 15, 25),
    model=Model(layers=1, heads=2, norm_first=True, dropout_rate=0.0, learned_positions=True),
    attentions=Attentions(topk=16, num_buckets=16, chunk_size=8),
    optimisation=Optimisation(
        steps=900,
        batch_size=16,
        learning_rate=1e-2,
        warmup_steps=50,
        schedule="cosine",
        log_every=20,
        checkpoint_every=200,
    ),
)
PRESETS = {
    "cpu": ("A small model and grid, for a machine without an accelerator.", CPU),
    "paper": ("The paper's model and grid, as far as they are known.", Settings()),
}


class Cell(NamedTuple):
    """One of the models of the grid."""

    method: Method
    size: int | None  # Clusters or rounds; full attention has none.
    length: int
    seed: int

    @property
    def label(self) -> str:
        """The method with its size."""
        return self.method if self.size is None else f"{self.method}-{self.size}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.label}_length-{self.length}_seed-{self.seed}"


def sizes(settings: Settings, method: Method) -> tuple[int | None, ...]:
    """The sizes of a method, each a column of its heat map."""
    if method == "full":
        return (None,)
    return settings.rounds if method == "lsh" else settings.clusters


def cells(settings: Settings) -> list[Cell]:
    """The grid, shortest sequences first."""
    return [
        Cell(method, size, length, seed)
        for length in settings.lengths
        for method in settings.methods
        for size in sizes(settings, method)
        for seed in settings.seeds
    ]


def attention_of(settings: Settings, cell: Cell) -> AttentionFn:
    """The attention of a cell."""
    if cell.size is None:
        return jax.nn.dot_product_attention
    return settings.attentions.make(cell.method, cell.size, settings.model.head_dim, cell.seed)


class CopyModel(nnx.Module):
    """An encoder of symbols and their positions, which says for each position what stands there."""

    def __init__(self, size: Model, length: int, attention_fn: AttentionFn, *, rngs: nnx.Rngs):
        """Creates random weights.

        Args:
            size: of the encoder.
            length: of the sequences.
            attention_fn: of its layers.
            rngs: for the weights and for dropout.
        """
        d_model = size.heads * size.head_dim
        self.symbols = nnx.Embed(SYMBOLS + 2, d_model, rngs=rngs)
        waves = sinusoids(length, d_model)
        # Random ones start with the mean square of the waves.
        self.positions = (
            nnx.Param(jax.random.normal(rngs.params(), waves.shape) * 0.5**0.5)
            if size.learned_positions
            else nnx.Variable(waves)
        )
        self.encoder = Encoder(
            size.layers,
            d_model,
            size.heads,
            attention_fn=attention_fn,
            norm_first=size.norm_first,
            dropout_rate=size.dropout_rate,
            rngs=rngs,
        )
        self.output = nnx.Linear(d_model, SYMBOLS + 1, rngs=rngs)

    def __call__(self, symbols: Int[Array, "B T"]) -> Float[Array, "B T symbols"]:
        """Returns the logits of separator and symbols."""
        return self.output(self.encoder(self.symbols(symbols) + self.positions[...]))


def build(settings: Settings, cell: Cell) -> CopyModel:
    """The model of a cell before its training."""
    rngs = nnx.Rngs(cell.seed)
    return CopyModel(settings.model, cell.length, attention_of(settings, cell), rngs=rngs)


def draw_batch(
    rng: np.random.Generator, size: int, length: int, masked: float
) -> dict[str, np.ndarray]:
    """Draws sequences.

    Args:
        rng: what to draw from.
        size: how many.
        length: their length.
        masked: the share of symbols to mask in each half; at least one is.

    Returns:
        "inputs" with masks, "targets" without, both (size, length), and whether it is "masked".
    """
    width = length // 2 - 1
    word = rng.integers(1, SYMBOLS + 1, (size, width))
    count = max(1, round(masked * width))
    places = rng.permuted(np.tile(np.arange(width), (size, 1)), axis=1)
    halves = (places < count, (count <= places) & (places < 2 * count))
    edge = np.full((size, 1), SEPARATOR)
    targets = np.concatenate([edge, word, edge, word], axis=1)
    hidden = np.concatenate([edge > 0, halves[0], edge > 0, halves[1]], axis=1)
    return {
        "inputs": np.where(hidden, MASK, targets).astype(np.int32),
        "targets": targets.astype(np.int32),
        "masked": hidden,
    }


def copy_loss(model: CopyModel, batch: Mapping[str, Array]) -> Sums:
    """The cross-entropy and the accuracy at the masked positions."""
    logits = model(batch["inputs"])
    weight = batch["masked"].astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return {
        "weight": jnp.sum(weight),
        "loss": jnp.sum(weight * loss),
        "accuracy": jnp.sum(weight * right),
    }


def batch_of(settings: Settings, cell: Cell, part: int, number: int) -> dict[str, np.ndarray]:
    """A batch, the same whenever it is asked for: of part 0 for training, of part 1 for testing."""
    rng = np.random.default_rng((cell.seed, part, number))
    return draw_batch(rng, settings.optimisation.batch_size, cell.length, settings.masked)


def run_cell(settings: Settings, cell: Cell, commit: str, progress: Progress) -> dict[str, Any]:
    """Trains and tests the model of a cell, unless that is done already."""
    folder = settings.output / "runs" / cell.name
    parts = {name: dataclasses.asdict(getattr(settings, name)) for name in TRAINED_WITH}
    tested = {"masked": settings.masked, "evaluated": settings.evaluated}
    training.claim(folder, {**parts, **tested, "cell": cell._asdict()})
    path = folder / "result.json"
    if path.exists():
        return read_json(path)
    model, log = training.train(
        build(settings, cell),
        copy_loss,
        lambda step: batch_of(settings, cell, 0, step),
        settings.optimisation,
        folder,
        progress,
        f"{cell.label}, N = {cell.length}",
    )
    number = settings.evaluated // settings.optimisation.batch_size
    found = training.evaluate(
        model, copy_loss, (batch_of(settings, cell, 1, each) for each in range(number))
    )
    result = {
        **cell._asdict(),
        **found,
        "commit": commit,
        "curve": {name: [row[name] for row in log] for name in ("step", "loss", "accuracy")},
    }
    with whole_file(path) as new:
        new.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


TRAINED_WITH = ("model", "attentions", "optimisation")


class Accuracies:
    """The accuracies of a grid, means over the seeds.

    Args:
        results: those of the cells.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]]):
        self.lengths = list(dict.fromkeys(result["length"] for result in results))
        self._found: dict[tuple[str, int | None, int], list[float]] = {}
        for result in results:
            key = (result["method"], result["size"], result["length"])
            self._found.setdefault(key, []).append(result["accuracy"])

    @property
    def columns(self) -> list[tuple[str, int | None]]:
        """The methods and their sizes."""
        return list(dict.fromkeys((method, size) for method, size, _ in self._found))

    def of(self, method: str, size: int | None, length: int) -> float:
        """The mean accuracy of one cell."""
        return float(np.mean(self._found[method, size, length]))


def make_table(accuracies: Accuracies) -> Table:
    """The results as they are printed."""
    table = Table(title="Accuracy at masked symbols")
    table.add_column("attention")
    for length in accuracies.lengths:
        table.add_column(f"N = {length}", justify="right")
    for method, size in accuracies.columns:
        found = [accuracies.of(method, size, length) for length in accuracies.lengths]
        style = [f"[bold]{x:.1%}[/bold]" if x >= SOLVED else f"{x:.1%}" for x in found]
        table.add_row(method if size is None else f"{method}-{size}", *style)
    return table


def draw_maps(accuracies: Accuracies) -> Figure:
    """Draws a heat map of each method, sequence length against clusters or rounds."""
    methods = list(dict.fromkeys(method for method, _ in accuracies.columns))
    columns = {m: [size for method, size in accuracies.columns if method == m] for m in methods}
    lengths = accuracies.lengths
    figure = Figure(figsize=(13, 1.4 + 0.75 * len(lengths)), layout="constrained")
    panels = figure.subplots(
        1,
        len(methods),
        squeeze=False,
        sharey=True,
        width_ratios=[len(columns[method]) for method in methods],
    )[0]
    for axes, method in zip(panels, methods, strict=True):
        found = np.array([[accuracies.of(method, s, n) for s in columns[method]] for n in lengths])
        axes.imshow(found, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(found):
            colour = "black" if value > 0.6 else "white"
            text = f"{100 * value:.0f}" if value < 0.995 else "100"
            axes.text(column, row, text, ha="center", va="center", color=colour)
        names = ["" if size is None else str(size) for size in columns[method]]
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set(title=method, xlabel={"full": "", "lsh": "rounds"}.get(method, "clusters C"))
    panels[0].set_ylabel("sequence length N")
    bar = figure.colorbar(panels[-1].images[0], ax=list(panels), label="accuracy")
    bar.ax.axhline(1 / SYMBOLS, color="white", linewidth=1)  # What guessing gives.
    return figure


def draw_curves(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws accuracy in training against steps, a panel for each length and method."""
    lengths = list(dict.fromkeys(result["length"] for result in results))
    compared = [m for m in get_args(Method) if any(r["method"] == m for r in results)]
    methods = [method for method in compared if method != "full"] or compared
    figure = Figure(figsize=(13, 0.6 + 2.6 * len(lengths)), layout="constrained")
    grid = figure.subplots(len(lengths), len(methods), squeeze=False, sharex=True, sharey=True)
    for length, row in zip(lengths, grid, strict=True):
        for method, axes in zip(methods, row, strict=True):
            here = [r for r in results if r["length"] == length]
            _draw_curves(axes, [r for r in here if r["method"] in ("full", method)])
            axes.set_title(f"{method}, N = {length}")
        row[0].set_ylabel("accuracy")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[0]:
        axes.legend(fontsize=8, loc="upper left")
    return figure


def _draw_curves(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    drawn: dict[str, Any] = {}
    for result in results:
        size = result["size"]
        label = "full" if size is None else str(size)
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if size is None else {}
        style |= {"color": drawn[label]} if label in drawn else {"label": label}
        (line,) = axes.plot(result["curve"]["step"], result["curve"]["accuracy"], **style)
        drawn[label] = line.get_color()
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)


def run(settings: Settings, console: Console) -> None:
    """Trains and tests all models, prints the table, writes the results."""
    settings.output.mkdir(parents=True, exist_ok=True)
    with training.progress_bar(console) as progress:
        results = list(_run_all(settings, progress))
    accuracies = Accuracies(results)
    console.print(make_table(accuracies))
    commits = sorted({result.pop("commit") for result in results})
    command = " ".join(["python -m experiments.copy_task", *sys.argv[1:]])
    record = shared.describe(
        settings, (), (), ("optax",), command=command, commits=commits, cells=results
    )
    figures = {"heat_maps": draw_maps(accuracies), "curves": draw_curves(results)}
    for name, figure in figures.items():
        with whole_file(settings.output / f"{name}.png") as path:
            figure.savefig(path, dpi=110)
    with whole_file(settings.output / "results.json") as path:
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    console.print(f"Wrote results.json, heat_maps.png and curves.png to {settings.output}")


def _run_all(settings: Settings, progress: Progress) -> Iterator[dict[str, Any]]:
    grid = cells(settings)
    commit = revision()  # Later, another one may be checked out.
    task = progress.add_task("Models", total=len(grid), state="")
    for cell in grid:
        shown = set(progress.task_ids)
        yield run_cell(settings, cell, commit, progress)
        for finished in set(progress.task_ids) - shown:  # Its bar: many would fill the screen.
            progress.remove_task(finished)
        progress.advance(task)


def main() -> None:
    """The command line."""
    settings = tyro.extras.overridable_config_cli(PRESETS, prog="python -m experiments.copy_task")
    serve(partial(run, settings, Console()), RESUME)


if __name__ == "__main__":
    main()
