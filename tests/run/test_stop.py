"""Stopping: real signals, to a real process; whole steps in the ledger and the same bits after a resume."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from zoft.ledger.log import read_ledger
from zoft.signals import RESUME, SIGNALS, Stopped, listening

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = 400


def me(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions


def test_the_first_signal_waits_for_the_end_of_the_step_and_the_second_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(n) for n in SIGNALS]
    done = []
    with listening("x") as stop:
        with pytest.raises(Stopped, match="nothing is written"):
            me(signal.SIGTERM)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.yaml").touch()
    with listening("runs/x") as stop:
        with pytest.raises(Stopped, match="--resume runs/x") as stopped, stop.finishing():
            stop.check()
            me(signal.SIGTERM)
            done.append("the step")
            stop.check()
            done.append("another")
        assert done == ["the step"] and (stopped.value.code, stopped.value.number) == (75, signal.SIGTERM)
    with listening("runs/x") as stop:
        with pytest.raises(Stopped), stop.finishing():  # after the last step
            me(signal.SIGINT)
    with listening("runs/x") as stop:
        with pytest.raises(Stopped) as stopped, stop.finishing():
            me(signal.SIGTERM)
            me(signal.SIGINT)
            done.append("another")
        assert done == ["the step"] and (stopped.value.code, stopped.value.number) == (75, signal.SIGINT)
    for number in SIGNALS:
        with listening("runs/x"), pytest.raises(Stopped):  # an evaluation: nothing is half done
            me(number)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_the_way_on_names_what_only_a_command_line_may(tmp_path):
    """A shell's own words, so that the line can be pasted as it is."""
    for folder, text, more in (
        ("plain", "lr: 1.0\nreward: null\ntrust_remote_code: false\n", []),
        ("a run", "reward: /my things/r.py:score\n", ["--reward", "/my things/r.py:score"]),
        ("both", "reward: /r.py:f\ntrust_remote_code: true\n", ["--reward", "/r.py:f", "trust_remote_code=true"]),
        ("damaged", "reward: [\n", []),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(text)
        said = str(Stopped(signal.SIGTERM, f"{tmp_path}/{folder}"))
        words = shlex.split(re.fullmatch("stopped; continue with `(.*)`", said)[1])
        assert words == ["zoft", "train", "--resume", f"{tmp_path}/{folder}", *more]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with listening("runs/x") as stop:
            me(signal.SIGTERM)
            stop.check()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    settings = "batch_size: 4\nlr: 1e-2\nmax_length: 32\nmomentum: 0.5\nthreads: 1\nstorage: bf16\n"
    tiny.place(folder, f"steps: {STEPS}\n{settings}")
    assert zoft(folder, "output_dir=whole").wait() == 0
    return folder


def zoft(place, *args):
    command = [sys.executable, "-m", "zoft", "train"]
    command += args if "--resume" in args else ["--config", "mine.yaml", *args]
    return subprocess.Popen(
        command, cwd=place, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGUSR1,), (signal.SIGINT, signal.SIGINT)]
)
def test_a_stopped_run_ends_with_the_same_bits(place, numbers):
    name = "-".join(n.name for n in numbers)
    process = zoft(place, f"output_dir={name}")
    metrics, deadline = place / name / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 20):
        time.sleep(0.01)
    for number in numbers:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == RESUME, said
    assert said.splitlines()[-1] == f"stopped; continue with `zoft train --resume {name}`"
    assert "Traceback" not in said
    steps = len(read_ledger(place / name / "ledger").records)
    assert 19 <= steps < STEPS and not (place / name / "result.json").exists()
    if len(numbers) == 1:  # every step of the ledger has its line, too
        assert json.loads(metrics.read_text().splitlines()[-1])["step"] == steps - 1
    assert zoft(place, "--resume", name).wait() == 0
    for file in ("ledger", "model/model.safetensors"):
        assert (place / name / file).read_bytes() == (place / "whole" / file).read_bytes(), file
    lines = [json.loads(x) for x in metrics.read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(STEPS))


def test_a_signal_while_a_resumed_run_loads_says_resume_me(place):
    process = zoft(place, "output_dir=early", f"steps={10 * STEPS}")
    while not (place / "early" / "ledger").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = zoft(place, "--resume", "early")
    assert process.stderr.readline().startswith("loading ")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == RESUME and "zoft train --resume early" in said, said


@pytest.mark.slow
def test_the_batch_script_of_the_docs_asks_for_its_job_again(place):
    """srun and scontrol stand in for Slurm's; everything else is as it is printed."""
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```\n(#SBATCH.*?)```", text, re.S)
    stubs = {
        "srun": 'exec "$@"',
        "zoft": f'exec {sys.executable} -m zoft "$@"',
        "scontrol": 'echo "$@" > requeued',
    }
    (place / "bin").mkdir()
    for name, line in stubs.items():
        (place / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (place / "bin" / name).chmod(0o755)
    shutil.copy(place / "mine.yaml", place / "my.yaml")
    env = {**ENV, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    job = {"cwd": place, "env": env, "stderr": subprocess.PIPE, "start_new_session": True}
    batch = subprocess.Popen(["bash", "-c", script], **job)
    metrics = place / "runs" / "mine" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(batch.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 1  # zoft itself: the stubs were replaced by it
    os.kill(int(children[0]), signal.SIGUSR1)
    batch.communicate(timeout=60)
    assert (place / "requeued").read_text() == "requeue 77\n"
    (place / "requeued").unlink()
    subprocess.run(["bash", "-c", script], **job)
    assert not (place / "requeued").exists()
    for file in ("ledger", "model/model.safetensors"):
        assert (place / "runs" / "mine" / file).read_bytes() == (place / "whole" / file).read_bytes(), file
