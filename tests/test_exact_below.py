"""Short inputs take exact attention where they are told to: from which length on, and how."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import clustax.linen
import clustax.nnx
from clustax import ClusteredAttention, Clusters, clustered_attention
from clustax.diagnostics import approximation_error, measure_layers
from clustax.models import Encoder
from tests import oracle
from tests.cases import BY_NAME, Case, Inputs, make_clusters, make_inputs
from tests.conftest import IMPLEMENTATIONS
from tests.helpers import (
    as_numpy,
    double,
    largest_error,
    others_once,
    outputs_and_gradients,
    random_like_output,
)

SCALE = 0.5  # not the default one
CASES = [BY_NAME[name] for name in ("everything", "no_batch_axis_cross", "padding_to_nothing")]
ROUGH = ClusteredAttention.paper(num_clusters=3, topk=0, num_iterations=2)
EXACT = dataclasses.replace(ROUGH, exact_below=13)
X = jax.random.normal(jax.random.key(0), (2, 12, 8))


def attend(inputs: Inputs, **settings):
    return clustered_attention(
        *inputs[:5],
        num_clusters=3,
        topk=2,
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        **settings,
    )


def with_junk(inputs: Inputs) -> Inputs:
    """NaN in queries, and infinity in keys and values, that lengths leave out."""

    def replace(x, lengths, junk):
        if lengths is None:
            return x
        return jnp.where(
            jnp.arange(x.shape[-3])[:, None, None] < lengths[..., None, None, None], x, junk
        )

    return inputs._replace(
        query=replace(inputs.query, inputs.query_seq_lengths, jnp.nan),
        key=replace(inputs.key, inputs.key_value_seq_lengths, jnp.inf),
        value=replace(inputs.value, inputs.key_value_seq_lengths, jnp.nan),
    )


@pytest.mark.parametrize("case", others_once(*CASES), ids=str)
def test_outputs_and_gradients_are_those_of_exact_attention(case):
    """Outputs against loops in NumPy, gradients against the reference with all keys as top-k."""
    inputs = make_inputs(case)
    cotangent = random_like_output(inputs)

    @jax.jit
    def evaluate(inputs, scale):
        def outputs(query, key, value, bias, scale):
            replaced = inputs._replace(query=query, key=key, value=value, bias=bias)
            return attend(replaced, scale=scale, exact_below=case.T + 1)

        out, vjp = jax.vjp(outputs, *inputs[:4], scale)
        return out, vjp(cotangent)

    out, gradients = evaluate(with_junk(inputs), jnp.float32(SCALE))
    assert out.dtype == jnp.float32
    assert largest_error(out, oracle.attend(inputs, scale=SCALE)) <= 1e-5
    with jax.enable_x64(True):
        ((_, expected),) = as_numpy(
            outputs_and_gradients(
                double(inputs),
                make_clusters(case),
                double(cotangent),
                jnp.float64(SCALE),
                settings=((case.S, "mass", 1),),
                implementation="reference",
            )
        )
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            assert largest_error(gradient, wanted) <= 1e-4


@pytest.mark.once
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    inputs = make_inputs(BY_NAME["everything"], dtype)
    out = attend(inputs, exact_below=100)
    assert out.dtype == dtype
    assert largest_error(out, oracle.attend(inputs)) <= 4 * jnp.finfo(dtype).eps


@pytest.mark.once
def test_the_length_decides_and_nothing_is_clustered_below():
    inputs = make_inputs(Case("short", T=12, S=9, key_lengths=(9, 4)))
    exact, clustered = oracle.attend(inputs), attend(inputs)
    assert largest_error(clustered, exact) > 0.1
    np.testing.assert_array_equal(attend(inputs, exact_below=12), clustered)
    assert largest_error(attend(inputs, exact_below=13), exact) <= 1e-5

    def primitives(exact_below):
        return str(jax.make_jaxpr(partial(attend, exact_below=exact_below))(inputs))

    for primitive in ("scan", "sort", "random_bits"):  # of K-means, tiles, and hash planes
        assert f"{primitive}[" in primitives(12)
        assert f"{primitive}[" not in primitives(13)


@pytest.mark.once
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, ("pallas", "xla")], ids=str)
def test_it_is_the_same_for_all_implementations(implementation):
    """Also where Pallas could not run, as on a CPU without the interpreter."""
    inputs = make_inputs(BY_NAME["plain"])
    out = attend(inputs, exact_below=100, implementation=implementation)
    np.testing.assert_array_equal(out, attend(inputs, exact_below=100))


@pytest.mark.once
def test_settings_are_those_of_the_function():
    query, key, value = make_inputs(Case("short", T=12, S=9))[:3]
    mask = jnp.arange(9.0)[None, None, None] < 7
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask)
    assert largest_error(EXACT(query, key, value, mask=mask.astype(float)), expected) <= 1e-6
    assert largest_error(ROUGH(query, key, value, mask=mask.astype(float)), expected) > 0.1
    one_cluster = Clusters(jnp.zeros((2, 1, 12), int), jnp.full((2, 1, 1), 12))
    out = EXACT(query, key, value, mask=mask, clusters=one_cluster)
    assert largest_error(out, expected) <= 1e-6
    error = approximation_error(query, key, value, mask=mask, attention=EXACT)
    assert error.relative.max() <= 1e-6
    assert EXACT.cluster(query, key).counts.sum() == 2 * 2 * 12  # for whoever asks for clusters
    with pytest.raises(NotImplementedError, match="is_causal"):
        EXACT(query, query, query, is_causal=True)


@pytest.mark.once
def test_modules_of_nnx():
    settings = {"decode": False, "rngs": nnx.Rngs(0)}
    exact = nnx.MultiHeadAttention(2, 8, **settings)
    layer = clustax.nnx.ClusteredMultiHeadAttention(2, 8, attention=EXACT, **settings)
    nnx.update(layer, nnx.state(exact))
    expected = exact(X)
    assert largest_error(layer(X), expected) <= 1e-6
    assert largest_error(layer(X, clusters=layer.cluster(X)), expected) <= 1e-6
    _, (figures,) = measure_layers(layer, lambda layer: layer(X))
    assert figures.error.relative.max() <= 1e-6
    layer.attention_fn = ROUGH
    assert largest_error(layer(X), expected) > 1e-2


@pytest.mark.once
def test_modules_of_linen():
    exact = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = exact.init(jax.random.key(1), X)
    layer = clustax.linen.ClusteredMultiHeadAttention(num_heads=2, attention_fn=EXACT)
    expected = exact.apply(variables, X)
    clusters = layer.apply(variables, X, method="cluster")
    for out in (layer.apply(variables, X), layer.apply(variables, X, clusters=clusters)):
        assert largest_error(out, expected) <= 1e-6
    rough = layer.clone(attention_fn=ROUGH)
    assert largest_error(rough.apply(variables, X), expected) > 1e-2


@pytest.mark.once
def test_an_encoder_switches_by_length():
    """The same model: exact for short inputs, clustered for long ones."""
    encoder = Encoder(1, 8, 2, attention_fn=EXACT, rngs=nnx.Rngs(0))
    encoder.eval()
    long = jnp.concatenate([X, X], axis=1)
    for inputs, attention in ((X, jax.nn.dot_product_attention), (long, ROUGH)):
        lengths = jnp.array([inputs.shape[1], 7])
        expected = encoder.with_attention(attention)(inputs, lengths)
        assert largest_error(encoder(inputs, lengths)[0], expected[0]) <= 1e-5
        assert largest_error(encoder(inputs, lengths)[1, :7], expected[1, :7]) <= 1e-5
