"""Locality-sensitive hashing: signs of random projections, packed into words.

Two queries that lie close together fall on the same side of most random planes, so the Hamming
distance of their codes stands for their Euclidean distance, at one bit a plane.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from clustax import validation
from clustax.heads import CPU_BYTES_IN_FLIGHT

WORD = 32  # bits in a word of a code


def num_words(num_bits: int) -> int:
    """The number W of uint32 words that hold ``num_bits`` bits."""
    return -(-num_bits // WORD)


def hash_planes(
    rng: Array, *, num_bits: int, head_dim: int, bias: bool = True
) -> Float[Array, "bits H+1"]:
    r"""Draws the random planes of :func:`hash_codes`.

    Plane b is :math:`\{x : x \cdot a_b = c_b\}`, with every entry of :math:`a_b` and :math:`c_b`
    drawn from :math:`\mathcal{N}(0, 1)`.

    Args:
      rng: a ``jax.random`` key, typed or legacy.
      num_bits: number of planes, at least 1.
      head_dim: dimension H of the queries.
      bias: whether the planes have offsets :math:`c_b`; without them all planes pass through the
        origin and the Hamming distance of codes stands for the angle between queries.

    Returns:
      float32 planes: row b holds :math:`a_b` and, last, :math:`c_b`.

    Raises:
      ValueError: if ``rng`` is no key, or ``num_bits`` or ``head_dim`` is below 1.

    Source: paper, section 3.2.1; the offsets are those of the authors' code.

    >>> hash_planes(jax.random.key(0), num_bits=64, head_dim=16).shape
    (64, 17)
    """
    rng = validation.rng_key("rng", rng)
    validation.at_least("num_bits", num_bits, 1)
    validation.at_least("head_dim", head_dim, 1)
    planes = jax.random.normal(rng, (num_bits, head_dim + 1), jnp.float32)
    return planes if bias else planes.at[:, -1].set(0.0)


def hash_codes(
    query: Float[Array, "*B T N H"], planes: Float[Array, "bits H+1"]
) -> UInt32[Array, "*B N T W"]:
    r"""Hashes queries: one bit for the side of each plane on which a query lies.

    Bit b of query i is 1 iff :math:`Q_i \cdot a_b > c_b`. It is bit ``b % 32`` of word ``b // 32``;
    the last word is filled up with zeros. The products are float32 whatever the dtype of ``query``.

    Args:
      query: queries, of any floating dtype.
      planes: planes of :func:`hash_planes`.

    Returns:
      The codes, W = ceil(bits / 32) words each, with the heads before the positions.

    Raises:
      ValueError: if ``planes`` does not fit ``query``, or either is not floating.

    Source: paper, section 3.2.1.

    >>> query = jnp.array([[[1.0, 0.0]], [[0.0, -1.0]]])  # T = 2, N = 1, H = 2
    >>> planes = jnp.array([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5], [0.0, 0.0, -1.0]])
    >>> hash_codes(query, planes)  # 0b111 and 0b100
    Array([[[7],
            [4]]], dtype=uint32)
    """
    query = validation.floating("query", query, "*B T N H")
    planes = validation.planes("planes", planes, head_dim=query.shape[-1])
    return _hash(query, planes)


@jax.jit
def _hash(
    query: Float[Array, "*B T N H"], planes: Float[Array, "bits H+1"]
) -> UInt32[Array, "*B N T W"]:
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    normals, offsets = planes[:, :-1].astype(dtype), planes[:, -1].astype(dtype)

    def codes(query: Float[Array, "... H"]) -> UInt32[Array, "... W"]:
        sides = jnp.einsum(
            "...h,bh->...b", query.astype(dtype), normals, precision=lax.Precision.HIGHEST
        )
        return pack_bits(sides > offsets, axis=-1)

    # Queries are taken as they lie in memory: to bring their heads together would cost more. On a
    # CPU the products of a few thousand stay in its caches.
    def in_turn(query):
        at_once = max(1, CPU_BYTES_IN_FLIGHT // (8 * len(planes)))
        flat = lax.map(codes, query.reshape(-1, query.shape[-1]), batch_size=at_once)
        return flat.reshape(*query.shape[:-1], -1)

    found = lax.platform_dependent(lax.stop_gradient(query), cpu=in_turn, default=codes)
    return jnp.swapaxes(found, -3, -2)


def pack_bits(bits: Bool[Array, "..."], *, axis: int) -> UInt32[Array, "..."]:
    """Packs an axis of bits into words, the last one filled up with zeros."""
    bits = jnp.moveaxis(bits, axis, 0)
    num_bits, *rest = bits.shape
    words = num_words(num_bits)
    bits = jnp.pad(bits, [(0, words * WORD - num_bits)] + [(0, 0)] * len(rest))
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(WORD, *[1] * len(rest))
    shifted = bits.reshape(words, WORD, *rest).astype(jnp.uint32) << places
    return jnp.moveaxis(jnp.sum(shifted, axis=1, dtype=jnp.uint32), 0, axis)


def unpack_bits(codes: UInt32[Array, "... W"], num_bits: int) -> Bool[Array, "... bits"]:
    """The ``num_bits`` bits of packed codes."""
    bits = (codes[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1  # ... W 32
    return bits.reshape(*codes.shape[:-1], -1)[..., :num_bits].astype(bool)
