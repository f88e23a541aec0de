"""Speech recognition with CTC: decoding, error rates, the model, and what a run writes."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import dataclasses
import io
import itertools
import json
import sys

import pytest

for package in (
    "av",
    "jiwer",
    "kaldialign",
    "kaldiio",
    "matplotlib",
    "optax",
    "orbax.checkpoint",
    "pocketsphinx",
    "rich",
    "tensorboardX",
    "tyro",
):
    pytest.importorskip(package)

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from experiments import asr_ctc, tables, transcribe
from experiments.asr_ctc import Cell, Feed, Kaldi, Optimisation, Settings, SpecAugment
from experiments.common import training
from experiments.common.attentions import QueriesAsKeys
from experiments.common.chunked import Chunked
from experiments.common.rows import DataError
from experiments.speech import decoding, model
from experiments.speech.corpus import Speech
from experiments.speech.model import Model, SpeechModel
from experiments.speech.phones import Phones
from experiments.speech.store import Dataset, Utterance
from tests.experiments.sounds import sound, write_directory, write_wav

# Decoding and error rates


def merged(path):
    """What CTC makes of a path."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


def log_probs(rng, frames, symbols):
    return np.log(rng.dirichlet(np.full(symbols, 0.7), frames))


def test_greedy_takes_the_best_path():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = log_probs(rng, 5, 3)
        paths = itertools.product(range(3), repeat=5)
        best = max(paths, key=lambda path: sum(scores[t, s] for t, s in enumerate(path)))
        assert tuple(decoding.greedy(scores)) == merged(best)


def test_wide_beam_finds_the_most_probable_phones():
    rng = np.random.default_rng(1)
    differs = 0
    for _ in range(20):
        scores = log_probs(rng, 5, 3)
        total = {}
        for path in itertools.product(range(3), repeat=5):
            probability = np.exp(sum(scores[t, s] for t, s in enumerate(path)))
            total[merged(path)] = total.get(merged(path), 0.0) + probability
        best = max(total, key=total.__getitem__)
        assert tuple(decoding.beam(scores, width=1000, least=0)) == best
        differs += tuple(decoding.greedy(scores)) != best
    assert differs  # Or the sum over paths would not be tested.


def test_narrow_beam_is_greedy_where_that_is_sure():
    scores = np.full((6, 3), 1e-6)
    scores[range(6), [1, 1, 0, 1, 2, 0]] = 1
    assert decoding.beam(np.log(scores), width=1) == decoding.greedy(scores) == [1, 1, 2]


def test_phone_errors_are_those_of_jiwer():
    rng = np.random.default_rng(2)
    pairs = [
        [rng.integers(1, 5, rng.integers(1, 12)).tolist() for _ in range(2)] for _ in range(40)
    ]
    references, found = zip(*pairs, strict=True)
    texts = ([" ".join(map(str, each)) for each in side] for side in (references, found))
    expected = jiwer.process_words(*texts)
    errors = decoding.Errors.total(map(decoding.count_errors, references, found))
    assert errors.rate == pytest.approx(expected.wer)
    assert errors.wrong == expected.substitutions + expected.deletions + expected.insertions
    assert errors.deletions - errors.insertions == expected.deletions - expected.insertions
    assert decoding.count_errors([1, 2], []) == (0, 2, 0, 2)


# The model

SIZE = Model(layers=1, heads=2, head_dim=4, context=1, dropout_rate=0.0)


def tiny_model(attention=jax.nn.dot_product_attention, size=SIZE):
    return SpeechModel(size, 2, 5, attention, rngs=nnx.Rngs(0))


@pytest.mark.once
def test_padding_makes_no_difference():
    features = jax.random.normal(jax.random.key(0), (1, 12, 5))
    padded = jnp.pad(features, ((0, 0), (0, 20), (0, 0)))
    one, other = (tiny_model()(x, jnp.array([12])) for x in (features, padded))
    assert one.shape == (1, 12, 3)
    np.testing.assert_allclose(one, other[:, :12], atol=1e-5)


@pytest.mark.once
def test_a_frame_sees_its_context():
    speech = tiny_model(lambda query, key, value, **_: jnp.zeros_like(value))
    features = jnp.zeros((1, 9, 5))
    before, after = (speech(x, jnp.array([9])) for x in (features, features.at[0, 4].set(1.0)))
    changed = np.flatnonzero(np.abs(before - after).max((0, 2)) > 1e-6)
    assert changed.tolist() == [3, 4, 5]


def example(length=8):
    rng = np.random.default_rng(0)
    return {
        "features": rng.standard_normal((2, length, 5)).astype(np.float32),
        "lengths": np.array([8, 5]),
        "phones": np.array([[1, 2, 1], [2, 0, 0]]),
        "counts": np.array([3, 1]),
        "frame_phones": np.array([[0, 1, 1, 2, 2, 0, 1, 1], [-1] * 8]),
        "frame_weight": np.zeros(2, np.float32),
    }


def test_loss_is_the_probability_of_all_paths():
    batch, speech = example(), tiny_model()
    logits = speech(jnp.array(batch["features"]), jnp.array(batch["lengths"]))
    scores = np.asarray(jax.nn.log_softmax(logits))
    expected = 0.0
    for row, (frames, phones) in enumerate([(8, (1, 2, 1)), (5, (2,))]):
        total = [
            np.exp(sum(scores[row, t, s] for t, s in enumerate(path)))
            for path in itertools.product(range(3), repeat=frames)
            if merged(path) == phones
        ]
        expected -= np.log(sum(total))
    found = model.loss(speech, jax.tree.map(jnp.asarray, batch))
    assert float(found["weight"]) == 4
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["ctc"], expected, rtol=1e-4)


@pytest.mark.once
def test_frames_count_as_much_as_the_batch_asks_for():
    speech, batch = tiny_model(), jax.tree.map(jnp.asarray, example())
    states = speech.encode(batch["features"], batch["lengths"])
    each = optax.softmax_cross_entropy_with_integer_labels(
        speech.frame_output(states), jnp.maximum(batch["frame_phones"], 0)
    )
    plain = model.loss(speech, batch)
    found = model.loss(speech, {**batch, "frame_weight": jnp.array([2.0, 2.0])})
    # Of the second utterance, nothing is known.
    np.testing.assert_allclose(found["loss"] - plain["loss"], 2 * 3 * each[0].mean(), rtol=1e-4)


@pytest.mark.once
def test_chunked_attention_leaves_out_padded_keys():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 12, 2, 4))
    lengths = jnp.array([12, 3])
    for sizes in [(4, 4), (5, 6), (12, 12)]:
        found = Chunked(*sizes)(query, key, value, key_value_seq_lengths=lengths)
        expected = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    shared = QueriesAsKeys(Chunked())(query, key, value, key_value_seq_lengths=lengths)
    expected = jax.nn.dot_product_attention(query, query, value, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(shared, expected, atol=1e-5)


# Training


def test_spec_augment_hides_bands_and_stretches():
    features = np.ones((3, 50, 40), np.float32)
    SpecAugment(bands=2, widest=5, stretches=1, longest=9).hide(
        features, np.array([50, 50, 20]), np.random.default_rng(0)
    )
    hidden = features == 0
    bands, stretches = hidden.all(1).sum(1), hidden.all(2).sum(1)
    assert (bands <= 10).all()
    assert bands.sum() > 0
    assert (stretches <= 9).all()
    assert stretches.sum() > 0
    assert not hidden[2, 20:][:, ~hidden[2].all(0)].any()
    untouched = np.ones((1, 5, 4), np.float32)
    SpecAugment().hide(untouched, np.array([5]), np.random.default_rng(0))
    assert (untouched == 1).all()


TINY = Settings(
    methods=("full", "lsh"),
    depths=(1,),
    clusters=(3,),
    rounds=(1,),
    swapped=(3,),
    lengths=(100, 256),
    long_lengths=(256,),
    timed=2,
    beam=2,
    model=Model(layers=1, heads=1, head_dim=8, context=1, dropout_rate=0.0),
    attentions=asr_ctc.Attentions(topk=4, num_bits=8, num_buckets=4, chunk_size=8),
    optimisation=Optimisation(
        steps=6,
        batch_size=1,
        learning_rate=1e-2,
        log_every=2,
        checkpoint_every=2,
        frame_weight=3.0,
        frame_steps=4,
        short_steps=2,
        plateau_steps=2,
    ),
)


def dataset(*lengths):
    rng = np.random.default_rng(0)
    return Dataset(
        Phones(("a", "b")),
        tuple(
            Utterance(str(i), rng.standard_normal((n, 5)), np.array([1, 2]), np.full(n, 1))
            for i, n in enumerate(lengths)
        ),
        (),
    )


def test_short_utterances_and_labels_of_frames_come_first():
    feed = Feed(TINY, dataset(90, 190, 80, 150), multiple=1)
    batches = [feed(step) for step in range(6)]
    assert [batch["features"].shape[1] for batch in batches[:2]] == [100, 100]
    assert 256 in [batch["features"].shape[1] for batch in batches[2:]]
    assert [float(batch["frame_weight"][0]) for batch in batches] == [3, 2.25, 1.5, 0.75, 0, 0]
    np.testing.assert_array_equal(feed(4)["features"], batches[4]["features"])


def test_the_optimizer_decays_weights_and_slows_down_on_plateaus():
    settings = dataclasses.replace(
        TINY.optimisation, learning_rate=0.1, weight_decay=0.5, patience=1
    )
    transformation = asr_ctc.optimizer(settings)
    weights = {"w": jnp.array([2.0])}
    state = transformation.init(weights)
    moves = []
    for _ in range(12):  # The loss never falls, and there is no gradient.
        update, state = transformation.update(
            {"w": jnp.zeros(1)}, state, weights, value=jnp.array(1.0)
        )
        moves.append(float(update["w"][0]))
    assert moves[0] == pytest.approx(-0.1 * 0.5 * 2)
    halvings = np.log2(np.array(moves) / moves[0])
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-5)
    assert halvings[-1] <= -2


def test_durations_are_of_steps_that_were_timed():
    result = {"curve": {"score": [-0.5, -0.2, -0.3], "scored": [2, 4, 6]}}
    found = asr_ctc.durations(result, {"step": 0.5}, steps_per_epoch=30)
    assert found == {"times": {"step": 0.5}, "seconds_per_epoch": 15, "seconds_to_best": 2}


def test_points_to_full_attention_are_paired():
    tested = dataset(90, 190, 80)  # Of two phones each.
    full, clustered = (
        {"method": method, "layers": 1, "beam": {"test": None}, "wrong": {"test": wrong}}
        for method, wrong in {"full": [0, 2, 1], "clustered": [1, 2, 1]}.items()
    )
    found = asr_ctc.to_full(clustered, [full, clustered], tested, TINY)
    assert found["difference"] == pytest.approx(1 / 6)
    low, high = found["difference_interval"]
    assert 0 == low < high <= 0.5
    assert asr_ctc.to_full(clustered, [clustered], tested, TINY) == {}


def test_sets_without_utterances_are_refused(tmp_path):
    folder, lexicon = write_directory(tmp_path)
    (folder / "one.wav").unlink()
    (folder / "two.ark").unlink()
    settings = dataclasses.replace(
        TINY,
        kaldi=Kaldi(train=folder, valid=folder, tests=(folder,), lexicon=lexicon),
        data=tmp_path / "features",
    )
    with training.progress_bar(Console(quiet=True)) as progress:
        message = r"train must have utterances, .*wav.scp, line 1: .* remove its folder in "
        with pytest.raises(DataError, match=message):
            asr_ctc.load_data(settings, progress)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What comes of a run on a directory of Kaldi's, and its settings."""
    root = tmp_path_factory.mktemp("run")
    folder, lexicon = write_directory(root)
    settings = dataclasses.replace(
        TINY,
        kaldi=Kaldi(train=folder, valid=folder, tests=(folder,), lexicon=lexicon),
        data=root / "features",
        output=root / "results",
    )
    console = Console(record=True, width=200, file=io.StringIO())
    asr_ctc.run(settings, console)
    return settings, json.loads((root / "results" / "results.json").read_text()), console


@pytest.mark.once
def test_run_on_kaldi_directories_writes_results(trained):
    settings, record, console = trained
    assert [found["label"] for found in record["models"]] == [
        "full_1-layers",
        "lsh-1_1-layers",
    ]
    assert record["data"]["train"]["utterances"] == 3
    for found in record["models"]:
        assert found["errors"]["data"] == found["errors"]["valid"]
        assert sum(found["wrong"]["data"]) == decoding.Errors(**found["errors"]["data"]).wrong
        assert found["errors"]["valid"]["phones"] == 2 + 5 + 3
        assert found["curve"]["step"] == found["curve"]["scored"] == [2, 4, 6]
        assert min(found["times"]["forward"], found["times"]["step"]) > 0
        assert set(found["swaps"]) == {
            "full", "shared-qk", "lsh-1", "clustered-3", "improved-3", "default-3", "oracle-top-4"
        }  # fmt: skip
        errors = decoding.Errors(**found["errors"]["valid"])
        own = found["label"].split("_")[0]
        assert found["swaps"][own] == pytest.approx(errors.rate)
        assert found["curve"]["score"][-1] <= max(found["curve"]["score"])
        assert -max(found["curve"]["score"]) == pytest.approx(errors.rate)
    for picture in ("costs", "curves"):
        assert (settings.output / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "lsh-1_1-layers" in console.export_text()
    header, _, *lines = tables.asr_ctc(record).splitlines()
    assert header.startswith("| trained with | layers | valid | data | data, beam | data, points")
    assert (record["models"][0]["difference"], record["models"][0]["difference_interval"]) == (
        0,
        [0, 0],
    )
    rate = 100 * decoding.Errors(**record["models"][1]["errors"]["valid"]).rate
    assert any(line.startswith(f"| lsh-1 | 1 | {rate:.1f} | {rate:.1f} |") for line in lines)


@pytest.mark.once
def test_what_is_done_is_not_done_again(trained, monkeypatch):
    settings, record, _ = trained
    monkeypatch.setattr(asr_ctc, "errors_of", lambda *_: pytest.fail("tested again"))
    monkeypatch.setattr(asr_ctc, "take_turns", lambda *_, **__: pytest.fail("timed again"))
    asr_ctc.run(settings, Console(quiet=True))
    assert json.loads((settings.output / "results.json").read_text())["models"] == record["models"]
    other = dataclasses.replace(settings, augment=SpecAugment(bands=1))
    with pytest.raises(training.TrainingError, match=r"other settings \(augment\)"):
        asr_ctc.run(other, Console(quiet=True))
    with pytest.raises(pytest.fail.Exception, match="tested again"):
        asr_ctc.run(dataclasses.replace(settings, beam=3), Console(quiet=True))


@pytest.mark.once
def test_transcribe_says_what_the_model_says(trained, tmp_path, monkeypatch, capsys):
    settings, _, _ = trained
    folder = asr_ctc.run_folder(settings, Cell("full", None, 1))
    path = tmp_path / "sound.wav"
    write_wav(path, sound(0.9))
    speech, phones = transcribe.load(folder)
    expected = transcribe.transcribe(speech, phones, sound(0.9), beam=0)
    monkeypatch.setattr(sys, "argv", ["t", str(path), "--run", str(folder), "--beam", "0"])
    transcribe.main()
    assert capsys.readouterr().out.split() == expected
    assert set(expected) <= set(phones.all)

    for arguments, message in [
        ([str(tmp_path / "none.wav"), "--run", str(folder)], "There is no file"),
        ([str(path), "--run", str(tmp_path)], "must be the folder of a trained model"),
    ]:
        monkeypatch.setattr(sys, "argv", ["t", *arguments])
        with pytest.raises(SystemExit, match=message):
            transcribe.main()


# Settings


def test_cells_are_the_papers():
    paper = asr_ctc.PRESETS["paper"][1]
    assert dataclasses.astuple(paper.model)[:4] == (9, 6, 32, 0)
    assert not paper.model.norm_first
    assert (paper.optimisation.learning_rate, paper.optimisation.max_norm) == (1e-4, 10.0)
    assert paper.optimisation.frame_weight == paper.optimisation.short_steps == 0
    names = [cell.name for cell in asr_ctc.cells(paper)]
    assert names[:3] == ["full_9-layers", "full_6-layers", "full_4-layers"]
    assert "improved-200_9-layers" in names
    assert names[-2:] == ["lsh-1_9-layers", "lsh-4_9-layers"]
    assert len(names) == 3 + 2 + 2 + 1 + 2


def test_the_preset_may_be_an_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["asr", "--preset", "cpu", "--method", "improved", "lsh"])
    found = []
    monkeypatch.setattr(asr_ctc, "run", lambda settings, _: found.append(settings))
    asr_ctc.main()
    assert found == [dataclasses.replace(asr_ctc.CPU, methods=("improved", "lsh"))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ()}, "methods must be different ones, at least one"),
        ({"clusters": (0,)}, "clusters must be at least 1"),
        ({"lengths": (5, 5)}, "lengths must be different"),
        ({"beam": 0}, "beam must be at least 1"),
        ({"lengths": (9, 5)}, "lengths must be in order"),
    ],
)
def test_settings_are_checked(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
    with pytest.raises(ValueError, match="kaldi must have train, valid and tests"):
        Kaldi(train=tmp_path)
    twice = (tmp_path / "a" / "x", tmp_path / "b" / "x")
    with pytest.raises(ValueError, match="kaldi must have directories of different names"):
        Kaldi(train=twice[0], valid=twice[0], tests=twice)
    with pytest.raises(ValueError, match="frame_weight must not be negative"):
        Optimisation(frame_weight=-1.0)
    with pytest.raises(ValueError, match="short_steps must be fewer than steps = 4, got 4"):
        Optimisation(steps=4, short_steps=4)
    with pytest.raises(ValueError, match="bands must not be negative"):
        SpecAugment(bands=-1)
    assert Speech().held_out not in Speech().voices
