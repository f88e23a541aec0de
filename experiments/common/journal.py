"""Finished pieces of long work, so that a run that was killed can go on where it was."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A JSON-Lines file: its first line says what the run is, each other one is a finished piece.

    Pieces of a run that is not the same in everything are not used: the file starts anew. Of one
    that is the same, a last line that was cut off when the run was killed is dropped.

    Args:
        path: the file; its folder must exist.
        identity: all that the pieces depend on, as JSON can hold it.

    Attributes:
        finished: the pieces by name.
        discarded: whether there was another run's file.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        self.finished: dict[str, Any] = {}
        head = _line({"identity": identity})
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self.discarded = bool(lines) and lines[0] != head
        if lines[:1] != [head]:
            path.write_bytes(head)
            return
        whole = [line for line in lines[1:] if line.endswith(b"\n")]
        for piece in map(json.loads, whole):
            self.finished[piece["name"]] = piece["found"]
        with path.open("r+b") as file:
            file.truncate(len(head) + sum(map(len, whole)))

    def add(self, name: str, found: Any) -> None:
        """Writes down a finished piece.

        Args:
            name: which.
            found: what came of it, as JSON can hold it.
        """
        line = _line({"name": name, "found": found})
        with self.path.open("ab") as file:
            file.write(line)
        # As a run that goes on will read it, so that both find the same.
        self.finished[name] = json.loads(line)["found"]

    def remove(self) -> None:
        """Removes the file: the run is complete and its results are written."""
        self.path.unlink(missing_ok=True)  # Another run of the same may have been quicker.


def source_digest(*folders: Path) -> str:
    """Hashes the Python files of folders: results of other code are other results."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def revision() -> str:
    """The commit that this code is of; with "-dirty" where it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
