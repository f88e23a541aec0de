"""Clustered attention on an accelerator: is it right, and how long does it take?

Compares the implementations with each other and with exact attention, on the device that JAX finds.

    python -m experiments.accelerator --help
"""

import glob
import importlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clustax import ClusteredAttention
from clustax.implementations import choose
from experiments.common.timing import Times, take_turns
from experiments.scaling import with_gradient
from experiments.swap import shared

K = TypeVar("K")
QUEUED = 8  # calls in a row, so that the time to start one is hidden behind the one before
EXACT = "exact"
CLUSTERS = "clusters alone"
EXPECTED = "expected"
PASSES = (CLUSTERS, "forward", "forward and backward")


@dataclass(frozen=True)
class Settings:
    """What to measure, in bfloat16.

    Args:
        lengths: sequence lengths T = S.
        batch: sequences at once.
        heads: attention heads N.
        head_dim: their dimension H.
        clusters: clusters C of each head.
        topk: keys k with exact logits.
        rounds: counted runs of each rival and length.
        profiled: the length at which the parts of a call are timed, one of those above.
        checked: the length at which results are compared with those in float32.
        seed: of queries, keys and values.
        output: where the results go, without the ending.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    batch: int = 1
    heads: int = 16
    head_dim: int = 64
    clusters: int = 100
    topk: int = 32
    rounds: int = 5
    profiled: int = 16384
    checked: int = 4096
    seed: int = 0
    output: Path = Path("results/accelerator")

    def __post_init__(self) -> None:
        """Refuses what would leave the profile out."""
        if self.profiled not in self.lengths:
            raise ValueError(
                f"profiled must be one of lengths={self.lengths}, got {self.profiled}."
            )


class Row(NamedTuple):
    """One rival at one length."""

    attention: str
    measured: str  # one of PASSES
    length: int
    times: Times
    peak_bytes: int | None  # of memory, as the compiler says


class Check(NamedTuple):
    """How far results are from those of the XLA implementation in float32, for the same clusters.

    Errors are Euclidean norms of differences, relative to those of what is expected.
    """

    attention: str
    output: float
    gradients: tuple[float, ...]  # of query, key, value


def inputs(settings: Settings, length: int) -> list[jax.Array]:
    """Queries, keys and values: groups of alike queries, as real ones are."""
    rng = np.random.default_rng(settings.seed)
    shape = (settings.batch, length, settings.heads, settings.head_dim)
    topics = rng.standard_normal((64, settings.heads, settings.head_dim))
    topic = rng.integers(64, size=shape[:2])
    query = topics[topic] + 0.5 * rng.standard_normal(shape)
    key = 0.5 * topics[rng.permuted(topic)] + rng.standard_normal(shape)
    return [jnp.asarray(x, jnp.bfloat16) for x in (query, key, rng.standard_normal(shape))]


def settings_of(settings: Settings) -> dict[str, ClusteredAttention]:
    """The settings that are compared."""
    options: dict[str, Any] = {"num_clusters": settings.clusters, "topk": settings.topk}
    return {
        "default": ClusteredAttention(**options),
        "default, R = 1": ClusteredAttention(**options, num_subclusters=1),
        "paper": ClusteredAttention.paper(**options),
    }


def implementations() -> list[str]:
    """Those that can run here."""
    refused = choose(("pallas", "xla")).refused
    return [name for name in ("pallas", "xla") if name not in refused]


def rivals(settings: Settings) -> dict[str, Callable[..., jax.Array]]:
    """All that take turns, called with query, key and value."""
    is_cuda = jax.default_backend() == "gpu"
    exact: dict[str, Callable[..., jax.Array]] = {}
    if is_cuda:
        exact[f"{EXACT} (cuDNN)"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        tokamax = importlib.import_module("tokamax")
        exact[f"{EXACT} (tokamax)"] = tokamax.dot_product_attention
    except ImportError:
        if not is_cuda:
            exact[f"{EXACT} (JAX)"] = jax.nn.dot_product_attention
    settled = settings_of(settings)
    ours = {
        f"{name} ({implementation})": replace(attention, implementation=implementation)
        for implementation in implementations()
        for name, attention in settled.items()
    }
    return exact | ours


def programs(
    attentions: Mapping[str, Callable[..., jax.Array]], arrays: list[jax.Array]
) -> dict[tuple[str, str], jax.stages.Compiled]:
    """What is measured of each of these, compiled, by its name and pass."""
    lowered = {}
    for name, attention in attentions.items():
        passes: dict[str, Callable[..., Any]] = dict(
            zip(PASSES[1:], (attention, with_gradient(attention)), strict=True)
        )
        if isinstance(attention, ClusteredAttention):
            passes[CLUSTERS] = lambda q, k, _, find=attention.cluster: find(q, k)
        for measured, function in passes.items():
            lowered[name, measured] = jax.jit(function).lower(*arrays)
    return compile_all(lowered)


def compile_all(lowered: Mapping[K, jax.stages.Lowered]) -> dict[K, jax.stages.Compiled]:
    """Compiles several programs, at once where nothing is timed on the way."""
    # XLA times which of its ways to copy is the fastest on a GPU; beside other programs it took one
    # of 160 µs for one of 13.
    workers = 1 if jax.default_backend() == "gpu" else None
    with ThreadPoolExecutor(workers) as pool:
        compiled = pool.map(lambda each: each.compile(), lowered.values())
        return dict(zip(lowered, compiled, strict=True))


def measure(
    settings: Settings,
    found: Mapping[tuple[str, str], jax.stages.Compiled],
    arrays: list[jax.Array],
    advance: Callable[[], None],
) -> list[Row]:
    """Times all programs of one length."""
    runs = {key: partial(_run, program, arrays) for key, program in found.items()}
    return [
        Row(name, measured, arrays[0].shape[1], _per_call(times), _peak(found[name, measured]))
        for (name, measured), times in take_turns(runs, settings.rounds, advance).items()
    ]


def _peak(program: jax.stages.Compiled) -> int | None:
    memory = program.memory_analysis()
    return None if memory is None else memory.peak_memory_in_bytes


def _run(program: Callable[..., Any], arrays: list[jax.Array]) -> None:
    jax.block_until_ready([program(*arrays) for _ in range(QUEUED)])


def _per_call(times: Times) -> Times:
    return Times(tuple(seconds / QUEUED for seconds in times.seconds))


def check(settings: Settings) -> list[Check]:
    """Compares each implementation with XLA's in float32, which has products in full precision."""
    arrays = inputs(settings, settings.checked)
    wide = [array.astype(jnp.float32) for array in arrays]

    def error(actual, expected):
        difference = actual.astype(jnp.float32) - expected
        return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))

    lowered, given = {}, {}
    for name, attention in settings_of(settings).items():
        clusters = jax.jit(replace(attention, implementation="xla").cluster)(*arrays[:2])

        def lower(implementation, arrays, attention=attention, clusters=clusters):
            attend = replace(attention, implementation=implementation)

            # Clusters are an argument: a compiler would sort constants itself, slowly.
            def output_and_gradient(clusters, *arrays):
                fixed = partial(attend, clusters=clusters)
                return fixed(*arrays), *with_gradient(fixed)(*arrays)

            return jax.jit(output_and_gradient).lower(clusters, *arrays)

        with jax.default_matmul_precision("highest"):
            lowered[name, EXPECTED] = lower("xla", wide)
        given[name, EXPECTED] = clusters, *wide
        for implementation in implementations():
            lowered[name, implementation] = lower(implementation, arrays)
            given[name, implementation] = clusters, *arrays
    found = {key: program(*given[key]) for key, program in compile_all(lowered).items()}
    checks = []
    for (name, implementation), results in found.items():
        if implementation != EXPECTED:
            output, *gradients = map(error, results, found[name, EXPECTED])
            checks.append(Check(f"{name} ({implementation})", output, tuple(gradients)))
    return checks


def profile(
    found: Mapping[tuple[str, str], jax.stages.Compiled], arrays: list[jax.Array]
) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds on the device of each part of the programs, by attention and pass."""
    parts: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, measured), program in found.items():
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(program(*arrays))
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            parts[name][measured] = _device_times(jax.profiler.ProfileData.from_file(path))
    return parts


def _device_times(data: Any) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    times[event.name] += event.duration_ns / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def fastest_exact(rows: list[Row], row: Row) -> float | None:
    """The time of the fastest exact attention in the place of this row."""
    same = [other for other in rows if other[1:3] == row[1:3]]
    times = [other.times.median for other in same if other.attention.startswith(EXACT)]
    return min(times, default=None)


def make_table(settings: Settings, rows: list[Row], measured: str) -> Table:
    """Medians in milliseconds, and how many times faster than the fastest exact attention."""
    table = Table(title=f"Milliseconds, {measured}")
    table.add_column("T", justify="right")
    for name in dict.fromkeys(row.attention for row in rows if row.measured == measured):
        table.add_column(name.replace(" (", "\n("), justify="right")
    for length in settings.lengths:
        cells = []
        for row in rows:
            if row.length == length and row.measured == measured:
                exact = fastest_exact(rows, row)
                cell = f"{1000 * row.times.median:.2f}"
                if exact and not row.attention.startswith(EXACT):
                    cell += f"\n{exact / row.times.median:.1f}×"
                cells.append(cell)
        table.add_row(str(length), *cells)
    return table


def draw(rows: list[Row]) -> Figure:
    """Draws time against length."""
    lengths = sorted({row.length for row in rows})
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained", sharey=True)
    for axes, measured in zip(panels, PASSES, strict=True):
        for name in dict.fromkeys(row.attention for row in rows):
            mine = [row for row in rows if (row.attention, row.measured) == (name, measured)]
            style = "k--" if name.startswith(EXACT) else ":" if "xla" in name else "-"
            medians = [1000 * row.times.median for row in mine]
            axes.plot([row.length for row in mine], medians, style, marker="o", label=name)
        axes.set(title=measured, xlabel="sequence length T", xscale="log", yscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[-1].legend(fontsize=8)
    return figure


def make_record(
    settings: Settings, rows: list[Row], checks: list[Check], parts: dict[str, Any]
) -> dict[str, Any]:
    """All that is needed to understand the figures or to get them again."""
    return shared.describe(
        settings,
        (),
        (),
        (),
        refused=dict(choose(("pallas", "xla")).refused),
        rows=[
            {
                "attention": row.attention,
                "measured": row.measured,
                "length": row.length,
                "median_seconds": row.times.median,
                "quartiles_seconds": row.times.quartiles,
                "fastest_exact_seconds": fastest_exact(rows, row),
                "peak_bytes": row.peak_bytes,
            }
            for row in rows
        ],
        checks=[check._asdict() for check in checks],
        device_microseconds=parts,
    )


def run(settings: Settings, console: Console) -> None:
    """Checks and measures, writes the results after each length, prints them."""
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"On {jax.devices()[0].device_kind}: {', '.join(implementations())}")
    checks = check(settings)
    for each in checks:
        gradients = ", ".join(f"{gradient:.1e}" for gradient in each.gradients)
        console.print(f"{each.attention}: errors {each.output:.1e}, of gradients {gradients}")
    rows: list[Row] = []
    parts: dict[str, Any] = {}
    with Progress(console=console) as progress:
        for length in settings.lengths:
            task = progress.add_task(f"T = {length}", total=None)
            arrays = inputs(settings, length)
            found = programs(rivals(settings), arrays)
            progress.update(task, total=settings.rounds * len(found))
            rows += measure(settings, found, arrays, lambda task=task: progress.advance(task))
            if length == settings.profiled:
                parts = profile(found, arrays)
            # Compiling takes minutes: what was measured is kept, whatever becomes of the rest.
            record = make_record(settings, rows, checks, parts)
            shared.write_results(settings.output, record, draw(rows), Console(quiet=True))
    for measured in PASSES:
        console.print(make_table(settings, rows, measured))
    for name, passes in parts.items():
        for measured, times in passes.items():
            total = sum(times.values())
            console.print(f"{name} at T = {settings.profiled}, {measured}: {total:.0f} µs")
            for part, microseconds in list(times.items())[:16]:
                console.print(f"{microseconds:9.1f} µs  {part[:80]}")
    console.print(f"Wrote {settings.output}.json and .png")


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m experiments.accelerator")
    try:
        run(settings, Console())
    except OSError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
