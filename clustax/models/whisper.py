"""Whisper in Flax NNX: the attention of its encoder is an argument, the weights are OpenAI's.

Shapes: B batch, M mel bins, F frames of 10 ms, S positions of the encoder, T tokens, P tokens of
the prompt, D model size, N heads, H head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.models import weights, whisper_files
from clustax.models.common import AttentionFn, layer_norm, sinusoids
from clustax.models.encoder import Attention, Encoder, FeedForward, KeyValue, Swappable, gelu

NORM_EPSILON = 1e-5


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


class DecoderLayer(nnx.Module):
    """A causal layer with a cache, which attends to the encoder's states, too."""

    def __init__(self, size: int, num_heads: int, inner: int, *, rngs: nnx.Rngs):
        """Creates random weights."""
        self.attention_norm = layer_norm(size, NORM_EPSILON, rngs)
        self.attention = Attention(size, num_heads, key_bias=False, rngs=rngs)
        self.cross_norm = layer_norm(size, NORM_EPSILON, rngs)
        self.cross_attention = Attention(size, num_heads, key_bias=False, rngs=rngs)
        self.feed_forward_norm = layer_norm(size, NORM_EPSILON, rngs)
        self.feed_forward = FeedForward(size, inner, gelu, rngs=rngs)

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
        return hidden + self.feed_forward(self.feed_forward_norm(hidden)), cache


def empty_cache(encoded: tuple[KeyValue, ...], length: int) -> tuple[KeyValue, ...]:
    """Returns a decoder's cache with room for `length` tokens.

    Args:
        encoded: from `Decoder.read`; the cache has its layers, batch, heads and dtype.
        length: prompt and transcript.
    """
    return jax.tree.map(lambda x: jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype), encoded)


class WhisperEmbeddings(nnx.Module):
    """From a log-mel spectrogram to what the encoder takes, one position each 20 ms."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        """Creates random weights of the sizes in `config`."""
        size = config.d_model
        self.conv1 = nnx.Conv(config.num_mel_bins, size, 3, padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(size, size, 3, strides=2, padding=1, rngs=rngs)
        # No nnx.Param: training leaves the sinusoids as they are.
        self.positions = nnx.Variable(sinusoids(config.max_source_positions, size))

    def __call__(self, mel: Float[Array, "B M F"]) -> Float[Array, "B S D"]:
        """Embeds windows of audio."""
        hidden = jnp.swapaxes(mel, 1, 2)
        for conv in (self.conv1, self.conv2):
            hidden = gelu(conv(hidden))
        return hidden + self.positions[...]


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


class Whisper(Swappable):
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
        attention_fn: AttentionFn | Sequence[AttentionFn] = jax.nn.dot_product_attention,
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
        self.embeddings = WhisperEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(
            config.encoder_layers,
            config.d_model,
            config.encoder_attention_heads,
            config.encoder_ffn_dim,
            attention_fn=attention_fn,
            norm_first=True,
            activation=gelu,
            dropout_rate=0,
            epsilon=NORM_EPSILON,
            key_bias=False,
            rngs=rngs,
        )
        self.decoder = Decoder(config, rngs=rngs)

    @property
    def attention_fns(self) -> tuple[AttentionFn, ...]:
        """What each layer of the encoder attends with."""
        return self.encoder.attention_fns

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
        return self.encoder(self.embeddings(mel))

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
    attention_fn: AttentionFn | Sequence[AttentionFn] = jax.nn.dot_product_attention,
) -> Whisper:
    """Loads a pretrained Whisper from the files of CTranslate2 or of Hugging Face.

    Of CTranslate2 (or faster-whisper) it reads model.bin, in float16 or float32, config.json, and
    vocabulary.json or vocabulary.txt; of Hugging Face config.json, generation_config.json if there
    is one, and model.safetensors or the files that model.safetensors.index.json lists, with the
    package safetensors. The weights become float32.

    >>> whisper = load("whisper-tiny.en")                              # doctest: +SKIP

    Args:
        path: model.safetensors, its index, or model.bin with the other files beside it, or their
            folder; of a folder with several the first of these is read.
        attention_fn: as for `Whisper`.

    Raises:
        FileNotFoundError: if there is none of them.
        ValueError: if tensors are missing or have the wrong shape; the message names all of them.
    """
    files = whisper_files.read(path)
    names = (field.name for field in fields(WhisperConfig))
    config = WhisperConfig(**{name: files.config[name] for name in names if name in files.config})
    return weights.load(
        lambda: Whisper(config, attention_fn=attention_fn, rngs=nnx.Rngs(0)),
        files.tensors,
        files.place,
        Path(path),
    )
