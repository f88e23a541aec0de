"""BERT's encoder in Flax NNX: the attention is an argument, the weights are Hugging Face's.

Shapes: B batch, T length, D hidden size, N heads, H head dim.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.models.common import AttentionFn, layer_norm, one_per_layer


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT encoder, under the names and defaults of Hugging Face's config.json.

    >>> BertConfig(hidden_size=384, num_attention_heads=12).head_dim
    32
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Refuses a hidden size that the heads do not divide."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads a Hugging Face config.json; fields that the encoder does not need are ignored.

        Args:
            path: the file.

        Raises:
            ValueError: if it describes a model that this encoder does not compute.
        """
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, served in _SERVED.items():
            if entries.get(name, served) != served:
                raise ValueError(
                    f"{name} in {path} must be {served!r}, got {entries[name]!r}: "
                    "this encoder computes nothing else."
                )
        return cls(**{f.name: entries[f.name] for f in fields(cls) if f.name in entries})


# What a config.json may ask for and this encoder has only one of.
_SERVED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


class BertEmbeddings(nnx.Module):
    """Sum of the word, position and token type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Creates random weights of the sizes in `config`."""
        size = config.hidden_size
        self.word = nnx.Embed(config.vocab_size, size, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, size, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, size, rngs=rngs)
        self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], token_types: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Embeds tokens; `token_types=None` means that all are of type 0."""
        positions = jnp.arange(tokens.shape[1])
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        return self.norm(
            self.word(tokens) + self.position(positions) + self.token_type(token_types)
        )


class BertLayer(nnx.Module):
    """One post-LN transformer layer; the attention is given anew to each call."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Creates random weights of the sizes in `config`."""
        size, inner = config.hidden_size, config.intermediate_size
        self.head_dim = config.head_dim
        self.query = nnx.Linear(size, size, rngs=rngs)
        self.key = nnx.Linear(size, size, rngs=rngs)
        self.value = nnx.Linear(size, size, rngs=rngs)
        self.attention_output = nnx.Linear(size, size, rngs=rngs)
        self.attention_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.intermediate = nnx.Linear(size, inner, rngs=rngs)
        self.output = nnx.Linear(inner, size, rngs=rngs)
        self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def project(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], ...]:
        """Returns query, key and value."""
        heads = (*hidden.shape[:2], -1, self.head_dim)
        return tuple(linear(hidden).reshape(heads) for linear in (self.query, self.key, self.value))

    def __call__(
        self, hidden: Float[Array, "B T D"], lengths: Int[Array, " B"], attention_fn: AttentionFn
    ) -> Float[Array, "B T D"]:
        """Applies attention and the feed-forward network, each with its residual and norm."""
        attended = attention_fn(
            *self.project(hidden), query_seq_lengths=lengths, key_value_seq_lengths=lengths
        ).reshape(hidden.shape)
        hidden = self.attention_norm(hidden + self.attention_output(attended))
        inner = jax.nn.gelu(self.intermediate(hidden), approximate=False)
        return self.norm(hidden + self.output(inner))


class Bert(nnx.Module):
    """BERT's encoder, from tokens to hidden states, without pooler and heads.

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
            rngs: for the weights.
        """
        self.config = config
        self.attention_fns = one_per_layer(attention_fn, config.num_hidden_layers)
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.layers = nnx.List(
            [BertLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

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
            token_types: segment ids; None means 0 everywhere.

        Returns:
            The hidden states of the last layer; those of padded positions mean nothing.
        """
        return self._encode(tokens, lengths, token_types, self.config.num_hidden_layers)

    def projections(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], layer: int
    ) -> tuple[Float[Array, "B T N H"], ...]:
        """Returns the query, key and value of one layer, to look into its attention.

        Args:
            tokens: token ids.
            lengths: how many positions of each sequence are valid.
            layer: which layer, from 0.
        """
        return self.layers[layer].project(self._encode(tokens, lengths, None, layer))

    def with_attention(self, attention_fn: AttentionFn | Sequence[AttentionFn]) -> Self:
        """Returns a model that computes another attention with the very arrays of this one.

        Args:
            attention_fn: as for `Bert`.
        """
        other = nnx.merge(*nnx.split(self))
        other.attention_fns = one_per_layer(attention_fn, self.config.num_hidden_layers)
        return other

    def _encode(self, tokens, lengths, token_types, num_layers: int) -> Float[Array, "B T D"]:
        longest = self.config.max_position_embeddings
        if tokens.shape[1] > longest:
            raise ValueError(
                f"tokens must have at most max_position_embeddings={longest} positions, "
                f"got shape {tokens.shape}: cut or split the texts."
            )
        hidden = self.embeddings(tokens, token_types)
        for index in range(num_layers):
            hidden = self.layers[index](hidden, lengths, self.attention_fns[index])
        return hidden


def load(
    path: str | Path,
    *,
    attention_fn: AttentionFn | Sequence[AttentionFn] = jax.nn.dot_product_attention,
) -> Bert:
    """Loads a pretrained encoder from Hugging Face's files; needs the package safetensors.

    Tensors that the encoder does not need, such as those of a pooler or a head, are ignored, and
    so is a prefix that all names share ("bert.", say). The weights become float32.

    >>> bert = load("all-MiniLM-L6-v2")                                # doctest: +SKIP

    Args:
        path: a folder that holds config.json and model.safetensors.
        attention_fn: as for `Bert`.

    Raises:
        ValueError: if tensors are missing or have the wrong shape; the message names all of them.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "clustax.models.bert.load needs the package safetensors: pip install safetensors."
        ) from error

    folder = Path(path)
    config = BertConfig.from_json(folder / "config.json")
    # eval_shape: the weights come from the file, so none are made up first.
    bert = nnx.eval_shape(lambda: Bert(config, attention_fn=attention_fn, rngs=nnx.Rngs(0)))
    problems = []
    with safe_open(folder / "model.safetensors", framework="flax") as file:
        stored = _encoder_tensors(file.keys())
        for parameter, variable in nnx.to_flat_state(nnx.state(bert)):
            name = _tensor_name(parameter)
            transposed = parameter[-1] == "kernel"  # PyTorch stores (out, in).
            shape = variable.shape[::-1] if transposed else variable.shape
            if name not in stored:
                problems.append(f"{name} is missing")
            elif (found := tuple(file.get_slice(stored[name]).get_shape())) != shape:
                problems.append(f"{name} has shape {found}, not {shape}")
            else:
                tensor = file.get_tensor(stored[name]).astype(variable.dtype)
                variable.set_value(tensor.T if transposed else tensor)
    if problems:
        raise ValueError(
            f"{folder / 'model.safetensors'} must hold the encoder that its config.json describes, "
            f"but: {'; '.join(problems)}. Take both files from the same BERT model."
        )
    return bert


def _encoder_tensors(names: Collection[str]) -> dict[str, str]:
    """Maps the encoder's tensor names, without prefix, to those in the file."""
    found = (re.match(r"(.*?)(embeddings|encoder\.layer)\.", name) for name in names)
    prefixes = {match[1] for match in found if match} or {""}
    if len(prefixes) > 1:
        raise ValueError(f"the file must hold one encoder, found several: {sorted(prefixes)}.")
    (prefix,) = prefixes
    # Checkpoints converted from TensorFlow call a norm's weight gamma and its bias beta.
    return {
        name.removeprefix(prefix)
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias"): name
        for name in names
        if name.startswith(prefix)
    }


def _tensor_name(parameter: tuple[Any, ...]) -> str:
    """Hugging Face's name of a parameter of `Bert`, given as its path in the model."""
    *where, leaf = parameter
    block = f"encoder.layer.{where[1]}" if where[0] == "layers" else "embeddings"
    return f"{block}.{_MODULES[where[0]][where[-1]]}.{'bias' if leaf == 'bias' else 'weight'}"


_MODULES = {
    "embeddings": {
        "word": "word_embeddings",
        "position": "position_embeddings",
        "token_type": "token_type_embeddings",
        "norm": "LayerNorm",
    },
    "layers": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "norm": "output.LayerNorm",
    },
}
