"""Files that are either whole or not there."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class BrokenFileError(Exception):
    """A file that has not what was written; the message says which, and what to do."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path; its file takes the place of `path` once the block has succeeded.

    Args:
        path: the file to write or overwrite; its folder is created.

    Raises:
        OSError: if it cannot be written, as on a full disk; it names the file.
    """
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.replace(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Has errors of the system in its block say which file they are about.

    That of a write to a full disk does not.

    Args:
        path: the file that is meant where none is named.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        BrokenFileError: if it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFileError(
            f"{path} is damaged ({error}). Nothing was changed. Remove it, and start again."
        ) from None
