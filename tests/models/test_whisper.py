"""Whisper against a plain float64 transcription, its decoding, and its loader's errors."""

import json
import math
import struct
import sys
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import clustax
from clustax.models import Whisper, WhisperConfig
from clustax.models.whisper import load
from tests.helpers import others_once

safetensors_numpy = pytest.importorskip("safetensors.numpy")

CONFIG = WhisperConfig(
    vocab_size=31,
    num_mel_bins=5,
    d_model=12,
    encoder_layers=2,
    encoder_attention_heads=3,
    encoder_ffn_dim=20,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=16,
    max_source_positions=7,
    max_target_positions=14,
    eos_token_id=29,
    suppress_tokens=(3, 4),
    begin_suppress_tokens=(7, 29),
)
ENTRIES = {field.name: getattr(CONFIG, field.name) for field in fields(CONFIG)}
PROMPT = (30, 1, 2)
SIDES = {
    "encoder": (CONFIG.encoder_layers, CONFIG.encoder_ffn_dim),
    "decoder": (CONFIG.decoder_layers, CONFIG.decoder_ffn_dim),
}


def tensors(seed=0):
    """Random weights under Hugging Face's names, as PyTorch stores them; float16 can hold them."""
    rng = np.random.default_rng(seed)
    d = CONFIG.d_model
    shapes = {
        "encoder.conv1.weight": (d, CONFIG.num_mel_bins, 3),
        "encoder.conv1.bias": (d,),
        "encoder.conv2.weight": (d, d, 3),
        "encoder.conv2.bias": (d,),
        "encoder.embed_positions.weight": (CONFIG.max_source_positions, d),
        "decoder.embed_tokens.weight": (CONFIG.vocab_size, d),
        "decoder.embed_positions.weight": (CONFIG.max_target_positions, d),
    }
    for side, (layers, inner) in SIDES.items():
        norms = [f"{side}.layer_norm"]
        for at in (f"{side}.layers.{layer}" for layer in range(layers)):
            attentions = ["self_attn"] + ["encoder_attn"] * (side == "decoder")
            for name in attentions:
                for part in ("q", "k", "v", "out"):
                    shapes[f"{at}.{name}.{part}_proj.weight"] = (d, d)
                    if part != "k":
                        shapes[f"{at}.{name}.{part}_proj.bias"] = (d,)
            shapes |= {f"{at}.fc1.weight": (inner, d), f"{at}.fc1.bias": (inner,)}
            shapes |= {f"{at}.fc2.weight": (d, inner), f"{at}.fc2.bias": (d,)}
            norms += [f"{at}.{name}_layer_norm" for name in (*attentions, "final")]
        shapes |= {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}
    return {
        name: (0.6 * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_hugging_face(folder, weights, prefix="model.", **entries):
    (folder / "config.json").write_text(json.dumps({**ENTRIES, **entries}))
    stored = {prefix + name: weight for name, weight in weights.items()}
    safetensors_numpy.save_file(stored, folder / "model.safetensors")
    return folder


def ctranslate2_variables(weights):
    """The same weights under CTranslate2's names, with its fused projections."""
    renamed = {
        "encoder/num_heads": np.int16(CONFIG.encoder_attention_heads),
        "decoder/num_heads": np.int16(CONFIG.decoder_attention_heads),
        "decoder/embeddings/weight": weights["decoder.embed_tokens.weight"],
    }
    for name in ("conv1/weight", "conv1/bias", "conv2/weight", "conv2/bias"):
        renamed[f"encoder/{name}"] = weights[f"encoder.{name.replace('/', '.')}"]
    for side, (layers, _) in SIDES.items():
        positions = weights[f"{side}.embed_positions.weight"]
        renamed[f"{side}/position_encodings/encodings"] = positions
        norms = {f"{side}/layer_norm": f"{side}.layer_norm"}
        for i in range(layers):
            to, at = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norms[f"{to}/self_attention/layer_norm"] = f"{at}.self_attn_layer_norm"
            norms[f"{to}/ffn/layer_norm"] = f"{at}.final_layer_norm"
            fused = {
                "self_attention/linear_0": ("self_attn", "q_proj", "k_proj", "v_proj"),
                "self_attention/linear_1": ("self_attn", "out_proj"),
            }
            if side == "decoder":
                norms[f"{to}/attention/layer_norm"] = f"{at}.encoder_attn_layer_norm"
                fused |= {
                    "attention/linear_0": ("encoder_attn", "q_proj"),
                    "attention/linear_1": ("encoder_attn", "k_proj", "v_proj"),
                    "attention/linear_2": ("encoder_attn", "out_proj"),
                }
            for linear, (name, *parts) in fused.items():
                for leaf in ("weight", "bias"):
                    renamed[f"{to}/{linear}/{leaf}"] = np.concatenate(
                        [
                            weights.get(f"{at}.{name}.{part}.{leaf}", np.zeros(12, np.float32))
                            for part in parts
                        ]
                    )
            for linear, name in (("linear_0", "fc1"), ("linear_1", "fc2")):
                for leaf in ("weight", "bias"):
                    renamed[f"{to}/ffn/{linear}/{leaf}"] = weights[f"{at}.{name}.{leaf}"]
        for to, at in norms.items():
            renamed[f"{to}/gamma"] = weights[f"{at}.weight"]
            renamed[f"{to}/beta"] = weights[f"{at}.bias"]
    return renamed


def write_ctranslate2(folder, variables, dtype=np.float16, spec="WhisperSpec", version=6):
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    kinds = [np.float32, np.int8, np.int16, np.int32, np.float16]
    data = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(variables))
    for name, variable in variables.items():
        if variable.dtype == np.float32:
            variable = variable.astype(dtype)
        data += string(name) + struct.pack(f"<B{variable.ndim}I", variable.ndim, *variable.shape)
        data += struct.pack("<BI", kinds.index(variable.dtype), variable.nbytes)
        data += variable.tobytes()
    data += struct.pack("<I", 1)
    data += string("decoder/projection/weight") + string("decoder/embeddings/weight")
    (folder / "model.bin").write_bytes(data)
    entries = {"suppress_ids": CONFIG.suppress_tokens}
    entries["suppress_ids_begin"] = CONFIG.begin_suppress_tokens
    (folder / "config.json").write_text(json.dumps(entries))
    words = [f"word{i}" for i in range(29)] + ["<|endoftext|>", "<|startoftranscript|>"]
    (folder / "vocabulary.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def whisper(tmp_path):
    return load(write_hugging_face(tmp_path, tensors()))


compute_logits = nnx.jit(lambda whisper, mel, tokens: whisper(mel, tokens))
encode = nnx.jit(lambda whisper, mel: whisper.encode(mel))


def inputs(batch=2, length=6, seed=1):
    rng = np.random.default_rng(seed)
    mel = rng.standard_normal((batch, 5, 14)).astype(np.float32)
    return jnp.asarray(mel), jnp.asarray(rng.integers(0, 31, (batch, length)))


class Transcription:
    """Whisper in float64, one sequence, one head and one query at a time."""

    def __init__(self, weights):
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def gelu(self, x):
        return np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x)

    def conv(self, x, name, stride):
        x = np.concatenate([np.zeros_like(x[:1]), x, np.zeros_like(x[:1])])
        weight = self.weights[f"{name}.weight"]
        windows = [x[i : i + 3] for i in range(0, len(x) - 2, stride)]
        sums = [np.einsum("wi,oiw->o", window, weight) for window in windows]
        return self.gelu(np.array(sums) + self.weights[f"{name}.bias"])

    def attention(self, x, source, name, heads, causal=False):
        q = self.linear(x, f"{name}.q_proj")
        k, v = self.linear(source, f"{name}.k_proj"), self.linear(source, f"{name}.v_proj")
        attended = np.zeros_like(x)
        for part in np.split(np.arange(CONFIG.d_model), heads):
            for i in range(len(x)):
                seen = slice(0, i + 1 if causal else None)
                weight = np.exp(k[seen, part] @ q[i, part] / math.sqrt(len(part)))
                attended[i, part] = weight @ v[seen, part] / weight.sum()
        return self.linear(attended, f"{name}.out_proj")

    def feed_forward(self, x, at):
        inner = self.gelu(self.linear(self.norm(x, f"{at}.final_layer_norm"), f"{at}.fc1"))
        return self.linear(inner, f"{at}.fc2")

    def encode(self, mel):
        x = self.conv(np.asarray(mel, np.float64).T, "encoder.conv1", 1)
        x = self.conv(x, "encoder.conv2", 2) + self.weights["encoder.embed_positions.weight"]
        for at in (f"encoder.layers.{i}" for i in range(CONFIG.encoder_layers)):
            y = self.norm(x, f"{at}.self_attn_layer_norm")
            x = x + self.attention(y, y, f"{at}.self_attn", CONFIG.encoder_attention_heads)
            x = x + self.feed_forward(x, at)
        return self.norm(x, "encoder.layer_norm")

    def logits(self, mel, tokens):
        encoded, heads = self.encode(mel), CONFIG.decoder_attention_heads
        x = self.weights["decoder.embed_tokens.weight"][np.asarray(tokens)]
        x = x + self.weights["decoder.embed_positions.weight"][: len(tokens)]
        for at in (f"decoder.layers.{i}" for i in range(CONFIG.decoder_layers)):
            y = self.norm(x, f"{at}.self_attn_layer_norm")
            x = x + self.attention(y, y, f"{at}.self_attn", heads, causal=True)
            y = self.norm(x, f"{at}.encoder_attn_layer_norm")
            x = x + self.attention(y, encoded, f"{at}.encoder_attn", heads)
            x = x + self.feed_forward(x, at)
        return self.norm(x, "decoder.layer_norm") @ self.weights["decoder.embed_tokens.weight"].T


def test_equals_the_transcription(whisper):
    expected = Transcription(tensors())
    mel, tokens = inputs()
    encoded, logits = encode(whisper, mel), compute_logits(whisper, mel, tokens)
    assert encoded.dtype == logits.dtype == jnp.float32
    for i in range(2):
        np.testing.assert_allclose(encoded[i], expected.encode(mel[i]), atol=1e-5)
        np.testing.assert_allclose(logits[i], expected.logits(mel[i], tokens[i]), atol=3e-5)


@pytest.mark.parametrize("dtype", others_once(np.float16, np.float32))
@pytest.mark.parametrize("prefix", others_once("model.", ""))
def test_both_formats_give_the_same_model(tmp_path, dtype, prefix):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    weights = tensors() | {"proj_out.weight": np.ones((31, 12), np.float32)}
    one = load(write_hugging_face(tmp_path / "one", weights, prefix, max_length=448))
    two = load(write_ctranslate2(tmp_path / "two", ctranslate2_variables(weights), dtype))
    assert one.config == two.config == CONFIG
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(two)), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_a_file_can_be_named_itself(tmp_path):
    write_hugging_face(tmp_path, tensors(0))
    file = write_ctranslate2(tmp_path, ctranslate2_variables(tensors(1))) / "model.bin"
    kernel = load(file).embeddings.conv1.kernel
    np.testing.assert_array_equal(kernel[...].T, tensors(1)["encoder.conv1.weight"])


def test_vocabulary_of_newer_versions(tmp_path):
    write_ctranslate2(tmp_path, ctranslate2_variables(tensors()))
    (tmp_path / "vocabulary.json").write_text(json.dumps(["a", "<|endoftext|>"]))
    assert load(tmp_path).config.eos_token_id == 1


def test_generation_config_says_what_is_suppressed(tmp_path):
    write_hugging_face(tmp_path, tensors(), suppress_tokens=None, begin_suppress_tokens=None)
    assert load(tmp_path).config.suppress_tokens == ()
    entries = {"suppress_tokens": [5], "begin_suppress_tokens": [6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(entries))
    assert load(tmp_path).config == replace(
        CONFIG, suppress_tokens=(5,), begin_suppress_tokens=(6,)
    )


def decode_anew(whisper, mel, max_tokens):
    """Decodes without a cache: all positions anew for each token; later ones are not seen."""
    config = whisper.config
    tokens = np.zeros((len(mel), len(PROMPT) + max_tokens), int)
    tokens[:, : len(PROMPT)] = PROMPT
    for position in range(len(PROMPT), tokens.shape[1]):
        logits = np.array(compute_logits(whisper, mel, jnp.asarray(tokens))[:, position - 1])
        logits[:, list(config.suppress_tokens)] = -np.inf
        if position == len(PROMPT):
            logits[:, list(config.begin_suppress_tokens)] = -np.inf
        tokens[:, position] = logits.argmax(-1)
    tokens = tokens[:, len(PROMPT) :]
    ended = np.logical_or.accumulate(tokens == config.eos_token_id, axis=1)
    return np.where(ended, config.eos_token_id, tokens)


@pytest.fixture
def talkative(tmp_path):
    """A model that does not say the same token over and over, as random ones do."""
    weights = tensors(3)
    weights["decoder.embed_positions.weight"] *= 4
    weights["decoder.layer_norm.weight"][:] = 1
    weights["decoder.layer_norm.bias"][:] = 0
    return load(write_hugging_face(tmp_path, weights))


@pytest.mark.once
def test_cached_decoding_equals_decoding_anew(talkative):
    mel, _ = inputs(batch=6)
    endless = decode_anew(talkative, mel, 11)
    assert len(np.unique(endless, axis=0)) > 3
    # Let all texts end at several times, then some, then none.
    assert [(endless == end).any(1).mean() for end in (22, 15, 29)] == [1, 5 / 6, 0]
    for end in (22, 15, 29):
        talkative.config = replace(CONFIG, eos_token_id=end)
        tokens = talkative.transcribe_tokens(mel, PROMPT, max_tokens=11)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, decode_anew(talkative, mel, 11))
        encoded = talkative.decode_tokens(talkative.encode(mel), PROMPT, max_tokens=11)
        np.testing.assert_array_equal(encoded, tokens)
    alone = talkative.transcribe_tokens(mel[:1], jnp.array(PROMPT), max_tokens=5)
    np.testing.assert_array_equal(alone, tokens[:1, :5])


@pytest.mark.once
def test_suppressed_tokens(talkative):
    """Token 9 begins all texts and comes later, too, unless it is suppressed."""
    mel, _ = inputs(batch=6)
    talkative.config = replace(CONFIG, begin_suppress_tokens=(9,))
    tokens = np.asarray(talkative.transcribe_tokens(mel, PROMPT, 11))
    assert (tokens[:, 0] != 9).all()
    assert (tokens == 9).any()
    talkative.config = replace(CONFIG, suppress_tokens=(9,))
    assert (talkative.transcribe_tokens(mel, PROMPT, 11) != 9).all()


def test_prompt():
    assert WhisperConfig().prompt == (50257, 50362)
    assert WhisperConfig(vocab_size=51865, eos_token_id=50257).prompt == (
        50258,
        50259,
        50359,
        50363,
    )
    large_v3 = WhisperConfig(vocab_size=51866, eos_token_id=50257)
    assert large_v3.prompt == (50258, 50259, 50360, 50364)


def mean_of_values(query, key, value):
    """An attention_fn that weighs all keys alike."""
    return jnp.broadcast_to(value.mean(1, keepdims=True), query.shape)


@pytest.mark.once
def test_attention_per_layer(tmp_path):
    """A layer sees its own attention_fn: uniform weights equal exact attention of zero queries."""
    weights = tensors()
    attention_fns = [jax.nn.dot_product_attention, mean_of_values]
    whisper = load(write_hugging_face(tmp_path, weights), attention_fn=attention_fns)
    for part in ("weight", "bias"):
        weights[f"encoder.layers.1.self_attn.q_proj.{part}"] *= 0
    mel, tokens = inputs()
    expected = Transcription(weights).logits(mel[0], tokens[0])
    np.testing.assert_allclose(compute_logits(whisper, mel, tokens)[0], expected, atol=3e-5)


def test_with_attention_shares_the_weights(whisper):
    uniform = whisper.with_attention(mean_of_values)
    query = [model.encoder.layers[1].attention.query.kernel[...] for model in (uniform, whisper)]
    assert query[0] is query[1]
    assert whisper.attention_fns == (jax.nn.dot_product_attention,) * 2

    mel, _ = inputs()
    before = encode(whisper, mel)
    assert np.abs(before - encode(uniform, mel)).max() > 1e-2
    back = uniform.with_attention(jax.nn.dot_product_attention)
    np.testing.assert_array_equal(encode(back, mel), before)


@pytest.mark.once
def test_clustered_attention_with_all_keys_is_exact(whisper):
    mel, _ = inputs()
    clustered = whisper.with_attention(clustax.ClusteredAttention(num_clusters=2, topk=7))
    np.testing.assert_allclose(encode(clustered, mel), encode(whisper, mel), atol=1e-5)
    np.testing.assert_array_equal(
        clustered.transcribe_tokens(mel, PROMPT, 5), whisper.transcribe_tokens(mel, PROMPT, 5)
    )


@pytest.mark.once
def test_transcription_retraces_only_for_another_attention(whisper):
    traces = []

    def counted(query, key, value):
        traces.append(query.shape)
        return mean_of_values(query, key, value)

    mel, _ = inputs()
    for model in (whisper.with_attention(counted), whisper.with_attention(counted)):
        model.transcribe_tokens(mel, PROMPT, 4)
        model.transcribe_tokens(mel + 1, PROMPT, 4)
    assert traces == [(2, 7, 3, 4)] * CONFIG.encoder_layers


@pytest.mark.once
def test_random_weights_can_be_trained():
    """The gradient reaches every parameter; the encoder's sinusoids are none."""
    whisper = Whisper(replace(CONFIG, encoder_layers=1, decoder_layers=1), rngs=nnx.Rngs(0))
    mel, tokens = inputs()
    np.testing.assert_allclose(encode(whisper, mel).mean(-1), 0, atol=1e-6)  # ends with a LayerNorm
    positions = whisper.embeddings.positions[...]
    np.testing.assert_allclose(positions[:, 6:] ** 2 + positions[:, :6] ** 2, 1, atol=1e-6)
    np.testing.assert_allclose(positions[3, [0, 5]], np.sin([3, 3e-4]), atol=1e-6)

    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(model(mel, tokens)[..., 0])))(whisper)
    assert "positions" not in gradients["embeddings"]
    assert all(jnp.abs(gradient).max() > 0 for gradient in jax.tree.leaves(gradients))


def test_every_missing_or_misshapen_tensor_is_named(tmp_path):
    weights = tensors()
    del weights["decoder.embed_tokens.weight"]
    del weights["encoder.layers.1.self_attn.k_proj.weight"]
    weights["encoder.conv1.weight"] = np.ones((12, 3, 5), np.float32)
    weights["decoder.layers.0.fc1.weight"] = np.ones((12, 16), np.int32)
    weights["decoder.layers.1.fc1.weight"] = np.ones((16, 12), np.int32)
    with pytest.raises(ValueError, match="Take all files from the same model") as error:
        load(write_hugging_face(tmp_path, weights))
    message = str(error.value)
    assert "decoder.embed_tokens.weight is missing" in message
    assert "encoder.layers.1.self_attn.k_proj.weight is missing" in message
    assert "encoder.conv1.weight has shape (12, 3, 5), not (12, 5, 3)" in message
    assert "decoder.layers.0.fc1.weight has shape (12, 16), not (16, 12)" in message
    assert "decoder.layers.1.fc1.weight holds int32, not floating point" in message
    assert message.count(";") == 4


def test_tensors_of_ctranslate2_that_are_missing(tmp_path):
    variables = ctranslate2_variables(tensors())
    del variables["encoder/layer_0/self_attention/linear_0/weight"]
    variables["decoder/layer_1/attention/linear_1/bias"] = np.zeros(36, np.float32)
    with pytest.raises(ValueError, match="Take all files from the same model") as error:
        load(write_ctranslate2(tmp_path, variables))
    message = str(error.value)
    assert message.count("encoder/layer_0/self_attention/linear_0/weight is missing") == 1
    assert "decoder/layer_1/attention/linear_1/bias has shape (36,), not (24,)" in message

    del variables["encoder/conv1/weight"], variables["decoder/num_heads"]
    with pytest.raises(
        ValueError, match="decoder/num_heads is missing; encoder/conv1/weight is mis"
    ):
        load(write_ctranslate2(tmp_path, variables))


def test_other_files_of_ctranslate2_are_refused(tmp_path):
    variables = ctranslate2_variables(tensors())
    with pytest.raises(ValueError, match="version 6, got 5: convert"):
        load(write_ctranslate2(tmp_path, variables, version=5))
    with pytest.raises(ValueError, match="hold a WhisperSpec, got TransformerSpec"):
        load(write_ctranslate2(tmp_path, variables, spec="TransformerSpec"))
    file = write_ctranslate2(tmp_path, variables) / "model.bin"
    whole = file.read_bytes()
    for size in (2, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="join its parts in order"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "bert"),
        ("activation_function", "relu"),
        ("scale_embedding", True),
        ("tie_word_embeddings", False),
    ],
)
def test_models_that_are_not_served_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} .* got {value!r}"):
        load(write_hugging_face(tmp_path, tensors(), **{name: value}))


def test_callers_mistakes(whisper, tmp_path):
    with pytest.raises(ValueError, match="decoder_attention_heads, got 384 and 7"):
        WhisperConfig(decoder_attention_heads=7)
    with pytest.raises(ValueError, match="one per layer, here 2, got 3"):
        whisper.with_attention([mean_of_values] * 3)
    mel, tokens = inputs(length=15)
    with pytest.raises(ValueError, match=r"\(B, 5, 14\), got \(2, 14, 5\): make it with"):
        whisper.encode(jnp.swapaxes(mel, 1, 2))
    with pytest.raises(ValueError, match=r"max_target_positions=14 .* shape \(2, 15\)"):
        whisper(mel, tokens)
    with pytest.raises(ValueError, match=r"len\(prompt\)=3 \+ max_tokens=12"):
        whisper.transcribe_tokens(mel, PROMPT, 12)
    for prompt, max_tokens in (((), 3), (PROMPT, 0)):
        with pytest.raises(ValueError, match="at least one token each"):
            whisper.transcribe_tokens(mel, prompt, max_tokens)
        with pytest.raises(ValueError, match="at least one token each"):
            whisper.decode_tokens(whisper.encode(mel), prompt, max_tokens)
    for path in (tmp_path / "nothing", tmp_path / "config.json"):
        with pytest.raises(FileNotFoundError, match=r"model.safetensors, .*, model.bin, .*join"):
            load(path)


def test_missing_safetensors_says_what_to_install(monkeypatch, tmp_path):
    write_hugging_face(tmp_path, tensors())
    monkeypatch.setitem(sys.modules, "safetensors.flax", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(tmp_path)
