"""Whisper's log-mel spectrogram of 16 kHz audio in JAX.

Shapes: L samples, F frames, M mel bins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SAMPLE_RATE = 16_000
WINDOW_SAMPLES = 30 * SAMPLE_RATE
"""Whisper hears windows of 30 seconds."""

_FRAME = 400
_HOP = 160


def log_mel(
    audio: Float[Array | np.ndarray, "*B L"], num_mel_bins: int = 80
) -> Float[Array, "*B M F"]:
    """Computes the spectrogram that Whisper's encoder takes.

    >>> log_mel(np.zeros((2, 16_000), np.float32)).shape
    (2, 80, 3000)

    Args:
        audio: at 16 kHz, between -1 and 1, at most 30 s; shorter audio is followed by silence.
        num_mel_bins: 80, or the 128 of the newest models.

    Returns:
        3000 frames, one each 10 ms.

    Raises:
        ValueError: if the audio is longer than 30 s.
    """
    missing = WINDOW_SAMPLES - audio.shape[-1]
    if missing < 0:
        raise ValueError(
            f"audio must have at most {WINDOW_SAMPLES} samples (30 s at 16 kHz), "
            f"got shape {audio.shape}: cut it into windows."
        )
    padding = [(0, 0)] * (audio.ndim - 1) + [(0, missing)]
    # Padded out here, so that audio of any length runs the same compiled program.
    pad = np.pad if isinstance(audio, np.ndarray) else jnp.pad
    return _log_mel(pad(audio, padding), num_mel_bins)


@functools.partial(jax.jit, static_argnums=1)
def _log_mel(audio: Float[Array, "*B L"], num_mel_bins: int) -> Float[Array, "*B M F"]:
    edges = [(0, 0)] * (audio.ndim - 1) + [(_FRAME // 2, _FRAME // 2)]
    audio = jnp.pad(audio.astype(jnp.float32), edges, mode="reflect")
    starts = _HOP * np.arange(WINDOW_SAMPLES // _HOP)  # Whisper drops the last frame, so no + 1.
    hann = np.hanning(_FRAME + 1)[:-1].astype(np.float32)
    frames = audio[..., starts[:, None] + np.arange(_FRAME)] * hann
    power = jnp.abs(jnp.fft.rfft(frames)) ** 2
    # Without "highest", accelerators round the factors of a product to few bits.
    mel = jnp.einsum("mk,...fk->...mf", _mel_filters(num_mel_bins), power, precision="highest")
    log = jnp.log10(jnp.maximum(mel, 1e-10))
    return (jnp.maximum(log, log.max((-2, -1), keepdims=True) - 8) + 4) / 4


@functools.cache
def _mel_filters(num_mel_bins: int) -> np.ndarray:
    """Triangles of unit area, evenly spaced on Slaney's mel scale from 0 Hz to 8 kHz: (M, K)."""
    # Slaney's scale is linear up to 1 kHz, which is 15 mel, and logarithmic from there.
    step = np.log(6.4) / 27
    top = 15 + np.log(SAMPLE_RATE / 2 / 1000) / step
    mels = np.linspace(0, top, num_mel_bins + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    left, centre, right = (corners[i : num_mel_bins + i, None] for i in range(3))
    frequencies = np.fft.rfftfreq(_FRAME, 1 / SAMPLE_RATE)
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (right - left)).astype(np.float32)
