"""Reports of folders as runs leave them: means and deviations against statistics of the numbers themselves."""

import csv
import json
import shutil
import statistics

import pytest
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.compose import to_yaml
from zoft.method.configured import compose
from zoft.report import runs
from zoft.report import table as report


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
    from zoft.report import plot

    assert plot.curve({0: {"auc": 0.5}, 10: {"loss": 1.0}, 20: {"auc": 0.7}}, "auc", 32) == [
        (0, 0.5),
        (640, 0.7),
    ]
    assert plot.smooth({0: 1.0, 1: 3.0}, 8) == [(8, 1.0), (16, 3.0)]
    long = plot.smooth({s: float(s) for s in range(60)}, 2)  # windows of three
    assert (long[0][0], long[-1][0]) == (6, 120) and (long[0][1], long[-1][1]) == pytest.approx((1.0, 58.0))


def test_mistakes_are_one_line(place):
    for words, said in (
        (["nowhere"], "no run's folder"), (["runs", "--metrics", "accuray"], "not in these evaluations"),
        (["runs", "--png", "c.txt"], ".png"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["report", *words])
        assert done.exit_code == 2 and said in done.stderr, (words, done.stderr, done.exception)


def test_a_run_given_twice_counts_once(place):
    assert len(runs.folders(["runs/a0", "runs", "./runs/a0"])) == 6


OWN = ["task=local", "task.train=my.csv", "task.prompt={a} | {b}\\nIs that so?\\n", "task.label=l",
       'task.choices={n: " no", p: " yes"}']  # fmt: skip


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Nine kinds of runs, one of them twice in all that is short, and two that are not finished."""
    after = {"accuracy": 0.6, "loss": 0.4, "n": 9}
    words = {
        "own": OWN, "trec": ["task=trec"], "plain": [], "fast": ["lr=1e-2", "eps=1e-2", "q=4", "batch_size=4"],
        "slow": ["lr=1e-6", "schedule=cosine", "warmup=0.1", "weight_decay=0.1", "momentum=0.9", "task.num_train=99"],
        "other": [*OWN[:-1], 'task.choices={n: " n", p: " y"}'],
    }  # fmt: skip
    (tmp_path / "my.csv").write_text("a,b,l\n")
    monkeypatch.chdir(tmp_path)
    for name, keys in words.items():
        folder(tmp_path, f"runs/{name}", 0, after, words=keys)
    folder(tmp_path, "runs/base", 0, after, method="zero-shot")
    folder(tmp_path, "runs/pipe|d", 0, words=[*OWN, "lr=3e-3"])
    folder(tmp_path, "runs/half", 0, words=["lr=2e-3"], evals=[(5, {"accuracy": 0.55, "loss": 0.9})])
    return tmp_path


def test_names_of_mixed_runs_are_short_and_each_its_own(mixed):
    some = report.groups([runs.read(f) for f in runs.folders(["runs"])])
    names = {g.runs[0].folder.name: g.name for g in some}
    assert len(set(names.values())) == len(names) == 9 and max(map(len, names.values())) <= 60, names
    assert names["trec"] == "mezo task=trec lr=0.0005 eps=0.001" and names["base"] == "zero-shot task=reviews"
    assert "task=my.csv" in names["own"] and "(own)" in names["own"] and "(slow)" in names["slow"], names
    assert all(name.isprintable() for name in names.values())


def test_a_table_of_mixed_runs_has_a_line_for_each_finished_one(mixed):
    out = run("runs", "--csv", "all.csv")
    lines = [line.replace("\\|", "") for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + 7 and len({line.count("|") for line in lines}) == 1
    assert all(row["n"] != "0" for row in cells(out).values())
    assert sum(line.startswith("not finished") for line in out.splitlines()) == 2
    found = [row["folders"] for row in csv.DictReader(open("all.csv"))]
    assert sorted(found) == sorted(
        ["", *(f"runs/{n}" for n in "own trec plain fast slow other base".split())]
    )
    out = run("runs/half")
    assert out.startswith("not finished") and "|" not in out


def test_the_picture_holds_the_whole_legend(mixed):
    from matplotlib import image

    for names in (["runs"], ["runs/slow"], ["runs/half"]):
        run(*names, "--png", "c.png")
        ink = image.imread("c.png")[..., :3].min(2) < 0.9  # [height, width]
        edge = ink[:4].any() or ink[-4:].any() or ink[:, :4].any() or ink[:, -4:].any()
        assert not edge and ink.any(), names


def test_a_stopped_run_cuts_no_curve_short_and_baselines_are_named(place, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder(place, "runs/early", 0, words=["lr=2e-3"])
    monkeypatch.setattr(plt, "close", lambda figure: None)
    run("runs", "--metrics", "accuracy", "--png", "c.png")
    figure = plt.gcf()
    lines = {
        text.get_text(): handle.get_linestyle()
        for text, handle in zip(figure.legends[0].get_texts(), figure.legends[0].get_lines())
    }
    assert lines == {
        "mezo lr=0.0005 (3 runs)": "-", "mezo lr=0.0001": "-", "zero-shot": "--", "mezo lr=0.002 (not finished)": ":"
    }  # fmt: skip
    metric = figure.axes[1].get_lines()
    assert [list(x.get_xdata()) for x in metric if x.get_linestyle() == "-"] == [[0, 320, 640], [0, 640]]
    plt.figure(figure.number).clear()


def test_a_seed_counts_once_and_a_deviation_is_over_seeds(place):
    """A copy of a run, and runs of one seed whose figures differ, are no further seeds."""
    shutil.copytree("runs/a0", "runs/copy")
    folder(place, "runs/elsewhere", 0, {"accuracy": 0.9, "loss": 0.5, "n": 9}, words=["device=cpu"])
    done = CliRunner().invoke(app, ["report", "runs/a0", "runs/copy", "--csv", "two.csv"])
    (row,) = [r for r in csv.DictReader(open("two.csv")) if r["name"] != "untrained"]
    assert (row["n"], row["seeds"], row["accuracy_sd"], row["unfinished"]) == ("1", "0", "", "0")
    assert "±" not in done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("runs/copy: ") and "runs/a0; counted once" in done.stderr
    done = CliRunner().invoke(app, ["report", "runs", "--csv", "all.csv"])
    found = {r["folders"]: r for r in csv.DictReader(open("all.csv"))}
    three = found["runs/a0 runs/a1 runs/a2"]
    assert float(three["accuracy_sd"]) == pytest.approx(statistics.stdev((0.7, 0.8, 0.75)))
    assert found["runs/elsewhere"]["n"] == "1" and float(found["runs/elsewhere"]["accuracy"]) == 0.9
    assert found["runs/elsewhere"]["name"] != three["name"]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("runs/elsewhere: ")]
    assert "runs/a0" in line and "figures differ" in line


def test_what_rows_differ_in_is_always_to_be_seen(tmp_path, monkeypatch):
    after = {"accuracy": 0.6, "loss": 0.4, "n": 9}
    long = "a/" + "deep/" * 3 + "model-of-a-long-name"
    many = ["model=" + long, "lr=1e-6", "schedule=cosine", "warmup=0.1", "momentum=0.9"]
    words = {
        "plain": [], "many": many, "four": [*many, "train=scales", "bits=4"], "eight": [*many, "train=scales", "bits=8"],
        "x": ["model=x/model"], "y": ["model=y/model"],
        "p": [f"task.prompt={'so ' * 20}p {{text}}"], "q": [f"task.prompt={'so ' * 20}q {{text}}"],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, keys in words.items():
        folder(tmp_path, name, 0, after, words=keys)
    folder(tmp_path, "zero", 0, after, method="zero-shot")
    folder(tmp_path, "zero-4", 0, after, method="zero-shot", words=["train=scales", "bits=4"])
    out = run(*words, "zero", "zero-4", "--csv", "all.csv")
    shown, below = out.split("\n\n")
    names = {r["folders"]: r["name"] for r in csv.DictReader(open("all.csv"))}
    assert len({*names.values()}) == len(names) == 11 and set(names.values()) == {*cells(shown)}
    said = {at: " ".join([name, *(b for b in below.splitlines() if b.startswith(f"{name}: "))])
            for at, name in names.items()}  # fmt: skip
    for at, piece in (
        ("four", "bits=4"), ("eight", "bits=8"), ("many", "momentum=0.9"), ("x", "x/model"), ("y", "y/model"),
        ("p", "so p {text}"), ("q", "so q {text}"), ("zero-4", "bits=4"),
    ):  # fmt: skip
        assert piece in said[at], (at, said)
