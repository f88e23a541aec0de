"""The BERT encoder against a plain float64 transcription of the model, and its loader's errors."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clustax.models.bert import Bert, BertConfig, load

safetensors_numpy = pytest.importorskip("safetensors.numpy")

CONFIG = BertConfig(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=10,
    type_vocab_size=2,
    layer_norm_eps=1e-5,
)
ENTRIES = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
LENGTHS = np.array([9, 4, 1])
VALID = np.arange(9) < LENGTHS[:, None]


def tensors(seed=0):
    """Random weights under Hugging Face's names, as PyTorch stores them: (out, in)."""
    rng = np.random.default_rng(seed)
    d, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG.vocab_size, d),
        "embeddings.position_embeddings.weight": (CONFIG.max_position_embeddings, d),
        "embeddings.token_type_embeddings.weight": (CONFIG.type_vocab_size, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
    }
    for layer in range(CONFIG.num_hidden_layers):
        linears = {
            "attention.self.query": (d, d),
            "attention.self.key": (d, d),
            "attention.self.value": (d, d),
            "attention.output.dense": (d, d),
            "intermediate.dense": (inner, d),
            "output.dense": (d, inner),
        }
        for name, shape in linears.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (d,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (d,)
    return {n: (0.5 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    shape = VALID.shape
    return rng.integers(0, CONFIG.vocab_size, shape), rng.integers(0, CONFIG.type_vocab_size, shape)


def transcription(weights, tokens, lengths, token_types):
    """BERT in float64, one sequence, one head and one query at a time; padding is cut off."""
    weights = {name: w.astype(np.float64) for name, w in weights.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.layer_norm_eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def gelu(x):
        return np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x)

    results = []
    for row, types, length in zip(tokens, token_types, lengths, strict=True):
        x = weights["embeddings.word_embeddings.weight"][row[:length]]
        x = x + weights["embeddings.position_embeddings.weight"][:length]
        x = x + weights["embeddings.token_type_embeddings.weight"][types[:length]]
        x = norm(x, "embeddings.LayerNorm")
        for layer in range(CONFIG.num_hidden_layers):
            at = f"encoder.layer.{layer}"
            q, k, v = (
                linear(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value")
            )
            attended = np.zeros_like(x)
            for head in range(CONFIG.num_attention_heads):
                part = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
                for i in range(length):
                    weight = np.exp(k[:, part] @ q[i, part] / math.sqrt(CONFIG.head_dim))
                    attended[i, part] = weight @ v[:, part] / weight.sum()
            attended = linear(attended, f"{at}.attention.output.dense")
            x = norm(x + attended, f"{at}.attention.output.LayerNorm")
            inner = linear(gelu(linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x = norm(x + inner, f"{at}.output.LayerNorm")
        results.append(x)
    return results


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes weights (and entries of config.json) and gives the folder."""

    def write(weights, **entries):
        (tmp_path / "config.json").write_text(json.dumps({**ENTRIES, **entries}))
        safetensors_numpy.save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("prefix", ["", "bert.", "model.encoder."])
def test_equals_the_transcription(folder, prefix):
    weights = tensors()
    tokens, token_types = inputs()
    extra = {
        "pooler.dense.weight": np.ones((3, 3), np.float32),
        "embeddings.position_ids": np.arange(10)[None],
    }
    stored = {prefix + name: w for name, w in (weights | extra).items()}
    stored["cls.predictions.bias"] = np.ones(31, np.float32)
    bert = load(folder(stored, model_type="bert", pad_token_id=0))

    hidden = bert(jnp.asarray(tokens), jnp.asarray(LENGTHS), jnp.asarray(token_types))

    assert hidden.shape == (3, 9, 12)
    assert hidden.dtype == jnp.float32
    expected = transcription(weights, tokens, LENGTHS, token_types)
    for got, want, length in zip(hidden, expected, LENGTHS, strict=True):
        np.testing.assert_allclose(got[:length], want, atol=1e-5)


def test_no_token_types_means_zeros(folder):
    tokens, _ = inputs()
    bert = load(folder(tensors()))
    hidden = bert(jnp.asarray(tokens), jnp.asarray(LENGTHS))
    expected = transcription(tensors(), tokens, LENGTHS, np.zeros_like(tokens))
    np.testing.assert_allclose(hidden[VALID], np.concatenate(expected), atol=1e-5)


def test_names_of_tensorflow_checkpoints(folder):
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): w
        for name, w in tensors().items()
    }
    norm = load(folder(renamed)).layers[1].attention_norm
    name = "encoder.layer.1.attention.output.LayerNorm"
    np.testing.assert_array_equal(norm.scale[...], tensors()[f"{name}.weight"])
    np.testing.assert_array_equal(norm.bias[...], tensors()[f"{name}.bias"])


def test_padding_has_no_influence(folder):
    bert = load(folder(tensors()))
    tokens, token_types = inputs()
    changed = np.where(VALID, tokens, (tokens + 1) % CONFIG.vocab_size)
    lengths = jnp.asarray(LENGTHS)
    one, two = (bert(jnp.asarray(t), lengths, jnp.asarray(token_types)) for t in (tokens, changed))
    np.testing.assert_array_equal(one[VALID], two[VALID])
    assert np.isfinite(one).all()


def mean_of_values(query, key, value, *, query_seq_lengths, key_value_seq_lengths):
    """An attention_fn that weighs all valid keys alike."""
    valid = jnp.arange(key.shape[1]) < key_value_seq_lengths[:, None]
    weights = valid / valid.sum(1, keepdims=True)
    return jnp.broadcast_to(jnp.einsum("bs,bsnh->bnh", weights, value)[:, None], query.shape)


def test_attention_per_layer(folder):
    """A layer sees its own attention_fn: uniform weights equal exact attention of zero queries."""
    weights = tensors()
    bert = load(folder(weights), attention_fn=[jax.nn.dot_product_attention, mean_of_values])
    for part in ("weight", "bias"):
        weights[f"encoder.layer.1.attention.self.query.{part}"] *= 0
    tokens, token_types = inputs()
    hidden = bert(jnp.asarray(tokens), jnp.asarray(LENGTHS), jnp.asarray(token_types))
    expected = transcription(weights, tokens, LENGTHS, token_types)
    np.testing.assert_allclose(hidden[VALID], np.concatenate(expected), atol=1e-5)


def test_with_attention_shares_the_weights(folder):
    exact = load(folder(tensors()))
    uniform = exact.with_attention(mean_of_values)
    kernels = [model.layers[1].attention.query.kernel[...] for model in (uniform, exact)]
    assert kernels[0] is kernels[1]
    assert exact.attention_fns == (jax.nn.dot_product_attention,) * 2

    tokens, lengths = jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS)
    before = exact(tokens, lengths)
    assert np.abs(before - uniform(tokens, lengths))[0].max() > 1e-2
    back = uniform.with_attention(jax.nn.dot_product_attention)
    np.testing.assert_array_equal(back(tokens, lengths), before)


def test_jit_retraces_only_for_another_attention(folder):
    traces = []

    @nnx.jit
    def encode(model, tokens, lengths):
        traces.append(model.attention_fns[0])
        return model(tokens, lengths)

    exact = load(folder(tensors()))
    tokens, lengths = jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS)
    compiled = encode(exact, tokens, lengths)
    encode(exact.with_attention(jax.nn.dot_product_attention), tokens + 1, lengths)
    encode(exact.with_attention(mean_of_values), tokens, lengths)
    assert traces == [jax.nn.dot_product_attention, mean_of_values]
    np.testing.assert_allclose(compiled[VALID], exact(tokens, lengths)[VALID], atol=1e-5)


def test_projections(folder):
    """Those of layer 0 follow from the embeddings; those of layer 1 give that layer's output."""
    bert = load(folder(tensors()))
    tokens, lengths = jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS)
    query, key, value = bert.projections(tokens, lengths, 1)
    assert query.shape == key.shape == value.shape == (3, 9, 3, 4)
    attended = jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )
    replayed = bert.with_attention([bert.attention_fns[0], lambda *_, **__: attended])
    np.testing.assert_allclose(
        replayed(tokens, lengths)[VALID], bert(tokens, lengths)[VALID], atol=1e-6
    )
    embedded = bert.embeddings(tokens, None)
    key = bert.projections(tokens, lengths, 0)[1].reshape(3, 9, 12)
    np.testing.assert_array_equal(key[VALID], bert.layers[0].attention.key(embedded)[VALID])


def test_random_weights():
    bert = Bert(CONFIG, rngs=nnx.Rngs(0))
    hidden = bert(jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS))
    np.testing.assert_allclose(hidden[VALID].mean(-1), 0, atol=1e-6)  # ends with a LayerNorm


def test_every_missing_or_misshapen_tensor_is_named(folder):
    weights = {"bert." + name: w for name, w in tensors().items()}
    del weights["bert.embeddings.word_embeddings.weight"]
    del weights["bert.encoder.layer.1.output.LayerNorm.bias"]
    weights["bert.encoder.layer.0.intermediate.dense.weight"] = np.ones((12, 20), np.float32)
    with pytest.raises(ValueError, match="must hold the Bert that") as error:
        load(folder(weights))
    message = str(error.value)
    assert "embeddings.word_embeddings.weight is missing" in message
    assert "encoder.layer.1.output.LayerNorm.bias is missing" in message
    assert "encoder.layer.0.intermediate.dense.weight has shape (12, 20), not (20, 12)" in message
    assert message.count("encoder.") == 2
    assert message.count("is missing") == 2


def test_two_encoders_in_a_file_are_refused(folder):
    weights = {prefix + name: w for prefix in ("query.", "text.") for name, w in tensors().items()}
    with pytest.raises(ValueError, match=r"several: \['query\.', 'text\.'\]"):
        load(folder(weights))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
    ],
)
def test_models_that_are_not_served_are_refused(folder, name, value):
    with pytest.raises(ValueError, match=f"{name} .* got {value!r}"):
        load(folder(tensors(), **{name: value}))


def test_callers_mistakes():
    with pytest.raises(ValueError, match=r"num_attention_heads, got 10 and 3"):
        BertConfig(hidden_size=10, num_attention_heads=3)
    with pytest.raises(ValueError, match="one per layer, here 2, got 3"):
        Bert(CONFIG, attention_fn=[mean_of_values] * 3, rngs=nnx.Rngs(0))
    bert = Bert(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError,
        match=r"at most 10 positions \(max_position_embeddings=10\), got shape \(1, 11\)",
    ):
        bert(jnp.ones((1, 11), int), jnp.array([11]))


def test_missing_safetensors_says_what_to_install(folder, monkeypatch, tmp_path):
    folder(tensors())
    monkeypatch.setitem(sys.modules, "safetensors.flax", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(tmp_path)
