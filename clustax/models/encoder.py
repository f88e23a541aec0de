"""The transformer encoder in Flax NNX: its attention is an argument.

Shapes: B batch, T length, S length of what is attended to, D model size, N heads, H head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clustax import validation
from clustax.masks import valid_positions
from clustax.models.common import AttentionFn, dropout, layer_norm, one_per_layer

Activation = Callable[[Array], Array]


def gelu(x: Array) -> Array:
    """The exact GELU, where `jax.nn.gelu` approximates by default."""
    return jax.nn.gelu(x, approximate=False)


class KeyValue(NamedTuple):
    """Keys and values of one attention."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]


class Attention(nnx.Module):
    """The projections of multi-head attention; what it attends to and how is given to each call."""

    def __init__(self, d_model: int, num_heads: int, *, key_bias: bool = True, rngs: nnx.Rngs):
        """Creates random weights."""
        if d_model % num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got {d_model} and {num_heads}."
            )
        self.num_heads = num_heads
        self.query = nnx.Linear(d_model, d_model, rngs=rngs)
        self.key = nnx.Linear(d_model, d_model, use_bias=key_bias, rngs=rngs)
        self.value = nnx.Linear(d_model, d_model, rngs=rngs)
        self.output = nnx.Linear(d_model, d_model, rngs=rngs)

    def queries(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Returns queries."""
        return self._heads(self.query(hidden))

    def key_value(self, hidden: Float[Array, "B S D"]) -> KeyValue:
        """Returns keys and values."""
        return KeyValue(self._heads(self.key(hidden)), self._heads(self.value(hidden)))

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        key_value: KeyValue,
        attention_fn: AttentionFn = jax.nn.dot_product_attention,
        **options: Any,
    ) -> Float[Array, "B T D"]:
        """Attends from `hidden`; the options are passed on to `attention_fn`."""
        attended = attention_fn(self.queries(hidden), *key_value, **options)
        return self.output(attended.reshape(hidden.shape))

    def _heads(self, projected: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        return projected.reshape(*projected.shape[:2], self.num_heads, -1)


class FeedForward(nnx.Module):
    """The part of a layer that looks at one position at a time."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation, *, rngs: nnx.Rngs):
        """Creates random weights."""
        self.activation = activation
        self.intermediate = nnx.Linear(d_model, d_ff, rngs=rngs)
        self.output = nnx.Linear(d_ff, d_model, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the network's output."""
        return self.output(self.activation(self.intermediate(hidden)))


class EncoderLayer(nnx.Module):
    """Attention and a feed-forward network, each with its residual, norm and dropout.

    The attention is given anew to each call, so that layers share one compiled program. Dropout is
    that of the two parts' outputs; as in all NNX modules `eval()` turns it off, `train()` on.

    On long sequences the hidden activations of the feed-forward network take most of the memory of
    training. With a `block_size` it takes so many positions at a time, and computes them anew for
    gradients.

    >>> import clustax
    >>> layer = EncoderLayer(32, 4, rngs=nnx.Rngs(0))
    >>> hidden, lengths = jnp.ones((2, 50, 32)), jnp.array([50, 20])
    >>> layer(hidden, lengths, clustax.ClusteredAttention(num_clusters=10)).shape
    (2, 50, 32)
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        norm_first: bool = False,
        activation: Activation = jax.nn.relu,
        dropout_rate: float = 0.1,
        epsilon: float = 1e-5,
        key_bias: bool = True,
        block_size: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Creates random weights.

        Args:
            d_model: size of the hidden states.
            num_heads: of attention; they divide `d_model`.
            d_ff: inner size of the feed-forward network; 4 · `d_model` if None.
            norm_first: whether the norms come before the two parts or after the residuals, as in
                the paper.
            activation: that of the feed-forward network.
            dropout_rate: in training, from 0 to 1.
            epsilon: what the norms add to the variance.
            key_bias: whether the projection of the keys has a bias.
            block_size: of how many positions of a sequence the feed-forward network holds the
                hidden activations at once, at least 1; of all if None. The outputs are the same.
            rngs: for the weights and for dropout, which makes a copy of its own.

        Raises:
            ValueError: if the heads do not divide `d_model`, the rate is none, or `block_size` is
                below 1.
        """
        if block_size is not None:
            validation.at_least("block_size", block_size, 1)
        if not 0 <= dropout_rate <= 1:
            raise ValueError(f"dropout_rate must be from 0 to 1, got {dropout_rate}.")
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.norm_first = norm_first
        self.block_size = block_size
        self.attention = Attention(d_model, num_heads, key_bias=key_bias, rngs=rngs)
        self.attention_norm = layer_norm(d_model, epsilon, rngs)
        self.feed_forward = FeedForward(d_model, d_ff, activation, rngs=rngs)
        self.feed_forward_norm = layer_norm(d_model, epsilon, rngs)
        self.dropout = dropout(dropout_rate, rngs)

    def project(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], ...]:
        """Returns the query, key and value that a call attends with."""
        hidden = self.attention_norm(hidden) if self.norm_first else hidden
        return self.attention.queries(hidden), *self.attention.key_value(hidden)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        lengths: Int[Array, " B"] | None = None,
        attention_fn: AttentionFn = jax.nn.dot_product_attention,
    ) -> Float[Array, "B T D"]:
        """Applies the layer.

        Args:
            hidden: from the layer before.
            lengths: how many positions of each sequence are valid; all if None.
            attention_fn: as for `Encoder`.

        Returns:
            The hidden states for the next layer; those of padded positions mean nothing.
        """

        def attend(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
            options = {} if lengths is None else options
            return self.attention(hidden, self.attention.key_value(hidden), attention_fn, **options)

        hidden += self.dropout(attend(self.attention_norm(hidden) if self.norm_first else hidden))
        # Drawn here, as nothing in a block may change the state of the module.
        rngs = self.dropout.rngs
        key = None if rngs is None or self.dropout.deterministic else rngs()
        return self._in_blocks(hidden, key)

    def _in_blocks(self, hidden: Float[Array, "B T D"], key: Array | None) -> Float[Array, "B T D"]:
        """Applies what looks at one position at a time, to all or to a block of them."""
        batch, length, size = hidden.shape
        if self.block_size is None or length <= self.block_size:
            return self._after_attention(hidden, key)
        num_blocks = -(-length // self.block_size)
        block = -(-length // num_blocks)  # all blocks get about as many
        hidden = jnp.pad(hidden, ((0, 0), (0, num_blocks * block - length), (0, 0)))
        blocks = jnp.moveaxis(hidden.reshape(batch, num_blocks, block, size), 1, 0)
        keys = None if key is None else jax.random.split(key, num_blocks)
        apply = jax.checkpoint(self._after_attention)
        blocks = jax.lax.map(lambda each: apply(*each), (blocks, keys))
        return jnp.moveaxis(blocks, 0, 1).reshape(batch, -1, size)[:, :length]

    def _after_attention(
        self, hidden: Float[Array, "B T D"], key: Array | None
    ) -> Float[Array, "B T D"]:
        if self.norm_first:
            update = self.feed_forward(self.feed_forward_norm(hidden))
            return hidden + self.dropout(update, rngs=key)
        hidden = self.attention_norm(hidden)
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden), rngs=key))


class Swappable(nnx.Module):
    """What has an `Encoder`, or is one, whose attention can be replaced."""

    def with_attention(self, attention_fn: AttentionFn | Sequence[AttentionFn]) -> Self:
        """Returns a model that encodes with another attention and the very arrays of this one.

        Args:
            attention_fn: as for `Encoder`.

        Raises:
            ValueError: if it is a sequence of another length than there are layers.
        """
        other = nnx.merge(*nnx.split(self))
        for _, module in nnx.iter_modules(other):
            if isinstance(module, Encoder):
                module.attention_fns = one_per_layer(attention_fn, len(module.layers))
        return other


class Encoder(Swappable):
    """A stack of `EncoderLayer`.

    >>> import clustax
    >>> encoder = Encoder(
    ...     2, 32, 4, attention_fn=clustax.ClusteredAttention(num_clusters=10), rngs=nnx.Rngs(0)
    ... )
    >>> hidden, lengths = jax.random.normal(jax.random.key(0), (2, 50, 32)), jnp.array([50, 20])
    >>> encoder(hidden, lengths).shape  # training: with dropout
    (2, 50, 32)
    >>> encoder.eval()
    >>> exact = encoder.with_attention(jax.nn.dot_product_attention)
    >>> exact(hidden, lengths).shape
    (2, 50, 32)
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        attention_fn: AttentionFn | Sequence[AttentionFn] = jax.nn.dot_product_attention,
        norm_first: bool = False,
        final_norm: bool | None = None,
        activation: Activation = jax.nn.relu,
        dropout_rate: float = 0.1,
        epsilon: float = 1e-5,
        key_bias: bool = True,
        block_size: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Creates random weights.

        Args:
            num_layers: how many layers.
            d_model, num_heads, d_ff, norm_first, activation, dropout_rate, epsilon, key_bias,
                block_size, rngs: as for `EncoderLayer`.
            attention_fn: called as `attention_fn(query, key, value, query_seq_lengths=lengths,
                key_value_seq_lengths=lengths)`, and without the two where no lengths are given; one
                for all layers, or a sequence of one per layer.
            final_norm: whether a norm follows the last layer; where `norm_first` if None, as such
                layers end with none.

        Raises:
            ValueError: as `EncoderLayer`, or if there is not one attention per layer.
        """
        self.d_model = d_model
        self.attention_fns = one_per_layer(attention_fn, num_layers)
        self.layers = nnx.List(
            [
                EncoderLayer(
                    d_model,
                    num_heads,
                    d_ff,
                    norm_first=norm_first,
                    activation=activation,
                    dropout_rate=dropout_rate,
                    epsilon=epsilon,
                    key_bias=key_bias,
                    block_size=block_size,
                    rngs=rngs,
                )
                for _ in range(num_layers)
            ]
        )
        final_norm = norm_first if final_norm is None else final_norm
        self.norm = layer_norm(d_model, epsilon, rngs) if final_norm else None

    def __call__(
        self, hidden: Float[Array, "B T D"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Encodes a batch of padded sequences.

        Args:
            hidden: the inputs; what the padding holds has no influence on valid positions.
            lengths: how many positions of each sequence are valid; all if None.

        Returns:
            The outputs; those of padded positions mean nothing.

        Raises:
            ValueError: if `hidden` has another shape.
        """
        hidden = self._apply(hidden, lengths, len(self.layers))
        return hidden if self.norm is None else self.norm(hidden)

    def projections(
        self, hidden: Float[Array, "B T D"], lengths: Int[Array, " B"] | None, layer: int
    ) -> tuple[Float[Array, "B T N H"], ...]:
        """Returns the query, key and value of one layer, to look into its attention.

        Args:
            hidden, lengths: as in a call.
            layer: which layer, from 0.
        """
        return self.layers[layer].project(self._apply(hidden, lengths, layer))

    def _apply(self, hidden, lengths, num_layers: int) -> Float[Array, "B T D"]:
        if hidden.ndim != 3 or hidden.shape[-1] != self.d_model:
            raise ValueError(
                f"hidden must have the shape (batch, length, d_model) = (B, T, {self.d_model}), "
                f"got {hidden.shape}."
            )
        if lengths is not None:
            # Masked keys have no weight, but 0 · NaN would spread in exact attention.
            hidden = jnp.where(valid_positions(lengths, hidden.shape[1])[..., None], hidden, 0)
        for layer, attention_fn in zip(
            self.layers[:num_layers], self.attention_fns[:num_layers], strict=True
        ):
            hidden = layer(hidden, lengths, attention_fn)
        return hidden
