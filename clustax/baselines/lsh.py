"""Reformer's attention: queries that are their own keys, sorted by hash and cut into chunks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from clustax import validation, xla
from clustax.attention import checked_arrays
from clustax.baselines.softmax import attend_heads
from clustax.xla import LOWEST_BIAS, MASKED, Attended, Keys

MERGES = ("lse", "uniform")
# The logit of a token for itself: below any other that counts, so that it has weight only where it
# is the only one, and above those that do not count.
SELF = (LOWEST_BIAS + MASKED) / 2


def reformer(
    query: Float[Array, "*B T N H"],
    value: Float[Array, "*B T N V"],
    bias: Float[Array, "*#B #N 1 T"] | None = None,
    mask: Bool[Array, "*#B #N 1 T"] | None = None,
    *,
    rounds: int = 4,
    num_buckets: int = 64,
    chunk_size: int = 32,
    merge: str = "lse",
    same_bucket: bool = True,
    scale: float | Float[Array, ""] | None = None,
    query_seq_lengths: Int[Array, "*B"] | None = None,
    key_value_seq_lengths: Int[Array, "*B"] | None = None,
    rng: Array | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Reformer's LSH attention, in which the keys are the queries, normalised to length 1.

    In each round tokens are hashed to buckets (:func:`buckets`), sorted by bucket, and cut into
    chunks. A token attends to those of its bucket in its own chunk and in the one before; the first
    chunk comes after the last one. With :math:`P_i` for these tokens, without i itself unless it is
    the only one, a round gives

    .. math:: o_i = \sum_{l \in P_i} \exp(s_{il} - z_i)\, V_l, \qquad
              z_i = \log \sum_{l \in P_i} \exp s_{il}, \qquad
              s_{il} = s\, Q_i \cdot Q_l / \lVert Q_l \rVert + b_l

    and the rounds are merged with weights :math:`\mathrm{softmax}(z_i)` over the rounds, or equal
    ones. The cost is O(rounds · T · chunk_size · max(H, V)).

    No gradient flows through the hashing; everything else is differentiable. As tokens are queries
    and keys in one, what does not count as one counts as neither: a token that is masked, biased by
    -inf, or beyond either length has no influence, whatever it holds, and gets zeros. How much
    padding there is makes no difference.

    Args:
      query: queries, which are also the keys: batch axes, length T, N heads, head dim H; of any
        floating dtype.
      value: values of the same dtype: value dim V.
      bias: what is added to the logits of a token as a key.
      mask: True for tokens that count.
      rounds: number of rounds, at least 1.
      num_buckets: number of buckets in a round, even; or 1, for all tokens together.
      chunk_size: number of tokens in a chunk, at least 1.
      merge: "lse", or "uniform" for equal weights of all rounds, which is what the authors of
        clustered attention compare with.
      same_bucket: whether tokens attend within their bucket only, or to all that are in the two
        chunks, which is what the authors of clustered attention compare with.
      scale: factor s of the logits; 1 if None, which is what Reformer's code has in effect. That of
        clustered attention's authors has 1 / sqrt(H).
      query_seq_lengths: number of valid tokens of each batch entry; the rest is padding. All if
        None.
      key_value_seq_lengths: the same; where both are given the smaller one counts.
      rng: a key for the hashing; ``jax.random.key(0)`` if None.

    Returns:
      The attended values, in the dtype of ``query``.

    Raises:
      ValueError: if an argument is not as above.

    Source: Kitaev, Kaiser and Levskaya, "Reformer: The Efficient Transformer", section 2; "lsh-X"
    in the paper, X being the number of rounds.

    >>> query, value = jax.random.normal(jax.random.key(0), (2, 2, 512, 4, 16))
    >>> reformer(query, value, rounds=1, query_seq_lengths=jnp.array([512, 300])).shape
    (2, 512, 4, 16)
    """
    check_settings(rounds, num_buckets, chunk_size, merge)
    arrays = checked_arrays(
        query, query, value, bias, mask, query_seq_lengths, key_value_seq_lengths
    )
    if scale is not None:
        validation.scalar("scale", scale)
    rotations = draw_rotations(
        validation.rng_key("rng", rng), rounds, num_buckets, head_dim=arrays[0].shape[-1]
    )
    return _reformer(
        arrays,
        1.0 if scale is None else scale,
        rotations,
        chunk_size=chunk_size,
        merge=merge,
        same_bucket=same_bucket,
    )


def check_settings(rounds: Any, num_buckets: Any, chunk_size: Any, merge: Any) -> None:
    """Checks what is no array."""
    validation.at_least("rounds", rounds, 1)
    validation.at_least("num_buckets", num_buckets, 1)
    if num_buckets > 1 and num_buckets % 2:
        raise ValueError(
            f"num_buckets must be 1 or even, got {num_buckets}: each random direction has a bucket "
            "at either end."
        )
    validation.at_least("chunk_size", chunk_size, 1)
    validation.choice("merge", merge, MERGES)


def draw_rotations(
    rng: Array, rounds: int, num_buckets: int, *, head_dim: int
) -> Float[Array, "rounds H half"]:
    """Draws the random rotations of :func:`buckets`: normal, for half the number of buckets."""
    return jax.random.normal(rng, (rounds, head_dim, num_buckets // 2), jnp.float32)


def buckets(
    query: Float[Array, "T H"], rotations: Float[Array, "rounds H half"]
) -> Int[Array, "rounds T"]:
    r"""The bucket of each token in each round: :math:`\mathrm{argmax}([x R; -x R])`.

    >>> query = jnp.array([[2.0, 1.0], [-3.0, 1.0], [0.0, -1.0]])
    >>> buckets(query, jnp.eye(2)[None])
    Array([[0, 2, 3]], dtype=int32)
    """
    rounds, _, half = rotations.shape
    if half == 0:
        return jnp.zeros((rounds, len(query)), jnp.int32)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    rotated = jnp.einsum(
        "th,rhb->rtb", query.astype(dtype), rotations.astype(dtype), precision=lax.Precision.HIGHEST
    )
    rotated = jnp.concatenate([rotated, -rotated], axis=-1)
    return jnp.argmax(rotated, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("chunk_size", "merge", "same_bucket"))
def _reformer(
    arrays: tuple[Any, ...],
    scale: float | Float[Array, ""],
    rotations: Float[Array, "rounds H half"],
    *,
    chunk_size: int,
    merge: str,
    same_bucket: bool,
) -> Float[Array, "*B T N V"]:
    query, _, value, bias, mask, query_seq_lengths, key_value_seq_lengths = arrays
    lengths = query_seq_lengths if key_value_seq_lengths is None else key_value_seq_lengths
    if query_seq_lengths is not None:
        lengths = jnp.minimum(lengths, query_seq_lengths)

    def head(scale, rotations, _, tokens: Keys) -> Float[Array, "T V"]:
        query = tokens.key
        valid = jnp.ones(len(query), bool) if tokens.valid is None else tokens.valid
        tokens = tokens._replace(key=normalise(query), valid=None)

        def attend(bucket: Int[Array, " T"]) -> Attended:
            return attend_round(query, tokens, valid, bucket, chunk_size, same_bucket, scale)

        each = lax.map(attend, buckets(query, rotations))  # rounds T …
        if merge == "lse":
            out = jnp.sum(jax.nn.softmax(each.lse, axis=0)[..., None] * each.mean, axis=0)
        else:
            out = jnp.mean(each.mean, axis=0)
        return jnp.where(valid[:, None], out, 0)

    head_bytes = 4 * query.shape[-3] * 2 * chunk_size  # rounds are worked on in turn
    return attend_heads(
        head,
        *(query, query, value, bias, mask, lengths, lengths),
        shared=(scale, rotations),
        head_bytes=head_bytes,
    )


def normalise(x: Float[Array, "T H"]) -> Float[Array, "T H"]:
    """Vectors of length 1; zeros stay zeros."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(x.dtype)


def attend_round(
    query: Float[Array, "T H"],
    tokens: Keys,
    valid: Bool[Array, " T"],
    bucket: Int[Array, " T"],
    chunk_size: int,
    same_bucket: bool,
    scale: float | Float[Array, ""],
) -> Attended:
    """Attention within the chunks of tokens that are sorted by bucket, in the order of tokens."""
    length = len(query)
    num_chunks = -(-length // chunk_size)
    # Tokens that do not count come last, where they are in nobody's way.
    order = jnp.argsort(jnp.where(valid, bucket, jnp.iinfo(jnp.int32).max))
    token = jnp.pad(order, (0, num_chunks * chunk_size - length), constant_values=length)
    token = token.reshape(num_chunks, chunk_size)
    # The first chunk looks back at the last one that has a token which counts.
    used = jnp.maximum(1, -(-jnp.sum(valid) // chunk_size))
    previous = (jnp.arange(num_chunks) - 1) % used

    def chunks(x: Array) -> Array:  # T … -> L chunk_size …
        return x.at[token].get(mode="fill", fill_value=0)

    def look_back(x: Array) -> Array:  # L chunk_size … -> L 2·chunk_size …
        return jnp.concatenate([x, x[previous]], axis=1)

    counts = look_back(chunks(valid))[:, None]
    if same_bucket:
        bucket = chunks(bucket)
        counts &= bucket[..., None] == look_back(bucket)[:, None]
    itself = token[..., None] == look_back(token)[:, None]
    keys = jax.tree.map(lambda x: look_back(chunks(x)), tokens)
    logits = xla.attention_logits(chunks(query), keys, scale)
    logits = jnp.where(counts, jnp.where(itself, SELF, logits), MASKED)

    def in_place(x: Array) -> Array:  # L chunk_size … -> T …
        out = jnp.zeros((length, *x.shape[2:]), x.dtype)
        return out.at[token].set(x, mode="drop")

    return jax.tree.map(in_place, xla.attend_keys(logits, keys.value))
