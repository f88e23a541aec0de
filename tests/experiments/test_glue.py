"""GLUE: its files and metrics, batches of fine-tuning, and what a run writes."""
# ruff: noqa: E402  What the extra `experiments` brings may be missing.

import dataclasses
import json

import pytest

for package in ("matplotlib", "optax", "orbax.checkpoint", "rich", "tensorboardX", "tyro"):
    pytest.importorskip(package)
for package in ("safetensors", "scipy", "sklearn", "tokenizers"):
    pytest.importorskip(package)

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import sklearn.metrics
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clustax.models import Bert, BertForSequenceClassification
from experiments import glue
from experiments.common import finetuning, training
from experiments.common.encoding import encode
from experiments.common.finetuning import FineTuning, Inputs
from experiments.common.rows import DataError, Problems
from experiments.glue import Cell, Settings
from experiments.swap import shared
from experiments.swap.shared import DEFAULT, EXACT, PAPER, Variant
from experiments.tasks.glue import METRICS, TASKS, Example, read_task
from tests.experiments.tiny import tiny_folder, write

HEADERS = {
    "SST-2": "sentence\tlabel\n",
    "STS-B": "index\tgenre\tsentence1\tsentence2\tscore\n",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
    "MNLI": "index\tsentence1\tsentence2\tlabel1\tgold_label\n",
    "QNLI": "index\tquestion\tsentence\tlabel\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n",
    "WNLI": "index\tsentence1\tsentence2\tlabel\n",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
}
ROWS = {
    "CoLA": ("gj04\t1\t\tone two\n", Example("one two", None, 1)),
    "SST-2": ('a "good one \t1\n', Example('a "good one', None, 1)),
    "MRPC": ("1\t7\t8\tone\ttwo\r\n", Example("one", "two", 1)),
    "STS-B": ("0\tnews\tone\ttwo\t4.000\n", Example("one", "two", 0.8)),
    "QQP": ("1\t2\t3\tone?\ttwo?\t0\n", Example("one?", "two?", 0)),
    "MNLI": ("0\tone\ttwo\tneutral\tentailment\n", Example("one", "two", 1)),
    "QNLI": ("0\tone?\ttwo\tnot_entailment\n", Example("one?", "two", 1)),
    "RTE": ("0\tone\ttwo\tentailment\n", Example("one", "two", 0)),
    "WNLI": ("0\tone\ttwo\t1\n", Example("one", "two", 1)),
}


def official(folder, name, rows):
    dev = ("dev_matched", "dev_mismatched") if name == "MNLI" else ("dev",)
    for part in ("train", *dev):
        write(folder / name / f"{part}.tsv", HEADERS.get(name, "") + rows)


@pytest.mark.parametrize("name", TASKS)
def test_official_files(tmp_path, name):
    row, example = ROWS[name]
    official(tmp_path, name, row + row)
    data = read_task(name, tmp_path, Problems())
    assert data.train == [example, example]
    assert list(data.dev.values()) == [[example, example]] * (2 if name == "MNLI" else 1)
    assert (data.unlabelled, data.in_both, data.ours) == (0, 0, False)


def test_mrpc_with_a_mark_of_byte_order_and_another_name(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / f"MRPC/{name}.tsv", "\ufeff" + HEADERS["MRPC"] + f"0\t1\t2\t{name}\tb\n")
    data = read_task("MRPC", tmp_path, Problems())
    assert data.train == [Example("train", "b", 0)]
    assert (data.dev, data.ours) == ({"dev": [Example("val", "b", 0)]}, True)


def test_sts_of_semeval(tmp_path):
    """Scores may be missing, and a pair that is in the last year is not trained on."""
    write(tmp_path / "STS/2012.x.train.tsv", "5\tone\ttwo\n\tno\tscore\n1.5\tthree\tfour\n")
    write(tmp_path / "STS/2016.x.test.tsv", "0\tone\ttwo\n")
    data = read_task("STS-B", tmp_path, Problems())
    assert data.train == [Example("three", "four", 0.3)]
    assert data.dev == {"dev": [Example("one", "two", 0.0)]}
    assert (data.unlabelled, data.in_both, data.ours) == (1, 1, True)


def challenge(*pairs):
    return '<?xml version="1.0"?>\n<entailment-corpus>\n' + "".join(pairs) + "</entailment-corpus>"


def pair(label, first="one &amp; two", second="two"):
    return f'<pair id="1" {label}>\n\t<t>{first}</t>\n\t<h>{second}</h>\n</pair>\n'


def test_challenges_of_rte(tmp_path):
    folder = tmp_path / "RTE/rte"
    write(folder / "rte1_dev.xml", challenge(pair('value="TRUE"'), pair('value="FALSE"')))
    write(folder / "rte2_dev.xml", challenge(pair('entailment="NO"')))
    write(folder / "rte3_test.xml", challenge(pair('entailment="YES"', first="three")))
    data = read_task("RTE", tmp_path, Problems())
    assert data.train == [Example("one & two", "two", label) for label in (0, 1, 1)]
    assert data.dev == {"dev": [Example("three", "two", 0)]}

    broken = challenge(pair('value="TRUE"'), "<pair id='2'>\n<t>x</t></pair>", pair('value="?"'))
    write(folder / "rte1_dev.xml", broken)
    problems = Problems("skip")
    assert len(read_task("RTE", tmp_path, problems).train) == 2
    path = folder / "rte1_dev.xml"
    assert problems.found == [
        f"{path}, line 7: expected a pair with label, t and h, found t",
        f"{path}, line 8: expected entailment or not_entailment, found '?'",
    ]
    write(path, "<a>\n<b>")
    with pytest.raises(DataError, match=r"rte1_dev.xml, line 2: expected XML, but"):
        read_task("RTE", tmp_path, Problems("skip"))


MALFORMED = {
    "one field\n": "expected 2 fields, found 1",
    "a\tb\tc\n": "expected 2 fields, found 3",
    "good\t2\n": "expected 0 or 1, found '2'",
    " \t1\n": "expected a sentence, found an empty field",
}


@pytest.mark.parametrize("row", MALFORMED)
def test_malformed_rows_are_refused_or_skipped(tmp_path, row):
    official(tmp_path, "SST-2", "good\t1\n")
    path = tmp_path / "SST-2" / "train.tsv"
    write(path, f"{HEADERS['SST-2']}good\t1\n{row}bad\t0\n")
    message = f"{path}, line 3: {MALFORMED[row]}"
    with pytest.raises(DataError) as error:
        read_task("SST-2", tmp_path, Problems("refuse"))
    assert str(error.value).startswith(f"{message}. Correct it, or leave out such rows with")
    problems = Problems("skip")
    data = read_task("SST-2", tmp_path, problems)
    assert [example.label for example in data.train] == [1, 0]
    assert problems.found == [message]


def test_malformed_bytes_scores_and_headers(tmp_path):
    official(tmp_path, "STS-B", "0\tnews\tone\ttwo\t5.1\n1\tnews\tone\ttwo\tx\n2\tn\ta\tb\t5\n")
    problems = Problems("skip")
    assert len(read_task("STS-B", tmp_path, problems).train) == 1
    assert [line.split(": ")[1] for line in problems.found[:2]] == [
        "expected a score from 0 to 5, found '5.1'",
        "expected a score from 0 to 5, found 'x'",
    ]
    path = tmp_path / "SST-2" / "train.tsv"
    official(tmp_path, "SST-2", "good\t1\n")
    path.write_bytes(b"sentence\tlabel\n\xff\t1\nfine\t0\n")
    problems = Problems("skip")
    assert read_task("SST-2", tmp_path, problems).train == [Example("fine", None, 0)]
    assert problems.found == [f"{path}, line 2: expected UTF-8, but invalid start byte"]
    write(path, "text\tlabel\nx\t1\n")
    with pytest.raises(DataError, match="line 1: expected a header with sentence, found text"):
        read_task("SST-2", tmp_path, problems)
    write(path, "sentence\tlabel\nx\t\n")
    with pytest.raises(DataError, match="must have labelled rows for SST-2, found none"):
        read_task("SST-2", tmp_path, problems)
    with pytest.raises(DataError, match=r"MRPC/dev.tsv or .*MRPC/val.tsv for MRPC: get the files"):
        read_task("MRPC", tmp_path, problems)


labels = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=20)
numbers = st.lists(st.tuples(*[st.integers(0, 20)] * 2), min_size=3, max_size=20)


@given(labels)
def test_metrics_of_labels(pairs):
    truth, found = np.array(pairs).T
    assert METRICS["accuracy"](truth, found) == sklearn.metrics.accuracy_score(truth, found)
    constant = np.ptp(truth) == 0 or np.ptp(found) == 0
    expected = 0 if constant else sklearn.metrics.matthews_corrcoef(truth, found)
    assert METRICS["matthews"](truth, found) == expected
    expected = sklearn.metrics.f1_score(truth, found, zero_division=0.0)
    assert METRICS["f1"](truth, found) == expected


@given(numbers)
def test_metrics_of_scores(pairs):
    truth, found = np.array(pairs, float).T
    for name, of in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        constant = np.ptp(truth) == 0 or np.ptp(found) == 0
        assert METRICS[name](truth, found) == (0 if constant else of(truth, found)[0])


def test_metrics_by_hand():
    truth, found = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    assert METRICS["accuracy"](truth, found) == pytest.approx(3 / 5)
    assert METRICS["f1"](truth, found) == pytest.approx(2 * 2 / (3 + 3))
    assert METRICS["matthews"](truth, found) == pytest.approx((2 * 1 - 1 * 1) / 6)
    assert METRICS["matthews"](truth, np.ones(5, int)) == 0
    assert METRICS["spearman"](truth[:3] * [1, 2, 3], np.array([1, 5, 6])) == 1
    assert METRICS["pearson"](np.array([0, 1, 2]), np.array([0, 0, 3])) == pytest.approx(0.75**0.5)


sequences = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def make_inputs(lengths):
    tokens = [[row + 1] * length for row, length in enumerate(lengths)]
    targets = {"label": np.arange(len(lengths), dtype=np.float32)}
    return Inputs(tokens, [[0] * len(ids) for ids in tokens], targets)


@given(sequences, st.integers(1, 8), st.integers(0, 3))
def test_an_epoch_has_each_text_once_but_for_a_remainder(lengths, batch_size, seed):
    inputs = make_inputs(lengths)
    count = max(1, len(lengths) // batch_size)

    def epoch(number):
        steps = range(number * count, (number + 1) * count)
        make = finetuning.training_batch
        return [make(inputs, batch_size, (8, 16, 30), seed, step) for step in steps]

    batches = epoch(1)
    rows = np.concatenate([batch["label"] for batch in batches])
    counts = np.bincount(rows.astype(int), minlength=len(lengths))
    repeats = -(-batch_size // len(lengths)) if len(lengths) < batch_size else 1
    assert counts.sum() == count * batch_size
    assert counts.max() <= repeats
    for batch, again in zip(batches, epoch(1), strict=True):
        assert batch["tokens"].shape[1] in (8, 16, 30)
        assert batch["tokens"].tobytes() == again["tokens"].tobytes()
        for index, row in enumerate(batch["label"].astype(int)):
            assert batch["lengths"][index] == lengths[row]
            assert batch["tokens"][index].tolist()[: lengths[row]] == [row + 1] * lengths[row]
            assert not batch["tokens"][index, lengths[row] :].any()


@given(sequences, st.integers(1, 8))
def test_evaluation_has_each_text(lengths, batch_size):
    inputs = make_inputs(lengths)
    seen = set()
    for rows, batch in finetuning.evaluation_batches(inputs, batch_size, (8, 16, 30)):
        assert batch["tokens"].shape == (batch_size, batch["tokens"].shape[1])
        assert (
            finetuning.padded_length(max(batch["lengths"]), (8, 16, 30))
            == (batch["tokens"].shape[1])
        )
        np.testing.assert_array_equal(batch["label"], rows)
        seen |= set(rows.tolist())
    assert seen == set(range(len(lengths)))


def test_steps_of_fine_tuning():
    lengths = np.full(1000, 7)
    tuning = FineTuning(epochs=2, batch_size=10, warmup=0.1, evaluations=3)
    found = tuning.optimisation(lengths)
    assert (found.steps, found.warmup_steps, found.schedule) == (200, 20, "cosine")
    assert (found.checkpoint_every, found.log_every) == (66, 22)
    assert dataclasses.replace(tuning, max_tokens=3500).optimisation(lengths).steps == 50
    assert dataclasses.replace(tuning, max_tokens=35_000).optimisation(lengths).steps == 200
    assert FineTuning(epochs=0.1).optimisation(lengths[:3]).steps == 1
    for wrong in ({"epochs": 0}, {"warmup": 1.0}, {"max_tokens": 0}, {"evaluations": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            FineTuning(**wrong)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data_folder(tmp_path):
    """Sentences with "good" are 1, others 0; scores are 5 where both sentences are the same."""
    rows = ["a good one\t1\n", "no the one\t0\n", "the good two three\t1\n", "one three\t0\n"]
    official(tmp_path / "data", "SST-2", "".join(rows))
    rows = ["0\tn\tgood\tgood\t5\n", "1\tn\ta good\tno\t0\n", "2\tn\tone two\tone no\t2.5\n"]
    official(tmp_path / "data", "STS-B", "".join(rows))
    return tmp_path / "data"


def settings_of(model_folder, data_folder, **others):
    values = {
        "data": data_folder,
        "model": model_folder,
        "tasks": ("SST-2", "STS-B"),
        "clusters": (2, 3),
        "topk": 2,
        "trained_clusters": 2,
        "seeds": (0,),
        "max_length": 12,
        "buckets": (6, 12),
        "tuning": FineTuning(epochs=2, batch_size=2, evaluations=2, learning_rate=1e-3),
        "output": data_folder.parent / "out",
    }
    return Settings(**{**values, **others})


def test_tokens_of_pairs(model_folder):
    source = finetuning.pretrained(model_folder)
    found = glue.tokenize(source, [Example("a good", "one two", 0.5), Example("no", None, 1)], 6)
    words = [source.tokenizer.id_to_token(token) for token in found.tokens[0]]
    assert words == ["[CLS]", "a", "[SEP]", "one", "two", "[SEP]"] or words == [
        "[CLS]", "a", "good", "[SEP]", "one", "[SEP]"
    ]  # fmt: skip
    assert len(found.tokens[1]) == 3
    assert found.token_types[0] == [int(at > words.index("[SEP]")) for at in range(6)]
    assert found.targets["label"].tolist() == [0.5, 1]


def test_predictions_are_those_of_each_text_alone(model_folder, data_folder):
    source = finetuning.pretrained(model_folder)
    settings = settings_of(model_folder, data_folder)
    examples = [Example("a good one two three", "no", 0), Example("no", None, 1)]
    inputs = glue.tokenize(source, examples, 12)
    model = BertForSequenceClassification(
        source.encoder(Variant(EXACT), 0), num_labels=2, rngs=nnx.Rngs(1)
    )
    found = glue.predict(model, inputs, settings)
    for row, (ids, types) in enumerate(zip(inputs.tokens, inputs.token_types, strict=True)):
        alone = model(jnp.array([ids]), jnp.array([len(ids)]), jnp.array([types]))
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
    hidden = encode(model.bert, jnp.array([inputs.tokens[1]]), jnp.array([3]))
    np.testing.assert_allclose(model.classify(hidden)[0], found[1], atol=1e-5)


@pytest.mark.once
def test_frozen_encoders_are_not_trained(model_folder):
    source = finetuning.pretrained(model_folder)
    model = BertForSequenceClassification(
        source.encoder(Variant(EXACT), 0), num_labels=2, rngs=nnx.Rngs(1)
    )
    tokens, lengths = jnp.ones((2, 5), int), jnp.array([5, 3])
    before = model(tokens, lengths)
    finetuning.freeze(model.bert)
    trained = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert trained == {"pooler", "classifier"}
    np.testing.assert_array_equal(model(tokens, lengths), before)


def test_what_is_approximated():
    lengths = np.array([5, 25, 26, 32, 33, 60])

    def found(name, count):
        return glue.approximated(shared.variant(name, count, 32, 0), lengths).tolist()

    assert not glue.approximated(Variant(EXACT), lengths).any()
    assert found(shared.CLUSTERED, 25) == [False, False, True, True, True, True]
    assert found(PAPER, 25) == [False] * 4 + [True] * 2  # All keys are among the 32.
    assert found(DEFAULT, 50) == [False] * 5 + [True]


def test_rows_of_results():
    inputs = make_inputs([3, 40, 50, 60])
    inputs.targets["label"] = np.array([0, 1, 1, 0], np.float32)
    exact = np.array([[1, 0], [0, 1], [0, 1], [0, 1.0]])
    ours = exact.copy()
    ours[1:3] = [[2, 0], [0, 2]]
    row = glue.score("SST-2", shared.variant(PAPER, 25, 32, 0), inputs, ours, exact, 0)
    assert row["scores"] == {"accuracy": 0.5}
    assert (row["difference"], row["equal_labels"], row["approximated"]) == (-0.25, 0.75, 3)
    low, high = row["difference_interval"]
    assert -0.75 <= low < -0.25
    assert high == 0
    assert row["largest_change_of_others"] == 0
    np.testing.assert_allclose(row["score_of_approximated"], 1 / 3)
    np.testing.assert_allclose(row["difference_of_approximated"], -1 / 3)
    same = glue.score("SST-2", Variant(EXACT), inputs, exact, exact, 0)
    assert (same["difference"], same["difference_interval"]) == (0, (0, 0))
    assert "score_of_approximated" not in same


@pytest.mark.once
def test_run_writes_its_results_and_goes_on(model_folder, data_folder, monkeypatch):
    settings = settings_of(model_folder, data_folder)
    settings = dataclasses.replace(settings, clusters=(2,), buckets=(12,), reverse_tasks=("STS-B",))
    monkeypatch.setattr(glue, "RESAMPLES", 50)  # or they would take a third of the time
    predict, calls = glue.predict, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 5:  # After two scores of checkpoints and two attentions.
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(glue, "predict", killed)
    with pytest.raises(KeyboardInterrupt):
        glue.run(settings, Console(quiet=True))
    console = Console(record=True, width=140)
    glue.run(settings, console)
    assert "improved (default)" in console.export_text()
    written = (settings.output / "results.json").read_text()
    assert str(data_folder.parent) not in written
    record = json.loads(written)
    assert [(m["task"], m["trained_with"]) for m in record["models"]] == [
        ("SST-2", EXACT),
        ("STS-B", EXACT),
        ("STS-B", DEFAULT),
    ]
    assert record["left"] == []
    for model in record["models"]:
        rows = model["rows"]
        assert [row["num_clusters"] for row in rows] == [None, 2, 2, 2]
        assert rows[0]["difference"] == 0
        assert [point["step"] for point in model["curve"] if "score" in point]
        best = max(point["score"] for point in model["curve"] if "score" in point)
        own = rows[0 if model["trained_with"] == EXACT else 1]
        metric = TASKS[model["task"]].metrics[0]
        assert own["scores"][metric] == pytest.approx(best)
    assert (settings.output / "results.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trained again"))
    glue.run(settings, Console(quiet=True))
    assert json.loads((settings.output / "results.json").read_text()) == record
    other = dataclasses.replace(settings, tuning=FineTuning())
    with pytest.raises(training.TrainingError, match=r"other settings \(tuning\)"):
        glue.run(other, Console(quiet=True))


def test_grid_begins_with_exact_attention_of_the_first_seed():
    settings = Settings(data=None, tasks=("RTE", "CoLA"), seeds=(3, 4))
    assert glue.cells(settings)[:3] == [
        Cell("RTE", EXACT, 3),
        Cell("CoLA", EXACT, 3),
        Cell("RTE", DEFAULT, 3),
    ]
    assert len({cell.name for cell in glue.cells(settings)}) == 8
    fewer = dataclasses.replace(settings, reverse_tasks=("CoLA",))
    reverse = {cell.task for cell in glue.cells(fewer) if cell.trained_with != EXACT}
    assert reverse == {"CoLA"}
    assert len(glue.cells(fewer)) == 6
    assert glue.trained_variant(settings, Cell("RTE", DEFAULT, 4)).attention.seed == 4
    assert glue.trained_variant(settings, Cell("RTE", DEFAULT, 4)).num_clusters == 25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("SST",)}, r"tasks must be of CoLA, .* got \['SST'\]"),
        ({"tasks": ()}, "tasks must be different ones, at least one"),
        ({"reverse_tasks": ("SST",)}, r"reverse_tasks must be of CoLA, .* got \['SST'\]"),
        ({"trained_with": ("x",)}, "trained_with must be of exact"),
        ({"clusters": (0,)}, "clusters must be at least 1"),
        ({"buckets": (32, 64)}, "buckets must ascend to at least max_length = 128"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(data=None, **settings)


def test_published_figures():
    exact, improved, clustered = (row["scores"] for row in glue.PUBLISHED)
    assert (exact["CoLA"], improved["RTE"], clustered["MRPC"]) == (0.601, 0.704, 0.436)
    assert exact.keys() == set(TASKS)


@pytest.mark.once
def test_scores_choose_the_best_model(model_folder, tmp_path):
    """The model that is returned is that of the highest score, also after a kill."""
    source = finetuning.pretrained(model_folder)
    inputs = make_inputs([3, 4, 5, 6])
    inputs.targets["label"][:] = [0, 1, 0, 1]

    def run(folder, scores):
        model = BertForSequenceClassification(
            source.encoder(Variant(EXACT), 0), num_labels=2, rngs=nnx.Rngs(0)
        )
        seen = []

        def score(trained):
            if len(seen) == len(scores):
                raise KeyboardInterrupt
            seen.append(np.asarray(trained.classifier.kernel[...]))
            return scores[len(seen) - 1]

        tuning = FineTuning(epochs=4, batch_size=2, evaluations=4, learning_rate=0.01)
        with training.progress_bar(Console(quiet=True)) as progress:
            found, log = finetuning.fine_tune(
                model, lambda m, b: glue.classification_loss("SST-2", m, b), inputs, tuning, (6,),
                0, folder, progress, "", score,
            )  # fmt: skip
        assert isinstance(found.bert, Bert)
        return np.asarray(found.classifier.kernel[...]), seen, log

    best, seen, log = run(tmp_path / "whole", [0.1, 0.5, 0.5, 0.2])
    np.testing.assert_array_equal(best, seen[1])
    assert np.abs(best - seen[3]).max() > 0
    assert [row["score"] for row in log] == [0.1, 0.5, 0.5, 0.2]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", [0.1, 0.5])
    again, later, _ = run(tmp_path / "killed", [0.5, 0.2])
    np.testing.assert_array_equal(again, best)
    assert len(later) == 2
    jax.clear_caches()
