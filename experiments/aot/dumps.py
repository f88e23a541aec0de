"""What compilers say about their programs, read from their texts."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.common.hlo import computations, fused


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


def gpu_kernels(log: str, shared_memory: Mapping[str, int]) -> dict[str, Kernel]:
    """The Pallas kernels that ptxas reported on.

    Args:
        log: what it said.
        shared_memory: what each of them asks for, of which ptxas knows nothing.
    """
    report = (
        r"entry function '(\S+)_mosaic_gpu_kernel'[\s\S]*?(\d+) bytes spill stores[\s\S]*?"
        r"Used (\d+) registers"
    )
    found: dict[str, Kernel] = {}
    for name, spills, registers in re.findall(report, log):
        kernel = Kernel(shared_memory.get(name, 0), int(spills), int(registers))
        _keep_largest(found, name, kernel)
    return found


def shared_memory(modules: Iterable[str]) -> dict[str, int]:
    """The bytes of shared memory that kernels for GPUs ask for.

    Args:
        modules: what Mosaic makes of kernels, as text.
    """
    found: dict[str, int] = {}
    for module in modules:
        name = re.search(r"^module @(\w+)", module, re.MULTILINE)
        launch = re.search(r'gpu\.launch"\([^)]*(%\w+)\)', module)  # the last of its arguments
        if name and launch:
            constant = rf'{launch[1]} = "\S*arith\.constant"\(\) {{value = (\d+) : i32}}'
            size = int(re.findall(constant, module[: launch.start()])[-1])
            found[name[1]] = max(found.get(name[1], 0), size)
    return found


def largest_array(hlo: str) -> int:
    """The number of elements of the largest array of a program.

    What is in a fusion is none, nor is a row of bytes, as which libtpu copies arrays of any kind.
    """
    inside = fused(hlo)
    held = "".join(text for name, text in computations(hlo).items() if name not in inside)
    shapes = re.findall(r"\b(?:pred|bf16|(?!s8\[\d+\])[fsu]\d+)\[([\d,]+)\]", held)
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
