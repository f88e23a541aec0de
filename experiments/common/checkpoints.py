"""Checkpoints of a training run, of which a kill leaves the last whole one."""

import gc
import logging
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message says which, and what to do."""


class Checkpoints:
    """The two newest states of a run, on disk.

    A state counts once all of it is written, so that one that was being written when the run was
    killed is not there.

    Args:
        folder: where they go, a folder each.

    Raises:
        CheckpointError: if the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}.") from error

    @property
    def newest(self) -> int:
        """The step that the newest state was saved after; 0 if there is none."""
        return self._manager.latest_step() or 0

    def restore(self, state: Any) -> tuple[int, Any]:
        """Reads the newest state.

        Args:
            state: arrays of the same shapes, dtypes and shardings.

        Returns:
            The step it was saved after, and the state; 0 and the argument if there is none.

        Raises:
            CheckpointError: if it cannot be read.
        """
        step = self.newest
        if step == 0:
            return 0, state
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_checksum(state))
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            if _with_checksum(found["state"])["checksum"] != found["checksum"]:
                raise ValueError("what is there is not what was written")
            return step, found["state"]
        except Exception as error:  # Damage shows in many ways.
            others = [other for other in self._manager.all_steps() if other < step]
            earlier = f"from step {max(others)}" if others else "from the beginning"
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} cannot be read: {_line(error)}. Nothing "
                f"was changed. Remove that folder and start again to go on {earlier}."
            ) from error

    def save(self, step: int, state: Any) -> None:
        """Writes a state.

        Args:
            step: how many steps were made.
            state: arrays.

        Raises:
            CheckpointError: if it cannot be written; those before are still there.
        """
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_with_checksum(state)))
        except Exception as error:  # A full disk shows as OSError or as one of TensorStore's.
            raise CheckpointError(
                f"The checkpoint of step {step} cannot be written to {self.folder}: "
                f"{_line(error)}. Make room, and start again to go on from the one before."
            ) from error

    def forget_after(self, step: int) -> None:
        """Removes the states of later steps, which are made again.

        Args:
            step: the last that counts.
        """
        for later in [other for other in self._manager.all_steps() if other > step]:
            self._manager.delete(later)

    def __enter__(self) -> Self:
        self._silence = ExitStack()
        self._silence.enter_context(_only_raised())
        return self

    def __exit__(self, *_: object) -> None:
        with self._silence:
            self._manager.close()


def _with_checksum(state: Any) -> dict[str, Any]:
    """What is written: Orbax itself notices a file that is cut off, but no bit that is flipped."""
    checksum = 0
    for array in jax.tree.leaves(jax.device_get(state)):
        checksum = zlib.crc32(np.asarray(array).tobytes(), checksum)
    return {"state": state, "checksum": np.asarray(checksum, np.uint32)}


@contextmanager
def _only_raised() -> Iterator[None]:
    """Keeps errors that are raised from being printed, too: dozens of tracebacks bury our message.

    Orbax logs them, so does asyncio for those that Orbax did not wait for, and operations of
    TensorStore that are under way find the event loop closed.
    """
    loggers, report = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def keep(record: logging.LogRecord) -> bool:
        return not record.exc_info

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    for logger in loggers:
        logger.addFilter(keep)
    sys.unraisablehook = report_others
    try:
        yield
    finally:
        gc.collect()  # Tasks complain when they go.
        sys.unraisablehook = report
        for logger in loggers:
            logger.removeFilter(keep)


def _line(error: Exception) -> str:
    """The first line of what an error says; of a long one the ends, which say what and why."""
    first = (str(error).splitlines() or [""])[0].rstrip(".")
    short = first if len(first) <= 200 else f"{first[:60]} … {first[-120:]}"
    return f"{type(error).__name__}: {short}"
