"""Transcribes a recording of any length with two attentions side by side."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from clustax.models.audio import SAMPLE_RATE, WINDOW_SAMPLES
from experiments.common.speech import (
    Recognition,
    count_word_errors,
    differing_words,
    spectrograms,
)
from experiments.swap import shared

MAX_TOKENS = 224
"""Where decoding stops in each window: half of the decoder's positions, as OpenAI's code has it."""


class Transcript(NamedTuple):
    """What one attention makes of a recording."""

    texts: list[str]  # of each window
    endless: int
    encoder_seconds: float
    decoder_seconds: float


def transcribe(
    audio: np.ndarray,
    rivals: Sequence[Callable[[jax.Array], Recognition]],
    batch_size: int,
    console: Console,
) -> list[Transcript]:
    """Transcribes consecutive windows of 30 s; a word that a border cuts may be lost.

    Args:
        audio: 16 kHz mono.
        rivals: those that transcribe, in turns.
        batch_size: windows at once, if there are as many.
        console: shows the progress.
    """
    windows = [audio[at : at + WINDOW_SAMPLES] for at in range(0, len(audio), WINDOW_SAMPLES)]
    size = min(batch_size, len(windows))
    batches = [windows[start : start + size] for start in range(0, len(windows), size)]
    with Progress(console=console) as progress:
        task = progress.add_task("Transcribing", total=len(rivals) * (len(batches) + 1))
        spectra = (spectrograms(batch, size) for batch in batches)
        found = list(shared.in_turns(spectra, rivals, lambda: progress.advance(task)))
    return [
        Transcript(
            # What a last batch has too many repeats its first windows.
            texts=[text for result in results for text in result.texts][: len(windows)],
            endless=sum([end for result in results for end in result.endless][: len(windows)]),
            encoder_seconds=sum(result.encoder_seconds for result in results),
            decoder_seconds=sum(result.decoder_seconds for result in results),
        )
        for results in zip(*found, strict=True)
    ]


def report(exact: Transcript, other: Transcript, names: Sequence[str], console: Console) -> None:
    """Prints both transcripts, where they differ, and what they took.

    Args:
        exact: the one that the other is compared with.
        other: the other.
        names: of the attentions.
        console: where to print.
    """
    table = Table(title="Consecutive windows of 30 s", show_lines=True)
    for name in ("from", *names, "differences"):
        table.add_column(name)
    errors = words = 0
    for number, (ours, theirs) in enumerate(zip(exact.texts, other.texts, strict=True)):
        found = count_word_errors(ours, theirs)
        errors, words = errors + found.errors, words + found.words
        differences = (f"{a or '–'} → {b or '–'}" for a, b in differing_words(ours, theirs))
        minutes, seconds = divmod(number * WINDOW_SAMPLES // SAMPLE_RATE, 60)
        cells = (ours, theirs, "\n".join(differences))
        table.add_row(f"{minutes}:{seconds:02}", *map(escape, cells))
    console.print(table)
    rate = f" ({errors / words:.1%})" if words else ""
    console.print(
        f"{errors} of {words} words differ{rate}; case, punctuation, and how numbers are written "
        "do not count."
    )
    for name, transcript in zip(names, (exact, other), strict=True):
        console.print(
            f"{name}: encoder {transcript.encoder_seconds:.2f} s, decoder "
            f"{transcript.decoder_seconds:.2f} s, {transcript.endless} windows without an end",
            highlight=False,
        )
