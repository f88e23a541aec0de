"""SQuAD: does a reader still find the answers when clustered attention takes over?

A reader is fine-tuned with exact attention, and answers with exact and with clustered attention,
without retraining. On a file for training and one for development, or by folds: each article is
read by a model that was trained on others. `answer` answers a question of yours.

    python -m experiments.squad cpu --train train-v1.1.json
    python -m experiments.squad full --train train-v2.0.json --dev dev-v2.0.json --model DIR
    python -m experiments.squad answer --model DIR --context FILE --question "Who ...?"

A run that was killed goes on where it was when it is started again. The results of what is finished
are written after each attention.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import clustax
from clustax.models import BertForQuestionAnswering, bert
from experiments.common import finetuning, training
from experiments.common.bootstrap import ratio_interval
from experiments.common.command import RESUME, serve
from experiments.common.encoding import TOKENIZER, encode, load_tokenizer
from experiments.common.finetuning import FineTuning, Inputs, Pretrained
from experiments.common.journal import Journal, revision, source_digest
from experiments.common.pictures import differences
from experiments.common.rows import DataError, Malformed, Problems
from experiments.common.training import Sums
from experiments.swap import shared
from experiments.swap.shared import CLUSTERED, DEFAULT, EXACT, PAPER, Variant
from experiments.tables import points
from experiments.tasks import squad
from experiments.tasks.squad import Question, Span, Window

OTHERS = (
    "improved (Hamming, lse)",
    "improved (Euclidean, mass)",
    "improved (Euclidean, lse)",
    "improved (logit, lse)",
)
"""What has another merge or metric than the two that are compared at all sizes."""
PUBLISHED = [
    {"attention": EXACT, "num_clusters": None, "f1": 0.904},
    {"attention": PAPER, "num_clusters": 25, "f1": 0.876},
    {"attention": CLUSTERED, "num_clusters": 25, "f1": 0.006},
]
"""The paper's F1 of RoBERTa, which is another model than the one here."""


@dataclass(frozen=True)
class Windows:
    """How a context is read, and which spans are answers."""

    max_length: int = 384
    """Tokens of a window, with the question."""
    overlap: int = 128
    """Tokens of the context that a window shares with the one before."""
    max_question: int = 64
    """Tokens of a question; longer ones are cut."""
    buckets: tuple[int, ...] = (128, 192, 256, 384)
    """The lengths that batches are padded to, ascending."""
    n_best: int = 20
    """Spans that are considered."""
    max_answer: int = 30
    """Tokens of an answer, at the most."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if list(self.buckets) != sorted(self.buckets) or self.buckets[-1] < self.max_length:
            raise ValueError(
                f"buckets must ascend to at least max_length = {self.max_length}, got "
                f"{self.buckets}."
            )
        for name in ("n_best", "max_answer", "max_question"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def make(self, model: Pretrained, questions: Sequence[tuple[str, str]]) -> list[Window]:
        """The windows of questions and their contexts."""
        return squad.make_windows(
            model.tokenizer, questions, self.max_length, self.overlap, self.max_question
        )


@dataclass(frozen=True)
class Settings:
    """Fine-tune a reader on SQuAD, and score it with exact and clustered attention."""

    train: Path
    """A JSON file of SQuAD 1.1 or 2.0."""
    dev: Path | None = None
    """Another one to score on; without it, folds over the articles of the first are."""
    model: Path | None = None
    """The folder of a BERT or RoBERTa in Hugging Face's files; all-MiniLM-L6-v2 if None."""
    folds: int = 3
    """Parts of the articles, each of which is read by a model that was trained on the others."""
    clusters: tuple[int, ...] = (25, 10, 50, 100)
    """Numbers of clusters; the first one is used where something else is varied."""
    topk: tuple[int, ...] = (32, 16, 64)
    """Keys with exact weights; the first one is used where something else is varied."""
    seed: int = 0
    """Of the new head, dropout, the order of the data, the folds, and the clusters."""
    windows: Windows = dataclasses.field(default_factory=Windows)
    tuning: FineTuning = dataclasses.field(default_factory=FineTuning)
    malformed: Malformed = "refuse"
    """What becomes of questions that are malformed; those that are skipped are counted."""
    output: Path = Path("results/squad")
    """The folder of the results, and of the runs, which have their logs and models there."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("clusters", "topk"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 1:
                raise ValueError(f"{name} must be different ones of at least 1, got {values}.")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}.")


def variants(settings: Settings) -> list[Variant]:
    """What is compared: exact attention, the methods, then other C, other k, and other methods."""
    clusters, topk = settings.clusters[0], settings.topk[0]
    sizes = [
        *((count, topk) for count in settings.clusters[1:]),
        *((clusters, k) for k in settings.topk[1:]),
    ]
    wanted = [
        *((name, clusters, topk) for name in (DEFAULT, PAPER, CLUSTERED)),
        *((name, *size) for size in sizes for name in (DEFAULT, PAPER)),
        *((name, clusters, topk) for name in OTHERS),
    ]
    return [Variant(EXACT), *(shared.variant(*each, settings.seed) for each in wanted)]


def choose_folds(questions: Sequence[Question], folds: int, seed: int) -> np.ndarray:
    """The fold of each question: all of an article have the same, and folds are about equal.

    Args:
        questions: all of them.
        folds: how many.
        seed: of the order in which articles are given to the smallest fold.
    """
    articles = list(dict.fromkeys(question.article for question in questions))
    if len(articles) < folds:
        raise DataError(f"folds must be at most the {len(articles)} articles, got {folds}.")
    of_article: dict[str, int] = {}
    sizes = [0] * folds
    for row in np.random.default_rng(seed).permutation(len(articles)):
        fold = int(np.argmin(sizes))
        of_article[articles[row]] = fold
        sizes[fold] += sum(question.article == articles[row] for question in questions)
    return np.array([of_article[question.article] for question in questions])


def span_loss(model: BertForQuestionAnswering, batch: Mapping[str, Array]) -> Sums:
    """The cross-entropy of start and end, of which the mean counts."""
    logits = model(batch["tokens"], batch["lengths"], batch["token_types"])
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(part, batch[name])
        for part, name in ((logits.start, "start"), (logits.end, "end"))
    ]
    return {"weight": jnp.float32(losses[0].size), "loss": jnp.sum(losses[0] + losses[1]) / 2}


def read(
    model: BertForQuestionAnswering, inputs: Inputs, batch_size: int, buckets: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The logits of start and end of each window's tokens, without dropout."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for rows, batch in finetuning.evaluation_batches(inputs, batch_size, buckets):
        hidden = encode(model.bert, batch["tokens"], batch["lengths"], batch["token_types"])
        start, end = map(np.asarray, model.locate(hidden, batch["lengths"]))
        for index, row in enumerate(rows):
            length = len(inputs.tokens[row])
            found[int(row)] = (start[index, :length], end[index, :length])
    return [found[row] for row in range(len(inputs.tokens))]


class Reading(NamedTuple):
    """Questions, their windows, and these as batches are made of them."""

    questions: list[Question]
    windows: list[Window]
    inputs: Inputs


def prepare(settings: Settings, model: Pretrained, questions: list[Question]) -> Reading:
    """Makes the windows of questions."""
    pairs = [(question.question, question.context) for question in questions]
    windows = settings.windows.make(model, pairs)
    return Reading(questions, windows, squad.make_inputs(windows, questions))


def spans_of(
    windows: Sequence[Window],
    logits: Sequence[tuple[np.ndarray, np.ndarray]],
    settings: Windows,
    allow_none: bool,
) -> list[list[Span]]:
    """The best spans of each question."""
    by_row: dict[int, list[tuple[Window, np.ndarray, np.ndarray]]] = {}
    for window, (start, end) in zip(windows, logits, strict=True):
        by_row.setdefault(window.row, []).append((window, start, end))
    return [
        squad.best_spans(by_row[row], settings.n_best, settings.max_answer, allow_none)
        for row in sorted(by_row)
    ]


def answer_all(
    settings: Settings, model: BertForQuestionAnswering, reading: Reading, allow_none: bool
) -> dict[str, tuple[str, float]]:
    """The answer to each question, by its id, and its probability."""
    logits = read(model, reading.inputs, settings.tuning.batch_size, settings.windows.buckets)
    found = spans_of(reading.windows, logits, settings.windows, allow_none)
    return {
        question.id: (
            question.context[spans[0].start : spans[0].end],
            float(squad.probabilities(spans)[0]),
        )
        for question, spans in zip(reading.questions, found, strict=True)
    }


def scores(
    questions: Sequence[Question], answers: Mapping[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    """The exact match and the F1 of each question."""
    expected = [[answer.text for answer in question.answers] for question in questions]
    found = [answers[question.id][0] for question in questions]
    pairs = list(zip(found, expected, strict=True))
    return {
        "exact_match": np.array([squad.exact_match(*pair) for pair in pairs]),
        "f1": np.array([squad.f1(*pair) for pair in pairs]),
    }


def compare(
    variant: Variant,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[Any]],
    exact: Mapping[str, Sequence[Any]],
    seed: int,
) -> dict[str, Any]:
    """A row of the table; the interval is a bootstrap over contexts, whose questions are alike."""
    ours, theirs = scores(questions, answers), scores(questions, exact)
    contexts = list(dict.fromkeys(question.context for question in questions))
    number = {context: at for at, context in enumerate(contexts)}
    where = np.array([number[question.context] for question in questions])
    differences = np.bincount(where, ours["f1"] - theirs["f1"])
    counts = np.bincount(where).astype(float)
    return {
        "attention": variant.name,
        "num_clusters": variant.num_clusters,
        "topk": variant.topk,
        "exact_match": float(ours["exact_match"].mean()),
        "f1": float(ours["f1"].mean()),
        "difference": float((ours["f1"] - theirs["f1"]).mean()),
        "difference_interval": ratio_interval(differences, counts, seed),
        "equal_answers": float(np.mean([answers[q.id][0] == exact[q.id][0] for q in questions])),
    }


class Part(NamedTuple):
    """What one model is trained on, and what it reads then."""

    name: str
    train: Reading
    test: Reading


def make_parts(settings: Settings, model: Pretrained, problems: Problems) -> list[Part]:
    """The training and the development file, or the folds."""
    questions = squad.read_squad(settings.train, problems)
    known = prepare(settings, model, questions)
    if settings.dev is not None:
        return [
            Part("dev", known, prepare(settings, model, squad.read_squad(settings.dev, problems)))
        ]
    fold_of = choose_folds(questions, settings.folds, settings.seed)
    parts = []
    for fold in range(settings.folds):
        readings = []
        for inside in (fold_of != fold, fold_of == fold):
            rows = [row for row, window in enumerate(known.windows) if inside[window.row]]
            kept = np.flatnonzero(inside)
            renamed = {int(row): at for at, row in enumerate(kept)}
            windows = [known.windows[row] for row in rows]
            readings.append(
                Reading(
                    [questions[row] for row in kept],
                    [window._replace(row=renamed[window.row]) for window in windows],
                    known.inputs.choose(rows),
                )
            )
        parts.append(Part(f"fold-{fold}", *readings))
    return parts


def train_part(
    settings: Settings, part: Part, pretrained: Pretrained, allow_none: bool, progress: Progress
) -> BertForQuestionAnswering:
    """Fine-tunes the reader of a part, and writes it in Hugging Face's files, for `answer`.

    With a development file, the best of the checkpoints there is taken; a fold takes the last one,
    as its own questions must not choose.
    """
    folder = settings.output / "runs" / part.name
    identity = {
        "tuning": dataclasses.asdict(settings.tuning),
        "windows": dataclasses.asdict(settings.windows),
        "seed": settings.seed,
        "model": pretrained.digest,
        "data": [part.train.inputs.digest, part.test.inputs.digest],
    }
    training.claim(folder, identity)
    encoder = pretrained.encoder(Variant(EXACT), settings.seed)

    def score(model: BertForQuestionAnswering) -> float:
        found = answer_all(settings, model, part.test, allow_none)
        return float(scores(part.test.questions, found)["f1"].mean())

    model, _ = finetuning.fine_tune(
        BertForQuestionAnswering(encoder, rngs=nnx.Rngs(settings.seed)),
        span_loss,
        part.train.inputs,
        settings.tuning,
        settings.windows.buckets,
        settings.seed,
        folder,
        progress,
        f"Reader of {part.name}",
        score=None if settings.dev is None else score,
    )
    bert.save(model, folder / "model")
    shutil.copyfile(pretrained.folder / TOKENIZER, folder / "model" / TOKENIZER)
    return model


def run(settings: Settings, console: Console) -> None:
    """Fine-tunes and scores; after each attention, writes the results of those that are done."""
    settings.output.mkdir(parents=True, exist_ok=True)
    pretrained = finetuning.pretrained(settings.model)
    problems = Problems(settings.malformed)
    commit = revision()  # Later, another one may be checked out.
    parts = make_parts(settings, pretrained, problems)
    if problems.found:
        console.print(
            f"{len(problems.found)} malformed questions left out:",
            *problems.found[:5],
            markup=False,
        )
    questions = [question for part in parts for question in part.test.questions]
    allow_none = any(not question.answers for part in parts for question in part.train.questions)
    lengths = np.concatenate([part.test.inputs.lengths for part in parts])
    about = {
        "questions": len(questions),
        "contexts": len({question.context for question in questions}),
        "windows": len(lengths),
        "mean_tokens": float(lengths.mean()),
        "trained_on": [len(part.train.questions) for part in parts],
        "unanswerable": sum(not question.answers for question in questions),
        "malformed": len(problems.found),
        "digest": [part.test.inputs.digest for part in parts],
    }
    compared = variants(settings)
    rows = []
    with training.progress_bar(console) as progress:
        models = [train_part(settings, part, pretrained, allow_none, progress) for part in parts]
        identity = {
            "code": source_digest(Path(clustax.__file__).parent),
            "data": about["digest"],
            "trained_on": [part.train.inputs.digest for part in parts],
            "allow_none": allow_none,
            "model": pretrained.digest,
            "tuning": dataclasses.asdict(settings.tuning),
            "windows": dataclasses.asdict(settings.windows),
            "seed": settings.seed,
        }
        journal = Journal(settings.output / "runs" / "answers.jsonl", identity)
        if "commit" not in journal.finished:
            journal.add("commit", commit)
        task = progress.add_task("Answering", total=len(compared), state="")
        exact: dict[str, Any] = {}
        for number, variant in enumerate(compared):
            name = repr(variant.attention)
            if name not in journal.finished:
                attention = finetuning.attention_of(variant)
                found = {}
                for part, model in zip(parts, models, strict=True):
                    swapped = model.with_attention(attention)
                    found |= answer_all(settings, swapped, part.test, allow_none)
                journal.add(name, found)
            exact = exact or journal.finished[name]
            rows.append(compare(variant, questions, journal.finished[name], exact, settings.seed))
            record = finetuning.describe(
                settings,
                pretrained,
                compared,
                commit=journal.finished["commit"],
                data=about,
                published=PUBLISHED,
                rows=rows,
                left=[each.label for each in compared[number + 1 :]],
            )
            finetuning.write(settings.output, record, draw(rows))
            progress.advance(task)
    console.print(make_table(rows))
    console.print(f"Wrote results.json and results.png to {settings.output}")


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The results as they are printed."""
    table = Table(title="SQuAD: the same weights with other attentions")
    table.add_column("attention")
    for name in ("C", "k", "EM", "F1", "points to exact (95 %)", "equal answers"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["attention"],
            *("" if row[size] is None else str(row[size]) for size in ("num_clusters", "topk")),
            f"{row['exact_match']:.1%}",
            f"{row['f1']:.1%}",
            points(row["difference"], row["difference_interval"]),
            f"{row['equal_answers']:.1%}",
        )
    return table


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how far F1 and answers are from those of exact attention."""
    labels = [
        row["attention"]
        + (f", C={row['num_clusters']}, k={row['topk']}" if row["num_clusters"] else "")
        for row in rows
    ]
    figure = Figure(figsize=(12, 1.5 + 0.28 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    change, bars = differences(rows)
    left.errorbar(change, places, xerr=bars, fmt="o", capsize=3)
    left.axvline(0, color="black", linewidth=1, linestyle=":")
    left.set(xlabel="points of F1 more than exact attention", yticks=places)
    left.set_yticklabels(labels)
    left.invert_yaxis()
    right.barh(places, [100 * row["equal_answers"] for row in rows])
    right.set(xlabel="answers equal to those of exact attention, %", xlim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


Attention = Literal["improved", "improved-paper", "clustered", "exact"]
NAMED: Mapping[Attention, str] = {
    "improved": DEFAULT,
    "improved-paper": PAPER,
    "clustered": CLUSTERED,
    "exact": EXACT,
}


@dataclass(frozen=True)
class Ask:
    """Answer a question from a text of any length, with an attention and with exact attention."""

    model: Path
    """The folder of a fine-tuned BERT or RoBERTa in Hugging Face's files."""
    context: Path
    """A text file, UTF-8."""
    question: str
    """What to ask."""
    attention: Attention = "improved"
    """What to read with."""
    clusters: int = 25
    """Clusters, if it has any."""
    topk: int = 32
    """Keys with exact weights, if it is improved."""
    no_answer: bool = False
    """Whether the answer may be that there is none."""
    batch_size: int = 8
    """Windows read at once."""
    rounds: int = 3
    """How often the text is read by each, in turns, to find the median time."""
    windows: Windows = dataclasses.field(default_factory=lambda: Windows(buckets=(384,)))


class Read(NamedTuple):
    """What one attention makes of a text."""

    answer: str
    probability: float
    seconds: float


def ask(settings: Ask, console: Console) -> list[Read]:
    """Prints the answer, its probability, and the time, beside those of exact attention."""
    try:
        context = settings.context.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{settings.context} must be UTF-8: {error}.") from None
    if not context.strip() or not settings.question.strip():
        raise DataError("context and question must have words, got none.")
    source = Pretrained(settings.model.name, settings.model, load_tokenizer(settings.model))
    try:
        reader = bert.load(settings.model, BertForQuestionAnswering)
    except ValueError as error:  # It is no reader; the message says so.
        raise DataError(str(error)) from error
    windows = settings.windows.make(source, [(settings.question.strip(), context)])
    inputs = squad.make_inputs(windows, [Question("", "", context, settings.question, ())])
    name = NAMED[settings.attention]
    compared = [Variant(EXACT)]
    if name != EXACT:
        compared.append(shared.variant(name, settings.clusters, settings.topk, 0))
    batch_size = min(settings.batch_size, len(windows))

    def rival(variant: Variant) -> Any:
        model = reader.with_attention(finetuning.attention_of(variant))

        def run(_: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
            begin = time.perf_counter()
            logits = read(model, inputs, batch_size, settings.windows.buckets)
            return logits, time.perf_counter() - begin

        return run

    rounds = list(shared.in_turns(range(settings.rounds), [rival(v) for v in compared]))
    table = Table(title=f"{len(windows)} windows of up to {settings.windows.max_length} tokens")
    for column in ("attention", "answer", "probability", "ms"):
        table.add_column(column)
    results = []
    for variant, found in zip(compared, zip(*rounds, strict=True), strict=True):
        (spans,) = spans_of(windows, found[0][0], settings.windows, settings.no_answer)
        answer = context[spans[0].start : spans[0].end]
        seconds = float(np.median([each[1] for each in found]))
        results.append(Read(answer, float(squad.probabilities(spans)[0]), seconds))
        table.add_row(
            variant.label,
            escape(answer) or "none",
            f"{results[-1].probability:.1%}",
            f"{1000 * seconds:.0f}",
        )
    console.print(table)
    console.print(
        f"Probabilities are among the {settings.windows.n_best} best spans; times are medians of "
        f"{settings.rounds} readings in turns, without compilation."
    )
    return results


CPU = Settings(
    train=tyro.MISSING,
    folds=2,
    tuning=FineTuning(epochs=4, batch_size=8, learning_rate=5e-4, evaluations=4),
)
FULL = Settings(train=tyro.MISSING, tuning=FineTuning(epochs=2, learning_rate=3e-5))
Command = (
    Annotated[
        Settings,
        tyro.conf.subcommand("cpu", default=CPU, description="Folds, small, for a CPU."),
    ]
    | Annotated[
        Settings,
        tyro.conf.subcommand("full", default=FULL, description="Two epochs of all data."),
    ]
    | Annotated[Ask, tyro.conf.subcommand("answer")]
)


def main() -> None:
    """The command line."""
    settings = tyro.cli(Command, prog="python -m experiments.squad", description=__doc__)
    console = Console()
    if isinstance(settings, Settings):
        serve(partial(run, settings, console), RESUME)
    else:
        serve(partial(ask, settings, console))


if __name__ == "__main__":
    main()
