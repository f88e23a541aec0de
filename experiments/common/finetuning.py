"""Fine-tuning an encoder on texts: padded batches of about one length, a schedule, a best model."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress

from clustax.models import Bert, bert
from clustax.models.common import AttentionFn
from clustax.models.weights import SAFETENSORS, locate
from experiments.common import training
from experiments.common.encoding import fetch_minilm, load_tokenizer
from experiments.common.files import whole_file
from experiments.common.packages import MINILM
from experiments.common.training import Optimisation
from experiments.swap import shared
from experiments.swap.shared import Variant

POOL = 32
"""Batches whose texts are sorted by length together."""


class Pretrained(NamedTuple):
    """What fine-tuning starts from."""

    name: str
    folder: Path
    tokenizer: tokenizers.Tokenizer

    def encoder(self, variant: Variant, seed: int) -> Bert:
        """The encoder with an attention, and with the dropout of a seed."""
        rngs = nnx.Rngs(seed)
        return bert.load(self.folder, attention_fn=attention_of(variant), rngs=rngs)

    @property
    def digest(self) -> str:
        """Hashes the weights: from others, other results come."""
        with locate(self.folder, SAFETENSORS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def pretrained(folder: Path | None) -> Pretrained:
    """Finds an encoder in files of Hugging Face: model.safetensors, config.json, tokenizer.json.

    Args:
        folder: of the files; all-MiniLM-L6-v2, from a package, if None.
    """
    name = "all-MiniLM-L6-v2" if folder is None else folder.resolve().name
    folder = fetch_minilm() if folder is None else folder
    return Pretrained(name, folder, load_tokenizer(folder))


def attention_of(variant: Variant) -> AttentionFn:
    """What a variant attends with."""
    return variant.attention or jax.nn.dot_product_attention


@dataclass(frozen=True)
class FineTuning:
    """How an encoder and its new head are trained."""

    epochs: float = 3.0
    """How often each example is seen."""
    max_tokens: int | None = None
    """How many tokens are seen at the most, where that is less."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 1e-4
    """Its peak, after which it falls to zero as a cosine does."""
    warmup: float = 0.1
    """The share of the steps in which the learning rate rises to it."""
    evaluations: int = 3
    """How often there is a checkpoint; where there is a development set, it is scored then."""
    parts: Literal["all", "head"] = "all"
    """What is trained: all weights, or those of the new head."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("max_tokens", "batch_size", "evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be positive, got {self.epochs}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be from 0 to below 1, got {self.warmup}.")

    def optimisation(self, lengths: np.ndarray) -> Optimisation:
        """The steps for examples of these lengths."""
        seen = min(self.epochs * len(lengths), (self.max_tokens or math.inf) / lengths.mean())
        steps = max(1, round(seen / self.batch_size))
        between = max(1, steps // self.evaluations)
        lines = max(1, between // 20)
        return Optimisation(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=int(self.warmup * steps),
            schedule="cosine",
            log_every=between // lines,
            checkpoint_every=between // lines * lines,
        )


class Inputs(NamedTuple):
    """Tokenized texts, and what is to be found in them.

    Attributes:
        tokens: the ids of each text.
        token_types: to which of two segments they belong.
        targets: arrays by name, with an entry for each text.
    """

    tokens: Sequence[Sequence[int]]
    token_types: Sequence[Sequence[int]]
    targets: Mapping[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each text has."""
        return np.array([len(ids) for ids in self.tokens], np.int32)

    @property
    def digest(self) -> str:
        """Hashes all of it: on other data, other results are found."""
        targets = {name: array.tolist() for name, array in self.targets.items()}
        content = repr((self.tokens, self.token_types, targets))
        return hashlib.sha256(content.encode()).hexdigest()

    def choose(self, rows: Sequence[int] | np.ndarray) -> "Inputs":
        """Those of some of the texts."""
        return Inputs(
            [self.tokens[row] for row in rows],
            [self.token_types[row] for row in rows],
            {name: array[np.asarray(rows, int)] for name, array in self.targets.items()},
        )


def padded_length(length: int, buckets: Sequence[int]) -> int:
    """The shortest of the lengths that batches may have, ascending, that holds `length` tokens."""
    return next(bucket for bucket in buckets if bucket >= length)


def pad(inputs: Inputs, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """A batch of some of the texts.

    Args:
        inputs: all texts.
        rows: which.
        length: what they are padded to.

    Returns:
        "tokens" and "token_types" (B, length), "lengths" (B,), and the targets.
    """
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "token_types")}
    for index, row in enumerate(rows):
        count = len(inputs.tokens[row])
        batch["tokens"][index, :count] = inputs.tokens[row]
        batch["token_types"][index, :count] = inputs.token_types[row]
    batch["lengths"] = np.array([len(inputs.tokens[row]) for row in rows], np.int32)
    return batch | {name: array[rows] for name, array in inputs.targets.items()}


def training_batch(
    inputs: Inputs, batch_size: int, buckets: Sequence[int], seed: int, step: int
) -> dict[str, np.ndarray]:
    """The batch of a step: each epoch has all texts, but for a remainder, in an order of its own.

    Texts of about the same length come together, so that little is padded.

    Args:
        inputs: all texts; repeated where they are fewer than a batch.
        batch_size: texts in a batch.
        buckets: the lengths that batches may have, ascending.
        seed: of the order.
        step: which, from 0.
    """
    count = max(1, len(inputs.tokens) // batch_size)
    epoch, number = divmod(step, count)
    rng = np.random.default_rng((seed, epoch))
    order = np.resize(rng.permutation(len(inputs.tokens)), count * batch_size)
    lengths = inputs.lengths[order]
    pool = np.arange(len(order)) // (POOL * batch_size)
    batches = order[np.lexsort((lengths, pool))].reshape(count, batch_size)
    rows = batches[rng.permutation(count)[number]]
    return pad(inputs, rows, padded_length(inputs.lengths[rows].max(), buckets))


def evaluation_batches(
    inputs: Inputs, batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Batches of all texts, and which they are; one that is not full has texts repeatedly.

    Args:
        inputs: all texts.
        batch_size: texts in a batch.
        buckets: the lengths that batches may have, ascending.
    """
    padded = np.array([padded_length(length, buckets) for length in inputs.lengths], int)
    for bucket in buckets:
        members = np.flatnonzero(padded == bucket)
        for start in range(0, len(members), batch_size):
            rows = np.resize(members[start : start + batch_size], batch_size)
            batch = pad(inputs, rows, bucket)
            yield rows, {name: jnp.asarray(array) for name, array in batch.items()}


def freeze(model: nnx.Module) -> None:
    """Makes the weights of a module constants of its training."""
    for _, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                setattr(module, name, nnx.Variable(value.get_value()))


def fine_tune(
    model: Any,
    loss: training.Loss,
    inputs: Inputs,
    settings: FineTuning,
    buckets: Sequence[int],
    seed: int,
    folder: Path,
    progress: Progress,
    description: str,
    score: Callable[[Any], float] | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains a model, from the last checkpoint on if there is one.

    Args:
        model: a head on a pretrained encoder, `model.bert`.
        loss: what to minimise.
        inputs: the training data.
        settings: how.
        buckets: the lengths that batches may have, ascending.
        seed: of the order of the data.
        folder: of the checkpoints and the log; `training.claim` makes sure that they are of this.
        progress: shows how far it is.
        description: what it says at its left.
        score: how good a model in evaluation mode is; the best is returned, or the last if None.

    Returns:
        The model in evaluation mode, and the log.
    """
    if settings.parts == "head":
        freeze(model.bert)
    model.train()

    def evaluated(trained: Any) -> Any:
        trained.eval()
        return trained

    trained, log = training.train(
        model,
        loss,
        lambda step: training_batch(inputs, settings.batch_size, buckets, seed, step),
        settings.optimisation(inputs.lengths),
        folder,
        progress,
        description,
        score=None if score is None else lambda trained: score(evaluated(trained)),
    )
    return evaluated(trained), log


def describe(
    settings: Any, model: Pretrained, variants: Sequence[Variant], **others: Any
) -> dict[str, Any]:
    """As `swap.shared.describe`; where data and models are on this machine makes no difference.

    Args:
        settings: a dataclass, whose paths are left out; its model is None for MiniLM.
        model: what fine-tuning starts from.
        variants: what is compared.
        **others: what else matters.
    """
    paths = [f.name for f in fields(settings) if isinstance(getattr(settings, f.name), Path)]
    packages = [MINILM] if settings.model is None else []
    record = shared.describe(
        settings,
        variants,
        packages,
        ("optax", "scikit-learn", "scipy", "tokenizers"),
        pretrained={"name": model.name, "sha256": model.digest},
        **others,
    )
    kept = {name: value for name, value in record["settings"].items() if name not in paths}
    return record | {"settings": kept}


def write(folder: Path, record: Mapping[str, Any], figure: Figure) -> None:
    """Writes results.json, and results.png beside it."""
    with whole_file(folder / "results.png") as path:
        figure.savefig(path, dpi=110)
    with whole_file(folder / "results.json") as path:
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
