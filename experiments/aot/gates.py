"""What compiled programs have to hold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.aot.targets import KIB, MIB, TPUS, VMEM_LIMIT

MAX_SPILLS = 20
"""Registers that a kernel may spill."""
MAX_SPILLED_SHARE = 1 / 12
"""The same for each bundle of its instructions on a v4, which has half as many registers."""
MAX_SPILLED_BYTES = 16
"""The same of a thread on a GPU."""
THREADS, REGISTERS, SHARED_MEMORY = 128, 65536, 228 * KIB
"""Threads of a block, and what a multiprocessor has, from Hopper on, for all of its blocks."""
GROWTH = 8.5 / 8
"""By how much peak memory may grow, at most, where the length does by one."""

Record = Mapping[str, Any]


def label(record: Record) -> str:
    """How messages call a program."""
    return f"{record['target']}: {record['case']}, T={record['length']}"


def size(kernel: Mapping[str, int], target: str) -> str:
    """What a kernel takes, and spills."""
    if target in TPUS:
        return f"{kernel['memory'] / MIB:.1f} MiB, {kernel['spills']} spilled"
    return (
        f"{kernel['size']} registers, {kernel['spills']} B spilled, "
        f"{kernel['memory'] / KIB:.0f} KiB, {blocks(kernel)} at once"
    )


def blocks(kernel: Mapping[str, int]) -> int:
    """How many blocks of threads of a kernel a multiprocessor of a GPU can have at once."""
    registers = -(-kernel["size"] // 8) * 8 * THREADS
    return min(REGISTERS // registers, SHARED_MEMORY // (kernel["memory"] + KIB))


def failures(records: Sequence[Record]) -> list[str]:
    """What does not hold, a sentence each.

    Args:
        records: of programs, as experiments.aot has them.
    """
    return [
        f"{label(record)}: {reason}"
        for record in records
        for reason in (*_of_one(record), *_growth(record, records))
    ]


def _of_one(record: Record) -> Iterator[str]:
    if record["error"] is not None:
        yield f"does not compile: {record['error']}"
        return
    if record.get("elements") is not None and record["largest"] >= record["elements"]:
        yield (
            f"an array has {record['largest']} elements, where T·C are {record['elements']}: "
            "it is not linear"
        )
    is_tpu = record["target"] in TPUS
    unit = "registers" if is_tpu else "bytes"
    for name, kernel in record.get("kernels", {}).items():
        most = MAX_SPILLS if is_tpu else MAX_SPILLED_BYTES
        if record["target"] == "v4":
            most = int(MAX_SPILLED_SHARE * kernel["size"])
        if kernel["spills"] > most:
            yield f"{name} spills {kernel['spills']} {unit}, more than {most}"
        if is_tpu and kernel["memory"] > VMEM_LIMIT:
            yield (
                f"{name} takes {kernel['memory'] / MIB:.1f} MiB on the chip, more than "
                f"{VMEM_LIMIT // MIB}"
            )


def _growth(record: Record, records: Sequence[Record]) -> Iterator[str]:
    """Whether it needs more memory than by its length, compared with the next shorter one."""
    if record["error"] is not None or "peak" not in record:
        return
    shorter = [
        other
        for other in records
        if other["error"] is None
        and other["length"] < record["length"]
        and all(other[name] == record[name] for name in ("case", "target"))
    ]
    if shorter:
        before = max(shorter, key=lambda other: other["length"])
        ratio, lengths = record["peak"] / before["peak"], record["length"] / before["length"]
        if ratio > GROWTH * lengths:
            yield f"needs {ratio:.1f} times the memory of T={before['length']}, not {lengths:.0f}"
