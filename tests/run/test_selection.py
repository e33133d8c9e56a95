"""Early stop and the best weights: rules by hand, and runs that are killed, resumed and rebuilt."""

import json
from dataclasses import replace

import pytest
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.data import tasks
from zoft.errors import UserError
from zoft.evaluation.best_by import fields_of_best, metrics_of_task
from zoft.method.configured import compose
from zoft.run import selection
from zoft.train.resolve import with_objective

BASE = compose("mezo/reviews", ["early_stop=2"])


def losses(*values, name="loss"):
    return {10 * i: {name: v} for i, v in enumerate(values)}


def test_the_best_is_the_earliest_of_equals_and_no_number_is_the_worst():
    assert selection.best_step(BASE, losses(3.0, 1.0, 1.0, 2.0)) == 10
    assert selection.best_step(BASE, losses(float("nan"), None, 2.0)) == 20
    by = replace(BASE, best_by="accuracy")
    assert selection.best_step(by, losses(0.5, 0.9, 0.7, name="accuracy")) == 10
    both = {0: {"loss": 1.0, "dev_loss": 5.0}, 10: {"dev_loss": 4.0}, 20: {"loss": 0.1, "dev_loss": 4.5}}
    assert selection.best_step(BASE, both) == 10


@pytest.mark.parametrize("values, ends", [
    ((3, 2, 1), False), ((1, 2), False), ((1, 2, 3), True), ((3, 1, 2, 1), True), ((3, 1, 2, 0.5), False), ((2, 2, 2), True),
])  # fmt: skip
def test_two_evaluations_without_a_better_one_end_a_run(values, ends):
    assert selection.stops_early(BASE, losses(*map(float, values))) is ends
    assert not selection.stops_early(replace(BASE, early_stop=0), losses(*map(float, values)))


def test_the_evaluation_rows_are_looked_at_where_they_must_be():
    calls = []

    def rows(name, value):
        return lambda: calls.append(name) or {"loss": value}

    keep = replace(BASE, save_best=True, steps=100)
    assert selection.score_step(keep, {}, 0, rows("test", 1.0), rows("dev", 2.0)) == {
        "loss": 1.0,
        "dev_loss": 2.0,
    }
    seen = {0: {"loss": 1.0, "dev_loss": 2.0}}
    assert selection.score_step(keep, seen, 10, rows("test", 0.1), rows("dev", 3.0)) == {"dev_loss": 3.0}
    assert selection.score_step(keep, seen, 20, rows("test", 0.9), rows("dev", 1.0)) == {
        "loss": 0.9,
        "dev_loss": 1.0,
    }
    assert calls == ["dev", "test", "dev", "dev", "test"]
    assert selection.score_step(keep, seen, 20, rows("test", 0.9), None) == {"loss": 0.9}


def test_choosing_by_the_evaluation_rows_is_said():
    assert "no dev set" in selection.selection_note(BASE, losses(1.0)) and not selection.selection_note(
        BASE, losses(1.0, name="dev_loss")
    )
    assert not selection.selection_note(replace(BASE, early_stop=0), losses(1.0))


@pytest.mark.parametrize("words, said", [
    (["early_stop=2", "eval_every=0"], "early_stop=2"), (["save_best=true", "eval_every=0"], "save_best=True"),
    (["best_by=auc"], "best_by=auc"), (["early_stop=2", "eval_every=30", "denoise_every=20", "train=all"], "denoise_every=20"),
])  # fmt: skip
def test_what_does_nothing_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        compose("mezo/reviews", words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    tiny.save(folder / "tiny")
    tiny.write_rows(folder / "my.jsonl")
    return folder


TRAIN = [
    "train", "task=local", "task.train=my.jsonl", "task.prompt=a {text} b:", "task.label=label", "task.num_dev=15",
    'task.choices={a: " no", b: " yes"}', "model=tiny", "steps=40", "eval_every=4", "batch_size=4", "threads=1",
    "early_stop=2", "save_best=true", "lr=0.02", "max_length=60",
]  # fmt: skip


def zoft(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    return done


LEARNED = [w for w in TRAIN if not w.startswith(("task.label", "task.choices", "best_by"))] + [
    "task.target= {label}"
]
THREE = [w for w in TRAIN if "choices" not in w] + ['task.choices={a: " no", b: " yes", c: " d"}']
PLAIN = [w for w in LEARNED if not w.startswith(("task.prompt", "task.target", "task.train", "task.num_dev"))]


@pytest.mark.parametrize("words", [
    [*LEARNED, "best_by=auc"], [*LEARNED, "best_by=accuracy"], [*LEARNED, "best_by=reward"], [*TRAIN, "best_by=perplexity"],
    [*THREE, "best_by=auc"], [*TRAIN, "best_by=exact_match"], [*PLAIN, "task.train=plain.jsonl", "best_by=f1"],
])  # fmt: skip
def test_a_metric_that_the_task_never_has_is_refused_before_the_model_loads(place, monkeypatch, words):
    monkeypatch.chdir(place)
    tiny.write_rows(place / "plain.jsonl", [{"text": f"a b {i} no yes d"} for i in range(60)])
    done = CliRunner().invoke(app, [*words, "output_dir=never"])
    (line,) = [line for line in done.stderr.splitlines() if "best_by=" in line]
    assert done.exit_code == 2 and "have no such metric; use loss" in line, done.stderr
    assert "loading" not in done.stderr and not (place / "never").exists()


@pytest.mark.parametrize("words", [TRAIN, LEARNED, THREE, [*TRAIN, "objective=f1", "max_new_tokens=2"]])
def test_the_metrics_foretold_are_those_of_an_evaluation(place, monkeypatch, words):
    monkeypatch.chdir(place)
    words = [w for w in words if not w.startswith(("steps", "eval_every"))]
    words += [
        "steps=1",
        "eval_every=1",
        "save_model=true",
        f"output_dir=told-{len(list(place.glob('told-*')))}",
    ]
    config = compose(None, words[1:])
    data = tasks.load_task(config.task)
    told = metrics_of_task(with_objective(config, data), data)
    zoft(*words)
    out = config.output_dir
    before = json.loads((place / out / "metrics.jsonl").read_text().splitlines()[0])["eval"]
    assert told == {m for m in fields_of_best() if f"dev_{m}" in before}


def test_a_run_that_ends_early_keeps_its_best_weights_and_resumes_to_the_same_bits(place, monkeypatch):
    monkeypatch.chdir(place)
    zoft(*TRAIN, "output_dir=whole")
    found = json.loads((place / "whole" / "result.json").read_text())
    evals = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    evals = {r["step"]: r["eval"] for r in evals if "eval" in r}
    best = min(sorted(evals), key=lambda s: evals[s]["dev_loss"])
    assert found["stopped_early"] and found["steps"] == best + 8 < 40 and found["best_step"] == best
    assert found["after"] == evals[best] and "loss" in evals[best] and found["last"] == evals[best + 8]
    assert found["forwards"] == found["steps"] * 8

    zoft("replay", "whole", "--step", str(best), "--out", "again")
    saved = [(place / d / "model.safetensors").read_bytes() for d in ("whole/model", "again")]
    assert saved[0] == saved[1]
    judged = json.loads(zoft("eval", "whole", "--json", "--resamples", "0").stdout)
    assert judged == pytest.approx(
        {k: v for k, v in evals[best].items() if not k.startswith("dev_")}, rel=1e-5
    )

    # What a kill leaves after the ledger's last step and before its evaluation, or after it and before the end.
    import shutil

    for cut in (0, 1):
        part = place / f"part{cut}"
        shutil.copytree(place / "whole", part)
        (part / "result.json").unlink()
        shutil.rmtree(part / "model")
        lines = (part / "metrics.jsonl").read_text().splitlines(keepends=True)
        last = max(i for i, line in enumerate(lines) if '"eval"' in line)
        (part / "metrics.jsonl").write_text("".join(lines[: last + cut]))
        zoft("train", "--resume", f"part{cut}")
        again = json.loads((part / "result.json").read_text())
        assert {k: again[k] for k in ("steps", "best_step", "after")} == {
            k: found[k] for k in ("steps", "best_step", "after")
        }
        assert (part / "ledger").read_bytes() == (place / "whole" / "ledger").read_bytes()
        assert (part / "model" / "model.safetensors").read_bytes() == saved[0]


@pytest.mark.parametrize(
    "keys", [["train=all", "lr=0.02"], ["train=lora", "lr=0.5"]], ids=["weights", "lora"]
)
def test_save_best_that_is_asked_for_at_a_resume_has_the_figures_of_the_step_it_keeps(
    place, monkeypatch, keys
):
    monkeypatch.chdir(place)
    name = f"later-{keys[0][6:]}"
    words = [k for k in TRAIN if not k.startswith(("lr=", "save_best="))]
    zoft(*words, *keys, f"output_dir={name}")
    part = place / name
    evals = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
    evals = {r["step"]: r["eval"] for r in evals if "eval" in r}
    best = min(sorted(evals), key=lambda s: evals[s]["dev_loss"])
    assert 0 < best < max(evals) and "loss" not in evals[best]  # nobody looked at the evaluation rows there
    (part / "result.json").unlink()
    text = (part / "config.yaml").read_text()
    (part / "config.yaml").write_text(text.replace("save_best: false", "save_best: true"))
    zoft("train", "--resume", name)
    found = json.loads((part / "result.json").read_text())
    assert found["best_step"] == best
    judged = json.loads(zoft("eval", name, "--json", "--resamples", "0").stdout)
    assert found["after"] == pytest.approx(judged | evals[best], rel=1e-5)
    assert found["last"]["loss"] != found["after"]["loss"]
