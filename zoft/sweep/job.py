"""One job of a sweep, as its folder tells: what state it is in, who runs it, how it is started and how it ended.

A job is a run's folder whose config.yaml is there before the run: `zoft train --resume FOLDER` begins it, or goes on
where it stopped. Beside a run's own files: job.json (attempts, where, how the last one ended), job.log (all that it
printed), .lock (held by the process that runs it), cancelled (a file: leave it alone).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoft.console import escaped, is_line
from zoft.errors import writing
from zoft.folder import write
from zoft.packages import zoft_command
from zoft.signals import RESUME

# done: has a result; running: its lock is held; stopped: began and may go on; pending: never began.
STATES = ("done", "running", "stopped", "failed", "cancelled", "pending")
TAIL_BYTES = 1 << 14
OBJECT_BYTES = 1 << 24  # of job.json or result.json


def job_state(folder: Path) -> str:
    """Return one of STATES, from the disk alone."""
    if (folder / "result.json").exists():
        return "done"
    if job_is_held(folder):
        return "running"
    if (folder / "cancelled").exists():
        return "cancelled"
    found = job_record(folder)
    if found.get("code") not in (None, 0, RESUME) and not found.get("signalled"):
        return "failed"
    return "stopped" if found or (folder / "ledger").exists() else "pending"


def job_record(folder: Path) -> dict[str, Any]:
    """Return job.json's content: {attempts, started, host, pid, slurm} and, once it ended, {ended, code, error, signalled}."""
    found = _object(folder / "job.json")
    kept = {k: v for k, v in found.items() if k not in KINDS or _is(v, KINDS[k])}
    # What is shown is one line, and no sequence that a terminal would follow.
    return {k: escaped(" ".join(v.split())) if isinstance(v, str) else v for k, v in kept.items()}


# What job.json holds; a value of another kind is passed over.
KINDS: dict[str, tuple[type, ...]] = {
    "attempts": (int,), "started": (int, float), "ended": (int, float), "steps": (int,), "pid": (int,), "code": (int,),
    "host": (str,), "error": (str,), "signalled": (bool,),
}  # fmt: skip


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value from a file is of one of these kinds, and no number without bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    return isinstance(value, kinds) and abs(value) < 1 << 53  # neither NaN nor infinity is


def _object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a job holds; {} where it cannot be read, or is of another shape."""
    try:
        if not path.is_file() or path.stat().st_size > OBJECT_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def job_is_held(folder: Path) -> bool:
    """Say whether a process holds the lock of a job, or of a sweep."""
    try:
        fd = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: the ledger refuses two writers where it can
        return False
    finally:
        os.close(fd)
    return False


def hold(folder: Path) -> int | None:
    """Take the lock: an open file that keeps it until the last process that has it is gone; None: another has it."""
    with writing(folder / ".lock"):
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(5):  # who only looks holds it for a moment, too
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return fd
    os.close(fd)
    return None


def start(
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    die_with_me: bool = False,
    **facts: Any,
) -> subprocess.Popen[bytes] | None:
    """Begin a job, or go on with it, in a process of its own; None where another process runs it.

    env: variables besides this process's. extra: arguments of `zoft train`. die_with_me: SIGKILL to this process is
    one to the job. facts: more for job.json. The job holds the lock, so that it is kept if this process dies.
    """
    lock = hold(folder)
    if lock is None:
        return None
    try:
        facts = begun(folder, **facts)
        with writing(folder / "job.log"), (folder / "job.log").open("ab") as log:
            process = subprocess.Popen(
                zoft_command("train", "--resume", str(folder), *extra),
                env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[lock], start_new_session=True, preexec_fn=die_with_parent if die_with_me else None,
            )  # fmt: skip
        write(folder / "job.json", json.dumps({**facts, "pid": process.pid}))
        return process
    finally:
        os.close(lock)


def begun(folder: Path, **facts: Any) -> dict[str, Any]:
    """Note in job.json that an attempt at a job begins; returns what it holds. facts: more for it."""
    facts = {"attempts": job_record(folder).get("attempts", 0) + 1, "started": time.time(), **facts}
    facts = {k: v for k, v in facts.items() if v != ""} | {
        "host": socket.gethostname(),
        "steps": steps(folder),
    }
    write(folder / "job.json", json.dumps(facts))
    return facts


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent is gone."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


def ended(folder: Path, code: int, *, signalled: bool = False) -> None:
    """Write down how a job's process ended. signalled: it was told to stop, so that it did not fail."""
    facts = job_record(folder) | {"ended": time.time(), "code": code, "signalled": signalled}
    if code not in (0, RESUME):
        facts["error"] = last_error(folder, code)
    write(folder / "job.json", json.dumps(facts))


def last_error(folder: Path, code: int) -> str:
    """Return the line that says why a job failed."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (", out of memory perhaps" if -code == signal.SIGKILL else "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail(folder / "job.log").decode(errors="replace"))]
    lines = [line for line in lines if line]
    said = [line for line in lines if line.startswith("error: ")] if code == 2 else []
    return ((said or lines or [f"exit code {code}"])[-1]).removeprefix("error: ")


def tail(path: Path) -> bytes:
    """Return the last TAIL_BYTES of a file; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def progress(folder: Path) -> dict[str, Any]:
    """Return the last step's line of a job's metrics.jsonl, {} before the first."""
    for line in reversed(tail(folder / "metrics.jsonl").splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and "loss" in row and is_line(row):
                return row
    return {}


def steps(folder: Path) -> int:
    """Return steps done so far, as metrics.jsonl has them."""
    return progress(folder).get("step", -1) + 1


def result(folder: Path) -> dict[str, Any]:
    """Return result.json's content, {} where there is none, or none that can be read."""
    found = _object(folder / "result.json")
    for when in ("before", "after"):
        if when in found and not is_line({"step": 0, "eval": found[when]}):
            return {}
    return found if "after" in found else {}
