"""`zoft train --nproc N`: the N processes of a run on this machine, watched until all have ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from zoft.stop import RESUME, SIGNALS

PATIENCE = 15.0  # seconds between the end of one process that failed and the end of the others


def start(count: int, args: Sequence[str], folder: str) -> int:
    """Run `zoft ARGS` as `count` processes that find each other as torchrun's do; returns the exit code of the run.

    Signals go on to all of them, once each. Where one dies the others stop, and the run can be resumed: code 75.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "ZOFT_PARENT": str(os.getpid())}  # fmt: skip
    command = [sys.executable, "-m", "zoft", *args]
    said = [tempfile.TemporaryFile() for _ in range(count)]
    # A session of their own: Ctrl-C in a terminal reaches this process, which passes it on.
    children = [
        subprocess.Popen(
            command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=said[r] if r else None, start_new_session=True,
        )
        for r in range(count)
    ]  # fmt: skip

    def forward(number: int, frame: Any) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    failed: int | None = (
        None  # the first that ended otherwise than well; of several at a time, one that was killed
    )
    running = True
    while running:
        time.sleep(0.02)
        running = None in [child.poll() for child in children]
        ended = [r for r, c in enumerate(children) if c.returncode]
        if ended and failed is None:
            failed = min(ended, key=lambda r: children[r].returncode > 0)
            _end(children)
    if failed is None:
        return 0
    code = children[failed].returncode
    if code < 0:
        print(
            f"rank {failed} of {count} was killed ({signal.Signals(-code).name}); what the ledger has is kept: "
            f"continue with `zoft train --resume {folder} --nproc {count}`",
            file=sys.stderr,
        )
    elif failed and code != RESUME and children[0].returncode in (0, RESUME):
        said[failed].seek(0)
        sys.stderr.write(said[failed].read().decode(errors="replace"))
    codes = [c.returncode for c in children]
    own = [c for c in codes if c > 0 and c != RESUME]
    return own[0] if own else RESUME


def _end(children: Sequence[Any]) -> None:
    """Wait for the others to see that one is gone; then be less patient."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if all(child.poll() is not None for child in children):
                return
            time.sleep(0.02)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)


def with_parent() -> None:
    """End with the process that started this one, even where it is killed (Linux)."""
    parent = os.environ.get("ZOFT_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)
