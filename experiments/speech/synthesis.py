"""Speech from text by two synthesisers, with the phones that they say and when.

flite and espeak-ng come inside packages and are unpacked, not installed.
"""

import ctypes
import os
import subprocess
import tempfile
import wave
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy.signal import resample_poly

from clustax.models.audio import SAMPLE_RATE
from experiments.common.debian import ALSA, FLITE_LIBRARY, FLITE_PROGRAM, read_files
from experiments.common.files import whole_file
from experiments.common.packages import ESPEAK_NG, cache_dir, extract_all
from experiments.speech import phones


class SynthesisError(RuntimeError):
    """A synthesiser does not do what it is asked for; the message says which and what."""


class Voice(NamedTuple):
    """A speaker: kal16, awb, rms or slt of flite, or of espeak-ng a variant such as f2."""

    engine: Literal["flite", "espeak"]
    name: str

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.engine}-{self.name}"


class Spoken(NamedTuple):
    """Speech, and its phones, each with the sample at which it ends; pauses are named ""."""

    audio: np.ndarray  # 16 kHz, in -1..1.
    phones: list[str]
    ends: np.ndarray


def speak(text: str, voice: Voice, rate: float = 1.0, pitch: float = 1.0) -> Spoken:
    """Says a text in American English.

    Args:
        text: plain words, and punctuation for pauses.
        voice: who speaks.
        rate: how fast, 1 is the voice's own; from 0.7 to 1.4.
        pitch: how high, 1 is the voice's own; the voice rms of flite does not change.

    Raises:
        SynthesisError: if the voice does not exist, or says a phone that is not known.
        PackageUnavailableError: if the synthesiser cannot be had.
    """
    say = _flite if voice.engine == "flite" else _espeak
    return say(text, voice.name, rate, pitch)


FLITE_PITCH = {"kal16": 105.0, "awb": 130.0, "slt": 170.0}
"""The mean pitch, in Hz, of flite's voices that can be told another one."""
FLITE_VOICES = ("kal16", "awb", "rms", "slt")

ESPEAK_RATE, ESPEAK_PITCH = 165, 50
"""Words a minute, and the pitch on espeak-ng's scale to 100, of its voices as they are here."""


def _flite(text: str, name: str, rate: float, pitch: float) -> Spoken:
    if name not in FLITE_VOICES:
        raise SynthesisError(f"flite's voices are {', '.join(FLITE_VOICES)}, got {name!r}.")
    root = _flite_root()
    settings = {"duration_stretch": 1 / rate}
    if name in FLITE_PITCH:
        settings["int_f0_target_mean"] = FLITE_PITCH[name] * pitch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = [str(root / f"flite_cmu_us_{name}"), "-psdur", "-o", str(path), "-t", text]
        for key, value in settings.items():
            command += ["--setf", f"{key}={value:.4f}"]
        environment = os.environ | {"LD_LIBRARY_PATH": str(root)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not path.exists():
            raise SynthesisError(f"flite cannot say {text!r}: {done.stderr.strip()[-300:]}.")
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    said = [word.rsplit(":", 1) for word in done.stdout.split()]
    ends = np.array([float(end) for _, end in said])
    # The times overshoot the audio.
    ends = ends * (len(samples) / max(ends[-1], 1e-3))
    return _mapped(samples / 2**15, [name for name, _ in said], ends, phones.FLITE, "flite")


@cache
def _flite_root() -> Path:
    """A folder with flite's programs and libraries."""
    root = cache_dir() / f"{FLITE_LIBRARY.name}-{FLITE_LIBRARY.version}"
    for package, folder, version in (
        (FLITE_PROGRAM, "usr/bin", None),
        (FLITE_LIBRARY, "usr/lib/x86_64-linux-gnu", 1),
        (ALSA, "usr/lib/x86_64-linux-gnu", 2),  # Linked to, and not used.
    ):
        for name, content in read_files(package, folder).items():
            if "/" in name:
                continue
            # Programs ask for libraries by this number, which in a package is a link.
            path = root / (name if version is None else f"{name.split('.so')[0]}.so.{version}")
            if not path.exists() or path.read_bytes() != content:
                with whole_file(path) as partial:
                    partial.write_bytes(content)
                    partial.chmod(0o755)
    return root


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("message", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
_PHONEME = 7  # The type of an event that is the start of a phone.
_SYNCHRONOUS, _PHONEME_EVENTS, _DO_NOT_EXIT = 2, 0x0001, 0x8000
_RATE, _PITCH = 1, 3  # Numbers of parameters.
_UTF8 = 1


class _Espeak:
    """The library, of which a process can have one."""

    def __init__(self) -> None:
        root = extract_all(ESPEAK_NG) / "espeakng_loader"
        self.library = ctypes.CDLL(str(root / "libespeak-ng.so"))
        self.rate = self.library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(root).encode(), _PHONEME_EVENTS | _DO_NOT_EXIT
        )
        if self.rate <= 0:
            raise SynthesisError(f"espeak-ng does not start with its data in {root}.")
        self._callback = _Callback(self._receive)  # Kept, or it would be freed.
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count:
            self.pieces.append(ctypes.string_at(samples, 2 * count))
        number = 0
        while events[number].type:
            if events[number].type == _PHONEME:
                name = events[number].id.string.decode(errors="replace")
                self.started.append((name, events[number].sample))
            number += 1
        return 0

    def say(self, text: str, voice: str, rate: float, pitch: float):
        full = f"en-us+{voice}" if voice else "en-us"
        # A variant of other accents than this fails without an error.
        if self.library.espeak_SetVoiceByName(full.encode()):
            raise SynthesisError(f"espeak-ng has no voice {full!r}.")
        self.library.espeak_SetParameter(_RATE, round(ESPEAK_RATE * rate), 0)
        self.library.espeak_SetParameter(_PITCH, min(99, round(ESPEAK_PITCH * pitch)), 0)
        self.pieces: list[bytes] = []
        self.started: list[tuple[str, int]] = []
        encoded = text.encode()
        if (
            self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
            or self.library.espeak_Synchronize()
        ):
            raise SynthesisError(f"espeak-ng cannot say {text!r}.")
        return np.frombuffer(b"".join(self.pieces), "<i2"), self.started


_espeak_library = cache(_Espeak)


def _espeak(text: str, name: str, rate: float, pitch: float) -> Spoken:
    library = _espeak_library()
    samples, started = library.say(text, name, rate, pitch)
    if not started or not len(samples):
        raise SynthesisError(f"espeak-ng says nothing to {text!r}.")
    audio = resample(samples / 2**15, library.rate)
    starts = np.array([sample for _, sample in started] + [len(samples)])
    ends = np.minimum(starts[1:], len(samples)) * (SAMPLE_RATE / library.rate)
    # Pauses have several names, and stress is marked in front.
    names = ["_" if name.startswith("_") else name.lstrip("',%=") for name, _ in started]
    return _mapped(audio, names, ends, phones.ESPEAK, "espeak-ng")


def resample(audio: np.ndarray, rate: int) -> np.ndarray:
    """Brings audio of another rate to 16 kHz."""
    common = int(np.gcd(rate, SAMPLE_RATE))
    return resample_poly(audio, SAMPLE_RATE // common, rate // common)


def _mapped(audio, names, ends, mapping, engine: str) -> Spoken:
    """Renames phones; one that stands for two is divided between them."""
    said, until, start = [], [], 0.0
    for name, end in zip(names, ends, strict=True):
        if name not in mapping:
            raise SynthesisError(f"{engine} says the phone {name!r}, which phones.py does not map.")
        parts = mapping[name] or ("",)
        said += parts
        until += [start + (end - start) * (i + 1) / len(parts) for i in range(len(parts))]
        start = end
    return Spoken(
        audio.astype(np.float32), said, np.minimum(np.round(until), len(audio)).astype(np.int64)
    )
