"""Scalars of a training run over its steps: JSON Lines to read, event files for TensorBoard."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

EVENTS: Any = event_pb2
"""The messages of TensorBoard's files, whose module makes its classes when it is imported."""


class Scalars:
    """What was logged so far, and the files it is in.

    Args:
        folder: of `scalars.jsonl` and of the event files; it must exist.
        step: how many steps count. What was logged after them belongs to steps that are made again.

    Attributes:
        rows: what was logged, each a dictionary with its step.
    """

    def __init__(self, folder: Path, step: int):
        self.rows: list[dict[str, Any]] = []
        self._path = folder / "scalars.jsonl"
        size = 0
        for line in _lines(self._path):
            # The last line of a run that was killed may be cut off.
            row = json.loads(line) if line.endswith(b"\n") else None
            if row is None or row["step"] > step:
                break
            self.rows.append(row)
            size += len(line)
        self._file = self._path.open("ab", buffering=0)
        self._file.truncate(size)
        # The SummaryWriter of tensorboardX writes in another thread, and waits for ever for it if
        # the disk is full.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{step}")
        # TensorBoard forgets what comes after `step`.
        self._write_event(step + 1, session_log=EVENTS.SessionLog(status=EVENTS.SessionLog.START))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars of a step; on return a kill cannot take them away.

        Raises:
            OSError: if they cannot be written, as on a full disk; it names the file.
        """
        row = {"step": step, **scalars}
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
            os.fsync(self._file.fileno())
            for name, value in scalars.items():
                self._write_event(step, summary=summary.scalar(name, value))
            self._events.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.rows.append(row)

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(EVENTS.Event(wall_time=time.time(), step=step, **content))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []
