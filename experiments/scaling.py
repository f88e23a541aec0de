"""Time and memory of clustered attention against exact attention, as sequences get longer.

The rivals take turns in one process. PyTorch's exact attention joins them if it is installed.

    python -m experiments.scaling --help
"""

import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import clustax
from experiments.common.files import whole_file
from experiments.common.timing import Times, take_turns

JAX_EXACT = "exact (JAX)"
TORCH_EXACT = "exact (PyTorch)"
CLUSTERED = "clustered"
IMPROVED = "improved"
EXACT = (JAX_EXACT, TORCH_EXACT)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        lengths: sequence lengths T = S.
        batch: sequences at once.
        heads: attention heads N.
        head_dim: their dimension H.
        clusters: clusters C of each head.
        topk: keys k with exact logits, for the improved method.
        num_bits: bits in a hash code.
        num_iterations: assignments in K-means.
        rounds: counted runs of each rival and length.
        gradient: measure forward and backward together, instead of forward alone.
        longest_exact: exact attention is left out beyond this length.
        seed: of queries, keys and values, which are normal.
        output: where the results go, without the ending.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    batch: int = 1
    heads: int = 6
    head_dim: int = 64
    clusters: int = 100
    topk: int = 32
    num_bits: int = 64
    num_iterations: int = 10
    rounds: int = 5
    gradient: bool = False
    longest_exact: int = 16384
    seed: int = 0
    output: Path = Path("results/scaling")

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be numbers of at least 1, got {self.lengths}.")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}.")


class Row(NamedTuple):
    """One rival at one length."""

    attention: str
    length: int
    times: Times
    temporary_bytes: int | None  # of the compiled program; None where there is none to ask


def compiled_rivals(settings: Settings) -> dict[str, Callable[..., jax.Array]]:
    """The rivals written in JAX, called with query, key and value."""
    options = {
        "num_clusters": settings.clusters,
        "num_bits": settings.num_bits,
        "num_iterations": settings.num_iterations,
    }
    return {
        JAX_EXACT: jax.nn.dot_product_attention,
        CLUSTERED: partial(clustax.clustered_attention, topk=0, **options),
        IMPROVED: partial(clustax.clustered_attention, topk=settings.topk, **options),
    }


def with_gradient(attention: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The gradient of the output's sum of squares, which has a use for all of the output."""

    def loss(*args):
        return jnp.sum(attention(*args).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def torch_exact(arrays: np.ndarray, gradient: bool) -> Callable[[], None] | None:
    """PyTorch's exact attention of three (B, T, N, H) arrays; None if PyTorch is not installed."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    heads_first = [torch.from_numpy(array.swapaxes(1, 2).copy()) for array in arrays]
    attention = torch.nn.functional.scaled_dot_product_attention

    def forward() -> None:
        with torch.no_grad():
            attention(*heads_first)

    def forward_and_backward() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in heads_first]
        (attention(*leaves) ** 2).sum().backward()

    return forward_and_backward if gradient else forward


def measure(settings: Settings, length: int, advance: Callable[[], None]) -> list[Row]:
    """Times all rivals at one length."""
    shape = (3, settings.batch, length, settings.heads, settings.head_dim)
    arrays = np.random.default_rng(settings.seed).normal(size=shape).astype(np.float32)
    inputs = [jnp.asarray(array) for array in arrays]
    runs: dict[str, Callable[[], None]] = {}
    temporary_bytes: dict[str, int] = {}
    for name, attention in compiled_rivals(settings).items():
        if name in EXACT and length > settings.longest_exact:
            continue
        function = with_gradient(attention) if settings.gradient else attention
        program = jax.jit(function).lower(*inputs).compile()
        if (memory := program.memory_analysis()) is not None:
            temporary_bytes[name] = memory.temp_size_in_bytes
        runs[name] = partial(_run, program, inputs)
    if length <= settings.longest_exact:
        torch_run = torch_exact(arrays, settings.gradient)
        if torch_run is not None:
            runs[TORCH_EXACT] = torch_run
    # JAX's exact attention frees gigabytes, and for a while after that memory is slow to get. So it
    # is followed by PyTorch's, which needs little and takes long.
    order = [name for name in (JAX_EXACT, TORCH_EXACT, CLUSTERED, IMPROVED) if name in runs]
    times = take_turns({name: runs[name] for name in order}, settings.rounds, advance)
    return [Row(name, length, times[name], temporary_bytes.get(name)) for name in order]


def _run(program: Callable[..., Any], inputs: Sequence[jax.Array]) -> None:
    jax.block_until_ready(program(*inputs))


def speed_up(rows: Sequence[Row], length: int, attention: str) -> float | None:
    """How many times faster an attention is than the fastest exact one at this length."""
    times = {row.attention: row.times.median for row in rows if row.length == length}
    exact = [times[name] for name in EXACT if name in times]
    return min(exact) / times[attention] if exact else None


def make_table(settings: Settings, rows: Sequence[Row]) -> Table:
    """The results as they are printed: medians, and half the interquartile range after ±."""
    names = list(dict.fromkeys(row.attention for row in rows))
    what = "forward and backward" if settings.gradient else "forward"
    table = Table(title=f"Milliseconds, {what}")
    for column in ("T", *names, "clustered\nis faster", "improved\nis faster"):
        table.add_column(column, justify="right")
    for length in settings.lengths:
        times = {row.attention: row.times for row in rows if row.length == length}
        cells = []
        for name in names:
            if name in times:
                low, high = times[name].quartiles
                cells.append(f"{1000 * times[name].median:.1f} ±{500 * (high - low):.1f}")
            else:
                cells.append("")
        ratios = [speed_up(rows, length, name) for name in (CLUSTERED, IMPROVED)]
        table.add_row(str(length), *cells, *(f"{ratio:.1f}×" if ratio else "" for ratio in ratios))
    return table


def draw(settings: Settings, rows: Sequence[Row]) -> Figure:
    """Draws time and temporary memory for each position of a sequence."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in dict.fromkeys(row.attention for row in rows):
        mine = [row for row in rows if row.attention == name]
        lengths = np.array([row.length for row in mine])
        positions = lengths * settings.batch
        medians = np.array([row.times.median for row in mine])
        quartiles = np.array([row.times.quartiles for row in mine])
        (line,) = time.plot(lengths, 1e6 * medians / positions, marker="o", label=name)
        band = (1e6 * quartiles / positions[:, None]).T
        time.fill_between(lengths, *band, color=line.get_color(), alpha=0.2)
        if mine[0].temporary_bytes is not None:
            kilobytes = np.array([row.temporary_bytes or 0 for row in mine]) / 1e3
            memory.plot(lengths, kilobytes / positions, marker="o", color=line.get_color())
    what = "forward and backward" if settings.gradient else "forward"
    time.set(title=f"Time, {what}", ylabel="µs for each position")
    memory.set(title="Temporary memory of the compiled program", ylabel="kB for each position")
    time.legend()
    for axes in (time, memory):
        axes.set(xlabel="sequence length T", xscale="log", yscale="log", xticks=settings.lengths)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return figure


def make_record(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """All that is needed to understand the figures or to get them again."""
    options = asdict(settings)
    del options["output"]
    versions = {"python": platform.python_version(), "clustax": clustax.__version__}
    versions["jax"] = jax.__version__
    if any(row.attention == TORCH_EXACT for row in rows):
        versions["torch"] = importlib.metadata.version("torch")
    return {
        "settings": options,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": versions,
        "rows": [
            {
                "attention": row.attention,
                "length": row.length,
                "median_seconds": row.times.median,
                "quartiles_seconds": row.times.quartiles,
                "temporary_bytes": row.temporary_bytes,
                "speed_up": speed_up(rows, row.length, row.attention),
            }
            for row in rows
        ],
    }


def run(settings: Settings, console: Console) -> None:
    """Measures, prints the table, writes the results."""
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with Progress(console=console) as progress:
        for length in settings.lengths:
            task = progress.add_task(f"T = {length}", total=None)
            rows += measure(settings, length, lambda task=task: progress.advance(task))
            progress.update(task, total=1, completed=1)
    console.print(make_table(settings, rows))
    if not any(row.attention == TORCH_EXACT for row in rows):
        console.print("PyTorch is not installed, so it was left out (pip install torch).")
    with whole_file(Path(f"{settings.output}.png")) as path:
        draw(settings, rows).savefig(path, dpi=110)
    with whole_file(Path(f"{settings.output}.json")) as path:
        path.write_text(json.dumps(make_record(settings, rows), indent=2) + "\n", encoding="utf-8")
    console.print(f"Wrote {settings.output}.json and .png")


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m experiments.scaling")
    try:
        run(settings, Console())
    except OSError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
