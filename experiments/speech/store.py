"""Features of recordings on disk, in shards that are made once, and their batches."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from experiments.common import training
from experiments.common.files import BrokenFileError, whole_file
from experiments.speech.corpus import Corpus, Recording, RecordingError
from experiments.speech.features import NUM_MEL_BINS, filterbank, normalise
from experiments.speech.phones import Phones

SHARD = 50
"""Recordings in a shard."""


def code() -> str:
    """Says of which code features are: what it is, as those of other code are others."""
    here = Path(__file__).parent
    names = ("phones.py", "synthesis.py", "corpus.py", "features.py", "real.py", "store.py")
    digest = hashlib.sha256()
    for name in names:
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


class Utterance(NamedTuple):
    """What a model is trained and tested with."""

    name: str
    features: np.ndarray  # (F, M), normalised.
    phones: np.ndarray
    frame_phones: np.ndarray  # (F,), -1 where unknown.


@dataclass(frozen=True)
class Dataset:
    """Utterances in memory.

    Attributes:
        phones: the names of their phones.
        utterances: in the order of the corpus.
        skipped: why recordings are left out, a line for each.
    """

    phones: Phones
    utterances: tuple[Utterance, ...]
    skipped: tuple[str, ...]

    @property
    def summary(self) -> dict[str, float]:
        """What it has, in numbers."""
        return {
            "utterances": len(self.utterances),
            "hours": float(self.lengths.sum()) / 360_000,
            "mean_frames": float(self.lengths.mean()),
            "most_frames": int(self.lengths.max()),
            "phones": sum(len(utterance.phones) for utterance in self.utterances),
            "skipped": len(self.skipped),
        }

    @cached_property
    def lengths(self) -> np.ndarray:
        """The numbers of frames."""
        return np.array([len(utterance.features) for utterance in self.utterances])


def prepare(
    corpus: Corpus, folder: Path, identity: Mapping[str, Any], progress: Progress, description: str
) -> Dataset:
    """Reads the features of a corpus, made where they are missing.

    What was made before a kill is kept.

    Args:
        corpus: the recordings.
        folder: of the shards.
        identity: all that they depend on, as JSON can hold it.
        progress: a `progress_bar` that is being shown.
        description: what it says at its left.

    Raises:
        TrainingError: if the folder has the features of another corpus.
        BrokenFileError: if a shard cannot be read.
    """
    training.claim(folder, {**identity, "phones": corpus.phones.all})
    numbers = range(len(corpus))
    shards = [numbers[start : start + SHARD] for start in range(0, len(corpus), SHARD)]
    task = progress.add_task(description, total=len(corpus), state="")
    utterances, skipped = [], []
    for shard in shards:
        path = folder / f"{shard[0]:07d}.npz"
        if not path.exists():
            _make_shard(path, corpus, shard, lambda: progress.advance(task))
        made, left_out = _read_shard(path)
        utterances += made
        skipped += left_out
        state = f"{len(skipped)} left out" if skipped else ""
        progress.update(task, completed=shard[-1] + 1, state=state)
    return Dataset(corpus.phones, tuple(utterances), tuple(skipped))


def featurise(recording: Recording) -> Utterance:
    """The features of a recording.

    Raises:
        RecordingError: if it is shorter than a frame, or has no phones, or too many for its frames.
    """
    features = recording.features
    if features is None:
        features = filterbank(np.zeros(0) if recording.audio is None else recording.audio)
    frames, phones = len(features), np.array(recording.phones, np.int16)
    # CTC needs a blank between two phones that are the same.
    least = len(phones) + int(np.sum(phones[1:] == phones[:-1]))
    if not frames or not np.isfinite(features).all():
        raise RecordingError(f"{recording.name} has no 25 ms of audio.")
    if not len(phones) or frames < least:
        raise RecordingError(
            f"{recording.name} must have a phone, and not more than fit into its {frames} frames: "
            f"its {len(phones)} phones need {least}."
        )
    known = recording.frame_phones
    labels = np.full(frames, -1, np.int8) if known is None else known
    return Utterance(recording.name, normalise(features).astype(np.float16), phones, labels)


def _make_shard(path: Path, corpus: Corpus, numbers: Sequence[int], advance) -> None:
    utterances, skipped = [], []
    for number in numbers:
        try:
            utterances.append(featurise(corpus.recording(number)))
        except RecordingError as error:
            skipped.append(str(error))
        advance()
    # Those of Kaldi's archives have as many bins as they have.
    bins = utterances[0].features.shape[1] if utterances else NUM_MEL_BINS
    empty = Utterance(
        "", np.zeros((0, bins), np.float16), np.zeros(0, np.int16), np.zeros(0, np.int8)
    )
    names, features, phones, labels = zip(empty, *utterances, strict=True)
    texts = json.dumps({"names": names[1:], "skipped": skipped})
    with whole_file(path) as partial:
        np.savez(
            partial,
            frames=np.array([len(each) for each in features[1:]]),
            counts=np.array([len(each) for each in phones[1:]]),
            features=np.concatenate(features),
            phones=np.concatenate(phones),
            frame_phones=np.concatenate(labels),
            texts=np.frombuffer(texts.encode(), np.uint8),
        )


def _read_shard(path: Path) -> tuple[list[Utterance], list[str]]:
    try:
        with np.load(path) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            frames, counts = np.cumsum(arrays["frames"])[:-1], np.cumsum(arrays["counts"])[:-1]
            columns = (
                texts["names"],
                np.split(arrays["features"], frames),
                np.split(arrays["phones"], counts),
                np.split(arrays["frame_phones"], frames),
            )
            utterances = [Utterance(*each) for each in zip(*columns, strict=bool(texts["names"]))]
            return utterances, texts["skipped"]
    except Exception as error:  # Damage shows in many ways.
        raise BrokenFileError(
            f"{path} is damaged ({type(error).__name__}: {error}). Nothing was changed. Remove it, "
            "and start again: it is made anew."
        ) from None


class Batches:
    """Batches of utterances of about the same length, an endless number by step.

    An epoch has each utterance once, and some of each length twice, so that all batches of a length
    are full.

    Args:
        dataset: what to draw from.
        lengths: the padded lengths that there are; utterances that are longer than all are left
            out.
        frames: how many, with padding, a batch may have.
        multiple: what divides the number of utterances in a batch; there are at least that many.
        seed: of the order.

    Raises:
        ValueError: if no utterance is short enough.
    """

    def __init__(
        self, dataset: Dataset, lengths: Sequence[int], frames: int, multiple: int, seed: int
    ):
        self.dataset, self.seed = dataset, seed
        self.lengths = sorted(lengths)
        bucket = np.searchsorted(self.lengths, dataset.lengths)
        self._members = [np.flatnonzero(bucket == number) for number in range(len(self.lengths))]
        self._sizes = [
            max(multiple, frames // length // multiple * multiple) for length in self.lengths
        ]
        self.left_out = int(np.sum(bucket == len(self.lengths)))
        self._width = [
            max((len(dataset.utterances[i].phones) for i in members), default=0)
            for members in self._members
        ]
        self.per_epoch = sum(
            -(-len(members) // size)
            for members, size in zip(self._members, self._sizes, strict=True)
        )
        if not self.per_epoch:
            raise ValueError(
                f"lengths must reach the shortest utterance, of {dataset.lengths.min()} frames, "
                f"got {lengths}."
            )

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, the same whenever it is asked for."""
        epoch, index = divmod(step, self.per_epoch)
        return self.make(*self._plan(epoch)[index])

    def typical(self) -> dict[str, np.ndarray]:
        """A batch of the length that most utterances have."""
        bucket = int(np.argmax([len(members) for members in self._members]))
        return self.make(bucket, np.resize(self._members[bucket], self._sizes[bucket]))

    def once(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """All utterances once, and in batches that are not full the first ones again.

        Yields:
            The numbers of the utterances that count, and the batch.
        """
        for bucket, (members, size) in enumerate(zip(self._members, self._sizes, strict=True)):
            for start in range(0, len(members), size):
                rows = members[start : start + size]
                yield rows, self.make(bucket, np.resize(rows, size))

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng((self.seed, epoch))
        plan = []
        for bucket, (members, size) in enumerate(zip(self._members, self._sizes, strict=True)):
            count = -(-len(members) // size)
            if count:
                order = np.resize(rng.permutation(members), count * size)
                plan += [(bucket, rows) for rows in order.reshape(count, size)]
        return [plan[i] for i in rng.permutation(len(plan))]

    def make(self, bucket: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of some utterances.

        Args:
            bucket: the number of their padded length.
            rows: which.

        Returns:
            "features" (B, T, M), "lengths" (B,), "phones" (B, P), "counts" (B,), "frame_phones"
            (B, T), -1 where unknown.
        """
        length, width = self.lengths[bucket], self._width[bucket]
        utterances = [self.dataset.utterances[row] for row in rows]
        features = np.zeros((len(rows), length, utterances[0].features.shape[1]), np.float32)
        phones = np.zeros((len(rows), width), np.int32)
        labels = np.full((len(rows), length), -1, np.int32)
        for row, each in enumerate(utterances):
            features[row, : len(each.features)] = each.features
            phones[row, : len(each.phones)] = each.phones
            labels[row, : len(each.features)] = each.frame_phones
        return {
            "features": features,
            "lengths": np.array([len(each.features) for each in utterances], np.int32),
            "phones": phones,
            "counts": np.array([len(each.phones) for each in utterances], np.int32),
            "frame_phones": labels,
        }
