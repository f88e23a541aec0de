"""Attention of tiles of queries over the top-k keys of their clusters, on Hopper GPUs.

A block of threads has one tile: 64 queries of one cluster against its k keys, which are in shared
memory at once, and the merge with the tail. The backward pass is XLA's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Int

from clustax import xla
from clustax.kernels import hopper
from clustax.kernels.common import masked_bias

STEP_TILES = 1  # what the number of tiles has to be a multiple of


def tile_size(num_queries: int, num_clusters: int, dtype: jnp.dtype) -> int:
    """The number of queries in a tile, whatever the shapes."""
    del num_queries, num_clusters, dtype
    return hopper.HEIGHT


def grouped_attention(
    query: BFloat16[Array, "G L 64 H"],
    cluster: Int[Array, "G L"],
    key: BFloat16[Array, "G C k H"],
    value: BFloat16[Array, "G C k V"],
    bias: Float[Array, "G C k"] | None = None,
    valid: Bool[Array, "G C k"] | None = None,
    tail_mean: Float[Array, "G C V"] | None = None,
    tail_lse: Float[Array, "G L 64"] | None = None,
    top_lse: Float[Array, "G L 64"] | None = None,
    *,
    scale: float | Float[Array, ""],
) -> BFloat16[Array, "G L 64 V"]:
    """Attention of each query over the keys of its tile's cluster, merged with the tail.

    Args:
      query: queries, in tiles of one cluster each.
      cluster: the cluster of each tile.
      key: the top-k keys of each cluster; keys that do not count hold zeros.
      value: their values, likewise.
      bias: what is added to their logits.
      valid: which of them count.
      tail_mean: attention of each cluster over all other keys; None if there are none.
      tail_lse: for each query the log-sum-exp of the logits of these; given with ``tail_mean``.
      top_lse: for each query what the top-k keys weigh against the tail; its own log-sum-exp of
        their logits if None.
      scale: factor of the logits.
    """
    scale = jnp.asarray(scale, jnp.float32)
    tail = (tail_mean, tail_lse, top_lse)
    return _attend(query, key, value, masked_bias(bias, valid), *tail, scale, cluster)


@jax.custom_vjp
def _attend(
    query: BFloat16[Array, "G L 64 H"],
    key: BFloat16[Array, "G C k H"],
    value: BFloat16[Array, "G C k V"],
    addend: Float[Array, "G C k"] | None,
    tail_mean: Float[Array, "G C V"] | None,
    tail_lse: Float[Array, "G L 64"] | None,
    top_lse: Float[Array, "G L 64"] | None,
    scale: Float[Array, ""],
    cluster: Int[Array, "G L"],
) -> BFloat16[Array, "G L 64 V"]:
    value_dim = value.shape[-1]
    if addend is None:
        addend = jnp.zeros(key.shape[:3], jnp.float32)
    addend = hopper.pad(addend, 2, 32, -jnp.inf)
    query = hopper.pad(query, 3, hopper.WIDTH)
    key, value = (hopper.pad(hopper.pad(x, 2, 32), 3, hopper.WIDTH) for x in (key, value))
    arrays = [query, cluster, jnp.reshape(scale, 1), key, value, addend]
    has_tail = tail_mean is not None
    if tail_mean is not None:
        arrays += [hopper.pad(tail_mean, 2, hopper.WIDTH), tail_lse]
    if top_lse is not None:
        arrays.append(top_lse)
    num_heads, num_tiles, height, head_dim = query.shape
    topk, width = value.shape[2:]
    logits_shape, out_shape = (height, topk), (height, width)
    swizzle = 128 if topk % 64 == 0 else 64  # as rows of weights ask for

    def body(query_ref, cluster_ref, scale_ref, key_ref, value_ref, addend_ref, *refs):
        *tail_refs, out_ref = refs
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        own = cluster_ref[head, tile]

        def work(query, key, value, addend, mean, weight, out, ready):
            plgpu.copy_gmem_to_smem(query_ref.at[head, tile], query, ready)
            plgpu.copy_gmem_to_smem(key_ref.at[head, own], key, ready)
            plgpu.copy_gmem_to_smem(value_ref.at[head, own], value, ready)
            plgpu.copy_gmem_to_smem(addend_ref.at[head, own], addend, ready)
            if has_tail:
                plgpu.copy_gmem_to_smem(tail_refs[0].at[head, own], mean, ready)
            plgpu.barrier_wait(ready)

            def multiply(left, right):
                def run(products):
                    plgpu.wgmma(products, left, right)
                    return products[...]

                return run

            logits = pl.run_scoped(
                multiply(query, key.transpose((1, 0))), plgpu.WGMMAAccumulatorRef(logits_shape)
            )
            logits = scale_ref[0] * logits + hopper.of_columns(addend, logits_shape)
            shift = logits.max(axis=1)
            weights = jnp.exp(logits - hopper.of_rows(shift, logits_shape))
            total = weights.sum(axis=1)
            weight[...] = weights.astype(jnp.bfloat16)
            plgpu.commit_smem()
            rows = pl.run_scoped(multiply(weight, value), plgpu.WGMMAAccumulatorRef(out_shape))
            if has_tail:
                lse = shift + jnp.log(total)
                if top_lse is not None:
                    lse = hopper.load_rows(tail_refs[2].at[head, tile])
                mass = 1 / (1 + jnp.exp(hopper.load_rows(tail_refs[1].at[head, tile]) - lse))
                rest = hopper.of_columns(mean, out_shape) * hopper.of_rows(1 - mass, out_shape)
                rows = rows * hopper.of_rows(mass / total, out_shape) + rest
            else:
                rows = rows / hopper.of_rows(total, out_shape)
            out[...] = rows.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[head, tile])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            work,
            query=hopper.matrices(height, head_dim),
            key=hopper.matrices(topk, head_dim),
            value=hopper.matrices(topk, width, swizzle=swizzle),
            addend=plgpu.SMEM((topk,), jnp.float32),
            mean=plgpu.SMEM((width,), jnp.float32),
            weight=hopper.matrices(height, topk, swizzle=swizzle),
            out=hopper.matrices(height, width),
            ready=plgpu.Barrier(num_arrivals=5 if has_tail else 4),
        )

    output = jax.ShapeDtypeStruct((num_heads, num_tiles, height, width), jnp.bfloat16)
    grid = {"head": num_heads, "tile": num_tiles}
    out = hopper.launch("grouped_attention", body, arrays, [output], grid)[0]
    return out[..., :value_dim]


def _attend_forward(*args):
    return _attend(*args), args


def _attend_backward(residuals, gradient):
    *differentiable, cluster = residuals
    _, vjp = jax.vjp(partial(_dense, cluster), *differentiable)
    return *vjp(gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def _dense(cluster, query, key, value, addend, tail_mean, tail_lse, top_lse, scale):
    """The same in plain JAX, for the backward pass."""
    # A product with this, unlike indexing, has gradients that are summed in one order.
    indicator = jax.nn.one_hot(cluster, key.shape[1], dtype=jnp.float32)

    def of_tiles(x):  # G C … -> G L …
        return jnp.einsum("glc,gc...->gl...", indicator, x.astype(jnp.float32))

    keys = jax.tree.map(of_tiles, xla.Keys(key, value, addend, None))
    logits = xla.attention_logits(query.astype(jnp.float32), keys, scale)
    rows, lse = xla.attend_keys(logits, keys.value)
    if tail_mean is not None:
        mass = jax.nn.sigmoid((lse if top_lse is None else top_lse) - tail_lse)[..., None]
        rows = mass * rows + (1 - mass) * of_tiles(tail_mean)[:, :, None]
    return rows.astype(query.dtype)
