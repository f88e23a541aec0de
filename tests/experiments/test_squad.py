"""SQuAD: its files, windows and offsets, spans, the official scores, and what a run writes."""
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
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clustax.models import BertForQuestionAnswering
from experiments import squad as script
from experiments.common import finetuning, training
from experiments.common.finetuning import FineTuning
from experiments.common.rows import DataError, Problems
from experiments.swap.shared import DEFAULT, EXACT, PAPER, Variant
from experiments.tasks import squad
from experiments.tasks.squad import Answer, Question, Span, Window
from tests.experiments.tiny import tiny_folder, tiny_tokenizer, write


def entry(name, text="two", start=4, **others):
    return {
        "id": name,
        "question": "what is?",
        "answers": [{"text": text, "answer_start": start}],
    } | others


def content(*entries, context="one two three", title="A"):
    return {"data": [{"title": title, "paragraphs": [{"context": context, "qas": list(entries)}]}]}


def read(path, problems=None):
    return squad.read_squad(path, Problems() if problems is None else problems)


def test_files_of_both_versions(tmp_path):
    path = tmp_path / "squad.json"
    without = {"id": "y", "question": " who? ", "is_impossible": True, "answers": []}
    write(path, json.dumps(content(entry("x", is_impossible=False), without)))
    assert read(path) == [
        Question("x", "A", "one two three", "what is?", (Answer("two", 4),)),
        Question("y", "A", "one two three", "who?", ()),
    ]
    write(path, json.dumps(content(entry("x", text=" two ", start=3))))
    assert read(path)[0].answers == (Answer("two", 4),)


MALFORMED = {
    "expected 'two' at character 5, found 'wo '": entry("bad", start=5),
    "expected 'two' at character -9, found 'two'": entry("bad", start=-9),
    "expected answers, or is_impossible, found neither": entry("bad", answers=[]),
    "expected answers with text and answer_start, found {'text': 'x'}": entry(
        "bad", answers=[{"text": "x"}]
    ),
    "expected ids that differ, found this one again": entry("x"),
    "expected a question with question, found ' '": entry("bad", question=" "),
    "expected a question with id, found None": entry(None, question="who?"),
}


@pytest.mark.once
@pytest.mark.parametrize("problem", MALFORMED)
def test_malformed_questions_are_refused_or_skipped(tmp_path, problem):
    path = tmp_path / "squad.json"
    bad = MALFORMED[problem]
    write(path, json.dumps(content(entry("x"), bad, entry("z")), indent=1))
    with pytest.raises(DataError, match="or leave out such rows with --malformed skip"):
        read(path)
    problems = Problems("skip")
    assert [question.id for question in read(path, problems)] == ["x", "z"]
    (found,) = problems.found
    assert found.endswith(problem)
    lines = path.read_text().splitlines()
    line = int(found.split("line ")[1].split(":")[0])
    assert json.dumps(bad["id"] or bad["question"]) in lines[line - 1]


def test_files_that_are_no_squad(tmp_path):
    path = tmp_path / "squad.json"
    write(path, '{"data": [\n}')
    with pytest.raises(DataError, match=r"squad.json, line 2: expected JSON, but"):
        read(path)
    write(path, '{"data": [{"paragraphs": [{"qas": [{}]}]}]}')
    with pytest.raises(DataError, match=r"must have data, paragraphs, .*KeyError 'context'"):
        read(path)
    write(path, '{"data": []}')
    with pytest.raises(DataError, match="must have questions, found none"):
        read(path)


TOKENIZER = tiny_tokenizer()
words = st.text("abcdegnortuw é.,\n", min_size=1, max_size=150).filter(str.strip)


@pytest.mark.once
@given(words, st.data(), st.integers(0, 12))
def test_every_answer_is_found_in_its_window(context, data, overlap):
    """Windows cover the context, and an answer that fits into the overlap is in one of them."""
    places = [at for at, letter in enumerate(context) if not letter.isspace()]
    start, last = sorted(data.draw(st.tuples(*[st.sampled_from(places)] * 2)))
    answer = Answer(context[start : last + 1], start)
    windows = squad.make_windows(TOKENIZER, [("what is?", context)], 24, overlap, 6)
    covered, found = set(), []
    for window in windows:
        assert len(window.tokens) == len(window.token_types) == len(window.offsets) <= 24
        part = [where for where in window.offsets if where]
        covered |= {at for where in part for at in range(*where)}
        assert [TOKENIZER.id_to_token(i) for i in window.tokens[:3]] == ["[CLS]", "what", "is"]
        for token, where in zip(window.tokens, window.offsets, strict=True):
            if where:
                piece = context[slice(*where)]
                assert TOKENIZER.id_to_token(token).removeprefix("##") in (piece, "[UNK]")
        if tokens := squad.find_answer(window, answer):
            text = context[window.offsets[tokens[0]][0] : window.offsets[tokens[1]][1]]
            assert answer.text in text
            assert len(text.split()) == len(answer.text.split())
            found.append(window)
    assert set(places) <= covered
    TOKENIZER.no_truncation()
    offsets = TOKENIZER.encode(context, add_special_tokens=False).offsets
    size = sum(begin <= last and end > start for begin, end in offsets)
    assert found or size > overlap


def test_windows_by_hand():
    long = "one two three one two three"
    windows = squad.make_windows(TOKENIZER, [("who?", "no"), ("what is in?", long)], 9, 2, 2)
    assert [window.row for window in windows] == [0, 1, 1]
    asked = [TOKENIZER.id_to_token(i) for i in windows[1].tokens[:4]]
    assert asked == ["[CLS]", "what", "is", "[SEP]"]  # Cut after two tokens.
    texts = [[long[slice(*w)] for w in window.offsets if w] for window in windows[1:]]
    assert texts == [["one", "two", "three", "one"], ["three", "one", "two", "three"]]
    assert windows[1].token_types == [0] * 4 + [1] * 5
    assert squad.find_answer(windows[1], Answer("three one", 8)) == (6, 7)
    assert squad.find_answer(windows[1], Answer("two three", 18)) is None
    assert squad.find_answer(windows[2], Answer("two three", 18)) == (6, 7)
    questions = [Question("", "", "no", "", ()), Question("", "", long, "", (Answer("two", 18),))]
    inputs = squad.make_inputs(windows, questions)
    assert inputs.targets["start"].tolist() == [0, 0, 6]
    assert inputs.targets["end"].tolist() == [0, 0, 6]
    with pytest.raises(ValueError, match="max_length = 9 must leave more than overlap = 3"):
        squad.make_windows(TOKENIZER, [("who?", "no")], 9, 3, 4)


def window_of(*offsets):
    return Window(0, [0] * len(offsets), [0] * len(offsets), list(offsets))


def test_best_spans():
    first = window_of(None, (0, 3), (4, 7), (8, 13))
    start, end = np.array([9.0, 1, 2, 0]), np.array([9.0, 3, 0, 2.5])

    def spans(windows, allow_none=False, max_answer=2, n_best=20):
        return squad.best_spans(windows, n_best, max_answer, allow_none)

    found = spans([(first, start, end)])
    assert found[:3] == [Span(4, 13, 4.5), Span(0, 3, 4.0), Span(8, 13, 2.5)]
    # Not from the question, not backwards, not longer than two tokens.
    assert len(found) == 5
    assert spans([(first, start, end)], max_answer=1)[0] == Span(0, 3, 4.0)
    assert spans([(first, start, end)], n_best=1) == [Span(0, 0, 18.0)]  # The best ends are apart.
    assert spans([(first, start, end)], allow_none=True)[0] == Span(0, 0, 18.0)
    second = window_of(None, (8, 13), (14, 17))
    more = np.array([-1.0, 5, 0])
    both = spans([(first, start, end), (second, more, more)], allow_none=True)
    assert both[:2] == [Span(8, 13, 10.0), Span(8, 17, 5.0)]
    assert both.count(Span(8, 13, 10.0)) == 1
    assert Span(0, 0, -2.0) in both  # The least of the windows.
    np.testing.assert_allclose(
        squad.probabilities([Span(0, 1, np.log(3)), Span(1, 2, 0.0)]), [0.75, 0.25]
    )


@pytest.mark.parametrize(
    ("found", "expected", "exact", "f1"),
    [
        ("The Normans!", ["normans"], 1, 1),
        ("an  apple, a day", ["Apple day."], 1, 1),
        ("in the 10th century", ["10th century", "century"], 0, 0.8),
        ("red red two", ["red two two"], 0, 2 / 3),
        ("another", ["other"], 0, 0),
        ("", [], 1, 1),
        ("x", [], 0, 0),
        ("", ["x"], 0, 0),
        ("the", [], 1, 1),
        ("the", ["the", "red"], 0, 0),
        ("one-two", ["onetwo"], 1, 1),
    ],
)
def test_official_scores(found, expected, exact, f1):
    assert squad.exact_match(found, expected) == exact
    assert squad.f1(found, expected) == pytest.approx(f1)


answers = st.lists(st.sampled_from(["a", "red", "two", "Two", "!", "the"]), max_size=5).map(
    " ".join
)


@pytest.mark.once
@given(answers, st.lists(answers, max_size=3))
def test_scores_are_between_zero_and_one_and_f1_is_no_less(found, expected):
    exact, f1 = squad.exact_match(found, expected), squad.f1(found, expected)
    assert 0 <= exact <= f1 <= 1
    assert squad.f1(found, [found]) == squad.exact_match(found, [found]) == 1


def question(name, article, context="c"):
    return Question(name, article, context, "who?", (Answer("c", 0),))


@pytest.mark.once
@given(st.lists(st.integers(0, 6), min_size=7, max_size=40), st.integers(2, 3), st.integers(0, 5))
def test_folds_keep_articles_together(articles, folds, seed):
    articles = [*range(3), *articles]
    questions = [question(str(at), str(article)) for at, article in enumerate(articles)]
    found = script.choose_folds(questions, folds, seed)
    assert len({(article, fold) for article, fold in zip(articles, found, strict=True)}) == len(
        set(articles)
    )
    sizes = np.bincount(found, minlength=folds)
    assert sizes.max() - sizes.min() <= max(np.bincount(articles))
    with pytest.raises(ValueError, match="folds must be at most the"):
        script.choose_folds(questions, 8, seed)


def test_compared_attentions():
    settings = script.Settings(train=None)
    found = script.variants(settings)
    assert [v.name for v in found[:4]] == [EXACT, DEFAULT, PAPER, "clustered (paper)"]
    sizes = {(v.name, v.num_clusters, v.topk) for v in found[1:]}
    assert len(sizes) == len(found) - 1
    assert {(DEFAULT, count, 32) for count in (10, 25, 50, 100)} <= sizes
    assert {(PAPER, 25, k) for k in (16, 32, 64)} <= sizes
    assert {v.name for v in found[-4:]} == set(script.OTHERS)


def test_rows_of_results():
    questions = [question(str(at), "x", context) for at, context in enumerate("ccdd")]
    exact = {str(at): ("c", 1.0) for at in range(4)}
    ours = exact | {"0": ("x", 1.0), "2": ("c x", 0.5)}
    variant = script.variants(script.Settings(train=None))[1]
    row = script.compare(variant, questions, ours, exact, 0)
    assert (row["exact_match"], row["equal_answers"]) == (0.5, 0.5)
    assert row["f1"] == pytest.approx((0 + 1 + 2 / 3 + 1) / 4)
    assert row["difference"] == pytest.approx(-(1 + 1 / 3) / 4)
    np.testing.assert_allclose(row["difference_interval"], (-0.5, -1 / 6))  # Two contexts.


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.once
def test_loss_and_logits_are_those_of_each_window_alone(model_folder):
    source = finetuning.pretrained(model_folder)
    reader = BertForQuestionAnswering(source.encoder(Variant(EXACT), 0), rngs=nnx.Rngs(1))
    windows = squad.make_windows(
        source.tokenizer, [("who?", "one two"), ("what?", "no good red")], 20, 2, 4
    )
    made = [question("", "")] * 2
    inputs = squad.make_inputs(windows, made)
    inputs.targets["end"][:] = [3, 2]
    found = script.read(reader, inputs, 3, (12, 20))
    losses = []
    for row, (start, end) in enumerate(found):
        tokens, types = inputs.tokens[row], inputs.token_types[row]
        alone = reader(jnp.array([tokens]), jnp.array([len(tokens)]), jnp.array([types]))
        np.testing.assert_allclose(start, alone.start[0], atol=1e-5)
        np.testing.assert_allclose(end, alone.end[0], atol=1e-5)
        for logits, name in ((start, "start"), (end, "end")):
            chances = np.exp(logits) / np.exp(logits).sum()
            losses.append(-np.log(chances[inputs.targets[name][row]]))
    batch = jax.tree.map(jnp.asarray, finetuning.pad(inputs, np.arange(2), 12))
    sums = script.span_loss(reader, batch)
    assert (sums["weight"], float(sums["loss"] / 2)) == (
        2,
        pytest.approx(np.mean(losses), rel=1e-4),
    )


def settings_of(model_folder, folder, **others):
    paragraphs = [
        content(entry(f"{title}{at}", text=text, start=start), context=context, title=title)
        for title in "ABC"
        for at, (context, text, start) in enumerate(
            [("one two three", "two", 4), ("no good red one", "red", 8)]
        )
    ]
    data = {"data": [article for each in paragraphs for article in each["data"]]}
    write(folder / "train.json", json.dumps(data))
    values = {
        "train": folder / "train.json",
        "model": model_folder,
        "folds": 2,
        "clusters": (2,),
        "topk": (3,),
        "windows": script.Windows(
            max_length=12, overlap=2, max_question=4, buckets=(12,), n_best=5, max_answer=4
        ),
        "tuning": FineTuning(epochs=1, batch_size=2, evaluations=1),
        "output": folder / "out",
    }
    return script.Settings(**{**values, **others})


@pytest.mark.once
def test_run_writes_its_results_and_goes_on(model_folder, tmp_path, monkeypatch):
    settings = settings_of(model_folder, tmp_path)
    monkeypatch.setattr(script, "OTHERS", ())
    answer_all, calls = script.answer_all, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer_all(*args)

    monkeypatch.setattr(script, "answer_all", killed)
    with pytest.raises(KeyboardInterrupt):
        script.run(settings, Console(quiet=True))
    partial = json.loads((settings.output / "results.json").read_text())
    assert (len(partial["rows"]), len(partial["left"])) == (1, 3)

    console = Console(record=True, width=120)
    script.run(settings, console)
    assert len(calls) == 4 + 6  # The one attention that was finished was not asked again.
    assert "clustered (paper)" in console.export_text()
    written = (settings.output / "results.json").read_text()
    assert str(tmp_path) not in written
    record = json.loads(written)
    assert [row["attention"] for row in record["rows"]] == [
        EXACT,
        DEFAULT,
        PAPER,
        "clustered (paper)",
    ]
    assert record["rows"][0] == partial["rows"][0]
    assert record["rows"][0]["equal_answers"] == 1
    assert (record["data"]["questions"], record["data"]["trained_on"]) == (6, [2, 4])
    assert record["left"] == []
    assert (settings.output / "results.png").read_bytes().startswith(b"\x89PNG")
    other = dataclasses.replace(settings, tuning=FineTuning())
    with pytest.raises(training.TrainingError, match=r"other settings \(tuning\)"):
        script.run(other, Console(quiet=True))


@pytest.mark.once
def test_development_file_chooses_the_model_that_answers(model_folder, tmp_path, monkeypatch):
    """And the model that was written answers a question from a long text."""
    settings = settings_of(model_folder, tmp_path)
    settings = dataclasses.replace(settings, dev=settings.train)
    monkeypatch.setattr(script, "variants", lambda settings: [Variant(EXACT)])
    script.run(settings, Console(quiet=True))
    row = json.loads((settings.output / "results.json").read_text())["rows"][0]
    log = (settings.output / "runs/dev/scalars.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["score"] == row["f1"]

    write(tmp_path / "context.txt", "one two three no good red " * 12)
    asked = script.Ask(
        settings.output / "runs/dev/model",
        tmp_path / "context.txt",
        "what is?",
        clusters=100,  # More than tokens in a window: exact.
        rounds=1,
        windows=settings.windows,
    )
    console = Console(record=True, width=160)
    exact, clustered = script.ask(asked, console)
    assert exact.answer == clustered.answer
    assert exact.answer in (tmp_path / "context.txt").read_text()
    assert exact.probability == pytest.approx(clustered.probability, abs=1e-5)
    assert min(exact.seconds, clustered.seconds) > 0
    printed = console.export_text()
    assert "improved (default), C=100, k=32" in printed
    assert "windows of up to 12 tokens" in printed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: script.Settings(train=None, folds=1), "folds must be at least 2"),
        (lambda: script.Settings(train=None, clusters=()), "clusters must be different ones"),
        (lambda: script.Windows(buckets=(128, 256)), "buckets must ascend to at least max_length"),
        (lambda: script.Windows(n_best=0), "n_best must be at least 1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
