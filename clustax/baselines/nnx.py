"""Self-attention with one projection for queries and keys, as a Flax NNX module."""

from flax import nnx
from jaxtyping import Array, Float, Int

from clustax.baselines.attention_fn import Reformer, Rival


class ReformerSelfAttention(nnx.Module):
    """Multi-head self-attention in which queries and keys are one projection.

    Args:
      num_heads: number N of heads; they divide ``in_features``.
      in_features: size of inputs and outputs.
      attention: the settings of the attention; ``Reformer()`` if None. The module keeps them as
        ``attention_fn``, where they can be replaced, also by another rival: ``Exact()`` gives the
        exact attention with shared queries and keys.
      rngs: for the weights.

    Raises:
      ValueError: if the heads do not divide ``in_features``.

    Source: "Reformer: The Efficient Transformer", section 2; "lsh-X" in the paper.

    >>> import jax
    >>> layer = ReformerSelfAttention(4, 32, attention=Reformer(rounds=1), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (2, 256, 32))
    >>> layer(x, lengths=jax.numpy.array([256, 100])).shape
    (2, 256, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        attention: Rival | None = None,
        rngs: nnx.Rngs,
    ):
        if in_features % num_heads:
            raise ValueError(
                f"in_features must be a multiple of num_heads, got {in_features} and {num_heads}."
            )
        heads = (num_heads, in_features // num_heads)
        self.query_key = nnx.LinearGeneral(in_features, heads, rngs=rngs)
        self.value = nnx.LinearGeneral(in_features, heads, rngs=rngs)
        self.out = nnx.LinearGeneral(heads, in_features, axis=(-2, -1), rngs=rngs)
        self.attention_fn = Reformer() if attention is None else attention

    def __call__(
        self,
        inputs: Float[Array, "*B T in"],
        *,
        mask: Array | None = None,
        lengths: Int[Array, "*B"] | None = None,
    ) -> Float[Array, "*B T in"]:
        """Projects, attends, and projects back.

        Args:
          inputs: what queries, keys and values are projected from.
          mask: of shape (*B|1, N|1, 1, T), true for tokens that count.
          lengths: number of valid tokens of each batch entry; the rest is padding. All if None.

        Returns:
          The outputs, in the shape of the inputs.

        Raises:
          ValueError: if an argument is not as above.
        """
        query = self.query_key(inputs)
        attended = self.attention_fn(
            query,
            query,
            self.value(inputs),
            mask=mask,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
        )
        return self.out(attended)
