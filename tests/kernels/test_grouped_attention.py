"""Grouped attention, interpreted, against the same in plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustax import kernels, xla
from clustax.kernels.grouped_attention import GroupedBlocks, grouped_attention, refusal
from tests.helpers import largest_error, others_once


@pytest.fixture(autouse=True)
def tpu_kernels():
    with kernels.interpret("tpu"):
        yield


@dataclasses.dataclass(frozen=True)
class Problem:
    """G heads, C clusters of which tiles are in ``cluster``, M slots a tile, k keys."""

    name: str
    cluster: tuple[tuple[int, ...], ...] = ((0, 0, 2, 3, 3), (1, 1, 1, 1, 3))
    C: int = 4
    M: int = 8
    k: int = 8
    H: int = 8
    V: int = 8
    merge: str | None = "mass"
    bias: bool = False
    mask: bool = False
    tiles: int | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("odd_mass", M=3, k=11, H=7, V=5, bias=True, mask=True),
    Problem("mass"),
    Problem("lse", merge="lse", tiles=1),
    Problem("no_tail", merge=None, bias=True, mask=True),
    Problem("odd_lse", cluster=((0, 1, 4),) * 3, C=5, M=2, k=3, V=6, merge="lse", mask=True),
    Problem("half_mass", bias=True, dtype="bfloat16"),
    Problem("half_lse", M=16, k=5, merge="lse", mask=True, dtype="bfloat16"),
]


def operands(problem: Problem) -> dict:
    """Random operands. A key in three is masked, and all keys of head 0's cluster 2."""
    rng = np.random.default_rng(0)
    cluster = jnp.asarray(problem.cluster)
    G, L = cluster.shape
    C, M, k = problem.C, problem.M, problem.k

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    given = {
        "query": normal(G, L, M, problem.H, dtype=problem.dtype),
        "cluster": cluster,
        "key": normal(G, C, k, problem.H, dtype=problem.dtype),
        "value": normal(G, C, k, problem.V, dtype=problem.dtype),
        "scale": jnp.float32(0.5),
    }
    if problem.bias:
        given["bias"] = normal(G, C, k)
    if problem.mask:
        valid = (rng.random((G, C, k)) < 2 / 3).tolist()
        valid[0][2] = [False] * k
        given["valid"] = valid = jnp.asarray(valid)
        for name in ("key", "value"):
            given[name] = jnp.where(valid[..., None], given[name], 0)
    if problem.merge is not None:
        given |= {"tail_mean": normal(G, C, problem.V), "tail_lse": 1 + normal(G, L, M)}
    if problem.merge == "mass":
        given["top_lse"] = 1 + normal(G, L, M)
    return given


def plainly(
    query,
    cluster,
    key,
    value,
    scale,
    bias=None,
    valid=None,
    tail_mean=None,
    tail_lse=None,
    top_lse=None,
):
    """What the kernel computes, with the keys of each tile gathered."""

    def of_tiles(x):
        return jax.tree.map(lambda x: jax.vmap(lambda x, own: x[own])(x, cluster), x)

    keys = of_tiles(xla.Keys(key, value, bias, valid))
    top = xla.attend_keys(xla.attention_logits(query, keys, scale), keys.value)
    if tail_mean is None:
        return top.mean
    mass = jax.nn.sigmoid((top.lse if top_lse is None else top_lse) - tail_lse)[..., None]
    return mass * top.mean + (1 - mass) * of_tiles(tail_mean)[:, :, None]


@functools.partial(jax.jit, static_argnames="attention")
def evaluate(attention, given, cotangent):
    """The outputs, and the gradients of their product with ``cotangent``."""
    floating = {n: x for n, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    out, vjp = jax.vjp(lambda floating: attention(**given | floating), floating)
    return out, vjp(cotangent.astype(out.dtype))[0]


@pytest.mark.parametrize("problem", others_once(*PROBLEMS), ids=str)
def test_outputs_and_gradients(problem):
    given = operands(problem)
    blocks = None if problem.tiles is None else GroupedBlocks(problem.tiles)
    kernel = functools.partial(grouped_attention, blocks=blocks)
    shape = (*given["query"].shape[:3], problem.V)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), problem.dtype)
    out, gradients = evaluate(kernel, given, cotangent)
    assert out.dtype == given["query"].dtype

    exact = {n: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in given.items()}
    expected, expected_gradients = evaluate(plainly, exact, cotangent)
    half = problem.dtype == "bfloat16"
    assert largest_error(out, expected) <= (1e-2 if half else 1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype, name
        assert largest_error(gradient, expected_gradients[name]) <= (2e-2 if half else 1e-5), name
    has_tiles = np.zeros(given["key"].shape[:2], bool)
    np.put_along_axis(has_tiles, np.asarray(given["cluster"]), True, axis=1)
    assert not has_tiles.all()
    assert not np.any(np.asarray(gradients["key"])[~has_tiles])

    again = evaluate(kernel, given, cotangent)
    jax.tree.map(np.testing.assert_array_equal, again, (out, gradients))


@pytest.mark.once
def test_heads_whose_tiles_are_too_many_come_in_turn(monkeypatch):
    given = operands(next(problem for problem in PROBLEMS if problem.name == "odd_lse"))
    cotangent = jnp.ones((*given["query"].shape[:3], given["value"].shape[-1]))
    results = []
    for most in (9, 5):
        monkeypatch.setattr("clustax.kernels.grouped_attention.MAX_TILES", most)
        kernel = functools.partial(grouped_attention, blocks=GroupedBlocks(1))
        results.append(evaluate(kernel, given, cotangent))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *results)


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tiles must be at least 1, got 0"):
        GroupedBlocks(0)
    with pytest.raises(ValueError, match="at least 2 slots M, got 1"):
        grouped_attention(**operands(dataclasses.replace(PROBLEMS[1], M=1)))


def test_what_cannot_be_served_is_refused_with_the_reason():
    bfloat16, float16 = map(jnp.dtype, (jnp.bfloat16, jnp.float16))
    assert refusal(8192, 128, 32, 128, 128, bfloat16) is None
    assert "not float16" in refusal(8192, 128, 32, 128, 128, float16)
    assert "topk=8192" in refusal(8192, 128, 8192, 128, 128, bfloat16)
