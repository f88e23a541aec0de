"""The figures of text on numbers checked by hand, and all of it on a tiny random model."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

for package in ("matplotlib", "rich", "sklearn", "tokenizers", "tyro"):
    pytest.importorskip(package)

from rich.console import Console

from clustax.models import Bert, BertConfig
from experiments.common import text
from experiments.common.journal import Journal
from experiments.common.timing import Times
from experiments.swap import shared
from experiments.swap import text as task
from experiments.swap.shared import CLUSTERED, DEFAULT, PAPER, Variant

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=512,
)


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, rng.integers(3, 17)).tolist() for _ in range(count)]


def test_read_documents(tmp_path):
    path = tmp_path / "table.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\n\nx\tone two three\ny\tone two\n")
    assert text.read_documents(path, 2) == [("x", "one two three")]
    path.write_text("Category\tText\nd\tstring\nclass\t\nx\tone\nbroken\n")
    with pytest.raises(text.DocumentsError, match="line 5: expected label and text"):
        text.read_documents(path, 0)


def test_read_reviews(tmp_path):
    """Each text once, without tags, of IMDB alone, and only long ones."""
    path = tmp_path / "reviews.csv"
    rows = [
        "text,label,source",
        '"one, two<br /><br />three",0,imdb',
        '"one, two<br /><br />three",0,imdb',
        "one two,1,imdb",
        '"one ""two""\nthree",1,imdb',
        "one two three four,1,rotten_tomatoes",
    ]
    path.write_text("\n".join(rows))
    assert text.read_reviews(path, 2) == [("0", "one, two  three"), ("1", 'one "two"\nthree')]
    path.write_text("text,label\none,0\n")
    with pytest.raises(text.DocumentsError, match=r"expected the columns text, label and source"):
        text.read_reviews(path, 0)


def test_reviews_are_split(monkeypatch, tmp_path):
    path = tmp_path / "reviews.csv"
    lines = [f"{'word ' * 251}{number},{number % 2},imdb\n" for number in range(40)]
    path.write_text("text,label,source\n" + "".join(lines))
    monkeypatch.setattr(task, "extract", lambda *_: (path,))
    settings = task.Settings(corpus="imdb", training_documents=25, documents=15)
    train, test = task.fetch_documents(settings)
    assert (len(train), len(test)) == (25, 15)
    assert len({document.text for document in train + test}) == 40
    assert task.fetch_documents(settings) == (train, test)
    other = task.Settings(corpus="imdb", training_documents=25, documents=15, seed=1)
    assert task.fetch_documents(other)[1] != test


def test_choose():
    everything = [text.Document(str(i), "") for i in range(30)]
    chosen = text.choose(everything, 20, seed=1)
    assert len(set(chosen)) == 20
    assert chosen == text.choose(everything, 20, seed=1)
    assert chosen != text.choose(everything, 20, seed=2)
    with pytest.raises(text.DocumentsError, match="there are 30 long documents, not 31"):
        text.choose(everything, 31, seed=0)


def test_make_batches():
    batches = text.make_batches([[1] * 5, [2] * 2, [3] * 9, [4], [5] * 4], 2, 10)
    assert [batch.rows.tolist() for batch in batches] == [[3, 1], [4, 0], [2, 2]]
    assert [batch.tokens.shape for batch in batches] == [(2, 10)] * 3
    assert [batch.lengths.tolist() for batch in batches] == [[1, 2], [4, 5], [9, 9]]
    assert batches[0].tokens.tolist() == [[4] + [0] * 9, [2, 2] + [0] * 8]


def test_cosine_and_embed():
    x = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    y = np.array([[3.0, 4.0], [0.0, 2.0], [-5.0, 0.0]])
    np.testing.assert_allclose(shared.cosine(x, y), [1, 0, -1])
    np.testing.assert_allclose(shared.cosine(x[0], np.array([4.0, 3.0])), 24 / 25)
    hidden = np.array([[[6.0, 0.0], [0.0, 8.0], [np.nan, 9.0]]])
    np.testing.assert_allclose(task.embed(hidden, np.array([2])), [[0.6, 0.8]])


@pytest.mark.once
def test_encode_all(tmp_path):
    """Embeddings are those of each document on its own, in the documents' order."""
    exact = Bert(CONFIG, rngs=nnx.Rngs(0))
    near = exact.with_attention(shared.variant(DEFAULT, 4, 512, 0).attention)
    far = exact.with_attention(shared.variant(CLUSTERED, 1, 32, 0).attention)
    token_ids = documents(5)
    journal = Journal(tmp_path / "journal", {})

    results = task.encode_all(
        [exact, near, far], task.Split([], token_ids, []), "test", 2, journal, Console(quiet=True)
    )

    assert list(journal.finished) == ["test 0", "test 1", "test 2"]
    for row, ids in enumerate(token_ids):
        hidden = exact(jnp.asarray([ids]), jnp.asarray([len(ids)]))
        mean = np.asarray(hidden[0].mean(0))
        np.testing.assert_allclose(
            results[0].embeddings[row], mean / np.linalg.norm(mean), atol=1e-5
        )
    np.testing.assert_allclose(results[0].cosines, 1, atol=1e-6)
    np.testing.assert_allclose(results[1].cosines, 1, atol=1e-5)  # topk >= length is exact.
    np.testing.assert_allclose(results[1].embeddings, results[0].embeddings, atol=1e-5)
    assert results[2].cosines.max() < 1 - 1e-4
    assert all(result.seconds.median > 0 for result in results)


class Probe:
    """Labels an embedding by the sign of its first number."""

    def predict(self, embeddings):
        return np.where(embeddings[:, 0] > 0, "x", "y")


def test_score():
    exact = task.Encoding(
        np.array([[1.0, 0], [-1, 0], [0.6, 0.8], [1, 0]]), np.ones(4), Times((1.0,))
    )
    swapped = task.Encoding(
        np.array([[1.0, 0], [1, 0], [0.6, -0.8], [0.6, 0.8]]),
        np.array([0.5, 1.0, 1.0, 1.0]),
        Times((0.4, 0.1, 0.2, 0.3, 0.5)),
    )
    counts, labels = np.array([30, 10, 10, 10]), ["x", "x", "y", "x"]
    variant = shared.variant(PAPER, 7, 5, 0)
    row = task.score(variant, [swapped], exact, counts, Probe(), labels)
    assert row[:3] == (PAPER, 7, 5)
    np.testing.assert_allclose(row.token_cosine, 0.75)  # Weighted by tokens, not by documents.
    np.testing.assert_allclose(row.document_cosine, (1 - 1 - 0.28 + 0.6) / 4)
    assert (row.accuracy, row.equal_labels) == (0.75, 0.75)
    np.testing.assert_allclose((row.seconds, *row.seconds_quartiles), (0.3, 0.2, 0.4))
    same = task.score(Variant("exact"), [exact], exact, counts, Probe(), labels)
    np.testing.assert_allclose((same.token_cosine, *same[5:8]), (1, 1, 0.5, 1))
    both = task.score(variant, [swapped, exact], exact, counts, Probe(), labels)
    np.testing.assert_allclose(both.token_cosines, (0.75, 1))
    np.testing.assert_allclose(both.document_cosine, (row.document_cosine + 1) / 2)
    assert (both.token_cosine, both.accuracy, both.equal_labels) == (0.875, 0.625, 0.875)
    assert both.seconds == 0.35  # of all six


def test_train_probe():
    rng = np.random.default_rng(0)
    labels = np.repeat(["x", "y"], 20)
    embeddings = rng.normal(0, 0.1, (40, 3)) + np.where(labels == "x", 1, -1)[:, None]
    assert (task.train_probe(embeddings, labels).predict(embeddings) == labels).all()


def test_attention_maps():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 9, 1, 4))
    maps = task.attention_maps(
        query,
        key,
        {
            "all keys": shared.variant(PAPER, 2, 9, 0).attention,
            "one cluster": shared.variant(CLUSTERED, 1, 9, 0).attention,
        },
    )
    q, k = np.asarray(query, np.float64)[0, :, 0], np.asarray(key, np.float64)[0, :, 0]
    weights = np.exp(q @ k.T / 2)
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(maps["exact"], weights, atol=1e-6)
    np.testing.assert_allclose(maps["all keys"], weights, atol=1e-5)
    centroid = np.exp(q.mean(0) @ k.T / 2)
    expected = np.broadcast_to(centroid / centroid.sum(), (9, 9))
    np.testing.assert_allclose(maps["one cluster"], expected, atol=1e-5)


@pytest.fixture
def tiny(monkeypatch):
    """Puts a random model and random documents in the place of the real ones."""

    def fetch(settings):
        token_ids = documents(12)
        words = [[f"w{i}" for i in ids] for ids in token_ids]
        split = task.Split(["x", "y", "z"] * 4, token_ids, words)
        return Bert(CONFIG, rngs=nnx.Rngs(0)), split, split

    monkeypatch.setattr(task, "fetch", fetch)
    monkeypatch.setattr(task, "MAX_TOKENS", 16)
    # Two methods are enough here; most of the time is compilation.
    monkeypatch.setattr(task, "COMPARED", task.PICTURED)
    monkeypatch.setattr(task, "PICTURED_LAYER", 0)


@pytest.mark.once
def test_run(tiny, tmp_path, monkeypatch):
    """All of it, in two runs of which the first is killed."""
    settings = task.Settings(
        documents=12, clusters=(2, 16), topk=3, seeds=2, output=tmp_path / "a" / "swap"
    )
    console = Console(record=True, width=80)
    encode, calls = task.encode, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 16:  # While the test documents are encoded.
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(task, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        task.run(settings, Console(quiet=True))
    task.run(settings, console)

    assert "Going on after 3 batches" in console.export_text(clear=False)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["swap.json", "swap.png"]
    assert (tmp_path / "a" / "swap.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "a" / "swap.json").read_text()
    assert str(tmp_path) not in written
    record = json.loads(written)
    assert record["settings"]["clusters"] == [2, 16]
    scores = record["scores"]
    assert [(row["attention"], row["num_clusters"]) for row in scores] == [
        ("exact", None),
        *((name, count) for name in task.COMPARED for count in (2, 16)),
    ]
    # As many clusters as tokens: all methods are exact.
    for row in scores:
        if row["num_clusters"] != 2:
            assert row["token_cosine"] == pytest.approx(1, abs=1e-5)
            assert row["equal_labels"] == 1
        else:
            assert row["token_cosine"] < 1 - 1e-5
    printed = console.export_text()
    for row in scores:
        pattern = rf"{re.escape(row['attention'])} +│ +{row['num_clusters'] or ''} +│"
        pattern += rf" +{row['token_cosine']:.3f}"
        assert re.search(pattern, printed), pattern


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": 0}, "documents must be at least 1, got 0"),
        ({"training_documents": 19}, "training_documents must be at least 20, got 19"),
        ({"topk": -1}, "topk must be at least 0, got -1"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"clusters": (25, 0)}, r"clusters must .* got \(25, 0\)"),
    ],
)
def test_settings_that_cannot_be_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        task.Settings(**arguments)
