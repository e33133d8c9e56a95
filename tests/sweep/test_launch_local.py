"""Jobs on this machine: real processes, stopped, killed, gone on with; GPUs and threads shared out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from zoft.method import configured
from zoft.run.start import train_run as train
from zoft.sweep import job as sweep_job
from zoft.sweep import local

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "1"}
STEPS = 1500
SWEEP = [sys.executable, "-m", "zoft", "sweep", "--config", "mine.yaml", "output_dir=s"]


def until(true, seconds=400):  # jobs take their time to start where others run, too
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not get there"
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.place(tmp_path, "max_length: 32\nbatch_size: 1\nsave_model: false\nmax_skipped: 1\n")


def test_gpus_go_round_and_threads_are_shared():
    assert local.gpus({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ["2", "5"]
    assert local.gpus({"CUDA_VISIBLE_DEVICES": ""}) == local.gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    taken = []
    for _ in range(5):
        taken.append(local.free(["0", "1", "2"], taken, {"0": 900, "1": 10, "2": 500}))
    assert taken == ["1", "2", "0", "1", "2"]
    cores = len(os.sched_getaffinity(0))
    assert set(local.threads(1, {}).values()) == {str(cores)}
    assert set(local.threads(4 * cores, {}).values()) == {"1"}
    assert local.threads(1, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_jobs_are_stopped_orphaned_and_gone_on_with(place):
    """Ctrl-C stops them resumably; kill -9 of the parent leaves them running; nothing is run twice; bits stay."""
    command = [*SWEEP, "lr=1e-3,1e-2,3e38", f"steps={STEPS}", "--jobs", "2"]
    root = place / "s"

    def parent():
        return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def job(lr):
        return next(root.glob(f"lr={lr}-*"))

    first = parent()
    until(
        lambda: (
            (root / "sweep.json").exists() and all(sweep_job.steps(job(lr)) >= 5 for lr in ("0.001", "0.01"))
        )
    )
    first.send_signal(signal.SIGINT)
    said = first.communicate()[0]
    assert first.returncode == 75 and "stopped; the same command goes on" in said, said
    assert {sweep_job.job_state(job(lr)) for lr in ("0.001", "0.01")} == {"stopped"}
    assert sorted(sweep_job.job_record(job(lr))["gpu"] for lr in ("0.001", "0.01")) == ["0", "1"]
    assert all(sweep_job.job_record(job(lr))["code"] == 75 for lr in ("0.001", "0.01"))
    assert configured.load_run(job("0.01")).threads == 1

    second = parent()  # "pid" is written once a process is there

    def begun(lr):
        found = sweep_job.job_record(job(lr))
        return found.get("attempts") == 2 and "pid" in found

    until(lambda: begun("0.001") and begun("0.01"))
    second.kill()
    second.communicate()
    assert {sweep_job.job_state(job(lr)) for lr in ("0.001", "0.01")} == {"running"}

    third = parent()
    said = third.communicate()[0]
    assert third.returncode == 2 and f"1 of 3 jobs did not finish, {job('3e38').name}: lr=3e+38" in said, said
    assert {sweep_job.job_record(job(lr))["attempts"] for lr in ("0.001", "0.01")} == {2}
    assert "not finite" in sweep_job.job_record(job("3e38"))["error"]

    whole = train(
        configured.compose("mine.yaml", ["lr=1e-2", f"steps={STEPS}", "threads=1", "output_dir=whole"])
    )
    records = [(f / "ledger").read_bytes()[-32 * STEPS :] for f in (job("0.01"), place / "whole")]
    assert records[0] == records[1] and whole["after"] == sweep_job.result(job("0.01"))["after"]


def test_in_the_background(place):
    """--detach: the parent goes on alone, and its log tells."""
    command = [*SWEEP, "lr=3e38", "steps=2", "--detach"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "in the background" in done.stdout, done.stderr
    log = place / "s" / "sweep.log"
    until(lambda: "did not finish" in log.read_text())
    assert "started run-" in log.read_text()
    (folder,) = (p.parent for p in place.glob("s/*/job.json"))
    assert sweep_job.job_state(folder) == "failed" and not sweep_job.job_is_held(place / "s")
