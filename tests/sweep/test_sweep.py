"""Sweeps from plan to results: what is checked, how jobs are named, and what is told from the disk alone."""

import csv
import fcntl
import io
import json
import os
import statistics
import time

import pytest
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.compose import to_yaml
from zoft.errors import UserError
from zoft.method.configured import compose, load_run
from zoft.sweep import job, plan, plot, view

LINE = "task: {name: local, train: data.jsonl, prompt: '{text} ', label: label, choices: {a: a, b: b}}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "data.jsonl").write_text('{"text": "x", "label": "a"}\n')
    (tmp_path / "mine.yaml").write_text(f"model: tiny\nsteps: 6\nlr: 1e-2\n{LINE}")
    monkeypatch.setattr("zoft.models.load.check_model", lambda source: None)  # the folder stands for a model
    return tmp_path


def zoft(*words):
    return CliRunner().invoke(app, ["sweep", *words])


def test_names_tell_configs_apart_and_stay(place):
    made = plan.plan("mine.yaml", ["lr=1e-2,1e-3", "seed=range(0,2)"])
    names = list(made.jobs)
    assert [n.rpartition("-")[0] for n in names] == [
        f"lr={lr},seed={s}" for lr in ("0.01", "0.001") for s in (0, 1)
    ]
    assert len({n.rpartition("-")[2] for n in names}) == 4
    # Neither where jobs are, nor the machine, nor the way a number is written makes another job.
    again = plan.plan(
        "mine.yaml", ["lr=0.01,0.001", "seed=0,1", "output_dir=elsewhere", "device=cpu", "threads=3"]
    )
    assert list(again.jobs) == names and str(again.root) == "elsewhere"
    assert set(plan.plan("mine.yaml", ["lr=1e-2,1e-3", "seed=0,1", "eps=1e-2"]).jobs).isdisjoint(names)
    # A value more is the same sweep; other keys are another one.
    roots = [
        plan.plan("mine.yaml", w).root
        for w in (["lr=1,2"], ["lr=1,2,3"], ["lr=1,2", "eps=1e-2"], ["eps=1,2"])
    ]
    assert roots[0] == roots[1] and len(set(roots)) == 3
    assert all(str(r).startswith("runs/sweep-mine-") for r in roots)
    threads = plan.plan("mine.yaml", ["threads=1,2"]).jobs
    assert len({n.rpartition("-")[2] for n in threads}) == 2
    (config, values) = made.jobs[names[1]]
    assert (config.lr, config.seed, values) == (1e-2, 1, {"lr": "0.01", "seed": "1"})


def test_a_config_of_several_is_a_dimension(place):
    made = plan.plan("glob(*/reviews,exclude=[qzo/*,lora_zo/*,node/*])", ["lr=1e-4,1e-3"])
    assert [c.recipe for c, _ in made.jobs.values()] == ["mezo", "mezo", "sparse_mezo", "sparse_mezo"]
    assert str(made.root).startswith("runs/sweep-configs-")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["lr=1e-2,-1"], ["lr=-1: must be ≥ 0"]),
        (["lr=1e-2,1e-3", "steps=5,0"], ["lr=0.01 steps=0: steps=0: must be ≥ 1"]),
        (["lr=1e-2", "lr=1,2"], ["lr is given twice"]),
        (["lrr=1,2"], ["lrr=1", "unknown key lrr", "did you mean lr?"]),
        (["--lr", "1,2"], ["--lr: keys take no dashes"]),
        (["lr=interval(1,2)"], ["--trials N"]),
        (["task.train=data.jsonl,none.jsonl"], ["none.jsonl"]),
        (["lr=1,2", "slurm.time=3"], ["--launcher slurm"]),
        (["lr=1,2", "--launcher", "pbs"], ["use local or slurm"]),
        (["lr=1,2", "--jobs", "0"], ["--jobs 0"]),
        (["lr=1,2", "--watch"], ["--watch", "a new sweep"]),
        (["lr=1,2", "--metric", "loss", "--direction", "up"], ["minimize or maximize"]),
        (["--trials", "3"], ["nothing to search"]),
        (["lr=range(0,1,1e-5)"], ["100000 configs"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(place, words, parts):
    before = sorted(p.name for p in place.iterdir())
    done = zoft("--config", "mine.yaml", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    assert all(p in done.stderr for p in parts), done.stderr
    assert sorted(p.name for p in place.iterdir()) == before


def test_a_folder_that_is_something_else(place):
    (place / "run").mkdir()
    (place / "run" / "ledger").touch()
    done = zoft("--config", "mine.yaml", "lr=1,2", "output_dir=run")
    assert done.exit_code == 2 and "holds a run" in done.stderr
    for way in ("--status", "--results", "--cancel"):
        done = zoft(way, "run")
        assert done.exit_code == 2 and "not a sweep's folder" in done.stderr
    (place / "run" / "sweep.json").write_text('{"jobs": []}')
    assert "damaged" in zoft("--status", "run").stderr


def written(place, *words):
    made = plan.plan("mine.yaml", ["output_dir=s", *words])
    with plan.hold(made.root):
        plan.write_down(made, list(made.jobs))
    return made.root, list(made.jobs)


def finish(folder, accuracy, **more):
    after = {"accuracy": accuracy, "loss": 1 - accuracy, "n": 10}
    (folder / "result.json").write_text(
        json.dumps(
            {"steps": 6, "before": {**after, "accuracy": 0.5}, "after": after, "train_seconds": 2.0, **more}
        )
    )


def test_a_job_is_a_run_that_can_be_resumed_before_it_began(place):
    root, names = written(place, "lr=1e-2,1e-3")
    config = load_run(root / names[1])
    assert (config.lr, config.task.train, config.model) == (
        1e-3,
        str(place / "data.jsonl"),
        str(place / "tiny"),
    )
    assert config.output_dir == str((root / names[1]).absolute())
    mine = compose("mine.yaml", ["lr=1e-3"])
    assert plan.job_name(mine, {"lr": "0.001"}) == names[1]


def test_states_are_told_from_the_disk(place):
    root, names = written(place, "seed=range(0,7)")
    jobs = [root / n for n in names]
    finish(jobs[0], 0.5)
    lock = job.hold(jobs[1])
    assert job.hold(jobs[1]) is None
    (jobs[1] / "job.json").write_text(json.dumps({"attempts": 1, "started": time.time() - 10, "steps": 0}))
    (jobs[1] / "metrics.jsonl").write_text(
        '{"step": 0, "eval": {}}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo'
    )
    (jobs[2] / "job.json").write_text(json.dumps({"attempts": 1, "code": 75}))
    (jobs[3] / "job.log").write_bytes(b"50%\rTraceback\n  File x\nValueError: bad\n\n")
    job.ended(jobs[3], 1)
    (jobs[4] / "cancelled").touch()
    (jobs[5] / "job.json").write_text(json.dumps({"attempts": 1}))  # its machine went away
    states = [r["state"] for r in view.status(root)]
    assert states == ["done", "running", "stopped", "failed", "cancelled", "stopped", "pending"]
    rows = view.status(root)
    assert (rows[1]["step"], rows[1]["steps"], rows[1]["loss"]) == (2, 6, 0.5)
    assert rows[1]["left"] == pytest.approx(4 * 10 / 2, rel=0.1)  # 4 steps left, 2 took 10 s
    assert view.in_all(rows) == pytest.approx(20 + 3 * 6 * 5, rel=0.1)  # and three jobs of 6 steps
    text = view.status_text(root)
    assert (
        "ValueError: bad" in text and "1 done, 1 running, 2 stopped, 1 failed, 1 cancelled, 1 pending" in text
    )
    os.close(lock)
    assert job.job_state(jobs[1]) == "stopped"
    said = []
    assert plan.missing(root, names, said.append) == [names[i] for i in (1, 2, 5, 3, 6)]
    assert f"delete {jobs[4]}/cancelled" in said[1]


@pytest.mark.parametrize(
    "code, log, said",
    [
        (2, "step 1\nerror: lr: too high\nexit\n", "lr: too high"),
        (1, "Traceback\nKeyError: 'x'\n", "KeyError: 'x'"),
        (-9, "step 1\n", "killed by SIGKILL, out of memory perhaps"),
        (-11, "", "killed by SIGSEGV"),
        (3, "", "exit code 3"),
    ],
)
def test_the_last_line_of_a_failure(tmp_path, code, log, said):
    (tmp_path / "job.log").write_text(log)
    job.ended(tmp_path, code)
    assert job.job_record(tmp_path)["error"] == said and job.job_state(tmp_path) == "failed"
    job.ended(tmp_path, code, signalled=True)
    assert job.job_state(tmp_path) == "stopped"


def test_results_table_csv_plot_and_best(place):
    root, names = written(place, "lr=1e-2,1e-3,1e-4", "noise=gaussian,rademacher", "seed=0,1")
    accuracy = {n: 0.1 + 0.07 * i for i, n in enumerate(names)}
    for name in names[:-1]:
        finish(root / name, accuracy[name])
    finish(root / names[-1], float("nan"))  # written as NaN, and never the best
    text = view.results_text(root)
    lines = text.splitlines()
    assert lines[0].split() == ["lr", "noise", "seed", "accuracy", "(before)", "loss", "n", "seconds"]
    assert lines[1].split()[:5] == ["0.0001", "rademacher", "0", "0.8", "(0.5)"] and len(lines) > 12
    pair = [accuracy[n] for n in names[:2]]
    assert f"{statistics.mean(pair):.4g} ± {statistics.stdev(pair):.4g}" in text
    assert "best accuracy 0.8: lr=0.0001 noise=rademacher seed=0" in text
    rows = list(csv.DictReader(io.StringIO((root / "results.csv").read_text())))
    assert len(rows) == 12 and rows[0]["after.accuracy"] == "0.8" and rows[0]["lr"] == "0.0001"
    best = compose(str(root / "best.yaml"), [])
    want = compose("mine.yaml", ["lr=1e-4", "noise=rademacher", "seed=0"])
    want.task.train, want.model, want.output_dir = (
        str(place / "data.jsonl"),
        str(place / "tiny"),
        best.output_dir,
    )
    assert to_yaml(best) == to_yaml(want) and best.output_dir == "runs/best-seed0"
    assert view.best(view.results(root), "loss")["name"] == names[-2]
    assert view.best(view.results(root), "accuracy", "minimize")["name"] == names[0]
    with pytest.raises(UserError, match="there are accuracy, loss, n"):
        view.best(view.results(root), "auc")
    pytest.importorskip("matplotlib")
    assert plot.plot(root, place / "p" / "x.png") and (place / "p" / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(zoft("--results", "s", "--json").output)[0]["after"]["accuracy"] == 0.1


def test_another_metric_leaves_the_best_config_alone(place):
    root, names = written(place, "lr=1e-2,1e-3")
    for name, accuracy, auc in zip(names, (0.7, 0.6), (0.8, 0.9)):
        finish(root / name, accuracy, after={"accuracy": accuracy, "auc": auc, "loss": 1 - accuracy, "n": 10})
    assert "(s/best.yaml)" in zoft("--results", "s").output
    first = (root / "best.yaml").read_bytes()
    assert first.startswith(b"# highest accuracy 0.7, of lr=0.01")
    for words, lr in (
        (["--metric", "auc"], "0.001"),
        (["--metric", "accuracy", "--direction", "minimize"], "0.001"),
    ):
        said = zoft("--results", "s", *words).output
        assert f": lr={lr} (s/best-{words[1]}.yaml)" in said and (root / "best.yaml").read_bytes() == first
    assert compose("s/best-auc.yaml", []).lr == 1e-3
    assert "(s/best.yaml)" in zoft("--results", "s", "--metric", "accuracy").output
    # The sweep itself, told to go by auc, has a best.yaml by auc; --results alone goes by that from then on.
    zoft("--config", "mine.yaml", "lr=1e-2,1e-3", "output_dir=s", "--metric", "auc")
    second = (root / "best.yaml").read_bytes()
    assert second.startswith(b"# highest auc 0.9, of lr=0.001")
    assert "best auc 0.9: lr=0.001 (s/best.yaml)" in zoft("--results", "s").output
    assert (root / "best.yaml").read_bytes() == second


def test_it_is_said_where_no_job_is_better_than_before_training(place):
    root, names = written(place, "lr=1e-2,1e-3")
    for name in names:
        finish(root / name, 0.5)
    line = "no job has a better accuracy than before training"
    assert zoft("--results", "s").output.splitlines()[-1] == line
    finish(root / names[1], 0.6)
    assert line not in zoft("--results", "s").output
    assert "no job has a better loss" in zoft("--results", "s", "--metric", "loss").output


def test_names_are_not_joined_by_a_line(place, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import image
    from matplotlib import pyplot as plt

    root, names = written(place, "noise=gaussian,rademacher", "seed=0,1")
    for i, name in enumerate(names):
        finish(root / name, 0.6 + 0.05 * i)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot.plot(root, "x.png")
    drawn = [x for x in plt.gcf().axes[0].get_lines() if x.get_label() != "before training"]
    assert drawn and all(x.get_linestyle() == "None" for x in drawn)
    ink = image.imread("x.png")[..., :3].min(2) < 0.9  # [height, width]
    assert not (ink[:4].any() or ink[-4:].any() or ink[:, :4].any() or ink[:, -4:].any())
    plt.figure(plt.gcf().number).clear()


def test_cancel_marks_what_it_is_told(place):
    root, names = written(place, "seed=range(0,3)")
    finish(root / names[0], 0.5)
    assert "done" in zoft("--cancel", "s", names[0]).stderr
    assert "no job of it" in zoft("--cancel", "s", "nonsense").stderr
    assert zoft("--cancel", "s", names[1].rpartition("-")[2]).exit_code == 0
    assert [job.job_state(root / n) for n in names] == ["done", "cancelled", "pending"]
    assert "2 jobs cancelled" in zoft("--cancel", "s").output and (root / "cancelled").exists()


def test_one_parent_at_a_time(place):
    root, _ = written(place, "seed=range(0,2)")
    with (root / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = zoft("--config", "mine.yaml", "seed=range(0,2)", "output_dir=s")
    assert done.exit_code == 2 and "another `zoft sweep` is at work" in done.stderr


def test_a_sweep_that_is_done_runs_nothing(place):
    root, names = written(place, "seed=range(0,2)")
    for name in names:
        finish(root / name, 0.5)
    done = zoft("--config", "mine.yaml", "seed=range(0,2)", "output_dir=s")
    assert done.exit_code == 0 and "2 jobs, 2 done" in done.output and "started" not in done.output
