"""One problem per attention head, or per row of one: how many of them are worked on at once."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree, Shaped

# On a CPU the intermediate arrays of the heads in flight should stay in its caches: touching fresh
# memory costs more there than the arithmetic on it.
CPU_BYTES_IN_FLIGHT = 2**22
# On a TPU they should not take most of its memory where sequences are long; such heads are enough
# to fill it.
TPU_BYTES_IN_FLIGHT = 2**27
# A single head may need more. From a few times this on, each pass over such arrays gets slower.
CPU_BYTES_IN_BLOCK = 2**24


def map_heads(
    head: Callable[..., PyTree],
    *args: PyTree[Shaped[Array, "..."]],
    head_bytes: int,
    in_axes: Sequence[int] | None = None,
    out_axis: int = 1,
    shared: tuple[PyTree, ...] = (),
) -> PyTree[Shaped[Array, "..."]]:
    """Applies ``head`` to every batch entry and head.

    A GPU takes all heads at once; a CPU takes as many as have their intermediate arrays, of
    ``head_bytes`` a head, in its caches, and a TPU as many as leave most of its memory. Gradients
    recompute the intermediate arrays, so that only those of the heads in flight need memory.

    Args:
      head: what is done to each, called with ``shared`` and ``args``; it must not close over
        arrays.
      args: arrays with a leading axis for the batch, and another one for the heads.
      head_bytes: how much memory the intermediate arrays of a head take.
      in_axes: where the heads are in each argument; all are 1 if None.
      out_axis: where they are in the results.
      shared: arguments that are the same for all heads, without these axes.
    """
    in_axes = (1,) * len(args) if in_axes is None else tuple(in_axes)
    no_axes = (None,) * len(shared)

    def at_once(shared, *args):
        heads = jax.vmap(head, (*no_axes, *(axis - 1 for axis in in_axes)), out_axis - 1)
        batch = jax.vmap(jax.checkpoint(heads), (*no_axes, *(0 for _ in args)))
        return batch(*shared, *args)

    def in_turn(bytes_in_flight, shared, *args):
        at_once = max(1, bytes_in_flight // max(1, head_bytes))
        return _in_turn(head, shared, args, in_axes, out_axis, at_once)

    num_heads = math.prod(_batch_and_heads(args, in_axes))
    is_much = num_heads * head_bytes > TPU_BYTES_IN_FLIGHT
    return lax.platform_dependent(
        shared,
        *args,
        cpu=partial(in_turn, CPU_BYTES_IN_FLIGHT),
        tpu=partial(in_turn, TPU_BYTES_IN_FLIGHT) if is_much else at_once,
        default=at_once,
    )


def _batch_and_heads(args: Sequence[PyTree], in_axes: Sequence[int]) -> tuple[int, int]:
    return next(
        (x.shape[0], x.shape[axis])
        for arg, axis in zip(args, in_axes, strict=True)
        for x in jax.tree.leaves(arg)
    )


def _in_turn(
    head: Callable[..., PyTree],
    shared: tuple[PyTree, ...],
    args: tuple[PyTree, ...],
    in_axes: tuple[int, ...],
    out_axis: int,
    at_once: int,
) -> PyTree:
    """A few heads at a time, of one batch entry.

    They are cut out where they lie in memory, and their results are put where they belong: to bring
    the heads of all arguments together would take copies of all of them. Gradients do take these,
    as the gradient of what is cut out would be as large as all that it is cut from.
    """

    def of_args(function: Callable[[Array, int], Any], args: Sequence[PyTree]) -> list[PyTree]:
        return [
            jax.tree.map(lambda x, axis=axis: function(x, axis), arg)
            for arg, axis in zip(args, in_axes, strict=True)
        ]

    batch, num_heads = _batch_and_heads(args, in_axes)
    size = max(n for n in range(1, min(num_heads, at_once) + 1) if num_heads % n == 0)
    num_parts = num_heads // size

    def heads(shared, args):  # without the batch axis
        if size == 1:  # XLA makes more copies where there is an axis of one head
            args = of_args(lambda x, axis: jnp.squeeze(x, axis - 1), args)
            return jax.tree.map(lambda x: jnp.expand_dims(x, out_axis - 1), head(*shared, *args))
        axes = (*(None for _ in shared), *(axis - 1 for axis in in_axes))
        return jax.vmap(head, axes, out_axis - 1)(*shared, *args)

    def place(ndim: int, axis: int, part: Int[Array, ""]) -> list[Any]:
        start: list[Any] = [jnp.zeros_like(part)] * ndim
        start[0], start[axis] = part // num_parts, part % num_parts * size
        return start

    @jax.custom_jvp
    def in_place(shared, args):
        def results(part):
            def cut(x, axis):
                sizes = list(x.shape)
                sizes[0], sizes[axis] = 1, size
                return lax.dynamic_slice(x, place(x.ndim, axis, part), sizes)[0]

            return heads(shared, of_args(cut, args))

        def empty(x):
            shape = [batch, *x.shape]
            shape[out_axis] = num_heads
            return jnp.zeros(shape, x.dtype)

        def step(part, out):
            def put(out, x):
                return lax.dynamic_update_slice(out, x[None], place(out.ndim, out_axis, part))

            return jax.tree.map(put, out, results(part))

        out = jax.tree.map(empty, jax.eval_shape(results, jnp.int32(0)))
        return lax.fori_loop(0, batch * num_parts, step, out)

    def together(shared, args):
        def parts(x, axis):  # B … N … -> P … size …
            x = x.reshape(*x.shape[:axis], num_parts, size, *x.shape[axis + 1 :])
            x = jnp.moveaxis(x, axis, 1)
            return x.reshape(-1, *x.shape[2:])

        def whole(x):
            x = jnp.moveaxis(x.reshape(batch, num_parts, *x.shape[1:]), 1, out_axis)
            return x.reshape(*x.shape[:out_axis], num_heads, *x.shape[out_axis + 2 :])

        each = jax.checkpoint(lambda args: heads(shared, args))
        return jax.tree.map(whole, lax.map(each, of_args(parts, args)))

    @in_place.defjvp
    def _(primals, tangents):
        return jax.jvp(together, primals, tangents)

    return in_place(shared, args)


def map_rows(
    function: Callable[..., PyTree], *args: Shaped[Array, "C ..."], row_bytes: int
) -> PyTree[Shaped[Array, "C ..."]]:
    """Applies to arrays of C rows each a function that treats all rows alike.

    A CPU takes blocks of rows where the intermediate arrays, of ``row_bytes`` a row, are large;
    accelerators take all rows at once.
    """
    num_rows = len(args[0])
    size = -(-num_rows // -(-num_rows * row_bytes // CPU_BYTES_IN_BLOCK))
    if size == num_rows:
        return function(*args)
    num_blocks = -(-num_rows // size)

    def in_blocks(*args):
        def cut(x):
            x = jnp.pad(x, [(0, num_blocks * size - num_rows), *((0, 0),) * (x.ndim - 1)])
            return x.reshape(num_blocks, size, *x.shape[1:])

        out = lax.map(lambda block: function(*block), tuple(map(cut, args)))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], out)

    return lax.platform_dependent(*args, cpu=in_blocks, default=function)
