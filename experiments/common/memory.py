"""The most memory that a computation holds, as the operating system counts it."""

import ctypes
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PROC = Path("/proc/self")
SECONDS_TO_FREE = 1.0
"""In which XLA's threads give back what a run has used; its results are there before."""


def peak_memory(prepare: Callable[..., Callable[[], None]], *args: Any) -> int | None:
    """Measures how much memory a run takes beyond what was held before it, in a new process.

    Args:
        prepare: makes what is to be run; all that it allocates does not count. A function that can
            be pickled.
        *args: what it is called with.

    Returns:
        Bytes; None where the operating system is not Linux.
    """
    if not (PROC / "clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measure, prepare, args).result()


def _measure(prepare: Callable[..., Callable[[], None]], args: tuple[Any, ...]) -> int:
    run = prepare(*args)
    run()  # What is allocated once, like the stacks of threads, does not count either.
    time.sleep(SECONDS_TO_FREE)
    ctypes.CDLL(None).malloc_trim(0)  # Or the run would take what was freed and is still held.
    (PROC / "clear_refs").write_text("5")  # The largest size so far is forgotten.
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROC / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{PROC / 'status'} has no {name}.")
    return 1024 * int(found[1])
