"""What compilers say about their programs, read from their texts."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """What a kernel takes.

    Attributes:
        memory: on-chip bytes; 0 where they are not known.
        spills: stores of registers, or bytes of them on a GPU, that had no place in registers.
        size: bundles of instructions; registers of a thread on a GPU.
    """

    memory: int
    spills: int
    size: int


def tpu_kernels(hlo: str, utilization: Mapping[str, str]) -> dict[str, Kernel]:
    """The Pallas kernels of a program for TPUs.

    Args:
        hlo: the program.
        utilization: for each operation of it, how its bundles use the units of the chip.
    """
    found: dict[str, Kernel] = {}
    for name, line in _pallas_calls(hlo):
        scoped = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', line)
        sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', "".join(scoped))
        bundles, spills = _bundles(utilization[name]) if name in utilization else (0, 0)
        kernel = Kernel(max(map(int, sizes), default=0), spills, bundles)
        _keep_largest(found, _base_name(name), kernel)
    return found


def tpu_cycles(hlo: str) -> dict[str, int]:
    """The static estimate for each kernel, which is 0 where there is none."""
    found = {}
    for name, line in _pallas_calls(hlo):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        found[_base_name(name)] = int(cycles[1]) if cycles else 0
    return found


def gpu_kernels(log: str) -> dict[str, Kernel]:
    """The Pallas kernels that ptxas reported on, which knows nothing of their shared memory."""
    report = (
        r"entry function '(\S+)_mosaic_gpu_kernel'[\s\S]*?(\d+) bytes spill stores[\s\S]*?"
        r"Used (\d+) registers"
    )
    found: dict[str, Kernel] = {}
    for name, spills, registers in re.findall(report, log):
        _keep_largest(found, name, Kernel(0, int(spills), int(registers)))
    return found


def largest_array(hlo: str) -> int:
    """The number of elements of the largest array of a program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", hlo)
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


def read_utilization(files: Iterable[Path]) -> dict[str, str]:
    """The files among a dump that say how bundles use the chip, by operation."""
    end = "-final_hlo-static-per-bundle-utilization.txt"
    found = {}
    for path in files:
        if match := re.fullmatch(rf"\d+-([^<].*?)-\d+{re.escape(end)}", path.name):
            found[match[1]] = path.read_text()
    return found


def _pallas_calls(hlo: str) -> Iterator[tuple[str, str]]:
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
            if match:
                yield match[1], line


def _base_name(operation: str) -> str:
    """The name of a kernel; operations are numbered, and say what transformed them."""
    return re.sub("^(?:transpose_|jvp_)+", "", operation.split(".")[0]).rstrip("_")


def _bundles(table: str) -> tuple[int, int]:
    """The number of bundles, and how many registers these spill."""
    _, names, _, _, *rows = table.splitlines()
    column = [name.strip() for name in names.split(",")].index("VSTORE:SPILL")
    used = [int(row.split()[column]) for row in rows if row.strip()]
    return len(used), sum(used)


def _keep_largest(found: dict[str, Kernel], name: str, kernel: Kernel) -> None:
    before = found.get(name, kernel)
    found[name] = Kernel(*map(max, before, kernel))
