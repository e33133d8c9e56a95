"""A sweep's jobs on this machine: N at a time, each on a GPU of its own where there are any."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from zoft.signals import SIGNALS
from zoft.sweep import job
from zoft.sweep.job import ended, job_record, job_state, result
from zoft.sweep.plan import Interrupted

LOOK_SECONDS = 0.2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs that jobs may have, as CUDA_VISIBLE_DEVICES names them; needs no torch."""
    told = environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [g.strip() for g in told.split(",") if g.strip() not in ("", "-1")]
    return list(memory_used())


def memory_used() -> dict[str, int]:
    """Return {index: MiB in use} of all GPUs, {} where there is no NVIDIA driver."""
    ask = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = (line.split(",") for line in said.splitlines() if line.strip())
        return {index.strip(): int(used) for index, used in rows}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def slots(jobs: int | None, device: str) -> int:
    """Return how many jobs run at a time: the number given, else one for each GPU, else one."""
    return jobs or (len(gpus(os.environ)) if device in ("auto", "cuda") else 0) or 1


def threads(jobs: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return environment that gives each of `jobs` its share of the cores, so that they do not wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // jobs)
    limits = {n: environ.get(n, "") for n in THREAD_VARIABLES}
    return {n: str(min(share, int(v)) if v.isdigit() and int(v) else share) for n, v in limits.items()}


def free(every: Sequence[str], taken: Sequence[str], used: Mapping[str, int]) -> str:
    """Return the GPU with the fewest of our jobs, of those the one with the least memory in use."""
    return min(every, key=lambda g: (taken.count(g), used.get(g, 0), every.index(g)))


def run(
    root: Path,
    names: Sequence[str],
    extra: Sequence[str],
    say: Callable[[str], Any],
    *,
    jobs: int,
    device: str = "auto",
) -> None:
    """Run jobs, `jobs` at a time, until none goes on. Raises Interrupted, once they have stopped, on a signal.

    device: as the configs have it; cuda:1 or cpu says itself where it is. One job's failure is left in its folder.
    """
    every = gpus(os.environ) if device in ("auto", "cuda") else []
    waiting, running = deque(names), dict[str, tuple[subprocess.Popen[bytes], str]]()
    ends, told = 0, set[str]()  # told: jobs that were told to stop
    with listening() as got:
        while waiting or running:
            stopping = bool(got) or (root / "cancelled").exists()
            if stopping:
                waiting.clear()
            for name, (process, _) in list(running.items()):
                asked = stopping or (root / name / "cancelled").exists()
                if asked and (name not in told or len(got) > 1):
                    told.add(name)
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
                if process.poll() is not None:
                    del running[name]
                    ended(root / name, process.returncode, signalled=name in told)
                    ends += 1
                    say(f"{ends}/{len(names)} {outcome(root / name)}")
            if len(got) > 1:
                del got[1:]  # a further signal was passed on
            for _ in range(len(waiting)):
                if len(running) >= jobs:
                    break
                name = waiting.popleft()
                at = job_state(root / name)
                if at in ("done", "cancelled"):
                    ends += 1
                    say(f"{ends}/{len(names)} {outcome(root / name)}")
                    continue
                gpu = free(every, [g for _, g in running.values()], memory_used()) if every else ""
                env = threads(jobs, os.environ) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
                begun = job.start(root / name, env=env, extra=extra, gpu=gpu)
                if begun is None:  # a job that outlived its parent: it is looked at again
                    waiting.append(name)
                    continue
                running[name] = begun, gpu
                say(
                    f"{'resumed' if at == 'stopped' else 'started'} {name}"
                    + (f" on GPU {gpu}" if gpu else "")
                )
            time.sleep(LOOK_SECONDS)
        if got or (root / "cancelled").exists():
            raise Interrupted(f"stopped; the same command goes on with {root}")


def outcome(folder: Path) -> str:
    """Return a line on how a job ended."""
    at = job_state(folder)
    if at == "failed":
        return f"failed {folder.name}: {job_record(folder).get('error', '')}"
    if at == "done":
        from zoft.console import short

        after = result(folder).get("after", {})
        shown = ", ".join(f"{k} {short(after[k])}" for k in list(after)[:3])
        return f"done {folder.name}: {shown}"
    return f"{at} {folder.name}"


@contextmanager
def listening() -> Iterator[list[int]]:
    """Collect the signals that this process is sent, as they come; jobs have sessions of their own and get none of them."""
    got: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        got.append(number)

    before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
