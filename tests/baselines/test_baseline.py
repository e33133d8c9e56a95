"""Baselines against slow twins, scikit-learn by itself, and a loop of AdamW by hand; on a tiny model in a folder."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from zoft.baselines import first_order, linear_probe, methods
from zoft.cli.main import app
from zoft.data import tasks
from zoft.data.encode import encode
from zoft.evaluation import evaluate
from zoft.method.configured import compose

ROWS = [
    {"text": ("bad no " if i % 3 else "so yes ") * (1 + i % 4) + str(i), "label": ("n", "p")[i % 3 == 0]}
    for i in range(90)
]
TASK = [
    "task=local", "task.train=my.jsonl", "task.prompt=a {text} b:", "task.label=label", 'task.choices={n: " no", p: " yes"}',
    "model=tiny", "max_length=60", "threads=1",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    tiny.save(tmp_path / "tiny")
    tiny.write_rows(tmp_path / "my.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*words, out="out"):
    said = {w.partition("=")[0] for w in words}
    words = [*words, *(w for w in TASK if w.partition("=")[0] not in said)]
    result = CliRunner().invoke(app, ["baseline", *words, f"output_dir={out}"])
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return json.loads(open(f"{out}/result.json").read())


def data_of(place):
    config = compose(None, TASK)
    return config, tasks.load_task(config.task)


def test_zero_shot_and_calibrated_are_the_evaluations_own_figures(place):
    zero, calibrated = made("-m", "zero-shot", out="a"), made("-m", "calibrated", out="b")
    assert calibrated["after"]["accuracy"] == zero["after"]["calibrated_accuracy"]
    assert calibrated["after"]["auc"] == pytest.approx(zero["after"]["auc"])
    assert "calibrated_accuracy" not in calibrated["after"] and zero["forwards"] == 0
    assert {"steps", "forwards", "train_seconds", "peak_memory_gb", "before", "after", "output_dir"} <= set(
        zero
    )


def test_what_is_not_trained_is_told_in_one_column_without_steps(place):
    for method, words in (("zero-shot", []), ("calibrated", []), ("first-order", ["steps=2"])):
        done = CliRunner().invoke(app, ["baseline", "-m", method, *TASK, *words, f"output_dir={method}"])
        result = json.loads((place / method / "result.json").read_text())
        lines = done.stdout.splitlines()
        assert ("before" in done.stdout) == (method == "first-order") and "0 steps" not in done.stdout
        if method == "zero-shot":
            assert lines[0].split() == [method] and "forwards" not in done.stdout
            assert lines[1].split() == ["accuracy", f"{result['after']['accuracy']:.4g}"]
        else:
            assert f"{result['forwards']} forwards in " in lines[-1] and result["forwards"] > 0


def test_demonstrations_stand_before_every_prompt_as_often_as_they_fit(place):
    config, data = data_of(place)
    told = methods.demonstrated(replace(config, max_length=200), 3, data, tiny.tokenizer())
    front = {row["prompt"].rpartition("\n\n")[0] for row in told.train + told.eval}
    assert len(front) == 1 and told.demos == 3
    blocks = front.pop().split("\n\n")
    known = {row["prompt"] + row["candidates"][row["gold"]] for row in data.train}
    assert len(blocks) == 3 and set(blocks) <= known
    assert [r["prompt"].rpartition("\n\n")[2] for r in told.eval] == [r["prompt"] for r in data.eval]
    assert not {r["prompt"].rpartition("\n\n")[2] for r in told.train} & {
        b.rpartition(":")[0] + ":" for b in blocks
    }
    other = methods.demonstrated(replace(config, max_length=200, seed=1), 3, data, tiny.tokenizer())
    assert other.eval[0]["prompt"] != told.eval[0]["prompt"]


def test_fewer_demonstrations_where_no_more_fit_and_it_is_said(place, capfd):
    config, data = data_of(place)
    told = methods.demonstrated(replace(config, max_length=100), 32, data, tiny.tokenizer())
    assert 0 < told.demos < 32 and f"{told.demos} of 32 demonstrations" in capfd.readouterr().err
    lengths = [e.length for e in encode(told.eval, tiny.tokenizer(), data, 1 << 30)]
    assert max(lengths) <= 100
    with pytest.raises(methods.UserError, match="max_length=20"):
        methods.demonstrated(replace(config, max_length=20), 4, data, tiny.tokenizer())


def log_probs(model, text, candidate):
    """Log-probabilities of a candidate's tokens after a text, from the two tokenisations."""
    ids, whole = tiny.tokenizer()(text)["input_ids"], tiny.tokenizer()(text + candidate)["input_ids"]
    at = next((i for i in range(len(ids)) if ids[i] != whole[i]), len(ids))
    table = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return [table[i - 1, whole[i]].item() for i in range(at, len(whole))]


def test_in_context_scores_are_those_of_the_whole_text(place):
    found = made("-m", "icl", "--demos", "2", "seed=3", "eval_limit=6", "max_length=200")
    config, data = data_of(place)
    told = methods.demonstrated(replace(config, seed=3, max_length=200), 2, data, tiny.tokenizer())
    model, hits = tiny.llama(), []
    for row in tasks.subset(told.eval, 6):
        means = [np.mean(log_probs(model, row["prompt"], c)) for c in row["candidates"]]
        hits.append(int(np.argmax(means)) == row["gold"])
    assert found["demos_used"] == 2 and found["after"]["accuracy"] == pytest.approx(np.mean(hits))


def test_surface_form_is_a_difference_of_sums(place):
    config, data = data_of(place)
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    examples = encode(data.eval, tokenizer, data, 60)
    got, forwards = methods.surface_form(config, data, model, tokenizer, examples)

    def total(text, candidate):
        return sum(log_probs(model, text, candidate))

    for row, scores in zip(data.eval, got):
        want = [total(row["prompt"], c) - total("a  b:", c) for c in row["candidates"]]
        assert np.diff(scores) == pytest.approx(np.diff(want), abs=1e-4)
    assert forwards == 2
    config.task.null_prompt = "d:"
    other, _ = methods.surface_form(config, data, model, tokenizer, examples)
    want = [total(data.eval[0]["prompt"], c) - total("d:", c) for c in data.eval[0]["candidates"]]
    assert np.diff(other[0]) == pytest.approx(np.diff(want), abs=1e-4)


@pytest.mark.filterwarnings("error:invalid value")
def test_surface_form_of_rows_that_differ_in_their_number_of_candidates(place):
    config, data = data_of(place)
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    data.eval = [
        row | {"candidates": [" no", " yes", " no 1"][: 2 + i % 2]} for i, row in enumerate(data.eval)
    ]
    got, forwards = methods.surface_form(
        config, data, model, tokenizer, encode(data.eval, tokenizer, data, 60)
    )
    for row, scores in zip(data.eval, got, strict=True):
        want = [
            sum(log_probs(model, row["prompt"], c)) - sum(log_probs(model, "a  b:", c))
            for c in row["candidates"]
        ]
        assert np.diff(scores[: len(want)]) == pytest.approx(np.diff(want), abs=1e-4)
        assert (scores[len(want) :] == -np.inf).all()
    assert forwards == 5


def test_features_are_the_last_hidden_state_of_each_prompt():
    model = tiny.llama()
    rows = [
        {"prompt": p, "candidates": ["no 1", "yes"], "gold": 0, "where": p}
        for p in ("a b:", "d", "abc de no:")
    ]
    examples = encode(rows, tiny.tokenizer(), SimpleNamespace(objective="choice"), 60)
    got = linear_probe.features(model, examples)
    for e, found in zip(examples, got):
        states = model(torch.tensor([e.contexts[0]]), output_hidden_states=True).hidden_states[-1][0, -1]
        assert found == pytest.approx(states.numpy(), abs=1e-5)


def test_linear_probe_equals_scikit_learns_pipeline_and_learns_what_is_linear(place):
    found = made("-m", "linear-probe")
    linear = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    config, data = data_of(place)
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    x, z = (linear_probe.features(model, encode(r, tokenizer, data, 60)) for r in (data.train, data.eval))
    y, gold = (np.array([row["gold"] for row in r]) for r in (data.train, data.eval))
    scale = preprocessing.StandardScaler().fit(x)
    alone = linear.LogisticRegression(C=found["C"], max_iter=2000).fit(scale.transform(x), y)
    assert found["after"]["accuracy"] == pytest.approx(alone.score(scale.transform(z), gold), abs=0.1)
    assert found["after"]["accuracy"] > found["after"]["majority"]


@pytest.mark.parametrize("method", ["first-order", "first-order-lora", "checkpointed-lora"])
def test_training_with_gradients_lowers_the_loss_and_leaves_a_model(place, method):
    found = made("-m", method, "steps=25", "lr=1e-2", "batch_size=8")
    assert (found["steps"], found["forwards"], found["backwards"]) == (25, 200, 200)
    assert found["after"]["loss"] < found["before"]["loss"] - 0.05
    done = CliRunner().invoke(app, ["eval", "out", "--json", "--resamples", "0"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(found["after"]["loss"], rel=1e-3)
    again = made("-m", method, "steps=25", "lr=1e-2", "batch_size=8", out="again")
    assert again["after"] == found["after"]


def test_checkpointed_pairs_learn_what_plain_ones_learn_and_keep_less(place, monkeypatch):
    """The same steps to rounding; what autograd keeps of a forward, counted in bytes, is less."""
    most = {}

    def watched(name):
        def compute_loss(self, model, inputs, *others, **more):
            kept = {}

            def pack(x):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                sums, counts = first_order.losses.losses(model, inputs["batch"])
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            most[name] = sum(size for place, size in kept.items() if place not in weights)
            return sums.sum() / counts.sum()

        monkeypatch.setattr(first_order._Trainer, "compute_loss", compute_loss)

    words = ("steps=7", "lr=1e-2", "batch_size=8", "eval_every=3")
    watched("plain")
    plain = made("-m", "first-order-lora", *words, out="plain")
    watched("checkpointed")
    found = made("-m", "checkpointed-lora", *words, out="checkpointed")
    assert most["checkpointed"] < most["plain"] / 2
    assert found["after"]["loss"] == pytest.approx(plain["after"]["loss"], rel=1e-4)
    rows = [json.loads(line) for line in open("checkpointed/metrics.jsonl")]
    assert [r["step"] for r in rows] == [0, 3, 6, 7] and "between" not in found
    assert rows[-1]["eval"] == found["after"] and rows[-1]["seconds"] == found["train_seconds"]
    assert 0 < rows[1]["seconds"] < rows[2]["seconds"] <= rows[3]["seconds"]
    alone = made("-m", "first-order-lora", "steps=7", "lr=1e-2", "batch_size=8", out="alone")
    assert alone["after"] == plain["after"]  # scoring on the way changes nothing


def test_checkpointed_pairs_beside_a_base_in_bf16(place):
    found = made("-m", "checkpointed-lora", "steps=25", "lr=1e-2", "batch_size=8", "compute=bf16")
    assert found["after"]["loss"] < found["before"]["loss"] - 0.05


def test_what_does_not_apply_is_refused(place):
    for words, said in (
        (["-m", "zero-shot", "lr=1"], "lr: does nothing"),
        (["-m", "icl", "--epochs", "2"], "--epochs 2"),
        (["-m", "sfc", "--demos", "2"], "--demos 2"),
        (["-m", "linear"], "did you mean linear-probe?"),
        (["-m", "first-order", "--epochs", "2", "steps=3"], "leave one of them out"),
        (["-m", "first-order", "lora_rank=3"], "lora_rank"),
        (["-m", "first-order", "eps=1e-3"], "eps: does nothing"),
        (["-m", "first-order", "compute=bf16"], "compute: does nothing"),
        (["-m", "checkpointed-lora", "compute=fp16"], "compute=fp16"),
    ):
        done = CliRunner().invoke(app, ["baseline", *words, *TASK])
        assert done.exit_code == 2 and said in done.stderr, (words, done.stderr, done.exception)
    made("-m", "zero-shot", out="once")
    done = CliRunner().invoke(app, ["baseline", *TASK, "output_dir=once"])
    assert done.exit_code == 2 and "once" in done.stderr


def test_text_to_learn_has_no_labels_to_calibrate(place):
    words = [w for w in TASK if not w.startswith(("task.label", "task.choices"))]
    done = CliRunner().invoke(app, ["baseline", "-m", "calibrated", *words, "task.target= {label}"])
    assert done.exit_code == 2 and "needs labels" in done.stderr
    assert evaluate.CALIBRATION == 128


ASIDE = ["model=tiny", "max_length=60", "threads=1", "task=local"]


@pytest.mark.parametrize("rows, method, said, other", [
    ([{"prompt": f"a {r['text']}", "completion": " yes"} for r in ROWS], "icl", "task.prompt and task.target", "use zero-shot\n"),
    ([{"prompt": f"a {r['text']}", "completion": " yes"} for r in ROWS], "linear-probe", "needs labels", "use zero-shot\n"),
    ([{"text": r["text"]} for r in ROWS], "icl", "not conversations or plain text", "use zero-shot\n"),
])  # fmt: skip
def test_a_task_is_judged_before_the_folder_and_the_model_and_what_works_is_named(
    place, rows, method, said, other
):
    tiny.write_rows(place / "own.jsonl", rows)
    words = [*ASIDE, "task.train=own.jsonl", "output_dir=taken"]
    done = CliRunner().invoke(app, ["baseline", *words])
    assert done.exit_code == 0, done.stderr  # zero-shot, which is recommended
    done = CliRunner().invoke(app, ["baseline", "-m", method, *words])
    assert done.exit_code == 2 and said in done.stderr and done.stderr.endswith(other), done.stderr
    assert "loading" not in done.stderr
    done = CliRunner().invoke(app, ["baseline", *words])
    assert done.exit_code == 2 and "a baseline is in the way" in done.stderr and "loading" not in done.stderr


def test_text_to_learn_by_a_template_is_for_icl_too(place):
    words = [w for w in TASK if not w.startswith(("task.label", "task.choices"))] + ["task.target= {label}"]
    done = CliRunner().invoke(app, ["baseline", "-m", "linear-probe", *words])
    assert done.exit_code == 2 and done.stderr.endswith("use zero-shot or icl\n")
    words = [*words, "max_length=200", "eval_limit=4"]
    done = CliRunner().invoke(
        app,
        ["baseline", "-m", "icl", "--demos", "1", *dict.fromkeys(w for w in words if w != "max_length=60")],
    )
    assert done.exit_code == 0, done.stderr


def test_a_folders_name_holds_what_is_not_the_configs_own():
    def name(*words, config="mezo/reviews", method="icl"):
        return methods.baseline_settings(config, words, method, None, None)[0].output_dir

    assert name() == "runs/mezo-reviews-icl-seed0"
    assert name("model=a/My-1.7B", "bits=4") == "runs/mezo-reviews-My-1.7B-bits4-icl-seed0"
    assert name("model=x/q.gguf", "task=sst2") == "runs/mezo-reviews-q-sst2-icl-seed0"
    own = ["task=local", "task.train=d/my file.csv", "seed=3"]
    assert name(*own, method="zero-shot") == "runs/mezo-reviews-my-file-zero-shot-seed3"
    assert name(*own, "output_dir=here") == "here"
    assert name(*ASIDE, "task.train=d/own.jsonl", config=None) == "runs/run-tiny-own-icl-seed0"
