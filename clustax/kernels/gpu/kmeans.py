"""K-means on GPUs: one kernel assigns points and sums the members of each cluster.

Points and centroids come in parts in bfloat16: codes of ±1 have one, which is exact; float32 has
two, whose three leading products decide as float32 would but for ties. So both metrics are matrix
products: distances are products of points and centroids, sums are products of an indicator of the
assignment and points. Neither distances nor indicators reach global memory.
"""

from functools import partial

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
TILES = 16  # of a block
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
        return jnp.where(sums > 0, 1, -1).astype(jnp.bfloat16)

    def expand(centroids):  # the distance is (bits - x·c) / 2
        offset = jnp.full(centroids.shape[:2], num_bits / 2, jnp.float32)
        return [-centroids / 2], offset

    return _lloyd(points, [points], jnp.float32(0), start, valid, encode, expand, num_iterations)


def euclidean(
    points: Float[Array, "G T H"],
    start: Int[Array, "G C"],
    valid: Bool[Array, "G T"],
    *,
    num_iterations: int,
) -> tuple[Int[Array, "G T"], Int[Array, "G C"]]:
    """``clustax.kmeans.euclidean`` of all heads at once."""

    def mean(sums, counts):
        return sums / jnp.maximum(counts, 1)[..., None]

    def expand(centroids):  # the distance is |c|² - 2 x·c + |x|²
        return bfloat16_parts(-2 * centroids), jnp.sum(centroids**2, axis=-1)

    norms = jnp.sum(points**2, axis=-1)
    parts = bfloat16_parts(points)
    return _lloyd(points, parts, norms, start, valid, mean, expand, num_iterations)


def _lloyd(points, parts, norms, start, valid, centroids_of, expand, num_iterations):
    """Lloyd's algorithm, as in ``clustax.kmeans``.

    Args:
      points: points, or codes of ±1.
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
    # Points that do not count are zero, and so add nothing.
    parts = [jnp.where(valid[..., None], part, 0) for part in parts]
    tiles = min(TILES, -(-length // gpu.HEIGHT))
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

    centroids = lax.fori_loop(0, num_iterations - 1, step, _rows(points, start))
    return assign(centroids, False)[:2]


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
            def load(i):
                rows, slot = pl.ds(number * block + i * tile, tile), lax.rem(i, jnp.int32(SLOTS))
                for part, ref in enumerate(point_refs):
                    to = point.at[slot, part]
                    plgpu.copy_gmem_to_smem(ref.at[head, rows], to, loaded.at[slot])

            for i in range(min(SLOTS, tiles)):
                load(jnp.int32(i))
            for part, ref in enumerate(centroid_refs):
                plgpu.copy_gmem_to_smem(ref.at[head], centroid.at[part], ready)
            plgpu.copy_gmem_to_smem(offset_ref.at[head], offset, ready)
            plgpu.copy_gmem_to_smem(ids_ref, ids, ready)
            plgpu.barrier_wait(ready)

            @pl.loop(0, tiles)
            def _(i):
                slot = lax.rem(i, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])

                factors = [
                    Factors(point.at[slot, p], centroid.at[c].transpose((1, 0)))
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
                    factors = [Factors(left, point.at[slot, p]) for p in range(len(points))]
                    products.add(total, *factors, anew=i == 0)
                    plgpu.commit_smem()  # all are done with what is loaded anew

                @pl.when(i + SLOTS < tiles)
                def _():
                    load(i + SLOTS)

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
