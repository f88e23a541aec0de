"""One problem per attention head: how many of them are worked on at once."""

from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, PyTree, Shaped

# On a CPU the intermediate arrays of the heads in flight should stay in its caches: touching fresh
# memory costs more there than the arithmetic on it.
CPU_BYTES_IN_FLIGHT = 2**20


def map_heads(
    head: Callable[..., PyTree], *args: PyTree[Shaped[Array, "B N ..."]], head_bytes: int
) -> PyTree[Shaped[Array, "B N ..."]]:
    """Applies ``head`` to every entry of the two leading axes of the arguments.

    Accelerators take all heads at once; a CPU takes as many as have their intermediate arrays, of
    ``head_bytes`` a head, in its caches. Gradients recompute the intermediate arrays, so that only
    those of the heads in flight need memory.
    """
    batch, heads = jax.tree.leaves(args)[0].shape[:2]
    at_once = max(1, min(batch * heads, CPU_BYTES_IN_FLIGHT // max(1, head_bytes)))
    head = jax.checkpoint(head)

    def in_turn(*args):
        # A batch of one, which has an axis of its own, would take one more copy of all arguments.
        batch_size = at_once if at_once > 1 else None
        return lax.map(lambda each: head(*each), args, batch_size=batch_size)

    flat = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), args)
    result = lax.platform_dependent(*flat, cpu=in_turn, default=jax.vmap(head))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), result)
