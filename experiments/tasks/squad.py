"""SQuAD: its files, windows over long contexts, spans as answers, and the official scores.

The scores are those of SQuAD's official script: answers are compared without case, punctuation,
articles (a, an, the) and repeated spaces, word by word, with the best of the expected ones.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from experiments.common.finetuning import Inputs
from experiments.common.rows import DataError, Problems


class Answer(NamedTuple):
    """An expected answer, and the character it starts with."""

    text: str
    start: int


class Question(NamedTuple):
    """A question on a context; one that the context does not answer has no answers."""

    id: str
    article: str
    context: str
    question: str
    answers: tuple[Answer, ...]


def read_squad(path: Path, problems: Problems) -> list[Question]:
    """Reads a file of SQuAD 1.1 or 2.0.

    Args:
        path: the JSON file.
        problems: what becomes of malformed questions.

    Raises:
        DataError: if it is no such file, or if malformed questions are refused.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8: {error}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: expected JSON, but {error.msg}.") from error
    questions: dict[str, Question] = {}
    try:
        for number, article in enumerate(content["data"]):
            title = str(article.get("title", number))
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    problem = _problem(entry, paragraph["context"], questions)
                    if problem is not None:
                        problems.add(path, _line(text, entry), problem)
                        continue
                    answers = () if entry.get("is_impossible") else map(_answer, entry["answers"])
                    questions[entry["id"]] = Question(
                        entry["id"],
                        title,
                        paragraph["context"],
                        entry["question"].strip(),
                        tuple(answers),
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} must have data, paragraphs, context and qas as SQuAD's files have them, but: "
            f"{type(error).__name__} {error}."
        ) from error
    if not questions:
        raise DataError(f"{path} must have questions, found none.")
    return list(questions.values())


def _problem(entry: Mapping[str, Any], context: str, others: Mapping[str, Question]) -> str | None:
    """What is wrong with a question, if anything is."""
    for name in ("id", "question"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            return f"expected a question with {name}, found {entry.get(name)!r}"
    name = f"question {entry['id']}"
    if entry["id"] in others:
        return f"{name}: expected ids that differ, found this one again"
    if entry.get("is_impossible"):
        return None
    if not entry.get("answers"):
        return f"{name}: expected answers, or is_impossible, found neither"
    for answer in entry["answers"]:
        try:
            expected, start = answer["text"], answer["answer_start"]
            found = context[start : start + len(expected)]
        except (KeyError, TypeError):
            return f"{name}: expected answers with text and answer_start, found {answer!r}"
        if start < 0 or found != expected or not expected.strip():
            return f"{name}: expected {expected!r} at character {start}, found {found!r}"
    return None


def _answer(entry: Mapping[str, Any]) -> Answer:
    text = entry["text"]
    return Answer(text.strip(), entry["answer_start"] + len(text) - len(text.lstrip()))


def _line(text: str, entry: Mapping[str, Any]) -> int:
    """The line of a question, found by what it says."""
    known = [entry[name] for name in ("id", "question") if isinstance(entry.get(name), str)]
    for said in known:
        for ascii_only in (True, False):
            at = text.find(json.dumps(said, ensure_ascii=ascii_only))
            if at >= 0:
                return text.count("\n", 0, at) + 1
    return 1


class Window(NamedTuple):
    """A question and a part of its context, as a model reads them.

    Attributes:
        row: which question.
        tokens: ids.
        token_types: 0 or 1.
        offsets: the characters of the context that each token stands for; None for others.
    """

    row: int
    tokens: list[int]
    token_types: list[int]
    offsets: list[tuple[int, int] | None]


def make_windows(
    tokenizer: tokenizers.Tokenizer,
    questions: Sequence[tuple[str, str]],
    max_length: int,
    overlap: int,
    max_question: int,
) -> list[Window]:
    """Cuts contexts into windows that overlap, each with all of its question.

    Args:
        tokenizer: whose truncation is changed.
        questions: each with its context.
        max_length: tokens of a window, with the question and what stands between.
        overlap: tokens of the context that a window shares with the one before.
        max_question: tokens of a question; longer ones are cut.

    Raises:
        ValueError: if max_length leaves no room for a context beside question and overlap.
    """
    room = max_length - max_question - tokenizer.num_special_tokens_to_add(True)
    if overlap < 0 or room <= overlap:
        raise ValueError(
            f"max_length = {max_length} must leave more than overlap = {overlap} tokens beside "
            f"max_question = {max_question}, got {room}: choose a longer one."
        )
    tokenizer.no_truncation()
    asked = []
    for question, _ in questions:
        offsets = tokenizer.encode(question, add_special_tokens=False).offsets
        long = len(offsets) > max_question
        asked.append(question[: offsets[max_question - 1][1]] if long else question)
    tokenizer.enable_truncation(max_length, stride=overlap, strategy="only_second")
    contexts = [context for _, context in questions]
    windows = []
    for row, code in enumerate(tokenizer.encode_batch(list(zip(asked, contexts, strict=True)))):
        for part in (code, *code.overflowing):
            offsets = [
                where if sequence == 1 else None
                for where, sequence in zip(part.offsets, part.sequence_ids, strict=True)
            ]
            windows.append(Window(row, part.ids, part.type_ids, offsets))
    return windows


def find_answer(window: Window, answer: Answer) -> tuple[int, int] | None:
    """The first and last token of an answer, if all of it is in the window."""
    first, last = (
        next(
            (i for i, where in enumerate(window.offsets) if where and where[0] <= at < where[1]),
            None,
        )
        for at in (answer.start, answer.start + len(answer.text) - 1)
    )
    return None if first is None or last is None else (first, last)


def make_inputs(windows: Sequence[Window], questions: Sequence[Question]) -> Inputs:
    """The windows with the first answer of each; the first token stands for none."""
    spans = []
    for window in windows:
        answers = questions[window.row].answers
        spans.append((answers and find_answer(window, answers[0])) or (0, 0))
    return Inputs(
        [window.tokens for window in windows],
        [window.token_types for window in windows],
        {
            name: np.array([span[at] for span in spans], np.int32)
            for at, name in enumerate(("start", "end"))
        },
    )


class Span(NamedTuple):
    """A possible answer: the characters from start to below end, or none if these are equal."""

    start: int
    end: int
    score: float


def best_spans(
    windows: Iterable[tuple[Window, np.ndarray, np.ndarray]],
    n_best: int,
    max_answer: int,
    allow_none: bool,
) -> list[Span]:
    """The spans of highest score of a question, over all of its windows, each once.

    Args:
        windows: those of the question, with the logits of start and end of their tokens.
        n_best: how many; as many starts and ends of each window are considered.
        max_answer: tokens of an answer, at the most.
        allow_none: whether no answer counts as one. Its score is the least of the windows'.
    """
    best: dict[tuple[int, int], float] = {}
    none = np.inf
    for window, start, end in windows:
        # The question's tokens, and what stands between, are no answers.
        inside = np.array([where is not None for where in window.offsets])
        starts, ends = (
            np.argsort(np.where(inside, logits[: len(inside)], -np.inf))[::-1][:n_best]
            for logits in (start, end)
        )
        for i in starts:
            for j in ends:
                first, last = window.offsets[i], window.offsets[j]
                if first and last and i <= j < i + max_answer:
                    key = (first[0], last[1])
                    best[key] = max(best.get(key, -np.inf), float(start[i] + end[j]))
        none = min(none, float(start[0] + end[0]))
    spans = [Span(*key, score) for key, score in best.items()]
    if allow_none or not spans:
        spans.append(Span(0, 0, none))
    return sorted(spans, key=lambda span: -span.score)[:n_best]


def probabilities(spans: Sequence[Span]) -> np.ndarray:
    """How likely each of some spans is if one of them is right: the softmax of their scores."""
    scores = np.array([span.score for span in spans], np.float64)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def normalise(answer: str) -> str:
    """Removes case, punctuation, articles and repeated spaces, as the official script does."""
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(found: str, expected: Sequence[str]) -> float:
    """1 if an answer is one of the expected ones, normalised; "" stands for none.

    Args:
        found: the answer.
        expected: the right ones; none at all where the context has no answer.
    """
    return float(any(normalise(found) == normalise(each) for each in _expected(expected)))


def f1(found: str, expected: Sequence[str]) -> float:
    """The F1 of an answer's words, normalised, with the best of the expected ones.

    Args:
        found: the answer.
        expected: the right ones; none at all where the context has no answer.
    """
    return max(_f1(normalise(found).split(), normalise(e).split()) for e in _expected(expected))


def _expected(answers: Sequence[str]) -> Sequence[str]:
    # An answer of which nothing is left, such as "the", does not count beside others.
    return [answer for answer in answers if normalise(answer)] or [""]


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))
