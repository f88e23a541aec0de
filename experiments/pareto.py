"""Error against time and against operations, for many settings of clustered attention.

The queries, keys and values are those of real models, and random ones. Clustered attention in many
settings, and its rivals, take turns on them, and are compared with exact attention.

    python -m experiments.pareto --help

A run that was killed goes on where it was when it is started again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clustax import ClusteredAttention, baselines, diagnostics
from experiments.common.debian import ASTERISK_SOUNDS, ASTERISK_TEXTS
from experiments.common.journal import Journal
from experiments.common.packages import (
    MINILM,
    NEWSGROUPS,
    WHISPER_TINY_EN,
    Package,
    PackageUnavailableError,
)
from experiments.common.pictures import label_log_axis
from experiments.common.speech import asterisk_prompts, spectrograms
from experiments.common.text import DocumentsError
from experiments.common.timing import Times, compile_all, take_turns
from experiments.swap import shared, speech, text
from experiments.swap.shared import DEFAULT, EXACT, PAPER

Source = Literal["minilm", "whisper", "random"]
Inputs = tuple[jax.Array, ...]  # query, key and value, of one batch entry
Collect = Callable[[int, int], Inputs]  # of a layer, and of a document, clip or draw

PACKAGES: dict[Source, tuple[Package, ...]] = {
    "minilm": (MINILM, NEWSGROUPS),
    "whisper": (WHISPER_TINY_EN, ASTERISK_SOUNDS, ASTERISK_TEXTS),
    "random": (),
}
LAYERS: dict[Source, tuple[int, ...]] = {"minilm": (0, 2, 5), "whisper": (0, 3), "random": (0,)}
RANDOM_SHAPE = (1, 1500, 6, 64)
"""Whisper's, so that both share their compiled programs."""

CLUSTERS = (25, 50, 100, 200)
TOPK = (16, 32, 64)
"""The sizes of the default, of the default without sub-clusters, and of the paper's setting."""
VARIED_SIZES = ((100, 32), (25, 32))
"""The sizes, C and k, in which one thing at a time is not as in the default."""
VARIATIONS: tuple[dict[str, Any], ...] = (
    *({"metric": "hamming", "num_bits": bits} for bits in (32, 64, 128)),
    {"metric": "euclidean"},
    *({"space": space} for space in ("query", "logit")),
    *({"merge": merge} for merge in ("mass", "lse")),
    *({"num_subclusters": runs} for runs in (2, 8)),
    *({"num_iterations": count} for count in (1, 3, 5, 10)),
)
WHOLE = "improved (default, num_subclusters=1)"
ORACLE = "oracle top-k"
VARIED = "improved (default, one thing changed)"


@dataclass(frozen=True)
class Settings:
    """Compare error, time and operations of many settings of clustered attention.

    Takes queries, keys and values of all-MiniLM-L6-v2 (layers 0, 2 and 5, documents of 512 tokens)
    and of the encoder of Whisper tiny.en (layers 0 and 3, 1500 positions), whose weights and data
    come from packages that are downloaded once, and random normal ones (1500 positions).
    """

    sources: tuple[Source, ...] = ("minilm", "whisper", "random")
    """Where queries, keys and values come from."""
    documents: int = 3
    """How many documents of text, clips of speech, or draws of random data to take."""
    rounds: int = 2
    """Counted runs of each attention, in each layer and document."""
    seed: int = 0
    """Chooses the documents, random data and keys, the hash planes and the first centroids."""
    output: Path = Path("results/pareto")
    """Where the results go: this name with .json and with .png; earlier ones are overwritten."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if not self.sources:
            raise ValueError("sources must be at least one, got none.")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources must be different ones, got {self.sources}.")
        for name, minimum in {"documents": 1, "rounds": 2}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class RandomKeys:
    """Exact attention to k keys that are drawn for each head, the same for all its queries.

    Args:
        topk: k.
        seed: what they are drawn from.
    """

    topk: int = 32
    seed: int = 0

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Attends with (1, T, N, H), (1, S, N, H) and (1, S, N, V)."""

        def draw(rng: jax.Array) -> jax.Array:
            return jax.random.choice(rng, key.shape[1], (self.topk,), replace=False)

        index = jax.vmap(draw)(jax.random.split(jax.random.key(self.seed), key.shape[2])).T  # k N
        drawn = (jnp.take_along_axis(x, index[None, ..., None], axis=1) for x in (key, value))
        return jax.nn.dot_product_attention(query, *drawn)


Attention = (
    ClusteredAttention
    | baselines.Exact
    | baselines.OracleTopk
    | baselines.Local
    | baselines.Reformer
    | RandomKeys
)


class Candidate(NamedTuple):
    """One of the attentions that are compared; all can be hashed, so they share programs."""

    name: str
    attention: Attention
    highlighted: bool = False  # The setting that its name stands for, in its own sizes.

    def size(self, name: str) -> int | None:
        """A setting of the attention, if it has it."""
        return getattr(self.attention, name, None)

    @property
    def label(self) -> str:
        """The name with the sizes."""
        sizes = {"C": self.size("num_clusters"), "k": self.size("topk")}
        return ", ".join([self.name, *(f"{x}={size}" for x, size in sizes.items() if size)])


def candidates(seed: int) -> list[Candidate]:
    """All that are compared, exact attention first."""
    methods = {
        DEFAULT: ClusteredAttention(seed=seed),
        WHOLE: ClusteredAttention(num_subclusters=1, seed=seed),
        PAPER: ClusteredAttention.paper(seed=seed),
    }
    sizes = [{"num_clusters": count, "topk": topk} for count in CLUSTERS for topk in TOPK]
    in_all_sizes = [
        Candidate(name, attention, attention == method and name != WHOLE)
        for name, method in methods.items()
        for attention in (dataclasses.replace(method, **size) for size in sizes)
    ]
    varied = []
    for count, topk in VARIED_SIZES:
        base = dataclasses.replace(methods[DEFAULT], num_clusters=count, topk=topk)
        for variation in VARIATIONS:
            attention = dataclasses.replace(base, **variation)
            what = ", ".join(f"{name}={value}" for name, value in variation.items())
            if attention != base:
                varied.append(Candidate(f"improved (default, {what})", attention))
    return [
        Candidate(EXACT, baselines.Exact()),
        *in_all_sizes,
        *varied,
        *(
            Candidate(f"lsh-{rounds}", baselines.Reformer(rounds=rounds, seed=seed))
            for rounds in (1, 4, 8)
        ),
        Candidate(ORACLE, baselines.OracleTopk(topk=32)),
        Candidate("local", baselines.Local(window=64)),
        Candidate("random keys", RandomKeys(topk=32, seed=seed)),
    ]


def operations(attention: Attention, length: int, head_dim: int) -> int:
    """Multiply-adds of one head, of T = S positions and H = V.

    Those of exact and of clustered attention are `clustax.diagnostics.operations`. The others:

    - oracle: T² H + T k H; windows of w to either side: 2 T (2 w + 1) H; random keys: 2 T k H
    - Reformer: T H buckets / 2 + 4 T chunk H in each round

    Args:
        attention: one of the candidates.
        length: T.
        head_dim: H.
    """
    sizes, one_each = (length, length, head_dim, head_dim), length * head_dim
    match attention:
        case baselines.Exact():
            return diagnostics.operations(None, *sizes)
        case ClusteredAttention():
            return diagnostics.operations(attention, *sizes)
        case baselines.OracleTopk(topk=topk):
            return one_each * (length + min(topk, length))
        case baselines.Local(window=window):
            return 2 * one_each * min(2 * window + 1, length)
        case RandomKeys(topk=topk):
            return 2 * one_each * topk
        case baselines.Reformer():
            in_round = attention.num_buckets // 2 + 4 * attention.chunk_size
            return attention.rounds * one_each * in_round


@partial(jax.jit, static_argnums=0)
def attend(attention: Attention, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attends; Reformer's keys are the queries, as it has one projection for both."""
    return attention(query, query if isinstance(attention, baselines.Reformer) else key, value)


def minilm(settings: Settings, console: Console) -> Collect:
    """The BERT on documents that fill all of its positions."""
    with console.status("Fetching MiniLM and documents (up to 122 MB, the first time)"):
        fetched = text.Settings(
            documents=10 * settings.documents, training_documents=20, seed=settings.seed
        )
        model, _, split = text.fetch(fetched)
    full = [ids for ids in split.token_ids if len(ids) == text.MAX_TOKENS]
    if len(full) < settings.documents:
        raise DocumentsError(
            f"of the drawn documents {len(full)} have {text.MAX_TOKENS} tokens, not "
            f"{settings.documents}: ask for fewer."
        )

    def collect(layer: int, number: int) -> Inputs:
        return model.projections(jnp.asarray([full[number]]), jnp.array([text.MAX_TOKENS]), layer)

    return collect


def whisper(settings: Settings, console: Console) -> Collect:
    """The encoder of the speech recogniser on the longest of the clips: most are nearly silence."""
    model, _ = speech.load(speech.Settings(model="tiny.en"), console)
    with console.status("Fetching the clips (11 MB, the first time)"):
        clips = sorted(asterisk_prompts(), key=lambda clip: -len(clip.audio))

    def collect(layer: int, number: int) -> Inputs:
        mel = spectrograms([clips[number].audio], 1)
        return model.encoder.projections(model.embeddings(mel), None, layer)

    return collect


def random(settings: Settings, console: Console) -> Collect:
    """Normal data."""
    del console

    def collect(layer: int, number: int) -> Inputs:
        rng = np.random.default_rng((settings.seed, layer, number))
        return tuple(jnp.asarray(rng.normal(size=(3, *RANDOM_SHAPE)), jnp.float32))

    return collect


COLLECT: dict[Source, Callable[[Settings, Console], Collect]] = {
    "minilm": minilm,
    "whisper": whisper,
    "random": random,
}


def compare(
    compared: Sequence[Candidate], inputs: Inputs, rounds: int, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """Runs all attentions on the same inputs in turns, and compares them with the first one.

    Args:
        compared: exact attention, and others.
        inputs: query, key and value.
        rounds: counted runs of each.
        advance: called after every turn.

    Returns:
        Of each, the means over heads of the relative error and of the cosine, and the seconds.
    """
    outputs: dict[str, jax.Array] = {}

    def run(candidate: Candidate) -> None:
        outputs[candidate.label] = attend(candidate.attention, *inputs).block_until_ready()

    rivals = {candidate.label: partial(run, candidate) for candidate in compared}
    times = take_turns(rivals, rounds, advance)
    exact = np.asarray(outputs[compared[0].label], np.float64)
    found = []
    for label in rivals:
        output = np.asarray(outputs[label], np.float64)
        error = np.linalg.norm(output - exact, axis=(1, 3)) / np.linalg.norm(exact, axis=(1, 3))
        found.append(
            {
                "error": float(error.mean()),
                "cosine": float(shared.cosine(output, exact).mean()),
                "seconds": times[label].seconds,
            }
        )
    return found


class Found(NamedTuple):
    """What came of one source."""

    shape: list[int]  # of the queries
    pieces: list[list[dict[str, Any]]]  # for each layer and document, what `compare` gives


def measure(
    settings: Settings,
    source: Source,
    compared: Sequence[Candidate],
    journal: Journal,
    console: Console,
) -> Found:
    """Compares on all layers and documents of a source that are not in the journal yet."""
    places = {
        f"{source} {layer} {number}": (layer, number)
        for layer in LAYERS[source]
        for number in range(settings.documents)
    }
    left = {name: place for name, place in places.items() if name not in journal.finished}
    if left:
        collect = COLLECT[source](settings, console)
        turns = settings.rounds * len(compared)
        with Progress(console=console) as progress:
            # Compilation is one turn more for each attention.
            task = progress.add_task(source, total=len(compared) + turns * len(places))

            def advance() -> None:
                progress.advance(task)

            progress.advance(task, turns * (len(places) - len(left)))
            inputs = collect(*next(iter(left.values())))
            compile_all([partial(attend, each.attention, *inputs) for each in compared], advance)
            for name, place in left.items():
                inputs = collect(*place)
                found = compare(compared, inputs, settings.rounds, advance)
                journal.add(name, {"shape": inputs[0].shape, "found": found})
    finished = [journal.finished[name] for name in places]
    return Found(finished[0]["shape"], [piece["found"] for piece in finished])


class Row(NamedTuple):
    """One attention on one source."""

    source: Source
    attention: str
    num_clusters: int | None
    topk: int | None
    num_subclusters: int | None
    error: float
    cosine: float
    seconds: float  # of a layer, one batch entry
    seconds_quartiles: tuple[float, float]
    operations: int  # of a head
    highlighted: bool
    frontiers: tuple[str, ...] = ()  # of PANELS, those on whose frontier it is


PANELS = {"seconds": "milliseconds of a layer", "operations": "million multiply-adds of a head"}
"""What is plotted against, a field of the rows, and what it is called."""
UNITS = {"seconds": 1e-3, "operations": 1e6}


def frontier(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """The points that no other one beats: cheaper ones have larger errors. The cheapest is first.

    >>> frontier([3, 1, 2, 4], [0.1, 0.3, 0.4, 0.1])
    [1, 0]

    Args:
        costs: of each point.
        errors: of each.
    """
    best: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], errors[index])):
        if not best or errors[index] < errors[best[-1]]:
            best.append(index)
    return best


def make_rows(source: Source, compared: Sequence[Candidate], found: Found) -> list[Row]:
    """Joins what was found in all layers and documents of a source."""
    _, length, _, head_dim = found.shape
    rows = []
    for candidate, results in zip(compared, zip(*found.pieces, strict=True), strict=True):
        times = Times(tuple(seconds for result in results for seconds in result["seconds"]))
        rows.append(
            Row(
                source=source,
                attention=candidate.name,
                num_clusters=candidate.size("num_clusters"),
                topk=candidate.size("topk"),
                num_subclusters=candidate.size("num_subclusters"),
                error=float(np.mean([result["error"] for result in results])),
                cosine=float(np.mean([result["cosine"] for result in results])),
                seconds=times.median,
                seconds_quartiles=times.quartiles,
                operations=operations(candidate.attention, length, head_dim),
                highlighted=candidate.highlighted,
            )
        )
    return with_frontiers(rows)


def with_frontiers(rows: Sequence[Row]) -> list[Row]:
    """Says of the rows of one source which ones are on the frontiers.

    What costs more than exact attention is on none, as that has no error. The oracle takes no part:
    it shows what the best k keys are worth, but has to compute all logits to find them.
    """
    rivals = [index for index, row in enumerate(rows) if row.attention != ORACLE]
    errors = [rows[index].error for index in rivals]
    on = {
        panel: {rivals[i] for i in frontier([getattr(rows[r], panel) for r in rivals], errors)}
        for panel in PANELS
    }
    return [
        row._replace(frontiers=tuple(panel for panel in PANELS if index in on[panel]))
        for index, row in enumerate(rows)
    ]


def listed(rows: Sequence[Row]) -> list[Row]:
    """The rows for the table, the fastest first: the frontier in time, and the highlighted ones."""
    approximate = [row for row in rows if row.attention != EXACT]
    chosen = [row for row in approximate if "seconds" in row.frontiers or row.highlighted]
    return sorted(chosen, key=lambda row: row.seconds)


def make_table(source: Source, rows: Sequence[Row], shape: Sequence[int]) -> Table:
    """What is listed of one source, as it is printed."""
    exact = next(row for row in rows if row.attention == EXACT)
    _, length, heads, head_dim = shape
    table = Table(title=f"{source}: T = {length}, {heads} heads of {head_dim}")
    table.add_column("attention")
    for name in ("C", "k", "R", "error", "cosine", "ms", "ms of\nexact", "Mops"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in listed(rows):
        table.add_row(
            f"{row.attention}{'' if 'seconds' in row.frontiers else ' *'}",
            *(str(size or "") for size in (row.num_clusters, row.topk, row.num_subclusters)),
            f"{row.error:.3f}",
            f"{row.cosine:.4f}",
            f"{1000 * row.seconds:.1f}",
            f"{1000 * exact.seconds:.1f}",
            f"{row.operations / 1e6:.1f}",
        )
    return table


WORST = 1.5
"""Where larger errors are drawn, with their value: an output of zeros has an error of 1."""
FAMILIES: dict[str, dict[str, Any]] = {
    DEFAULT: {"color": "C0", "marker": "o"},
    WHOLE: {"color": "C2", "marker": "^"},
    VARIED: {"color": "C0", "marker": "+"},
    PAPER: {"color": "C1", "marker": "s"},
    "others": {"color": "0.35", "marker": "D"},
}
"""How the points are drawn."""


def family(row: Row) -> str:
    """Which of the families a row belongs to."""
    if row.attention in FAMILIES:
        return row.attention
    return "others" if row.num_clusters is None else VARIED


def draw(rows: Sequence[Row], shapes: Mapping[Source, Sequence[int]]) -> Figure:
    """Draws error against time and operations, one row of panels a source."""
    figure = Figure(figsize=(13, 4.8 * len(shapes)), layout="constrained")
    grid = figure.subplots(len(shapes), len(PANELS), squeeze=False, sharey="row")
    for (source, shape), panels in zip(shapes.items(), grid, strict=True):
        _, length, heads, head_dim = shape
        for axes, (panel, label) in zip(panels, PANELS.items(), strict=True):
            _draw_panel(axes, [row for row in rows if row.source == source], panel)
            axes.set(xlabel=label, title=f"{source}: T = {length}, {heads} heads of {head_dim}")
        panels[0].set(ylabel="error relative to exact")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], panel: str) -> None:
    exact, *others = rows

    def place(row: Row) -> tuple[float, float]:
        return getattr(row, panel) / UNITS[panel], min(row.error, WORST)

    for name, style in FAMILIES.items():
        if points := [place(row) for row in others if family(row) == name]:
            axes.plot(*zip(*points, strict=True), linestyle="", markersize=6, label=name, **style)
    best = sorted(place(row) for row in others if panel in row.frontiers)
    if best:  # Exact attention may be the cheapest. Otherwise it is better from its cost on.
        x, y = zip(*best, (place(exact)[0], best[-1][1]), strict=True)
        axes.step(x, y, where="post", color="black", linewidth=1, label="frontier")
    axes.axvline(place(exact)[0], color="C3", linestyle="--", label=EXACT)
    for row in others:
        if row.highlighted:
            axes.plot(*place(row), markersize=13, fillstyle="none", color="black", marker="o")
        if row.highlighted or row.num_clusters is None:
            _name_point(axes, row, place(row))
    axes.set(xscale="log", yscale="log")
    axes.margins(0.13, 0.12)
    label_log_axis(axes.xaxis, (1, 2, 5))
    label_log_axis(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
    axes.grid(alpha=0.3)


def _name_point(axes: Axes, row: Row, place: tuple[float, float]) -> None:
    name = {DEFAULT: "default", PAPER: "paper"}.get(row.attention, row.attention)
    if row.highlighted:  # Among many others: the name stands where there are none.
        offset = (-45, -35) if row.attention == DEFAULT else (25, 35)
    else:  # Local attention and lsh-1 cost about the same, and may both be at the worst error.
        offset = (0, -16) if name.startswith("lsh") and row.error > WORST else (0, 9)
    axes.annotate(
        name if row.error <= WORST else f"{name} ({row.error:.1f})",
        place,
        xytext=offset,
        textcoords="offset points",
        horizontalalignment="center",
        fontsize=9,
        fontweight="bold" if row.highlighted else None,
        arrowprops={"arrowstyle": "-", "shrinkB": 6} if row.highlighted else None,
    )


def run(settings: Settings, console: Console) -> None:
    """Does all of it: fetches, measures, prints the tables, writes the results."""
    # Before the work, so that a folder that cannot be written is reported now.
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    compared = candidates(settings.seed)
    description = shared.describe(
        settings,
        (),
        [package for source in settings.sources for package in PACKAGES[source]],
        ("av", "tokenizers"),
        attentions={
            candidate.label: dataclasses.asdict(candidate.attention) for candidate in compared
        },
        layers={source: LAYERS[source] for source in settings.sources},
    )
    journal = shared.open_journal(settings.output, description, console)
    rows: list[Row] = []
    shapes: dict[Source, list[int]] = {}
    for source in settings.sources:
        found = measure(settings, source, compared, journal, console)
        shapes[source] = found.shape
        rows += make_rows(source, compared, found)
    for source, shape in shapes.items():
        mine = [row for row in rows if row.source == source]
        console.print(make_table(source, mine, shape))
    console.print(
        f"{len(compared)} attentions, compiled for {len(set(map(tuple, shapes.values())))} shapes. "
        "Listed: the frontier of error against time, and default and paper where they are not on "
        "it (*). Error: |output - exact| / |exact| of a head; like the cosine, a mean over heads, "
        "layers and documents. Milliseconds: medians for a layer. Mops: million multiply-adds of a "
        "head. Reformer (lsh) attends with its queries as keys, as it must: on models that were "
        "trained with others its error says that it cannot stand in for their attention."
    )
    record = description | {
        "shapes": shapes,
        "rows": [row._asdict() | {"listed": row in listed(rows)} for row in rows],
    }
    shared.write_results(settings.output, record, draw(rows, shapes), console)
    journal.remove()


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m experiments.pareto")
    try:
        run(settings, Console())
    except (PackageUnavailableError, DocumentsError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted: start it again to go on. Earlier results are as they were."
        ) from None


if __name__ == "__main__":
    main()
