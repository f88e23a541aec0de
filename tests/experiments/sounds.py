"""Sounds, and a directory of them as Kaldi has it."""

import wave
from pathlib import Path

import kaldiio
import numpy as np


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Tones that change, and a little noise."""
    rng = np.random.default_rng(seed)
    times = np.arange(int(16_000 * seconds)) / 16_000
    tones = sum(np.sin(2 * np.pi * hertz * times * (1 + times / 9)) for hertz in (130, 700, 2300))
    return (0.1 * tones + 0.01 * rng.standard_normal(len(times))).astype(np.float32)


def write_wav(path, audio, rate=16_000):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((audio * 2**15).astype("<i2").tobytes())


def write_directory(root: Path) -> tuple[Path, Path]:
    """Writes two recordings, of which the second is in an archive, cut into three utterances.

    Returns:
        The directory, and a lexicon.
    """
    folder = root / "data"
    folder.mkdir()
    write_wav(folder / "one.wav", sound(2, seed=1))
    archive = kaldiio.WriteHelper(f"ark,scp:{folder}/two.ark,{folder}/two.scp")
    with archive as writer:
        writer("two", (8000, (sound(3, seed=2)[::2] * 2**15).astype(np.int16)))
    (folder / "wav.scp").write_text(
        f"one {folder}/one.wav\n" + (folder / "two.scp").read_text(), "utf-8"
    )
    (folder / "segments").write_text("u1 one 0.1 1.0\nu2 one 1.0 2.0\nu3 two 0.5 -1\n")
    (folder / "text").write_text("u1 NO\nu2 NO YES\nu3 YES\n")
    (folder / "utt2spk").write_text("u1 anna\nu2 anna\nu3 otto\n")
    lexicon = root / "lexicon.txt"
    lexicon.write_text("NO N OW1\nNO N AH0\nYES Y_B EH1_I S_E\n<noise> SPN\n")
    return folder, lexicon
