"""What the tasks share: the attentions they compare, how these take turns, and what is written."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

import clustax
from clustax import ClusteredAttention
from experiments.common.files import whole_file
from experiments.common.journal import Journal, source_digest
from experiments.common.packages import Package
from experiments.common.timing import compile_all

B = TypeVar("B")
P = TypeVar("P")
R = TypeVar("R")

EXACT = "exact"
CLUSTERED = "clustered (paper)"
PAPER = "improved (paper)"
DEFAULT = "improved (default)"
METHODS = {
    CLUSTERED: ClusteredAttention.paper(topk=0),
    "clustered (default)": ClusteredAttention(topk=0),
    PAPER: ClusteredAttention.paper(),
    "improved (Hamming, lse)": ClusteredAttention.paper(merge="lse"),
    "improved (Euclidean, mass)": ClusteredAttention.paper(metric="euclidean"),
    "improved (Euclidean, lse)": ClusteredAttention.paper(metric="euclidean", merge="lse"),
    "improved (logit, lse)": ClusteredAttention.paper(
        metric="euclidean", space="logit", merge="lse"
    ),
    DEFAULT: ClusteredAttention(),
}
"""What is compared with exact attention; its variants have other sizes."""
OPTIONS = ("metric", "space", "merge", "num_subclusters", "num_iterations")
"""In what the methods differ, beside k = 0 in plain clustered attention."""


class Variant(NamedTuple):
    """One of the attentions that are compared, a row of the table."""

    name: str
    attention: ClusteredAttention | None = None  # None is exact attention.

    @property
    def num_clusters(self) -> int | None:
        """C, if there are clusters."""
        return self.attention.num_clusters if self.attention else None

    @property
    def topk(self) -> int | None:
        """k, if there are clusters."""
        return self.attention.topk if self.attention else None

    @property
    def label(self) -> str:
        """The name with the sizes."""
        sizes = f", C={self.num_clusters}, k={self.topk}" if self.attention else ""
        return f"{self.name}{sizes}"


def variant(name: str, num_clusters: int, topk: int, seed: int) -> Variant:
    """One of the methods in these sizes; plain clustered attention keeps its k of 0."""
    method = METHODS[name]
    sizes = {"num_clusters": num_clusters, "topk": topk if method.topk else 0}
    return Variant(name, dataclasses.replace(method, **sizes, seed=seed))


def milliseconds(seconds: float, quartiles: Sequence[float], separator: str = " ") -> str:
    """A median, and half the interquartile range after ±."""
    low, high = quartiles
    return f"{1000 * seconds:.0f}{separator}±{500 * (high - low):.0f}"


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine between the vectors along the last axis."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def in_turns(
    batches: Iterable[B],
    rivals: Sequence[Callable[[B], R]],
    advance: Callable[[], None] = lambda: None,
) -> Iterator[list[R]]:
    """Runs all rivals on each batch in turn, so that the machine's noise hits all alike.

    Args:
        batches: what to run on, all of one shape.
        rivals: those that take turns; none is always the first.
        advance: called whenever a rival has been compiled or has run on a batch.

    Yields:
        What came of one batch, in the order of the rivals.
    """
    order = list(range(len(rivals)))
    for number, batch in enumerate(batches):
        if number == 0:
            compile_all([partial(rival, batch) for rival in rivals], advance)
        found = {}
        for index in order:
            found[index] = rivals[index](batch)
            advance()
        order = order[1:] + order[:1]
        yield [found[index] for index in range(len(rivals))]


def measure(
    journal: Journal,
    part: str,
    batches: Sequence[B],
    prepare: Callable[[B], P],
    rivals: Sequence[Callable[[P], R]],
    summarise: Callable[[B, list[R]], list[dict[str, Any]]],
    console: Console,
) -> list[list[dict[str, Any]]]:
    """Runs all rivals on those batches that are not in the journal yet, and keeps what is found.

    Args:
        journal: where each finished batch goes.
        part: what its names in the journal begin with, and the progress bar.
        batches: all of them.
        prepare: makes of a batch what the rivals take.
        rivals: as for `in_turns`.
        summarise: makes of a batch and the rivals' results what is kept, one row a rival.
        console: shows the progress.

    Returns:
        The rows of each batch.
    """
    names = [f"{part} {number}" for number in range(len(batches))]
    left = [
        (name, batch)
        for name, batch in zip(names, batches, strict=True)
        if name not in journal.finished
    ]
    with Progress(console=console) as progress:
        # Compilation is one turn more for each rival, if anything is left.
        turns = len(rivals) * (len(batches) + bool(left))
        task = progress.add_task(part.capitalize(), total=turns)
        progress.advance(task, len(rivals) * (len(batches) - len(left)))
        prepared = (prepare(batch) for _, batch in left)
        results = in_turns(prepared, rivals, lambda: progress.advance(task))
        for (name, batch), found in zip(left, results, strict=True):
            journal.add(name, summarise(batch, found))
    return [journal.finished[name] for name in names]


def describe(
    settings: Any,
    variants: Sequence[Variant],
    packages: Sequence[Package],
    libraries: Sequence[str],
    **others: Any,
) -> dict[str, Any]:
    """All that is needed to understand the figures of a run, or to get them again.

    Args:
        settings: a dataclass; where its output goes makes no difference.
        variants: what is compared.
        packages: where weights and data come from.
        libraries: the names, for pip, of those that matter beside JAX, Flax and NumPy.
        **others: what else matters.
    """
    options = dataclasses.asdict(settings)
    del options["output"]
    versions = {"python": platform.python_version(), "clustax": clustax.__version__}
    for name in ("jax", "flax", "numpy", *libraries):
        versions[name] = importlib.metadata.version(name)
    return {
        "settings": options,
        "attentions": {
            v.label: dataclasses.asdict(v.attention) for v in variants if v.attention is not None
        },
        "packages": [dataclasses.asdict(package) for package in packages],
        **others,
        "device": f"{jax.devices()[0].device_kind}, {cores()}",
        "versions": versions,
    }


def cores() -> str:
    """How many this process may run on, which can be fewer than there are."""
    on_linux = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    return "1 core" if count == 1 else f"{count} cores"


def open_journal(output: Path, description: Mapping[str, Any], console: Console) -> Journal:
    """The finished pieces of this very run, if it was killed; says what becomes of them."""
    code = source_digest(Path(clustax.__file__).parent, Path(__file__).parents[1])
    journal = Journal(Path(f"{output}.partial.jsonl"), {**description, "source": code})
    if journal.discarded:
        console.print(
            f"{journal.path} is of a run with other settings, code or versions: starting anew."
        )
    elif journal.finished:
        console.print(f"Going on after {len(journal.finished)} batches in {journal.path}.")
    return journal


def explain(variants: Sequence[Variant], console: Console) -> None:
    """Prints in what the methods differ."""
    methods = {v.name: v.attention for v in variants if v.attention}
    for name, attention in methods.items():
        options = [f"{option}={getattr(attention, option)}" for option in OPTIONS]
        options += [] if attention.topk else ["topk=0"]
        console.print(f"{name}: {', '.join(options)}", style="dim", highlight=False)


def write_results(
    output: Path, record: Mapping[str, Any], figure: Figure, console: Console
) -> None:
    """Writes the record, and the picture beside it."""
    with whole_file(Path(f"{output}.png")) as path:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    with whole_file(Path(f"{output}.json")) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"Wrote {output}.json and .png")
