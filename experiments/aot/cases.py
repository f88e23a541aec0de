"""The programs that are compiled: attention as users call it, and kernels one at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clustax import ClusteredAttention
from clustax.kernels import centroid_attention, grouped_attention, kmeans
from experiments import copy_task
from experiments.aot.targets import TPUS
from experiments.common import training

HEADS, CLUSTERS, TOPK = 8, 128, 32
METHODS = {
    "paper": ClusteredAttention.paper(num_clusters=CLUSTERS, topk=TOPK),
    "default": ClusteredAttention(num_clusters=CLUSTERS, topk=TOPK),
}
COPY_CELLS = (("full", None), ("clustered", 100), ("improved", 100), ("lsh", 8))
# The comparison of static cycles is of one head.
CYCLES_LENGTH, CYCLES_HEAD_DIM = 16384, 128


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which programs are wanted."""

    lengths: tuple[int, ...] = (2048, 8192, 65536)
    """Lengths T of sequences."""
    head_dims: tuple[int, ...] = (64, 128)
    """Head dims H."""
    passes: tuple[Literal["forward", "gradient"], ...] = ("forward", "gradient")
    """Programs of attention: the second has all kernels of the first, too."""
    implementations: tuple[Literal["pallas", "xla"], ...] = ("pallas", "xla")
    """Implementations of attention."""
    copy: bool = True
    """Whether to compile training steps of the copy task, for v5e and h100."""
    cycles: bool = True
    """Whether to estimate cycles of kernels, for TPUs but v4."""


class Case(NamedTuple):
    """A program.

    Attributes:
        name: what it is, but for its length.
        length: of its sequences.
        function: what is compiled.
        arguments: what it is called with, as shapes.
        elements: that no array of the program may have; None if any size is fine.
        floor: the operations in matrix products that it cannot do without, and the bytes that it
            has to move; None where nobody counted.
        steps: how often the code of the kernel runs, where it has no loops of its own; None where
            it has some.
    """

    name: str
    length: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    elements: int | None = None
    floor: tuple[int, int] | None = None
    steps: int | None = None

    @property
    def label(self) -> str:
        """The name with the length."""
        return f"{self.name}, T={self.length}"


def programs(target: str, device: Any, selection: Selection) -> Iterator[Case]:
    """The programs whose code is looked at."""
    for implementation in selection.implementations:
        if implementation == "pallas" and not _has_kernels(target):
            continue
        for method in METHODS:
            for pass_ in selection.passes:
                for head_dim in selection.head_dims:
                    for length in selection.lengths:
                        yield _attention(method, implementation, pass_, head_dim, length)
    if selection.copy and target in ("v5e", "h100"):
        for method, size in COPY_CELLS:
            yield _copy_step(method, size, device)


def _has_kernels(target: str) -> bool:
    return target in TPUS or (target in ("h100", "b200") and jax.__version_info__ >= (0, 10, 2))


def _attention(method: str, implementation: str, pass_: str, head_dim: int, length: int) -> Case:
    attention = dataclasses.replace(METHODS[method], implementation=implementation)

    def loss(*args):
        return jnp.sum(attention(*args).astype(jnp.float32) ** 2)

    function = attention if pass_ == "forward" else jax.grad(loss, argnums=(0, 1, 2))
    query = jax.ShapeDtypeStruct((1, length, HEADS, head_dim), jnp.bfloat16)
    # Tiles hold the queries and at most one tile for each cluster besides.
    slots = length + CLUSTERS * grouped_attention.tile_size(length, CLUSTERS, query.dtype)
    quadratic = length * CLUSTERS  # less than T·S and T·k·H
    checked = implementation == "pallas" and slots * head_dim < quadratic
    name = f"{method}, {implementation}, {pass_}, H={head_dim}"
    return Case(name, length, function, (query,) * 3, HEADS * quadratic if checked else None)


def _copy_step(method: Any, size: int | None, device: Any) -> Case:
    """A step of training of the paper's size, as experiments.copy_task makes it."""
    settings, length = copy_task.Settings(), 512
    cell = copy_task.Cell(method, size, length, seed=0)
    mesh = Mesh(np.array([device]), (training.DATA,))
    model = copy_task.build(settings, cell)
    step = training.make_step(
        model, copy_task.copy_loss, training.optimizer(settings.optimisation), mesh
    )

    def place(spec):
        sharding = NamedSharding(mesh, spec)
        return lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    batch = copy_task.batch_of(settings, cell, 0, 0)
    arguments = (
        jax.tree.map(place(PartitionSpec()), step.state),
        jax.tree.map(place(PartitionSpec(training.DATA)), batch),
    )
    return Case(f"copy task, {cell.label}, training step", length, step.apply, arguments)


def kernels(target: str, selection: Selection, counted: bool) -> Iterator[Case]:
    """The kernels whose cycles are counted or estimated; each runs by itself, for one head."""
    if selection.cycles and target in TPUS and target != "v4":
        found = (*_kmeans(), *_centroid_attention(), *_grouped_attention(), *_flash_attention())
        yield from (case for case in found if (case.steps is not None) == counted)


def _kernel(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    products: int,
    rows: int,
    steps: int | None = None,
) -> Case:
    """A kernel of this many products of T × … × H, that moves this many bytes for a query."""
    floor = (2 * CYCLES_LENGTH * CYCLES_HEAD_DIM * products, CYCLES_LENGTH * rows)
    return Case(name, CYCLES_LENGTH, function, arguments, floor=floor, steps=steps)


def _kmeans() -> Iterator[Case]:
    """One assignment with its sums.

    libtpu takes the search for new centroids of empty clusters, which comes before later ones, to
    go on without end.
    """
    dim, lengths = CYCLES_HEAD_DIM, (CYCLES_LENGTH, CLUSTERS)
    valid = _of(bool, 1, CYCLES_LENGTH)
    codes: tuple[Any, ...] = (*(_of(jnp.int32, 1, 2, n) for n in lengths), valid)
    points: tuple[Any, ...] = (
        *(_of(jnp.bfloat16, 1, dim, n) for n in lengths),
        valid,
        _of(jnp.float32, 1, CYCLES_LENGTH),
        (_of(jnp.float32, 1, dim, dim), _of(jnp.float32, 1, dim, 1)),
    )
    for name, metric, arguments in (
        ("Hamming", kmeans.hamming_metric(CLUSTERS, 64), codes),
        ("Euclidean in logit space", kmeans.euclidean_metric(CLUSTERS, dim), points),
    ):
        assign = partial(_assign, metric)
        products = 2 * CLUSTERS * metric.dim // CYCLES_HEAD_DIM
        moved = arguments[0].dtype.itemsize * arguments[0].shape[1] + 4
        yield _kernel(f"K-means, {name}, an assignment", assign, arguments, products, moved)


def _assign(metric, points, starts, valid, norms=None, space=None):
    return kmeans.lloyd(metric, points, starts, valid, 1, norms=norms, space=space)


def _centroid_attention() -> Iterator[Case]:
    keys = _of(jnp.bfloat16, 1, CYCLES_LENGTH, CYCLES_HEAD_DIM)
    attend = partial(centroid_attention.centroid_attention, topk=TOPK, scale=CYCLES_HEAD_DIM**-0.5)

    def loss(*arguments):
        found = attend(*arguments)
        return jnp.sum(found.tail_mean) + jnp.sum(found.tail_lse)

    for subclusters in (1, 4):
        centroids = _of(jnp.float32, 1, CLUSTERS, subclusters, CYCLES_HEAD_DIM)
        share = None if subclusters == 1 else _of(jnp.float32, 1, CLUSTERS, subclusters)
        arguments = (centroids, keys, keys, None, None, share)
        rows, name = subclusters * CLUSTERS, f"centroid attention, R={subclusters}"
        moved = 4 * CYCLES_HEAD_DIM  # keys and values
        yield _kernel(name, attend, arguments, 2 * rows, moved)
        gradient = jax.grad(loss, argnums=(0, 1, 2))
        yield _kernel(f"{name}, backward", gradient, arguments, 5 * rows, 2 * moved)


def _grouped_attention() -> Iterator[Case]:
    size = grouped_attention.tile_size(CYCLES_LENGTH, CLUSTERS, jnp.dtype(jnp.bfloat16))
    tiles = CYCLES_LENGTH // size + CLUSTERS
    keys = _of(jnp.bfloat16, 1, CLUSTERS, TOPK, CYCLES_HEAD_DIM)
    arguments = (
        _of(jnp.bfloat16, 1, tiles, size, CYCLES_HEAD_DIM),
        keys,
        keys,
        _of(jnp.int32, 1, tiles),
        _of(jnp.float32, 1, CLUSTERS, CYCLES_HEAD_DIM),
        _of(jnp.float32, 1, tiles, size),
    )

    def attend(query, key, value, cluster, tail_mean, tail_lse):
        return grouped_attention.grouped_attention(
            query,
            cluster,
            key,
            value,
            tail_mean=tail_mean,
            tail_lse=tail_lse,
            scale=CYCLES_HEAD_DIM**-0.5,
        )

    def loss(*arguments):
        return jnp.sum(attend(*arguments).astype(jnp.float32))

    moved = 4 * CYCLES_HEAD_DIM  # queries and outputs
    steps = tiles // grouped_attention.STEP_TILES
    yield _kernel("grouped attention", attend, arguments, 2 * TOPK, moved, steps)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    rows = 6 * CYCLES_HEAD_DIM  # with the gradients of both
    yield _kernel("grouped attention, backward", gradient, arguments, 5 * TOPK, rows, steps)


def _flash_attention() -> Iterator[Case]:
    """What comes with JAX: as long as the estimate does not run away, or counted."""
    blocks = flash.BlockSizes(block_q=512, block_k_major=512, block_k=512, block_b=1)
    chosen = partial(flash.flash_attention, block_sizes=blocks)
    for name, length, function, steps in (
        ("flash attention, its default blocks", CYCLES_LENGTH // 4, flash.flash_attention, None),
        ("flash attention, blocks of 512", CYCLES_LENGTH, chosen, (CYCLES_LENGTH // 512) ** 2),
    ):
        arguments = (_of(jnp.bfloat16, 1, 1, length, CYCLES_HEAD_DIM),) * 3
        floor = (4 * length**2 * CYCLES_HEAD_DIM, 8 * length * CYCLES_HEAD_DIM)
        yield Case(name, length, function, arguments, floor=floor, steps=steps)


def _of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
