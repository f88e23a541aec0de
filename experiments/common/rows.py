"""Rows of data that are not as they should be: refused, or skipped and counted."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Malformed = Literal["refuse", "skip"]


class DataError(ValueError):
    """The data are not as expected; the message says where, and what to do."""


@dataclass(frozen=True)
class Problems:
    """The rows that are malformed, where they are not refused.

    Attributes:
        malformed: what becomes of them.
        option: the one of the command line that says so.
        found: a line for each, with its file and line.
    """

    malformed: Malformed = "refuse"
    option: str = "--malformed"
    found: list[str] = field(default_factory=list)

    def add(self, path: Path, line: int, problem: str) -> None:
        """Reports a row that is to be left out.

        Args:
            path: its file.
            line: where it is, from 1.
            problem: what was expected, and what was found.

        Raises:
            DataError: if malformed rows are refused.
        """
        message = f"{path}, line {line}: {problem}"
        if self.malformed == "refuse":
            raise DataError(
                f"{message}. Correct it, or leave out such rows with {self.option} skip."
            )
        self.found.append(message)
