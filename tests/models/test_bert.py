"""BERT and RoBERTa against a plain float64 transcription of the models, and the loader's errors."""

import json
import math
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clustax
from clustax.models.bert import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    load,
    save,
)
from tests.helpers import others_once

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
call = nnx.jit(lambda model, *arguments: model(*arguments))

LENGTHS = np.array([9, 4, 1])
VALID = np.arange(9) < LENGTHS[:, None]
NUM_LABELS = 4
# What config.json says of a RoBERTa with as many positions for tokens.
ROBERTA = {
    "model_type": "roberta",
    "pad_token_id": 1,
    "max_position_embeddings": 12,
    "type_vocab_size": 1,
}


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
    return draw(rng, shapes)


def draw(rng, shapes):
    return {n: (0.5 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


HEADS = {
    "bert": (
        "pooler.dense",
        "classifier",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
    ),
    "roberta": (
        "classifier.dense",
        "classifier.out_proj",
        "lm_head.dense",
        "lm_head.layer_norm",
        "lm_head.bias",
    ),
}


def heads(model_type):
    """All heads, under Hugging Face's names without prefix."""
    d, vocab = CONFIG.hidden_size, CONFIG.vocab_size
    dense, classifier, transform, norm, bias = HEADS[model_type]
    shapes = {bias: (vocab,), f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    linears = {dense: d, classifier: NUM_LABELS, "qa_outputs": 2, transform: d}
    for name, size in linears.items():
        shapes |= {f"{name}.weight": (size, d), f"{name}.bias": (size,)}
    return draw(np.random.default_rng(2), shapes)


def roberta_tensors(seed=0):
    """As `tensors`, with two positions more, and one token type."""
    weights = tensors(seed)
    name = "embeddings.position_embeddings.weight"
    weights[name] = np.concatenate([np.full((2, 12), 9, np.float32), weights[name]])
    name = "embeddings.token_type_embeddings.weight"
    weights[name] = weights[name][:1].copy()
    return weights


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    shape = VALID.shape
    return rng.integers(0, CONFIG.vocab_size, shape), rng.integers(0, CONFIG.type_vocab_size, shape)


def norm(x, weights, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.layer_norm_eps)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x)


def transcription(weights, tokens, lengths, token_types):
    """BERT in float64, one sequence, one head and one query at a time; padding is cut off."""
    weights = {name: w.astype(np.float64) for name, w in weights.items()}
    results = []
    for row, types, length in zip(tokens, token_types, lengths, strict=True):
        x = weights["embeddings.word_embeddings.weight"][row[:length]]
        x = x + weights["embeddings.position_embeddings.weight"][:length]
        x = x + weights["embeddings.token_type_embeddings.weight"][types[:length]]
        x = norm(x, weights, "embeddings.LayerNorm")
        for layer in range(CONFIG.num_hidden_layers):
            at = f"encoder.layer.{layer}"
            q, k, v = (
                linear(x, weights, f"{at}.attention.self.{name}")
                for name in ("query", "key", "value")
            )
            attended = np.zeros_like(x)
            for head in range(CONFIG.num_attention_heads):
                part = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
                for i in range(length):
                    weight = np.exp(k[:, part] @ q[i, part] / math.sqrt(CONFIG.head_dim))
                    attended[i, part] = weight @ v[:, part] / weight.sum()
            attended = linear(attended, weights, f"{at}.attention.output.dense")
            x = norm(x + attended, weights, f"{at}.attention.output.LayerNorm")
            inner = gelu(linear(x, weights, f"{at}.intermediate.dense"))
            inner = linear(inner, weights, f"{at}.output.dense")
            x = norm(x + inner, weights, f"{at}.output.LayerNorm")
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


@pytest.mark.parametrize("prefix", others_once("", "bert.", "model.encoder."))
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


@pytest.mark.once
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


@pytest.mark.once
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


@pytest.mark.once
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


@pytest.mark.parametrize(
    ("model_type", "prefix", "outer"),
    others_once(
        ("bert", "bert.", ""),
        ("bert", "module.bert.", "module."),
        ("roberta", "roberta.", ""),
        ("roberta", "model.roberta.", "model."),
    ),
)
def test_heads_equal_their_transcriptions(folder, model_type, prefix, outer):
    encoder = tensors() if model_type == "bert" else roberta_tensors()
    stored = {prefix + name: w for name, w in encoder.items()}
    for name, w in heads(model_type).items():
        stored[(prefix if name.startswith("pooler") else outer) + name] = w
    entries = ROBERTA if model_type == "roberta" else {}
    labels = {str(i): f"label {i}" for i in range(NUM_LABELS)}
    path = folder(stored, **entries, id2label=labels)
    tokens, _ = inputs()
    # RoBERTa's padding has a position of its own, which ours must not depend on.
    arguments = jnp.asarray(np.where(VALID, tokens, 1)), jnp.asarray(LENGTHS)
    hidden = transcription(tensors(), tokens, LENGTHS, np.zeros_like(tokens))
    weights = heads(model_type)
    dense, classifier, transform, layer_norm, bias = HEADS[model_type]

    logits = call(load(path, BertForSequenceClassification), *arguments)
    first = np.tanh(linear(np.array([x[0] for x in hidden]), weights, dense))
    np.testing.assert_allclose(logits, linear(first, weights, classifier), atol=1e-5)

    start, end = call(load(path, BertForQuestionAnswering), *arguments)
    spans = linear(np.concatenate(hidden), weights, "qa_outputs")
    np.testing.assert_allclose(np.stack([start[VALID], end[VALID]], 1), spans, atol=1e-5)

    logits = call(load(path, BertForMaskedLM), *arguments)
    expected = gelu(linear(np.concatenate(hidden), weights, transform))
    expected = norm(expected, weights, layer_norm)
    expected = expected @ tensors()["embeddings.word_embeddings.weight"].T + weights[bias]
    np.testing.assert_allclose(logits[VALID], expected, atol=2e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_bias_of_the_vocabulary_may_be_that_of_the_last_layer(folder, model_type):
    weights = heads(model_type)
    *_, bias = HEADS[model_type]
    weights[f"{bias.removesuffix('bias')}decoder.bias"] = weights.pop(bias)
    encoder = roberta_tensors() if model_type == "roberta" else tensors()
    entries = ROBERTA if model_type == "roberta" else {}
    model = load(folder(encoder | weights, **entries), BertForMaskedLM)
    np.testing.assert_array_equal(model.bias[...], heads(model_type)[bias])


@pytest.mark.once
def test_spans_never_end_in_the_padding():
    model = BertForQuestionAnswering(Bert(CONFIG, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    model.qa_outputs.bias[...] -= 1e4  # so that a padded 0 would win
    logits = call(model, jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS))
    for part in logits:
        assert np.isfinite(part).all()
        probabilities = np.asarray(jax.nn.softmax(part))
        assert (probabilities[~VALID] == 0).all()
        assert (probabilities[VALID] > 0).all()
        one_hot = jax.nn.one_hot(jnp.zeros(3, int), 9)
        assert np.isfinite(optax.softmax_cross_entropy(part, one_hot)).all()


@pytest.mark.parametrize("files", others_once(3, 1))
def test_split_files(tmp_path, files):
    """The tensors of any number of files, which only the index knows, give the same model."""
    weights = {f"bert.{name}": w for name, w in tensors().items()}
    (tmp_path / "config.json").write_text(json.dumps(ENTRIES))
    index = {}
    for i in range(files):
        part = dict(list(weights.items())[i::files])
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
        safetensors_numpy.save_file(part, tmp_path / f"part-{i}.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokens, token_types = inputs()
    expected = transcription(tensors(), tokens, LENGTHS, token_types)
    for path in (tmp_path, file, str(file)):
        bert = load(path)
        hidden = call(bert, *map(jnp.asarray, (tokens, LENGTHS, token_types)))
        np.testing.assert_allclose(hidden[VALID], np.concatenate(expected), atol=1e-5)

    for i in range(files):
        (tmp_path / f"part-{i}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must hold all files that it lists") as error:
        load(tmp_path)
    assert all(f"part-{i}.safetensors is missing" in str(error.value) for i in range(files))


@pytest.mark.parametrize("entries", others_once({}, ROBERTA))
@pytest.mark.parametrize(
    "head", [None, BertForSequenceClassification, BertForQuestionAnswering, BertForMaskedLM]
)
def test_saved_models_are_loaded_as_they_were(tmp_path, entries, head):
    config = replace(CONFIG, **entries)
    model = Bert(config, rngs=nnx.Rngs(0))
    if head is BertForSequenceClassification:
        model = head(model, num_labels=3, rngs=nnx.Rngs(1))
    elif head is not None:
        model = head(model, rngs=nnx.Rngs(1))
    save(model, tmp_path / "new")
    loaded = load(tmp_path / "new", head) if head else load(tmp_path / "new")

    assert (loaded if head is None else loaded.bert).config == replace(
        config, num_labels=3 if head is BertForSequenceClassification else 2
    )
    state, expected = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (loaded, model))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    stored = safetensors_numpy.load_file(tmp_path / "new" / "model.safetensors")
    kernel = expected if head is None else expected["bert"]
    kernel = kernel["encoder"]["layers"][0]["feed_forward"]["intermediate"]["kernel"]
    name = "encoder.layer.0.intermediate.dense.weight"
    np.testing.assert_array_equal(stored[name], kernel.T)


def test_a_file_can_be_named_itself(folder):
    path = folder(tensors()) / "model.safetensors"
    norm = load(path).layers[0].attention_norm
    name = "encoder.layer.0.attention.output.LayerNorm.bias"
    np.testing.assert_array_equal(norm.bias[...], tensors()[name])


def test_no_files(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    for path in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=r"model.safetensors, .*index.json.*save PyTo"):
            load(path)


@pytest.mark.once
@pytest.mark.parametrize(
    "make_head",
    [BertForSequenceClassification, BertForQuestionAnswering, BertForMaskedLM],
    ids=lambda head: head.__name__,
)
def test_new_heads_learn_with_clustered_attention(folder, make_head):
    """A few steps on a pretrained encoder; the loss falls, and the encoder learns, too."""
    clustered = clustax.ClusteredAttention(num_clusters=3, topk=3, num_iterations=2)
    bert = load(folder(tensors(), num_hidden_layers=1), attention_fn=clustered)
    before = bert.layers[0].attention.query.kernel[...]
    options = {"num_labels": 3} if make_head is BertForSequenceClassification else {}
    model = make_head(bert, **options, rngs=nnx.Rngs(0))
    assert model.bert is bert
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    tokens, lengths = jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS)
    targets = {BertForSequenceClassification: jnp.array([2, 0, 1]), BertForMaskedLM: tokens}
    weights = VALID if make_head is BertForMaskedLM else 1.0

    def loss_fn(model):
        logits = model(tokens, lengths)
        if make_head is BertForQuestionAnswering:
            logits = logits.end
        target = targets.get(make_head, jnp.array([5, 2, 0]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.mean(losses * weights)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    evaluate = nnx.jit(loss_fn)
    loss = evaluate(model)
    model.train()
    for _ in range(20):
        step(model, optimizer)
    model.eval()
    assert evaluate(model) < 0.7 * loss
    assert jnp.abs(bert.layers[0].attention.query.kernel[...] - before).max() > 1e-3


def test_dropout_is_off_until_training(folder):
    """Loaded or new, a model is in evaluation mode; its layers drop out different units."""
    tokens, lengths = jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS)
    path = folder(tensors())
    for bert in (load(path), Bert(CONFIG, rngs=nnx.Rngs(0))):
        model = BertForSequenceClassification(bert, rngs=nnx.Rngs(1))
        expected = call(model, tokens, lengths)
        np.testing.assert_array_equal(call(model, tokens, lengths), expected)
        model.train()
        one, two = (call(model, tokens, lengths) for _ in range(2))
        assert jnp.abs(one - two).max() > 1e-3
        dropouts = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)]
        keys = [jax.random.key_data(dropout.rngs.key[...]).tolist() for dropout in dropouts]
        assert len({tuple(key) for key in keys}) == len(keys) == 4
    seeds = [load(path, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 1)]
    assert seeds[0].embeddings.dropout.rngs.key[...] != seeds[1].embeddings.dropout.rngs.key[...]


def test_rates_of_dropout(folder):
    entries = {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.3, "num_labels": NUM_LABELS}
    path = folder(tensors() | heads("bert"), **entries)
    model = load(path, BertForSequenceClassification)
    assert model.dropout.rate == 0.3
    assert model.bert.embeddings.dropout.rate == model.bert.layers[0].dropout.rate == 0
    model = BertForSequenceClassification(Bert(CONFIG, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    assert model.dropout.rate == model.bert.layers[1].dropout.rate == 0.1


@pytest.mark.once
def test_heads_take_another_attention(folder):
    """The arrays are the same, and the model that was asked stays as it is."""
    path = folder(tensors() | heads("bert"), num_labels=NUM_LABELS)
    tokens, lengths = jnp.asarray(inputs()[0]), jnp.asarray(LENGTHS)
    weights = tensors()
    for layer in range(2):
        for part in ("weight", "bias"):
            weights[f"encoder.layer.{layer}.attention.self.query.{part}"] *= 0
    for head in (BertForSequenceClassification, BertForQuestionAnswering, BertForMaskedLM):
        exact = load(path, head)
        uniform = exact.with_attention(mean_of_values)
        assert type(uniform) is head
        assert (
            uniform.bert.embeddings.word.embedding[...]
            is (exact.bert.embeddings.word.embedding[...])
        )
        assert exact.bert.attention_fns == (jax.nn.dot_product_attention,) * 2
        assert uniform.bert.attention_fns == (mean_of_values,) * 2
        np.testing.assert_allclose(
            call(uniform.bert, tokens, lengths)[VALID],
            np.concatenate(transcription(weights, tokens, LENGTHS, np.zeros_like(tokens))),
            atol=1e-5,
        )


def test_missing_heads_are_named(folder):
    path = folder(tensors())
    with pytest.raises(ValueError, match="must hold the BertForSequenceClassification") as error:
        load(path, BertForSequenceClassification)
    names = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
    assert all(f"{name} is missing" in str(error.value) for name in names)
    assert str(error.value).count("is missing") == 4
    with pytest.raises(ValueError, match=r"cls\.predictions\.bias is missing"):
        load(path, BertForMaskedLM)
    path = folder(tensors() | heads("bert"), num_labels=5)
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(4, 12\), not \(5, 12\)"):
        load(path, BertForSequenceClassification)
    path = folder(tensors() | heads("bert"), tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings must be True for BertForMaskedLM"):
        load(path, BertForMaskedLM)
    assert isinstance(load(path, BertForQuestionAnswering), BertForQuestionAnswering)


def test_positions_of_roberta(folder):
    bert = load(folder(roberta_tensors(), **ROBERTA))
    assert (bert.config.position_offset, bert.config.max_length) == (2, 10)
    with pytest.raises(ValueError, match=r"at most 10 .*=12 less the 2 that RoBERTa .*\(1, 11\)"):
        bert(jnp.ones((1, 11), int), jnp.array([11]))
    without = {name: value for name, value in ROBERTA.items() if name != "pad_token_id"}
    path = folder(roberta_tensors(), **without)
    entries = json.loads((path / "config.json").read_text())
    del entries["pad_token_id"]
    (path / "config.json").write_text(json.dumps(entries))
    assert load(path).config.position_offset == 2
    with pytest.raises(ValueError, match=r"more than the 4 that RoBERTa .* got 4"):
        replace(bert.config, pad_token_id=3, max_position_embeddings=4)


def test_callers_mistakes():
    with pytest.raises(ValueError, match=r"model_type must be one of \('bert', .* got 'gpt2'"):
        BertConfig(model_type="gpt2")
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
