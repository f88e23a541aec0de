"""GLUE: does a fine-tuned encoder keep its scores when clustered attention takes over?

An encoder is fine-tuned with exact attention, and scored with exact and with clustered attention,
without retraining; and the other way round, it is fine-tuned with clustered attention.

    python -m experiments.glue cpu --data glue_data
    python -m experiments.glue paper --data glue_data --model DIR

A run that was killed goes on where it was when it is started again. The results of what is finished
are written after each model.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tyro
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import clustax
from clustax.models import BertForSequenceClassification
from experiments.common import finetuning, training
from experiments.common.command import RESUME, serve
from experiments.common.encoding import encode
from experiments.common.finetuning import FineTuning, Inputs, Pretrained
from experiments.common.journal import Journal, revision, source_digest
from experiments.common.pictures import differences
from experiments.common.rows import Malformed, Problems
from experiments.common.training import Sums
from experiments.swap import shared
from experiments.swap.shared import CLUSTERED, DEFAULT, EXACT, PAPER, Variant
from experiments.tables import points
from experiments.tasks.glue import METRICS, TASKS, Example, read_task

COMPARED = (DEFAULT, PAPER, CLUSTERED)
RESAMPLES = 1000

PUBLISHED_TASKS = ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI")
PUBLISHED = [
    {
        "attention": attention,
        "num_clusters": num_clusters,
        "scores": dict(zip(PUBLISHED_TASKS, scores, strict=True)),
    }
    for attention, num_clusters, scores in (
        (EXACT, None, (0.601, 0.880, 0.868, 0.929, 0.915, 0.682, 0.947, 0.900, 0.437)),
        (PAPER, 25, (0.601, 0.880, 0.873, 0.930, 0.915, 0.704, 0.947, 0.900, 0.437)),
        (CLUSTERED, 25, (0.598, 0.794, 0.436, 0.746, 0.894, 0.498, 0.944, 0.789, 0.437)),
    )
]
"""The paper's scores of RoBERTa, which is another model than the one here."""


@dataclass(frozen=True)
class Settings:
    """Fine-tune an encoder on GLUE's tasks, and score it with exact and clustered attention."""

    data: Path
    """The folder of the tasks' folders: CoLA, SST-2 and so on."""
    model: Path | None = None
    """The folder of a BERT or RoBERTa in Hugging Face's files; all-MiniLM-L6-v2 if None."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which of GLUE's tasks."""
    trained_with: tuple[str, ...] = (EXACT, DEFAULT)
    """Attentions to fine-tune with."""
    reverse_tasks: tuple[str, ...] | None = None
    """The tasks to fine-tune on with another attention than exact; all of them if None."""
    trained_clusters: int = 25
    """Clusters in the attention to fine-tune with, if it has any."""
    clusters: tuple[int, ...] = (25, 10, 50)
    """Numbers of clusters to score with."""
    topk: int = 32
    """Keys with exact weights in improved clustered attention."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A model for each: of the new head, dropout, the order of the data, and the clusters."""
    max_length: int = 128
    """Where texts are cut, in tokens."""
    buckets: tuple[int, ...] = (16, 32, 64, 96, 128)
    """The lengths that batches are padded to, ascending."""
    tuning: FineTuning = dataclasses.field(default_factory=FineTuning)
    malformed: Malformed = "refuse"
    """What becomes of rows that are malformed; those that are skipped are counted."""
    output: Path = Path("results/glue")
    """The folder of the results, and of the runs, which have their logs and checkpoints there."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("tasks", "trained_with", "clusters", "seeds", "buckets"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, at least one, got {values}.")
        for name, known in (
            ("tasks", TASKS),
            ("reverse_tasks", TASKS),
            ("trained_with", (EXACT, *shared.METHODS)),
        ):
            if unknown := [value for value in getattr(self, name) or () if value not in known]:
                raise ValueError(f"{name} must be of {', '.join(known)}, got {unknown}.")
        if min(*self.clusters, self.trained_clusters) < 1:
            raise ValueError(f"clusters must be at least 1, got {self.clusters}.")
        if list(self.buckets) != sorted(self.buckets) or self.buckets[-1] < self.max_length:
            raise ValueError(
                f"buckets must ascend to at least max_length = {self.max_length}, got "
                f"{self.buckets}."
            )


PRESETS = {
    "cpu": (
        "The tasks whose data are in this repository's reach, small, for a CPU.",
        Settings(
            data=tyro.MISSING,
            tasks=("SST-2", "MRPC", "STS-B", "RTE"),
            reverse_tasks=("MRPC",),  # the texts of others are hardly longer than k, or too hard
            seeds=(0,),
            tuning=FineTuning(max_tokens=200_000, learning_rate=3e-4),
        ),
    ),
    "paper": (
        "All tasks, three epochs of all data.",
        Settings(data=tyro.MISSING, tuning=FineTuning(learning_rate=2e-5)),
    ),
}


class Cell(NamedTuple):
    """One of the models of the grid."""

    task: str
    trained_with: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        attention = "".join(c if c.isalnum() else "-" for c in self.trained_with).strip("-")
        return f"{self.task}_{attention}_seed-{self.seed}"


def cells(settings: Settings) -> list[Cell]:
    """The grid: first all tasks with exact attention; other seeds come last."""
    reverse = settings.tasks if settings.reverse_tasks is None else settings.reverse_tasks
    return [
        Cell(task, attention, seed)
        for seed in settings.seeds
        for attention in settings.trained_with
        for task in settings.tasks
        if attention == EXACT or task in reverse
    ]


def trained_variant(settings: Settings, cell: Cell) -> Variant:
    """The attention that a model is fine-tuned with."""
    if cell.trained_with == EXACT:
        return Variant(EXACT)
    return shared.variant(cell.trained_with, settings.trained_clusters, settings.topk, cell.seed)


def scored_variants(settings: Settings, seed: int) -> list[Variant]:
    """What a model is scored with, exact attention first."""
    return [
        Variant(EXACT),
        *(
            shared.variant(name, count, settings.topk, seed)
            for count in settings.clusters
            for name in COMPARED
        ),
    ]


def tokenize(pretrained: Pretrained, examples: Sequence[Example], max_length: int) -> Inputs:
    """The tokens of sentences or pairs, cut at a length: of a pair, the longer one first."""
    tokenizer = pretrained.tokenizer
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    texts = [(e.first,) if e.second is None else (e.first, e.second) for e in examples]
    codes = tokenizer.encode_batch([text[0] if len(text) == 1 else text for text in texts])
    return Inputs(
        [code.ids for code in codes],
        [code.type_ids for code in codes],
        {"label": np.array([example.label for example in examples], np.float32)},
    )


def num_outputs(task: str) -> int:
    """How many outputs the head has: one for each label, or the score."""
    return len(TASKS[task].labels) or 1


def classification_loss(
    task: str, model: BertForSequenceClassification, batch: Mapping[str, Array]
) -> Sums:
    """Cross-entropy of labels, or the squared error of scores."""
    outputs = model(batch["tokens"], batch["lengths"], batch["token_types"])
    if TASKS[task].labels:
        labels = batch["label"].astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    else:
        loss = (outputs[:, 0] - batch["label"]) ** 2
    return {"weight": jnp.float32(loss.size), "loss": jnp.sum(loss)}


def predict(model: BertForSequenceClassification, inputs: Inputs, settings: Settings) -> np.ndarray:
    """The outputs of the head (examples, outputs), without dropout."""
    found: np.ndarray | None = None
    for rows, batch in finetuning.evaluation_batches(
        inputs, settings.tuning.batch_size, settings.buckets
    ):
        hidden = encode(model.bert, batch["tokens"], batch["lengths"], batch["token_types"])
        outputs = np.asarray(model.classify(hidden))
        found = np.zeros((len(inputs.tokens), outputs.shape[1])) if found is None else found
        found[rows] = outputs
    if found is None:
        raise ValueError("inputs must have a text, got none.")
    return found


def decide(outputs: np.ndarray) -> np.ndarray:
    """The labels, or the scores, that outputs stand for."""
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)


def approximated(variant: Variant, lengths: np.ndarray) -> np.ndarray:
    """Which texts are too long to get exact attention by design.

    With no more tokens than clusters, each query is a cluster; with no more than k, all keys of all
    queries have exact weights.
    """
    if variant.attention is None:
        return np.zeros(len(lengths), bool)
    return lengths > max(variant.attention.num_clusters, variant.attention.topk)


def difference_interval(
    metric: Callable[[np.ndarray, np.ndarray], float],
    truth: np.ndarray,
    found: np.ndarray,
    exact: np.ndarray,
    seed: int,
) -> tuple[float, float]:
    """Bootstraps the 95 % interval of the difference of two scores, over the examples."""

    def difference(rows: np.ndarray) -> float:
        return metric(truth[rows], found[rows]) - metric(truth[rows], exact[rows])

    if np.array_equal(found, exact):
        return 0.0, 0.0
    interval = scipy.stats.bootstrap(
        (np.arange(len(truth)),),
        difference,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def score(
    task: str, variant: Variant, inputs: Inputs, outputs: np.ndarray, exact: np.ndarray, seed: int
) -> dict[str, Any]:
    """Compares what a model finds with an attention to the truth, and to exact attention.

    Args:
        task: which.
        variant: the attention.
        inputs: the examples.
        outputs: what was found.
        exact: what was found with exact attention.
        seed: of the bootstrap.
    """
    truth, found, expected = inputs.targets["label"], decide(outputs), decide(exact)
    names = TASKS[task].metrics
    metric = METRICS[names[0]]
    changed = approximated(variant, inputs.lengths)
    distance = np.abs(outputs - exact).max(1)
    row = {
        "attention": variant.name,
        "num_clusters": variant.num_clusters,
        "topk": variant.topk,
        "examples": len(truth),
        "scores": {name: METRICS[name](truth, found) for name in names},
        "difference": metric(truth, found) - metric(truth, expected),
        "difference_interval": difference_interval(metric, truth, found, expected, seed),
        "approximated": int(changed.sum()),
        # Of the others, which are exact by design, to show that they are.
        "largest_change_of_others": float(distance[~changed].max(initial=0.0)),
    }
    if TASKS[task].labels:
        row["equal_labels"] = float(np.mean(found == expected))
    if changed.any():
        part = (truth[changed], found[changed], expected[changed])
        row["score_of_approximated"] = metric(part[0], part[1])
        row["difference_of_approximated"] = metric(*part[:2]) - metric(part[0], part[2])
        row["interval_of_approximated"] = difference_interval(metric, *part, seed)
    return row


class Prepared(NamedTuple):
    """A task, ready to be trained on."""

    train: Inputs
    dev: dict[str, Inputs]
    about: dict[str, Any]


def prepare(settings: Settings, task: str, pretrained: Pretrained, problems: Problems) -> Prepared:
    """Reads and tokenizes the data of a task."""
    before = len(problems.found)
    data = read_task(task, settings.data, problems)
    train = tokenize(pretrained, data.train, settings.max_length)
    dev = {
        name: tokenize(pretrained, examples, settings.max_length)
        for name, examples in data.dev.items()
    }
    about = {
        "train": len(data.train),
        "dev": {name: len(examples) for name, examples in data.dev.items()},
        "mean_tokens": {name: float(inputs.lengths.mean()) for name, inputs in dev.items()},
        "unlabelled": data.unlabelled,
        "malformed": len(problems.found) - before,
        "in_both": data.in_both,
        "own_split": data.ours,
        "digest": [inputs.digest for inputs in (train, *dev.values())],
    }
    return Prepared(train, dev, about)


def run_cell(
    settings: Settings,
    cell: Cell,
    pretrained: Pretrained,
    data: Prepared,
    commit: str,
    progress: Progress,
) -> dict[str, Any]:
    """Fine-tunes and scores the model of a cell, unless that is done already."""
    folder = settings.output / "runs" / cell.name
    variants = scored_variants(settings, cell.seed)
    identity = {
        "cell": cell._asdict(),
        "trained_with": repr(trained_variant(settings, cell).attention),
        "tuning": dataclasses.asdict(settings.tuning),
        "buckets": settings.buckets,
        "model": pretrained.digest,
        "data": data.about["digest"],
    }
    training.claim(folder, identity)
    code = source_digest(Path(clustax.__file__).parent)
    journal = Journal(folder / "outputs.jsonl", {**identity, "code": code})
    wanted = {_piece(variant, part) for variant in variants for part in data.dev}
    if not wanted <= journal.finished.keys():
        model, curve = train_cell(settings, cell, pretrained, data, folder, progress)
        journal.add("curve", curve)
        journal.add("commit", commit)
        task = progress.add_task(f"{cell.task}, scoring", total=len(variants), state="")
        for variant in variants:
            swapped = model.with_attention(finetuning.attention_of(variant))
            for part, inputs in data.dev.items():
                if (name := _piece(variant, part)) not in journal.finished:
                    journal.add(name, predict(swapped, inputs, settings).tolist())
            progress.advance(task)
        progress.remove_task(task)
    rows = []
    for part, inputs in data.dev.items():
        outputs = [np.array(journal.finished[_piece(v, part)]) for v in variants]
        for variant, found in zip(variants, outputs, strict=True):
            row = score(cell.task, variant, inputs, found, outputs[0], cell.seed)
            rows.append({"set": part, **row})
    return {
        **cell._asdict(),
        "data": data.about,
        "curve": journal.finished["curve"],
        "commit": journal.finished["commit"],
        "rows": rows,
    }


def _piece(variant: Variant, part: str) -> str:
    """What the outputs with an attention on a development set are called in the journal."""
    return f"{variant.attention!r} on {part}"


def train_cell(
    settings: Settings,
    cell: Cell,
    pretrained: Pretrained,
    data: Prepared,
    folder: Path,
    progress: Progress,
) -> tuple[BertForSequenceClassification, list[dict[str, float]]]:
    """The model of a cell that is best on the first development set, and the curve of training."""
    encoder = pretrained.encoder(trained_variant(settings, cell), cell.seed)
    rngs = nnx.Rngs(cell.seed)
    model = BertForSequenceClassification(encoder, num_labels=num_outputs(cell.task), rngs=rngs)
    dev = next(iter(data.dev.values()))
    metric = METRICS[TASKS[cell.task].metrics[0]]
    model, log = finetuning.fine_tune(
        model,
        partial(classification_loss, cell.task),
        data.train,
        settings.tuning,
        settings.buckets,
        cell.seed,
        folder,
        progress,
        f"{cell.task}, {cell.trained_with}",
        score=lambda trained: metric(dev.targets["label"], decide(predict(trained, dev, settings))),
    )
    kept = ("step", "loss", "score")
    return model, [{name: row[name] for name in kept if name in row} for row in log]


def mean_rows(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], ...]]:
    """The rows of all seeds that belong together: same task, set, and attentions."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for model in models:
        for row in model["rows"]:
            key = (model["task"], row["set"], model["trained_with"])
            key += (row["attention"], row["num_clusters"])
            merged = {"task": model["task"], "trained_with": model["trained_with"], **row}
            groups.setdefault(key, []).append(merged)
    yield from (tuple(group) for group in groups.values())


def make_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """The results as they are printed: means over the seeds, the first seed's intervals."""
    table = Table(title="GLUE: the same weights with other attentions")
    columns = ("task", "trained with", "attention", "C", "score", "points to exact", "approximated")
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:3] else "right")
    for group in mean_rows(models):
        first = group[0]
        change = points(
            float(np.mean([row["difference"] for row in group])), first["difference_interval"]
        )
        metric = next(iter(first["scores"]))
        mean = float(np.mean([row["scores"][metric] for row in group]))
        table.add_row(
            first["task"] if first["set"] == "dev" else f"{first['task']} {first['set']}",
            first["trained_with"],
            first["attention"],
            str(first["num_clusters"] or ""),
            f"{mean:.1%}",
            change,
            f"{first['approximated']} of {first['examples']}",
        )
    return table


def draw(models: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws points to exact attention against clusters, a panel for each task and training.

    Solid lines are over all of the development set, dotted ones over what is approximated.
    """
    # Of several seeds, the first is drawn.
    drawn = {(m["task"], m["trained_with"]): m for m in reversed(models)}
    figure = Figure(figsize=(1 + 3.2 * len(drawn), 4.2), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, model in zip(panels, reversed(drawn.values()), strict=True):
        first = model["rows"][0]["set"]
        rows = [row for row in model["rows"] if row["set"] == first and row["num_clusters"]]
        for name, marker in zip(COMPARED, "so^", strict=True):
            found = sorted(
                (row for row in rows if row["attention"] == name),
                key=lambda row: row["num_clusters"],
            )
            counts = [row["num_clusters"] for row in found]
            line = axes.errorbar(counts, *differences(found), marker=marker, capsize=3, label=name)
            part = [100 * row.get("difference_of_approximated", np.nan) for row in found]
            axes.plot(counts, part, ":", marker=marker, color=line[0].get_color(), alpha=0.6)
        axes.plot([], [], ":", color="gray", label="texts that are not exact by design")
        axes.axhline(0, color="black", linewidth=1)
        axes.set_title(f"{model['task']}, trained with\n{model['trained_with']}", fontsize=10)
        axes.set(xlabel="clusters C")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("points more than exact attention")
    panels[0].legend(fontsize=8)
    return figure


def run(settings: Settings, console: Console) -> None:
    """Fine-tunes and scores all models; after each, writes the results of those that are done."""
    settings.output.mkdir(parents=True, exist_ok=True)
    pretrained = finetuning.pretrained(settings.model)
    problems = Problems(settings.malformed)
    commit = revision()  # Later, another one may be checked out.
    data = {task: prepare(settings, task, pretrained, problems) for task in settings.tasks}
    if problems.found:
        console.print(
            f"{len(problems.found)} malformed rows were left out:",
            *problems.found[:5],
            markup=False,
        )
    models: list[dict[str, Any]] = []
    grid = cells(settings)
    with training.progress_bar(console) as progress:
        task = progress.add_task("Models", total=len(grid), state="")
        for cell in grid:
            models.append(run_cell(settings, cell, pretrained, data[cell.task], commit, progress))
            left = [cell.name for cell in grid[len(models) :]]
            write_results(settings, pretrained, models, problems, left)
            progress.advance(task)
    console.print(make_table(models))
    console.print(f"Wrote results.json and results.png to {settings.output}")


def write_results(
    settings: Settings,
    pretrained: Pretrained,
    models: Sequence[Mapping[str, Any]],
    problems: Problems,
    left: Sequence[str],
) -> None:
    """Writes what is there so far, and what is not there yet."""
    record = finetuning.describe(
        settings,
        pretrained,
        scored_variants(settings, settings.seeds[0]),
        malformed=len(problems.found),
        published=PUBLISHED,
        models=models,
        left=left,
    )
    finetuning.write(settings.output, record, draw(models))


def main() -> None:
    """The command line."""
    settings = tyro.extras.overridable_config_cli(PRESETS, prog="python -m experiments.glue")
    serve(partial(run, settings, Console()), RESUME)


if __name__ == "__main__":
    main()
