"""Log-mel filterbanks as Kaldi has them, in JAX.

Shapes: L samples, F frames, M mel bins.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustax.models.audio import SAMPLE_RATE

NUM_MEL_BINS = 40
FRAME, HOP = SAMPLE_RATE * 25 // 1000, SAMPLE_RATE * 10 // 1000
_FFT = 512
_LOWEST, _HIGHEST = 20.0, SAMPLE_RATE / 2  # Hz
_EMPHASIS = 0.97


def num_frames(samples: int) -> int:
    """How many frames fit into audio; none if it is shorter than one."""
    return max(0, 1 + (samples - FRAME) // HOP)


def filterbank(audio: np.ndarray) -> np.ndarray:
    """Computes the features of a recording.

    >>> filterbank(np.zeros(16_000, np.float32)).shape
    (98, 40)

    Args:
        audio: (L,) at 16 kHz, between -1 and 1.

    Returns:
        (F, M), a frame each 10 ms, of those that the audio fills.
    """
    frames = num_frames(len(audio))
    # Padded to whole seconds, so that few programs are compiled; no frame that counts sees it.
    padded = np.pad(np.asarray(audio, np.float32), (0, -len(audio) % SAMPLE_RATE))
    if not frames:
        return np.zeros((0, NUM_MEL_BINS), np.float32)
    return np.asarray(_filterbank(padded))[:frames]


@jax.jit
def _filterbank(audio: Float[Array, " L"]) -> Float[Array, "F M"]:
    starts = HOP * np.arange(num_frames(len(audio)))
    frames = audio[starts[:, None] + np.arange(FRAME)] * 2.0**15  # Kaldi's samples are integers.
    frames = frames - frames.mean(1, keepdims=True)
    before = jnp.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    # Povey's window: Hann's, to the power of 0.85.
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))) ** 0.85
    spectrum = jnp.fft.rfft((frames - _EMPHASIS * before) * window.astype(np.float32), _FFT)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # Without "highest", accelerators round the factors of a product to few bits.
    mel = jnp.dot(power, _mel_filters().T, precision="highest")
    return jnp.log(jnp.maximum(mel, jnp.finfo(jnp.float32).eps))


@cache
def _mel_filters() -> np.ndarray:
    """Triangles evenly spaced and straight on the mel scale, of height 1: (M, K)."""
    corners = np.linspace(_mels(_LOWEST), _mels(_HIGHEST), NUM_MEL_BINS + 2)
    left, centre, right = (corners[i : NUM_MEL_BINS + i, None] for i in range(3))
    bins = _mels(np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE))
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _mels(hertz: float | np.ndarray) -> np.ndarray:
    return 1127 * np.log1p(np.asarray(hertz) / 700)


def normalise(features: np.ndarray) -> np.ndarray:
    """Brings each bin of a recording to mean 0 and variance 1; one that does not vary, to 0."""
    deviation = features.std(0)
    return (features - features.mean(0)) / np.where(deviation < 1e-3, 1.0, deviation)
