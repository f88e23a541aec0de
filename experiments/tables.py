"""Writes the results in experiments/results into the documents, so that no figure is typed.

python -m experiments.tables
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clustax import ClusteredAttention
from experiments.aot.tables import aot
from experiments.common.markdown import markdown_table
from experiments.speech.decoding import Errors

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("kernels.md", "performance.md")),
)
RESULTS = ROOT / "experiments" / "results"


def points(share: float, interval: Sequence[float]) -> str:
    """A difference in points, and its interval."""
    low, high = interval
    return f"{100 * share:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})"


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
            f"{row['token_cosine']:.3f}" + _spread(row["token_cosines"]),
            f"{row['document_cosine']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{row['equal_labels']:.1%}",
            f"{1000 * row['seconds']:.0f}",
        )
        for row in record["scores"]
    ]
    settings = record["settings"]
    seeds = (
        "" if settings["seeds"] == 1 else f"means of {settings['seeds']} seeds, least and most; "
    )
    caption = (
        f"{settings['documents']} documents of {record['mean_tokens']:.0f} tokens on average; "
        f"k = {settings['topk']}; {seeds}medians on {record['device']}, "
        f"jax {record['versions']['jax']}."
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


def _spread(values: Sequence[float]) -> str:
    """The least and the most of several values."""
    return f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""


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
        rows.append(
            (
                row["attention"],
                *("" if row[size] is None else str(row[size]) for size in ("num_clusters", "topk")),
                f"{row['word_error_rate']:.1%}",
                points(row["difference"], row["difference_interval"]),
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
    """The tables of experiments.scaling: times of each pass, memory, and what was asked for."""
    settings = record["settings"]
    parts = []
    for measured in settings["passes"]:
        mine = [row for row in record["rows"] if row["measured"] == measured]
        names = list(dict.fromkeys(row["attention"] for row in mine))
        by_length: dict[int, dict[str, Any]] = {}
        for row in mine:
            by_length.setdefault(row["length"], {})[row["attention"]] = row
        times, memory = [], []
        for length, found in by_length.items():
            cells = [
                f"{1000 * found[n]['median_seconds']:.1f}" if n in found else "" for n in names
            ]
            ratio = found["improved"]["speed_up"] if "improved" in found else None
            times.append((str(length), *cells, f"{ratio:.1f}×" if ratio else ""))
            taken = [found[n]["peak_bytes"] if n in found else None for n in names]
            if any(taken):
                positions = length * settings["batch"]
                cells = [f"{each / positions / 1000:.2f}" if each else "" for each in taken]
                memory.append((str(length), *cells))
        parts.append(f"Milliseconds, {measured}:")
        parts.append(markdown_table(("T", *names, "faster by"), times))
        if memory:
            parts.append(f"Memory, kB for each position, {measured}:")
            parts.append(markdown_table(("T", *names), memory))
    ahead = [
        f"{name} from T = {length:.0f} on ({measured})"
        for measured, found in record["crossovers"].items()
        for name, length in found.items()
        if length
    ]
    if ahead:
        parts.append(f"Ahead of the fastest exact attention: {', '.join(ahead)}.")
    if record["acceptance"]:
        asked = [
            (
                each["what"],
                each["length"],
                each["asked"],
                f"{each['reached']:.2f}",
                "yes" if each["is_met"] else "**no**",
            )
            for each in record["acceptance"]
        ]
        parts.append("What was asked for, and what was reached:")
        parts.append(markdown_table(("", "T", "asked", "reached", "met"), asked))
    parts.append(
        f"Of the {settings['measures']}: medians of up to {settings['rounds']} runs that take "
        f"turns, fewer where a run takes long; {settings['batch']} × {settings['heads']} heads × "
        f"{settings['head_dim']}, {settings['dtype']}, C = {settings['clusters']}, "
        f"k = {settings['topk']}, {settings['num_bits']} bits, "
        f"{settings['num_iterations']} iterations; on {record['device']}, "
        f"jax {record['versions']['jax']}"
        + (f", torch {record['versions']['torch']}" if "torch" in record["versions"] else "")
        + ". Last column of times: improved against the fastest exact one. Memory: the most that a "
        "process holds more while it runs."
    )
    return "\n\n".join(parts)


def breakdown(record: Mapping[str, Any]) -> str:
    """The table of experiments.breakdown: the time of each stage, and its floor."""
    settings, wholes = record["settings"], record["wholes"]
    stages: dict[str, list[Any]] = {}
    for part in record["parts"]:
        stages.setdefault(part["stage"], []).append(part)
    rows = [
        (
            stage,
            *(f"{1000 * x['seconds']:.1f} / {1000 * x['floor_seconds']:.1f}" for x in found),
            found[-1]["bound"],
        )
        for stage, found in stages.items()
    ]
    columns = zip(*stages.values(), strict=True)
    floors = [sum(part["floor_seconds"] for part in column) for column in columns]
    for name, seconds in (
        ("all, with the profiler", [whole["profiled_seconds"] for whole in wholes]),
        ("all, without it", [whole["median_seconds"] for whole in wholes]),
        ("floor of all", floors),
    ):
        rows.append((name, *(f"{1000 * each:.1f}" for each in seconds), ""))
    header = ("forward", *(f"T = {whole['length']}" for whole in wholes), "bound by")
    rates = record["rates_per_second"]
    caption = (
        f"Milliseconds / the least possible; 1 × {settings['heads']} heads × "
        f"{settings['head_dim']}, float32, C = {settings['clusters']}, k = {settings['topk']}, "
        f"settings: {settings['attention']}; medians of {settings['rounds']} runs on "
        f"{record['device']}, jax {record['versions']['jax']}. In a second this machine does "
        f"{2 * rates['multiply_adds'] / 1e9:.0f} G operations of products, "
        f"{rates['exponentials'] / 1e9:.1f} G exponentials, compares "
        f"{rates['compared_words'] / 1e9:.0f} G words of codes, and moves "
        f"{rates['moved_bytes'] / 1e9:.0f} GB."
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


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


def asr_ctc(record: Mapping[str, Any]) -> str:
    """The tables of experiments.asr_ctc: errors and times, and what other attentions make of it."""

    def percent(errors: Mapping[str, int]) -> str:
        return f"{100 * Errors(**errors).rate:.1f}"

    models, data = record["models"], record["data"]
    sets = list(models[0]["errors"])
    has_long = "long" in models[0]["times"]
    tested = next(iter(models[0]["beam"]))
    header = (
        "trained with",
        "layers",
        *sets,
        f"{tested}, beam",
        f"{tested}, points to full (95 %)",
        "s for an epoch",
        "min to best",
        "ms, forward",
        *(["s, long, forward and backward"] if has_long else []),
    )
    rows = []
    for model in models:
        times = model["times"]
        rows.append(
            (
                model["attention"],
                str(model["layers"]),
                *(percent(model["errors"][name]) for name in sets),
                percent(model["beam"][tested]),
                points(model["difference"], model["difference_interval"])
                if "difference" in model
                else "",
                f"{model['seconds_per_epoch']:.0f}",
                f"{model['seconds_to_best'] / 60:.1f}",
                f"{1000 * times['forward'] / times['forward_batch']:.0f}",
                *([f"{times['long']:.1f}"] if has_long else []),
            )
        )
    shown = [model for model in models if model["layers"] == record["settings"]["model"]["layers"]]
    swaps = [
        (name, *(f"{100 * model['swaps'][name]:.1f}" for model in shown))
        for name in shown[0]["swaps"]
    ]
    size, how, times = (
        record["settings"]["model"],
        record["settings"]["optimisation"],
        models[0]["times"],
    )
    long = f", of the long one {times['long_frames']}" if has_long else ""
    caption = (
        f"Phone errors, %. {data['train']['hours']:.1f} hours to train on, "
        f"{data['train']['mean_frames']:.0f} frames on average; {size['heads']} heads × "
        f"{size['head_dim']}, {how['steps']} steps, k = "
        f"{record['settings']['attentions']['topk']}. Epochs and minutes are steps, each of the "
        "time that one took when all models were timed in turn; times forward are of an "
        f"utterance of {times['forward_frames']} frames{long}; on {record['device']}, jax "
        f"{record['versions']['jax']}, commit "
        f"{', '.join(commit[:9] for commit in record['commits'])}."
    )
    return "\n\n".join(
        (
            markdown_table(header, rows),
            caption,
            "Phone errors on valid, %, of models trained with one attention (columns) and "
            "evaluated with another (rows):",
            markdown_table(("", *(model["attention"] for model in shown)), swaps),
        )
    )


def glue(record: Mapping[str, Any]) -> str:
    """The tables of experiments.glue: all texts, and those that are long enough to be changed."""
    found: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    tasks: dict[str, Mapping[str, Any]] = {}
    for model in record["models"]:
        for row in model["rows"]:
            task = model["task"] if row["set"] == "dev" else f"{model['task']} {row['set']}"
            tasks[task] = {**row, "data": model["data"], "about": model["task"]}
            key = (model["trained_with"], row["attention"], str(row["num_clusters"] or ""))
            found.setdefault(key, {}).setdefault(task, []).append(row)
    whole, part = [], []
    for key, by_task in found.items():
        cells, changed = [], []
        for task in tasks:
            rows = by_task.get(task, [])
            cells.append(_score(rows))
            changed.append(_change(rows))
        whole.append((*key, *cells))
        if any(changed):
            part.append((*key, *changed))
    for row in record["published"]:
        cells = [f"{row['scores'][each['about']]:.1%}" for each in tasks.values()]
        size = str(row["num_clusters"] or "")
        whole.append(("RoBERTa, published", row["attention"], size, *cells))
    header = ("trained with", "attention", "C")
    metrics = [f"{task}, {next(iter(row['scores']))}" for task, row in tasks.items()]
    data = "; ".join(
        f"{task}: {row['data']['train']} to train on, {row['examples']} of "
        f"{row['data']['mean_tokens'][row['set']]:.0f} tokens on average to score"
        f"{', not the split of GLUE' if row['data']['own_split'] else ''}"
        for task, row in tasks.items()
    )
    settings = record["settings"]
    how = settings["tuning"]
    most = f", but {how['max_tokens']} tokens at the most" if how["max_tokens"] else ""
    caption = (
        f"{record['pretrained']['name']}, k = {settings['topk']}, {how['epochs']:g} epochs{most}; "
        f"seeds {settings['seeds']}; in brackets the points to exact attention, 95 % interval. "
        f"{data}. On {record['device']}, jax "
        f"{record['versions']['jax']}{_left(record)}."
    )
    return "\n\n".join(
        (
            markdown_table((*header, *metrics), whole),
            "Only the texts with more tokens than both C and k, as shorter ones are exact by "
            "design; points to exact attention:",
            markdown_table((*header, *tasks), part),
            caption,
        )
    )


def _score(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean score over the seeds; of a single one with the interval of the points to exact."""
    if not rows:
        return ""
    mean = sum(next(iter(row["scores"].values())) for row in rows) / len(rows)
    if len(rows) > 1 or rows[0]["num_clusters"] is None:
        return f"{mean:.1%}"
    low, high = (100 * end for end in rows[0]["difference_interval"])
    return f"{mean:.1%} ({low:+.1f}, {high:+.1f})"


def _change(rows: Sequence[Mapping[str, Any]]) -> str:
    """The points to exact attention where a text is changed, of the first seed, and how many."""
    if not rows or not rows[0]["approximated"]:
        return ""
    row = rows[0]
    change = points(row["difference_of_approximated"], row["interval_of_approximated"])
    return f"{change} of {row['approximated']}"


def _left(record: Mapping[str, Any]) -> str:
    """What is missing in results that were written before all was done."""
    return f"; not run yet: {', '.join(record['left'])}" if record["left"] else ""


def squad(record: Mapping[str, Any]) -> str:
    """The table of experiments.squad."""
    header = ("attention", "C", "k", "EM", "F1", "points of F1 to exact (95 %)", "equal answers")
    rows = [
        (
            row["attention"],
            *("" if row[size] is None else str(row[size]) for size in ("num_clusters", "topk")),
            f"{row['exact_match']:.1%}",
            f"{row['f1']:.1%}",
            points(row["difference"], row["difference_interval"]),
            f"{row['equal_answers']:.1%}",
        )
        for row in record["rows"]
    ]
    for row in record["published"]:
        size = str(row["num_clusters"] or "")
        name = f"RoBERTa, {row['attention']}, published"
        rows.append((name, size, "", "", f"{row['f1']:.1%}", "", ""))
    data, how = record["data"], record["settings"]["tuning"]
    trained = " and ".join(map(str, data["trained_on"]))
    caption = (
        f"{record['pretrained']['name']}, trained on {trained} questions for {how['epochs']:g} "
        f"epochs; {data['questions']} questions on {data['contexts']} contexts, "
        f"{data['windows']} windows of {data['mean_tokens']:.0f} tokens on average. On "
        f"{record['device']}, jax {record['versions']['jax']}{_left(record)}."
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


def accelerator(record: Mapping[str, Any]) -> str:
    """The tables of experiments.accelerator: errors, and one for each pass."""
    header = ("relative error of", "output", "gradient of query", "of key", "of value")
    errors = [
        (check["attention"], *(f"{x:.1e}" for x in (check["output"], *check["gradients"])))
        for check in record["checks"]
    ]
    parts = [markdown_table(header, errors)]
    for measured in dict.fromkeys(row["measured"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["measured"] == measured]
        lengths = sorted({row["length"] for row in rows})
        medians = {(row["attention"], row["length"]): row for row in rows}

        def cell(row: Mapping[str, Any]) -> str:
            seconds, exact = row["median_seconds"], row["fastest_exact_seconds"]
            faster = f" ({exact / seconds:.2g}×)" if exact and exact != seconds else ""
            return f"{1000 * seconds:.2f}{faster}"

        table = [
            (name, *(cell(medians[name, length]) for length in lengths))
            for name in dict.fromkeys(row["attention"] for row in rows)
        ]
        parts.append(markdown_table((measured, *map(str, lengths)), table))
    settings, jax = record["settings"], record["versions"]["jax"]
    parts.append(
        f"Milliseconds (and how many times faster than exact attention) of {settings['batch']} × "
        f"{settings['heads']} heads × {settings['head_dim']}, bfloat16, "
        f"C = {settings['clusters']}, k = {settings['topk']}; medians on {record['device']}, "
        f"jax {jax}."
    )
    return "\n\n".join(parts)


SECTIONS = {
    "accelerator/h200": accelerator,
    "aot/jax-0.10": aot,
    "aot/jax-0.12": aot,
    "asr_ctc/results": asr_ctc,
    "breakdown": breakdown,
    "copy_task/results": copy_task,
    "glue/results": glue,
    "glue_reverse/results": glue,
    "pareto": pareto,
    "pretrained_swap_text": swap_text,
    "pretrained_swap_text_imdb": swap_text,
    "pretrained_swap_speech": swap_speech,
    "pretrained_swap_speech_base": swap_speech,
    "pretrained_swap_speech_clips": swap_speech,
    "scaling": scaling,
    "scaling_layer": scaling,
    "squad/results": squad,
}


def earlier_default(record: Mapping[str, Any]) -> str:
    """What the default had been when results were made, where it has changed since."""
    now = asdict(ClusteredAttention())
    changed = {
        f"{name}={value!r}"
        for label, settings in record.get("attentions", {}).items()
        if label.startswith("improved (default), ")
        for name, value in settings.items()
        if name not in ("num_clusters", "topk") and value != now[name]
    }
    return f" The default of then: {', '.join(sorted(changed))}." if changed else ""


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
        section = SECTIONS[match[2]](record) + earlier_default(record)
        return f"{match[1]}\n{section}\n{match[3]}"

    return re.sub(r"(<!-- results: ([\w/.-]+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    """The command line."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(fill_in(text, RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
