"""Swaps the attention of a pretrained model for clustered attention, without retraining.

The task `text` does it to a BERT, all-MiniLM-L6-v2, and long documents: how far do its token
vectors and document embeddings move, does a classifier of the embeddings notice? The task `speech`
does it to the encoder of a Whisper and transcribed speech: how many more words are wrong? Both say
what it costs. `speech --audio FILE` transcribes any recording with both attentions side by side.

    python -m experiments.pretrained_swap {text,speech} --help

A run that was killed goes on where it was when it is started again.
"""

import tyro
from rich.console import Console

from experiments.common.packages import PackageUnavailableError
from experiments.common.speech import AudioError
from experiments.common.text import DocumentsError
from experiments.swap import speech, text

TASKS = {"text": text.Settings, "speech": speech.Settings}
RUN = {text.Settings: text.run, speech.Settings: speech.run}


def main() -> None:
    """The command line."""
    settings = tyro.extras.subcommand_cli_from_dict(
        TASKS, prog="python -m experiments.pretrained_swap", description=__doc__
    )
    try:
        RUN[type(settings)](settings, Console())
    except (PackageUnavailableError, DocumentsError, AudioError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted: start it again to go on. Earlier results are as they were."
        ) from None


if __name__ == "__main__":
    main()
