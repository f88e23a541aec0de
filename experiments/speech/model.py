"""An encoder of speech with an output for CTC, and its loss.

Shapes: B batch, T frames, M mel bins, D model size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.models.common import AttentionFn, sinusoids
from clustax.models.encoder import Encoder, Swappable
from experiments.common.training import Sums


@dataclass(frozen=True)
class Model:
    """The size of the encoder."""

    layers: int = 9
    """Layers."""
    heads: int = 6
    """Heads of attention in each."""
    head_dim: int = 32
    """Their dimension; that of the model is heads · head_dim, and its quadruple in between."""
    context: int = 0
    """Frames on each side of a frame that the input of its position has, too."""
    norm_first: bool = False
    """Whether norms come before the parts of a layer instead of after them: trains sooner."""
    dropout_rate: float = 0.1
    """Dropout in training."""


class SpeechModel(Swappable):
    """Says for each frame which phone begins there, or none, and which phone is being said."""

    def __init__(
        self,
        size: Model,
        num_phones: int,
        num_bins: int,
        attention_fn: AttentionFn | Sequence[AttentionFn],
        *,
        rngs: nnx.Rngs,
    ):
        """Creates random weights.

        Args:
            size: of the encoder.
            num_phones: how many there are.
            num_bins: of the features.
            attention_fn: of its layers.
            rngs: for the weights and for dropout.
        """
        d_model = size.heads * size.head_dim
        self.context = size.context
        self.input = nnx.Linear(num_bins * (2 * size.context + 1), d_model, rngs=rngs)
        self.encoder = Encoder(
            size.layers,
            d_model,
            size.heads,
            attention_fn=attention_fn,
            norm_first=size.norm_first,
            dropout_rate=size.dropout_rate,
            rngs=rngs,
        )
        self.output = nnx.Linear(d_model, 1 + num_phones, rngs=rngs)
        self.frame_output = nnx.Linear(d_model, 1 + num_phones, rngs=rngs)

    def encode(
        self, features: Float[Array, "B T M"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B T D"]:
        """Returns the encoder's states."""
        frames, around = features.shape[1], self.context
        padded = jnp.pad(features, ((0, 0), (around, around), (0, 0)))
        spliced = [padded[:, start : start + frames] for start in range(2 * around + 1)]
        hidden = self.input(jnp.concatenate(spliced, axis=-1))
        return self.encoder(hidden + sinusoids(frames, hidden.shape[-1]), lengths)

    def __call__(
        self, features: Float[Array, "B T M"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B T symbols"]:
        """Returns the logits of CTC's symbols, of which the first is the blank."""
        return self.output(self.encode(features, lengths))


def loss(model: SpeechModel, batch: Mapping[str, Array]) -> Sums:
    """The losses for each phone: of CTC, and as much as the batch asks for of that of frames."""
    lengths, counts, labels = batch["lengths"], batch["counts"], batch["frame_phones"]
    states = model.encode(batch["features"], lengths)
    frames, places = states.shape[1], batch["phones"].shape[1]
    ctc = optax.ctc_loss(
        model.output(states),
        (jnp.arange(frames) >= lengths[:, None]).astype(jnp.float32),
        batch["phones"],
        (jnp.arange(places) >= counts[:, None]).astype(jnp.float32),
    )
    logits = model.frame_output(states)
    known = labels >= 0
    number = jnp.maximum(1, known.sum(1))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    of_frames = jnp.sum(each * known, axis=1) / number
    right = jnp.sum((jnp.argmax(logits, axis=-1) == labels) & known, axis=1) / number
    weight = counts.astype(jnp.float32)
    return {
        "weight": jnp.sum(weight),
        "loss": jnp.sum(ctc + batch["frame_weight"] * of_frames * weight),
        "ctc": jnp.sum(ctc),
        "frame_accuracy": jnp.sum(right * weight),
    }
