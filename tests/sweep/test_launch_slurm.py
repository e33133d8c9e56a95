"""A sweep on a real Slurm: an array of 12, with everything that goes wrong on a cluster."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.errors import UserError
from zoft.ledger import log
from zoft.sweep import job, plan
from zoft.sweep import slurm as launch_slurm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4000  # of the two jobs that are stopped half-way
LONG = [f"steps: {STEPS}\nlr: 1e-3", f"steps: {STEPS}\nlr: 2e-3"]
SHORT = [f"steps: 10\nlr: {i}e-3" for i in range(1, 9)]
FAILS = "steps: 10\nlr: 3e38"  # its losses are not finite
CONFIGS = [*LONG, *SHORT, FAILS, "steps: 11"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.place(folder, "max_length: 32\nbatch_size: 1\ndevice: cpu\nsave_model: false\nmax_skipped: 1\n")
    shared = (folder / "mine.yaml").read_text()
    for i, text in enumerate(CONFIGS):
        (folder / f"c{i}.yaml").write_text(f"{shared}{text}\n")
    return folder


def until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not get there"
        time.sleep(0.02)


def halfway(folder, left):
    """Stop a job once it has some steps."""
    if job.steps(folder) >= 5:
        done = subprocess.run(left.pop(folder.name), capture_output=True, text=True)
        assert done.returncode == 0, done


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_an_array_of_12_with_all_that_goes_wrong(place, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.chdir(place)
    with slurm.cluster() as env:
        for name in ("SLURM_CONF", "PYTHONPATH"):
            monkeypatch.setenv(name, {**env, "PYTHONPATH": str(ROOT)}[name])
        root = Path("s")
        names = [f"c{i}.yaml" for i in range(12)]
        command = [sys.executable, "-m", "zoft", "sweep", "--config", ",".join(names), "output_dir=s"]
        command += ["--launcher", "slurm", "slurm.time=10", "slurm.extra={comment: a sweep}"]

        parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until(lambda: len(launch_slurm.submitted(root)) == 12)
        ids = launch_slurm.submitted(root)
        assert len({i.partition("_")[0] for i in ids.values()}) == 1, ids
        jobs = list(plan.read_plan(root)["jobs"])
        stopped, short, fails, waits = jobs[:2], jobs[2:10], jobs[10], jobs[11]
        shown = slurm.said(["scontrol", "-o", "show", "job", ids[stopped[0]]], env)
        assert "Comment=a sweep" in shown and "TimeLimit=00:10:00" in shown, shown

        # One is cancelled while it waits; two stop half-way, one pre-empted, one by the warning of its time limit,
        # which Slurm sends to the steps of a job and not to its batch script.
        done = CliRunner().invoke(app, ["sweep", "--cancel", "s", waits.rpartition("-")[2]])
        assert done.exit_code == 0 and "1 jobs cancelled" in done.output, done.output
        left = dict(zip(stopped, (["scontrol", "requeue", ids[stopped[0]]],
                                  ["scancel", "--signal=USR2", f"{ids[stopped[1]]}.0"])))  # fmt: skip
        until(lambda: [halfway(root / name, left) for name in list(left)] and not left)
        until(lambda: all(launch_slurm.queue(root).get(n) == "PENDING" for n in stopped))
        assert {job.job_state(root / n) for n in stopped} == {"stopped"}
        for name in stopped:  # Slurm has them wait for two minutes
            subprocess.run(["scontrol", "update", f"JobId={ids[name]}", "StartTime=now"], env=env)

        until(lambda: any((root / n / "result.json").exists() for n in short))
        parent.kill()
        said = parent.communicate()[0]
        assert re.search(r"Slurm job \d+: 12 jobs", said), said

        # The same command waits for what is in the queue; nothing is submitted twice.
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 2, again.stdout + again.stderr
        assert f"error: 1 of 12 jobs did not finish, {fails}: lr=3e+38" in again.stderr, again.stderr
        now = launch_slurm.submitted(root)
        assert [n for n in ids if now[n] != ids[n]] in ([], [fails]), (ids, now)

    states = [job.job_state(root / n) for n in jobs]
    assert states == ["done"] * 10 + ["failed", "cancelled"]
    assert "not finite" in job.job_record(root / fails)["error"]
    assert [job.job_record(root / n).get("attempts") for n in (*jobs[:3], waits)] == [2, 2, 1, None]
    for name in stopped:
        text = (root / name / "job.log").read_text()
        assert re.search(rf"replaying \d+ of {STEPS} steps from the ledger", text), text
    # The steps of both attempts are those of a run that nobody stopped, as far as it goes here.
    some = job.job_record(root / stopped[1])["steps"] + 200
    keys = ["threads=1", f"steps={some}", "output_dir=whole"]
    done = CliRunner().invoke(app, ["train", "--config", "c1.yaml", *keys])
    assert done.exit_code == 0, done.output
    ours, whole = (
        log.read_ledger(folder / "ledger").records for folder in (root / stopped[1], Path("whole"))
    )
    assert len(ours) == STEPS and len(whole) == some and ours[:some] == whole
    rows = json.loads(CliRunner().invoke(app, ["sweep", "--results", "s", "--json"]).output)
    assert len(rows) == 10 and {r["steps"] for r in rows} == {10, STEPS}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("90", 90),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-12:00:00", 2160),
        ("1-12", 2160),
        ("1-0:30", 1470),
        ("0:30", 1),
    ],
)
def test_time_limits_as_slurm_writes_them(text, wanted):
    assert launch_slurm.minutes(text) == wanted


def test_options_come_from_a_file_and_the_command_line(tmp_path):
    file = tmp_path / "slurm.yaml"
    file.write_text("partition: gpu\ntime: 4:00:00\nextra: {constraint: a100}\n")
    found = launch_slurm.options(str(file), ["slurm.time=2:00:00", "slurm.gpus=1", "slurm.mem=32G"])
    assert launch_slurm.options(str(file), []).time == "4:00:00"
    assert (found.partition, found.time, found.gpus, found.mem) == ("gpu", "2:00:00", 1, "32G")
    assert found.extra == {"constraint": "a100"}
    for text, said in (
        ("slurm.partiton=x", "did you mean slurm.partition"), ("slurm.gpus=two", "expected int"),
        ("slurm.time=soon", "slurm.time=soon"), ("slurm.extra=x", "expected dict"), ("slurm.cpus=-1", "expected int"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            launch_slurm.options(None, [text])


def test_a_machine_without_slurm(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        launch_slurm.require()
