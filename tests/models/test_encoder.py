"""The encoder against a plain float64 transcription, and under the transforms of NNX."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import clustax
from clustax.models import Encoder, EncoderLayer
from clustax.models.encoder import gelu
from tests.helpers import others_once

D, HEADS, LENGTH = 12, 3, 9
LENGTHS = jnp.array([9, 4, 1])
VALID = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
X = jax.random.normal(jax.random.key(0), (3, LENGTH, D))
ROUGH = clustax.ClusteredAttention(num_clusters=3, topk=2, num_bits=16, num_iterations=2)

run = nnx.jit(lambda encoder, hidden, lengths: encoder(hidden, lengths))


def make(num_layers=2, **options):
    """An encoder whose weights are all random, in evaluation mode."""
    encoder = Encoder(num_layers, D, HEADS, **options, rngs=nnx.Rngs(0))
    encoder.eval()
    randomise(encoder)
    return encoder


def randomise(module):
    """Gives biases and norms values, too, which start as zeros and ones."""
    rng = np.random.default_rng(0)
    parameters = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.5, x.shape)), parameters))


def transcription(encoder, x, norm_first, activation):
    """The encoder in float64, one sequence without padding, one head and one query at a time."""
    x = np.asarray(x, np.float64)

    def linear(x, module):
        bias = 0 if module.bias is None else np.asarray(module.bias[...], np.float64)
        return x @ np.asarray(module.kernel[...], np.float64) + bias

    def norm(x, module):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * np.asarray(module.scale[...]) + np.asarray(module.bias[...])

    def attend(x, attention):
        q, k, v = (linear(x, getattr(attention, name)) for name in ("query", "key", "value"))
        attended = np.zeros_like(x)
        for part in np.split(np.arange(D), HEADS):
            for i in range(len(x)):
                weight = np.exp(k[:, part] @ q[i, part] / math.sqrt(len(part)))
                attended[i, part] = weight @ v[:, part] / weight.sum()
        return linear(attended, attention.output)

    def feed(x, network):
        return linear(activation(linear(x, network.intermediate)), network.output)

    for layer in encoder.layers:
        if norm_first:
            x = x + attend(norm(x, layer.attention_norm), layer.attention)
            x = x + feed(norm(x, layer.feed_forward_norm), layer.feed_forward)
        else:
            x = norm(x + attend(x, layer.attention), layer.attention_norm)
            x = norm(x + feed(x, layer.feed_forward), layer.feed_forward_norm)
    return x if encoder.norm is None else norm(x, encoder.norm)


def exact_gelu(x):
    return np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x)


VARIANTS = {
    "paper": ({}, False, lambda x: np.maximum(x, 0)),
    "norm first": ({"norm_first": True, "d_ff": 20}, True, lambda x: np.maximum(x, 0)),
    "gelu": ({"activation": gelu, "key_bias": False}, False, exact_gelu),
    "final norm": ({"final_norm": True}, False, lambda x: np.maximum(x, 0)),
    "no final norm": (
        {"norm_first": True, "final_norm": False, "activation": gelu},
        True,
        exact_gelu,
    ),
}


@pytest.mark.parametrize("variant", others_once(*VARIANTS))
def test_equals_the_transcription(variant):
    options, norm_first, activation = VARIANTS[variant]
    encoder = make(**options)
    assert (encoder.norm is not None) == options.get("final_norm", norm_first)
    got = run(encoder, X, LENGTHS)
    assert got.dtype == jnp.float32
    for row, x, length in zip(got, X, LENGTHS, strict=True):
        expected = transcription(encoder, x[:length], norm_first, activation)
        np.testing.assert_allclose(row[:length], expected, rtol=1e-4, atol=1e-4)
    whole = transcription(encoder, X[1], norm_first, activation)
    np.testing.assert_allclose(run(encoder, X, None)[1], whole, rtol=1e-4, atol=1e-4)


def test_inner_size_is_four_times_the_outer_one():
    assert make().layers[1].feed_forward.intermediate.kernel.shape == (D, 4 * D)
    assert make(d_ff=5).layers[1].feed_forward.output.kernel.shape == (5, D)


@pytest.mark.once
@pytest.mark.parametrize("attention_fn", [jax.nn.dot_product_attention, ROUGH])
def test_padding_has_no_influence(attention_fn):
    """Not on outputs and not on gradients, whatever it holds."""

    @nnx.jit
    @nnx.value_and_grad(argnums=(0, 1), has_aux=True)
    def compute(encoder, x):
        outputs = jnp.where(VALID[..., None], encoder(x, LENGTHS), 0)
        return jnp.sum(outputs**2), outputs

    encoder = make(num_layers=1, attention_fn=attention_fn)
    garbage = jnp.array([1e6, jnp.inf, jnp.nan])[jnp.arange(LENGTH) % 3, None]
    soiled, clean = compute(encoder, jnp.where(VALID[..., None], X, garbage)), compute(encoder, X)
    jax.tree.map(np.testing.assert_array_equal, soiled, clean)
    np.testing.assert_allclose(clean[0][1], encoder(X, LENGTHS) * VALID[..., None], atol=1e-4)


class Spy:
    """An ``attention_fn`` that keeps the keywords it is called with."""

    def __call__(self, query, key, value, **keywords):
        self.keywords = keywords
        return value


def test_each_layer_has_its_attention():
    first, second = Spy(), Spy()
    encoder = make(attention_fn=[first, second])
    encoder(X, LENGTHS)
    for spy in (first, second):
        assert list(spy.keywords) == ["query_seq_lengths", "key_value_seq_lengths"]
        assert all(lengths is LENGTHS for lengths in spy.keywords.values())
    encoder(X)  # An attention that knows of no lengths is given none.
    assert first.keywords == second.keywords == {}


@pytest.mark.once
def test_projections():
    for norm_first in (False, True):
        encoder = make(norm_first=norm_first, final_norm=True)
        query, key, value = encoder.projections(X, LENGTHS, 1)
        assert query.shape == (3, LENGTH, HEADS, D // HEADS)
        attended = jax.nn.dot_product_attention(
            query, key, value, query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS
        )
        replay = [encoder.attention_fns[0], lambda *_, out=attended, **__: out]
        replayed = encoder.with_attention(replay)
        np.testing.assert_allclose(
            run(replayed, X, LENGTHS)[VALID], run(encoder, X, LENGTHS)[VALID], rtol=1e-4, atol=1e-5
        )


@pytest.mark.once
def test_clustered_attention_with_all_keys_is_exact():
    clustered = make().with_attention(clustax.ClusteredAttention(num_clusters=2, topk=LENGTH))
    np.testing.assert_allclose(
        run(clustered, X, LENGTHS)[VALID], run(make(), X, LENGTHS)[VALID], rtol=1e-4, atol=1e-4
    )


@pytest.mark.once
def test_with_attention_shares_the_weights():
    exact = make()
    rough = exact.with_attention(ROUGH)
    kernels = [encoder.layers[1].attention.query.kernel[...] for encoder in (exact, rough)]
    assert kernels[0] is kernels[1]
    assert rough.attention_fns == (ROUGH,) * 2
    assert exact.attention_fns == (jax.nn.dot_product_attention,) * 2
    assert jnp.abs(run(rough, X, LENGTHS) - run(exact, X, LENGTHS))[VALID].max() > 1e-2


def test_dropout():
    """Training drops out other units in each call and layer; evaluation, and a rate of 0, none."""
    encoder, without = make(), make(dropout_rate=0)
    expected = run(without, X, LENGTHS)
    assert not jax.tree.leaves(nnx.state(without, nnx.RngState))
    np.testing.assert_array_equal(run(encoder, X, LENGTHS), expected)
    encoder.train()
    one, two = run(encoder, X, LENGTHS), run(encoder, X, LENGTHS)
    assert jnp.abs(one - two)[VALID].max() > 1e-2
    keys = [layer.dropout.rngs.key[...] for layer in encoder.layers]
    assert keys[0] != keys[1]
    encoder.eval()
    np.testing.assert_array_equal(run(encoder, X, LENGTHS), expected)


@pytest.mark.once
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_of_everything_leaves_the_residuals(norm_first):
    encoder = make(norm_first=norm_first, final_norm=False, dropout_rate=1.0)
    encoder.train()
    expected = X
    if not norm_first:
        for layer in encoder.layers:
            expected = layer.feed_forward_norm(layer.attention_norm(expected))
    np.testing.assert_allclose(encoder(X), expected, atol=1e-6)


@pytest.mark.once
def test_rematerialisation_changes_no_gradient():
    """Nor does it drop out other units the second time."""

    def gradient(apply):
        (layer,) = make(num_layers=1, key_bias=False).layers  # the gradient of that bias is 0
        layer.train()

        def loss(layer):
            hidden = apply(layer, X, LENGTHS, ROUGH)
            return jnp.mean(jnp.where(VALID[..., None], hidden, 0) ** 2)

        return nnx.jit(nnx.grad(loss))(layer)

    got = gradient(nnx.remat(EncoderLayer.__call__, static_argnums=3))
    expected = gradient(EncoderLayer.__call__)
    assert all(jnp.abs(x).max() > 1e-3 for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), got, expected
    )


@pytest.mark.parametrize("norm_first", others_once(False, True))
def test_blocks_change_no_output_and_no_gradient(norm_first):
    def outputs(block_size):
        encoder = make(norm_first=norm_first, block_size=block_size)

        @nnx.jit
        @nnx.value_and_grad(has_aux=True)
        def loss(encoder, hidden):
            out = jnp.where(VALID[..., None], encoder(hidden, LENGTHS), 0)
            return jnp.sum(out**2), out

        (_, out), gradient = loss(encoder, X)
        return out, gradient

    expected = outputs(None)
    assert min(jnp.abs(x).max() for x in jax.tree.leaves(expected)) > 0
    for block_size in (LENGTH, 4):  # one block; three, of which the last one is not full
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-5),
            outputs(block_size),
            expected,
        )


def test_each_block_has_a_dropout_of_its_own():
    encoder = make(num_layers=1, norm_first=True, final_norm=False, block_size=3)
    encoder = encoder.with_attention(lambda query, key, value: jnp.zeros_like(value))
    same = jnp.broadcast_to(X[:, :1], X.shape)
    out = encoder(same)
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1], X.shape), rtol=1e-6)
    encoder.train()
    encoder.layers[0].attention.output.bias[...] = jnp.zeros(D)  # nothing to drop out but the rest
    blocks = encoder(same).reshape(3, 3, 3, D)
    assert jnp.abs(blocks[:, 0] - blocks[:, 1]).max() > 0.1
    assert jnp.abs(blocks[:, 1] - blocks[:, 2]).max() > 0.1


@pytest.mark.once
def test_blocks_save_the_memory_of_hidden_activations():
    def bytes_per_position(block_size, length=4096):
        layer = EncoderLayer(32, 2, 512, dropout_rate=0, block_size=block_size, rngs=nnx.Rngs(0))
        graph, params, others = nnx.split(layer, nnx.Param, ...)

        def loss(params, hidden):
            layer = nnx.merge(graph, params, others)
            return jnp.sum(layer(hidden, None, ROUGH) ** 2)

        hidden = jax.ShapeDtypeStruct((1, length, 32), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes / length

    assert bytes_per_position(256) < bytes_per_position(None) - 2 * 4 * 512


@pytest.mark.parametrize(
    ("mode", "attention_fn"),
    others_once(("eval", jax.nn.dot_product_attention), ("train", ROUGH)),
)
def test_scan_over_stacked_layers_equals_the_loop(mode, attention_fn):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return EncoderLayer(D, HEADS, rngs=rngs)

    def apply(layer, hidden):
        return layer(hidden, LENGTHS, attention_fn)

    layers = stack(nnx.Rngs(0))
    getattr(layers, mode)()
    graph, state = nnx.split(layers)
    expected, compiled = X, nnx.jit(apply)
    for i in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        expected = compiled(layer, expected)
    scan = nnx.jit(nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry))
    np.testing.assert_allclose(scan(layers, X)[VALID], expected[VALID], rtol=1e-4, atol=1e-5)


def test_jit_compiles_once_for_all_layers():
    traces = []

    def counted(query, key, value, **lengths):
        traces.append(query.shape)
        return jax.nn.dot_product_attention(query, key, value, **lengths)

    apply = nnx.jit(EncoderLayer.__call__, static_argnums=3)
    hidden = X
    for layer in make().layers:
        hidden = apply(layer, hidden, LENGTHS, counted)
    assert len(traces) == 1
    np.testing.assert_allclose(hidden[VALID], run(make(), X, LENGTHS)[VALID], rtol=1e-4, atol=1e-5)


def test_callers_mistakes():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="d_model must be a multiple of num_heads, got 12 and 5"):
        EncoderLayer(12, 5, rngs=rngs)
    with pytest.raises(ValueError, match=r"dropout_rate must be from 0 to 1, got 1\.5"):
        EncoderLayer(12, 3, dropout_rate=1.5, rngs=rngs)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        EncoderLayer(12, 3, block_size=0, rngs=rngs)
    with pytest.raises(ValueError, match="one per layer, here 2, got 3"):
        Encoder(2, 12, 3, attention_fn=[ROUGH] * 3, rngs=rngs)
    with pytest.raises(ValueError, match="one per layer, here 2, got 1"):
        make().with_attention([ROUGH])
    for shape in ((9, 12), (3, 9, 11)):
        with pytest.raises(ValueError, match=r"\(B, T, 12\), got \(") as error:
            make()(jnp.ones(shape))
        assert str(shape) in str(error.value)
