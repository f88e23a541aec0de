"""The tables of what was compiled."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.aot import gates
from experiments.aot.targets import GPUS, MIB, TARGETS, TPUS
from experiments.common.markdown import markdown_table

# Published: docs.cloud.google.com/tpu/docs/v5e and /tpu7x, of whose chips each has two devices.
OPERATIONS_PER_SECOND = {"v5e": 197e12, "tpu7x": 2307e12 / 2}  # in bfloat16
BYTES_PER_SECOND = {"v5e": 819e9, "tpu7x": 7380e9 / 2}

TOTAL = {
    "K-means, Hamming, an assignment": 10,
    "centroid attention, R=1": 1,
    "grouped attention": 1,
}
"""The kernels of a call in the paper's setting, and how often they run."""

Record = Mapping[str, Any]


def aot(record: Record) -> str:
    """The tables of experiments.aot."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    programs = record["programs"]
    parts = [_cycles(record["kernels"])] if record["kernels"] else []
    for targets in (TPUS, GPUS):  # their kernels have other names, and take other things
        of_these = [record for record in programs if record["target"] in targets]
        parts += [_kernels(of_these), _memory(of_these)] if of_these else []
    parts.append(f"Compiled with {versions}.")
    failed = "\n".join(f"- {sentence}" for sentence in gates.failures(programs))
    return "\n\n".join([*parts, f"What does not hold:\n\n{failed}"] if failed else parts)


def _cycles(records: Sequence[Record]) -> str:
    """Floors and static cycles of kernels, each by itself; flash attention against the sum."""
    targets = _targets(records)
    lengths = {record["case"]: record["length"] for record in records}
    length = max(lengths.values())
    cycles = {(r["case"], r["target"]): cycles_of(r) for r in records}
    floors = {r["case"]: r["floor"] for r in records if r.get("floor")}

    def row(label: str, numbers: Sequence[str], floor: Sequence[int] | None = None):
        return (label, *(_least(floor, target) for target in OPERATIONS_PER_SECOND), *numbers)

    rows = []
    for name, own in lengths.items():
        label = f"{name}, T = {own}" if own < length else name
        numbers = [_number(cycles.get((name, target), 0)) for target in targets]
        rows.append(row(label, numbers, floors.get(name)))
    parts = [[cycles.get((name, target), 0) for name in TOTAL] for target in targets]
    totals = [sum(map(operator.mul, TOTAL.values(), each)) * all(each) for each in parts]
    label = " + ".join(f"{times} × {name}" if times > 1 else name for name, times in TOTAL.items())
    rows.append(row(label, list(map(_number, totals))))
    for name, own in lengths.items():
        if name.startswith("flash"):
            whole = [cycles.get((name, t), 0) * (length // own) ** 2 for t in targets]
            rows.append(row(f"{name}, over that sum", list(map(_ratio, whole, totals))))
    header = ("kernel", *(f"least µs, {target}" for target in OPERATIONS_PER_SECOND))
    return markdown_table((*header, *(f"cycles, {target}" for target in targets)), rows)


def cycles_of(record: Record) -> int:
    """The estimate for a kernel; 0 if there is none.

    Where libtpu has none, and the kernel has no loops, bundles of instructions are counted.
    """
    if not record.get("cycles"):
        return 0
    name, cycles = list(record["cycles"].items())[-1]  # a backward pass comes after a forward one
    return cycles or (record["steps"] or 0) * record["kernels"][name]["size"]


def _least(floor: Sequence[int] | None, target: str) -> str:
    """The time that a kernel takes at least, and what bounds it."""
    if floor is None:
        return ""
    products = floor[0] / OPERATIONS_PER_SECOND[target]
    memory = floor[1] / BYTES_PER_SECOND[target]
    return f"{1e6 * max(products, memory):.1f} ({'products' if products > memory else 'memory'})"


def _number(x: int) -> str:
    return f"{x:,}" if x else ""


def _ratio(x: int, total: int) -> str:
    return f"{x / total:.1f}×" if x and total else ""


def _kernels(records: Sequence[Record]) -> str:
    """What the kernels in programs take, at most, over all lengths and head dims."""
    found: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for record in records:
        method, target = record["case"].split(",")[0], record["target"]
        for name, kernel in record.get("kernels", {}).items():
            most = found.setdefault((name, method), {}).setdefault(target, dict(kernel))
            most.update({what: max(most[what], kernel[what]) for what in kernel})
    targets = [t for t in _targets(records) if any(t in most for most in found.values())]
    rows = [
        (
            f"{name}, {method}",
            *(gates.size(most[target], target) if target in most else "" for target in targets),
        )
        for (name, method), most in sorted(found.items())
    ]
    return markdown_table(("kernel, setting", *targets), rows)


def _memory(records: Sequence[Record]) -> str:
    """Peak memory of programs at their greatest length, and how it grew."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(record["case"], {}).setdefault(record["target"], []).append(record)
    targets = _targets(records)

    def cell(group: Sequence[Record]) -> str:
        if any(record["error"] is not None for record in group):
            return "fails"
        peaks = {record["length"]: record["peak"] for record in group}
        if not peaks:
            return ""
        *shorter, longest = sorted(peaks)
        growth = f" ({peaks[longest] / peaks[shorter[-1]]:.1f}×)" if shorter else ""
        return f"{peaks[longest] / MIB:.0f}{growth}"

    rows = [
        (name, *(cell(by_target.get(target, ())) for target in targets))
        for name, by_target in found.items()
    ]
    return markdown_table(("program", *(f"peak MiB, {target}" for target in targets)), rows)


def _targets(records: Sequence[Record]) -> list[str]:
    return [name for name in TARGETS if any(record["target"] == name for record in records)]
