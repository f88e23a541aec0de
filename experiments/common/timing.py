"""Times of rivals that take turns, so that the noise of the machine hits all of them alike."""

import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """What repeated runs of one thing took.

    Attributes:
        seconds: of every counted run, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds: a quarter of the runs took less than the first, a quarter more."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


def compile_all(
    runs: Iterable[Callable[[], object]], advance: Callable[[], None] = lambda: None
) -> None:
    """Runs each once, which compiles it, several at once: each compilation keeps one core busy.

    Args:
        runs: what to compile.
        advance: called after each.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for _ in pool.map(lambda run: run(), runs):
            advance()
    finally:
        pool.shutdown(cancel_futures=True)  # An interrupt does not wait for all of them.


def take_turns(
    rivals: Mapping[Name, Callable[[], None]],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    budget: float = math.inf,
) -> dict[Name, Times]:
    """Times all rivals in turn, round after round.

    Each turn is two runs of which the second counts: the first one brings back what the rival
    before has driven out of caches and memory.

    Args:
        rivals: what to run, by name; a call returns when its work is done.
        rounds: counted runs of each, at least 2.
        advance: called after every turn, also after one that is left out.
        budget: seconds for one rival; when its counted runs took half of it, it has no more turns,
            but at least two.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name, run in rivals.items():
            if number < 2 or 2 * sum(seconds[name]) < budget:
                run()
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
            advance()
    return {name: Times(tuple(values)) for name, values in seconds.items()}
