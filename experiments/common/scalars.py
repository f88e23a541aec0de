"""Scalars of a training run over its steps: JSON Lines to read, event files for TensorBoard."""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from experiments.common.files import BrokenFileError, named

EVENTS: Any = event_pb2
"""The messages of TensorBoard's files, whose module makes its classes when it is imported."""


class Scalars:
    """What was logged so far, and the files it is in.

    Args:
        folder: of `scalars.jsonl` and of the event files; it must exist.
        step: how many steps count. What was logged after them belongs to steps that are made again.

    Attributes:
        rows: what was logged, each a dictionary with its step.

    Raises:
        BrokenFileError: if what counts of `scalars.jsonl` cannot be read.
        OSError: in its `with` statement, if the files cannot be written; it names one.
    """

    def __init__(self, folder: Path, step: int):
        self.rows: list[dict[str, Any]] = []
        self._path, self._step, self._size = folder / "scalars.jsonl", step, 0
        for number, line in enumerate(_lines(self._path), start=1):
            # The last line of a run that was killed may be cut off.
            row = _parse(line, self._path, number) if line.endswith(b"\n") else None
            if row is None or row["step"] > step:
                break
            self.rows.append(row)
            self._size += len(line)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars of a step; on return a kill cannot take them away.

        Raises:
            OSError: if they cannot be written, as on a full disk; it names the file.
        """
        row = {"step": step, **scalars}
        with named(self._path):
            line = json.dumps(row).encode() + b"\n"
            while line:  # What a disk that gets full does not take is no error yet.
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
            for name, value in scalars.items():
                self._write_event(step=step, summary=summary.scalar(name, value))
            self._events.flush()
        self.rows.append(row)

    def _write_event(self, **content: Any) -> None:
        event = EVENTS.Event(wall_time=time.time(), **content)
        self._events.write(event.SerializeToString())

    def __enter__(self) -> Self:
        start = EVENTS.SessionLog(status=EVENTS.SessionLog.START)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{self._step}"
        with named(self._path), ExitStack() as files:
            self._file = files.enter_context(self._path.open("ab", buffering=0))
            self._file.truncate(self._size)
            # The SummaryWriter of tensorboardX writes in another thread, and waits for ever for it
            # if the disk is full.
            self._events = RecordWriter(str(self._path.with_name(name)))
            files.callback(self._events.close)
            self._write_event(file_version="brain.Event:2")
            self._write_event(
                step=self._step + 1, session_log=start
            )  # TensorBoard forgets the rest.
            self._events.flush()
            self._files = files.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with named(self._path):
                self._files.close()
        except OSError:
            if kind is None:  # Otherwise it was said why already.
                raise


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, TypeError, KeyError):
        pass
    raise BrokenFileError(
        f"Line {number} of {path} is damaged. Nothing was changed. Remove {path.parent} and start "
        "again: this run starts from its beginning, others go on where they were."
    )
