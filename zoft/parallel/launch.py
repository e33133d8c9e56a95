"""`zoft train --nproc N`: the N processes of a run on this machine, watched until all have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.packages import zoft_command
from zoft.signals import RESUME, SIGNALS, way_on

PATIENCE = 15.0  # seconds between the end of one process that failed and the end of the others


def process_place() -> tuple[int, int]:
    """Return (rank, processes) of this one, as torchrun sets them; (0, 1) alone. Raises UserError."""
    size = environment_number("WORLD_SIZE", 1)
    rank = environment_number("RANK", 0) if size > 1 else 0
    if size < 1 or rank >= size:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={size}: ranks go from 0 to WORLD_SIZE - 1; set both, or neither"
        )
    if size > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE={size}: RANK is not set; set both, or neither")
    return rank, size


def environment_number(name: str, default: int) -> int:
    """Return an environment variable that counts processes. Raises UserError."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(
            f"{name}={text}: a whole number is expected; torchrun and `zoft train --nproc` set it"
        )
    return int(text) if text else default


def start_processes(count: int, args: Sequence[str], folder: str) -> int:
    """Run `zoft ARGS` as `count` processes that find each other as torchrun's do; returns the exit code of the run.

    Signals go on to all of them, once each. Where one dies the others stop, and the run can be resumed: code 75.
    """
    # They meet by a file in a folder of this user's own: nothing listens, and who may not read the folder takes no part.
    private = tempfile.TemporaryDirectory(prefix="zoft-meeting-", ignore_cleanup_errors=True)
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "ZOFT_PARENT": str(os.getpid()),
              "ZOFT_MEETING": str(Path(private.name) / "ranks")}  # fmt: skip
    if sys.platform.startswith("linux"):  # whatever this machine's name resolves to
        common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = zoft_command(*args)
    said = [tempfile.TemporaryFile() for _ in range(count)]
    # A session of their own: Ctrl-C in a terminal reaches this process, which passes it on.
    children: list[Any] = [
        subprocess.Popen(
            command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=said[r] if r else None,
            start_new_session=True,
        )
        for r in range(count)
    ]  # fmt: skip

    failed: int | None = (
        None  # the first that ended otherwise than well; of several at a time, one that was killed
    )
    running = True
    with _forwarding(children):
        while running:
            time.sleep(0.02)
            running = None in [child.poll() for child in children]
            ended = [r for r, c in enumerate(children) if c.returncode]
            if ended and failed is None:
                failed = min(ended, key=lambda r: children[r].returncode > 0)
                _end(children)
    private.cleanup()
    if failed is None:
        return 0
    code = children[failed].returncode
    if code < 0:
        print(
            f"rank {failed} of {count} was killed ({signal.Signals(-code).name}); what the ledger has is kept: "
            f"continue with `{way_on(folder)} --nproc {count}`",
            file=sys.stderr,
        )
        return RESUME
    # Who is seen to end first need not be who went wrong: the others end, too, once he is gone.
    codes = [c.returncode for c in children]
    culprit = next((r for r, c in enumerate(codes) if c > 0 and c != RESUME), None)
    if culprit:  # rank 0 has spoken for itself
        said[culprit].seek(0)
        sys.stderr.write(said[culprit].read().decode(errors="replace"))
    return RESUME if culprit is None else codes[culprit]


def start_elastic(count: int, args: Sequence[str], folder: str) -> int:
    """Run `zoft ARGS` and count − 1 workers that join it; the run's exit code. Workers may die, and none is replaced."""
    env = {**os.environ, "ZOFT_PARENT": str(os.getpid())}
    invitation = Path(folder) / "join.json"
    old = invitation.read_bytes() if invitation.exists() else b""  # of a run that was killed, or goes on
    children = [subprocess.Popen(zoft_command(*args), env=env, start_new_session=True)]
    with _forwarding(children[:1]):  # it sends the workers home
        while children[0].poll() is None and (not invitation.exists() or invitation.read_bytes() == old):
            time.sleep(0.05)
        remote = ["--trust-remote-code"] if "trust_remote_code=true" in args else []
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for _ in range(count - 1 if children[0].poll() is None else 0):
            children.append(
                subprocess.Popen(
                    zoft_command("join", folder, *remote), env=env, start_new_session=True, **quiet
                )
            )
        code = children[0].wait()
        _end(children)
    if code >= 0:
        return code
    print(
        f"the run was killed ({signal.Signals(-code).name}); what the ledger has is kept: "
        f"continue with `{way_on(folder)} --nproc {count}`",
        file=sys.stderr,
    )
    return RESUME


@contextmanager
def _forwarding(children: Sequence[Any]) -> Iterator[None]:
    """Signals of this process go on to the children, once each."""

    def forward(number: int, frame: Any) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
