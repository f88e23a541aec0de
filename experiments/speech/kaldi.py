"""Directories of data as Kaldi has them: what an owner of WSJ or Switchboard has.

A directory has wav.scp, and text with the words or phones of each utterance. It may have segments,
which cuts recordings into utterances, and utt2spk. With feats.scp instead of wav.scp, features are
read from archives.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import kaldiio
import numpy as np

from clustax.models.audio import SAMPLE_RATE
from experiments.common.rows import DataError, Problems
from experiments.common.speech import read_audio
from experiments.speech.corpus import Recording, RecordingError
from experiments.speech.phones import ARPABET, PhoneError, Phones
from experiments.speech.synthesis import resample

LISTS = ("wav.scp", "feats.scp", "segments", "text", "utt2spk")
"""The files of a directory that are read; others are left alone."""

SILENCES = frozenset({"sil", "spn", "nsn"})
"""Phones of a lexicon that are not spoken."""


class Line(NamedTuple):
    """What a list says of an utterance or recording, and in which line."""

    number: int
    value: str


class Segment(NamedTuple):
    """A part of a recording, in seconds; the end may be infinite."""

    line: int
    recording: str
    start: float
    end: float


@dataclass(frozen=True)
class Lexicon:
    """How the words of transcripts are pronounced.

    Attributes:
        words: the phones of each; of None, transcripts are phones themselves.
        phones: all that there are.
    """

    words: Mapping[str, Sequence[str]] | None = None
    phones: Phones = dataclasses.field(default_factory=Phones)

    def pronounce(self, transcript: str) -> list[str]:
        """The phones of a transcript.

        Raises:
            PhoneError: if a word or phone is not known.
        """
        if self.words is None:
            return [phone for word in transcript.split() if (phone := plain(word)) not in SILENCES]
        found = []
        for word in transcript.split():
            if word not in self.words:
                raise PhoneError(f"{word!r} is not in the lexicon: add it there.")
            found += self.words[word]
        return found


def plain(phone: str) -> str:
    """Takes from a phone its stress and its place in the word, and the case.

    >>> plain("AH0_B"), plain("SIL")
    ('ah', 'sil')
    """
    return re.sub(r"(?<=[a-z])\d$", "", re.sub("_[BIES]$", "", phone).lower())


def read_lexicon(path: Path, probabilities: bool | None = None) -> Lexicon:
    """Reads a lexicon, of which the first pronunciation of each word is taken.

    Args:
        path: lines of a word and its phones, as in lexicon.txt.
        probabilities: whether a probability stands in between, as in lexiconp.txt; if None,
            whether the file is called so.

    Raises:
        DataError: if a line is not like that.
    """
    probabilities = path.name == "lexiconp.txt" if probabilities is None else probabilities
    words: dict[str, list[str]] = {}
    for number, line in _lines(path):
        word, *said = line.split()
        if probabilities and not (said and _is_number(said.pop(0))):
            raise DataError(
                f"{path}, line {number}: expected a word, its probability and its phones, found "
                f"{line!r}. Correct it, or call a lexicon without probabilities lexicon.txt."
            )
        if not said:
            raise DataError(
                f"{path}, line {number}: expected a word and its phones, found {line!r}. Correct "
                "it, or remove it."
            )
        words.setdefault(word, [phone for phone in map(plain, said) if phone not in SILENCES])
    if not words:
        raise DataError(f"{path} must have words with their phones, found none.")
    phones = {phone for said in words.values() for phone in said}
    # Models that were trained with other data can then be used, too.
    return Lexicon(words, Phones(ARPABET if phones <= set(ARPABET) else tuple(sorted(phones))))


class KaldiDirectory:
    """The utterances of a directory.

    Args:
        folder: the directory.
        lexicon: for its transcripts.
        problems: what becomes of lines that are not as they should be.

    Attributes:
        utterances: the identifiers, in the order of text.

    Raises:
        DataError: if a line is not as it should be and such lines are refused, or no utterance is
            left; it names the file and the line.
    """

    def __init__(self, folder: Path, lexicon: Lexicon, problems: Problems | None = None):
        self.folder, self.phones = folder, lexicon.phones
        self._problems = Problems() if problems is None else problems
        # Recordings are long, and segments of the same one follow each other.
        self._last: tuple[str, np.ndarray] | None = None
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder}.")
        has = {name for name in LISTS if (folder / name).exists()}
        if "text" not in has or not has & {"wav.scp", "feats.scp"}:
            raise DataError(
                f"{folder} must have text and wav.scp or feats.scp, as Kaldi's data directories "
                f"do, found {', '.join(sorted(has)) or 'none of them'}."
            )
        self.listing = "feats.scp" if "feats.scp" in has else "wav.scp"
        self._sources = self._read(self.listing)
        for name, line in list(self._sources.items()):
            if line.value.endswith("|"):
                del self._sources[name]
                self._bad(
                    self.listing,
                    line.number,
                    "expected the path of a file, found a command with a pipe, which is not run: "
                    "write its output to a file, and the path of that file here",
                )
        self._segments = self._read_segments() if "segments" in has else None
        if self.listing == "feats.scp":
            self._segments = None  # Features are of utterances already.
        transcripts = self._read("text")
        self._phones = self._pronounce(transcripts, lexicon)
        if "utt2spk" in has:
            self._check_speakers(transcripts)
        self.utterances = list(self._phones)
        if not self.utterances:
            raise DataError(f"{folder / 'text'} must have an utterance that can be used: none is.")

    @property
    def identity(self) -> dict[str, Any]:
        """What its features depend on; the recordings themselves are taken to stay as they are."""
        files = [path for name in LISTS if (path := self.folder / name).exists()]
        digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return {"folder": str(self.folder), "files": digest, "transcripts": self._phones}

    def __len__(self) -> int:
        return len(self.utterances)

    def recording(self, number: int) -> Recording:
        """Reads an utterance.

        Raises:
            RecordingError: if its file is missing or damaged, or shorter than it should be.
        """
        name = self.utterances[number]
        phones = self._phones[name]
        if self.listing == "feats.scp":
            return Recording(name, phones=phones, features=self._load_features(name))
        if self._segments is None:
            return Recording(name, phones=phones, audio=self._load_audio(name))
        segment = self._segments[name]
        if self._last is None or self._last[0] != segment.recording:
            self._last = segment.recording, self._load_audio(segment.recording)
        _, audio = self._last
        seconds = len(audio) / SAMPLE_RATE
        # Kaldi forgives half a second, too.
        if not math.isinf(segment.end) and segment.end > seconds + 0.5:
            raise RecordingError(
                f"{self.folder / 'segments'}, line {segment.line}: {name} ends after "
                f"{segment.end} s, but {segment.recording} has {seconds:.2f} s."
            )
        end = None if math.isinf(segment.end) else round(segment.end * SAMPLE_RATE)
        return Recording(name, phones=phones, audio=audio[round(segment.start * SAMPLE_RATE) : end])

    def _read(self, listing: str) -> dict[str, Line]:
        path = self.folder / listing
        found: dict[str, Line] = {}
        for number, line in _lines(path):
            name, _, value = line.partition(" ")
            if not value.strip():
                self._bad(listing, number, f"expected a name and what it has, found {line!r}")
            elif name in found:
                self._bad(listing, number, f"{name} is there already, in line {found[name].number}")
            else:
                found[name] = Line(number, value.strip())
        return found

    def _read_segments(self) -> dict[str, Segment]:
        found = {}
        for name, (number, value) in self._read("segments").items():
            fields = value.split()
            if len(fields) != 3 or not all(map(_is_number, fields[1:])):
                problem = f"expected an utterance, its recording, start and end, found {value!r}"
            elif fields[0] not in self._sources and self.listing == "wav.scp":
                problem = f"the recording {fields[0]} of {name} is not in wav.scp"
            else:
                start, end = map(float, fields[1:])
                end = math.inf if end == -1 else end
                if 0 <= start < end:
                    found[name] = Segment(number, fields[0], start, end)
                    continue
                problem = f"expected a start from 0 on, and before the end, found {value!r}"
            self._bad("segments", number, problem)
        return found

    def _pronounce(self, transcripts: Mapping[str, Line], lexicon: Lexicon) -> dict[str, list[int]]:
        where = self.listing if self._segments is None else "segments"
        known = self._sources if self._segments is None else self._segments
        found = {}
        for name, (number, transcript) in transcripts.items():
            try:
                phones = self.phones.numbers(lexicon.pronounce(transcript))
            except PhoneError as error:
                self._bad("text", number, str(error).rstrip("."))
                continue
            if name not in known:
                self._bad("text", number, f"the utterance {name} is not in {where}")
            elif not phones:
                self._bad("text", number, f"expected words that are spoken, found {transcript!r}")
            else:
                found[name] = phones
        return found

    def _check_speakers(self, transcripts: Mapping[str, Line]) -> None:
        speakers = self._read("utt2spk")
        for name, (number, speaker) in speakers.items():
            if len(speaker.split()) > 1:
                self._bad("utt2spk", number, f"expected one speaker of {name}, found {speaker!r}")
        for name, (number, _) in transcripts.items():
            if name in self._phones and name not in speakers:
                del self._phones[name]
                self._bad("text", number, f"the utterance {name} has no speaker in utt2spk")

    def _bad(self, listing: str, number: int, problem: str) -> None:
        self._problems.add(self.folder / listing, number, problem)

    def _load_audio(self, name: str) -> np.ndarray:
        line = self._sources[name]
        try:
            if re.search(r":\d+$", line.value):  # A place in an archive.
                rate, samples = cast(tuple[int, np.ndarray], kaldiio.load_mat(line.value))
                return resample(np.asarray(samples, np.float32) / 2**15, rate)
            return read_audio(Path(line.value))
        except Exception as error:  # Damage shows in many ways.
            raise self._unreadable(line.number, name, error) from error

    def _load_features(self, name: str) -> np.ndarray:
        line = self._sources[name]
        try:
            found = kaldiio.load_mat(line.value)
            if not isinstance(found, np.ndarray) or found.ndim != 2:
                raise ValueError("it has no matrix there")
            return found
        except Exception as error:  # Damage shows in many ways.
            raise self._unreadable(line.number, name, error) from error

    def _unreadable(self, number: int, name: str, error: Exception) -> RecordingError:
        path = self.folder / self.listing
        return RecordingError(
            f"{path}, line {number}: {name} cannot be read ({type(error).__name__}: {error})."
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8").replace("\t", " ").strip()
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {number}: expected UTF-8, found {line!r}.") from None
        if text:
            yield number, text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
