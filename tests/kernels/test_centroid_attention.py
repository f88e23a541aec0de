"""Centroid attention, interpreted, against the stages of the XLA implementation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustax import kernels, xla
from clustax.kernels.centroid_attention import CentroidBlocks, Shape, centroid_attention, refusal
from clustax.topk import largest
from tests.helpers import double, largest_error, others_once


@pytest.fixture(autouse=True)
def tpu_kernels():
    with kernels.interpret("tpu"):
        yield


@dataclasses.dataclass(frozen=True)
class Problem:
    """C clusters of R sub-clusters for each of G heads, S keys for each of J heads.

    Some clusters and sub-clusters are empty. ``few_valid`` leaves head 0 fewer keys than topk, and
    head 1 none. ``repeats`` is how often each key occurs. The ``tolerance`` is what the dtype, or
    float32 logits of 1e4, allow for.
    """

    name: str
    G: int = 2
    J: int = 2
    C: int = 5
    R: int = 1
    S: int = 300
    H: int = 8
    V: int = 8
    topk: int = 6
    scale: float = 0.5
    bias: bool = False
    mask: bool = False
    few_valid: bool = False
    repeats: int = 1
    keys: int | None = 256
    dtype: str = "float32"
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("grouped_heads", G=4, S=700, V=5, topk=11, bias=True, mask=True, keys=512),
    Problem("subclusters_few_keys", J=1, C=130, R=3, H=7, few_valid=True, keys=None),
    Problem("no_topk", S=256, topk=0, R=2, bias=True),
    Problem("ties_of_huge_logits", scale=1e4, topk=20, repeats=10, tolerance=1e-2),
    Problem("half", J=1, R=3, topk=9, bias=True, mask=True, dtype="bfloat16", tolerance=1e-2),
]
BY_NAME = {problem.name: problem for problem in PROBLEMS}


def operands(problem: Problem) -> tuple[dict, jax.Array]:
    """Random operands, and the numbers of members of sub-clusters."""
    rng = np.random.default_rng(0)
    G, J, C, R, S = problem.G, problem.J, problem.C, problem.R, problem.S

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    key = normal(J, S // problem.repeats, problem.H, dtype=problem.dtype)
    given = {
        "centroids": normal(G, C, R, problem.H),
        "key": jnp.tile(key, (1, problem.repeats, 1)),
        "value": normal(J, S, problem.V, dtype=problem.dtype),
        "scale": jnp.float32(problem.scale),
    }
    if problem.bias:
        bias = normal(G, S).at[:, ::7].set(-3e38)
        given["bias"] = xla.raise_bias(bias)
    if problem.mask:
        given["valid"] = jnp.asarray(rng.random((G, S)) < 2 / 3)
    if problem.few_valid:
        given["valid"] = jnp.arange(S) < jnp.array([[problem.topk - 2], [0]])
    counts = rng.integers(4, size=(G, C, R))
    counts[0, 0] = 0
    return given, jnp.asarray(counts, jnp.int32)


def by_xla(centroids, key, value, scale, bias=None, valid=None, *, counts, topk):
    """The same from the stages of ``clustax.xla``."""
    outs = []
    for head in range(len(centroids)):
        of_key = head * len(key) // len(centroids)
        of_head = (None if x is None else x[head] for x in (bias, valid))
        keys = xla.Keys(key[of_key], value[of_key], *of_head)
        subclusters = xla.Subclusters(jnp.zeros((1, 1), jnp.int32), counts[head])
        logits = xla.attention_logits(centroids[head], keys, scale)
        index = jnp.zeros((len(logits), 0), jnp.int32)
        if topk:
            ranks = jax.lax.stop_gradient(xla.rank_keys(logits, subclusters.share))
            index = largest(ranks, topk)
            _, logits = xla.split_keys(logits, index)
        outs.append((index, *xla.attend_subclusters(logits, keys.value, subclusters.share)))
    return jax.tree.map(lambda *x: jnp.stack(x), *outs)


def evaluate(attention, given, cotangents):
    """The outputs, and the gradients of their product with the cotangents."""
    floating = {n: x for n, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def outputs(floating):
        index, mean, lse = attention(**given | floating)
        return (mean, lse), index

    out, vjp, index = jax.vjp(outputs, floating, has_aux=True)
    return index, *out, vjp(jax.tree.map(lambda x, d: d.astype(x.dtype), out, cotangents))[0]


def kernel_of(problem: Problem, counts):
    share = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    kernel = functools.partial(
        centroid_attention,
        share=share if problem.R > 1 else None,
        topk=problem.topk,
        blocks=problem.keys and CentroidBlocks(problem.keys),
    )
    return jax.jit(functools.partial(evaluate, kernel))


def cotangents_of(problem: Problem):
    rng = np.random.default_rng(1)
    shapes = (problem.G, problem.C, problem.V), (problem.G, problem.C, problem.R)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("problem", others_once(*PROBLEMS), ids=str)
def test_outputs_and_gradients(problem):
    given, counts = operands(problem)
    cotangents = cotangents_of(problem)
    kernel = kernel_of(problem, counts)
    index, mean, lse, gradients = kernel(given, cotangents)
    assert index.dtype == jnp.int32
    assert mean.dtype == lse.dtype == jnp.float32

    with jax.enable_x64(True):
        plainly = functools.partial(by_xla, counts=counts, topk=problem.topk)
        plainly = jax.jit(functools.partial(evaluate, plainly))
        expected = plainly(double(given), double(cotangents))
    np.testing.assert_array_equal(jnp.sort(index), expected[0])
    assert largest_error(mean, expected[1]) <= problem.tolerance
    assert largest_error(lse, expected[2]) <= 1e-5
    assert gradients.keys() == expected[3].keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype, name
        assert largest_error(gradient, expected[3][name]) <= problem.tolerance, name

    again = kernel(given, cotangents)
    jax.tree.map(np.testing.assert_array_equal, again, (index, mean, lse, gradients))


@pytest.mark.once
def test_each_key_in_turn_may_be_the_best():
    """Ranks that rise along the sequence have every tile replace all that was selected."""
    out = centroid_attention(
        jnp.zeros((1, 2, 1, 8)),
        jnp.zeros((1, 600, 8)),
        jnp.broadcast_to(jnp.arange(600.0)[:, None], (1, 600, 8)),
        jnp.arange(600.0)[None],
        topk=20,
        scale=1.0,
        blocks=CentroidBlocks(256),
    )
    np.testing.assert_array_equal(
        out.top_index, np.broadcast_to(np.arange(599, 579, -1), (1, 2, 20))
    )
    largest = 579 + np.log(1 / (1 - np.exp(-1)))
    np.testing.assert_allclose(out.tail_lse, np.full((1, 2, 1), largest), rtol=1e-6)
    mean = 579 - 1 / (np.e - 1)
    np.testing.assert_allclose(out.tail_mean, np.full((1, 2, 8), mean), rtol=1e-6)


def test_blocks_that_do_not_fit_are_refused():
    for keys in (0, 100, 300):
        with pytest.raises(ValueError, match=f"multiple of 256, got {keys}"):
            CentroidBlocks(keys)


def test_what_cannot_be_served_is_refused_with_the_reason():
    shape = Shape(
        num_heads=1,
        num_clusters=128,
        num_subclusters=4,
        topk=32,
        head_dim=128,
        value_dim=128,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    assert refusal(shape) is None
    assert "not float16" in refusal(shape._replace(dtype=jnp.dtype(jnp.float16)))
    assert "not topk=513" in refusal(shape._replace(topk=513))
    assert "of 64 heads" in refusal(shape._replace(num_heads=64))


def test_default_blocks_fit():
    shape = Shape(1, 128, 1, 32, 128, 128, jnp.dtype(jnp.bfloat16))
    assert CentroidBlocks.default(65536, shape) == CentroidBlocks(2048)
    assert CentroidBlocks.default(300, shape) == CentroidBlocks(512)
    wide = shape._replace(head_dim=512, value_dim=512, dtype=jnp.dtype(jnp.float32))
    assert CentroidBlocks.default(65536, wide).keys < 512
