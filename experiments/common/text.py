"""Labelled documents, and their tokens in batches of one shape."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DocumentsError(ValueError):
    """The documents are not as expected; the message says what to do."""


class Document(NamedTuple):
    """A text and its class."""

    label: str
    text: str


class Batch(NamedTuple):
    """Padded sequences of tokens; `rows` says which documents they are."""

    rows: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray


def read_documents(path: Path, min_words: int) -> list[Document]:
    """Reads the documents of more than `min_words` words from a table of label and text.

    Args:
        path: tab-separated; the three lines of the header are skipped.
        min_words: shorter documents, and this length, are left out.

    Raises:
        DocumentsError: if the file is not such a table; the message names the line.
    """
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if number <= 3 or not line.strip():
                continue
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2:
                raise DocumentsError(
                    f"{path}, line {number}: expected label and text with a tab between them, "
                    f"found {len(fields)} fields. Delete the file to have it unpacked again."
                )
            documents.append(Document(*fields))
    return [document for document in documents if len(document.text.split()) > min_words]


def read_reviews(path: Path, min_words: int) -> list[Document]:
    """Reads IMDB's reviews of more than `min_words` words, each text once.

    Args:
        path: comma-separated, with the columns text, label and source.
        min_words: shorter reviews, and this length, are left out.

    Raises:
        DocumentsError: if the file is not such a table.
    """
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if table.fieldnames != ["text", "label", "source"]:
            raise DocumentsError(
                f"{path}: expected the columns text, label and source, found {table.fieldnames}. "
                "Delete the file to have it unpacked again."
            )
        labels = {
            row["text"].replace("<br />", " "): row["label"]
            for row in table
            if row["source"] == "imdb"
        }
    return [
        Document(label, text) for text, label in labels.items() if len(text.split()) > min_words
    ]


def choose(documents: Sequence[Document], count: int, seed: int) -> list[Document]:
    """Draws documents without replacement.

    Args:
        documents: what to draw from.
        count: how many.
        seed: the same seed draws the same documents.

    Raises:
        DocumentsError: if there are not that many.
    """
    if count > len(documents):
        raise DocumentsError(
            f"there are {len(documents)} long documents, not {count}: ask for fewer."
        )
    rows = np.random.default_rng(seed).choice(len(documents), count, replace=False)
    return [documents[row] for row in rows]


def make_batches(
    token_ids: Sequence[Sequence[int]], batch_size: int, padded_length: int
) -> list[Batch]:
    """Batches sequences of about the same length, all padded to one shape.

    A last batch that is not full repeats sequences, so that it has the shape of the others.

    Args:
        token_ids: one sequence a document, none longer than `padded_length`.
        batch_size: sequences in a batch.
        padded_length: the length of all batches.
    """
    by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
    batches = []
    for start in range(0, len(by_length), batch_size):
        rows = np.resize(by_length[start : start + batch_size], batch_size)
        lengths = np.array([len(token_ids[row]) for row in rows], np.int32)
        tokens = np.zeros((batch_size, padded_length), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : lengths[index]] = token_ids[row]
        batches.append(Batch(rows, tokens, lengths))
    return batches
