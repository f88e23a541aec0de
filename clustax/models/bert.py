"""BERT and RoBERTa in Flax NNX: the attention is an argument, the weights are Hugging Face's.

Shapes: B batch, T length, D hidden size, N heads, H head dim.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.masks import valid_positions
from clustax.models import weights
from clustax.models.common import AttentionFn, dropout, layer_norm
from clustax.models.encoder import Encoder, EncoderLayer, Swappable, gelu
from clustax.models.weights import Place

# BERT's layer is the paper's, with another activation.
BertLayer = EncoderLayer


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT or RoBERTa, under the names and defaults of Hugging Face's config.json.

    >>> BertConfig(hidden_size=384, num_attention_heads=12).head_dim
    32
    >>> BertConfig(model_type="roberta", max_position_embeddings=514, pad_token_id=1).max_length
    512
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    model_type: str = "bert"
    hidden_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    pad_token_id: int = 0
    num_labels: int = 2
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuses other models, a hidden size that the heads do not divide, and no positions."""
        if self.model_type not in _SERVED["model_type"]:
            raise ValueError(
                f"model_type must be one of {_SERVED['model_type']}, got {self.model_type!r}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )
        if self.max_length < 1:
            raise ValueError(
                f"max_position_embeddings must be more than the {self.position_offset} that "
                f"RoBERTa leaves unused (pad_token_id + 1), got {self.max_position_embeddings}."
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_offset(self) -> int:
        """The position embedding of the first token: RoBERTa's come after that of padding."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """How many tokens there are positions for."""
        return self.max_position_embeddings - self.position_offset

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads a Hugging Face config.json; fields that the models do not need are ignored.

        Args:
            path: the file.

        Raises:
            ValueError: if it describes a model that this one does not compute.
        """
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, served in _SERVED.items():
            if entries.get(name, served[0]) not in served:
                raise ValueError(
                    f"{name} in {path} must be {' or '.join(map(repr, served))}, "
                    f"got {entries[name]!r}: this encoder computes nothing else."
                )
        if entries.get("model_type") == "roberta":
            entries.setdefault("pad_token_id", 1)
        if entries.get("id2label"):
            entries["num_labels"] = len(entries["id2label"])
        return cls(**{f.name: entries[f.name] for f in fields(cls) if f.name in entries})


# What a config.json may ask for and these models have, the default first.
_SERVED = {
    "model_type": ("bert", "roberta"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}


class BertEmbeddings(nnx.Module):
    """Sum of the word, position and token type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Creates random weights of the sizes in `config`."""
        size = config.hidden_size
        self.position_offset = config.position_offset
        self.word = nnx.Embed(config.vocab_size, size, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, size, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, size, rngs=rngs)
        self.norm = layer_norm(size, config.layer_norm_eps, rngs)
        self.dropout = dropout(config.hidden_dropout_prob, rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], token_types: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Embeds tokens; `token_types=None` means that all are of type 0."""
        positions = self.position_offset + jnp.arange(tokens.shape[1])
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        embedded = self.word(tokens) + self.position(positions) + self.token_type(token_types)
        return self.dropout(self.norm(embedded))


class Bert(Swappable):
    """The encoder of BERT or RoBERTa, from tokens to hidden states, without pooler and heads.

    Like a loaded one, a new one is in evaluation mode; `train()` turns dropout on.

    >>> import clustax
    >>> exact = Bert(BertConfig(hidden_size=24, num_hidden_layers=2), rngs=nnx.Rngs(0))
    >>> clustered = exact.with_attention(clustax.ClusteredAttention(num_clusters=4, topk=8))
    >>> tokens, lengths = jnp.ones((3, 20), int), jnp.array([20, 11, 7])
    >>> clustered(tokens, lengths).shape
    (3, 20, 24)
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        attention_fn: AttentionFn | Sequence[AttentionFn] = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        """Creates an encoder with random weights; `load` gives one with pretrained weights.

        Args:
            config: the sizes.
            attention_fn: called as `attention_fn(query, key, value, query_seq_lengths=lengths,
                key_value_seq_lengths=lengths)`; one for all layers, or a sequence of one per layer.
            rngs: for the weights and for dropout.
        """
        self.config = config
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            attention_fn=attention_fn,
            activation=gelu,
            dropout_rate=config.hidden_dropout_prob,
            epsilon=config.layer_norm_eps,
            rngs=rngs,
        )
        self.eval()

    @property
    def layers(self) -> Sequence[BertLayer]:
        """The layers of the encoder."""
        return self.encoder.layers

    @property
    def attention_fns(self) -> tuple[AttentionFn, ...]:
        """What each layer attends with."""
        return self.encoder.attention_fns

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Encodes a batch of padded token sequences.

        Args:
            tokens: token ids; what the padding holds has no influence on valid positions.
            lengths: how many positions of each sequence are valid.
            token_types: segment ids, below `type_vocab_size`, which is 1 for RoBERTa; None means 0
                everywhere.

        Returns:
            The hidden states of the last layer; those of padded positions mean nothing.

        Raises:
            ValueError: if there are more tokens than positions.
        """
        return self.encoder(self._embed(tokens, lengths, token_types), lengths)

    def projections(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], layer: int
    ) -> tuple[Float[Array, "B T N H"], ...]:
        """Returns the query, key and value of one layer, to look into its attention.

        Args:
            tokens: token ids.
            lengths: how many positions of each sequence are valid.
            layer: which layer, from 0.
        """
        return self.encoder.projections(self._embed(tokens, lengths, None), lengths, layer)

    def _embed(self, tokens, lengths, token_types) -> Float[Array, "B T D"]:
        config = self.config
        if tokens.shape[1] > config.max_length:
            unused = f" less the {config.position_offset} that RoBERTa leaves unused"
            raise ValueError(
                f"tokens must have at most {config.max_length} positions (max_position_embeddings="
                f"{config.max_position_embeddings}{unused if config.position_offset else ''}), "
                f"got shape {tokens.shape}: cut or split the texts."
            )
        # The embedding of an id that is none is NaN, in the padding, too.
        valid = valid_positions(lengths, tokens.shape[1])
        tokens = jnp.where(valid, tokens, 0)
        token_types = None if token_types is None else jnp.where(valid, token_types, 0)
        return self.embeddings(tokens, token_types)


class BertForSequenceClassification(Swappable):
    """An encoder and a classifier of its first token, which stands for the whole text.

    To fine-tune, put a new one on a pretrained encoder, and call `train()`:

    >>> bert = Bert(BertConfig(hidden_size=24, num_hidden_layers=2), rngs=nnx.Rngs(0))  # or load
    >>> model = BertForSequenceClassification(bert, num_labels=3, rngs=nnx.Rngs(1))
    >>> model(jnp.ones((5, 20), int), jnp.array([20, 11, 7, 3, 1])).shape
    (5, 3)
    """

    def __init__(self, bert: Bert, *, num_labels: int | None = None, rngs: nnx.Rngs):
        """Creates a head with random weights; `load` gives one with pretrained weights.

        Args:
            bert: the encoder, which becomes a part of this model: it is not copied.
            num_labels: how many classes; those of the encoder's config if None.
            rngs: for the weights and for dropout.
        """
        config, size = bert.config, bert.config.hidden_size
        rate = config.classifier_dropout
        self.bert = bert
        self.pooler = nnx.Linear(size, size, rngs=rngs)
        self.dropout = dropout(config.hidden_dropout_prob if rate is None else rate, rngs)
        num_labels = config.num_labels if num_labels is None else num_labels
        self.classifier = nnx.Linear(size, num_labels, rngs=rngs)
        self.eval()

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B labels"]:
        """Returns the logits of each sequence's class; arguments are as for `Bert`."""
        return self.classify(self.bert(tokens, lengths, token_types))

    def classify(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B labels"]:
        """The head alone, on the encoder's states."""
        pooled = jnp.tanh(self.pooler(hidden[:, 0]))
        return self.classifier(self.dropout(pooled))


class SpanLogits(NamedTuple):
    """Where an answer starts and ends, for each position; ends are inclusive."""

    start: Float[Array, "B T"]
    end: Float[Array, "B T"]


class BertForQuestionAnswering(Swappable):
    """An encoder and, for each position, whether the answer to a question starts or ends there.

    >>> bert = Bert(BertConfig(hidden_size=24, num_hidden_layers=2), rngs=nnx.Rngs(0))  # or load
    >>> model = BertForQuestionAnswering(bert, rngs=nnx.Rngs(1))
    >>> start, end = model(jnp.ones((2, 20), int), jnp.array([20, 11]))
    >>> start.shape, int(end[1].argmax()) < 11
    ((2, 20), True)
    """

    def __init__(self, bert: Bert, *, rngs: nnx.Rngs):
        """Creates a head with random weights; `load` gives one with pretrained weights.

        Args:
            bert: the encoder, which becomes a part of this model: it is not copied.
            rngs: for the weights.
        """
        self.bert = bert
        self.qa_outputs = nnx.Linear(bert.config.hidden_size, 2, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        token_types: Int[Array, "B T"] | None = None,
    ) -> SpanLogits:
        """Returns the logits of start and end; arguments are as for `Bert`.

        Those of padded positions are the lowest finite number: they get probability 0, and make no
        loss a NaN, as -inf would.
        """
        return self.locate(self.bert(tokens, lengths, token_types), lengths)

    def locate(self, hidden: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> SpanLogits:
        """The head alone, on the encoder's states."""
        logits = self.qa_outputs(hidden)
        valid = valid_positions(lengths, hidden.shape[1])[..., None]
        logits = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
        return SpanLogits(logits[..., 0], logits[..., 1])


class BertForMaskedLM(Swappable):
    """An encoder and, for each position, the logits of the token that a mask hides there.

    >>> bert = Bert(BertConfig(hidden_size=24, num_hidden_layers=2), rngs=nnx.Rngs(0))  # or load
    >>> model = BertForMaskedLM(bert, rngs=nnx.Rngs(1))
    >>> model(jnp.ones((2, 20), int), jnp.array([20, 11])).shape
    (2, 20, 30522)
    """

    def __init__(self, bert: Bert, *, rngs: nnx.Rngs):
        """Creates a head with random weights; `load` gives one with pretrained weights.

        Args:
            bert: the encoder, which becomes a part of this model: it is not copied. Its word
                embeddings are the weights of the head's last layer, too.
            rngs: for the other weights.

        Raises:
            ValueError: if the config wants other weights there.
        """
        config = bert.config
        if not config.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be True for BertForMaskedLM, got False: its last layer "
                "has the word embeddings as weights."
            )
        self.bert = bert
        self.transform = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Returns logits, which mean nothing at padded positions; arguments are as for `Bert`."""
        hidden = self.bert(tokens, lengths, token_types)
        hidden = self.norm(gelu(self.transform(hidden)))
        return self.bert.embeddings.word.attend(hidden) + self.bias[...]


Head = TypeVar("Head", BertForSequenceClassification, BertForQuestionAnswering, BertForMaskedLM)


@overload
def load(
    path: str | Path,
    *,
    attention_fn: AttentionFn | Sequence[AttentionFn] = ...,
    rngs: nnx.Rngs | None = ...,
) -> Bert: ...
@overload
def load(
    path: str | Path,
    head: type[Head],
    *,
    attention_fn: AttentionFn | Sequence[AttentionFn] = ...,
    rngs: nnx.Rngs | None = ...,
) -> Head: ...
def load(
    path: str | Path,
    head: Callable[..., Any] | None = None,
    *,
    attention_fn: AttentionFn | Sequence[AttentionFn] = jax.nn.dot_product_attention,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """Loads a pretrained BERT or RoBERTa from Hugging Face's files; needs the package safetensors.

    Tensors that the model does not need are ignored, and so is any prefix of the names ("bert.",
    "roberta.", "module.bert.", say). The weights become float32. The model is in evaluation mode.

    >>> bert = load("all-MiniLM-L6-v2")                                # doctest: +SKIP
    >>> classifier = load("bert-sst2", BertForSequenceClassification)  # doctest: +SKIP

    Args:
        path: model.safetensors, or the model.safetensors.index.json of a split one, with
            config.json beside it, or their folder.
        head: the class of a model with a head, which the file has to hold, too; if None, the result
            is a `Bert`, for which such a class can make a new head.
        attention_fn: as for `Bert`.
        rngs: for dropout in training; `nnx.Rngs(0)` if None.

    Raises:
        FileNotFoundError: if there are no such files.
        ValueError: if tensors are missing or have the wrong shape; the message names all of them.
    """
    file = weights.locate(path, weights.SAFETENSORS)
    config = BertConfig.from_json(file.with_name("config.json"))

    def make() -> nnx.Module:
        rngs = nnx.Rngs(0)
        bert = Bert(config, attention_fn=attention_fn, rngs=rngs)
        return bert if head is None else head(bert, rngs=rngs)

    stored = weights.read_safetensors(file)
    tensors = {name: stored[found] for name, found in _tensor_names(stored, file).items()}
    return weights.load(make, tensors, lambda p: _place(p, config.model_type), file, rngs)


BertOrHead = Bert | BertForSequenceClassification | BertForQuestionAnswering | BertForMaskedLM


def save(model: BertOrHead, path: str | Path) -> None:
    """Writes a model as the files of Hugging Face that `load` reads; needs the package safetensors.

    >>> save(classifier, "bert-sst2")  # doctest: +SKIP

    Args:
        model: an encoder, or one with a head; its attention is not part of the files.
        path: the folder, made if it is not there, of model.safetensors and config.json.
    """
    config = (model if isinstance(model, Bert) else model.bert).config
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    entries = dataclasses.asdict(config) | {name: served[0] for name, served in _SERVED.items()}
    entries["model_type"] = config.model_type
    if isinstance(model, BertForSequenceClassification):
        entries["num_labels"] = model.classifier.out_features
    text = json.dumps(entries, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    file = folder / weights.SAFETENSORS[0]
    weights.save(model, lambda p: _place(p, config.model_type), file)


def _tensor_names(names: Collection[str], file: Path) -> dict[str, str]:
    """Maps tensor names, without prefix, to those in the file."""
    parts = r"embeddings|encoder\.layer|pooler|classifier|qa_outputs|cls\.predictions|lm_head"
    found = [match for name in names if (match := re.match(rf"((?:.*?\.)?)({parts})\.", name))]
    prefixes = {match[1] for match in found if match[2] in ("embeddings", "encoder.layer")}
    if len(prefixes) > 1:
        raise ValueError(f"{file} must hold one encoder, found several: {sorted(prefixes)}.")
    return {_current(match.string.removeprefix(match[1])): match.string for match in found}


def _current(name: str) -> str:
    # Checkpoints converted from TensorFlow call a norm's weight gamma and its bias beta; a head
    # shares the bias of its last layer.
    old = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
    for pattern, new in (old | {r"\.decoder\.bias$": ".bias"}).items():
        name = re.sub(pattern, new, name)
    return name


def _place(parameter: tuple[Any, ...], model_type: str) -> Place:
    """Where Hugging Face's files have a parameter of these models, given as its path."""
    *where, leaf = map(str, parameter)
    where = where[1:] if where[:1] == ["bert"] else where
    block = ""
    if where[:2] == ["encoder", "layers"]:
        block, where = f"encoder.layer.{where[2]}.", where[3:]
    module = (_ENCODER | _HEADS[model_type])[".".join(where)]
    return Place(f"{block}{module}.{'bias' if leaf == 'bias' else 'weight'}")


_ENCODER = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.intermediate": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}

_HEADS = {
    "bert": {
        "pooler": "pooler.dense",
        "classifier": "classifier",
        "qa_outputs": "qa_outputs",
        "transform": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "": "cls.predictions",  # The bias of the logits is in no module of its own.
    },
    "roberta": {
        "pooler": "classifier.dense",
        "classifier": "classifier.out_proj",
        "qa_outputs": "qa_outputs",
        "transform": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "": "lm_head",
    },
}
