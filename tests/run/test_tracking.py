"""What a run writes and shows: whole lines, none ahead of the ledger, readable by any JSON reader."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zoft import console
from zoft.run import tracker as tracking
from zoft.run.tracker import Tracker


class Terminal(io.StringIO):
    def isatty(self):
        return True


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder, first, last, **kwargs):
    out = io.StringIO()
    with Tracker(folder, 10, stream=out, resume_step=first, **kwargs) as t:
        if first == 0:
            t.evaluation(0, {"accuracy": 0.5, "n": 4})
        for step in range(first, last):
            t.step(step, loss=1.0 / (step + 1), projected_gradient=-2.5, lr=1e-4)
    return out.getvalue()


def test_a_line_a_step_and_a_line_an_evaluation(tmp_path):
    shown = log(tmp_path, 0, 10)
    assert rows(tmp_path)[0] == {"step": 0, "eval": {"accuracy": 0.5, "n": 4}}
    assert [r["step"] for r in rows(tmp_path)[1:]] == list(range(10))
    assert rows(tmp_path)[4] == {"step": 3, "loss": 0.25, "projected_gradient": -2.5, "lr": 1e-4}
    lines = shown.splitlines()
    assert lines[0] == "step 0: accuracy 0.5, n 4"
    assert lines[1].startswith("step 1/10  loss 1  pg -2.5  lr 0.0001")
    assert "steps/s" in lines[-1] and "ETA 0:00" in lines[-1] and lines[-1].endswith("GB")
    assert len(lines) == 3  # the first and the last step: less than ten seconds went by


def test_every_line_is_on_disk_when_step_returns(tmp_path):
    with Tracker(tmp_path, 5, stream=io.StringIO()) as t:
        for step in range(3):
            t.step(step, loss=1.0)
            assert len(rows(tmp_path)) == step + 1


def test_resume_drops_what_the_ledger_does_not_have(tmp_path):
    log(tmp_path, 0, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 4, "eval": {"accuracy": 1.0}}\n{"step": 6, "eval": {"accuracy": 1.0}}\n{"step": 6, "lo'
        )
    log(tmp_path, 4, 7)
    steps = [(r["step"], "eval" in r) for r in rows(tmp_path)]
    assert steps == [
        (0, True),
        (0, False),
        (1, False),
        (2, False),
        (3, False),
        (4, True),
        (4, False),
        (5, False),
        (6, False),
    ]


def test_a_new_run_starts_a_new_file(tmp_path):
    log(tmp_path, 0, 3)
    log(tmp_path, 0, 1)
    assert len(rows(tmp_path)) == 2


def test_numbers_that_json_lacks_become_null(tmp_path):
    with Tracker(tmp_path, 2, stream=io.StringIO()) as t:
        t.step(
            0, loss=float("nan"), projected_gradient=float("-inf"), losses=[1.0, float("inf")], skipped=True
        )
    strict = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert strict == {
        "step": 0,
        "loss": None,
        "projected_gradient": None,
        "losses": [1.0, None],
        "skipped": True,
    }


def test_a_live_line_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Tracker(tmp_path, 3, stream=out) as t:
        t.note("[bold] stays as it is")
        for step in range(3):
            t.step(step, loss=0.5, projected_gradient=1.0, lr=1.0)
    assert "[bold] stays as it is" in out.getvalue()
    assert "step 1/3" in out.getvalue() and "step 3/3" in out.getvalue()


def texts(clock, each_s, steps, objective):
    """The lines of a run whose steps write 32 texts in each_s seconds, 8 at a time."""
    out = io.StringIO()
    with Tracker(None, 60, stream=out, config={"objective": objective}) as t:
        for step in range(steps):
            for done in (8, 16, 24):
                clock.now += each_s / 4
                t.under_way(f"{done} of 32 texts")
            clock.now += each_s / 4
            t.step(step, loss=-0.29, projected_gradient=2.0, lr=1e-4)
    return out.getvalue().splitlines()


def test_progress_of_texts_takes_no_turn_of_the_steps(monkeypatch):
    """Steps of 4 s are shown every third, as without texts; of steps of 24 s the texts are shown, too, from 10 s on."""
    clock = Clock(monkeypatch)
    lines = texts(clock, 4.0, 10, "reward")
    assert [line.split("  ")[0] for line in lines] == [f"step {n}/60" for n in (1, 4, 7, 10)]
    assert all(line.split("  ")[1:3] == ["reward 0.29", "pg 2"] for line in lines)
    lines = texts(clock, 24.0, 2, "lm")
    told = ["step {0}/60: 16 of 32 texts", "step {0}/60"]
    assert [line.split("  ")[0] for line in lines] == [line.format(n) for n in (1, 2) for line in told]
    assert lines[-1].split("  ")[1] == "loss -0.29"


def test_closing_twice_and_on_an_exception(tmp_path):
    with pytest.raises(RuntimeError), Tracker(tmp_path, 3, stream=io.StringIO()) as t:
        t.step(0, loss=1.0)
        raise RuntimeError
    t.close()
    assert len(rows(tmp_path)) == 1


def test_a_missing_wandb_is_one_line(tmp_path):
    """In an interpreter that cannot see wandb, where the error must come before any file is made."""
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "import importlib.util as u; u.find_spec = lambda name, *a: None\n"
        "from zoft.run.tracker import Tracker; from zoft.errors import UserError\n"
        "try: Tracker('.', 1, track='wandb')\n"
        "except UserError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=_path()
    )
    assert "pip install wandb" in done.stdout and "\n" == done.stdout[-1:], done
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_is_off_line_unless_told_otherwise(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log(tmp_path, 0, 2, track="wandb", config={"lr": 1.0})
    assert os.environ["WANDB_MODE"] == "offline"
    written = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == 1 and written[0].stat().st_size > 0


def test_peak_memory_grows_by_what_is_allocated():
    before = console.peak_memory_gb()
    block = bytearray(int(3e8) + int(before * 1e9) - _now())  # past any earlier peak
    block[::4096] = b"x" * len(block[::4096])
    grown = console.peak_memory_gb() - before
    assert 0.25 < grown < 0.4, (before, grown)


def _now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _path():
    return {**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[2])}


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(tracking.time, "monotonic", lambda: self.now)

    def steps(self, tracker, first, last, seconds):
        for step in range(first, last):
            self.now += seconds
            tracker.step(step, loss=1.0)


def eta(out):
    """(steps a second, seconds to go) of the last line."""
    rate, left = re.search(r"  (\S+) steps/s  ETA (\S+)", out.getvalue().splitlines()[-1]).groups()
    return float(rate), sum(int(n) * 60**i for i, n in enumerate(reversed(left.split(":"))))


def test_the_time_to_go_follows_the_steps_of_late(tmp_path, monkeypatch):
    out, clock = io.StringIO(), Clock(monkeypatch)
    with Tracker(tmp_path, 2000, stream=out) as t:
        clock.steps(t, 0, 1, 300)  # kernels
        clock.steps(t, 1, 101, 10)  # the first time over the rows
        assert eta(out) == (0.1, 18990)
        clock.steps(t, 101, 201, 1)
        assert eta(out)[0] == 1 and eta(out)[1] == pytest.approx(1800, abs=15)  # a line every ten seconds
        clock.steps(t, 201, 261, 4)
        assert eta(out)[0] == 0.25 and eta(out)[1] == pytest.approx(4 * 1740, abs=12)


def test_evaluations_between_steps_are_time_to_go_but_no_speed(tmp_path, monkeypatch):
    out, clock = io.StringIO(), Clock(monkeypatch)
    with Tracker(tmp_path, 1000, stream=out) as t:
        clock.now += 500
        t.paused()  # the one before training
        for first in range(0, 500, 100):
            clock.steps(t, first, first + 100, 1)
            clock.now += 200
            t.paused()
        clock.steps(t, 500, 501, 1)
    assert eta(out)[0] == 1
    assert eta(out)[1] == pytest.approx(499 * (1 + 1000 / 501), abs=1)  # at step 501


def test_a_file_that_was_put_right_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    log(tmp_path, 0, 6)
    seen, real, place = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_ino), real(fd))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((os.stat(a).st_ino, str(b))), place(a, b))[1]
    )
    log(tmp_path, 4, 5)
    (inode, name) = seen[1]
    assert seen[0] == inode and name.endswith("metrics.jsonl")
