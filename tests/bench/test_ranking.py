"""`zoft bench` on a tiny model: its table against the runs' own files, a run alone, kills, and what it refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from zoft.bench.plan import Wanted, read_bench
from zoft.cli.main import app
from zoft.errors import UserError
from zoft.models.load import keeping_a_model, load_model
from zoft.packages import zoft_command

ROOT = Path(__file__).resolve().parents[2]
FILE = {
    "base": {"config": "mine.yaml", "schedule": "linear"},
    "tasks": {"words": {}, "short": {"task.max_words": 4, "max_length": 24}},
    "forwards": 160,
    "lr_forwards": 80,
    "lr_factors": [1, 4],
    "seeds": [1, 2],
    "reach": {"words": 0.3},
    "frame": {
        "untrained": {"method": "zero-shot"},
        "AdamW": {"method": "first-order", "steps": 5, "lr": "1e-2"},
    },
    "rows": {
        "lora": {"recipe": "lora_zo", "train": "lora", "lr": "1e-2"},
        "mezo": {"lr": "1e-3"},
        "normalised q 4": {"estimator": "normalised", "q": 4, "lr_factors": [1], "lr": 1e-3},
        "wrong": {"train": "nothing_of_that_name"},
    },
}


def place(folder, **changes):
    """A folder with a tiny model, its config, and a bench file."""
    tiny.place(folder, "max_length: 32\nbatch_size: 8\nthreads: 1\n")
    (folder / "ranks.yaml").write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
    return folder


def invoke(*words, code=0):
    done = CliRunner().invoke(app, ["bench", "--config", "ranks.yaml", *words])
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A finished bench: (its folder, what it printed, its table as records)."""
    pytest.importorskip("matplotlib")
    folder, before = place(tmp_path_factory.mktemp("ranked")), Path.cwd()
    os.chdir(folder)
    try:
        shown = invoke()
    finally:
        os.chdir(before)
    root = folder / "runs" / "bench-ranks"
    with (root / "table.csv").open() as file:
        return root, shown, list(csv.DictReader(file))


def results(root, task, row, part=""):
    """{seed or lr: result.json} of the folders whose config says that they are of this row."""
    found = {}
    for path in root.glob(f"task={task},row={row.replace(' ', '_')},*/result.json"):
        name = path.parent.name
        if ("part=" + part if part else "part=") in name or (not part and "part=" not in name):
            found[path.parent] = json.loads(path.read_text())
    return found


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if "loss" in r]


def record(rows, task, row):
    (found,) = [r for r in rows if (r["task"], r["row"]) == (task, row)]
    return found


def test_the_table_is_what_the_runs_results_say(ranked):
    root, _, rows = ranked
    assert len(rows) == 2 * 6
    for task in ("words", "short"):
        metric = record(rows, task, "mezo")["metric"]
        assert metric == "auc"
        own = {
            row: [r["after"][metric] for f, r in results(root, task, row).items() if "part=" not in f.name]
            for row in (*FILE["frame"], "lora", "mezo", "normalised q 4")
        }
        low, high = np.mean(own["untrained"]), np.mean(own["AdamW"])
        for row, values in own.items():
            found = record(rows, task, row)
            assert len(values) == int(found["finished"]) == (1 if row == "untrained" else 2)
            assert float(found["mean"]) == pytest.approx(np.mean(values), abs=1e-12)
            if len(values) > 1:
                assert float(found["sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-12)
            if low != high:
                assert float(found["gap"]) == pytest.approx((np.mean(values) - low) / (high - low), abs=1e-9)
            every = [r for f, r in results(root, task, row).items() if "part=" not in f.name]
            assert float(found["seconds"]) == pytest.approx(np.mean([r["train_seconds"] for r in every]))
            assert float(found["peak_memory_gb"]) == max(r["peak_memory_gb"] for r in every)
    means = [float(r["mean"]) for r in rows if r["task"] == "words" and r["part"] == "row" and r["mean"]]
    assert means == sorted(means, reverse=True) and len(means) == 3


def test_forwards_are_equal_and_counted_by_hand(ranked):
    root, _, rows = ranked
    for row, each, steps in (("lora", 16, 10), ("mezo", 16, 10), ("normalised q 4", 40, 4)):
        found = [r for f, r in results(root, "words", row).items() if "part=" not in f.name]
        assert [(r["steps"], r["forwards"]) for r in found] == [(steps, steps * each)] * 2
        assert float(record(rows, "words", row)["forwards"]) == 160
    assert record(rows, "words", "mezo")["search_forwards"] == "160"
    assert record(rows, "words", "normalised q 4")["search_forwards"] == "0"
    assert float(record(rows, "words", "AdamW")["backwards"]) == 40


def test_the_lr_is_the_one_with_the_least_late_training_loss_of_another_seed(ranked):
    root, _, rows = ranked
    for row in ("lora", "mezo"):
        late = {}
        for folder in results(root, "words", row, "search"):
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert (config["seed"], config["steps"], config["eval_limit"]) == (0, 5, 1)
            late[config["lr"]] = losses(folder)[-1]  # a fifth of 5 steps
        base = float(FILE["rows"][row]["lr"])
        assert set(late) == {base, base * 4}
        chosen = float(record(rows, "words", row)["lr"])
        assert chosen == min(late, key=late.get)
        runs = [f for f in results(root, "words", row) if "part=" not in f.name]
        assert {yaml.safe_load((f / "config.yaml").read_text())["lr"] for f in runs} == {chosen}


def test_forwards_to_a_value_are_those_of_the_first_evaluation_that_has_it(ranked):
    root, _, rows = ranked
    for row in ("mezo", "AdamW", "untrained"):
        first = []
        for folder, result in results(root, "words", row).items():
            if "part=" in folder.name:
                continue
            lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
            good = [x["step"] for x in lines if "eval" in x and x["eval"]["auc"] >= 0.3]
            first += [good[0] * result["forwards"] / max(1, result["steps"])] if good else []
        found = record(rows, "words", row)
        assert int(found["reached"]) == len(first)
        if first:
            assert float(found["reach_forwards"]) == pytest.approx(np.mean(first))
    assert record(rows, "short", "mezo")["reached"] == ""


def test_a_failure_is_a_row_with_its_reason(ranked):
    _, shown, rows = ranked
    found = record(rows, "words", "wrong")
    assert found["mean"] == "" and found["finished"] == "0" and found["planned"] == "2"
    assert found["failures"].count("nothing_of_that_name") == 2  # of each lr; no lr is left for the seeds
    assert "Failures:" in shown.stdout and "| wrong |" in shown.stdout


def test_the_markdown_has_a_row_for_each_and_a_picture_is_drawn(ranked):
    root, shown, rows = ranked
    text = (root / "table.md").read_text()
    assert text.strip() == shown.stdout.strip()
    for r in rows:
        line = next(x for x in text.splitlines() if x.startswith(f"| {r['row']} |"))
        assert len(line.split("|")) >= 10
    mezo = record(rows, "words", "mezo")
    assert f"| mezo | {float(mezo['mean']):.3f} ± {float(mezo['sd']):.3f} |" in text
    for task in FILE["tasks"]:
        assert (root / f"curve-{task}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("row", ["mezo", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_after_others_has_the_bits_of_a_run_alone(ranked, tmp_path, row):
    """The last runs of the bench came after runs of LoRA, of AdamW, and failures, in one process with one kept model."""
    root, _, _ = ranked
    folder = next(f for f in results(root, "short", row) if "part=" not in f.name and "seed=2" in f.name)
    (tmp_path / "same.yaml").write_text((folder / "config.yaml").read_text().replace(str(folder), "alone"))
    words = ["train", "--config", "same.yaml", f"output_dir={tmp_path / 'alone'}"]
    done = subprocess.run(zoft_command(*words), cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alone" / "ledger").read_bytes() == (folder / "ledger").read_bytes()
    after = json.loads((tmp_path / "alone" / "result.json").read_text())["after"]
    assert after == json.loads((folder / "result.json").read_text())["after"]


def test_nothing_finished_is_run_again_and_failures_are_tried_once_more(ranked, monkeypatch):
    root, _, rows = ranked
    monkeypatch.chdir(root.parents[1])
    before = {p: p.stat().st_mtime_ns for p in root.glob("*/result.json")}
    plan = invoke("--dry-run").stdout
    shown = invoke("--tasks", "words")
    assert {p: p.stat().st_mtime_ns for p in root.glob("*/result.json")} == before
    assert shown.stderr.count("failed words, wrong") == 2 and "done" not in shown.stderr
    assert f"{2 * (3 + 2 * 4 + 2 + 4)} runs" in plan
    few = invoke("--only", "mezo,untrained", "--tasks", "words", "--seeds", "1").stdout
    assert "| mezo |" in few and "lora" not in few and "short" not in few
    with (root / "table.csv").open() as file:
        (only,) = [r for r in csv.DictReader(file) if r["row"] == "mezo"]
    assert only["finished"] == "1" and only["lr"] == record(rows, "words", "mezo")["lr"]


@pytest.mark.slow
def test_killed_with_its_workers_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """--jobs 2 is killed while runs are under way; the same command in one process ends as one that never stopped."""
    rows = {"mezo": FILE["rows"]["mezo"], "one": {"estimator": "one_sided", "lr": 1e-3}}
    changes = {
        "rows": rows,
        "frame": {},
        "tasks": {"words": {}},
        "forwards": 4000,
        "lr_forwards": 4000,
        "lr_factors": [1, 2],
        "reach": {},
    }
    place(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "cut"
    command = zoft_command("bench", "--config", "ranks.yaml", "--jobs", "2", "output_dir=cut")
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            under_way = [p for p in root.glob("*/ledger") if not (p.parent / "result.json").exists()]
            if under_way and len(list(root.glob("*/result.json"))) >= 1:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = len(list(root.glob("*/result.json")))
    assert 1 <= done < 8 and under_way, "killed in the middle"
    shown = invoke("output_dir=cut")
    assert shown.stderr.count("done") == 8 - done
    invoke("output_dir=whole")
    ledgers = [
        {p.parent.name: p.read_bytes() for p in (tmp_path / f).glob("*/ledger")} for f in ("cut", "whole")
    ]
    assert len(ledgers[0]) == 8 and ledgers[0] == ledgers[1]
    tables = [list(csv.DictReader(open(tmp_path / f / "table.csv"))) for f in ("cut", "whole")]
    timed = ("seconds", "peak_memory_gb")
    assert [{k: v for k, v in r.items() if k not in timed} for r in tables[0]] == [
        {k: v for k, v in r.items() if k not in timed} for r in tables[1]
    ]


def test_a_kept_model_is_handed_out_as_copies(tmp_path):
    tiny.save(tmp_path / "m")
    alone, _ = load_model(str(tmp_path / "m"))
    want = {n: p.clone() for n, p in alone.named_parameters()}
    with keeping_a_model():
        first, _ = load_model(str(tmp_path / "m"))
        for p in first.parameters():
            p.data.add_(1.0)
        first.config.vocab_size = 3
        second, _ = load_model(str(tmp_path / "m"))
        assert second is not first and second.config.vocab_size == tiny.VOCAB
        assert all(torch.equal(p, want[n]) for n, p in second.named_parameters())
        assert second.checkpoint_dtype == alone.checkpoint_dtype


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"rowz": {}}, [], "rowz: no key of a bench file; did you mean rows?"),
        ({"seeds": []}, [], "seeds: a bench file needs it"),
        ({"seeds": [0, 1]}, [], "lr_seed=0"),
        ({"forwards": 3}, [], "forwards=3: a step takes 16"),
        ({"rows": {"x": {"nois": "rademacher"}}}, [], "row x, task words: unknown key nois"),
        ({"rows": {"x": {"noise": "rank9"}}}, [], "row x, task words: noise=rank9"),
        ({"rows": {"x": {"steps": 3}}}, [], "steps: the bench says it"),
        ({"rows": {"x": {"recipe": "./mine.py"}}}, [], "recipe: not from a file"),
        ({"rows": {"x": {"reward": "a.py:f"}}}, [], "reward: not from a file"),
        ({"rows": {"x": {"lr_factors": [0]}}}, [], "lr_factors: [0]"),
        ({"frame": {"x": {"method": "adamw"}}}, [], "method: adamw"),
        ({"frame": {"x": {"method": "zero-shot", "lr": 1}}}, [], "lr: does nothing"),
        ({"reach": {"wordz": 0.9}}, [], "reach: wordz"),
        ({}, ["--only", "mezzo"], "--only mezzo"),
        ({}, ["--tasks", "word"], "did you mean words?"),
        ({}, ["--seeds", "3"], "--seeds 3"),
        ({}, ["--jobs", "0"], "--jobs 0"),
        ({}, ["steps=4"], "steps=4"),
        ({}, ["model=nowhere"], "model=nowhere"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(tmp_path, monkeypatch, changes, words, said):
    monkeypatch.chdir(place(tmp_path, **changes))
    done = invoke(*words, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()


def test_null_takes_a_key_of_base_away_and_rows_win_over_tasks(tmp_path, monkeypatch):
    base = {"config": "mine.yaml", "clip": 3.0, "momentum": 0.5, "noise": "rademacher"}
    tasks = {"words": {"momentum": 0.25, "noise": "gaussian"}}
    rows = {"a": {"clip": None, "momentum": 0.75}, "b": {}}
    monkeypatch.chdir(place(tmp_path, base=base, tasks=tasks, rows=rows, reach={}))
    found = {e.row: next(iter(e.runs.values()))[0].config for e in read_bench("ranks.yaml").entries if e.runs}
    assert (found["a"].clip, found["a"].momentum, found["a"].noise) == (None, 0.75, "gaussian")
    assert (found["b"].clip, found["b"].momentum) == (3.0, 0.25)
    with pytest.raises(UserError, match="no such bench file"):
        read_bench("bench/estimator", (), Wanted())


def test_the_packaged_bench_has_the_frame_and_equal_forwards():
    for name in [f"bench/{p.stem}" for p in (ROOT / "configs" / "bench").glob("*.yaml")]:
        bench = read_bench(name)
        methods = {e.frame[0].ask.method for e in bench.entries if e.frame}
        assert {"zero-shot", "linear-probe", "first-order", "checkpointed-lora"} <= methods
        for e in bench.entries:
            for runs in e.runs.values():
                assert all(0.97 * 64000 <= j.forwards <= 64000 for j in (*runs, *e.search.values()))


def test_help_is_one_screen():
    done = subprocess.run(
        [sys.executable, "-m", "zoft", "bench", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "--worker" not in done.stdout and len(done.stdout.splitlines()) < 40
