"""People's speech, to test with: the prompts of a telephone exchange, and which phones they are.

Which of the pronunciations in its dictionary was said, pocketsphinx finds by aligning it.
"""

from functools import cached_property

import numpy as np
from pocketsphinx import Decoder

from clustax.models.audio import SAMPLE_RATE
from experiments.common.speech import Clip, asterisk_prompts, normalise
from experiments.speech.corpus import Recording, RecordingError
from experiments.speech.kaldi import plain
from experiments.speech.phones import Phones


class Prompts:
    """The spoken prompts of the Asterisk telephone exchange, of one speaker.

    Raises:
        PackageUnavailableError: in its methods, if one of the two packages cannot be had.
    """

    phones = Phones()

    @cached_property
    def _clips(self) -> list[Clip]:
        return asterisk_prompts()

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(lm=None, loglevel="FATAL", samprate=SAMPLE_RATE)

    def __len__(self) -> int:
        return len(self._clips)

    def recording(self, number: int) -> Recording:
        """Reads a prompt.

        Raises:
            RecordingError: if it has a word that is not in the dictionary, or cannot be aligned.
        """
        name, text, audio = self._clips[number]
        names = align(self._decoder, name, text, audio)
        return Recording(name, self.phones.numbers(names), audio)


def align(decoder: Decoder, name: str, text: str, audio: np.ndarray) -> list[str]:
    """Finds the phones of speech.

    Args:
        decoder: what aligns.
        name: what the recording is called.
        text: what is said.
        audio: 16 kHz, in -1..1.

    Raises:
        RecordingError: if a word is not in the dictionary, or the text does not fit.
    """
    words = normalise(text).split()
    unknown = [word for word in words if decoder.lookup_word(word) is None]
    if unknown or not words:
        raise RecordingError(f"{name}: no pronunciation of {' '.join(unknown) or repr(text)}.")
    raw = (np.clip(audio, -1, 1) * (2**15 - 1)).astype("<i2").tobytes()
    try:
        decoder.set_align_text(" ".join(words))
        for part in ("words", "phones"):
            if part == "phones":
                decoder.set_alignment()
            decoder.start_utt()
            decoder.process_raw(raw, full_utt=True)
            decoder.end_utt()
        found = [phone.name for word in decoder.get_alignment() for phone in word]
    except RuntimeError as error:
        raise RecordingError(f"{name}: {text!r} cannot be aligned ({error}).") from error
    return [plain(phone) for phone in found if phone.isalpha() and phone != "SIL"]
