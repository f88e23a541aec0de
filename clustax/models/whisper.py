"""Whisper in Flax NNX: the attention of its encoder is an argument, the weights are OpenAI's.

Shapes: B batch, M mel bins, F frames of 10 ms, S positions of the encoder, T tokens, P tokens of
the prompt, D model size, N heads, H head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.models import whisper_files
from clustax.models.common import AttentionFn, layer_norm, one_per_layer

NORM_EPSILON = 1e-5

_exact_attention = jax.nn.dot_product_attention


@dataclass(frozen=True)
class WhisperConfig:
    """The sizes and special tokens of a Whisper, under the names of Hugging Face's config.json.

    The defaults are those of tiny.en; `load` reads what belongs to the weights.

    >>> WhisperConfig().prompt
    (50257, 50362)
    """

    vocab_size: int = 51864
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    max_source_positions: int = 1500
    max_target_positions: int = 448
    eos_token_id: int = 50256
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = (220, 50256)

    def __post_init__(self) -> None:
        """Refuses a model size that the heads do not divide."""
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(
                    f"d_model must be a multiple of {name}, "
                    f"got {self.d_model} and {getattr(self, name)}."
                )

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that ask OpenAI's models for an English transcript without timestamps."""
        start = self.eos_token_id + 1
        no_timestamps = self.vocab_size - 1502  # 1501 timestamps end the vocabulary.
        multilingual = self.vocab_size > 51864
        english, transcribe = start + 1, no_timestamps - 4
        return (start, *((english, transcribe) if multilingual else ()), no_timestamps)


class KeyValue(NamedTuple):
    """Keys and values of one attention."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]


class Attention(nnx.Module):
    """The projections of multi-head attention; what it attends to and how is given to each call."""

    def __init__(self, size: int, num_heads: int, *, rngs: nnx.Rngs):
        """Creates random weights."""
        self.num_heads = num_heads
        self.query = nnx.Linear(size, size, rngs=rngs)
        self.key = nnx.Linear(size, size, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(size, size, rngs=rngs)
        self.output = nnx.Linear(size, size, rngs=rngs)

    def key_value(self, hidden: Float[Array, "B S D"]) -> KeyValue:
        """Returns keys and values."""
        return KeyValue(self._heads(self.key(hidden)), self._heads(self.value(hidden)))

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        key_value: KeyValue,
        attention_fn: AttentionFn = _exact_attention,
        **options: Any,
    ) -> Float[Array, "B T D"]:
        """Attends from `hidden`; the options are passed on to `attention_fn`."""
        attended = attention_fn(self._heads(self.query(hidden)), *key_value, **options)
        return self.output(attended.reshape(hidden.shape))

    def _heads(self, projected: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        return projected.reshape(*projected.shape[:2], self.num_heads, -1)


class FeedForward(nnx.Module):
    """The part of a layer that looks at one position at a time."""

    def __init__(self, size: int, inner: int, *, rngs: nnx.Rngs):
        """Creates random weights."""
        self.norm = layer_norm(size, NORM_EPSILON, rngs)
        self.intermediate = nnx.Linear(size, inner, rngs=rngs)
        self.output = nnx.Linear(inner, size, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the sum of `hidden` and the network's output."""
        inner = jax.nn.gelu(self.intermediate(self.norm(hidden)), approximate=False)
        return hidden + self.output(inner)


class EncoderLayer(nnx.Module):
    """One pre-LN transformer layer; the attention is given anew to each call."""

    def __init__(self, size: int, num_heads: int, inner: int, *, rngs: nnx.Rngs):
        """Creates random weights."""
        self.attention_norm = layer_norm(size, NORM_EPSILON, rngs)
        self.attention = Attention(size, num_heads, rngs=rngs)
        self.feed_forward = FeedForward(size, inner, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B S D"], attention_fn: AttentionFn
    ) -> Float[Array, "B S D"]:
        """Applies attention and the feed-forward network."""
        normed = self.attention_norm(hidden)
        hidden += self.attention(normed, self.attention.key_value(normed), attention_fn)
        return self.feed_forward(hidden)


class DecoderLayer(nnx.Module):
    """A causal layer with a cache, which attends to the encoder's states, too."""

    def __init__(self, size: int, num_heads: int, inner: int, *, rngs: nnx.Rngs):
        """Creates random weights."""
        self.attention_norm = layer_norm(size, NORM_EPSILON, rngs)
        self.attention = Attention(size, num_heads, rngs=rngs)
        self.cross_norm = layer_norm(size, NORM_EPSILON, rngs)
        self.cross_attention = Attention(size, num_heads, rngs=rngs)
        self.feed_forward = FeedForward(size, inner, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        encoded: KeyValue,
        cache: KeyValue,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Applies the layer to the positions from `position` on; returns the filled cache, too."""
        normed = self.attention_norm(hidden)
        cache = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1),
            cache,
            self.attention.key_value(normed),
        )
        positions = position + jnp.arange(hidden.shape[1])
        seen = jnp.arange(cache.key.shape[1]) <= positions[:, None]
        hidden += self.attention(normed, cache, mask=seen[None, None])
        hidden += self.cross_attention(self.cross_norm(hidden), encoded)
        return self.feed_forward(hidden), cache


def empty_cache(encoded: tuple[KeyValue, ...], length: int) -> tuple[KeyValue, ...]:
    """Returns a decoder's cache with room for `length` tokens.

    Args:
        encoded: from `Decoder.read`; the cache has its layers, batch, heads and dtype.
        length: prompt and transcript.
    """
    return jax.tree.map(lambda x: jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype), encoded)


class Encoder(nnx.Module):
    """From a log-mel spectrogram to one hidden state each 20 ms."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        """Creates random weights of the sizes in `config`."""
        size = config.d_model
        self.conv1 = nnx.Conv(config.num_mel_bins, size, 3, padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(size, size, 3, strides=2, padding=1, rngs=rngs)
        # No nnx.Param: training leaves the sinusoids as they are.
        self.positions = nnx.Variable(_sinusoids(config.max_source_positions, size))
        self.layers = nnx.List(
            [
                EncoderLayer(
                    size, config.encoder_attention_heads, config.encoder_ffn_dim, rngs=rngs
                )
                for _ in range(config.encoder_layers)
            ]
        )
        self.norm = layer_norm(size, NORM_EPSILON, rngs)

    def __call__(
        self, mel: Float[Array, "B M F"], attention_fns: Sequence[AttentionFn]
    ) -> Float[Array, "B S D"]:
        """Encodes, with one attention a layer."""
        hidden = jnp.swapaxes(mel, 1, 2)
        for conv in (self.conv1, self.conv2):
            hidden = jax.nn.gelu(conv(hidden), approximate=False)
        hidden += self.positions[...]
        for layer, attention_fn in zip(self.layers, attention_fns, strict=True):
            hidden = layer(hidden, attention_fn)
        return self.norm(hidden)


class Decoder(nnx.Module):
    """From tokens and the keys and values of the encoder's states to logits of the next tokens."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        """Creates random weights of the sizes in `config`."""
        size = config.d_model
        self.embedding = nnx.Embed(config.vocab_size, size, rngs=rngs)
        self.positions = nnx.Param(
            0.01 * jax.random.normal(rngs.params(), (config.max_target_positions, size))
        )
        self.layers = nnx.List(
            [
                DecoderLayer(
                    size, config.decoder_attention_heads, config.decoder_ffn_dim, rngs=rngs
                )
                for _ in range(config.decoder_layers)
            ]
        )
        self.norm = layer_norm(size, NORM_EPSILON, rngs)

    def read(self, encoded: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        """Returns each layer's keys and values of the encoder's hidden states."""
        return tuple(layer.cross_attention.key_value(encoded) for layer in self.layers)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        encoded: tuple[KeyValue, ...],
        cache: tuple[KeyValue, ...],
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValue, ...]]:
        """Continues what the cache holds.

        Args:
            tokens: the tokens at the positions from `position` on.
            encoded: from `read`.
            cache: holds the tokens before `position`.
            position: where the first of `tokens` is.

        Returns:
            The hidden states of `tokens`, and the cache with them.
        """
        places = jax.lax.dynamic_slice_in_dim(self.positions[...], position, tokens.shape[1])
        hidden, filled = self.embedding(tokens) + places, []
        for layer, key_value, old in zip(self.layers, encoded, cache, strict=True):
            hidden, new = layer(hidden, key_value, old, position)
            filled.append(new)
        return self.norm(hidden), tuple(filled)


class Whisper(nnx.Module):
    """Whisper, from log-mel spectrograms of 30 s to tokens.

    Only the encoder's attention can be replaced: it is the long one, of 1500 positions. That of
    the decoder, which has one query at a time, is exact.

    >>> import clustax
    >>> config = WhisperConfig(d_model=24, encoder_layers=1, decoder_layers=1)
    >>> exact = Whisper(config, rngs=nnx.Rngs(0))
    >>> clustered = exact.with_attention(clustax.ClusteredAttention(num_clusters=50))
    >>> mel = jnp.zeros((1, 80, 3000))
    >>> clustered.encode(mel).shape
    (1, 1500, 24)
    >>> clustered.transcribe_tokens(mel, config.prompt, max_tokens=5).shape
    (1, 5)
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        attention_fn: AttentionFn | Sequence[AttentionFn] = _exact_attention,
        rngs: nnx.Rngs,
    ):
        """Creates a model with random weights; `load` gives one with pretrained weights.

        Args:
            config: the sizes.
            attention_fn: called as `attention_fn(query, key, value)` in the encoder; one for all
                layers, or a sequence of one per layer.
            rngs: for the weights.
        """
        self.config = config
        self.attention_fns = one_per_layer(attention_fn, config.encoder_layers)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, mel: Float[Array, "B M F"]) -> Float[Array, "B S D"]:
        """Encodes windows of audio.

        Args:
            mel: from `log_mel`.

        Raises:
            ValueError: if it has not the mel bins and frames of the config.
        """
        expected = (self.config.num_mel_bins, 2 * self.config.max_source_positions)
        if mel.ndim != 3 or mel.shape[1:] != expected:
            raise ValueError(
                f"mel must have the shape (batch, mel bins, frames) = (B, {expected[0]}, "
                f"{expected[1]}), got {mel.shape}: make it with clustax.models.log_mel."
            )
        return self.encoder(mel, self.attention_fns)

    def __call__(
        self, mel: Float[Array, "B M F"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T vocab"]:
        """Returns the logits of the token after each of `tokens`.

        Args:
            mel: from `log_mel`.
            tokens: the prompt and what was said.

        Raises:
            ValueError: if there are more tokens than the decoder has positions.
        """
        self._check_length(tokens.shape[1], f"tokens of shape {tokens.shape}")
        encoded = self.decoder.read(self.encode(mel))
        hidden, _ = self.decoder(tokens, encoded, empty_cache(encoded, tokens.shape[1]), 0)
        return self.decoder.embedding.attend(hidden)

    def transcribe_tokens(
        self,
        mel: Float[Array, "B M F"],
        prompt: Sequence[int] | Int[Array, " P"],
        max_tokens: int,
    ) -> Int[Array, "B length"]:
        """Transcribes windows of audio: takes the likeliest token after the other, compiled.

        Args:
            mel: from `log_mel`.
            prompt: the tokens to start from, as `WhisperConfig.prompt` has them.
            max_tokens: where to stop if the text has not ended.

        Returns:
            The tokens after the prompt, and from its end on end-of-text for each text that ended.

        Raises:
            ValueError: if there is no prompt or no token to make, or if both together are more than
                the decoder has positions.
        """
        self._check_decoding(prompt, max_tokens)
        return _transcribe(self, mel, jnp.asarray(prompt, jnp.int32), max_tokens)

    def decode_tokens(
        self,
        hidden: Float[Array, "B S D"],
        prompt: Sequence[int] | Int[Array, " P"],
        max_tokens: int,
    ) -> Int[Array, "B length"]:
        """Transcribes what is already encoded, by a program that models of any attention share.

        Args:
            hidden: from `encode`.
            prompt: as for `transcribe_tokens`.
            max_tokens: as there.

        Returns:
            As there.

        Raises:
            ValueError: as there.
        """
        self._check_decoding(prompt, max_tokens)
        prompt = jnp.asarray(prompt, jnp.int32)
        return _compiled_decode(self.decoder, self.config, hidden, prompt, max_tokens)

    def with_attention(self, attention_fn: AttentionFn | Sequence[AttentionFn]) -> Self:
        """Returns a model that encodes with another attention and the very arrays of this one.

        Args:
            attention_fn: as for `Whisper`.
        """
        other = nnx.merge(*nnx.split(self))
        other.attention_fns = one_per_layer(attention_fn, self.config.encoder_layers)
        return other

    def _check_decoding(self, prompt: Sequence[int] | Int[Array, " P"], max_tokens: int) -> None:
        if len(prompt) < 1 or max_tokens < 1:
            raise ValueError(
                f"prompt and max_tokens must be at least one token each, got {len(prompt)} and "
                f"{max_tokens}: start with model.config.prompt."
            )
        self._check_length(len(prompt) + max_tokens, f"len(prompt)={len(prompt)} + {max_tokens=}")

    def _check_length(self, length: int, found: str) -> None:
        longest = self.config.max_target_positions
        if length > longest:
            raise ValueError(
                f"the decoder has max_target_positions={longest} positions, got {found}: "
                "transcribe shorter windows, or ask for fewer tokens."
            )


@partial(nnx.jit, static_argnums=3)
def _transcribe(
    model: Whisper, mel: Float[Array, "B M F"], prompt: Int[Array, " P"], max_tokens: int
) -> Int[Array, "B length"]:
    return _decode(model.decoder, model.config, model.encode(mel), prompt, max_tokens)


def _decode(
    decoder: Decoder,
    config: WhisperConfig,
    hidden: Float[Array, "B S D"],
    prompt: Int[Array, " P"],
    max_tokens: int,
) -> Int[Array, "B length"]:
    batch, end = hidden.shape[0], config.eos_token_id
    encoded = decoder.read(hidden)

    def advance(tokens, cache, position, suppressed):
        hidden, cache = decoder(tokens, encoded, cache, position)
        logits = decoder.embedding.attend(hidden[:, -1])
        allowed = ~np.isin(np.arange(config.vocab_size), suppressed)
        return jnp.argmax(jnp.where(allowed, logits, -jnp.inf), -1).astype(jnp.int32), cache

    def unfinished(state):
        count, tokens, _ = state
        return (count < max_tokens) & jnp.any(tokens[:, count - 1] != end)

    def step(state):
        count, tokens, cache = state
        last = tokens[:, count - 1]
        position = len(prompt) + count - 1
        token, cache = advance(last[:, None], cache, position, config.suppress_tokens)
        return count + 1, tokens.at[:, count].set(jnp.where(last == end, end, token)), cache

    first, cache = advance(
        jnp.tile(prompt, (batch, 1)),
        empty_cache(encoded, len(prompt) + max_tokens),
        0,
        config.suppress_tokens + config.begin_suppress_tokens,
    )
    tokens = jnp.full((batch, max_tokens), end, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), tokens, cache))[1]


_compiled_decode = nnx.jit(_decode, static_argnums=(1, 4))


def load(
    path: str | Path,
    *,
    attention_fn: AttentionFn | Sequence[AttentionFn] = _exact_attention,
) -> Whisper:
    """Loads a pretrained Whisper from the files of CTranslate2 or of Hugging Face.

    Of CTranslate2 (or faster-whisper) it reads model.bin, in float16 or float32, config.json, and
    vocabulary.json or vocabulary.txt; of Hugging Face config.json, generation_config.json if there
    is one, and model.safetensors, with the package safetensors. The weights become float32.

    >>> whisper = load("whisper-tiny.en")                              # doctest: +SKIP

    Args:
        path: model.safetensors or model.bin with the other files beside it, or their folder; of a
            folder with both the first is read.
        attention_fn: as for `Whisper`.

    Raises:
        FileNotFoundError: if there is neither of the two.
        ValueError: if tensors are missing or have the wrong shape; the message names all of them.
    """
    path = Path(path)
    files = whisper_files.read(path)
    names = (field.name for field in fields(WhisperConfig))
    config = WhisperConfig(**{name: files.config[name] for name in names if name in files.config})
    # eval_shape: the weights come from the file, so none are made up first.
    whisper = nnx.eval_shape(lambda: Whisper(config, attention_fn=attention_fn, rngs=nnx.Rngs(0)))
    problems = []
    for parameter, variable in nnx.to_flat_state(nnx.state(whisper)):
        name, part, parts = files.place(parameter)
        transposed = parameter[-1] == "kernel"  # PyTorch stores (out, in) and (out, in, width).
        shape = variable.shape[::-1] if transposed else variable.shape
        shape = (parts * shape[0], *shape[1:])
        if name not in files.tensors:
            problems.append(f"{name} is missing")
        elif (tensor := files.tensors[name]).shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, not {shape}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} holds {tensor.dtype}, not floating point numbers")
        else:
            chosen = np.split(np.asarray(tensor), parts)[part]
            variable.set_value(jnp.asarray(chosen.T if transposed else chosen, variable.dtype))
    if problems:
        # Parameters that share a tensor share its problem.
        raise ValueError(
            f"{path} must hold the Whisper that its config.json describes, in floating point, "
            f"but: {'; '.join(dict.fromkeys(problems))}. Take all files from the same model."
        )
    return whisper


def _sinusoids(length: int, size: int) -> Float[Array, "S D"]:
    frequencies = jnp.exp(-jnp.log(10_000) * jnp.linspace(0, 1, size // 2))
    angles = jnp.arange(length)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
