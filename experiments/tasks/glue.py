"""GLUE's tasks: their files, and their metrics.

A folder has GLUE's official layout, CoLA/train.tsv and so on. Three tasks may also be there in the
form of their sources: MRPC with a val.tsv, RTE as the XML of the challenges 1 to 3, and STS as the
tables of SemEval 2012 to 2016, of which the last year is the development set.
"""

import xml.sax
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.xmlreader import AttributesImpl, Locator

import numpy as np
import scipy.stats
import sklearn.metrics

from experiments.common.rows import DataError, Problems

HIGHEST = 5.0
"""The highest score of two sentences in STS."""


class Row(NamedTuple):
    """A row as it stands in a file."""

    line: int
    first: str
    second: str | None
    label: str


class Example(NamedTuple):
    """One or two sentences, and the number of their label, or their score over the highest."""

    first: str
    second: str | None
    label: float


@dataclass(frozen=True)
class Table:
    """A tab-separated file without quotes.

    Attributes:
        first: the column of the sentence: its name in the header, or its number if there is none.
        second: that of the second sentence.
        label: that of the label.
    """

    first: str | int
    second: str | int | None
    label: str | int

    def __call__(self, path: Path, problems: Problems) -> Iterator[Row]:
        """Reads the rows of a file."""
        columns = {"first": self.first, "second": self.second, "label": self.label}
        numbers: dict[str, int] = {name: at for name, at in columns.items() if isinstance(at, int)}
        header = None
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    problems.add(path, line, f"expected UTF-8, but {error.reason}")
                    continue
                fields = text.rstrip("\r\n").split("\t")
                if header is None and not numbers:
                    header = fields
                    wanted = {name: at for name, at in columns.items() if at is not None}
                    if missing := [at for at in wanted.values() if at not in header]:
                        raise DataError(
                            f"{path}, line 1: expected a header with {', '.join(missing)}, found "
                            f"{', '.join(header)}: get the official file."
                        )
                    numbers = {name: header.index(at) for name, at in wanted.items()}
                    continue
                count = max(numbers.values()) + 1 if header is None else len(header)
                if len(fields) < count or (header and len(fields) > count):
                    problems.add(path, line, f"expected {count} fields, found {len(fields)}")
                    continue
                found = {name: fields[at].strip() for name, at in numbers.items()}
                yield Row(line, found["first"], found.get("second"), found["label"])


def read_challenge(path: Path, problems: Problems) -> Iterator[Row]:
    """Reads the pairs of a challenge of RTE.

    Raises:
        DataError: if the file is no XML.
    """
    pairs = _Pairs()
    try:
        xml.sax.parse(str(path), pairs)
    except xml.sax.SAXParseException as error:
        raise DataError(
            f"{path}, line {error.getLineNumber()}: expected XML, but {error.getMessage()}."
        ) from error
    for line, found in pairs.found:
        if found.keys() == {"t", "h", "label"}:
            yield Row(line, found["t"].strip(), found["h"].strip(), found["label"])
        else:
            there = ", ".join(sorted(found)) or "nothing"
            problems.add(path, line, f"expected a pair with label, t and h, found {there}")


class _Pairs(xml.sax.ContentHandler):
    """The texts of each pair with its label, and the line it begins in."""

    LABELS: Mapping[str, str] = {
        "TRUE": "entailment",
        "YES": "entailment",
        "FALSE": "not_entailment",
        "NO": "not_entailment",
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, dict[str, str]]] = []
        self._element = ""

    def setDocumentLocator(self, locator: Locator) -> None:
        self._locator = locator

    def startElement(self, name: str, attrs: AttributesImpl) -> None:
        self._element = name
        if name == "pair":
            label = attrs.get("value", attrs.get("entailment"))
            found = {} if label is None else {"label": self.LABELS.get(label, label)}
            self.found.append((self._locator.getLineNumber() or 0, found))

    def characters(self, content: str) -> None:
        if self._element in ("t", "h") and self.found:
            texts = self.found[-1][1]
            texts[self._element] = texts.get(self._element, "") + content

    def endElement(self, name: str) -> None:
        self._element = ""


@dataclass(frozen=True)
class Layout:
    """Where the data of a task are.

    Attributes:
        read: reads the rows of a file.
        train: patterns of the files to train on.
        dev: those of the sets to develop on, by name; the first one decides.
        ours: whether the split is not GLUE's.
    """

    read: Callable[[Path, Problems], Iterator[Row]]
    train: tuple[str, ...]
    dev: Mapping[str, tuple[str, ...]]
    ours: bool = False


def _official(folder: str, table: Table, dev: tuple[str, ...] = ("dev",)) -> Layout:
    sets = {name: (f"{folder}/{name}.tsv",) for name in dev}
    return Layout(table, (f"{folder}/train.tsv",), sets)


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks.

    Attributes:
        labels: how the files have them; none where the label is a score.
        metrics: names of METRICS; the first one decides.
        layouts: where the data may be; the first that is there counts.
    """

    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    layouts: tuple[Layout, ...]


_PAIR = ("sentence1", "sentence2")
_MRPC = Table("#1 String", "#2 String", "Quality")
_ENTAILMENT = ("entailment", "not_entailment")
_BINARY = ("0", "1")

TASKS = {
    "CoLA": Task(_BINARY, ("matthews",), (_official("CoLA", Table(3, None, 1)),)),
    "SST-2": Task(_BINARY, ("accuracy",), (_official("SST-2", Table("sentence", None, "label")),)),
    "MRPC": Task(
        _BINARY,
        ("accuracy", "f1"),
        (
            _official("MRPC", _MRPC),
            Layout(_MRPC, ("MRPC/train.tsv",), {"dev": ("MRPC/val.tsv",)}, ours=True),
        ),
    ),
    "STS-B": Task(
        (),
        ("pearson", "spearman"),
        (
            _official("STS-B", Table(*_PAIR, "score")),
            Layout(
                Table(1, 2, 0),
                ("STS/201[2-5].*.tsv",),
                {"dev": ("STS/2016.*.tsv",)},
                ours=True,
            ),
        ),
    ),
    "QQP": Task(
        _BINARY,
        ("accuracy", "f1"),
        (_official("QQP", Table("question1", "question2", "is_duplicate")),),
    ),
    "MNLI": Task(
        ("contradiction", "entailment", "neutral"),
        ("accuracy",),
        (_official("MNLI", Table(*_PAIR, "gold_label"), ("dev_matched", "dev_mismatched")),),
    ),
    "QNLI": Task(
        _ENTAILMENT,
        ("accuracy",),
        (_official("QNLI", Table("question", "sentence", "label")),),
    ),
    "RTE": Task(
        _ENTAILMENT,
        ("accuracy",),
        (
            _official("RTE", Table(*_PAIR, "label")),
            Layout(
                read_challenge,
                ("RTE/rte/rte[12]_*.xml", "RTE/rte/rte3_dev.xml"),
                {"dev": ("RTE/rte/rte3_test.xml",)},
                ours=True,
            ),
        ),
    ),
    "WNLI": Task(_BINARY, ("accuracy",), (_official("WNLI", Table(*_PAIR, "label")),)),
}


@dataclass(frozen=True)
class TaskData:
    """The examples of a task.

    Attributes:
        train: those to train on.
        dev: the sets to develop on, by name.
        unlabelled: how many rows were left out because they have no label.
        in_both: how many were left out of a split of ours because they are in a set to develop on.
        ours: whether the split is not GLUE's.
    """

    train: list[Example]
    dev: dict[str, list[Example]]
    unlabelled: int
    in_both: int
    ours: bool


def read_task(name: str, folder: Path, problems: Problems) -> TaskData:
    """Reads the data of a task.

    Args:
        name: one of TASKS.
        folder: in which there is a folder for each task.
        problems: what becomes of malformed rows.

    Raises:
        DataError: if the files are not there, or have no examples, or if malformed rows are
            refused.
    """
    task = TASKS[name]
    for layout in task.layouts:
        train = _files(folder, layout.train)
        dev = {part: _files(folder, patterns) for part, patterns in layout.dev.items()}
        if train and all(dev.values()):
            break
    else:
        ways = [(*layout.train, *sum(layout.dev.values(), ())) for layout in task.layouts]
        expected = " or ".join(", ".join(patterns) for patterns in ways)
        raise DataError(f"{folder} must have {expected} for {name}: get the files of GLUE.")
    known, unlabelled = _read(task, layout, train, problems)
    sets = {}
    for part, files in dev.items():
        sets[part], without = _read(task, layout, files, problems)
        unlabelled += without
    in_both = 0
    if layout.ours:
        developed = {example[:2] for examples in sets.values() for example in examples}
        kept = [example for example in known if example[:2] not in developed]
        known, in_both = kept, len(known) - len(kept)
    for examples in (known, *sets.values()):
        if not examples:
            raise DataError(f"{folder} must have labelled rows for {name}, found none in a file.")
    return TaskData(known, sets, unlabelled, in_both, layout.ours)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _read(
    task: Task, layout: Layout, files: list[Path], problems: Problems
) -> tuple[list[Example], int]:
    """The examples of files, and how many rows have no label."""
    examples, unlabelled = [], 0
    for path in files:
        for row in layout.read(path, problems):
            if not row.label:
                unlabelled += 1
            elif not row.first or row.second == "":
                problems.add(path, row.line, "expected a sentence, found an empty field")
            elif (label := _label(task, row.label)) is None:
                expected = " or ".join(task.labels) or f"a score from 0 to {HIGHEST:g}"
                problems.add(path, row.line, f"expected {expected}, found {row.label!r}")
            else:
                examples.append(Example(row.first, row.second, label))
    return examples, unlabelled


def _label(task: Task, label: str) -> float | None:
    if task.labels:
        return task.labels.index(label) if label in task.labels else None
    try:
        score = float(label)
    except ValueError:
        return None
    return score / HIGHEST if 0 <= score <= HIGHEST else None


def _correlation(of: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(truth: np.ndarray, found: np.ndarray) -> float:
        # That of constants is not defined: they say nothing of each other.
        constant = np.ptp(truth) == 0 or np.ptp(found) == 0
        return 0.0 if constant else float(of(truth, found))

    return correlation


def _f1(truth: np.ndarray, found: np.ndarray) -> float:
    """That of label 1; 0 if it neither is nor was found."""
    return sklearn.metrics.f1_score(truth, found) if np.any((truth == 1) | (found == 1)) else 0.0


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda truth, found: float(np.mean(truth == found)),
    "f1": lambda truth, found: float(_f1(truth, found)),
    "matthews": _correlation(sklearn.metrics.matthews_corrcoef),
    "pearson": _correlation(lambda *pair: scipy.stats.pearsonr(*pair)[0]),
    "spearman": _correlation(lambda *pair: scipy.stats.spearmanr(*pair)[0]),
}
"""Of the truth and what was found, labels or scores."""
