"""Time and memory of clustered attention against its rivals, as sequences get longer.

The paper's figure of costs, for the attention alone or for a whole layer of an encoder, and the
table of what was asked of this implementation. Rivals take turns in one process; memory is that of
a process of their own. PyTorch's exact attention joins them if it is installed.

    python -m experiments.scaling cpu
    python -m experiments.scaling paper --help

A run that was killed goes on where it was when it is started again.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clustax import ClusteredAttention
from clustax.baselines import oracle_topk, reformer
from clustax.models.encoder import EncoderLayer
from experiments.common.chunked import chunked_attention
from experiments.common.journal import Journal
from experiments.common.memory import peak_memory
from experiments.common.pictures import label_log_axis
from experiments.common.timing import Times, take_turns
from experiments.swap import shared

Pass = Literal["forward", "forward and backward"]
FORWARD, BACKWARD = PASSES = ("forward", "forward and backward")

JAX_EXACT, TORCH_EXACT, CHUNKED = EXACT = ("exact (JAX)", "exact (PyTorch)", "exact (chunked)")
ORACLE, LSH_4, LSH_1 = "oracle", "lsh-4", "lsh-1"
CLUSTERED, IMPROVED, DEFAULT = OURS = ("clustered", "improved", "default")
# In the order of turns. JAX's exact attention frees gigabytes, and for a while after that memory is
# slow to get. So it is followed by those that need little of it and take long.
RIVALS = (*EXACT, ORACLE, LSH_4, LSH_1, *OURS)

FEED_FORWARD = 4
"""How many times wider than the model the layer is in its middle, as in the paper."""
PAPER_LAYER_BYTES = 48_000
"""What forward and backward of the paper's layer take for each position."""


@dataclass(frozen=True)
class Longest:
    """The length beyond which rivals are left out; they also are where they have no positions."""

    jax_exact: int = 16384
    """Of jax.nn.dot_product_attention, whose memory is quadratic."""
    torch_exact: int = 32768
    """Of PyTorch's exact attention."""
    chunked: int = 32768
    """Of exact attention by blocks, in JAX."""
    oracle: int = 8192
    """Of the oracle that sees the best k keys of each query."""
    linear: int = 131072
    """Of all methods that are linear in the length."""

    def of(self, rival: str) -> int:
        """That of a rival."""
        own = {
            JAX_EXACT: self.jax_exact,
            TORCH_EXACT: self.torch_exact,
            CHUNKED: self.chunked,
            ORACLE: self.oracle,
        }
        return own.get(rival, self.linear)


@dataclass(frozen=True)
class Settings:
    """Measure time and memory of attentions at growing lengths."""

    measures: Literal["attention", "layer"] = "attention"
    """The attention alone, or a layer of the paper's encoder around it."""
    attentions: tuple[str, ...] = RIVALS
    """What is measured, of what there is."""
    passes: tuple[Pass, ...] = PASSES
    """Whether gradients are computed, of queries, keys and values, or of the layer."""
    lengths: tuple[int, ...] = tuple(2**power for power in range(9, 18))
    """Sequence lengths T = S."""
    memory_lengths: tuple[int, ...] = (4096, 16384, 32768, 131072)
    """Lengths at which memory is measured, in processes of their own."""
    longest: Longest = dataclasses.field(default_factory=Longest)
    """Beyond which lengths rivals are left out."""
    longest_backward: Longest = dataclasses.field(
        default_factory=lambda: Longest(8192, 16384, 16384, 4096)
    )
    """The same for forward and backward together."""
    batch: int = 1
    """Sequences at once."""
    heads: int = 6
    """Attention heads N."""
    head_dim: int = 64
    """Their dimension H."""
    clusters: int = 100
    """Clusters C of each head."""
    topk: int = 32
    """Keys k with exact logits, of improved, default and the oracle."""
    num_bits: int = 64
    """Bits in a hash code, of clustered and improved."""
    num_iterations: int = 10
    """Assignments in K-means, of clustered and improved; default has its own number."""
    block_size: int | None = None
    """Of a layer: positions that its feed-forward network takes at a time; all if None."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs and of the layer's weights."""
    device: str | None = None
    """The platform that JAX runs on, such as cpu; the one that it finds if None. PyTorch is a rival
    on a cpu only."""
    rounds: int = 5
    """Counted runs of each rival and length."""
    budget: float = 30.0
    """Seconds for these; a rival that takes longer has fewer of them, but at least two."""
    seed: int = 0
    """Of the inputs, which are normal."""
    output: Path = Path("results/scaling")
    """Where the results go, without the ending."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("attentions", "passes", "lengths", "memory_lengths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, got {values}.")
        if unknown := set(self.attentions) - set(RIVALS):
            raise ValueError(f"attentions must be of {RIVALS}, got {sorted(unknown)}.")
        if not self.passes or not self.lengths or min(*self.lengths, *self.memory_lengths, 1) < 1:
            raise ValueError(f"lengths must be numbers of at least 1, got {self.lengths}.")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}.")

    def limits(self, measured: str) -> Longest:
        """Up to which lengths rivals run in this pass."""
        return self.longest if measured == FORWARD else self.longest_backward


LINEAR_ONLY = Longest(0, 0, 0, 0, 2**20)
PRESETS = {
    "cpu": ("All rivals, at lengths for two cores of a CPU.", Settings()),
    "paper": (
        "A layer of the paper's encoder, forward and backward, at the paper's lengths.",
        Settings(
            measures="layer",
            lengths=tuple(2**power for power in range(9, 16)),
            memory_lengths=(4096, 16384, 32768),
            block_size=1024,
            output=Path("results/scaling_layer"),
        ),
    ),
    "long": (
        "The linear methods, one head, and up to a million positions forward.",
        Settings(
            lengths=(4096, 16384, 65536, 131072, 1048576),
            memory_lengths=(4096, 16384, 65536, 131072, 1048576),
            longest=LINEAR_ONLY,
            longest_backward=dataclasses.replace(LINEAR_ONLY, linear=131072),
            heads=1,
            rounds=3,
            output=Path("results/scaling_long"),
        ),
    ),
}


class Row(NamedTuple):
    """One rival in one pass at one length."""

    attention: str
    measured: str  # one of PASSES
    length: int
    times: Times
    compiled_bytes: int | None  # temporaries and outputs of the program; None if there is none
    peak_bytes: int | None = None  # what a process that runs it holds more; None if not measured


def attentions(settings: Settings) -> dict[str, Callable[..., jax.Array]]:
    """The rivals written in JAX, called with query, key and value."""
    sizes: dict[str, Any] = {"num_clusters": settings.clusters, "topk": settings.topk}
    improved = ClusteredAttention.paper(
        **sizes, num_bits=settings.num_bits, num_iterations=settings.num_iterations
    )

    def lsh(query: jax.Array, _: jax.Array, value: jax.Array, rounds: int) -> jax.Array:
        return reformer(query, value, rounds=rounds)  # its keys are its queries

    return {
        JAX_EXACT: jax.nn.dot_product_attention,
        CHUNKED: chunked_attention,
        ORACLE: partial(oracle_topk, topk=settings.topk),
        LSH_4: partial(lsh, rounds=4),
        LSH_1: partial(lsh, rounds=1),
        CLUSTERED: dataclasses.replace(improved, topk=0),
        IMPROVED: improved,
        DEFAULT: ClusteredAttention(**sizes),
    }


def rivals(settings: Settings, measured: str, length: int) -> list[str]:
    """Those that run at this length, in the order of their turns."""
    limits = settings.limits(measured)
    return [
        name
        for name in RIVALS
        if name in settings.attentions
        and length <= limits.of(name)
        and (name != TORCH_EXACT or has_torch(settings))
    ]


def has_torch(settings: Settings) -> bool:
    """Whether PyTorch is a rival."""
    installed = importlib.util.find_spec("torch") is not None
    return installed and jax.devices(settings.device)[0].platform == "cpu"


def with_gradient(
    attention: Callable[..., jax.Array], argnums: tuple[int, ...] = (0, 1, 2)
) -> Callable[..., Any]:
    """The gradient of the output's sum of squares, which has a use for all of the output."""

    def loss(*args):
        return jnp.sum(attention(*args).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=argnums)


def make_arrays(settings: Settings, length: int) -> list[np.ndarray]:
    """Queries, keys and values, or the hidden states that go into a layer."""
    rng = np.random.default_rng(settings.seed)
    heads = (settings.heads, settings.head_dim)
    number, last = (3, heads) if settings.measures == "attention" else (1, (math.prod(heads),))
    return list(rng.standard_normal((number, settings.batch, length, *last), np.float32))


class Rival(NamedTuple):
    """A rival that is ready to run."""

    run: Callable[[], None]  # returns when the work is done
    compiled_bytes: int | None


def prepare(
    settings: Settings, name: str, measured: str, arrays: Sequence[np.ndarray | jax.Array]
) -> Rival:
    """Compiles a rival for these inputs."""
    if name == TORCH_EXACT:
        return Rival(torch_exact(settings, measured, [np.asarray(array) for array in arrays]), None)
    attention = attentions(settings)[name]
    with jax.default_device(jax.devices(settings.device)[0]):
        inputs: list[Any] = [jnp.asarray(array, settings.dtype) for array in arrays]
        function = attention
        if settings.measures == "layer":
            layer = EncoderLayer(
                math.prod((settings.heads, settings.head_dim)),
                settings.heads,
                FEED_FORWARD * settings.heads * settings.head_dim,
                block_size=settings.block_size,
                rngs=nnx.Rngs(settings.seed),
            )
            layer.eval()
            graph, weights, others = nnx.split(layer, nnx.Param, ...)
            inputs.insert(0, jax.tree.map(lambda x: x.astype(settings.dtype), weights))

            def function(weights: Any, hidden: jax.Array) -> jax.Array:
                return nnx.merge(graph, weights, others)(hidden, None, attention)

        if measured == BACKWARD:
            function = with_gradient(function, tuple(range(len(inputs))))
        program = jax.jit(function).lower(*inputs).compile()
        memory = program.memory_analysis()
    taken = memory and memory.temp_size_in_bytes + memory.output_size_in_bytes

    def run() -> None:
        jax.block_until_ready(program(*inputs))

    return Rival(run, taken)


def torch_exact(
    settings: Settings, measured: str, arrays: Sequence[np.ndarray]
) -> Callable[[], None]:
    """PyTorch's exact attention of three (B, T, N, H) arrays, or its layer of one (B, T, D)."""
    torch = importlib.import_module("torch")
    tensors = [torch.tensor(array, dtype=getattr(torch, settings.dtype)) for array in arrays]
    if settings.measures == "attention":
        tensors = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
        parameters = []
        function = torch.nn.functional.scaled_dot_product_attention
    else:
        width = tensors[0].shape[-1]
        function = torch.nn.TransformerEncoderLayer(
            width,
            settings.heads,
            FEED_FORWARD * width,
            dropout=0.0,
            batch_first=True,
            dtype=tensors[0].dtype,
        ).eval()
        parameters = list(function.parameters())

    def forward() -> None:
        with torch.inference_mode():
            function(*tensors)

    def backward() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.autograd.grad((function(*leaves).float() ** 2).sum(), [*leaves, *parameters])

    return forward if measured == FORWARD else backward


def measure_times(
    settings: Settings, measured: str, length: int, advance: Callable[[], None]
) -> list[Row]:
    """Times all rivals of one pass at one length."""
    arrays = [jnp.asarray(array) for array in make_arrays(settings, length)]
    ready = {
        name: prepare(settings, name, measured, arrays)
        for name in rivals(settings, measured, length)
    }
    runs = {name: rival.run for name, rival in ready.items()}
    times = take_turns(runs, settings.rounds, advance, settings.budget)
    return [
        Row(name, measured, length, times[name], rival.compiled_bytes)
        for name, rival in ready.items()
    ]


def prepare_alone(settings: Settings, name: str, measured: str, length: int) -> Callable[[], None]:
    """What measures memory: a rival with inputs of its own."""
    return prepare(settings, name, measured, make_arrays(settings, length)).run


def in_json(row: Row) -> dict[str, Any]:
    """A row as the journal has it."""
    kept = row._asdict()
    kept["seconds"] = kept.pop("times").seconds
    return kept


def from_json(kept: Mapping[str, Any]) -> Row:
    """A row that the journal has."""
    others = dict(kept)
    return Row(times=Times(tuple(others.pop("seconds"))), **others)


def measure(settings: Settings, journal: Journal, console: Console) -> list[Row]:
    """Measures everything that the journal of this run does not have yet."""
    rows: list[Row] = []
    with Progress(console=console) as progress:
        for length, measured in itertools.product(settings.lengths, settings.passes):
            name = f"T = {length}, {measured}"
            found = rivals(settings, measured, length)
            task = progress.add_task(name, total=len(found) * settings.rounds)
            if name not in journal.finished:
                new = measure_times(settings, measured, length, lambda t=task: progress.advance(t))
                journal.add(name, [in_json(row) for row in new])
            progress.update(task, completed=len(found) * settings.rounds)
            rows += map(from_json, journal.finished[name])
        todo = [index for index, row in enumerate(rows) if row.length in settings.memory_lengths]
        for index in progress.track(todo, description="Memory"):
            row = rows[index]
            name = f"memory, T = {row.length}, {row.measured}, {row.attention}"
            if name not in journal.finished:
                which = (row.attention, row.measured, row.length)
                journal.add(name, peak_memory(prepare_alone, settings, *which))
            rows[index] = row._replace(peak_bytes=journal.finished[name])
    return rows


def describe(settings: Settings) -> dict[str, Any]:
    """All that is needed to understand the figures or to get them again."""
    libraries = ["torch"] if has_torch(settings) else []
    return shared.describe(settings, (), (), libraries)


class Results:
    """Rows, to be looked up."""

    def __init__(self, rows: Iterable[Row], batch: int = 1):
        """Keeps them by rival, pass and length."""
        self.rows = {(row.attention, row.measured, row.length): row for row in rows}
        self._batch = batch

    def lengths(self, measured: str, attention: str) -> list[int]:
        """The lengths at which a rival was measured."""
        return sorted(n for name, which, n in self.rows if (name, which) == (attention, measured))

    def attentions(self, measured: str) -> list[str]:
        """The rivals of a pass."""
        return [name for name in RIVALS if self.lengths(measured, name)]

    def seconds(self, measured: str, length: int, attention: str) -> float | None:
        """The median of a rival."""
        row = self.rows.get((attention, measured, length))
        return row.times.median if row else None

    def fastest_exact(self, measured: str, length: int) -> float | None:
        """The shortest median of an exact attention."""
        times = [self.seconds(measured, length, name) for name in EXACT]
        return min((seconds for seconds in times if seconds is not None), default=None)

    def speed_up(self, measured: str, length: int, attention: str) -> float | None:
        """How many times faster a rival is than the fastest exact attention at this length."""
        exact, own = self.fastest_exact(measured, length), self.seconds(measured, length, attention)
        return exact / own if exact and own else None

    def position_bytes(self, measured: str, length: int, attention: str) -> float | None:
        """The memory that a process takes for each position."""
        row = self.rows.get((attention, measured, length))
        return row.peak_bytes / length / self._batch if row and row.peak_bytes else None

    def crossover(self, measured: str, attention: str) -> float | None:
        """The length from which on a rival is faster than exact attention, on a line between two.

        None if it never is; the first length if it always is.
        """
        ratios = [
            (length, ratio)
            for length in self.lengths(measured, attention)
            if (ratio := self.speed_up(measured, length, attention))
        ]
        after = len(ratios)
        while after and ratios[after - 1][1] >= 1:
            after -= 1
        if after == len(ratios):
            return None
        if after == 0:
            return float(ratios[0][0])
        (low, slower), (high, faster) = ratios[after - 1 : after + 1]
        share = -math.log(slower) / (math.log(faster) - math.log(slower))
        return low * (high / low) ** share


class Criterion(NamedTuple):
    """Something that was asked for, and what was reached."""

    what: str
    length: str
    asked: str
    reached: float
    is_met: bool


FASTER = {
    FORWARD: {512: 1, 1024: 2, 2048: 3.5, 4096: 7, 8192: 14, 16384: 28, 32768: 55},
    BACKWARD: {1024: 1.5, 2048: 2.5, 4096: 5, 8192: 10, 16384: 20},
}
"""How many times faster than the fastest exact attention improved should be, on two cores."""


def acceptance(settings: Settings, results: Results) -> list[Criterion]:
    """What was asked for of the attention, as far as this run has measured it."""
    found: list[Criterion] = []

    def at_least(what: str, length: int, asked: float, reached: float | None) -> None:
        if reached is not None:
            found.append(Criterion(what, f"{length}", f"≥ {asked}", reached, reached >= asked))

    def at_most(what: str, length: str, asked: float, reached: float) -> None:
        found.append(Criterion(what, length, f"≤ {asked}", reached, reached <= asked))

    if settings.measures == "attention":
        for measured in settings.passes:
            for length, asked in FASTER[measured].items():
                what = f"improved, {measured}: times faster than exact"
                at_least(what, length, asked, results.speed_up(measured, length, IMPROVED))
        for length in results.lengths(FORWARD, CLUSTERED):
            times = [results.seconds(FORWARD, length, name) for name in (IMPROVED, CLUSTERED)]
            ratio = times[0] / times[1] if times[0] and times[1] else None
            at_least("clustered, forward: times faster than improved", length, 1.3, ratio)
        short, long = (results.seconds(FORWARD, n, IMPROVED) for n in (4096, 32768))
        if short and long:
            what = "improved, forward: time for each position, to that at 4096"
            at_most(what, "32768", 1.3, long / short * 4096 / 32768)
    elif (taken := results.position_bytes(BACKWARD, 32768, IMPROVED)) is not None:
        what = "improved, forward and backward: kB for each position"
        at_most(what, "32768", PAPER_LAYER_BYTES / 2 / 1000, taken / 1000)
    for measured, name in itertools.product(settings.passes, OURS):
        taken = {
            length: each
            for length in results.lengths(measured, name)
            if 4096 <= length <= 131072
            and (each := results.position_bytes(measured, length, name)) is not None
        }
        if len(taken) > 1:
            what = f"{name}, {measured}: most to least memory for each position"
            lengths = f"{min(taken)}–{max(taken)}"
            at_most(what, lengths, 1.1, max(taken.values()) / min(taken.values()))
    return found


def acceptance_table(criteria: Sequence[Criterion]) -> Table:
    """What was asked for and what was reached, as it is printed."""
    table = Table(title="Asked for, and reached")
    for column in ("what", "T", "asked", "reached", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    for each in criteria:
        verdict = "yes" if each.is_met else "NO"
        table.add_row(each.what, each.length, each.asked, f"{each.reached:.2f}", verdict)
    return table


def time_table(results: Results, measured: str) -> Table:
    """Medians, and half the interquartile range after ±."""
    names = results.attentions(measured)
    table = Table(title=f"Milliseconds, {measured}")
    for column in ("T", *names, "improved\nis faster"):
        table.add_column(column.replace(" (", "\n("), justify="right", overflow="fold")
    for length in sorted({n for _, which, n in results.rows if which == measured}):
        cells = []
        for name in names:
            row = results.rows.get((name, measured, length))
            if row:
                low, high = row.times.quartiles
                cells.append(f"{1000 * row.times.median:.1f}\n±{500 * (high - low):.1f}")
            else:
                cells.append("")
        ratio = results.speed_up(measured, length, IMPROVED)
        table.add_row(str(length), *cells, f"{ratio:.1f}×" if ratio else "")
    return table


def memory_table(results: Results, measured: str) -> Table:
    """Kilobytes for each position: of a process, and of the program as it was compiled."""
    names = results.attentions(measured)
    table = Table(title=f"Peak memory, kB for each position, {measured}")
    for column in ("T", *names):
        table.add_column(column.replace(" (", "\n("), justify="right", overflow="fold")
    for length in sorted({n for _, which, n in results.rows if which == measured}):
        taken = [results.position_bytes(measured, length, name) for name in names]
        if any(taken):
            table.add_row(f"{length}", *(f"{each / 1000:.2f}" if each else "" for each in taken))
    return table


def draw(settings: Settings, results: Results) -> Figure:
    """Draws time and memory for each position of a sequence against its length."""
    figure = Figure(figsize=(12, 4.4 * len(settings.passes)), layout="constrained")
    grid = figure.subplots(len(settings.passes), 2, squeeze=False)
    for (time, memory), measured in zip(grid, settings.passes, strict=True):
        for name in results.attentions(measured):
            style: dict[str, Any] = {"color": f"C{RIVALS.index(name)}", "marker": "o"}
            style["linestyle"] = "--" if name in EXACT else "-" if name in OURS else ":"
            rows = [results.rows[name, measured, n] for n in results.lengths(measured, name)]
            positions = np.array([row.length for row in rows]) * settings.batch
            lengths = [row.length for row in rows]
            medians = np.array([row.times.median for row in rows])
            low, high = np.array([row.times.quartiles for row in rows]).T
            time.plot(lengths, 1e6 * medians / positions, label=name, **style)
            band = (1e6 * low / positions, 1e6 * high / positions)
            time.fill_between(lengths, *band, color=style["color"], alpha=0.2)
            peaks = [(n, results.position_bytes(measured, n, name)) for n in lengths]
            peaks = [(n, taken / 1000) for n, taken in peaks if taken]
            if peaks:
                memory.plot(*zip(*peaks, strict=True), **style)
        _mark_crossovers(time, results, measured)
        time.set(title=f"Time, {measured}", ylabel="µs for each position")
        memory.set(title=f"Peak memory, {measured}", ylabel="kB for each position")
        for axes in (time, memory):
            axes.set(xscale="log", yscale="log", xlabel="sequence length T")
            label_log_axis(axes.yaxis, (1, 2, 5))
            axes.set_xticks(settings.lengths, [str(n) for n in settings.lengths], fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in grid[:, 0] for line in axes.get_lines()}
    named = [lines[name] for name in RIVALS if name in lines]
    figure.legend(handles=named, loc="outside right upper")
    return figure


def _mark_crossovers(axes: Axes, results: Results, measured: str) -> None:
    """Marks where the clustered attentions get ahead of the fastest exact one."""
    for name in OURS:
        length, lengths = results.crossover(measured, name), results.lengths(measured, name)
        if length is None or length == lengths[0]:  # never, or always
            continue
        times = [1e6 * (results.seconds(measured, n, name) or 0) / n for n in lengths]
        height = math.exp(np.interp(math.log(length), np.log(lengths), np.log(times)))
        color = f"C{RIVALS.index(name)}"
        axes.plot(length, height, "X", color=color, markersize=11, markeredgecolor="black")
        axes.annotate(f"{length:.0f}", (length, height), (0, -16), textcoords="offset points")


def make_record(settings: Settings, results: Results) -> dict[str, Any]:
    """All that was measured, and what follows from it."""
    return {
        **describe(settings),
        "rows": [
            {
                "attention": row.attention,
                "measured": row.measured,
                "length": row.length,
                "runs": len(row.times.seconds),
                "median_seconds": row.times.median,
                "quartiles_seconds": row.times.quartiles,
                "speed_up": results.speed_up(row.measured, row.length, row.attention),
                "compiled_bytes": row.compiled_bytes,
                "peak_bytes": row.peak_bytes,
            }
            for row in results.rows.values()
        ],
        "crossovers": {
            measured: {name: results.crossover(measured, name) for name in OURS}
            for measured in settings.passes
        },
        "acceptance": [each._asdict() for each in acceptance(settings, results)],
    }


def run(settings: Settings, console: Console) -> None:
    """Measures, prints the tables, writes the results."""
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    if TORCH_EXACT in settings.attentions and not has_torch(settings):
        console.print("PyTorch is left out: it is not installed (extra bench), or this is no CPU.")
    journal = shared.open_journal(settings.output, describe(settings), console)
    results = Results(measure(settings, journal, console), settings.batch)
    for measured in settings.passes:
        console.print(time_table(results, measured))
        console.print(memory_table(results, measured))
        for name in OURS:
            length = results.crossover(measured, name)
            if length is not None:
                console.print(f"{name}, {measured}: ahead of exact from T = {length:.0f} on")
    console.print(acceptance_table(acceptance(settings, results)))
    shared.write_results(
        settings.output, make_record(settings, results), draw(settings, results), console
    )
    journal.remove()


def main() -> None:
    """The command line."""
    settings = tyro.extras.overridable_config_cli(PRESETS, prog="python -m experiments.scaling")
    try:
        run(settings, Console())
    except OSError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: start it again to go on.") from None


if __name__ == "__main__":
    main()
