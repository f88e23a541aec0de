"""Memory that grows linearly: nothing is run here, programs are only compiled."""

import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import clustax
from clustax import clustered_attention
from tests.helpers import sizes_of

HEADS, HEAD_DIM, CLUSTERS, TOPK, BITS = 6, 64, 100, 32, 64
MERGES = ("mass", "lse")
CLUSTERINGS = [("hamming", "query"), ("euclidean", "logit")]


def program(length, *, gradient, num_heads=HEADS, **settings):
    """A call of ``clustered_attention`` under jit, and shapes to call it with."""

    def forward(query, key, value):
        return clustered_attention(
            query, key, value, num_clusters=CLUSTERS, topk=TOPK, num_bits=BITS, **settings
        )

    def loss(*qkv):
        return jnp.sum(forward(*qkv) ** 2)

    shape = jax.ShapeDtypeStruct((1, length, num_heads, HEAD_DIM), jnp.float32)
    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else forward
    return jax.jit(function), (shape,) * 3


def largest_allowed(length):
    """Fewer elements than T·S, T·k·H and T·C·bits."""
    return min(length**2, length * TOPK * HEAD_DIM, length * CLUSTERS * BITS) - 1


def sizes_in(text):
    """The number of elements of each array that is named in a compiled program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.once
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(("metric", "space"), CLUSTERINGS)
@pytest.mark.parametrize("merge", MERGES)
def test_no_array_is_quadratic_in_any_branch(merge, metric, space, gradient):
    function, shapes = program(
        4096, gradient=gradient, num_heads=1, merge=merge, metric=metric, space=space
    )
    sizes = list(sizes_of(function.trace(*shapes).jaxpr.jaxpr))
    assert len(sizes) > 300
    assert CLUSTERS * 4096 in sizes  # the logits of the centroids: inner programs are seen
    assert max(sizes) <= largest_allowed(4096)


@pytest.mark.once
@pytest.mark.parametrize(
    ("settings", "gradient"),
    [
        ({}, False),
        ({}, True),
        (
            {"merge": "lse", "num_subclusters": 4, "metric": "euclidean", "space": "logit"},
            True,
        ),
    ],
    ids=["paper-forward", "paper-gradient", "default-gradient"],
)
def test_memory_of_the_compiled_program_is_linear(settings, gradient):
    temporaries = []
    for length in (4096, 16384):
        function, shapes = program(length, gradient=gradient, **settings)
        compiled = function.lower(*shapes).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        sizes = sizes_in(compiled.as_text())
        assert HEADS * length * HEAD_DIM in sizes
        assert max(sizes) <= largest_allowed(length)
    assert 0 < temporaries[1] <= 4.4 * temporaries[0]


def test_import_is_quick_and_starts_nothing():
    script = """
import sys, clustax
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
assert not [name for name in sys.modules if name.split(".")[0] == "flax"], "Flax was imported"
assert all(hasattr(clustax, name) for name in clustax.__all__)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_api_is_what_it_is_said_to_be():
    assert set(clustax.__all__) == {
        "ClusteredAttention",
        "Clusters",
        "__version__",
        "attend",
        "cluster_codes",
        "cluster_queries",
        "clustered_attention",
        "hash_codes",
        "hash_planes",
    }
    assert all(hasattr(clustax, name) for name in clustax.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", clustax.__version__)
