"""Phones of a recording, by a model that experiments.asr_ctc has trained.

python -m experiments.transcribe talk.mp3 --run results/asr_ctc/runs/full_3-layers
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import asr_ctc
from experiments.asr_ctc import Cell
from experiments.common.attentions import Attentions
from experiments.common.checkpoints import CheckpointError, Checkpoints
from experiments.common.files import BrokenFileError, read_json
from experiments.common.speech import AudioError, read_audio
from experiments.speech import decoding
from experiments.speech.features import NUM_MEL_BINS, filterbank, normalise
from experiments.speech.model import Model, SpeechModel
from experiments.speech.phones import Phones


@dataclass(frozen=True)
class Settings:
    """Print the phones of a recording."""

    audio: Annotated[Path, tyro.conf.Positional]
    """The recording, of any kind that FFmpeg knows."""
    run: Path
    """The folder of a trained model, below runs in the results of experiments.asr_ctc."""
    beam: int = 8
    """How many beginnings the search follows up; 0 takes the best symbol of each frame."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.beam < 0:
            raise ValueError(f"beam must not be negative, got {self.beam}.")


def load(folder: Path) -> tuple[SpeechModel, Phones]:
    """Reads a trained model, in evaluation mode, and its phones.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it cannot be read.
        BrokenFileError: if what says what model it is cannot be read.
    """
    path = folder / "run.json"
    if not path.exists() or not (folder / "best").is_dir():
        raise FileNotFoundError(
            f"{folder} must be the folder of a trained model, with run.json and best: choose one "
            "below runs in the results of experiments.asr_ctc."
        )
    found = read_json(path)
    if found["bins"] != NUM_MEL_BINS:
        raise CheckpointError(
            f"The model in {folder} hears {found['bins']} bins, not the "
            f"{NUM_MEL_BINS} of filterbanks here."
        )
    settings = asr_ctc.Settings(
        seed=found["seed"],
        model=Model(**found["model"]),
        attentions=Attentions(**found["attentions"]),
    )
    cell, phones = Cell(*found["cell"].values()), Phones(tuple(found["phones"]))
    model = asr_ctc.build(settings, cell, len(phones.all), found["bins"])
    graph, params, keys, rest = nnx.split(model, nnx.Param, nnx.RngKey, ...)
    with Checkpoints(folder / "best") as best:
        step, (params, rest) = best.restore((params, rest))
    if not step:
        raise CheckpointError(f"There is no checkpoint in {folder / 'best'} yet: train on.")
    model = nnx.merge(graph, params, keys, rest)
    model.eval()
    return model, phones


BLOCK = 2048
"""What the padded length is a multiple of: attention by blocks then takes little memory."""


def transcribe(model: SpeechModel, phones: Phones, audio: np.ndarray, beam: int) -> list[str]:
    """The phones of a recording.

    Args:
        model: in evaluation mode.
        phones: that it knows.
        audio: 16 kHz, in -1..1.
        beam: the width of the search; 0 for none.

    Raises:
        AudioError: if the recording is shorter than a frame.
    """
    features = filterbank(audio)
    if not len(features):
        raise AudioError(f"The recording must have 25 ms at least, got {len(audio)} samples.")
    padding = ((0, -len(features) % BLOCK), (0, 0))
    padded = jnp.asarray(np.pad(normalise(features), padding))
    logits = model(padded[None], jnp.array([len(features)]))
    said = np.asarray(jax.nn.log_softmax(logits))[0, : len(features)]
    return phones.names(decoding.beam(said, beam) if beam else decoding.greedy(said))


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m experiments.transcribe")
    try:
        model, phones = load(settings.run)
        found = transcribe(model, phones, read_audio(settings.audio), settings.beam)
    except (AudioError, CheckpointError, BrokenFileError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(" ".join(found))


if __name__ == "__main__":
    main()
