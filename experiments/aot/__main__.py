"""Compiles kernels and programs for TPUs and GPUs that are not there, and checks what came out.

    make aot
    make aot PRESET=quick

The compilers are real ones, libtpu's and those of CUDA. A program that does not compile, a kernel
that spills registers or has too little memory, and memory that grows faster than the length, make
the command fail. What has no accelerator does not run: whether results are right is for the tests.
"""

import dataclasses
import json
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments.aot import gates
from experiments.aot.cases import Selection
from experiments.aot.targets import KINDS, MIB, TARGETS, compiler_versions, environment
from experiments.common.files import whole_file

ROOT = Path(__file__).parents[2]
MAX_SHOWN = 160


@dataclass(frozen=True)
class Settings:
    """Compile for accelerators that are not there."""

    targets: tuple[str, ...] = TARGETS
    """Accelerators."""
    selection: Selection = dataclasses.field(default_factory=Selection)
    only: str = "*"
    """A pattern, as of file names, of the programs wanted among these."""
    seconds: int = 600
    """Of processor time, after which a program is given up."""
    compilers: Path = Path(sys.prefix) / "aot"
    """The folder of the compilers."""
    output: Path = Path("results/aot")
    """The folder of the results, a file for each version of JAX. What is there of the same versions
    and other programs is kept."""

    def __post_init__(self) -> None:
        """Refuses what cannot be compiled for."""
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {self.targets}.")


QUICK = Settings(
    targets=("v5e", "h100"),
    selection=Selection(
        lengths=(8192,),
        head_dims=(128,),
        passes=("gradient",),
        implementations=("pallas",),
        copy=False,
        cycles=False,
    ),
)
PRESETS = {
    "full": ("All programs for all accelerators; takes hours on two cores.", Settings()),
    "quick": ("All kernels, once, for two of them; takes minutes.", QUICK),
}


def compile_all(settings: Settings, target: str, kind: str) -> Iterator[dict[str, Any]]:
    """Compiles for a target, and yields the records as they come.

    A process that a compiler aborts loses the program at hand only: another one does the rest.
    """
    done: list[str] = []
    while True:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            dumps, log, events = (folder / name for name in ("dumps", "log", "events"))
            dumps.mkdir()
            events.touch()
            job = {
                "target": target,
                "kind": kind,
                "selection": dataclasses.asdict(settings.selection),
                "only": settings.only,
                "done": done,
                "seconds": settings.seconds,
                "events": str(events),
                "dumps": str(dumps),
                "log": str(log),
            }
            with log.open("wb") as output:
                code = subprocess.run(
                    [sys.executable, "-m", "experiments.aot.worker", json.dumps(job)],
                    cwd=ROOT,
                    env=environment(target, settings.compilers.absolute(), dumps, kind),
                    stdout=output,
                    stderr=output,
                    check=False,
                ).returncode
            said = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
            text = log.read_text(encoding="utf-8", errors="replace")
        found = {gates.label(record): record for record in said}
        for record in found.values():
            done.append(f"{record['case']}, T={record['length']}")
            record.setdefault("error", died(code, text))
            yield record
        if code == 0:
            return
        if not found:
            yield {"case": "(all)", "length": 0, "target": target, "error": died(code, text)}
            return


def died(code: int, log: str) -> str:
    """Why a process ended, from what it said."""
    if code == -signal.SIGPROF:
        return "takes too long to compile"
    fatal = re.findall(r"^F\d{4} [^]]*\] (?!\*)(.*)|(LLVM ERROR: .*)", log, re.MULTILINE)
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", log, re.MULTILINE)
    reasons = [*("".join(parts) for parts in fatal[:1]), *errors[-1:], f"exit status {code}"]
    return f"its compiler died: {reasons[0]}"


def merge(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Any]:
    """All records; new ones take the place of old ones of the same program."""
    records = {gates.label(record): record for record in (*old, *new)}
    return [records[name] for name in sorted(records)]


def show(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table that is printed."""
    shown = [
        f"{name} {gates.size(kernel, record['target'])}"
        for name, kernel in record.get("kernels", {}).items()
    ]
    shown += [f"{name} {count:,} cycles" for name, count in record.get("cycles", {}).items()]
    peak = f"{record['peak'] / MIB:.1f}" if "peak" in record else ""
    seconds = f"{record['seconds']:.1f}" if "seconds" in record else ""
    error = " ".join((record["error"] or "").split())[:MAX_SHOWN]
    return (
        record["target"],
        record["case"],
        str(record["length"]),
        seconds,
        peak,
        error or "; ".join(shown),
    )


def store(path: Path, versions: Mapping[str, str], new: Mapping[str, list[Any]]) -> None:
    """Adds records to those that a file has of the same versions."""
    known: Mapping[str, list[Any]] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        known = before if before["versions"] == versions else known
    merged = {name: merge(known.get(name, ()), found) for name, found in new.items()}
    with whole_file(path) as partial:
        text = json.dumps({"versions": versions, **merged}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")


def run(settings: Settings, console: Console) -> list[str]:
    """Compiles, prints, writes the results; returns what does not hold."""
    compilers = compiler_versions(settings.compilers)
    if not compilers:
        raise SystemExit(f"There are no compilers in {settings.compilers}: start by make aot.")
    versions = {"python": platform.python_version(), "jax": jax.__version__, **compilers}
    major, minor = jax.__version_info__[:2]
    path = settings.output / f"jax-{major}.{minor}.json"
    programs = []
    for target in settings.targets:
        for kind in KINDS:
            name, found = "programs" if kind == "programs" else "kernels", []
            for record in compile_all(settings, target, kind):
                found.append(record)
                console.print(*show(record), sep=" | ", highlight=False, soft_wrap=True)
            store(path, versions, {"programs": [], "kernels": []} | {name: found})
            programs += found if name == "programs" else []
    console.print(f"{len(programs)} programs; wrote {path}")
    return gates.failures(programs)


def main() -> None:
    """The command line."""
    settings = tyro.extras.overridable_config_cli(PRESETS, prog="python -m experiments.aot")
    found = run(settings, Console())
    if found:
        raise SystemExit("\n".join([*found, f"{len(found)} of these must not be."]))


if __name__ == "__main__":
    main()
