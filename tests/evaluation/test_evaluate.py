"""Metrics against scikit-learn, and the whole against a row-by-row twin."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from zoft.data.encode import encode
from zoft.data.example import Example
from zoft.evaluation import evaluate
from zoft.objectives import losses

CHOICE = SimpleNamespace(objective="choice")


def make(n, candidates, seed=0, task=CHOICE):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt = "".join(rng.choice(list("abcde. "), 1 + int(rng.integers(12)))) + ":"
        gold = int(rng.integers(len(candidates)))
        rows.append({"prompt": prompt, "candidates": candidates, "gold": gold, "where": f"row {i}"})
    return encode(rows, tiny.tokenizer(), task, 64)


@pytest.mark.parametrize("seed", range(5))
def test_f1_and_auc_equal_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    gold, predicted = rng.integers(0, 4, 50), rng.integers(0, 5, 50)
    want = metrics.f1_score(gold, predicted, average="macro")
    assert evaluate.macro_f1(gold, predicted) == pytest.approx(want, abs=1e-12)
    score = rng.integers(0, 6, 50).astype(float)  # many ties
    want = metrics.roc_auc_score(gold == 1, score)
    assert evaluate.auc(gold == 1, score) == pytest.approx(want, abs=1e-12)


def test_auc_by_hand():
    yes = np.array([True, True, False, False])
    assert evaluate.auc(yes, np.array([3.0, 1.0, 1.0, 0.0])) == (1 + 1 + 0.5 + 1) / 4
    assert evaluate.auc(yes, np.array([-np.inf, np.nan, np.inf, 0.0])) == 0.0


@pytest.mark.parametrize("candidates", [["yes", "no"], ["no 1", "yes", "d"]], ids=["single", "multi"])
def test_every_figure_against_a_slow_twin(candidates):
    model, examples, train = tiny.llama(), make(40, candidates), make(90, candidates, seed=1)
    got = evaluate.evaluate(model, examples, train)

    def log_probs(e):
        means = []
        for context, completion in zip(e.contexts, e.completions):
            table = model(torch.tensor([context + completion])).logits[0].double().log_softmax(-1)
            means.append(np.mean([table[len(context) - 1 + i, t].item() for i, t in enumerate(completion)]))
        return np.array(means) - np.log(np.sum(np.exp(means)))

    gold = np.array([e.gold for e in examples])
    table, seen = np.stack([log_probs(e) for e in examples]), np.stack([log_probs(e) for e in train])
    assert got["n"] == 40
    assert got["loss"] == pytest.approx(-np.mean(table[np.arange(40), gold]), rel=1e-5)
    assert got["accuracy"] == np.mean(table.argmax(1) == gold)
    assert got["calibrated_accuracy"] == np.mean((table - seen.mean(0)).argmax(1) == gold)
    assert got["majority"] == np.mean(gold == np.bincount([e.gold for e in train]).argmax())
    metrics = pytest.importorskip("sklearn.metrics")
    assert got["macro_f1"] == pytest.approx(metrics.f1_score(gold, table.argmax(1), average="macro"))
    if len(candidates) == 2:
        assert got["auc"] == pytest.approx(metrics.roc_auc_score(gold, table[:, 1] - table[:, 0]))
    else:
        assert "auc" not in got


def test_calibration_takes_a_label_bias_off_without_looking_at_labels():
    """A head that favours one answer whatever is asked: accuracy is chance, the order of scores is not."""
    model = tiny.llama()
    examples, train = make(200, ["yes", "no"]), make(200, ["yes", "no"], seed=1)
    # Gold is what the model itself would say without the bias.
    clean = evaluate.scores(model, examples)
    middle = np.median(clean[:, 1] - clean[:, 0])
    examples = [Example(e.contexts, e.completions, int(s[1] - s[0] > middle), "choice", True)
                for e, s in zip(examples, clean)]  # fmt: skip
    bias = torch.zeros(tiny.VOCAB)
    bias[examples[0].completions[1][0]] = 50.0
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    got = evaluate.evaluate(model, examples, train)
    assert got["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert got["calibrated_accuracy"] > 0.85 and got["auc"] == 1.0
    flipped = [Example(e.contexts, e.completions, 1 - e.gold, "choice", True) for e in train]
    assert evaluate.evaluate(model, examples, flipped)["calibrated_accuracy"] == got["calibrated_accuracy"]


def test_batches_do_not_matter(monkeypatch):
    model, examples, train = tiny.llama(), make(30, ["no 1", "yes"]), make(30, ["no 1", "yes"], seed=1)
    whole = evaluate.evaluate(model, examples, train)
    monkeypatch.setattr(evaluate, "TOKENS", 20)
    assert max(len(b) for b in evaluate._batches(examples, 20)) <= 5
    assert sorted(i for b in evaluate._batches(examples, 20) for i in b) == list(range(30))
    small = evaluate.evaluate(model, examples, train)
    assert small == pytest.approx(whole, rel=1e-5)
    assert evaluate.evaluate(model, examples, train) == small  # the same bits again
    state = torch.get_rng_state()
    evaluate.evaluate(model, examples, train)
    assert torch.get_rng_state().equal(state)


def test_differing_numbers_of_candidates_have_no_label_metrics():
    examples = make(6, ["yes", "no"]) + make(6, ["b", "no 1", "d"])
    got = evaluate.evaluate(tiny.llama(), examples, examples)
    assert set(got) == {"accuracy", "loss", "n"} and math.isfinite(got["loss"])


def test_text_to_learn_has_a_loss_per_token():
    examples = make(12, ["no 1 yes."], task=SimpleNamespace(objective="lm"))
    model = tiny.llama()
    got = evaluate.evaluate(model, examples, examples)
    sums, counts = losses.losses(model, losses.collate(examples))
    assert got["loss"] == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert (got["tokens"], got["n"]) == (int(counts.sum()), 12)


def test_each_forward_runs_inside_the_context():
    rows, depth = [], [0]
    model = tiny.llama()
    model.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append((depth[0], len(kwargs["input_ids"]))), with_kwargs=True
    )

    @contextmanager
    def context(n):
        depth[0] = n
        yield
        depth[0] = 0

    examples = make(9, ["no 1", "yes"])
    evaluate.evaluate(model, examples, examples, context=context)
    assert len(rows) > 4 and all(said == there > 0 for said, there in rows), rows


def test_a_broken_model_is_reported_not_crashed_on():
    model, examples = tiny.llama(), make(9, ["no 1", "yes"])
    model.lm_head.weight.fill_(float("nan"))
    got = evaluate.evaluate(model, examples, examples)
    assert got["n"] == 9 and not math.isfinite(got["loss"])


def test_a_fixed_spread():
    examples = make(10, ["yes", "no"])
    assert evaluate.spread(examples, 99) == examples
    assert evaluate.spread(examples, 3) == [examples[0], examples[3], examples[6]]


# ---- several right candidates, generated text, intervals -----------------------------------------------------------


def test_with_several_right_candidates_any_of_them_is_a_hit():
    candidates = ["b", "no 1", "d"]
    examples = [replace(e, gold=0, golds=(0, 2)) for e in make(40, candidates)]
    model = tiny.llama()
    table = evaluate.scores(model, examples)
    got = evaluate.evaluate(model, examples, examples)
    assert got["accuracy"] == np.mean(np.isin(table.argmax(1), [0, 2])) and "macro_f1" not in got
    assert evaluate.judge_model(model, examples, examples).right.mean() == got["accuracy"]


def test_generated_text_is_judged_by_its_answers():
    right = ("The cat.", "a dog")
    examples = [replace(e, objective="lm", single=False, answers=right) for e in make(4, ["yes"])]
    texts = ["cat", "the  DOG", "black cat", "no"]
    seen = []

    def write(contexts):
        seen.extend(contexts)
        return texts

    judged = evaluate.judge_model(tiny.llama(), examples, examples, write=write)
    got = evaluate.figures(judged)
    assert seen == [e.contexts[0] for e in examples] and judged.right.tolist() == [True, True, False, False]
    assert (got["exact_match"], got["f1"]) == (0.5, pytest.approx((1 + 1 + 2 / 3 + 0) / 4))
    plain = evaluate.evaluate(tiny.llama(), examples, examples)
    assert plain == {k: v for k, v in got.items() if k not in ("exact_match", "f1")}


def judged_at_random(n=400, seed=0):
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 2, n)
    scores = rng.normal(size=(n, 2)) + 0.8 * np.eye(2)[gold]
    return evaluate.Judged(gold, [(int(g),) for g in gold], scores=scores, bias=np.zeros(2), majority=0)


def test_bootstrap_of_a_mean_has_the_width_of_the_closed_form():
    """Accuracy and loss are means: the interval is mean ± 1.96 sd / sqrt(n), the sd of the examples' own values."""
    j = judged_at_random()
    got, at = evaluate.figures(j), evaluate.bootstrap(j, resamples=4000)
    logp = j.scores - np.log(np.exp(j.scores).sum(1, keepdims=True))
    for name, values in (("accuracy", j.right), ("loss", -logp[np.arange(400), j.gold])):
        half = 1.959964 * values.std() / math.sqrt(400)
        assert at[name] == pytest.approx([got[name] - half, got[name] + half], abs=0.15 * half), name
    assert "n" not in at and "majority" not in at


def test_bootstrap_is_the_same_each_time_and_of_the_plain_resamples():
    j = judged_at_random(60)
    at = evaluate.bootstrap(j, resamples=200, seed=3)
    assert at == evaluate.bootstrap(j, resamples=200, seed=3) != evaluate.bootstrap(j, resamples=200, seed=4)
    metrics = pytest.importorskip("sklearn.metrics")
    rng, values = np.random.default_rng(3), []
    for _ in range(200):
        i = rng.integers(0, 60, 60)
        values.append(metrics.roc_auc_score(j.gold[i], (j.scores[:, 1] - j.scores[:, 0])[i]))
    assert at["auc"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)
