"""Reports of folders as runs leave them: means and deviations against statistics of the numbers themselves."""

import csv
import json
import statistics

import pytest
from typer.testing import CliRunner

from zoft import report
from zoft.cli import app
from zoft.compose import compose, to_yaml


def folder(place, name, seed, after=None, *, steps=20, method=None, words=(), evals=()):
    """A run's folder: finished with `after`, or stopped with the evaluations it has."""
    path = place / name
    path.mkdir(parents=True)
    config = compose("mezo/reviews", [f"seed={seed}", f"steps={steps}", *words])
    (path / "config.yaml").write_text(to_yaml(config))
    rows = [{"step": 0, "eval": {"accuracy": 0.5, "loss": 1.0}}]
    rows += [{"step": s, "loss": 1 / (s + 1)} for s in range(steps if after else steps // 2)]
    rows += [{"step": s, "eval": e} for s, e in evals]
    if method:
        (path / "baseline.json").write_text(json.dumps({"method": method}))
        rows = []
    if after:
        rows.append({"step": 0 if method else steps, "eval": after})
        (path / "result.json").write_text(json.dumps({
            "steps": 0 if method else steps, "forwards": 0 if method else 32 * steps, "train_seconds": 10.0 + seed,
            "peak_memory_gb": 1.5, "before": {} if method else {"accuracy": 0.5, "loss": 1.0}, "after": after,
            "output_dir": str(path), **({"method": method} if method else {}),
        }))  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    for seed, accuracy in enumerate((0.7, 0.8, 0.75)):
        folder(tmp_path, f"runs/a{seed}", seed, {"accuracy": accuracy, "loss": 0.5 + seed / 10, "n": 9},
               evals=[(10, {"accuracy": accuracy - 0.1, "loss": 0.6})])  # fmt: skip
    folder(tmp_path, "runs/b", 0, {"accuracy": 0.6, "loss": 0.4, "n": 9}, words=["lr=1e-4"])
    folder(tmp_path, "runs/stopped", 3, evals=[(5, {"accuracy": 0.55, "loss": 0.9})])
    folder(tmp_path, "runs/base/zero", 0, {"accuracy": 0.51, "loss": 1.0, "n": 9}, method="zero-shot")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    done = CliRunner().invoke(app, ["report", *words])
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    return done.output


def cells(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(split[0], row)) for row in split[2:]}


def test_seeds_become_mean_and_deviation_and_other_keys_a_row_of_their_own(place):
    table = cells(run("runs"))
    assert set(table) == {"untrained", "mezo lr=0.0005", "mezo lr=0.0001", "zero-shot"}
    mean, sd = statistics.mean((0.7, 0.8, 0.75)), statistics.stdev((0.7, 0.8, 0.75))
    assert (
        table["mezo lr=0.0005"]["accuracy"] == f"{mean:.4f} ± {sd:.4f}"
        and table["mezo lr=0.0005"]["n"] == "3"
    )
    assert table["mezo lr=0.0001"]["accuracy"] == "0.6000" and table["mezo lr=0.0001"]["forwards"] == "640"
    assert table["untrained"]["accuracy"] == "0.5000" and table["zero-shot"]["accuracy"] == "0.5100"
    assert table["mezo lr=0.0005"]["seconds"] == "11" and table["mezo lr=0.0005"]["peak GB"] == "1.50"


def test_unfinished_runs_are_said_and_left_out(place):
    out = run("runs/a0", "runs/stopped")
    assert "not in the table: runs/stopped, 10 of 20 steps; at step 5: accuracy 0.55, loss 0.9" in out
    assert cells(out)["mezo"]["n"] == "1"


def test_csv_and_png(place):
    run(
        "runs",
        "--metrics",
        "accuracy",
        "--csv",
        "out/all.csv" if (place / "out").mkdir() is None else "",
        "--png",
        "c.png",
    )
    found = {row["name"]: row for row in csv.DictReader(open("out/all.csv"))}
    assert float(found["mezo lr=0.0005"]["accuracy_sd"]) == pytest.approx(0.05)
    assert found["mezo lr=0.0005"]["seeds"] == "0 1 2" and found["mezo lr=0.0005"]["unfinished"] == "1"
    assert (place / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_are_against_forwards():
    from zoft import report_plot

    assert report_plot.curve({0: {"auc": 0.5}, 10: {"loss": 1.0}, 20: {"auc": 0.7}}, "auc", 32) == [
        (0, 0.5),
        (640, 0.7),
    ]
    assert report_plot.smooth({0: 1.0, 1: 3.0}, 8) == [(8, 1.0), (16, 3.0)]
    long = report_plot.smooth({s: float(s) for s in range(60)}, 2)  # windows of three
    assert (long[0][0], long[-1][0]) == (6, 120) and (long[0][1], long[-1][1]) == pytest.approx((1.0, 58.0))


def test_mistakes_are_one_line(place):
    for words, said in (
        (["nowhere"], "no run's folder"), (["runs", "--metrics", "accuray"], "not in these evaluations"),
        (["runs", "--png", "c.txt"], ".png"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["report", *words])
        assert done.exit_code == 2 and said in done.stderr, (words, done.stderr, done.exception)


def test_a_run_given_twice_counts_once(place):
    assert len(report.folders(["runs/a0", "runs", "./runs/a0"])) == 6
