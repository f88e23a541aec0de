"""What is left of a run that was killed, and what of it may be used."""

import json
import subprocess
import sys

from experiments.common.journal import Journal, source_digest

IDENTITY = {"settings": {"seed": 0}, "versions": {"jax": "1"}}


def test_a_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path, IDENTITY)
    assert (first.finished, first.discarded) == ({}, False)
    first.add("a", {"numbers": (0.1, 2), "text": "ä\n"})
    first.add("b", None)
    second = Journal(path, IDENTITY)
    assert second.finished == {"a": {"numbers": [0.1, 2], "text": "ä\n"}, "b": None}
    assert second.finished == first.finished
    assert not second.discarded
    second.remove()
    assert not path.exists()


def test_pieces_of_another_run_are_not_used(tmp_path):
    path = tmp_path / "journal"
    Journal(path, IDENTITY).add("a", 1)
    other = Journal(path, IDENTITY | {"versions": {"jax": "2"}})
    assert (other.finished, other.discarded) == ({}, True)
    other.add("b", 2)
    back = Journal(path, IDENTITY)
    assert (back.finished, back.discarded) == ({}, True)
    assert len(path.read_text().splitlines()) == 1


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, IDENTITY)
    journal.add("a", [1])
    journal.add("b", [2])
    whole = path.read_bytes()
    for missing in (1, 5):
        path.write_bytes(whole[:-missing])
        again = Journal(path, IDENTITY)
        assert again.finished == {"a": [1]}
        again.add("b", [2])
        assert path.read_bytes() == whole


def test_a_killed_process_leaves_what_it_finished(tmp_path):
    path = tmp_path / "journal"
    program = (
        "import os, pathlib, signal\n"
        "from experiments.common.journal import Journal\n"
        f"journal = Journal(pathlib.Path({str(path)!r}), {IDENTITY!r})\n"
        "journal.add('a', 1)\n"
        "journal.path.open('ab', buffering=0).write(b'{\"name\": \"b')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert Journal(path, IDENTITY).finished == {"a": 1}


def test_identity_is_the_first_line(tmp_path):
    Journal(tmp_path / "journal", IDENTITY)
    (line,) = (tmp_path / "journal").read_text().splitlines()
    assert json.loads(line) == {"identity": IDENTITY}


def test_source_digest(tmp_path):
    (tmp_path / "deep").mkdir()
    code = tmp_path / "deep" / "code.py"
    code.write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert source_digest(tmp_path) == before
    code.write_text("x = 2\n")
    assert source_digest(tmp_path) != before
