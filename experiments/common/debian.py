"""Data that come inside Debian packages: fetched by apt, pinned by hash, not installed."""

import io
import tarfile
from pathlib import Path
from typing import ClassVar

from experiments.common.packages import Package, PackageUnavailableError, cache_dir, fetch


class DebianPackage(Package):
    """One .deb file, known by its hash."""

    tool: ClassVar[str] = "apt-get"
    registry: ClassVar[str] = "Debian's packages (after apt-get update)"

    @property
    def command(self) -> tuple[str, ...]:
        """What downloads the file into the working directory."""
        return ("apt-get", "download", f"{self.name}={self.version}")

    @property
    def pattern(self) -> str:
        """What the names of such files match."""
        return f"{self.name}_{self.version}_*.deb"


ASTERISK_TEXTS = DebianPackage(
    "asterisk-core-sounds-en",
    "1.6.1-1",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
)
"""What the prompts of a telephone exchange say. CC-BY-SA-3.0."""

ASTERISK_SOUNDS = DebianPackage(
    "asterisk-core-sounds-en-g722",
    "1.6.1-1",
    "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
)
"""The prompts, one speaker at 16 kHz. CC-BY-SA-3.0."""

POCKETSPHINX = DebianPackage(
    "pocketsphinx-testdata",
    "0.8+5prealpha+1-15",
    "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
)
"""The test data of a speech recogniser, with ten transcribed clips. BSD-2-Clause."""

FLITE_PROGRAM = DebianPackage(
    "flite",
    "2.2-5",
    "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9",
)
"""The programs of a speech synthesiser, for x86-64. BSD-like."""

FLITE_LIBRARY = DebianPackage(
    "libflite1",
    "2.2-5",
    "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061",
)
"""Its voices."""

ALSA = DebianPackage(
    "libasound2",
    "1.2.8-1+b1",
    "44c77b076a7b11ae99712439022d822245b1994c435da564ebd320bb676faf4c",
)
"""The library for sound cards that flite is linked to. LGPL-2.1."""


def read_files(package: DebianPackage, folder: str) -> dict[str, bytes]:
    """Reads the files below a folder of a package, by their paths in that folder.

    Args:
        package: which.
        folder: its path in the file system that the package is for, without a leading slash.

    Raises:
        PackageUnavailableError: as `fetch`.
    """
    file = fetch(package)
    prefix = f"./{folder}/"
    try:
        with tarfile.open(fileobj=io.BytesIO(_data(file))) as archive:
            return {
                member.name.removeprefix(prefix): content.read()
                for member in archive
                if member.isfile()
                and member.name.startswith(prefix)
                and (content := archive.extractfile(member))
            }
    except (OSError, tarfile.TarError) as error:
        raise PackageUnavailableError(package, error, cache_dir()) from error


def _data(file: Path) -> bytes:
    """Returns the archive of the package's files: a .deb is an `ar` archive of three members."""
    stored, offset = file.read_bytes(), 8
    while not stored.startswith(b"data.tar", offset):
        size = int(stored[offset + 48 : offset + 58])
        offset += 60 + size + size % 2
    size = int(stored[offset + 48 : offset + 58])
    return stored[offset + 60 : offset + 60 + size]
