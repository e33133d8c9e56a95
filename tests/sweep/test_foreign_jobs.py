"""A sweep's folder from anybody: only own jobs are stopped, nothing outside is touched, nothing is printed raw."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from zoft.errors import UserError
from zoft.sweep.cancel import cancel
from zoft.sweep.job import hold, job_record, progress, result
from zoft.sweep.view import status_text


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "s"
    (root / "lr=1-abc").mkdir(parents=True)
    plan(root, {"lr=1-abc": {"lr": "1"}})
    return root


def plan(root, jobs, **more):
    (root / "sweep.json").write_text(json.dumps({"swept": ["lr"], "jobs": jobs} | more))


def job(root, **facts):
    (root / "lr=1-abc" / "job.json").write_text(
        json.dumps({"host": socket.gethostname(), "attempts": 1} | facts)
    )


@pytest.fixture
def bystander():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_another_program_is_never_signalled(root, bystander):
    """The job's lock is held, by this process; job.json names another one."""
    job(root, pid=bystander.pid)
    lock = hold(root / "lr=1-abc")
    try:
        cancel(root, [])
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        os.close(lock)


def test_the_process_that_has_the_jobs_lock_is(root):
    lock = hold(root / "lr=1-abc")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], pass_fds=[lock])
    os.close(lock)
    try:
        job(root, pid=process.pid)
        cancel(root, [])
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("pid", [0, -1, 1, True, 2**40, "1", None, 1.5])
def test_ids_that_are_no_process_of_a_job(root, pid, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    job(root, pid=pid)
    lock = hold(root / "lr=1-abc")
    try:
        cancel(root, [])
    finally:
        os.close(lock)
    assert not sent


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/tmp/x", "a/b", "a\0b", "x" * 300])
def test_names_lead_nowhere_else(root, name):
    plan(root, {name: {"lr": "1"}})
    before = sorted(str(p) for p in root.parent.rglob("*"))
    for verb in (lambda: cancel(root, [name]), lambda: cancel(root, []), lambda: status_text(root)):
        with pytest.raises(UserError, match="is no name of a job"):
            verb()
    assert sorted(str(p) for p in root.parent.rglob("*")) == before


def test_a_job_that_is_a_link_is_not_written_through(root, tmp_path):
    (tmp_path / "else").mkdir()
    (root / "b").symlink_to(tmp_path / "else")
    plan(root, {"b": {"lr": "1"}})
    with pytest.raises(UserError, match="b is a link"):
        cancel(root, ["b"])
    assert not list((tmp_path / "else").iterdir())


@pytest.mark.parametrize("swept, jobs", [("x", {}), ([1], {}), (["lr"], []), (["lr"], {"a": 1}), (["lr"], {"a": {"lr": 1}})])  # fmt: skip
def test_a_plan_of_another_shape(root, swept, jobs):
    plan(root, jobs, swept=swept)
    with pytest.raises(UserError, match="damaged"):
        status_text(root)


def test_a_deep_plan(root):
    (root / "sweep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        status_text(root)


WRONG = [{"attempts": "x"}, {"started": "now"}, {"started": 1e400}, {"host": 5}, {"error": [1]}, {"code": "2"}, {"signalled": 3},
         {"steps": None}, {"ended": {"a": 1}}, {"attempts": True}, {"started": float("nan")}]  # fmt: skip


@pytest.mark.parametrize("facts", WRONG, ids=str)
def test_values_of_another_kind_are_passed_over(root, facts):
    job(root, **facts)
    assert not set(facts) & set(job_record(root / "lr=1-abc"))
    assert "lr=1-abc" in status_text(root)


def test_terminal_sequences_are_written_out(root):
    job(root, code=2, error="\x1b[2J\x9b31m\nlost\u202e")
    (root / "lr=1-abc" / "config.yaml").write_text("steps: 4\n")
    shown = status_text(root)
    assert "\\x1b[2J" in shown and not set("\x1b\x9b\u202e") & set(shown)
    assert len([line for line in shown.splitlines() if "lost" in line]) == 1 and "failed" in shown


@pytest.mark.parametrize("text", ["[" * 100_000, "5", '{"after": 5}', '{"after": {"loss": "x"}}', '{"after": {"loss": [1]}}', '{"before": 1, "after": {}}', "\xff"])  # fmt: skip
def test_a_result_of_another_shape_is_none(root, text):
    (root / "lr=1-abc" / "result.json").write_text(text)
    assert result(root / "lr=1-abc") == {} and "lr=1-abc" in status_text(root)


@pytest.mark.parametrize(
    "line", ['{"loss": 1, "step": "x"}', '{"loss": "x", "step": 1}', '{"loss": 1, "step": true}', "[" * 9000]
)
def test_a_line_of_metrics_of_another_shape_is_passed_over(root, line):
    (root / "lr=1-abc" / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n' + line)
    assert progress(root / "lr=1-abc") == {"step": 3, "loss": 0.5} and "0.5" in status_text(root)
