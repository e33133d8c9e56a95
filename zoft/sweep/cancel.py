"""`zoft sweep --cancel`: mark jobs as cancelled on the disk, and stop those that run or wait."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from zoft.errors import UserError, writing
from zoft.sweep.job import job_is_held, job_record, job_state
from zoft.sweep.plan import read_plan


def cancel(root: str | Path, which: Sequence[str]) -> str:
    """Cancel a whole sweep, which its command takes up again, or the jobs named, which it leaves out from then on.

    which: names of jobs, or their hashes. A running job ends its step and can be resumed. Returns a line about it.
    """
    root = Path(root)
    known = list(read_plan(root)["jobs"])
    names = []
    for word in which:
        found = [n for n in known if n in (word, Path(word).name) or n.endswith(f"-{word}")]
        if len(found) != 1:
            raise UserError(
                f"--cancel {root}: {word} is no job of it; `zoft sweep --status {root}` lists them"
            )
        if job_state(root / found[0]) == "done":
            raise UserError(f"--cancel {root}: {word} is done")
        names += found
    for path in [root / n for n in names] or [root]:
        if path.is_symlink() and names:
            raise UserError(f"--cancel {root}: {path.name} is a link; cancel it where it is")
        with writing(path / "cancelled"):
            (path / "cancelled").touch()
    chosen = names or [n for n in known if job_state(root / n) != "done"]
    elsewhere = _stop(root, chosen)
    if (root / "slurm.json").exists():
        from zoft.sweep import slurm

        slurm.cancel(root, chosen)
    text = f"{root}: {len(chosen)} jobs cancelled"
    return text + (
        f"; still running on {', '.join(elsewhere)}, until their parent looks" if elsewhere else ""
    )


def _stop(root: Path, names: Sequence[str]) -> list[str]:
    """Signal local jobs that no parent looks after (a parent sees the mark itself); the hosts of those out of reach."""
    hosts = []
    for name in names:
        record = job_record(root / name)
        if "slurm" in record or job_state(root / name) != "running":
            continue
        if job_is_held(root) and not _orphaned(record.get("pid")):
            continue
        if record.get("host") != socket.gethostname():
            hosts.append(str(record.get("host")))
        elif _holds(record.get("pid"), root / name / ".lock"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(record["pid"], signal.SIGTERM)
    return sorted(set(hosts))


def _holds(pid: object, lock: Path) -> bool:
    """Return whether a process has the lock of a job open: job.json may name any process, and ids are given again.

    Linux; elsewhere any process of this user that job.json names is taken for the job's.
    """
    if isinstance(pid, bool) or not isinstance(pid, int) or pid <= 1:  # 0 and less are whole groups
        return False
    if not Path("/proc/self/fd").is_dir():
        return True
    with contextlib.suppress(OSError):
        mine = lock.stat()
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), mine):
                    return True
    return False


def _orphaned(pid: object) -> bool:
    """Say whether the process that started this one is gone: init has it then. Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == "1"
    except (OSError, IndexError):
        return False
