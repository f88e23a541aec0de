"""Where the time of clustered attention goes on a CPU, stage by stage, and the least it could be.

Nothing is run apart from the rest: JAX's profiler times each instruction of the whole program, and
the compiler has kept which function of clustax an instruction comes from. So fusion, caches and the
order of stages are those of real calls, and the stages add up to the whole.

    python -m experiments.breakdown --help
"""

import glob
import linecache
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clustax import ClusteredAttention
from experiments.common import hlo
from experiments.common.timing import Times
from experiments.swap import shared

HASH, KMEANS, TILES = "hash", "K-means", "tiles and pool"
CENTROIDS, SELECT, RECOMPUTE = "centroid attention", "select", "recompute"
UNSORT, REST = "merge and un-sort", "rest"
STAGES = (HASH, KMEANS, TILES, CENTROIDS, SELECT, RECOMPUTE, UNSORT, REST)
"""In their order; the rest is copies between layouts, and what stands between the loops."""

STAGE_OF = (
    # A function of clustax, what its line must contain that leads to the instruction, the stage.
    # Of the functions that are on the stack of an instruction, the innermost that is here counts.
    ("hash_planes", "", HASH),
    ("_hash", "", HASH),
    ("to_logit_space", "", HASH),
    ("_run_kmeans", "", KMEANS),
    ("tile_queries", "", TILES),
    ("fill_tiles", "", TILES),
    ("split_clusters", "", TILES),
    ("pool", "", TILES),
    ("attend_subclusters", "", CENTROIDS),
    ("rank_keys", "", SELECT),
    ("largest", "", SELECT),
    ("split_keys", "", CENTROIDS),
    ("of_cluster", "", UNSORT),
    ("of_subcluster", "", UNSORT),
    ("empty_tiles", "", UNSORT),
    ("attend_head", "attention_logits(centroids", CENTROIDS),
    ("attend_head", "logsumexp(top_logits", CENTROIDS),
    ("attend_head", "index[tiles.cluster]", RECOMPUTE),
    ("attend_head", "x[tile_index]", RECOMPUTE),
    ("attend_head", "mean.at[assignment]", UNSORT),
    ("attend_head", "attention_logits(queries", RECOMPUTE),
    ("attend_head", "empty_tiles(", UNSORT),
    ("attend_head", "sigmoid(", UNSORT),
)

CONTAINERS = ("while", "call", "conditional")
"""Instructions whose time is that of others."""


@dataclass(frozen=True)
class Settings:
    """What to measure, in float32.

    Args:
        lengths: sequence lengths T = S.
        heads: attention heads N, of one sequence.
        head_dim: their dimension H.
        attention: whether the settings are the paper's or the default ones.
        clusters: clusters C of each head.
        topk: keys k with exact logits.
        rounds: counted runs of each length, with and without the profiler.
        listed: how many instructions are printed, of those that take longest at the last length.
        seed: of queries, keys and values, which are normal.
        output: where the results go, without the ending.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    heads: int = 6
    head_dim: int = 64
    attention: Literal["paper", "default"] = "paper"
    clusters: int = 100
    topk: int = 32
    rounds: int = 5
    listed: int = 0
    seed: int = 0
    output: Path = Path("results/breakdown")

    def __post_init__(self) -> None:
        """Refuses what has no tiles or no tail, and so lacks stages."""
        if not self.lengths or min(self.lengths) <= max(self.clusters, self.topk):
            raise ValueError(
                f"lengths must be above clusters = {self.clusters} and topk = {self.topk}, "
                f"got {self.lengths}."
            )
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}.")

    @property
    def clustered(self) -> ClusteredAttention:
        """What is measured."""
        make = ClusteredAttention.paper if self.attention == "paper" else ClusteredAttention
        return make(num_clusters=self.clusters, topk=self.topk)


class Work(NamedTuple):
    """What a stage cannot do without; also, how much of each this machine does in a second."""

    multiply_adds: float = 0
    exponentials: float = 0
    compared_words: float = 0  # XOR, population count and minimum of words of 32 bits
    moved_bytes: float = 0  # read or written, each array once


class Floor(NamedTuple):
    """The least time of a stage, and what it is bound by."""

    seconds: float
    bound: str


class Part(NamedTuple):
    """One stage at one length."""

    length: int
    stage: str
    seconds: float  # median over the profiled runs
    floor: Floor


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    opcode: str
    stage: str
    line: str  # the innermost that leads to it


class Whole(NamedTuple):
    """All stages at one length."""

    length: int
    times: Times  # without the profiler
    profiled_seconds: float  # median with it
    instructions: list[tuple[float, Instruction]]  # seconds of each with it, the longest first


def work_of(settings: Settings, length: int) -> dict[str, Work]:
    """What each stage has to do, for all heads."""
    attention = settings.clustered
    heads, dim, clusters = settings.heads, settings.head_dim, settings.clusters
    # Counted for one head. Arrays that are as long as the sequence are read and written once; what
    # is smaller, and what one stage hands on to the next, could stay in caches.
    rows = 4 * length * dim
    logits = clusters * attention.num_subclusters * length
    assignments = attention.num_iterations * length * clusters
    words = -(-attention.num_bits // 32)
    if attention.metric == "hamming":
        prepare = Work(multiply_adds=length * dim * attention.num_bits, moved_bytes=rows)
        kmeans = Work(compared_words=assignments * words)
    else:
        prepare = Work(moved_bytes=2 * rows)
        kmeans = Work(multiply_adds=assignments * dim)
    if attention.space == "logit":  # covariance and product with its factor
        squares = prepare.multiply_adds + 2 * length * dim**2
        prepare = prepare._replace(multiply_adds=squares, moved_bytes=prepare.moved_bytes + rows)
    parts = {
        HASH: prepare,
        KMEANS: kmeans,
        TILES: Work(moved_bytes=2 * rows),
        CENTROIDS: Work(logits * dim + clusters * length * dim, logits, moved_bytes=2 * rows),
        SELECT: Work(compared_words=clusters * length),
        RECOMPUTE: Work(2 * length * settings.topk * dim, length * settings.topk),
        UNSORT: Work(moved_bytes=rows),
        REST: Work(),
    }
    return {stage: Work(*(heads * amount for amount in parts[stage])) for stage in STAGES}


def floor_of(work: Work, rates: Work) -> Floor:
    """The least time of some work: arithmetic adds up, and hides moving or is hidden by it."""
    names = ("products", "exponentials", "comparisons", "memory")
    seconds = dict(zip(names, (a / b for a, b in zip(work, rates, strict=True)), strict=True))
    arithmetic = sum(seconds.values()) - seconds["memory"]
    bound = max(seconds, key=lambda name: seconds[name])
    return Floor(max(arithmetic, seconds["memory"]), bound if any(work) else "")


def measure_rates() -> Work:
    """How much of each kind of work this machine does in a second, on all cores, at its best."""
    repeats = 8

    def rate(amount: float, step: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        program = jax.jit(lambda x: lax.fori_loop(0, repeats, lambda _, x: step(x), x))
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(program(x))
            seconds.append(time.perf_counter() - start)
        return repeats * amount / min(seconds[1:])

    size, in_cache, in_memory, at_once = 1024, 2**20, 2**26, 16
    square = jnp.full((size, size), 1 / size, jnp.float32)

    def exponentials(x: jax.Array) -> jax.Array:  # so many on each number that memory is no bound
        return sum((jnp.exp(x - place) for place in range(1, at_once)), jnp.exp(x)) / 32

    def compare(x: jax.Array) -> jax.Array:  # with codes of two words
        def ranked(place: int) -> jax.Array:
            words = (x ^ jnp.uint32(place * step) for step in (0x01234567, 0x07654321))
            return sum(map(lax.population_count, words), jnp.uint32(0)) * at_once + place

        return reduce(jnp.minimum, map(ranked, range(at_once)))

    return Work(
        multiply_adds=rate(size**3, lambda x: x @ square, square),
        exponentials=rate(at_once * in_cache, exponentials, jnp.ones(in_cache)),
        compared_words=rate(
            2 * at_once * in_cache, compare, jnp.arange(in_cache, dtype=jnp.uint32)
        ),
        moved_bytes=rate(2 * 4 * in_memory, lambda x: x + 1, jnp.zeros(in_memory)),
    )


def instructions_of(program: str | None) -> dict[str, Instruction]:
    """The instructions of a compiled program by name, given its text."""
    if program is None:
        raise ValueError("This backend does not show its compiled programs: use a CPU.")
    names, functions = (
        dict(re.findall(r'^(\d+) "(.*)"$', table, re.MULTILINE))
        for table in (_section(program, "FileNames"), _section(program, "FunctionNames"))
    )
    locations, frames = (
        {
            number: dict(re.findall(r"(\w+)=(\d+)", fields))
            for number, fields in re.findall(r"^(\d+) \{(.*)\}$", table, re.MULTILINE)
        }
        for table in (_section(program, "FileLocations"), _section(program, "StackFrames"))
    )

    @cache
    def stack(frame: str) -> tuple[tuple[str, str], ...]:  # functions and their lines
        if frame not in frames:
            return ()
        location = locations[frames[frame]["file_location_id"]]
        path = names[location["file_name_id"]]
        lines = range(int(location["line"]), int(location["end_line"]) + 1)
        text = " ".join(linecache.getline(path, line).strip() for line in lines)
        function = functions[location["function_name_id"]].partition(".")[0]
        # XLA prints parents with one added, so that 1 is none.
        parent = str(int(frames[frame]["parent_frame_id"]) - 1)
        return ((function, text), *stack(parent))

    def instruction(text: str) -> Instruction:
        opcode = re.search(r" ([a-z][\w-]*)\(", text)
        frame = re.search(r"stack_frame_id=(\d+)", text)
        calls = stack(frame[1]) if frame else ()
        stages = (
            stage
            for function, line in calls
            for name, contained, stage in STAGE_OF
            if name == function and contained in line
        )
        line = ": ".join(calls[0]) if calls else ""
        return Instruction(opcode[1] if opcode else "", next(stages, REST), line)

    bodies, inside = hlo.computations(program), hlo.fused(program)
    texts = {
        name: text
        for computation, body in bodies.items()
        if computation not in inside
        for name, text in re.findall(r"^\s+(?:ROOT )?%([\w.-]+) = (.*)$", body, re.MULTILINE)
    }
    products = {computation for computation in inside if " dot(" in bodies[computation]}
    found = {name: instruction(text) for name, text in texts.items()}
    for name, stage in _stages_of_products(products, texts, found).items():
        found[name] = found[name]._replace(stage=stage)
    return found


def _stages_of_products(
    fused: Iterable[str], texts: Mapping[str, str], instructions: Mapping[str, Instruction]
) -> dict[str, str]:
    """The stages of products; those that XLA writes anew, without origin, are where they go."""
    users: dict[str, list[str]] = defaultdict(list)
    for name, text in texts.items():
        for operand in re.findall(r"%([\w.-]+)", text.partition(" metadata=")[0]):
            users[operand].append(name)
    products = [name for name, each in instructions.items() if each.opcode == "dot"]
    products += [name for computation in fused for name in users[computation]]
    stages = {}
    for product in products:
        near = [product]
        for name in near:  # grows meanwhile: the nearest come first
            stage = instructions[name].stage
            if stage != REST:
                stages[product] = stage
                break
            near += [user for user in users[name] if user not in near]
    return stages


def _section(program: str, name: str) -> str:
    found = re.search(rf"^{name}\n(.*?)\n\n", program, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


class Event(NamedTuple):
    """An instruction that ran."""

    thread: str
    name: str
    start: float
    end: float


def share_out(events: Iterable[Event], instructions: Mapping[str, Instruction]) -> dict[str, float]:
    """The time of each instruction, in the unit of the events, which adds up to that of all.

    Where instructions run side by side they share the time; where a loop runs and none of its
    instructions does, the time is the loop's; where nothing runs, it has no name.
    """
    changes = sorted(
        ((time, starts, event) for event in events for time, starts in _ends(event)),
        # At the same time, ends come first.
        key=lambda change: change[:2],
    )
    running: dict[str, list[Event]] = defaultdict(list)  # by thread, the innermost last
    times: dict[str, float] = defaultdict(float)
    before = changes[0][0] if changes else 0.0
    for now, starts, event in changes:
        if now > before:
            inner = [events[-1].name for events in running.values() if events]
            leaves = [name for name in inner if instructions[name].opcode not in CONTAINERS]
            names = leaves or inner or [""]
            for name in names:
                times[name] += (now - before) / len(names)
        before = now
        if starts:
            running[event.thread].append(event)
        else:
            running[event.thread].remove(event)
    return times


def _ends(event: Event) -> tuple[tuple[float, bool], tuple[float, bool]]:
    return (event.start, True), (event.end, False)


def profile(run: Callable[[], None], instructions: Mapping[str, Instruction]) -> dict[str, float]:
    """The seconds that each instruction takes in one run."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    events = [
        Event(line.name, event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name in instructions
    ]
    times = share_out(events, instructions)
    return {name: nanoseconds / 1e9 for name, nanoseconds in times.items()}


def in_stages(
    times: Mapping[str, float], instructions: Mapping[str, Instruction]
) -> dict[str, float]:
    """The time of each stage, given that of each instruction."""
    stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for name, time_taken in times.items():
        stages[instructions[name].stage if name else REST] += time_taken
    return stages


def measure(
    settings: Settings, length: int, rates: Work, advance: Callable[[], None]
) -> tuple[list[Part], Whole]:
    """Times the stages at one length."""
    shape = (3, 1, length, settings.heads, settings.head_dim)
    arrays = np.random.default_rng(settings.seed).normal(size=shape).astype(np.float32)
    inputs = [jnp.asarray(array) for array in arrays]
    program = jax.jit(settings.clustered).lower(*inputs).compile()
    instructions = instructions_of(program.as_text())

    def run() -> None:
        jax.block_until_ready(program(*inputs))

    run()
    seconds, profiled = [], []
    for _ in range(settings.rounds):
        profiled.append(profile(run, instructions))
        run()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        advance()
    work = work_of(settings, length)
    by_stage = [in_stages(found, instructions) for found in profiled]
    parts = [
        Part(
            length,
            stage,
            statistics.median(found[stage] for found in by_stage),
            floor_of(work[stage], rates),
        )
        for stage in STAGES
    ]
    median = statistics.median(sum(found.values()) for found in profiled)
    longest = sorted(profiled[-1].items(), key=lambda item: -item[1])
    named = [(taken, instructions[name]) for name, taken in longest if name]
    return parts, Whole(length, Times(tuple(seconds)), median, named)


def make_table(parts: Sequence[Part], wholes: Sequence[Whole]) -> Table:
    """Milliseconds of each stage, and of its floor."""
    table = Table(title="Milliseconds, forward, and the least possible")
    table.add_column("")
    for whole in wholes:
        table.add_column(f"T = {whole.length}", justify="right")
    table.add_column("bound by")
    for stage in STAGES:
        row = [part for part in parts if part.stage == stage]
        cells = (f"{1000 * part.seconds:.2f} / {1000 * part.floor.seconds:.2f}" for part in row)
        table.add_row(stage, *cells, row[-1].floor.bound)
    for name, seconds in (
        ("sum, with profiler", [whole.profiled_seconds for whole in wholes]),
        ("whole, without", [whole.times.median for whole in wholes]),
    ):
        table.add_row(name, *(f"{1000 * each:.2f}" for each in seconds))
    return table


def draw(settings: Settings, parts: Sequence[Part], wholes: Sequence[Whole]) -> Figure:
    """Draws the stages of each length on top of each other, and their floor beside them."""
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    places = np.arange(len(settings.lengths))
    bottom, floor = np.zeros(len(places)), np.zeros(len(places))
    for number, stage in enumerate(STAGES):
        mine = [part for part in parts if part.stage == stage]
        times, least = (
            np.array(values) * 1e6 / settings.lengths
            for values in ([part.seconds for part in mine], [part.floor.seconds for part in mine])
        )
        axes.bar(places - 0.2, times, 0.38, bottom, color=f"C{number}", label=stage)
        axes.bar(places + 0.2, least, 0.38, floor, color=f"C{number}")
        bottom, floor = bottom + times, floor + least
    plain = np.array([each.times.median for each in wholes]) * 1e6 / settings.lengths
    axes.plot(places - 0.2, plain, "k_", markersize=18, label="whole, without profiler")
    axes.set(title="Forward", xlabel="sequence length T", ylabel="µs for each position")
    axes.set_xticks(places, [str(length) for length in settings.lengths])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, title="left: time, right: its floor")
    return figure


def make_record(
    settings: Settings, rates: Work, parts: Sequence[Part], wholes: Sequence[Whole]
) -> dict[str, Any]:
    """All that is needed to understand the figures or to get them again."""
    return shared.describe(
        settings,
        (shared.Variant(settings.attention, settings.clustered),),
        (),
        (),
        rates_per_second=rates._asdict(),
        parts=[
            {
                "length": part.length,
                "stage": part.stage,
                "seconds": part.seconds,
                "floor_seconds": part.floor.seconds,
                "bound": part.floor.bound,
            }
            for part in parts
        ],
        wholes=[
            {
                "length": whole.length,
                "median_seconds": whole.times.median,
                "quartiles_seconds": whole.times.quartiles,
                "profiled_seconds": whole.profiled_seconds,
            }
            for whole in wholes
        ],
    )


def run(settings: Settings, console: Console) -> None:
    """Measures, prints the tables, writes the results."""
    rates = measure_rates()
    console.print(
        f"At best, in a second: {2 * rates.multiply_adds / 1e9:.0f} G operations in products, "
        f"{rates.exponentials / 1e9:.2f} G exponentials, "
        f"{rates.compared_words / 1e9:.1f} G words compared, "
        f"{rates.moved_bytes / 1e9:.1f} GB read or written"
    )
    parts: list[Part] = []
    wholes: list[Whole] = []
    with Progress(console=console) as progress:
        for length in settings.lengths:
            task = progress.add_task(f"T = {length}", total=settings.rounds)
            found = measure(settings, length, rates, lambda task=task: progress.advance(task))
            parts += found[0]
            wholes.append(found[1])
    console.print(make_table(parts, wholes))
    for seconds, each in wholes[-1].instructions[: settings.listed]:
        text = f"{1000 * seconds:9.2f} ms  {each.stage:18}  {each.opcode:20}  {each.line}"
        console.print(text, highlight=False, markup=False, no_wrap=True)
    record = make_record(settings, rates, parts, wholes)
    shared.write_results(settings.output, record, draw(settings, parts, wholes), console)


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m experiments.breakdown")
    try:
        run(settings, Console())
    except OSError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
