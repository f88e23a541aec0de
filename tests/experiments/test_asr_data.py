"""Speech for training: features, phones, corpora, Kaldi's directories, shards and batches."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import numpy as np
import pytest

for package in ("av", "jiwer", "kaldiio", "kaldi_native_fbank", "rich", "scipy", "tensorboardX"):
    pytest.importorskip(package)

import kaldi_native_fbank
import kaldiio
from rich.console import Console

from experiments.common import training
from experiments.common.files import BrokenFileError
from experiments.common.rows import DataError, Problems
from experiments.common.training import TrainingError
from experiments.speech import corpus, phones, store, synthesis
from experiments.speech.corpus import Recording, RecordingError, Speech, Synthetic
from experiments.speech.features import filterbank, normalise
from experiments.speech.kaldi import KaldiDirectory, Lexicon, read_lexicon
from experiments.speech.phones import PhoneError, Phones
from experiments.speech.store import Batches, Dataset, Utterance
from experiments.speech.synthesis import Spoken, SynthesisError
from tests.experiments.sounds import sound, write_directory

# Features


@pytest.mark.parametrize("seconds", [0.025, 0.5, 1.0, 2.345])
def test_filterbanks_are_those_of_kaldi(seconds):
    audio = sound(seconds)
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 40
    rival = kaldi_native_fbank.OnlineFbank(options)
    rival.accept_waveform(16_000, (audio * 2**15).tolist())
    rival.input_finished()
    expected = np.stack([rival.get_frame(i) for i in range(rival.num_frames_ready)])
    found = filterbank(audio)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_audio_shorter_than_a_frame_has_none():
    assert filterbank(sound(0.0249)).shape == (0, 40)
    assert filterbank(np.zeros(0)).shape == (0, 40)


def test_normalised_features_have_mean_zero_and_variance_one():
    found = normalise(np.concatenate([filterbank(sound(1)), np.ones((98, 1))], axis=1))
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found[:, :40].std(0), 1, atol=1e-4)
    assert (found[:, 40] == 0).all()  # It did not vary.


# Phones and synthesis


def test_other_phones_are_mapped_to_arpabet():
    for mapping in (phones.FLITE, phones.ESPEAK):
        assert {name for parts in mapping.values() for name in parts} <= set(phones.ARPABET)
    with pytest.raises(PhoneError, match="'x' is none of the phones a b"):
        Phones(("a", "b")).numbers(["a", "x"])


def test_a_phone_that_stands_for_two_is_divided_between_them():
    audio = np.zeros(100)
    spoken = synthesis._mapped(audio, ["_", "A@", "t"], [10, 30, 120], phones.ESPEAK, "espeak-ng")
    assert spoken.phones == ["", "aa", "r", "t"]
    assert spoken.ends.tolist() == [10, 20, 30, 100]  # Not beyond the audio.
    with pytest.raises(SynthesisError, match="espeak-ng says the phone 'Q'"):
        synthesis._mapped(audio, ["Q"], [10], phones.ESPEAK, "espeak-ng")


def test_resampling_keeps_a_tone():
    times = np.arange(22_050) / 22_050
    found = synthesis.resample(np.sin(2 * np.pi * 440 * times), 22_050)
    assert len(found) == 16_000
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=0.01)


# The synthetic corpus, with a synthesiser that says a tone for each letter


def fake_speak(text, voice, rate=1.0, pitch=1.0):
    letters = [{"a": "ah", "t": "t", " ": ""}[letter] for letter in text.lower().strip(".")]
    length = int(1600 / rate)
    level = {"flite": 0.1, "espeak": 0.3}[voice.engine]
    return Spoken(
        np.repeat([level if name else 0.0 for name in letters], length).astype(np.float32),
        letters,
        length * np.arange(1, len(letters) + 1),
    )


@pytest.fixture
def texts(monkeypatch):
    """Twenty documents, each with texts of its own."""
    documents = {f"c{i:02d}": ["At" + " ta" * i + ".", "A" * (i + 1) + "."] for i in range(20)}
    monkeypatch.setattr(corpus, "sentences", lambda: documents)
    monkeypatch.setattr(corpus, "speak", fake_speak)
    return documents


SPEECH = Speech(train=6, valid=2, test=2, long=1, words=(1, 3), joined=(2, 3))


def test_sentences_are_of_plain_words():
    text = (
        "\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./.\n"
        "\tIt/pps was/bedz 1961/cd ./.\n\tHe/pps didn't/dod* go/vb ./.\n"
    )
    assert corpus._plain_sentences(text) == ["The jury said, no.", "He didn't go."]


def test_the_same_seed_makes_the_same_corpus(texts):
    for part in corpus.PARTS:
        first, again = (Synthetic(part, SPEECH).recording(1) for _ in range(2))
        np.testing.assert_array_equal(first.audio, again.audio)
        assert first.phones == again.phones
    other = Synthetic("train", Speech(**{**vars(SPEECH), "seed": 1})).recording(1)
    assert len(other.audio) != len(Synthetic("train", SPEECH).recording(1).audio)


def test_parts_have_documents_of_their_own(texts):
    found = {part: Synthetic(part, SPEECH).documents for part in corpus.PARTS}
    assert [len(found[part]) for part in ("train", "valid", "test")] == [16, 2, 2]
    used = [text for part in ("train", "valid", "test") for text in found[part]]
    assert sorted(used) == sorted(texts.values())
    assert found["voice"] == found["noisy"] == found["long"] == found["test"]


def test_frames_have_the_phone_in_their_middle(texts):
    settings = Speech(**{**vars(SPEECH), "rates": (1.0, 1.0)})
    recording = Synthetic("test", settings).recording(0)
    middles = 160 * np.arange(len(recording.frame_phones)) + 200
    silent = np.abs(recording.audio[middles]) < 0.01
    np.testing.assert_array_equal(recording.frame_phones == 0, silent)
    # Letters that follow each other are one to their frames, and two to CTC.
    changes = recording.frame_phones[np.diff(recording.frame_phones, prepend=0) != 0]
    names = recording.phones
    once = [n for n, before in zip(names, [0, *names], strict=False) if n != before]
    assert [n for n in changes if n][: len(once)] == once or len(changes[changes > 0]) >= len(once)


def test_the_held_out_voice_and_noise_are_where_they_should_be(texts):
    settings = Speech(
        **{**vars(SPEECH), "voices": ("flite-a",), "held_out": "espeak-b", "speeds": (1.0,)}
    )
    clean, voice, noisy = (
        Synthetic(part, settings).recording(0).audio for part in ("test", "voice", "noisy")
    )
    assert set(np.unique(clean)) <= {0.0, np.float32(0.1)}
    assert set(np.unique(voice)) <= {0.0, np.float32(0.3)}
    assert len(np.unique(noisy)) > 100


def test_noise_is_as_loud_as_it_should_be():
    audio, rng = sound(1), np.random.default_rng(0)
    for decibels in (5.0, 20.0):
        noise = corpus.add_noise(audio, decibels, rng) - audio
        found = 10 * np.log10(np.mean(audio**2) / np.mean(noise**2))
        assert found == pytest.approx(decibels, abs=1e-3)


def test_reverberation_comes_after_the_sound():
    click = np.zeros(4000)
    click[1000] = 1
    found = corpus.reverberate(click, np.random.default_rng(0))
    np.testing.assert_allclose(found[:1000], 0, atol=1e-9)
    assert found[1000] == pytest.approx(1)
    echo = found[1032:]
    assert 0.01 < np.sum(echo**2) < 0.7
    assert np.sum(echo[:1000] ** 2) > np.sum(echo[1000:2000] ** 2)


def test_long_utterances_are_several(texts):
    settings = Speech(**{**vars(SPEECH), "joined": (3, 3), "rates": (1.0, 1.0)})
    one, three = (Synthetic(part, settings).recording(0) for part in ("test", "long"))
    assert len(three.phones) > len(one.phones)
    assert len(three.frame_phones) == len(filterbank(three.audio))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 0}, "train must be at least 1"),
        ({"words": (5, 2)}, "words must be a range"),
        ({"noisy": 1.5}, "noisy must be from 0 to 1"),
        ({"held_out": "flite-awb"}, "held_out must not be one of voices"),
    ],
)
def test_settings_of_speech_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Speech(**settings)
    with pytest.raises(ValueError, match="flite-NAME or espeak-VARIANT, got 'festival-x'"):
        corpus.voice_of("festival-x")


# Kaldi's directories


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path)


def test_kaldi_directory_with_segments_and_archive(directory):
    folder, lexicon = directory
    found = KaldiDirectory(folder, read_lexicon(lexicon))
    first, second, third = map(found.recording, range(len(found)))
    assert found.utterances == ["u1", "u2", "u3"]
    assert found.phones.names(second.phones) == ["n", "ow", "y", "eh", "s"]
    whole = sound(2, seed=1)
    np.testing.assert_allclose(first.audio, whole[1600:16_000], atol=1e-4)
    np.testing.assert_allclose(second.audio, whole[16_000:], atol=1e-4)
    assert len(third.audio) == 40_000  # Of 8 kHz, to the end.
    assert 0.5 < np.std(third.audio) / np.std(sound(3, seed=2)) < 1.1


def test_kaldi_features_come_from_archives(directory):
    folder, lexicon = directory
    features = {f"u{i}": np.full((10 * i, 7), float(i), np.float32) for i in (1, 2, 3)}
    with kaldiio.WriteHelper(f"ark,scp:{folder}/feats.ark,{folder}/feats.scp") as writer:
        for name, each in features.items():
            writer(name, each)
    found = KaldiDirectory(folder, read_lexicon(lexicon))
    np.testing.assert_array_equal(found.recording(1).features, features["u2"])
    with training.progress_bar(Console(quiet=True)) as progress:
        made = store.prepare(found, folder / "made", found.identity, progress, "data")
    assert [each.features.shape for each in made.utterances] == [(10, 7), (20, 7), (30, 7)]


def test_transcripts_may_be_phones(directory):
    folder, _ = directory
    (folder / "text").write_text("u1 SIL N OW1\nu2 y eh s\nu3 Y_B EH_I S_E\n")
    found = KaldiDirectory(folder, Lexicon())
    assert found.phones.names(found.recording(0).phones) == ["n", "ow"]
    assert found.recording(1).phones == found.recording(2).phones


def test_lexicons_of_other_phones_and_with_probabilities(tmp_path):
    path = tmp_path / "lexiconp.txt"
    path.write_text("no 1.0 n o\nyes 0.4 j e s\n")
    found = read_lexicon(path)
    assert found.phones.all == ("e", "j", "n", "o", "s")
    assert found.pronounce("yes no") == ["j", "e", "s", "n", "o"]
    path.write_text("no n o\n")
    with pytest.raises(DataError, match=r"lexiconp.txt, line 1: expected a word, its probability"):
        read_lexicon(path)


DAMAGED = {
    "a line without a value": ("wav.scp", 1, "one", "expected a name and what it has"),
    "a pipe": ("wav.scp", 1, "one sph2pipe one.sph |", "found a command with a pipe"),
    "a name twice": ("wav.scp", 2, "one two.wav", "one is there already, in line 1"),
    "a segment without an end": ("segments", 2, "u2 one 1.0", "expected an utterance, its rec"),
    "a time that is no number": ("segments", 1, "u1 one 0.1 x", "start and end, found 'one 0.1 x'"),
    "an end before the start": ("segments", 1, "u1 one 1.0 0.1", "before the end, found"),
    "another recording": ("segments", 3, "u3 three 0.5 1", "the recording three of u3 is not in"),
    "no transcript": ("text", 1, "u1", "expected a name and what it has"),
    "a word that is unknown": ("text", 2, "u2 NO MAYBE", "'MAYBE' is not in the lexicon"),
    "nothing spoken": ("text", 3, "u3 <noise>", "expected words that are spoken"),
    "another utterance": ("text", 3, "u4 YES", "the utterance u4 is not in segments"),
    "two speakers": ("utt2spk", 1, "u1 anna otto", "expected one speaker of u1"),
    "no speaker": ("utt2spk", 3, "u4 otto", "text, line 3: the utterance u3 has no speaker"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_lines_are_named(directory, kind):
    folder, lexicon = directory
    listing, number, line, message = DAMAGED[kind]
    lines = (folder / listing).read_text().splitlines()
    lines[number - 1] = line
    (folder / listing).write_text("\n".join(lines) + "\n")
    place = "" if "line 3:" in message else rf"{listing}, line {number}: "
    with pytest.raises(DataError, match=f"{place}.*{message}|{place}{message}"):
        KaldiDirectory(folder, read_lexicon(lexicon))
    problems = Problems("skip")
    left = KaldiDirectory(folder, read_lexicon(lexicon), problems)
    assert problems.found
    assert 1 <= len(left) <= 3


def test_a_problem_is_reported_once(directory):
    folder, lexicon = directory
    (folder / "text").write_text("u1 NO\nu2\nu3 YES\n")
    problems = Problems("skip")
    KaldiDirectory(folder, read_lexicon(lexicon), problems)
    assert len(problems.found) == 1
    with pytest.raises(DataError, match=r"leave out such rows with --kaldi.malformed skip"):
        KaldiDirectory(folder, read_lexicon(lexicon), Problems(option="--kaldi.malformed"))


def test_features_are_of_what_the_lexicon_says(directory):
    folder, lexicon = directory
    before = KaldiDirectory(folder, read_lexicon(lexicon))
    lexicon.write_text(lexicon.read_text().replace("N OW", "N AH"))
    after = KaldiDirectory(folder, read_lexicon(lexicon))
    with training.progress_bar(Console(quiet=True)) as progress:
        store.prepare(before, folder / "made", before.identity, progress, "data")
        with pytest.raises(TrainingError, match=r"other settings \(transcripts\)"):
            store.prepare(after, folder / "made", after.identity, progress, "data")


def test_a_recording_is_read_once_for_its_segments(directory, monkeypatch):
    folder, lexicon = directory
    found = KaldiDirectory(folder, read_lexicon(lexicon))
    read, load = [], found._load_audio
    monkeypatch.setattr(found, "_load_audio", lambda name: read.append(name) or load(name))
    parts = [found.recording(number).audio for number in (0, 1, 2)]
    assert read == ["one", "two"]
    assert not np.array_equal(parts[0][:100], parts[1][:100])


def test_text_that_is_no_utf8_is_named(directory):
    folder, lexicon = directory
    (folder / "text").write_bytes(b"u1 NO\nu2 \xff\n")
    with pytest.raises(DataError, match="text, line 2: expected UTF-8"):
        KaldiDirectory(folder, read_lexicon(lexicon))
    lexicon.write_text("NO\n")
    with pytest.raises(DataError, match=r"lexicon.txt, line 1: expected a word and its phones"):
        read_lexicon(lexicon)
    (folder / "wav.scp").unlink()
    with pytest.raises(DataError, match=r"must have text and wav\.scp or"):
        KaldiDirectory(folder, Lexicon())


def test_damaged_recordings_are_named_with_their_line(directory):
    folder, lexicon = directory
    open_it = lambda: KaldiDirectory(folder, read_lexicon(lexicon))  # noqa: E731
    (folder / "segments").write_text("u1 one 0.1 1.0\nu2 one 1.0 9.0\nu3 two 0.5 -1\n")
    with pytest.raises(RecordingError, match=r"segments, line 2: u2 ends after 9.0 s, but one has"):
        open_it().recording(1)
    (folder / "one.wav").write_bytes(b"no sound")
    with pytest.raises(RecordingError, match=r"wav.scp, line 1: one cannot be read"):
        open_it().recording(0)
    (folder / "one.wav").unlink()
    with pytest.raises(RecordingError, match=r"wav.scp, line 1: .*There is no file"):
        open_it().recording(0)
    (folder / "two.ark").write_bytes(b"two ")
    with pytest.raises(RecordingError, match=r"wav.scp, line 2: two cannot be read"):
        open_it().recording(2)


# Shards


class Few:
    """A corpus of tones, some of which cannot be used."""

    phones = Phones(("a", "b"))
    made = 0

    def __len__(self):
        return 7

    def recording(self, number):
        self.made += 1
        if number == 2:
            raise RecordingError("the third is damaged")
        seconds = {3: 0.0, 4: 0.05}.get(number, 0.3 + number / 100)
        return Recording(f"r{number}", [1, 2, 2], sound(seconds, number))


def prepare(few, folder, **identity):
    with training.progress_bar(Console(quiet=True)) as progress:
        return store.prepare(few, folder, identity, progress, "few")


def test_shards_are_made_once_and_what_is_damaged_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 3)
    few = Few()
    made = prepare(few, tmp_path / "few", seed=1)
    assert [utterance.name for utterance in made.utterances] == ["r0", "r1", "r5", "r6"]
    assert made.skipped[0] == "the third is damaged"
    assert "r3 has no 25 ms" in made.skipped[1]
    assert "r4 must have a phone" in made.skipped[2]
    expected = normalise(filterbank(sound(0.35, 5)))
    np.testing.assert_allclose(made.utterances[2].features, expected, atol=5e-3)
    assert made.utterances[2].phones.tolist() == [1, 2, 2]
    assert (made.utterances[2].frame_phones == -1).all()
    assert made.summary["skipped"] == 3

    again = prepare(few, tmp_path / "few", seed=1)
    assert few.made == 7
    for old, new in zip(made.utterances, again.utterances, strict=True):
        np.testing.assert_array_equal(old.features, new.features)
    (tmp_path / "few" / "0000003.npz").unlink()  # As if it had been killed before.
    prepare(few, tmp_path / "few", seed=1)
    assert few.made == 10
    with pytest.raises(TrainingError, match=r"other settings \(seed\)"):
        prepare(few, tmp_path / "few", seed=2)
    (tmp_path / "few" / "0000000.npz").write_bytes(b"damage")
    with pytest.raises(BrokenFileError, match=r"0000000.npz is damaged"):
        prepare(few, tmp_path / "few", seed=1)


# Batches


def dataset(*lengths):
    utterances = [
        Utterance(
            str(i), np.full((n, 4), i + 1.0), np.array([1, 2][: 1 + i % 2]), np.full(n, 1 + i % 2)
        )
        for i, n in enumerate(lengths)
    ]
    return Dataset(Phones(("a", "b")), tuple(utterances), ())


def test_batches_are_of_one_length_and_have_all():
    data = dataset(3, 9, 5, 10, 4, 8, 30, 2)
    batches = Batches(data, (5, 10), frames=10, multiple=1, seed=0)
    assert batches.left_out == 1
    assert batches.per_epoch == 2 + 3
    seen = []
    for step in range(5):
        batch = batches(step)
        assert batch["features"].shape in [(2, 5, 4), (1, 10, 4)]
        for features, n, labels, count, said in zip(
            batch["features"],
            batch["lengths"],
            batch["frame_phones"],
            batch["counts"],
            batch["phones"],
            strict=True,
        ):
            number = int(features[0, 0]) - 1
            seen.append(number)
            assert n == len(data.utterances[number].features)
            assert (features[:n] == number + 1).all()
            assert (features[n:] == 0).all()
            assert (labels[:n] == 1 + number % 2).all()
            assert (labels[n:] == -1).all()
            assert said[:count].tolist() == data.utterances[number].phones.tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4, 5, 7]
    epochs = [
        [batches(5 * epoch + step)["features"][:, 0, 0].tolist() for step in range(5)]
        for epoch in range(2)
    ]
    assert epochs[0] != epochs[1]
    np.testing.assert_array_equal(batches(7)["features"], batches(7)["features"])


def test_all_are_there_once_to_test_with():
    data = dataset(3, 9, 5, 10, 4, 8, 2)
    rows = [row for rows, _ in Batches(data, (5, 10), 10, 1, 0).once() for row in rows]
    assert sorted(rows) == list(range(7))
    assert Batches(data, (5, 10), 20, 4, 0)(0)["features"].shape[0] == 4
    with pytest.raises(ValueError, match="lengths must reach the shortest utterance, of 2 frames"):
        Batches(data, (1,), 10, 1, 0)
