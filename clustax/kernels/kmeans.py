"""Lloyd's K-means as one kernel: all iterations, of either metric, with the centroids on chip.

The grid goes over heads, iterations and blocks of queries, so that the pipeline fetches blocks
ahead, and only once where one block is all. Queries fill lanes. Scores, centroids by queries, come
from the matrix unit; where they are smallest makes a one-hot matrix, by which the matrix unit sums
up the points of each cluster. Codes stay packed until they are in registers, where bits turn into
numbers, 1 for 0 and -1 for 1, whose products count the bits that differ. Numbers of float32 are
taken apart into several of bfloat16, which lose nothing. Distances between logits need no other
points than queries: the covariance of the keys is multiplied to centroids.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from clustax import kernels
from clustax.kernels.common import VMEM_BYTES, bfloat16_parts, round_up

LANES = 128
PACKED = 16  # rows of bfloat16 in a register
WORD = 32  # bits in a word of a code
CHUNK = 256  # queries that are worked on at once; twice as many do not fit into registers
FEW_REGISTERS = ("TPU v4",)  # kinds of TPUs that have 32, not 64: half as many queries fit
EXACT = 2**24  # float32 holds all integers up to this one
PARTS = 3  # numbers of bfloat16 that one of float32 is worth
PROBES = 64  # centroids that are worked on at once in a space; more do not fit into registers
NORMS_BYTES = 2**25  # of points in float32, for their norms
NEVER = float(jnp.finfo(jnp.float32).max)  # the score of a row that is no centroid


@dataclasses.dataclass(frozen=True)
class KmeansBlocks:
    """How much of the problem a step of the grid takes.

    Attributes:
      queries: the number of queries, a multiple of 128; multiples of 256 are faster.
      heads: the number of heads, at least 1; it divides that of all heads.
      chunk: the number of queries that are worked on at once, a multiple of 128; fewer where it
        does not divide all queries of a step.
    """

    queries: int
    heads: int = 1
    chunk: int = CHUNK

    def __post_init__(self):
        """Refuses sizes that the layout on chip does not allow."""
        if self.queries < 1 or self.queries % LANES:
            raise ValueError(f"queries must be a multiple of {LANES}, got {self.queries}.")
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}.")
        if self.chunk < 1 or self.chunk % LANES:
            raise ValueError(f"chunk must be a multiple of {LANES}, got {self.chunk}.")

    @classmethod
    def default(cls, num_heads: int, length: int, width: int, itemsize: int):
        """As many queries as half the memory holds, and several heads where these are few."""
        most = min(8192, VMEM_BYTES // 2 // _bytes_per_query(width, itemsize))
        most = max(LANES, most // CHUNK * CHUNK)
        share = -(-length // -(-length // most))  # all blocks get about as many
        queries = round_up(share, LANES if share <= LANES else CHUNK)
        at_once = max(1, 2048 // queries)
        heads = max(n for n in range(1, at_once + 1) if num_heads % n == 0)
        return cls(queries, heads, CHUNK // 2 if kernels.kind() in FEW_REGISTERS else CHUNK)


def refusal(length: int, width: int, dtype: jnp.dtype, num_clusters: int) -> str | None:
    """Why the kernel cannot serve codes of ``width`` words, or points of that dim, or None."""
    dtype = jnp.dtype(dtype)
    is_code = dtype == jnp.uint32
    if not is_code and dtype.itemsize > 4:
        return f"its kernels take no {dtype.name}"
    dim = WORD * width if is_code else width
    if length >= EXACT or (is_code and 2 * _power_of_two(num_clusters) * dim >= EXACT):
        return f"T={length} queries in C={num_clusters} clusters exceed what it can count"
    rows = round_up(num_clusters, PACKED)
    needed = (
        VMEM_BYTES // 2  # blocks
        + 4 * length  # distances
        + round_up(rows, LANES) * dim * 4 * 8  # centroids, in their several forms
        + rows * CHUNK * 4 * 4  # scores
        + 2 * _num_parts(dtype) * dim * CHUNK * 2
    )
    if needed > VMEM_BYTES:
        return f"T={length} queries in C={num_clusters} clusters exceed its memory"
    return None


def hamming(
    codes: UInt32[Array, "G T W"],
    start: Int[Array, "G C"],
    valid: Bool[Array, "G T"],
    *,
    num_bits: int,
    num_iterations: int,
    blocks: KmeansBlocks | None = None,
) -> tuple[Int[Array, "G T"], Int[Array, "G C"]]:
    """Clusters the codes of all heads, each as :func:`clustax.kmeans.hamming` does.

    Args:
      codes: packed codes; unused bits are 0.
      start: positions of the codes that start the centroids.
      valid: which codes count; the others are assigned to C.
      num_bits: number of bits in a code.
      num_iterations: number of assignments.
      blocks: how much a step takes; :meth:`KmeansBlocks.default` if None.

    Returns:
      The assignment, in [0, C], and the number of members of each cluster.

    >>> codes = jnp.array([[[0b0000], [0b1111], [0b0001], [0b0111]]], jnp.uint32)  # G = 1, T = 4
    >>> start, valid = jnp.array([[0, 1]]), jnp.ones((1, 4), bool)
    >>> with kernels.interpret("tpu"):
    ...     hamming(codes, start, valid, num_bits=4, num_iterations=2)
    (Array([[0, 1, 0, 1]], dtype=int32), Array([[2, 2]], dtype=int32))
    """
    del num_bits  # bits that are not used are alike, and change no distance
    codes = jnp.where(valid[..., None], codes, 0)
    words = lax.bitcast_convert_type(jnp.swapaxes(codes, 1, 2), jnp.int32)
    metric = hamming_metric(start.shape[1], WORD * codes.shape[2])
    return lloyd(metric, words, _starts(words, start), valid, num_iterations, blocks)


def euclidean(
    points: Float[Array, "G T H"],
    start: Int[Array, "G C"],
    valid: Bool[Array, "G T"],
    covariance: Float[Array, "G H H"] | None = None,
    *,
    num_iterations: int,
    blocks: KmeansBlocks | None = None,
) -> tuple[Int[Array, "G T"], Int[Array, "G C"]]:
    """Clusters points: as :func:`clustax.kmeans.euclidean` does; the rest is as in :func:`hamming`.

    Points of bfloat16 take a third of the time, and give the same clusters as float32 ones. With a
    covariance M the squared distance of x and y is (x - y)ᵀ M (x - y).
    """
    if points.dtype != jnp.bfloat16:
        points = points.astype(jnp.float32)
    metric = euclidean_metric(start.shape[1], points.shape[2])
    points = jnp.swapaxes(jnp.where(valid[..., None], points, 0), 1, 2)
    starts = _starts(points, start)
    if covariance is None:
        norms = jnp.sum(points.astype(jnp.float32) ** 2, axis=1)
        return lloyd(metric, points, starts, valid, num_iterations, blocks, norms)
    count = jnp.maximum(valid.sum(axis=1), 1)[:, None, None]
    mean = jnp.sum(points, axis=2, keepdims=True, dtype=jnp.float32) / count  # G H 1
    norms = _norms(points, covariance, mean)
    space = covariance, mean
    return lloyd(metric, points, starts, valid, num_iterations, blocks, norms, space)


def _norms(
    points: Float[Array, "G H T"], covariance: Float[Array, "G H H"], mean: Float[Array, "G H 1"]
) -> Float[Array, "G T"]:
    """The squared distances of points from their mean."""

    def of_head(head):
        points, covariance, mean = head
        slope = jnp.matmul(covariance, mean, precision=lax.Precision.HIGHEST)  # H 1
        points = points.astype(jnp.float32)
        # What was bfloat16 keeps all bits in the matrix unit's float32.
        product = partial(jnp.matmul, precision=lax.Precision.DEFAULT)
        parts = (part.astype(jnp.float32) for part in bfloat16_parts(covariance))
        moved = sum((product(part, points) for part in parts), -2 * slope)
        return jnp.sum(points * moved, axis=0) + jnp.sum(mean * slope)

    # All heads in float32 may be larger than whatever else attention needs.
    at_once = max(1, NORMS_BYTES // (4 * math.prod(points.shape[1:])))
    return lax.map(of_head, (points, covariance, mean), batch_size=at_once)


def _starts(points: Shaped[Array, "G R T"], start: Int[Array, "G C"]) -> Shaped[Array, "G R C"]:
    return jnp.take_along_axis(points, start[:, None], axis=2)


Space = tuple[Float[Array, "*G D D"], Float[Array, "*G D 1"]]
"""The covariance of the keys, by which distances are measured, and the mean of the points."""


class Metric(NamedTuple):
    """What the two metrics do in ways of their own.

    Attributes:
      dim: the number D of numbers in a point.
      num_probes: of how many matrices of bfloat16 the sum is taken for scores.
      unpack: makes numbers (D n) of what memory holds.
      probe: what points are multiplied with for scores (n D), and what is added (n 1), for some of
        the centroids (n D), their indices (n 1), and the space they are in.
      nearest: of scores and indices of rows (C n each): index of the nearest centroid, distance to
        it but for the norm of the point (1 n each).
      update: the centroids (D C), from the sums of their members and the number of these.
    """

    dim: int
    num_probes: int
    unpack: Callable[[Array], Array]
    probe: Callable[[Array, Array, Space | None], tuple[Array, Array]]
    nearest: Callable[[Array, Array], tuple[Array, Array]]
    update: Callable[[Array, Array], Array]


def hamming_metric(num_clusters: int, dim: int) -> Metric:
    """Scores are distance · scale + index: one minimum finds both."""
    scale = _power_of_two(num_clusters)

    def probe(centroids, index, _):  # the distance is (D - the product) / 2
        offset = jnp.where(index < num_clusters, dim * scale / 2 + index, NEVER)
        return -scale / 2 * centroids, offset

    def nearest(scores, rows):
        best = jnp.min(scores, axis=0, keepdims=True)
        distance = jnp.floor(best / scale)
        return best - distance * scale, distance

    def update(sums, counts):
        return jnp.where(sums < 0, -1.0, 1.0)

    return Metric(dim, 1, _unpack_bits, probe, nearest, update)


def euclidean_metric(num_clusters: int, dim: int) -> Metric:
    """Scores are |c|² - 2 x·c, as |x|² is the same for all.

    In a space they are (c - m)ᵀ M (c - m) - 2 (x - m)ᵀ M (c - m): from the mean on, points and
    centroids have less to lose to rounding.
    """

    def probe(centroids, index, space):
        moved, origin = centroids, 0
        if space is not None:
            covariance, mean = space
            origin = mean.T
            moved = jnp.dot(centroids - origin, covariance, precision=lax.Precision.HIGHEST)
        offset = jnp.sum((centroids + origin) * moved, axis=1, keepdims=True)
        return -2 * moved, jnp.where(index < num_clusters, offset, NEVER)

    def nearest(scores, rows):
        best = jnp.min(scores, axis=0, keepdims=True)
        index = jnp.where(scores == best, rows, num_clusters - 1)
        return jnp.min(index, axis=0, keepdims=True), best

    def update(sums, counts):
        return sums / jnp.maximum(counts, 1)

    return Metric(dim, PARTS, lambda points: points, probe, nearest, update)


def _unpack_bits(words: Int[Array, "W n"]) -> Float[Array, "bits n"]:
    """1 for 0 and -1 for 1, as bfloat16, whose sign is its highest bit.

    Bits s and s + 16 of a word go to one place, as two numbers there: the order of bits is another,
    but the same for all codes.
    """
    shift = lax.broadcasted_iota(jnp.int32, (WORD // 2, words.shape[1]), 0)
    one, sign = 0x3F803F80, -0x7FFF8000  # two of each
    pairs = [(words[w : w + 1] << shift) & sign | one for w in range(len(words))]
    return jnp.concatenate([pltpu.bitcast(pair, jnp.bfloat16) for pair in pairs])


def lloyd(
    metric: Metric,
    points: Shaped[Array, "G R T"],
    starts: Shaped[Array, "G R C"],
    valid: Bool[Array, "G T"],
    num_iterations: int,
    blocks: KmeansBlocks | None = None,
    norms: Float[Array, "G T"] | None = None,
    space: Space | None = None,
) -> tuple[Int[Array, "G T"], Int[Array, "G C"]]:
    """Clusters points as memory holds them, from those that start the centroids.

    Points that do not count are zero. To each distance that the metric finds the norm of the point
    is added.
    """
    num_heads, width, length = points.shape
    num_clusters = starts.shape[2]
    columns = round_up(num_clusters, PACKED)
    at_once = columns if space is None else min(columns, PROBES)
    rows = round_up(columns, at_once)
    interpret = kernels.interpret.value is not None
    if blocks is None:
        blocks = KmeansBlocks.default(num_heads, length, width, points.dtype.itemsize)
    heads, size = blocks.heads, blocks.queries
    if num_heads % heads:
        raise ValueError(f"heads must divide the {num_heads} heads of all, got {heads}.")
    chunk = math.gcd(size, blocks.chunk)
    pairs = _pairs(points.dtype, metric.num_probes)
    num_blocks = -(-length // size)
    padding = ((0, 0), (0, 0), (0, num_blocks * size - length))

    starts = jnp.pad(starts, ((0, 0), (0, 0), (0, columns - num_clusters)))
    points = jnp.pad(points, padding)
    # What does not count has a norm that none has.
    norms = jnp.where(valid, 0.0 if norms is None else jnp.maximum(norms, 0), -1)[:, None]
    norms = jnp.pad(norms, padding, constant_values=-1)

    def moving(rows):
        return pl.BlockSpec((heads, rows, size), lambda g, i, b: (g, 0, b))

    def staying(rows, columns=columns):
        return pl.BlockSpec((heads, rows, columns), lambda g, i, b: (g, 0, 0))

    def after_last(g, i, b):  # what earlier iterations say is overwritten before it is moved
        return g, 0, jnp.where(i == num_iterations - 1, b, 0)

    kernel = partial(
        _kernel,
        metric=metric,
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        pairs=pairs,
        at_once=at_once,
        # Some CPUs have no products of bfloat16.
        dot=partial(_dot, dtype=jnp.dtype(jnp.float32 if interpret else jnp.bfloat16)),
    )
    assignment, counts = pl.pallas_call(
        kernel,
        grid=(num_heads // heads, num_iterations, num_blocks),
        in_specs=[
            moving(width),
            moving(1),
            staying(width),
            pl.BlockSpec(memory_space=pl.ANY),
            None if space is None else (staying(width, width), staying(width, 1)),
        ],
        out_specs=[pl.BlockSpec((heads, 1, size), after_last), staying(1)],
        out_shape=[
            jax.ShapeDtypeStruct(norms.shape, jnp.int32),
            jax.ShapeDtypeStruct((num_heads, 1, columns), jnp.int32),
        ],
        scratch_shapes=[
            Scratch(
                centroids=pltpu.VMEM((heads, metric.dim, columns), jnp.float32),
                sums=pltpu.VMEM((heads, metric.dim + PACKED, columns), jnp.float32),
                distance=pltpu.VMEM(
                    (heads, round_up(num_blocks * size, 8 * LANES) // LANES, LANES), jnp.float32
                ),
                rows=pltpu.VMEM((rows, metric.dim), jnp.float32),
                probes=pltpu.VMEM((heads, rows, len(pairs) * metric.dim), jnp.bfloat16),
                offset=pltpu.VMEM((heads, rows, LANES), jnp.float32),
                index=pltpu.VMEM((rows, LANES), jnp.float32),
                members=pltpu.VMEM((columns, chunk), jnp.bfloat16),
                parts=(
                    pltpu.VMEM((2, PARTS, metric.dim, chunk), jnp.bfloat16)
                    if points.dtype == jnp.float32
                    else None
                ),
                fetched=pltpu.VMEM((width, LANES), points.dtype),
                semaphore=pltpu.SemaphoreType.DMA,
            )
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="kmeans",
    )(points, norms, starts, points, space)
    return assignment[:, 0, :length], counts[:, 0, :num_clusters]


class Scratch(NamedTuple):
    """What stays on chip from step to step, where it says so for each of several heads."""

    centroids: Any  # heads D C
    sums: Any  # heads D+16 C; of the points of each cluster; from row D on, how many
    distance: Any  # heads T/128 128; from each query to its centroid; -1 if padded
    rows: Any  # C D; the centroids of one head
    probes: Any  # heads C pairs·D; what the parts of each pair are multiplied with
    offset: Any  # heads C 128
    index: Any  # C 128; of each row: read from here, it does not stay in registers
    members: Any  # C chunk; one-hot
    parts: Any  # 2 P D chunk; of the points of two chunks; None if points are their only part
    fetched: Any  # R 128
    semaphore: Any


def _kernel(
    points_ref,  # heads R queries
    norms_ref,  # heads 1 queries; negative if padded
    start_ref,  # heads R C
    all_points,  # G R T, not on chip
    space,  # heads D D, heads D 1; None if distances are between points as they are
    assignment_ref,  # heads 1 queries
    counts_ref,  # heads 1 C
    scratch: Scratch,
    *,
    metric: Metric,
    num_clusters: int,
    num_iterations: int,
    pairs: list[tuple[int, int]],
    at_once: int,
    dot: Callable[[Array, Array, int], Array],
):
    first_head = pl.program_id(0) * points_ref.shape[0]
    iteration, block = pl.program_id(1), pl.program_id(2)
    size, columns = points_ref.shape[2], start_ref.shape[2]
    chunk = scratch.members.shape[1]

    def head(h, _):
        centroids, sums, distance = (ref.at[h] for ref in scratch[:3])
        probes, offsets = scratch.probes.at[h], scratch.offset.at[h]

        def prepare_probes(step, _):
            here = pl.ds(pl.multiple_of(step * at_once, at_once), at_once)
            of_head = None if space is None else (space[0][h], space[1][h])
            probe, offset = metric.probe(scratch.rows[here, :], scratch.index[here, :1], of_head)
            found = _parts(probe, metric.num_probes)
            probes[here, :] = jnp.concatenate([found[j] for _, j in pairs], axis=1)
            offsets[here, :] = jnp.broadcast_to(offset, (at_once, LANES))

        @pl.when((iteration == 0) & (block == 0))
        def _():
            centroids[...] = metric.unpack(start_ref[h]).astype(jnp.float32)
            distance[...] = jnp.full(distance.shape, -1, jnp.float32)

        @pl.when(block == 0)
        def _():
            sums[...] = jnp.zeros(sums.shape, jnp.float32)
            scratch.rows[:columns, :] = centroids[...].T
            scratch.index[...] = jnp.broadcast_to(_iota(len(scratch.index)), scratch.index.shape)
            lax.fori_loop(0, len(scratch.rows) // at_once, prepare_probes, None)

        members, parts = scratch.members, scratch.parts
        last = size // chunk - 1

        def wide(ref):
            return jnp.concatenate([ref[:columns, :]] * (chunk // LANES), axis=1)

        def here(step):
            return pl.ds(pl.multiple_of(step * chunk, chunk), chunk)

        def prepare(step, place):
            if parts is not None:
                for i, part in enumerate(_parts(points_ref[h, :, here(step)], PARTS)):
                    parts[place, i] = part

        def parts_of(step, place):
            if parts is None:
                return [metric.unpack(points_ref[h, :, here(step)])]
            return [parts[place, i] for i in range(PARTS)]

        def assign(step, place):
            norms = norms_ref[h, :, here(step)]
            found = parts_of(step, place)
            # One product of all pairs fills the matrix unit where D does not.
            stack = jnp.concatenate([found[i] for i, _ in pairs])
            scores = wide(offsets) + dot(probes[:columns, :], stack, 0)
            rows = wide(scratch.index)
            index, far = metric.nearest(scores, rows)
            index = jnp.where(norms < 0, num_clusters, index)
            far = jnp.where(norms < 0, -1, jnp.maximum(far + norms, 0))
            assignment_ref[h, :, here(step)] = index.astype(jnp.int32)
            first = (block * size + step * chunk) // LANES
            for row in range(chunk // LANES):
                distance[pl.ds(first + row, 1), :] = far[:, row * LANES : (row + 1) * LANES]
            members[...] = (rows == index).astype(jnp.float32).astype(jnp.bfloat16)

        def add(step, place):
            first, *rest = parts_of(step, place)
            for part in reversed(rest):
                sums[: metric.dim, :] += dot(part, members[...], 1)
            ones = jnp.ones((PACKED, chunk), jnp.bfloat16)
            sums[...] += dot(jnp.concatenate([first, ones]), members[...], 1)

        def work(step, _):  # on three chunks, which do not wait for one another
            place, other = lax.rem(step, 2), lax.rem(step + 1, 2)
            add(jnp.maximum(step - 1, 0), other)
            assign(step, place)
            prepare(jnp.minimum(step + 1, last), other)

        members[...] = jnp.zeros_like(members)  # of a chunk before the first one
        if parts is not None:
            parts[1] = jnp.zeros_like(parts[1])
        prepare(0, 0)
        lax.fori_loop(0, last + 1, work, None)
        add(last, last % 2)

        @pl.when(block == pl.num_programs(2) - 1)
        def _():
            counts = sums[metric.dim : metric.dim + 1, :]
            counts_ref[h] = counts.astype(jnp.int32)

            @pl.when(iteration < num_iterations - 1)
            def _():
                updated = metric.update(sums[: metric.dim, :], counts)
                centroids[...] = jnp.where(counts > 0, updated, centroids[...])
                points = all_points.at[first_head + h]
                fetch = partial(_fetch, points, scratch.fetched, scratch.semaphore, metric.unpack)
                _reseed(centroids, counts, distance, fetch, num_clusters)

    lax.fori_loop(0, points_ref.shape[0], head, None)


def _reseed(centroids, counts, distance, fetch, num_clusters: int):
    """Moves the centroids of empty clusters to queries that are served badly."""
    column = lax.broadcasted_iota(jnp.int32, counts.shape, 1)

    def next_empty(after):
        is_next = (counts == 0) & (column > after)
        return jnp.min(jnp.where(is_next, column, num_clusters))

    def reseed(j):
        farthest, position = _farthest(distance, num_clusters, j)

        @pl.when(farthest >= 0)
        def _():
            centroids[...] = jnp.where(column == j, fetch(position), centroids[...])

        return next_empty(j)

    lax.while_loop(lambda j: j < num_clusters, reseed, next_empty(-1))


def _farthest(distance, num_clusters: int, j):
    """The largest distance of each C-th query from j on, and the first query that has it."""
    rows = 8
    place = LANES * lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
    place += lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

    def farther(step, best):
        position = step * (rows * LANES) + place
        distances = distance[pl.ds(pl.multiple_of(step * rows, rows), rows), :]
        is_farther = (lax.rem(position, num_clusters) == j) & (distances > best[0])
        return jnp.where(is_farther, distances, best[0]), jnp.where(is_farther, position, best[1])

    none = jnp.full(place.shape, -1, jnp.float32), jnp.full(place.shape, EXACT, jnp.int32)
    distances, positions = lax.fori_loop(0, distance.shape[0] // rows, farther, none)
    farthest = jnp.max(distances)
    return farthest, jnp.min(jnp.where(distances == farthest, positions, EXACT))


def _fetch(points, fetched, semaphore, unpack, position) -> Float[Array, "D 1"]:
    """The point at a position, from outside the chip."""
    first = pl.multiple_of(position // LANES * LANES, LANES)
    copy = pltpu.make_async_copy(points.at[:, pl.ds(first, LANES)], fetched, semaphore)
    copy.start()
    copy.wait()
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    numbers = unpack(fetched[...]).astype(jnp.float32)
    return jnp.sum(jnp.where(lane == position - first, numbers, 0), axis=1, keepdims=True)


def _num_parts(dtype: jnp.dtype) -> int:
    """How many numbers of bfloat16 one of a point takes; those of codes are 1 and -1."""
    return PARTS if dtype == jnp.float32 else 1


def _pairs(dtype: jnp.dtype, num_probes: int) -> list[tuple[int, int]]:
    """Which parts of points and of probes are multiplied; what is smallest comes first."""
    parts = reversed(range(_num_parts(dtype)))
    return [(i, j) for i in parts for j in reversed(range(max(1, num_probes - i)))]


def _parts(x: Float[Array, "n m"], count: int) -> list[Float[Array, "n m"]]:
    """Numbers of bfloat16, up to so many, that add up to these; the largest first."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def _dot(x, y, y_axis: int, *, dtype: jnp.dtype) -> Float[Array, "_ _"]:
    """The product over the last axis of x and an axis of y, accumulated in float32."""
    axes = (((1,), (y_axis,)), ((), ()))
    x, y = x.astype(dtype), y.astype(dtype)
    return lax.dot_general(
        x, y, axes, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


def _iota(rows: int) -> Float[Array, "_ 1"]:
    """The index of each row, as float32."""
    return lax.broadcasted_iota(jnp.int32, (rows, 1), 0).astype(jnp.float32)


def _bytes_per_query(width: int, itemsize: int) -> int:
    """On-chip memory of what comes and goes with a query, for two blocks at a time."""
    return 2 * (round_up(width * itemsize, 32) + 2 * 32)


def _power_of_two(size: int) -> int:
    """The lowest one that is at least ``size``."""
    return 1 << (size - 1).bit_length()
