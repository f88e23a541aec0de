"""K-means on GPUs: one kernel assigns points and sums the members of each cluster.

Points and centroids come in parts in bfloat16: codes of ±1 have one, which is exact; float32 has
two, whose three leading products decide as float32 would but for ties. So both metrics are matrix
products: distances are products of points and centroids, sums are products of an indicator of the
assignment and points. Neither distances nor indicators reach global memory. Distances between
logits need no other points than queries: the covariance of the keys is multiplied to centroids.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Int, UInt32

from clustax import kmeans
from clustax.kernels import gpu
from clustax.kernels.common import bfloat16_parts
from clustax.kernels.gpu import products
from clustax.kernels.gpu.products import Factors

SLOTS = 2  # tiles of points in flight
MAX_CLUSTERS, MAX_WIDTH = 128, 128  # sums of all clusters stay in registers


def refusal(length: int, width: int, dtype: jnp.dtype, num_clusters: int) -> str | None:
    """Why the kernel cannot serve codes of ``width`` words, or points of that dim, or None."""
    del length
    is_code = dtype == jnp.uint32
    dim = 32 * width if is_code else width
    if not is_code and dtype != jnp.float32:
        return f"its K-means on GPUs takes no {dtype.name}"
    if num_clusters > MAX_CLUSTERS or dim > MAX_WIDTH:
        return (
            f"its K-means on GPUs serves up to {MAX_CLUSTERS} clusters of up to {MAX_WIDTH} bits "
            f"or dims, not {num_clusters} of {dim}"
        )
    return None


def hamming(
    codes: UInt32[Array, "G T W"],
    start: Int[Array, "G C"],
    valid: Bool[Array, "G T"],
    *,
    num_bits: int,
    num_iterations: int,
) -> tuple[Int[Array, "G T"], Int[Array, "G C"]]:
    """``clustax.kmeans.hamming`` of all heads at once."""
    bits = (codes[..., None] >> jnp.arange(32, dtype=codes.dtype)) & 1
    bits = bits.reshape(*codes.shape[:2], -1)[..., :num_bits]
    points = 2 * bits.astype(jnp.bfloat16) - 1  # G T bits

    def encode(sums, _):
        return jnp.where(sums > 0, 1.0, -1.0)

    def expand(centroids):  # the distance is (bits - x·c) / 2
        offset = jnp.full(centroids.shape[:2], num_bits / 2, jnp.float32)
        return [(-centroids / 2).astype(jnp.bfloat16)], offset

    points, norms = _counted(points, valid), jnp.float32(0)
    return _lloyd(points, [points], norms, start, valid, encode, expand, num_iterations)


def euclidean(
    points: Float[Array, "G T H"],
    start: Int[Array, "G C"],
    valid: Bool[Array, "G T"],
    covariance: Float[Array, "G H H"] | None = None,
    *,
    num_iterations: int,
) -> tuple[Int[Array, "G T"], Int[Array, "G C"]]:
    """``clustax.kmeans.euclidean`` of all heads at once.

    With a covariance M the squared distance of x and y is (x - y)ᵀ M (x - y), and points come in
    bfloat16.
    """
    points = _counted(points, valid)

    def means(sums, counts):
        return sums / jnp.maximum(counts, 1)[..., None]

    if covariance is None:

        def expand(centroids):  # the distance is |c|² - 2 x·c + |x|²
            return bfloat16_parts(-2 * centroids), jnp.sum(centroids**2, axis=-1)

        parts, norms = bfloat16_parts(points), jnp.sum(points**2, axis=-1)
    else:
        product = partial(jnp.einsum, "ghi,gci->gch", precision=lax.Precision.HIGHEST)
        # From their mean m on, points and centroids have less to lose to rounding.
        mean = means(jnp.sum(points, axis=1, dtype=jnp.float32), valid.sum(axis=-1))[:, None]
        slope = product(covariance, mean)  # M m

        def expand(centroids):  # (c - m)ᵀ M (c - m) - 2 (x - m)ᵀ M (c - m) + (x - m)ᵀ M (x - m)
            moved = product(covariance, centroids - mean)
            return bfloat16_parts(-2 * moved), jnp.sum((centroids + mean) * moved, axis=-1)

        parts = [points]
        norms = _norms(points, covariance, 2 * slope[:, 0]) + jnp.sum(mean * slope, axis=-1)
    return _lloyd(points, parts, norms, start, valid, means, expand, num_iterations)


def _lloyd(points, parts, norms, start, valid, centroids_of, expand, num_iterations):
    """Lloyd's algorithm, as in ``clustax.kmeans``.

    Args:
      points: points, or codes of ±1; those that do not count are zero, and add nothing to sums.
      parts: what the kernel takes for them.
      norms: what the distances of the kernel lack.
      start: positions of the points that start the centroids.
      valid: which points count.
      centroids_of: the centroids of clusters, given the sums of their members and how many.
      expand: what the kernel takes for centroids: factors of distances in parts, and what is added.
      num_iterations: number of assignments.
    """
    num_clusters, length = start.shape[1], points.shape[1]
    ids = jnp.arange(num_clusters)
    tiles = gpu.tiles_of_block(length)
    parts = [_aligned(part, tiles * gpu.HEIGHT) for part in parts]

    def assign(centroids, sums):
        centroid_parts, offset = expand(centroids)
        centroid_parts = [_aligned(part, gpu.HEIGHT) for part in centroid_parts]
        offset = gpu.pad(offset, 1, gpu.HEIGHT, jnp.inf)
        index, distance, *sums = _assign(parts, centroid_parts, offset, tiles=tiles, sums=sums)
        index = jnp.where(index < num_clusters, index, 0)[:, :length]  # NaN is nowhere nearest
        index = jnp.where(valid, index, num_clusters)
        counts = jnp.sum(index[:, None] == ids[:, None], axis=-1, dtype=jnp.int32)
        return index, counts, distance[:, :length], *sums

    def step(_, centroids):
        _, counts, distance, sums = assign(centroids, True)
        sums = sums.sum(axis=1)[:, :num_clusters, : points.shape[-1]]
        distance = jnp.where(valid, jnp.maximum(distance + norms, 0), -1)
        index, distance = jax.vmap(partial(kmeans.farthest, num_clusters=num_clusters))(distance)
        reseeded = jnp.where(distance[..., None] >= 0, _rows(points, index), centroids)
        return jnp.where(counts[..., None] > 0, centroids_of(sums, counts), reseeded)

    start_at = _rows(points, start).astype(jnp.float32)
    centroids = lax.fori_loop(0, num_iterations - 1, step, start_at)
    return assign(centroids, False)[:2]


def _counted(points: Float[Array, "G T H"], valid: Bool[Array, "G T"]) -> Float[Array, "G T H"]:
    return jnp.where(valid[..., None], points, 0)


def _rows(x: Float[Array, "G T H"], index: Int[Array, "G C"]) -> Float[Array, "G C H"]:
    return jnp.take_along_axis(x, index[..., None], axis=1)


def _aligned(x: Array, rows: int) -> Array:
    return gpu.pad(gpu.pad(x, 1, rows), 2, gpu.WIDTH)


def _assign(
    points: list[BFloat16[Array, "G T H"]],
    centroids: list[BFloat16[Array, "G C H"]],
    offset: Float[Array, "G C"],
    *,
    tiles: int,
    sums: bool,
) -> list[Array]:
    """The centroid j of least offset_j + x·c_j, C if there is none; this distance; perhaps sums.

    Sums are those of each block of ``tiles`` tiles, in float32.
    """
    num_heads, length, width = points[0].shape
    num_clusters, tile = offset.shape[1], gpu.HEIGHT
    block, shape = tiles * tile, (tile, num_clusters)
    order = max(len(points), len(centroids))  # products of higher parts would be lost to rounding

    def body(*refs):
        point_refs, refs = refs[: len(points)], refs[len(points) :]
        centroid_refs, refs = refs[: len(centroids)], refs[len(centroids) :]
        offset_ref, ids_ref, index_ref, distance_ref, *sums_ref = refs
        head, number = lax.axis_index("head"), lax.axis_index("block")

        def work(total, point, centroid, offset, ids, member, index, distance, loaded, ready):
            for part, ref in enumerate(centroid_refs):
                plgpu.copy_gmem_to_smem(ref.at[head], centroid.at[part], ready)
            plgpu.copy_gmem_to_smem(offset_ref.at[head], offset, ready)
            plgpu.copy_gmem_to_smem(ids_ref, ids, ready)

            @_stream(
                [ref.at[head] for ref in point_refs], number * tiles, tiles, point, loaded, ready
            )
            def _(i, tile_parts):
                zero = ids_ref[0]  # see centroid_attention
                factors = [
                    Factors(tile_parts.at[p], centroid.at[zero + c].transpose((1, 0)))
                    for p in range(len(points))
                    for c in range(min(len(centroids), order - p))
                ]
                plus = gpu.of_columns(offset, shape)
                distances = products.product(shape, *factors, plus=plus)
                least = distances.min(axis=1)
                at_least = distances == gpu.of_rows(least, shape)
                numbers = gpu.of_columns(ids, shape)
                nearest = jnp.where(at_least, numbers, num_clusters).min(axis=1)
                rows = pl.ds(i * tile, tile)
                index[rows], distance[rows] = nearest, least
                if sums:
                    is_member = gpu.of_columns(ids, shape) == gpu.of_rows(nearest, shape)
                    member[...] = jnp.where(is_member, 1.0, 0.0).astype(jnp.bfloat16)
                plgpu.commit_smem()
                if sums:
                    left = member.transpose((1, 0))
                    factors = [Factors(left, tile_parts.at[p]) for p in range(len(points))]
                    products.add(total, *factors, anew=i == 0)
                    plgpu.commit_smem()  # all are done with what is loaded anew

            rows = pl.ds(number * block, block)
            plgpu.copy_smem_to_gmem(index, index_ref.at[head, rows])
            plgpu.copy_smem_to_gmem(distance, distance_ref.at[head, rows])
            if sums:
                sums_ref[0][head, number] = products.read(total)
            plgpu.wait_smem_to_gmem(0)

        def allocate(total):
            pl.run_scoped(
                partial(work, total),
                point=products.matrices(SLOTS, len(points), tile, width),
                centroid=products.matrices(len(centroids), num_clusters, width),
                offset=plgpu.SMEM((num_clusters,), jnp.float32),
                ids=plgpu.SMEM((num_clusters,), jnp.int32),  # registers would spill
                member=products.matrices(*shape),
                index=plgpu.SMEM((block,), jnp.int32),
                distance=plgpu.SMEM((block,), jnp.float32),
                loaded=plgpu.Barrier(num_arrivals=len(points), num_barriers=SLOTS),
                ready=plgpu.Barrier(num_arrivals=len(centroids) + 2),
            )

        if sums:
            pl.run_scoped(allocate, products.accumulator((num_clusters, width)))
        else:
            allocate(None)

    blocks = length // block
    outputs = [jax.ShapeDtypeStruct((num_heads, length), x) for x in (jnp.int32, jnp.float32)]
    if sums:
        shape_of_sums = (num_heads, blocks, num_clusters, width)
        outputs.append(jax.ShapeDtypeStruct(shape_of_sums, jnp.float32))
    operands = [*points, *centroids, offset, jnp.arange(num_clusters, dtype=jnp.int32)]
    grid = {"head": num_heads, "block": blocks}
    return gpu.launch("assign", body, operands, outputs, grid)


def _norms(
    points: BFloat16[Array, "G T H"],
    matrix: Float[Array, "G H H"],
    slope: Float[Array, "G H"],
) -> Float[Array, "G T"]:
    """For each point x the product of x with ``matrix`` times x less ``slope``."""
    num_heads, length, _ = points.shape
    tiles = gpu.tiles_of_block(length)
    block = tiles * gpu.HEIGHT
    points = _aligned(points, block)
    parts = [_aligned(part, gpu.WIDTH) for part in bfloat16_parts(matrix)]
    width = points.shape[-1]

    def body(point_ref, *refs):
        part_refs, (slope_ref, norm_ref) = refs[: len(parts)], refs[len(parts) :]
        head, number = lax.axis_index("head"), lax.axis_index("block")

        def work(point, part, slope, norm, loaded, ready):
            for number_of_part, ref in enumerate(part_refs):
                plgpu.copy_gmem_to_smem(ref.at[head], part.at[number_of_part], ready)
            plgpu.copy_gmem_to_smem(slope_ref.at[head], slope, ready)

            @_stream([point_ref.at[head]], number * tiles, tiles, point, loaded, ready)
            def _(i, tile_parts):
                own, shape = tile_parts.at[0], (gpu.HEIGHT, width)
                factors = [Factors(own, part.at[p]) for p in range(len(parts))]
                moved = products.product(shape, *factors) - gpu.of_columns(slope, shape)
                rows = gpu.load(own, plgpu.Layout.WGMMA).astype(jnp.float32)
                norm[pl.ds(i * gpu.HEIGHT, gpu.HEIGHT)] = (rows * moved).sum(axis=1)
                plgpu.commit_smem()

            plgpu.copy_smem_to_gmem(norm, norm_ref.at[head, pl.ds(number * block, block)])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            work,
            point=products.matrices(SLOTS, 1, gpu.HEIGHT, width),
            part=products.matrices(len(parts), width, width),
            slope=plgpu.SMEM((width,), jnp.float32),
            norm=plgpu.SMEM((block,), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
            ready=plgpu.Barrier(num_arrivals=len(parts) + 1),
        )

    output = jax.ShapeDtypeStruct(points.shape[:2], jnp.float32)
    operands = [points, *parts, gpu.pad(slope, 1, gpu.WIDTH)]
    grid = {"head": num_heads, "block": points.shape[1] // block}
    return gpu.launch("norms", body, operands, [output], grid)[0][:, :length]


def _stream(
    refs: list[Any], first: Array, tiles: int, memory: Any, loaded: Any, ready: Any
) -> Callable[[Callable[[Array, Any], None]], None]:
    """Shows what is decorated the tiles of points from a number on, in shared memory.

    Args:
      refs: parts of the points, in global memory.
      first: number of the first tile.
      tiles: how many.
      memory: for ``SLOTS`` tiles of all parts.
      loaded: a barrier for each of these.
      ready: a barrier to wait at before the first tile is shown.
    """

    def load(i):
        rows, slot = pl.ds((first + i) * gpu.HEIGHT, gpu.HEIGHT), lax.rem(i, jnp.int32(SLOTS))
        for part, ref in enumerate(refs):
            plgpu.copy_gmem_to_smem(ref.at[rows], memory.at[slot, part], loaded.at[slot])

    def show(visit):
        for i in range(min(SLOTS, tiles)):
            load(jnp.int32(i))
        plgpu.barrier_wait(ready)

        @pl.loop(0, tiles)
        def _(i):
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.barrier_wait(loaded.at[slot])
            visit(i, memory.at[slot])

            @pl.when(i + SLOTS < tiles)
            def _():
                load(i + SLOTS)

    return show
