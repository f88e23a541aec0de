"""The results in the README are those of the JSON files."""

import json

from experiments import tables


def test_documents_are_up_to_date():
    texts = [document.read_text(encoding="utf-8") for document in tables.DOCUMENTS]
    assert sum(text.count("<!-- results: ") for text in texts) == len(tables.SECTIONS)
    for text in texts:
        assert tables.fill_in(text, tables.RESULTS) == text, "run python -m experiments.tables"


def test_fill_in_replaces_only_what_is_marked(tmp_path):
    rows = [
        {"attention": name, "length": 8, "median_seconds": seconds, "speed_up": speed_up}
        for name, seconds, speed_up in [("exact (JAX)", 0.003, 1.0), ("improved", 0.002, 1.5)]
    ]
    settings = dict.fromkeys(
        ("rounds", "batch", "heads", "head_dim", "clusters", "topk", "num_bits", "num_iterations"),
        7,
    )
    record = {"settings": settings, "device": "cpu", "versions": {"jax": "1"}, "rows": rows}
    (tmp_path / "scaling.json").write_text(json.dumps(record))

    text = "before\n<!-- results: scaling -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill_in(text, tmp_path)

    assert filled.startswith("before\n<!-- results: scaling -->\n| T | exact (JAX) | improved |")
    assert "| 8 | 3.0 | 2.0 | 1.5× |" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- end -->\nafter\n")
    assert tables.fill_in(filled, tmp_path) == filled


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
