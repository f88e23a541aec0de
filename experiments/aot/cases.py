"""The programs that are compiled: attention as users call it, and kernels one at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
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
    """

    name: str
    length: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    elements: int | None = None

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
    return target in TPUS or (target == "h100" and jax.__version_info__ >= (0, 11))


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


def kernels(target: str, device: Any, selection: Selection) -> Iterator[Case]:
    """The kernels whose cycles are estimated; each runs by itself, for one head."""
    del device
    if not selection.cycles or target not in TPUS or target == "v4":
        return
    yield from map(_kernel, *zip(*_kernel_calls(), strict=True))


def _kernel(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Case:
    return Case(name, CYCLES_LENGTH, function, arguments)


def _kernel_calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    length, dim = CYCLES_LENGTH, CYCLES_HEAD_DIM
    valid = _of(bool, 1, length)

    def lloyd(metric: Callable[..., Any]) -> Callable[..., Any]:
        return partial(
            kmeans.lloyd, metric(CLUSTERS, 64 if metric is kmeans.hamming_metric else dim)
        )

    # One assignment with its sums: libtpu takes the search for new centroids of empty clusters,
    # which later ones may make, to go on without end.
    codes, points = _of(jnp.int32, 1, 2, length), _of(jnp.float32, 1, dim, length)
    for name, metric, x in (
        ("Hamming", kmeans.hamming_metric, codes),
        ("Euclidean", kmeans.euclidean_metric, points),
    ):
        starts = _of(x.dtype, 1, x.shape[1], CLUSTERS)

        def assign(x, starts, valid, metric=metric):
            return lloyd(metric)(x, starts, valid, 1)

        yield f"K-means, {name}, an assignment", assign, (x, starts, valid)

    rows = _of(jnp.bfloat16, 1, length, dim)
    attend = partial(centroid_attention.centroid_attention, topk=TOPK, scale=dim**-0.5)
    for subclusters in (1, 4):
        centroids = _of(jnp.float32, 1, CLUSTERS, subclusters, dim)
        share = None if subclusters == 1 else _of(jnp.float32, 1, CLUSTERS, subclusters)
        arguments = (centroids, rows, rows, None, None, share)
        yield f"centroid attention, R={subclusters}", attend, arguments

        def attended(*arguments):
            found = attend(*arguments)
            return jnp.sum(found.tail_mean) + jnp.sum(found.tail_lse)

        yield f"centroid attention, R={subclusters}, backward", _gradient(attended), arguments

    size = grouped_attention.tile_size(length, CLUSTERS, rows.dtype)
    tiles = length // size + CLUSTERS
    keys = _of(jnp.bfloat16, 1, CLUSTERS, TOPK, dim)
    group = partial(grouped_attention.grouped_attention, scale=dim**-0.5)
    arguments = (
        _of(jnp.bfloat16, 1, tiles, size, dim),
        _of(jnp.int32, 1, tiles),
        keys,
        keys,
        None,
        None,
        _of(jnp.float32, 1, CLUSTERS, dim),
        _of(jnp.float32, 1, tiles, size),
    )
    yield "grouped attention", _in_order(group), arguments

    def grouped(query, cluster, key, value, bias, valid, tail_mean, tail_lse):
        def loss(query, key, value):
            found = group(query, cluster, key, value, bias, valid, tail_mean, tail_lse)
            return jnp.sum(found.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    yield "grouped attention, backward", _in_order(grouped), arguments

    heads = (_of(jnp.bfloat16, 1, 1, length, dim),) * 3
    yield "flash attention, its default blocks", flash.flash_attention, heads
    blocks = flash.BlockSizes(block_q=512, block_k_major=512, block_k=512, block_b=1)
    yield (
        "flash attention, blocks of 512",
        partial(flash.flash_attention, block_sizes=blocks),
        heads,
    )


def _of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(loss, argnums=(0, 1, 2))


def _in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same with clusters whose tiles are two each, in order.

    The kernel reads the cluster of a tile from memory; libtpu does not estimate what depends on it.
    """

    def of_cluster(self, keys, place):
        def spec(tile: int, x):
            def index(g, step, *_):
                return place(g, tile), step // 2, 0, 0

            return pl.BlockSpec((None, None, *x.shape[2:]), index)

        return tuple(jax.tree.map(partial(spec, tile), keys) for tile in range(self.step_tiles))

    def traced(*arguments):
        with mock.patch.object(grouped_attention._Grid, "_of_cluster", of_cluster):
            return function(*arguments)

    return traced
