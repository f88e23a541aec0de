"""The log-mel spectrogram against a plain float64 transcription of Whisper's."""

import jax.numpy as jnp
import numpy as np
import pytest

from clustax.models import log_mel
from tests.helpers import others_once


def mel_of(hertz):
    """Slaney's scale: 3 mel each 200 Hz below 1 kHz, 27 mel each factor of 6.4 above."""
    return np.where(
        hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(hertz / 1000 + 1e-30) / np.log(6.4)
    )


def transcription(audio, num_mel_bins):
    """One frame and one filter at a time, in float64."""
    audio = np.concatenate([audio.astype(np.float64), np.zeros(480_000 - len(audio))])
    audio = np.pad(audio, 200, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    hertz = np.linspace(0, 8000, 201)
    grid = np.linspace(0, 8000, 800_001)
    corners = np.interp(np.linspace(0, mel_of(8000.0), num_mel_bins + 2), mel_of(grid), grid)
    spectrum = np.array(
        [abs(np.fft.rfft(hann * audio[160 * i : 160 * i + 400])) ** 2 for i in range(3000)]
    )
    mel = np.array(
        [
            spectrum
            @ np.interp(hertz, corners[i : i + 3], [0, 2 / (corners[i + 2] - corners[i]), 0])
            for i in range(num_mel_bins)
        ]
    )
    log = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def voices():
    """Two seconds of a gliding tone with overtones in noise, and half of it at another loudness."""
    time = np.arange(32_000) / 16_000
    phase = 2 * np.pi * (120 * time + 40 * time**2)
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    noise = np.random.default_rng(0).standard_normal(len(time))
    loud = 0.2 * tone * np.sin(np.pi * time / 2) + 0.01 * noise
    return loud.astype(np.float32), (0.01 * loud[:16_000]).astype(np.float32)


@pytest.mark.parametrize("num_mel_bins", others_once(80, 128))
def test_equals_the_transcription(num_mel_bins):
    for audio in voices():
        got = log_mel(audio, num_mel_bins)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, transcription(audio, num_mel_bins), atol=1e-4)


@pytest.mark.once
def test_full_length():
    audio = np.tile(voices()[0], 15)
    np.testing.assert_allclose(log_mel(audio), transcription(audio, 80), atol=1e-4)


@pytest.mark.once
def test_each_of_a_batch_has_its_own_floor():
    """The dynamic range is cut below the loudest moment of each window."""
    loud, quiet = voices()
    batch = log_mel(jnp.stack([loud[:16_000], quiet]))
    for got, audio in zip(batch, (loud[:16_000], quiet), strict=True):
        np.testing.assert_allclose(got, log_mel(audio), atol=1e-6)


def test_silence_is_finite():
    np.testing.assert_allclose(log_mel(np.zeros(100, np.float32)), (np.log10(1e-10) + 4) / 4)


def test_too_long_audio_is_refused():
    with pytest.raises(ValueError, match=r"at most 480000 samples .* \(2, 480001\): cut it"):
        log_mel(jnp.zeros((2, 480_001)))
