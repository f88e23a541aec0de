"""Bodies of the kernels for Hopper and Blackwell GPUs, in Mosaic GPU and bfloat16.

A warpgroup works on 64 rows at a time, in the registers in which Hopper multiplies, and to which
Blackwell can load its products: ``ROWS`` and ``COLUMNS`` are the layouts of what belongs to a row
or to a column of a product. ``products`` is what the two do differently.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Shaped

from clustax import kernels
from clustax.kernels.centroid_attention import Shape
from clustax.kernels.common import round_up

_versions: Any = plgpu  # for what differs between them

HEIGHT = 64  # rows of a product of a warpgroup
WIDTH = 64  # dims of vectors come in multiples of this: 128 bytes of bfloat16
ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
MAX_TOPK = 128  # lists of top-k keys are in registers
MAX_DIM = 128  # and so are gradients of keys and of values, at once
SHARED_BYTES = 200 * 2**10  # of the 227 KiB that a block of threads may have
BLOCKS = 16  # of threads for a head, at least: few heads have to keep all multiprocessors busy
MAX_TILES = 16  # of rows, one after the other in a block


def refusal(shape: Shape) -> str | None:
    """Why the kernels of attention cannot serve such a call, or None."""
    if shape.dtype != jnp.bfloat16:
        return f"its kernels for GPUs take bfloat16, not {shape.dtype.name}"
    if shape.topk > MAX_TOPK:
        return f"its kernels for GPUs select at most {MAX_TOPK} keys, not topk={shape.topk}"
    if max(shape.head_dim, shape.value_dim) > MAX_DIM:
        return (
            f"its kernels for GPUs take dims up to {MAX_DIM}, not {shape.head_dim} and "
            f"{shape.value_dim}"
        )
    head_dim, value_dim = (round_up(x, WIDTH) for x in (shape.head_dim, shape.value_dim))
    # Centroids in two parts, two tiles of keys and of values, weights.
    columns = (2 * shape.num_subclusters + 2) * head_dim + 2 * value_dim + HEIGHT
    if 2 * HEIGHT * columns > SHARED_BYTES:
        return (
            f"num_subclusters={shape.num_subclusters} with dims {shape.head_dim} and "
            f"{shape.value_dim} exceed the memory that threads of a GPU share"
        )
    return None


def tiles_of_block(length: int) -> int:
    """How many tiles of ``HEIGHT`` rows a block of threads has, of so many rows.

    It is the same, or divides their number, when they are padded to a multiple of it.
    """
    tiles = -(-length // HEIGHT) // BLOCKS
    return min(MAX_TILES, 1 << max(0, tiles.bit_length() - 1))


def of_rows(x: Shaped[Array, " n"], shape: tuple[int, int]) -> Shaped[Array, "n m"]:
    """What belongs to each row, for every element of it."""
    return lax.broadcast_in_dim(x, shape, (0,))


def of_columns(ref: Any, shape: tuple[int, int]) -> Shaped[Array, "n m"]:
    """What belongs to each column, in shared memory, for every element of it."""
    return lax.broadcast_in_dim(load(ref, COLUMNS), shape, (1,))


def load(ref: Any, layout: Any) -> Shaped[Array, "..."]:
    """What shared memory holds, in registers of a layout."""
    return _load(ref, layout=layout)


def load_rows(ref: Any) -> Shaped[Array, " n"]:
    """What belongs to each row, in global memory."""
    return _load(ref, layout=ROWS, optimized=False)


def _load(ref: Any, **options: Any) -> Shaped[Array, "..."]:
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # JAX 0.10 wants one
    return _versions.load(ref, *index, **options)


def launch(
    name: str,
    body: Callable[..., None],
    operands: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: dict[str, int],
) -> list[Array]:
    """Runs ``body`` on references to operands and outputs, for every point of a grid."""
    body.__name__ = name  # how profilers show it
    interpreted = _versions.InterpretGPUParams() if kernels.interpret.value else None
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreted,
    )(*operands)


def pad(x: Shaped[Array, "..."], axis: int, multiple: int, value: Any = 0) -> Shaped[Array, "..."]:
    """Lengthens an axis to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
