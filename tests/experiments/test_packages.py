"""Packages are fetched with pip from a local folder of wheels: no network."""

import hashlib
import os
import zipfile

import pytest

from experiments.common import packages
from experiments.common.files import whole_file
from experiments.common.packages import Package, PackageUnavailableError, extract, fetch

WHEEL = "tiny_data-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that sees nothing but tmp_path/wheels."""
    (tmp_path / "wheels").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("CLUSTAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, cache):
    """A wheel that may be unzipped, but neither imported nor installed on this Python."""
    path = tmp_path / "wheels" / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/__init__.py", "raise RuntimeError")
        archive.writestr("tiny_data/words.txt", "one two")
        archive.writestr(
            "tiny_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\nRequires-Python: <3\n",
        )
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return Package("tiny-data", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_only_what_is_asked_for_is_extracted(tiny, cache):
    (path,) = extract(tiny, "tiny_data/words.txt")
    assert path.read_text() == "one two"
    files = [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()]
    assert sorted(files) == ["tiny-data-1.0/tiny_data/words.txt", WHEEL]


@pytest.mark.once
def test_a_second_time_needs_no_pip(tiny, monkeypatch):
    first = extract(tiny, "tiny_data/words.txt")
    written = first[0].stat().st_mtime_ns
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("downloaded again"))
    assert extract(tiny, "tiny_data/words.txt") == first
    assert first[0].stat().st_mtime_ns == written


@pytest.mark.once
def test_damaged_files_are_replaced(tiny, cache):
    """A wheel and a member that were cut off half way are not taken for good ones."""
    (path,) = extract(tiny, "tiny_data/words.txt")
    path.write_text("one")
    (cache / WHEEL).write_bytes((cache / WHEEL).read_bytes()[:100])
    (path,) = extract(tiny, "tiny_data/words.txt")
    assert path.read_text() == "one two"
    assert hashlib.sha256((cache / WHEEL).read_bytes()).hexdigest() == tiny.sha256


@pytest.mark.once
def test_wrong_hash(tiny, cache):
    pinned = Package(tiny.name, tiny.version, "0" * 64)
    with pytest.raises(PackageUnavailableError) as error:
        fetch(pinned)
    assert f"sha256 must be {'0' * 64}, got {tiny.sha256}" in str(error.value)
    assert list(cache.iterdir()) == []


@pytest.mark.once
def test_missing_package_says_how_to_get_it(cache):
    with pytest.raises(PackageUnavailableError) as error:
        fetch(Package("not-there", "2.5", "0" * 64))
    message = str(error.value)
    assert message.startswith("Cannot get the package not-there 2.5: pip says:")
    assert "No matching distribution found for not-there==2.5" in message
    assert "pip download --no-deps --only-binary :all:" in message
    assert f"into {cache}" in message


def test_got_by_hand(tiny, cache, tmp_path, monkeypatch):
    """What the message says to do works: the wheel is put into the cache, pip is of no use."""
    cache.mkdir()
    (tmp_path / "wheels" / WHEEL).rename(cache / WHEEL)
    assert fetch(tiny) == cache / WHEEL


def test_unwritable_cache(tiny, tmp_path, monkeypatch):
    """A cache that cannot be written, here since a file is in its way, is reported alike."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLUSTAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(PackageUnavailableError, match=r"tiny-data 1\.0: .*File exists"):
        fetch(tiny)


@pytest.mark.once
def test_member_that_is_not_in_the_wheel(tiny):
    with pytest.raises(KeyError, match="no/such"):
        extract(tiny, "no/such")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("CLUSTAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_dir() == tmp_path / "clustax"
    monkeypatch.setenv("CLUSTAX_CACHE", str(tmp_path / "mine"))
    assert packages.cache_dir() == tmp_path / "mine"


def test_whole_file_keeps_the_old_one_when_interrupted(tmp_path):
    path = tmp_path / "new" / "results.json"
    with whole_file(path) as partial:
        partial.write_text("first")

    def interrupted():
        with whole_file(path) as partial:
            partial.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    with whole_file(path) as partial:
        partial.write_text("third")
    assert path.read_text() == "third"
