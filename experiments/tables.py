"""Writes the results in experiments/results into the documents, so that no figure there is typed.

python -m experiments.tables
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.aot.tables import aot
from experiments.common.markdown import markdown_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "kernels.md")
RESULTS = ROOT / "experiments" / "results"


def swap_text(record: Mapping[str, Any]) -> str:
    """The table of experiments.pretrained_swap text."""
    header = (
        "attention",
        "C",
        "token cosine",
        "document cosine",
        "accuracy",
        "equal labels",
        "ms per document",
    )
    rows = [
        (
            row["attention"],
            str(row["num_clusters"] or ""),
            f"{row['token_cosine']:.3f}",
            f"{row['document_cosine']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{row['equal_labels']:.1%}",
            f"{1000 * row['seconds']:.0f}",
        )
        for row in record["scores"]
    ]
    settings = record["settings"]
    caption = (
        f"{settings['documents']} documents of {record['mean_tokens']:.0f} tokens on average; "
        f"k = {settings['topk']}; medians on {record['device']}, jax {record['versions']['jax']}."
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


def swap_speech(record: Mapping[str, Any]) -> str:
    """The table of experiments.pretrained_swap speech."""
    header = (
        "attention",
        "C",
        "k",
        "word errors",
        "more than exact, points (95 % interval)",
        "equal texts",
        "endless",
        "encoder cosine",
        "encoder ms",
        "decoder ms",
    )
    rows = []
    for row in record["scores"]:
        low, high = (100 * end for end in row["difference_interval"])
        rows.append(
            (
                row["attention"],
                *("" if row[size] is None else str(row[size]) for size in ("num_clusters", "topk")),
                f"{row['word_error_rate']:.1%}",
                f"{100 * row['difference']:+.1f} ({low:+.1f}, {high:+.1f})",
                f"{row['equal_texts']:.1%}",
                str(row["endless"]),
                f"{row['encoder_cosine']:.3f}",
                f"{1000 * row['encoder_seconds']:.0f}",
                f"{1000 * row['decoder_seconds']:.0f}",
            )
        )
    settings = record["settings"]
    caption = (
        f"Whisper {settings['model']}, {record['num_clips']} clips ({settings['clips']}) of "
        f"{record['minutes']:.1f} minutes; medians for a clip, in batches of "
        f"{settings['batch_size']}, on {record['device']}, jax {record['versions']['jax']}."
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


def scaling(record: Mapping[str, Any]) -> str:
    """The table of experiments.scaling."""
    names = list(dict.fromkeys(row["attention"] for row in record["rows"]))
    by_length: dict[int, dict[str, Any]] = {}
    for row in record["rows"]:
        by_length.setdefault(row["length"], {})[row["attention"]] = row
    rows = []
    for length, found in by_length.items():
        times = [f"{1000 * found[n]['median_seconds']:.1f}" if n in found else "" for n in names]
        ratio = found["improved"]["speed_up"]
        rows.append((str(length), *times, f"{ratio:.1f}×" if ratio else ""))
    settings = record["settings"]
    caption = (
        f"Milliseconds (medians of {settings['rounds']} runs that take turns), "
        f"{settings['batch']} × {settings['heads']} heads × {settings['head_dim']}, float32, "
        f"C = {settings['clusters']}, k = {settings['topk']}, {settings['num_bits']} bits, "
        f"{settings['num_iterations']} iterations; on {record['device']}, "
        f"jax {record['versions']['jax']}. Last column: improved against the fastest exact one."
    )
    return f"{markdown_table(('T', *names, 'faster by'), rows)}\n\n{caption}"


def pareto(record: Mapping[str, Any]) -> str:
    """The tables of experiments.pareto, one a source."""
    sizes = ("num_clusters", "topk", "num_subclusters")
    header = ("attention", "C", "k", "R", "error", "cosine", "ms", "ms of exact", "Mops")
    parts = []
    for source, (_, length, heads, head_dim) in record["shapes"].items():
        found = [row for row in record["rows"] if row["source"] == source]
        exact = next(row for row in found if row["attention"] == "exact")
        rows = [
            (
                f"{row['attention']}{'' if 'seconds' in row['frontiers'] else ' *'}",
                *("" if row[size] is None else str(row[size]) for size in sizes),
                f"{row['error']:.3f}",
                f"{row['cosine']:.4f}",
                f"{1000 * row['seconds']:.1f}",
                f"{1000 * exact['seconds']:.1f}",
                f"{row['operations'] / 1e6:.1f}",
            )
            for row in sorted(found, key=lambda row: row["seconds"])
            if row["listed"]
        ]
        title = f"{source}, T = {length}, {heads} heads of {head_dim}:"
        parts.append(f"{title}\n\n{markdown_table(header, rows)}")
    settings, layers = record["settings"], record["layers"]
    where = "; ".join(
        f"{source}: {settings['documents']} × {len(layers[source])} layers" for source in layers
    )
    caption = (
        f"Means over {where}; medians for a layer of one batch entry, of {settings['rounds']} runs "
        f"on each, on {record['device']}, jax {record['versions']['jax']}."
    )
    return "\n\n".join([*parts, caption])


def copy_task(record: Mapping[str, Any]) -> str:
    """The table of experiments.copy_task: means over seeds, bold where the task is solved."""
    found: dict[str, dict[int, list[float]]] = {}
    for cell in record["cells"]:
        name = cell["method"] if cell["size"] is None else f"{cell['method']}-{cell['size']}"
        found.setdefault(name, {}).setdefault(cell["length"], []).append(cell["accuracy"])
    settings = record["settings"]
    rows = []
    for name, by_length in found.items():
        means = [sum(by_length[n]) / len(by_length[n]) for n in settings["lengths"]]
        rows.append((name, *(f"**{x:.1%}**" if x >= 0.99 else f"{x:.1%}" for x in means)))
    header = ("attention", *(f"N = {length}" for length in settings["lengths"]))
    model, common, how = (settings[name] for name in ("model", "attentions", "optimisation"))
    caption = (
        f"Accuracy at masked symbols of {settings['evaluated']} new sequences; bold: solved "
        f"(99 %); guessing gives 10 %. {model['layers']} layer(s) of {model['heads']} heads × "
        f"{model['head_dim']}, {how['steps']} steps of {how['batch_size']} sequences, k = "
        f"{common['topk']}, {common['num_bits']} bits; seeds {settings['seeds']}; on "
        f"{record['device']}, jax {record['versions']['jax']}, commit "
        f"{', '.join(commit[:9] for commit in record['commits'])}."
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


SECTIONS = {
    "aot/jax-0.10": aot,
    "copy_task/results": copy_task,
    "pareto": pareto,
    "pretrained_swap_text": swap_text,
    "pretrained_swap_text_imdb": swap_text,
    "pretrained_swap_speech": swap_speech,
    "pretrained_swap_speech_base": swap_speech,
    "pretrained_swap_speech_clips": swap_speech,
    "scaling": scaling,
}


def fill_in(text: str, results: Path) -> str:
    """Replaces what stands between `<!-- results: NAME -->` and `<!-- end -->`.

    Args:
        text: of a document.
        results: the folder of NAME.json.

    Raises:
        KeyError: if NAME is not one of the experiments.
    """

    def fill(match: re.Match[str]) -> str:
        record = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{SECTIONS[match[2]](record)}\n{match[3]}"

    return re.sub(r"(<!-- results: ([\w/.-]+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    """The command line."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(fill_in(text, RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
