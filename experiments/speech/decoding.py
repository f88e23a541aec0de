"""From what a model says of each frame to phones, and how many of them are wrong."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import kaldialign
import numpy as np

from experiments.speech.phones import BLANK


def greedy(scores: np.ndarray) -> list[int]:
    """Takes the best symbol of each frame; repetitions and blanks go.

    >>> greedy(np.eye(3)[[1, 1, 0, 1, 2, 2, 0]])
    [1, 1, 2]

    Args:
        scores: (frames, symbols), of which the greatest counts.
    """
    path = scores.argmax(1)
    return [int(symbol) for symbol in path[np.diff(path, prepend=BLANK) != 0] if symbol != BLANK]


def beam(log_probs: np.ndarray, width: int, least: float = 1e-4) -> list[int]:
    """Finds phones that are probable over all the ways in which frames can say them.

    Args:
        log_probs: (frames, symbols), the logarithms of probabilities.
        width: how many beginnings are followed up.
        least: symbols that are less probable in a frame are not tried there; 0 for none.
    """
    # Of each beginning, the log probabilities that its last frame was a blank, and that it was not.
    beginnings: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    threshold = math.log(least) if least else -math.inf
    for frame in log_probs:
        tried = [int(symbol) for symbol in np.flatnonzero(frame >= threshold) if symbol != BLANK]
        at = frame.tolist()
        found: dict[tuple[int, ...], tuple[float, float]] = {}
        for phones, (blank, other) in beginnings.items():
            either = _add(blank, other)
            last = phones[-1] if phones else None
            repeated = -math.inf if last is None else other + at[last]
            _reach(found, phones, either + at[BLANK], repeated)
            for symbol in tried:
                before = blank if symbol == last else either
                _reach(found, (*phones, symbol), -math.inf, before + at[symbol])
        best = sorted(found, key=lambda phones: _add(*found[phones]), reverse=True)[:width]
        beginnings = {phones: found[phones] for phones in best}
    return list(next(iter(beginnings)))


def _reach(found: dict, phones: tuple[int, ...], blank: float, other: float) -> None:
    was_blank, was_other = found.get(phones, (-math.inf, -math.inf))
    found[phones] = _add(was_blank, blank), _add(was_other, other)


def _add(a: float, b: float) -> float:
    """The logarithm of the sum of two numbers whose logarithms these are."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


class Errors(NamedTuple):
    """How many phones are wrong, and of how many."""

    substitutions: int
    deletions: int
    insertions: int
    phones: int

    @property
    def wrong(self) -> int:
        """Errors of all kinds."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """The phone error rate."""
        return self.wrong / max(1, self.phones)

    @classmethod
    def total(cls, errors: Iterable["Errors"]) -> "Errors":
        """Those of several utterances together."""
        return cls(*map(sum, zip(*errors, strict=True)))


def count_errors(reference: Sequence[int], found: Sequence[int]) -> Errors:
    """Counts the least changes that make the phones found those of the reference.

    >>> count_errors([1, 2, 3, 4], [1, 3, 4, 5])
    Errors(substitutions=0, deletions=1, insertions=1, phones=4)

    Args:
        reference: the phones of an utterance.
        found: what a model says they are.
    """
    counts = kaldialign.edit_distance(list(reference), list(found))
    return Errors(int(counts["sub"]), int(counts["del"]), int(counts["ins"]), len(reference))
