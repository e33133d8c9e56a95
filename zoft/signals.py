"""Signals that stop a run: a step under way is finished first, so that a stopped run has whole steps only."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from zoft.errors import UserError

# Ctrl-C; what kill, Slurm and Kubernetes send before SIGKILL; what `sbatch --signal` and batch systems send as a
# warning (their default action is to kill); and the soft limit on CPU time.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# Exit code "resume me", whatever the signal: sysexits.h's EX_TEMPFAIL. 128 + n is what a shell reports of a process
# that a signal killed, so it cannot say that a run was stopped in good order.
RESUME = 75


def way_on(folder: str) -> str:
    """Return the command that continues the run in `folder`, with what only a command line may say (code to run)."""
    from zoft.yaml_files import yaml_tree

    tree: dict[str, Any] = {}
    with suppress(UserError):  # edited since, or gone
        tree = yaml_tree(Path(folder) / "config.yaml")
    words = ["zoft", "train", "--resume", folder]
    words += ["--reward", str(tree["reward"])] if tree.get("reward") else []
    words += ["trust_remote_code=true"] if tree.get("trust_remote_code") else []
    return shlex.join(words)


class Stopped(KeyboardInterrupt):
    """Signal that the run in `folder` was stopped; all its steps are in the ledger. code: the exit code that says so.

    why: what else has; number is 0 then. folder: "" where the run is another process's.
    """

    def __init__(self, number: int, folder: str, why: str = "") -> None:
        if os.path.exists(os.path.join(folder, "config.yaml")):
            text = f"stopped; continue with `{way_on(folder)}`"
        else:
            text = "stopped before the run began: nothing is written; give the same command again"
        super().__init__(f"{why}: {text}" if why and folder else why or text)
        self.number, self.code = number, RESUME


class Stop:
    """Take the signals of a run: within `finishing` the first one waits for `check`, any other raises Stopped at once.

    An exception in the middle of a step would leave the weights in memory between two steps. After a second signal
    they may be; they are not saved then, and the ledger, which is the run, has whole steps whatever happens.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.number, self.busy = folder, 0, False

    def handle(self, number: int, frame: FrameType | None) -> None:
        first, self.number = not self.number, number
        if not (first and self.busy):
            raise Stopped(number, self.folder)

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.number:
            raise Stopped(self.number, self.folder)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish steps in this context, with `check` after each, before a signal stops the run."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False
        self.check()


@contextmanager
def listening(folder: str) -> Iterator[Stop]:
    """Provide a Stop that gets the process's signals; other threads than the main one get none, and nothing changes."""
    stop, before = Stop(folder), {}
    if threading.current_thread() is threading.main_thread():
        # What a shell has told the process to ignore (nohup, a job in the background) stays ignored.
        before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
