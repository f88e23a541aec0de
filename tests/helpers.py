"""What several test files do: evaluate a case with all its gradients, and compare."""

import contextlib
import math
import resource
from functools import partial
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import clustax
from clustax.models import WhisperConfig
from tests.cases import BY_NAME, Inputs, make_inputs


def others_once(*values, every=()):
    """Values of a parameter, of which the first, and those in ``every``, are tried on any Python.

    The others are once: they find what the first one finds, should an API have changed.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if at == 0 or value in every else pytest.mark.once,
        )
        for at, value in enumerate(values)
    ]


class Gradients(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    scale: jax.Array


def attend(inputs: Inputs, **settings) -> jax.Array:
    """``clustax.attend`` of all the inputs."""
    return clustax.attend(
        *inputs[:5],
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        **settings,
    )


def assert_kernels_cluster_as_xla_does() -> None:
    """In logit space, from queries of bfloat16, with padding and a mask."""
    inputs = make_inputs(BY_NAME["everything"], jnp.bfloat16)

    def clusters(implementation):
        return clustax.cluster_queries(
            inputs.query,
            inputs.key,
            num_clusters=5,
            num_iterations=3,
            metric="euclidean",
            query_seq_lengths=inputs.query_seq_lengths,
            key_value_seq_lengths=inputs.key_value_seq_lengths,
            mask=inputs.mask,
            implementation=implementation,
        )

    jax.tree.map(np.testing.assert_array_equal, clusters("pallas"), clusters("xla"))


@partial(jax.jit, static_argnames=("settings", "implementation"))
def outputs_and_gradients(inputs: Inputs, clusters, cotangent, scale, *, settings, implementation):
    """The outputs of ``attend``, and the gradients of their product with ``cotangent``.

    This is done for several settings (topk, merge, num_subclusters) in one program: XLA shares what
    they have in common, which takes half the time to compile.
    """

    def of(topk, merge, num_subclusters):
        def outputs(query, key, value, bias, scale):
            return attend(
                inputs._replace(query=query, key=key, value=value, bias=bias),
                clusters=clusters,
                topk=topk,
                merge=merge,
                num_subclusters=num_subclusters,
                scale=scale,
                implementation=implementation,
            )

        out, vjp = jax.vjp(outputs, *inputs[:4], scale)
        return out, Gradients(*vjp(cotangent))

    return [of(*setting) for setting in settings]


def random_like_output(inputs: Inputs, seed: int = 1) -> jax.Array:
    """A random array of the shape and dtype of the outputs."""
    shape = (*inputs.query.shape[:-1], inputs.value.shape[-1])
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), inputs.query.dtype)


def double(tree):
    """Float64 in place of any floating dtype; only where x64 is enabled."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def as_numpy(tree):
    """Float64 NumPy copies, so that nothing that comes after is rounded."""

    def copy(x):
        x = np.asarray(x)
        return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(copy, tree)


def largest_error(actual, expected) -> float:
    """The largest difference, relative to the largest magnitude that is expected, or to 0.1."""
    actual, expected = as_numpy((actual, expected))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 0.1))


@contextlib.contextmanager
def largest_file(size: int):
    """Has the system refuse to make a file larger than so many bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sizes_of(jaxpr):
    """The number of elements of each array in a jaxpr and in all that it calls.

    Both branches of what depends on the platform are seen.
    """
    for equation in jaxpr.eqns:
        yield from (math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars)
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from sizes_of(inner)


TINY_WHISPER = WhisperConfig(
    vocab_size=40,
    max_source_positions=7,
    d_model=12,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=8,
    eos_token_id=30,
    begin_suppress_tokens=(),
)
