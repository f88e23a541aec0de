"""The figures of speech on numbers checked by hand, and all of it on a tiny random Whisper."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

for package in ("av", "jiwer", "matplotlib", "rich", "tokenizers"):
    pytest.importorskip(package)

from rich.console import Console

from clustax.models import Whisper, WhisperConfig
from experiments.common.bootstrap import ratio_interval
from experiments.common.speech import Clip, Recognition, count_word_errors
from experiments.common.timing import Times
from experiments.swap import recording, shared
from experiments.swap import speech as task
from experiments.swap.shared import CLUSTERED, DEFAULT, METHODS, PAPER, Variant


class FakeTokenizer:
    """Each token is a letter, and a word."""

    def decode_batch(self, rows):
        return [" ".join(chr(ord("a") + token % 26) for token in row) for row in rows]


from tests.helpers import TINY_WHISPER


def test_variants():
    settings = task.Settings(clusters=(50, 100), topk=(64,), seed=3)
    exact, *swapped = task.variants(settings)
    assert exact == Variant("exact", None)
    sizes = {
        name: [(v.num_clusters, v.topk) for v in swapped if v.name == name] for name in METHODS
    }
    assert sizes.pop(PAPER) == sizes.pop(DEFAULT) == [(50, 32), (100, 32), (100, 64)]
    clustered = {sizes.pop(name)[0] for name in (CLUSTERED, "clustered (default)")}
    assert clustered == {(100, 0)}
    assert set(map(tuple, sizes.values())) == {((100, 32),)}
    assert all(v.attention.seed == 3 for v in swapped)
    assert swapped[-1].label == "improved (default), C=100, k=64"


def test_draw_clips():
    clips = [Clip(str(number), "", np.zeros(1)) for number in range(9)]
    assert len(task.draw_clips(clips, task.Settings(prompts=4))) == 4
    chosen = task.draw_clips(clips, task.Settings(prompts=4, seed=1))
    assert len({clip.name for clip in chosen}) == 4
    assert chosen == task.draw_clips(clips, task.Settings(prompts=4, seed=1))
    for prompts in (0, 9, 10):
        assert sorted(task.draw_clips(clips, task.Settings(prompts=prompts))) == clips


def test_summarise_and_join():
    """The last of three is a repetition that makes the batch full."""
    hidden = np.array([[[1.0, 0], [0, 1]], [[1, 0], [1, 0]], [[1, 0], [0, 1]]])
    turned = np.array([[[1.0, 0], [1, 0]], [[2, 0], [3, 0]], [[9, 9], [9, 9]]])
    exact = Recognition(hidden, ["a", "b", "a"], [False, True, False], 3.0, 6.0)
    swapped = Recognition(turned, ["a", "c", "a"], [True, False, True], 1.5, 9.0)
    rows = task.summarise([Clip("", "", np.zeros(1))] * 2, [exact, swapped])
    first, second = task.join([rows, rows])
    np.testing.assert_allclose(first.cosines, 1)
    assert first.texts == ["a", "b"] * 2
    np.testing.assert_allclose(second.cosines, [0.5, 1] * 2)
    assert second.endless == [True, False] * 2
    assert (second.encoder.median, second.decoder.median) == (0.5, 3.0)


def test_score():
    references = ["one two", "three four five", "six"]
    exact = task.Transcripts(
        ["one two", "three for five", "six"], [False] * 3, [1.0] * 3, *[Times((1.0,))] * 2
    )
    swapped = task.Transcripts(
        ["one two", "three four five", "Six six six"],
        [False, False, True],
        [0.5, 0.75, 1.0],
        Times((0.1, 0.2, 0.3, 0.4, 0.5)),
        Times((2.0,)),
    )
    row = task.score(shared.variant(PAPER, 7, 5, 0), swapped, exact, references, seed=0)
    assert row[:3] == (PAPER, 7, 5)
    np.testing.assert_allclose((row.word_error_rate, row.difference), (2 / 6, 1 / 6))
    errors, words = np.array([0, 0, 2]), np.array([2, 3, 1])
    assert row.word_error_rate_interval == ratio_interval(errors, words, 0)
    assert row.difference_interval == ratio_interval(errors - [0, 1, 0], words, 0)
    assert row.difference_interval[0] < 0 < row.difference_interval[1]
    np.testing.assert_allclose((row.equal_texts, row.encoder_cosine), (1 / 3, 0.75))
    assert row.endless == 1
    np.testing.assert_allclose((row.encoder_seconds, *row.encoder_quartiles), (0.3, 0.2, 0.4))
    assert row.decoder_seconds == 2
    same = task.score(Variant("exact"), exact, exact, references, seed=0)
    assert (same.difference, same.difference_interval, same.equal_texts) == (0, (0, 0), 1)


@pytest.fixture
def tiny(monkeypatch):
    """Puts a random model and made-up clips in the place of the real ones."""
    rng = np.random.default_rng(0)
    clips = [
        Clip(f"clip {number}", "a word or two", rng.normal(size=80 * 14).astype(np.float32))
        for number in range(5)
    ]

    def windows(audio, batch_size):
        mel = jnp.stack([piece.reshape(80, 14) for piece in audio])
        return mel[np.resize(np.arange(len(audio)), batch_size)]

    monkeypatch.setattr(WhisperConfig, "prompt", (31, 32))
    model = Whisper(TINY_WHISPER, rngs=nnx.Rngs(0))
    monkeypatch.setattr(task, "load", lambda *_: (model, FakeTokenizer()))
    monkeypatch.setattr(task, "fetch", lambda settings, _: task.draw_clips(clips, settings))
    monkeypatch.setattr(task, "MAX_TOKENS", 4)
    for module in (task, recording):
        monkeypatch.setattr(module, "spectrograms", windows)
    # Few methods are enough here; most of the time is compilation.
    monkeypatch.setattr(task, "METHODS", (CLUSTERED, DEFAULT))
    monkeypatch.setattr(task, "VARIED", (DEFAULT,))
    monkeypatch.setattr(task, "NUM_CLUSTERS", 1)
    monkeypatch.setattr(task, "TOPK", 2)


def without_seconds(record):
    for row in record["scores"]:
        for part in ("encoder", "decoder"):
            del row[f"{part}_seconds"], row[f"{part}_quartiles"]
    return record


@pytest.mark.once
def test_a_run_that_was_killed_ends_as_any_other(tiny, tmp_path, monkeypatch):
    recognise, calls = task.recognise, []

    def counted(*args, **options):
        calls.append(args)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return recognise(*args, **options)

    monkeypatch.setattr(task, "recognise", counted)
    options = {"clusters": (7,), "topk": (), "batch_size": 2}
    console = Console(record=True, width=80)
    # Of 4 attentions on 3 batches, and once more each to compile it, the second batch is cut off.
    killed_at = 11
    settings = task.Settings(**options, output=tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        task.run(settings, console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.partial.jsonl"]
    killed_at = None
    calls.clear()
    task.run(settings, console)
    assert len(calls) == 4 * (1 + 2)
    assert "Going on after 1 batches" in console.export_text()
    task.run(task.Settings(**options, output=tmp_path / "whole"), Console(quiet=True))

    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{name}.{kind}" for name in ("killed", "whole") for kind in ("json", "png")]
    killed, whole = (
        without_seconds(json.loads((tmp_path / f"{name}.json").read_text()))
        for name in ("killed", "whole")
    )
    assert killed == whole


@pytest.mark.once
def test_other_settings_start_anew(tiny, tmp_path, monkeypatch):
    output = tmp_path / "swap"
    options = {"clusters": (), "topk": (), "batch_size": 5, "output": output}
    record = shared.open_journal(output, {"settings": "others"}, Console(quiet=True))
    record.add("clips 0", "what would end in an error")
    console = Console(record=True, width=200)
    task.run(task.Settings(**options), console)
    assert "other settings, code or versions: starting anew" in console.export_text()


@pytest.mark.once
def test_what_is_written_and_printed(tiny, tmp_path):
    settings = task.Settings(clusters=(7,), topk=(), batch_size=3, output=tmp_path / "swap")
    console = Console(record=True, width=80)
    task.run(settings, console)

    assert (tmp_path / "swap.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "swap.json").read_text()
    assert str(tmp_path) not in written
    record = json.loads(written)
    assert record["num_clips"] == 5
    assert record["attentions"]["improved (default), C=7, k=2"]["space"] == "logit"
    scores = record["scores"]
    sizes = [(row["attention"], row["num_clusters"], row["topk"]) for row in scores]
    assert sizes == [
        ("exact", None, None),
        (CLUSTERED, 1, 0),
        (DEFAULT, 1, 2),
        (DEFAULT, 7, 2),
    ]
    assert scores[1]["encoder_cosine"] < 1 - 1e-5
    # As many clusters as positions: exact.
    assert scores[3]["encoder_cosine"] == pytest.approx(1, abs=1e-5)
    assert (scores[3]["equal_texts"], scores[3]["difference"]) == (1, 0)
    assert all(row["endless"] == 5 for row in scores)  # Random weights do not end.
    errors = sum(count_word_errors(clip["text"], clip["exact"]).errors for clip in record["clips"])
    assert scores[0]["word_error_rate"] == errors / (5 * 4)
    assert not any("improved (default), C=7, k=2" in clip["others"] for clip in record["clips"])
    printed = console.export_text()
    for row in scores:
        assert f"{row['word_error_rate']:.1%}" in printed
        assert f"{row['encoder_cosine']:.3f}" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


def test_recording(tiny, tmp_path, monkeypatch):
    """A window more than a batch has, and both attentions' texts of each."""
    audio = np.random.default_rng(0).normal(size=5 * 80 * 14).astype(np.float32)
    monkeypatch.setattr(task, "read_audio", lambda path: audio)
    monkeypatch.setattr(recording, "WINDOW_SAMPLES", 80 * 14)
    monkeypatch.setattr(recording, "MAX_TOKENS", 3)
    console = Console(record=True, width=80)
    task.run(task.Settings(audio=tmp_path, batch_size=4), console)
    printed = console.export_text()
    for said in ("0:00", "exact: encoder", "improved (default), C=1, k=2: encoder", "words differ"):
        assert said in printed
    assert len(list(tmp_path.iterdir())) == 0


def test_report_of_a_recording():
    exact = recording.Transcript(["One, two.", "three [x] four", ""], 0, 4.0, 1.0)
    other = recording.Transcript(["one two", "three for", "five"], 1, 2.0, 1.5)
    console = Console(record=True, width=80)
    recording.report(exact, other, ("exact", "clustered"), console)
    printed = console.export_text()
    assert "2 of 4 words differ (50.0%)" in printed
    assert "four → for" in printed
    assert "– → five" in printed
    assert "three [x] four" in printed
    for start in ("0:00", "0:30", "1:00"):
        assert start in printed
    assert "clustered: encoder 2.00 s, decoder 1.50 s, 1 windows without an end" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": -1}, "prompts must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"topk": (16, 0)}, r"topk must .* got \(16, 0\)"),
        ({"clusters": (0,)}, r"clusters must .* got \(0,\)"),
    ],
)
def test_settings_that_cannot_be_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        task.Settings(**arguments)
