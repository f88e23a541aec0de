"""The results in the documents are those of the JSON files."""

import dataclasses
import json

from clustax import ClusteredAttention
from experiments import tables


def test_documents_are_up_to_date():
    texts = [document.read_text(encoding="utf-8") for document in tables.DOCUMENTS]
    assert sum(text.count("<!-- results: ") for text in texts) == len(tables.SECTIONS)
    for text in texts:
        assert tables.fill_in(text, tables.RESULTS) == text, "run python -m experiments.tables"


SCALING = {
    "settings": dict.fromkeys(
        ("rounds", "batch", "heads", "head_dim", "clusters", "topk", "num_bits", "num_iterations"),
        2,
    )
    | {"measures": "attention", "passes": ["forward"], "dtype": "float32"},
    "device": "cpu",
    "versions": {"jax": "1"},
    "rows": [
        {
            "attention": name,
            "measured": "forward",
            "length": length,
            "median_seconds": seconds,
            "speed_up": speed_up,
            "peak_bytes": peak_bytes,
        }
        for name, length, seconds, speed_up, peak_bytes in [
            ("exact (JAX)", 8, 0.003, 1.0, 64_000),
            ("improved", 8, 0.002, 1.5, 32_000),
            ("improved", 16, 0.004, None, None),
        ]
    ],
    "crossovers": {"forward": {"clustered": None, "improved": 8.4}},
    "acceptance": [
        {"what": "faster", "length": "8", "asked": "≥ 2", "reached": 1.5, "is_met": False}
    ],
}


def test_fill_in_replaces_only_what_is_marked(tmp_path):
    (tmp_path / "scaling.json").write_text(json.dumps(SCALING))

    text = "before\n<!-- results: scaling -->\nstale\n<!-- end -->\nafter\n"
    filled = tables.fill_in(text, tmp_path)

    assert filled.startswith("before\n<!-- results: scaling -->\nMilliseconds, forward:\n")
    assert "| T | exact (JAX) | improved | faster by |" in filled
    assert "| 8 | 3.0 | 2.0 | 1.5× |" in filled
    assert "stale" not in filled
    assert filled.endswith("<!-- end -->\nafter\n")
    assert tables.fill_in(filled, tmp_path) == filled


def test_scaling_tables_have_memory_and_what_was_not_reached():
    lines = tables.scaling(SCALING).splitlines()
    assert "| 16 |  | 4.0 |  |" in lines
    assert "| 8 | 4.00 | 2.00 |" in lines
    assert "Ahead of the fastest exact attention: improved from T = 8 on (forward)." in lines
    assert "| faster | 8 | ≥ 2 | 1.50 | **no** |" in lines


def test_breakdown_table_has_every_stage_with_its_floor():
    def part(stage, length, seconds, floor, bound):
        return {
            "stage": stage,
            "length": length,
            "seconds": seconds,
            "floor_seconds": floor,
            "bound": bound,
        }

    record = {
        "settings": {
            "heads": 6,
            "head_dim": 64,
            "clusters": 100,
            "topk": 32,
            "attention": "paper",
            "rounds": 3,
        },
        "device": "cpu",
        "versions": {"jax": "1"},
        "rates_per_second": {
            "multiply_adds": 2e11,
            "exponentials": 6.5e9,
            "compared_words": 6e10,
            "moved_bytes": 3e10,
        },
        "parts": [
            part("hash", 8, 0.002, 0.001, "products"),
            part("hash", 16, 0.004, 0.002, "products"),
            part("rest", 8, 0.001, 0.0, ""),
            part("rest", 16, 0.003, 0.0, ""),
        ],
        "wholes": [
            {"length": n, "median_seconds": s, "profiled_seconds": p}
            for n, s, p in [(8, 0.0029, 0.003), (16, 0.0071, 0.007)]
        ],
    }
    assert tables.breakdown(record).splitlines()[:7] == [
        "| forward | T = 8 | T = 16 | bound by |",
        "| --- | ---: | ---: | ---: |",
        "| hash | 2.0 / 1.0 | 4.0 / 2.0 | products |",
        "| rest | 1.0 / 0.0 | 3.0 / 0.0 |  |",
        "| all, with the profiler | 3.0 | 7.0 |  |",
        "| all, without it | 2.9 | 7.1 |  |",
        "| floor of all | 1.0 | 2.0 |  |",
    ]


def test_speech_table_shows_where_clustered_attention_loses():
    row = {
        "attention": "improved (paper)",
        "num_clusters": 100,
        "topk": 32,
        "word_error_rate": 1.234,
        "difference": 1.1845,
        "difference_interval": [-0.012, 2.5],
        "equal_texts": 0.125,
        "endless": 3,
        "encoder_cosine": 0.8625,
        "encoder_seconds": 0.25,
        "decoder_seconds": 0.47,
    }
    exact = row | {"attention": "exact", "num_clusters": None, "topk": None}
    record = {
        "settings": {"model": "base", "clips": "asterisk", "batch_size": 8},
        "num_clips": 200,
        "minutes": 8.04,
        "device": "cpu",
        "versions": {"jax": "1"},
        "scores": [exact, row],
    }
    table = tables.swap_speech(record).splitlines()
    assert table[2].startswith("| exact |  |  | 123.4% |")
    assert table[3] == (
        "| improved (paper) | 100 | 32 | 123.4% | +118.5 (-1.2, +250.0) | 12.5% | 3 | 0.863 | 250 "
        "| 470 |"
    )
    assert table[-1].startswith("Whisper base, 200 clips (asterisk) of 8.0 minutes; medians")


def test_pareto_tables_list_the_frontier_and_mark_what_is_not_on_it():
    exact = {
        "source": "random",
        "attention": "exact",
        "num_clusters": None,
        "topk": None,
        "num_subclusters": None,
        "error": 0.0,
        "cosine": 1.0,
        "seconds": 0.08,
        "operations": 288_000_000,
        "frontiers": [],
        "listed": False,
    }
    slow = exact | {"attention": "slow", "num_clusters": 100, "seconds": 0.05, "listed": True}
    fast = slow | {"attention": "fast", "topk": 32, "error": 0.1234, "seconds": 0.0212}
    rows = [exact, slow, fast | {"frontiers": ["seconds"]}, exact | {"source": "minilm"}]
    record = {
        "settings": {"documents": 3, "rounds": 2},
        "layers": {"random": [0]},
        "shapes": {"random": [1, 1500, 6, 64]},
        "device": "cpu",
        "versions": {"jax": "1"},
        "rows": rows,
    }
    table = tables.pareto(record).splitlines()
    assert table[0] == "random, T = 1500, 6 heads of 64:"
    assert table[4:6] == [
        "| fast | 100 | 32 |  | 0.123 | 1.0000 | 21.2 | 80.0 | 288.0 |",
        "| slow * | 100 |  |  | 0.000 | 1.0000 | 50.0 | 80.0 | 288.0 |",
    ]
    assert len(table) == 8


def test_copy_task_table_has_the_means_and_marks_what_is_solved():
    cells = [("full", None, 0.996), ("lsh", 2, 0.25), ("lsh", 2, 0.5)]
    names = ("method", "size", "accuracy")
    record = {
        "settings": {
            "lengths": [64],
            "seeds": [0, 1],
            "evaluated": 1024,
            "model": {"layers": 1, "heads": 2, "head_dim": 32},
            "attentions": {"topk": 32, "num_bits": 32},
            "optimisation": {"steps": 600, "batch_size": 16},
        },
        "cells": [dict(zip(names, cell, strict=True)) | {"length": 64} for cell in cells],
        "commits": ["0123456789abcdef"],
        "device": "cpu",
        "versions": {"jax": "1"},
    }
    table = tables.copy_task(record).splitlines()
    assert table[0] == "| attention | N = 64 |"
    assert table[2:4] == ["| full | **99.6%** |", "| lsh-2 | 37.5% |"]
    assert "commit 012345678." in table[-1]


def test_glue_tables_have_all_texts_and_those_that_are_changed():
    row = {
        "set": "dev",
        "attention": "improved (paper)",
        "num_clusters": 25,
        "topk": 32,
        "examples": 800,
        "scores": {"accuracy": 0.8125, "f1": 0.5},
        "difference": -0.0125,
        "difference_interval": [-0.03, 0.001],
        "approximated": 70,
        "difference_of_approximated": -0.14,
        "interval_of_approximated": [-0.2, -0.1],
    }
    exact = row | {"attention": "exact", "num_clusters": None, "approximated": 0}
    data = {"train": 9, "mean_tokens": {"dev": 40.4}, "own_split": True}
    models = [
        {"task": task, "trained_with": "exact", "data": data, "rows": [exact, row]}
        for task in ("MRPC", "RTE")
    ]
    models[0] = models[0] | {"rows": [exact]}  # The other has not been run.
    record = {
        "models": models,
        "left": ["x"],
        "published": [
            {"attention": "exact", "num_clusters": None, "scores": {"MRPC": 0.9, "RTE": 0.7}}
        ],
        "settings": {"topk": 32, "seeds": [0], "tuning": {"epochs": 3.0, "max_tokens": 99}},
        "pretrained": {"name": "MiniLM"},
        "device": "cpu",
        "versions": {"jax": "1"},
    }
    lines = tables.glue(record).splitlines()
    assert lines[0] == "| trained with | attention | C | MRPC, accuracy | RTE, accuracy |"
    assert lines[2] == "| exact | exact |  | 81.2% | 81.2% |"
    assert lines[3] == "| exact | improved (paper) | 25 |  | 81.2% (-3.0, +0.1) |"
    assert lines[4] == "| RoBERTa, published | exact |  | 90.0% | 70.0% |"
    assert "| exact | improved (paper) | 25 |  | -14.0 (-20.0, -10.0) of 70 |" in lines
    assert "RTE: 9 to train on, 800 of 40 tokens on average to score, not the" in lines[-1]
    assert lines[-1].endswith("jax 1; not run yet: x.")
    models.append(models[1] | {"rows": [exact, row | {"scores": {"accuracy": 0.8}}]})
    assert "| exact | improved (paper) | 25 |  | 80.6% |" in tables.glue(record)


def test_squad_table():
    row = {
        "attention": "improved (default)",
        "num_clusters": 25,
        "topk": 32,
        "exact_match": 0.1,
        "f1": 0.25,
        "difference": 0.0015,
        "difference_interval": [-0.01, 0.02],
        "equal_answers": 0.9,
    }
    data = {"questions": 600, "contexts": 120, "windows": 617, "mean_tokens": 178.4}
    record = {
        "rows": [row],
        "left": [],
        "published": [{"attention": "exact", "num_clusters": None, "f1": 0.904}],
        "data": data | {"trained_on": [400, 401]},
        "settings": {"tuning": {"epochs": 4.0}},
        "pretrained": {"name": "MiniLM"},
        "device": "cpu",
        "versions": {"jax": "1"},
    }
    lines = tables.squad(record).splitlines()
    assert lines[2] == (
        "| improved (default) | 25 | 32 | 10.0% | 25.0% | +0.1 (-1.0, +2.0) | 90.0% |"
    )
    assert lines[3] == "| RoBERTa, exact, published |  |  |  | 90.4% |  |  |"
    assert lines[-1].startswith("MiniLM, trained on 400 and 401 questions for 4 epochs; 600 quest")


def test_default_of_then_is_named_where_it_is_another():
    now = dataclasses.asdict(ClusteredAttention(num_clusters=25))
    paper = dataclasses.asdict(ClusteredAttention.paper())
    record = {
        "attentions": {
            "improved (default), C=25, k=32": now,
            "improved (default, num_iterations=1), C=25, k=32": now | {"num_iterations": 1},
            "improved (paper), C=100, k=32": paper,
        }
    }
    assert tables.earlier_default(record) == tables.earlier_default({}) == ""
    record["attentions"]["improved (default), C=25, k=32"] = now | {"num_iterations": 5}
    assert tables.earlier_default(record) == " The default of then: num_iterations=5."
