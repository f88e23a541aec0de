r"""The paper's main experiment: speech to phones with CTC, one encoder for each attention.

    python -m experiments.asr_ctc cpu
    python -m experiments.asr_ctc paper --kaldi.train data/train_si284 --kaldi.valid data/dev93 \
      --kaldi.tests data/eval92 --kaldi.lexicon lexicon.txt

The speech is synthetic, made from a seed, or of directories as Kaldi has them. A model is trained
for each method and size; all are tested, timed, and tried with the attentions of the others. A run
that was killed goes on where it was when it is started again.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from optax.contrib import reduce_on_plateau
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import clustax
from clustax.baselines import OracleTopk
from clustax.models.common import AttentionFn
from experiments.common import training
from experiments.common.attentions import Attentions, QueriesAsKeys
from experiments.common.bootstrap import ratio_interval
from experiments.common.chunked import Chunked
from experiments.common.command import RESUME, serve
from experiments.common.debian import (
    ALSA,
    ASTERISK_SOUNDS,
    ASTERISK_TEXTS,
    FLITE_LIBRARY,
    FLITE_PROGRAM,
)
from experiments.common.files import whole_file
from experiments.common.journal import Journal, revision, source_digest
from experiments.common.packages import BROWN, ESPEAK_NG
from experiments.common.rows import DataError, Malformed, Problems
from experiments.common.timing import take_turns
from experiments.speech import decoding, store
from experiments.speech import model as models
from experiments.speech.corpus import PARTS, Speech, Synthetic
from experiments.speech.decoding import Errors
from experiments.speech.kaldi import KaldiDirectory, Lexicon, read_lexicon
from experiments.speech.model import Model, SpeechModel
from experiments.speech.real import Prompts
from experiments.speech.store import Batches, Dataset
from experiments.swap import shared

Method = Literal["full", "clustered", "improved", "default", "lsh"]
"""Exact attention, the paper's two in its setting, this library's default, and Reformer's."""


@dataclass(frozen=True)
class Optimisation(training.Optimisation):
    """How a model is trained."""

    batch_size: int = 2
    """Utterances in a step where they are of the longest kind; of shorter ones a step has as many
    more as have no more frames."""
    max_norm: float = 10.0
    second_decay: float = 0.999
    """How slowly RAdam forgets squares of gradients. It takes smaller steps until it knows them,
    for about 1 / (1 - second_decay) steps: too many for a short training."""
    weight_decay: float = 0.01
    """The share of the weights that a step takes away, times the learning rate."""
    plateau_steps: int = 0
    """Steps over which losses are averaged; the learning rate is halved when `patience` of these
    means are not lower. 0 for never."""
    patience: int = 2
    """How many they are."""
    frame_weight: float = 0.0
    """The weight of a loss at the beginning that knows which phone each frame is of, where that is
    known."""
    frame_steps: int = 0
    """The steps in which that weight falls to zero."""
    short_steps: int = 0
    """The steps at the beginning that have the shortest utterances only."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        super().__post_init__()
        for name in ("weight_decay", "plateau_steps", "frame_weight", "frame_steps", "short_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.second_decay < 1:
            raise ValueError(f"second_decay must be above 0 and below 1, got {self.second_decay}.")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}.")
        if self.short_steps >= self.steps:
            raise ValueError(
                f"short_steps must be fewer than steps = {self.steps}, got {self.short_steps}."
            )


def optimizer(settings: Optimisation) -> optax.GradientTransformation:
    """RAdam with clipped gradients and decoupled weight decay, slower after plateaus."""
    parts = [
        optax.clip_by_global_norm(settings.max_norm),
        optax.scale_by_radam(b2=settings.second_decay),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(training.learning_rate(settings)),
    ]
    if settings.plateau_steps:
        parts.append(
            reduce_on_plateau(0.5, settings.patience, accumulation_size=settings.plateau_steps)
        )
    return optax.chain(*parts)


@dataclass(frozen=True)
class SpecAugment:
    """What is hidden of the features in training: bands of bins, and stretches of frames."""

    bands: int = 0
    """How many bands."""
    widest: int = 6
    """How many bins the widest have."""
    stretches: int = 0
    """How many stretches."""
    longest: int = 30
    """How many frames the longest have."""

    def __post_init__(self) -> None:
        """Refuses negative numbers."""
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")

    def hide(self, features: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> None:
        """Sets parts of features to zero, which is their mean, in place."""
        bins = features.shape[2]
        for each, length in zip(features, lengths, strict=True):
            for _ in range(self.bands):
                width = rng.integers(min(self.widest, bins) + 1)
                start = rng.integers(bins - width + 1)
                each[:, start : start + width] = 0
            for _ in range(self.stretches):
                width = rng.integers(min(self.longest, length) + 1)
                start = rng.integers(length - width + 1)
                each[start : start + width] = 0


@dataclass(frozen=True)
class Kaldi:
    """Directories of data as Kaldi has them, in place of synthetic speech."""

    train: Path | None = None
    """To train with."""
    valid: Path | None = None
    """To choose a checkpoint by."""
    tests: tuple[Path, ...] = ()
    """To test with, one or several; the names of the folders are those of the tables' columns."""
    lexicon: Path | None = None
    """lexicon.txt or lexiconp.txt; without, transcripts must be of phones."""
    malformed: Malformed = "refuse"
    """What becomes of lines that are not as they should be."""

    def __post_init__(self) -> None:
        """Refuses what is incomplete."""
        if self.given and not (self.train and self.valid and self.tests):
            raise ValueError("kaldi must have train, valid and tests, or none of them.")
        folders = {folder for folder in (self.train, self.valid, *self.tests) if folder}
        if len({folder.name for folder in folders}) < len(folders):
            raise ValueError(
                f"kaldi must have directories of different names, got {sorted(map(str, folders))}: "
                "tables call them by these."
            )

    @property
    def given(self) -> bool:
        """Whether there are directories."""
        return bool(self.train or self.valid or self.tests)


@dataclass(frozen=True)
class Settings:
    """Train encoders with different attentions to hear phones, and compare them."""

    methods: Annotated[tuple[Method, ...], tyro.conf.arg(aliases=["--method"])] = get_args(Method)
    """What is compared."""
    depths: tuple[int, ...] = (9, 6, 4)
    """Numbers of layers, of full; the others have those of the model."""
    clusters: tuple[int, ...] = (100, 200)
    """Numbers of clusters, of clustered and improved; default has the first."""
    rounds: tuple[int, ...] = (1, 4)
    """Numbers of rounds, of lsh."""
    swapped: tuple[int, ...] = (25, 50, 100, 200)
    """Numbers of clusters that trained models are tried with, those as deep as `model`."""
    seed: int = 0
    """Of weights, batches and hashing."""
    lengths: tuple[int, ...] = (512, 1024, 1536, 2048, 2560)
    """Frames that utterances are padded to; longer ones are left out in training."""
    long_lengths: tuple[int, ...] = (2048, 4096, 6144, 8192, 12288)
    """Those of long utterances."""
    beam: int = 8
    """How many beginnings the search with a beam follows up."""
    timed: int = 5
    """How often each model is timed."""
    speech: Speech = dataclasses.field(default_factory=Speech)
    kaldi: Kaldi = dataclasses.field(default_factory=Kaldi)
    model: Model = dataclasses.field(default_factory=Model)
    attentions: Attentions = dataclasses.field(default_factory=partial(Attentions, num_bits=63))
    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)
    augment: SpecAugment = dataclasses.field(default_factory=SpecAugment)
    data: Path = Path("results/speech")
    """The folder of features, which are made when they are not there."""
    output: Path = Path("results/asr_ctc")
    """The folder of the results, and of the runs, which have their logs and checkpoints there."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("methods", "depths", "clusters", "rounds", "lengths", "long_lengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, at least one, got {values}.")
        for name in ("depths", "clusters", "rounds", "swapped", "lengths", "long_lengths"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lengths", "long_lengths"):
            if sorted(getattr(self, name)) != list(getattr(self, name)):
                raise ValueError(f"{name} must be in order, got {getattr(self, name)}.")
        for name in ("beam", "timed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


# Utterances are shorter than the paper's longest ones, and voices few: so much can be learned in
# ten minutes.
CPU = Settings(
    depths=(3, 2),
    clusters=(100, 50),
    swapped=(25, 100),
    lengths=(512, 1024, 1536),
    speech=Speech(
        train=1500,
        valid=60,
        test=150,
        long=10,
        voices=("flite-kal16", "flite-slt", "espeak-"),
        words=(3, 28),
        max_seconds=15.0,
        rates=(0.95, 1.15),
        pitches=(0.9, 1.15),
        speeds=(1.0, 1.0, 1.0, 1.0, 0.9, 1.1),
        noisy=0.2,
        reverberant=0.1,
    ),
    model=Model(layers=3, heads=2, head_dim=64, context=4, norm_first=True, dropout_rate=0.0),
    optimisation=Optimisation(
        steps=1600,
        batch_size=2,
        learning_rate=2e-3,
        second_decay=0.98,
        warmup_steps=50,
        schedule="cosine",
        log_every=25,
        checkpoint_every=200,
        frame_weight=3.0,
        frame_steps=800,
        short_steps=400,
    ),
)
PRESETS = {
    "cpu": ("Small models and three voices, for a machine without an accelerator.", CPU),
    "paper": (
        "The paper's model, as far as it is known; its speech is --kaldi.train and so on.",
        Settings(
            speech=Speech(train=36_000, valid=500, test=500),
            optimisation=Optimisation(
                steps=300_000,
                learning_rate=1e-4,
                warmup_steps=1000,
                plateau_steps=10_000,
                log_every=100,
                checkpoint_every=5000,
            ),
        ),
    ),
}


def named(method: str, size: int | None) -> str:
    """What tables call an attention: the method with its size, if it has one."""
    return method if size is None else f"{method}-{size}"


class Cell(NamedTuple):
    """One of the models."""

    method: Method
    size: int | None  # Clusters or rounds; full attention has none.
    layers: int

    @property
    def attention(self) -> str:
        """The method with its size."""
        return named(self.method, self.size)

    @property
    def name(self) -> str:
        """What tables call it, and its folder."""
        return f"{self.attention}_{self.layers}-layers"


def cells(settings: Settings) -> list[Cell]:
    """The models, in the order of their training."""
    layers = settings.model.layers
    of_method: dict[Method, list[Cell]] = {
        "full": [Cell("full", None, depth) for depth in settings.depths],
        "clustered": [Cell("clustered", size, layers) for size in settings.clusters],
        "improved": [Cell("improved", size, layers) for size in settings.clusters],
        "default": [Cell("default", settings.clusters[0], layers)],
        "lsh": [Cell("lsh", size, layers) for size in settings.rounds],
    }
    return [cell for method in settings.methods for cell in of_method[method]]


def exact_attention() -> AttentionFn:
    """The fastest exact attention: by blocks on a CPU."""
    return Chunked() if jax.default_backend() == "cpu" else jax.nn.dot_product_attention


def attention_of(settings: Settings, method: str, size: int | None) -> AttentionFn:
    """The attention of a method, or one that trained models are only tried with."""
    if method == "shared-qk":
        return QueriesAsKeys(exact_attention())
    if method == "oracle-top":
        return OracleTopk(topk=settings.attentions.topk)
    if size is None:
        return exact_attention()
    return settings.attentions.make(method, size, settings.model.head_dim, settings.seed)


@dataclass(frozen=True)
class Data:
    """All that models are trained and tested with.

    Attributes:
        train, valid: as they are called.
        tests: others by name, of usual length.
        long: utterances of thousands of frames, if there are any.
    """

    train: Dataset
    valid: Dataset
    tests: dict[str, Dataset]
    long: Dataset | None

    @property
    def sets(self) -> dict[str, Dataset]:
        """Those to test with, also valid and long."""
        long = {} if self.long is None else {"long": self.long}
        return {"valid": self.valid, **self.tests, **long}

    @property
    def all(self) -> dict[str, Dataset]:
        """All sets."""
        return {"train": self.train, **self.sets}


def load_data(settings: Settings, progress: Progress) -> Data:
    """Reads the features, and makes those that are missing.

    Raises:
        DataError: if a directory of Kaldi's is not as it should be.
        PackageUnavailableError: if a synthesiser, its texts, or the real speech cannot be had.
    """
    if settings.kaldi.given:
        return _filled(_load_kaldi(settings, progress), settings.data / "kaldi")
    identity = {"speech": dataclasses.asdict(settings.speech), "code": store.code()}
    found = {}
    for part in PARTS:
        corpus = Synthetic(part, settings.speech)
        found[part] = store.prepare(corpus, settings.data / part, identity, progress, part)
    code = {"code": store.code()}
    real = store.prepare(Prompts(), settings.data / "real", code, progress, "real")
    tests = {part: found[part] for part in ("test", "voice", "noisy")}
    data = Data(found["train"], found["valid"], {**tests, "real": real}, found["long"])
    return _filled(data, settings.data)


def _filled(data: Data, folder: Path) -> Data:
    for name, dataset in data.all.items():
        if not dataset.utterances:
            raise DataError(
                f"{name} must have utterances, but all were left out: {dataset.skipped[0]} "
                f"Mend that, and remove its folder in {folder}."
            )
    return data


def _load_kaldi(settings: Settings, progress: Progress) -> Data:
    kaldi = settings.kaldi
    lexicon = Lexicon() if kaldi.lexicon is None else read_lexicon(kaldi.lexicon)
    problems = Problems(kaldi.malformed, "--kaldi.malformed")
    found = []
    for folder in (kaldi.train, kaldi.valid, *kaldi.tests):
        assert folder is not None  # Settings has made sure.
        corpus = KaldiDirectory(folder, lexicon, problems)
        to = settings.data / "kaldi" / folder.name
        identity = {**corpus.identity, "code": store.code()}
        found.append(store.prepare(corpus, to, identity, progress, folder.name))
    for line in problems.found:
        progress.console.print(line, highlight=False, markup=False)
    train, valid, *tests = found
    names = [folder.name for folder in kaldi.tests]
    return Data(train, valid, dict(zip(names, tests, strict=True)), None)


class Feed:
    """The batches of a training by step, the same for all models.

    Args:
        settings: of all.
        train: the utterances.
        multiple: the number of devices.
    """

    def __init__(self, settings: Settings, train: Dataset, multiple: int):
        self._settings = settings
        make = partial(
            Batches, train, frames=frames_of(settings), multiple=multiple, seed=settings.seed
        )
        self.all = make(settings.lengths)
        self._short = make(settings.lengths[:1]) if settings.optimisation.short_steps else self.all

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step."""
        how = self._settings.optimisation
        short = step < how.short_steps
        batch = self._short(step) if short else self.all(step - how.short_steps)
        rng = np.random.default_rng((self._settings.seed, step))
        self._settings.augment.hide(batch["features"], batch["lengths"], rng)
        left = max(0.0, 1 - step / how.frame_steps) if how.frame_steps else 0.0
        weight = np.full(len(batch["lengths"]), how.frame_weight * left, np.float32)
        return {**batch, "frame_weight": weight}


def frames_of(settings: Settings) -> int:
    """How many frames a batch has, with padding."""
    return settings.optimisation.batch_size * max(settings.lengths)


@nnx.jit
def _log_probs(model: SpeechModel, features: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(features, lengths))


def log_probs(
    model: SpeechModel, dataset: Dataset, lengths: Sequence[int], frames: int
) -> list[np.ndarray]:
    """What a model says of each utterance, (frames, symbols).

    Args:
        model: in evaluation mode.
        dataset: the utterances.
        lengths: as for `Batches`; longer ones are padded to the next multiple of the last.
        frames: as for `Batches`.
    """
    longest = int(dataset.lengths.max())
    beyond = range(2 * lengths[-1], longest + lengths[-1], lengths[-1])
    batches = Batches(dataset, (*lengths, *beyond), frames, 1, seed=0)
    found: dict[int, np.ndarray] = {}
    for rows, batch in batches.once():
        out = np.asarray(
            _log_probs(model, *map(jnp.asarray, (batch["features"], batch["lengths"])))
        )
        for index, row in enumerate(rows):
            found[int(row)] = out[index, : batch["lengths"][index]]
    return [found[row] for row in range(len(dataset.utterances))]


def digest(*datasets: Dataset) -> str:
    """Hashes all that models get to hear and have to say."""
    found = hashlib.sha256()
    for dataset in datasets:
        for utterance in dataset.utterances:
            for part in (utterance.features, utterance.phones, utterance.frame_phones):
                found.update(part.tobytes())
    return found.hexdigest()


def errors_of(
    said: Sequence[np.ndarray], dataset: Dataset, beam: int | None = None
) -> list[Errors]:
    """Counts the errors in each utterance.

    Args:
        said: as from `log_probs`.
        dataset: the utterances.
        beam: the width of a search with a beam; greedy if None.
    """
    decode = decoding.greedy if beam is None else partial(decoding.beam, width=beam)
    return [
        decoding.count_errors(utterance.phones.tolist(), decode(each))
        for utterance, each in zip(dataset.utterances, said, strict=True)
    ]


def build(settings: Settings, cell: Cell, num_phones: int, num_bins: int) -> SpeechModel:
    """The model of a cell before its training."""
    size = dataclasses.replace(settings.model, layers=cell.layers)
    attention = attention_of(settings, cell.method, cell.size)
    return SpeechModel(size, num_phones, num_bins, attention, rngs=nnx.Rngs(settings.seed))


TRAINED_WITH = (
    "seed", "lengths", "speech", "kaldi", "model", "attentions", "optimisation", "augment"
)  # fmt: skip


def train_cell(
    settings: Settings, cell: Cell, data: Data, progress: Progress
) -> tuple[SpeechModel, list[dict[str, Any]]]:
    """Trains the model of a cell, or reads it if that is done already; with the log."""
    folder = run_folder(settings, cell)
    parts = {name: dataclasses.asdict(settings)[name] for name in TRAINED_WITH}
    identity = json.loads(json.dumps(parts, default=str))
    bins = data.train.utterances[0].features.shape[1]
    identity |= {
        "cell": cell._asdict(),
        "phones": data.train.phones.all,
        "bins": bins,
        "data": digest(data.train, data.valid),
    }
    training.claim(folder, identity)
    mesh = training.data_mesh()
    feed = Feed(settings, data.train, mesh.size)

    def score(model: SpeechModel) -> float:
        model.eval()
        said = log_probs(model, data.valid, settings.lengths, frames_of(settings))
        model.train()
        return -Errors.total(errors_of(said, data.valid)).rate

    model, log = training.train(
        build(settings, cell, len(data.train.phones.all), bins),
        models.loss,
        feed,
        settings.optimisation,
        folder,
        progress,
        cell.name,
        mesh,
        score,
        optimizer(settings.optimisation),
    )
    model.eval()
    return model, log


def run_folder(settings: Settings, cell: Cell) -> Path:
    """Where a model is kept."""
    return settings.output / "runs" / cell.name


def run_cell(
    settings: Settings, cell: Cell, data: Data, commit: str, progress: Progress
) -> tuple[SpeechModel, dict[str, Any]]:
    """Trains and tests the model of a cell, as far as that is not done already."""
    model, log = train_cell(settings, cell, data, progress)
    identity = {
        "attentions": dataclasses.asdict(settings.attentions),
        "beam": settings.beam,
        "long_lengths": settings.long_lengths,
        "data": digest(*data.sets.values()),
        "code": source_digest(Path(clustax.__file__).parent),
    }
    journal = Journal(run_folder(settings, cell) / "tests.jsonl", identity)
    if "result" not in journal.finished:
        found = test_cell(settings, cell, data, model)
        journal.add("result", {**found, "curve": curve(log), "commit": commit})
    swapped = {}
    if cell.layers == settings.model.layers:  # Others are not compared.
        swapped = swap_cell(settings, cell, model, data.valid, journal, progress)
    return model, {**journal.finished["result"], "swaps": swapped}


def test_cell(settings: Settings, cell: Cell, data: Data, model: SpeechModel) -> dict[str, Any]:
    """Tests the model of a cell on all sets."""
    frames = frames_of(settings)
    errors, beam, wrong = {}, {}, {}
    for name, dataset in data.sets.items():
        lengths = settings.long_lengths if name == "long" else settings.lengths
        said = log_probs(model, dataset, lengths, frames)
        found = errors_of(said, dataset)
        errors[name] = Errors.total(found)._asdict()
        wrong[name] = [each.wrong for each in found]
        if name in data.tests:
            beam[name] = Errors.total(errors_of(said, dataset, settings.beam))._asdict()
    return {
        **cell._asdict(),
        "label": cell.name,
        "attention": cell.attention,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "errors": errors,
        "beam": beam,
        "wrong": wrong,
    }


def curve(log: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What was logged in a training, and the steps after which the model was scored."""
    found = {
        name: [row[name] for row in log if name in row]
        for name in ("step", "ctc", "frame_accuracy", "score")
    }
    return {**found, "scored": [row["step"] for row in log if "score" in row]}


def swaps(settings: Settings) -> dict[str, AttentionFn]:
    """The attentions that trained models are tried with."""
    sizes = {
        "lsh": settings.rounds,
        "clustered": settings.swapped,
        "improved": settings.swapped,
        "default": settings.swapped,
    }
    tried = [("full", None), ("shared-qk", None)]
    tried += [(method, size) for method, found in sizes.items() for size in found]
    found = {named(m, s): attention_of(settings, m, s) for m, s in tried}
    topk = settings.attentions.topk
    return {**found, f"oracle-top-{topk}": attention_of(settings, "oracle-top", None)}


def swap_cell(
    settings: Settings,
    cell: Cell,
    model: SpeechModel,
    valid: Dataset,
    journal: Journal,
    progress: Progress,
) -> dict[str, float]:
    """Error rates on the validation set with each attention, as far as they are not in the journal.

    They are added there.
    """
    tried = swaps(settings)
    task = progress.add_task(f"Swaps of {cell.name}", total=len(tried), state="")
    for name, attention in tried.items():
        if name not in journal.finished:
            swapped = model.with_attention(attention)
            said = log_probs(swapped, valid, settings.lengths, frames_of(settings))
            journal.add(name, Errors.total(errors_of(said, valid)).rate)
        progress.advance(task)
    progress.remove_task(task)
    return {name: journal.finished[name] for name in tried}


def time_models(
    settings: Settings,
    trained: Mapping[str, SpeechModel],
    data: Data,
    identity: Any,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Times all models in turn, unless that is done already.

    A training logs its own speed, but that is of one machine at one time, with what else it did.

    Returns:
        By model the seconds for a batch of the usual length of "forward" and, with the backward
        pass, of "step"; of such a step for a single utterance of the long ones, "long"; and their
        frames.
    """
    journal = Journal(settings.output / "runs" / "times.jsonl", {"models": identity})
    usual = Batches(data.valid, settings.lengths, frames_of(settings), 1, seed=0)
    batches = {"forward": usual.typical(), "step": usual.typical()}
    if data.long is not None:
        batches["long"] = Batches(data.long, settings.long_lengths, 1, 1, seed=0).typical()
    for kind, batch in batches.items():
        task = progress.add_task(f"Timing: {kind}", total=settings.timed * len(trained), state="")
        if kind not in journal.finished:
            run = _run_forward if kind == "forward" else _run_step
            times = take_turns(
                {name: partial(run, model, batch) for name, model in trained.items()},
                settings.timed,
                partial(progress.advance, task),
                budget=SLOWEST,
            )
            journal.add(kind, {name: each.median for name, each in times.items()})
        progress.remove_task(task)
    return {
        name: {
            **{kind: journal.finished[kind][name] for kind in batches},
            **{f"{kind}_frames": batch["features"].shape[1] for kind, batch in batches.items()},
            "forward_batch": len(batches["forward"]["lengths"]),
        }
        for name in trained
    }


SLOWEST = 120.0
"""Seconds, about, that one model is timed for at most."""


def _run_forward(model: SpeechModel, batch: Mapping[str, np.ndarray]) -> None:
    _log_probs(model, *map(jnp.asarray, (batch["features"], batch["lengths"]))).block_until_ready()


def _run_step(model: SpeechModel, batch: Mapping[str, np.ndarray]) -> None:
    weight = np.zeros(len(batch["lengths"]), np.float32)
    arrays = jax.tree.map(jnp.asarray, {**batch, "frame_weight": weight})
    jax.block_until_ready(_gradient(model, arrays))


@nnx.jit
def _gradient(model: SpeechModel, batch: Mapping[str, jax.Array]) -> Any:
    def mean(model: SpeechModel) -> jax.Array:
        sums = models.loss(model, batch)
        return sums["loss"] / sums["weight"]

    return nnx.grad(mean)(model)


def durations(
    result: Mapping[str, Any], times: Mapping[str, float], steps_per_epoch: int
) -> dict[str, Any]:
    """How long a training takes of which each step takes what was measured, beside the others."""
    curve = result["curve"]
    best = curve["scored"][int(np.argmax(curve["score"]))]
    return {
        "times": times,
        "seconds_per_epoch": steps_per_epoch * times["step"],
        "seconds_to_best": best * times["step"],
    }


def to_full(
    result: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    tested: Dataset,
    settings: Settings,
) -> dict[str, Any]:
    """How much more phones are wrong than with full attention, and a paired bootstrap's interval.

    Args:
        result: of a model.
        results: of all models; without one with full attention of that depth, nothing is said.
        tested: the first set to test with.
        settings: of all.
    """
    name = next(iter(result["beam"]))
    full = [r for r in results if r["method"] == "full" and r["layers"] == result["layers"]]
    if not full:
        return {}
    phones = np.array([len(utterance.phones) for utterance in tested.utterances])
    more = np.subtract(result["wrong"][name], full[0]["wrong"][name])
    interval = ratio_interval(more, phones, settings.seed)
    return {"difference": float(more.sum() / phones.sum()), "difference_interval": interval}


def make_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The phone error rates as they are printed."""
    table = Table(title="Phone errors, %")
    table.add_column("attention")
    for name in results[0]["errors"]:
        table.add_column(name, justify="right")
    for result in results:
        rates = [f"{100 * Errors(**found).rate:.1f}" for found in result["errors"].values()]
        table.add_row(result["label"], *rates)
    return table


MARKERS = {"full": "o", "clustered": "s", "improved": "D", "default": "^", "lsh": "v"}


def draw_costs(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the errors on the validation set against the time of a forward pass."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, marker in MARKERS.items():
        mine = [result for result in results if result["method"] == method]
        if mine:
            x = [1000 * r["times"]["forward"] / r["times"]["forward_batch"] for r in mine]
            y = [100 * Errors(**r["errors"]["valid"]).rate for r in mine]
            axes.plot(x, y, marker=marker, linestyle="", markersize=8, label=method)
            for result, *at in zip(mine, x, y, strict=True):
                size = f"{result['layers']} layers" if method == "full" else f"{result['size']}"
                axes.annotate(size, (at[0], at[1]), (6, 4), textcoords="offset points", fontsize=9)
    frames = results[0]["times"]["forward_frames"]
    axes.set(
        xlabel=f"ms, forward, for an utterance of {frames} frames",
        ylabel="phone errors on the validation set, %",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_curves(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws loss against steps, and errors on the validation set against time."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        curve = result["curve"]
        left.plot(curve["step"], curve["ctc"], label=result["label"])
        minutes = [step * result["times"]["step"] / 60 for step in curve["scored"]]
        right.plot(minutes, [-100 * score for score in curve["score"]], marker=".")
    left.set(xlabel="step", ylabel="CTC loss for each phone", yscale="log")
    right.set(xlabel="minutes of training", ylabel="phone errors on the validation set, %")
    right.set_ylim(0, 105)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return figure


def run(settings: Settings, console: Console) -> None:
    """Trains and tests all models, prints the table, writes the results."""
    settings.output.mkdir(parents=True, exist_ok=True)
    with training.progress_bar(console) as progress:
        data = load_data(settings, progress)
        for name, dataset in data.all.items():
            for line in dataset.skipped:
                progress.console.print(f"Left out of {name}: {line}", highlight=False, markup=False)
        if any(dataset.skipped for dataset in data.all.values()):
            progress.console.print(
                "They stay out with the features of the others: remove the folder of a set in "
                f"{settings.data} to have all of it tried again.",
                markup=False,
            )
        if long := Feed(settings, data.train, 1).all.left_out:
            progress.console.print(
                f"Left out of train: {long} of more than {settings.lengths[-1]} frames."
            )
        results, trained = [], {}
        grid, commit = cells(settings), revision()
        task = progress.add_task("Models", total=len(grid), state="")
        for cell in grid:
            shown = set(progress.task_ids)
            trained[cell.name], result = run_cell(settings, cell, data, commit, progress)
            results.append(result)
            for finished in set(progress.task_ids) - shown:  # Their bars would fill the screen.
                progress.remove_task(finished)
            progress.advance(task)
        identity = {result["label"]: result["commit"] for result in results}
        times = time_models(settings, trained, data, identity, progress)
    tested = next(iter(data.tests.values()))
    per_epoch = Feed(settings, data.train, jax.local_device_count()).all.per_epoch
    results = [
        {
            **result,
            **to_full(result, results, tested, settings),
            **durations(result, times[result["label"]], per_epoch),
        }
        for result in results
    ]
    console.print(make_table(results))
    write(settings, results, data, console)


def write(
    settings: Settings, results: Sequence[dict[str, Any]], data: Data, console: Console
) -> None:
    """Writes the results and their pictures."""
    commits = sorted({result.pop("commit") for result in results})
    record = shared.describe(
        settings,
        (),
        () if settings.kaldi.given else PACKAGES,
        ("optax",),
        command=" ".join(["python -m experiments.asr_ctc", *sys.argv[1:]]),
        commits=commits,
        data={name: found.summary for name, found in data.all.items()},
        models=results,
    )
    for name, figure in {"costs": draw_costs(results), "curves": draw_curves(results)}.items():
        with whole_file(settings.output / f"{name}.png") as path:
            figure.savefig(path, dpi=110)
    with whole_file(settings.output / "results.json") as path:
        path.write_text(json.dumps(record, default=str) + "\n", encoding="utf-8")
    console.print(f"Wrote results.json, costs.png and curves.png to {settings.output}")


PACKAGES = (
    FLITE_PROGRAM,
    FLITE_LIBRARY,
    ALSA,
    ESPEAK_NG,
    BROWN,
    ASTERISK_TEXTS,
    ASTERISK_SOUNDS,
)


def arguments(given: Sequence[str]) -> list[str]:
    """The command line with its preset first, wherever it is and with --preset or without.

    >>> arguments(["--method", "full", "--preset", "cpu"])
    ['cpu', '--method', 'full']
    """
    given = [part for each in given for part in each.split("=", each.startswith("--preset="))]
    if "--preset" not in given[:-1]:
        return given
    at = given.index("--preset")
    return [given[at + 1], *given[:at], *given[at + 2 :]]


def main() -> None:
    """The command line."""
    settings = tyro.extras.overridable_config_cli(
        PRESETS, prog="python -m experiments.asr_ctc", args=arguments(sys.argv[1:])
    )
    serve(partial(run, settings, Console()), RESUME)


if __name__ == "__main__":
    main()
