"""Processes of one run, forked from a server that has imported everything: real processes, without the wait for imports."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch

# A process that was forked where imports have looked for a GPU could not use it.
CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
CONTEXT.set_forkserver_preload(
    ["zoft.run.start", "zoft.run.loop", "zoft.evaluation.evaluate", "zoft.parallel.world", "ranks_imports"]
)


def make_place(folder: Path, **settings) -> Path:
    """A folder with a tiny model, data, and mine.yaml."""
    keys = {"steps": 50, "batch_size": 4, "lr": 1e-3, "max_length": 32, "momentum": 0.5, "threads": 1, "storage": "bf16",
            "probes_per_forward": 1, "device": "cpu", **settings}  # fmt: skip
    return tiny.place(folder, "".join(f"{k}: {v}\n" for k, v in keys.items()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(place: Path, args: list[str], rank=0, size=1, port=0, hook=None):
    """A process that runs `zoft ARGS` in `place`, as one of `size`; what it says is in place/said-RANK."""
    log = place / f"said-{rank}"
    process = CONTEXT.Process(target=_child, args=(str(place), args, rank, size, port, str(log), hook))
    process.start()
    return process


def _child(place, args, rank, size, port, log, hook):
    os.chdir(place)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    from zoft.cli.main import main

    if hook is not None:
        hook(rank)
    sys.argv = ["zoft", *args]
    main()


def zoft(place: Path, *args: str, size: int = 1, hook=None, timeout: float = 240) -> list[int]:
    """Exit codes of `zoft train ARGS` as that many processes."""
    processes = launch(place, *args, size=size, hook=hook)
    return ended(processes, timeout)


def launch(place: Path, *args: str, size: int = 1, hook=None) -> list:
    port = free_port()
    full = ["train", *args] if "--resume" in args else ["train", "--config", "mine.yaml", *args]
    return [start(place, full, r, size, port, hook) for r in range(size)]


def ended(processes: list, timeout: float = 240) -> list[int]:
    deadline = time.monotonic() + timeout
    for p in processes:
        p.join(max(0.1, deadline - time.monotonic()))
    late = [r for r, p in enumerate(processes) if p.exitcode is None]
    for p in processes:
        p.kill()
    assert not late, f"ranks {late} have not ended"
    return [p.exitcode for p in processes]


def until(condition, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.01)
