"""Matrix products, where generations of GPUs differ.

Hopper's matrix unit sums up in registers, and the warpgroup that asked for a product waits for it.
Blackwell's sums up in a memory of its own, from which registers are loaded, and arrives at a
barrier when it is done. Both take operands of bfloat16 from shared memory, and 64 rows of what
both make come in the same layout of registers: so this is all that bodies of kernels leave open.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from clustax import kernels


class Factors(NamedTuple):
    """Operands of a product, in shared memory."""

    left: Any  # n m
    right: Any  # m l


def matrices(*shape: int, swizzle: int = 128) -> Any:
    """Shared memory for operands, whose rows are multiples of ``swizzle`` bytes."""
    if _is_blackwell():  # has the two halves of the columns of 64 rows in different places
        swizzle //= 2
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def product(
    shape: tuple[int, int], *factors: Factors, plus: Float[Array, "n l"] | None = None
) -> Float[Array, "n l"]:
    """The sum of some products, and of what is in registers, in registers."""
    # Hopper can start with it. The interpreter cannot: JAX 0.12 has forgotten about it there.
    starts = plus is not None and not _is_blackwell() and kernels.interpret.value is None

    def multiply(sums):
        if starts:
            sums[...] = plus
        add(sums, *factors, anew=True)
        return read(sums) if starts or plus is None else read(sums) + plus

    return pl.run_scoped(multiply, accumulator(shape))


def each(shape: tuple[int, int], *sums_of: Sequence[Factors]) -> list[Float[Array, "n l"]]:
    """Several sums of products, all under way before the first is waited for, in registers."""

    def multiply(*sums):
        add_each(sums, sums_of, anew=True)
        return [read(each) for each in sums]

    return pl.run_scoped(multiply, *(accumulator(shape) for _ in sums_of))


def at_once() -> int:
    """How many products should be under way."""
    # Blocks of a multiprocessor share the memory that Blackwell's sums are in.
    return 1 if _is_blackwell() else 4


def accumulator(shape: tuple[int, int]) -> Any:
    """What holds sums of products, for ``pl.run_scoped``: 64 or 128 rows."""
    return plgpu.TMEM(shape, jnp.float32) if _is_blackwell() else plgpu.WGMMAAccumulatorRef(shape)


def add(sums: Any, *factors: Factors, anew: Any = False) -> None:
    """Adds products to an accumulator, and waits until they are there; see ``add_each``."""
    add_each([sums], [factors], anew)


def add_each(
    all_sums: Sequence[Any], sums_of: Sequence[Sequence[Factors]], anew: Any = False
) -> None:
    """Adds products to each of several accumulators, and waits until all are there.

    Args:
      all_sums: the accumulators.
      sums_of: the factors of each product, for each accumulator.
      anew: whether what is in the accumulators does not count, as nothing was added before.
    """
    pairs = list(zip(all_sums, sums_of, strict=True))
    if not _is_blackwell():  # its accumulators start at zero
        for sums, factors in pairs:
            for left, right in factors:
                plgpu.wgmma(sums, left, right)
        plgpu.wgmma_wait(0)
        return

    # Of a constant JAX 0.10 takes no array.
    first = not anew if isinstance(anew, bool) else jnp.logical_not(anew)

    def multiply(done):
        for sums, factors in pairs:
            for number, (left, right) in enumerate(factors):
                keeps = True if number else first
                plgpu.tcgen05_mma(sums, left, right, accumulate=keeps)
        plgpu.tcgen05_commit_arrive(done)
        plgpu.barrier_wait(done)

    pl.run_scoped(multiply, plgpu.Barrier(orders_tensor_core=True))


def read(sums: Any) -> Float[Array, "n l"]:
    """What an accumulator holds."""
    if not _is_blackwell():
        return sums[...]
    layout = plgpu.Layout.WGMMA if sums.shape[0] == 64 else plgpu.Layout.TCGEN05
    loaded = plgpu.async_load_tmem(sums, layout=layout)
    plgpu.wait_load_tmem()  # before any warp asks for products that overwrite it
    return loaded


def _is_blackwell() -> bool:
    return kernels.device() == "blackwell"
