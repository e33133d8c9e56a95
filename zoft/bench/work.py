"""Run a bench's jobs: one process, one model in memory, one run after another; several processes share them by locks.

A job is a folder as those of a sweep are (zoft/sweep/job.py), so that `zoft train --resume` and `zoft report` know it
too. Whoever holds a folder's lock runs it; what is done is not run again; a killed run goes on from its ledger.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoft.bench.plan import Bench, Entry, Job
from zoft.console import logged, short
from zoft.errors import UserError, writing
from zoft.folder import ASKED, write
from zoft.sweep import job as folders
from zoft.sweep.job import job_is_held, job_record, result

WAIT_SECONDS = 0.5  # between looks for a job that another process has
LATE = 5  # the search goes by the training loss of the last 1/LATE of its steps


# ---- what the folders say --------------------------------------------------------------------------------------------


def late_loss(folder: Path) -> float:
    """Return the mean training loss of the last fifth of a run's steps; infinite where the run failed or one is no number."""
    return _late_loss(folder) if (folder / "result.json").exists() else math.inf


@functools.cache  # a finished run does not change, and a bench asks again after each of its runs
def _late_loss(folder: Path) -> float:
    losses = [row["loss"] for row in logged(folder / "metrics.jsonl") if "loss" in row]
    last = losses[-max(1, len(losses) // LATE) :]
    if not last or any(x is None or not math.isfinite(x) for x in last):
        return math.inf
    return sum(last) / len(last)


def has_failed(folder: Path) -> bool:
    """Say whether the last attempt at a job failed, whoever holds its lock."""
    found = job_record(folder)
    failed = found.get("code") not in (None, 0, folders.RESUME) and not found.get("signalled")
    return failed and not (folder / "result.json").exists()


def is_over(bench: Bench, job: Job, since: float = 0.0) -> bool:
    """Say whether a job needs no run: it is done, or it has failed at or after `since` (a Unix time)."""
    folder = bench.root / job.name
    if (folder / "result.json").exists():
        return True
    return has_failed(folder) and job_record(folder).get("ended", 0.0) >= since


def chosen_lr(bench: Bench, entry: Entry, since: float = 0.0) -> float | None:
    """Return the lr that an entry's search chooses: the least `late_loss`, the smaller lr of equals.

    None while a run of the search is missing, and where all of them failed. since: see `is_over`.
    """
    if not entry.search:
        return next(iter(entry.runs), None)
    if not all(is_over(bench, job, since) for job in entry.search.values()):
        return None
    losses = {lr: late_loss(bench.root / job.name) for lr, job in entry.search.items()}
    best = min(losses, key=lambda lr: (losses[lr], lr))
    return best if losses[best] < math.inf else None


def known_jobs(bench: Bench, since: float = 0.0) -> list[Job]:
    """Return the jobs that can be named by now, in the order in which they are run."""
    found: list[Job] = []
    for entry in bench.entries:
        found += [*entry.frame, *([entry.gradient] if entry.gradient else []), *entry.search.values()]
        lr = chosen_lr(bench, entry, since)
        found += entry.runs[lr] if lr is not None else ()
    return found


def planned_runs(bench: Bench) -> int:
    """Return how many jobs a bench has in all."""
    each = (
        len(e.frame) + (e.gradient is not None) + len(e.search) + len(next(iter(e.runs.values()), ()))
        for e in bench.entries
    )
    return sum(each)


# ---- running ---------------------------------------------------------------------------------------------------------


def work(
    bench: Bench, say: Callable[[str], Any], since: float, after: Callable[[], Any] = lambda: None
) -> None:
    """Run what is missing until nothing is, whoever else works on it. Failures are left in their folders.

    since: jobs that failed before are tried again, once. after() is called after each job.
    """
    from zoft.models.load import keeping_a_model

    with keeping_a_model():
        while todo := [j for j in known_jobs(bench, since) if not is_over(bench, j, since)]:
            if not any(_taken(bench, job, since, say, after) for job in todo):
                time.sleep(WAIT_SECONDS)


def _taken(bench: Bench, job: Job, since: float, say: Callable[[str], Any], after: Callable[[], Any]) -> bool:
    """Run a job unless another process has it or it is over by now; say whether it was run."""
    folder = bench.root / job.name
    if job_is_held(folder):
        return False
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = folders.hold(folder)
    if lock is None:
        return False
    try:
        if is_over(bench, job, since):
            return False
        run_job(folder, job)
    finally:
        os.close(lock)
    say(f"{_counted(bench, since)} {outcome(bench, job)}")
    after()
    return True


def run_job(folder: Path, job: Job) -> None:
    """Run one job in this process; what it prints is in job.log, and how it ended in job.json.

    Raises KeyboardInterrupt where the process is told to stop, and what has left a GPU unusable.
    """
    folders.begun(folder, pid=os.getpid())
    code = 1
    with writing(folder / "job.log"):
        log = (folder / "job.log").open("a", encoding="utf-8", buffering=1)
    with log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        try:
            _fresh_memory()
            _run(folder, job)
            code = 0
        except UserError as error:
            print(f"error: {error}", file=log)
            code = 2
        except KeyboardInterrupt:
            folders.ended(folder, folders.RESUME, signalled=True)
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            traceback.print_exc(file=log)
            if "CUDA error" in str(error):  # every later call of this process would fail with it
                folders.ended(folder, code)
                raise UserError(f"{folder}: {error}; the same command goes on with the other runs") from None
    folders.ended(folder, code)


def _run(folder: Path, job: Job) -> None:
    from zoft.config.compose import to_yaml
    from zoft.method.configured import load_run
    from zoft.run.start import train_run
    from zoft.train.resolve import absolute_paths

    if job.part == "gradient":
        from zoft.bench.gradient import measure_gradient

        measure_gradient(job.config, folder, job.draws)
    elif job.ask is not None:
        from zoft.baselines.methods import run_baseline

        for name in (
            ASKED,
            "config.yaml",
            "env.json",
            "metrics.jsonl",
        ):  # of one that was killed: it starts again
            (folder / name).unlink(missing_ok=True)
        run_baseline(job.config, job.ask)
    else:
        if not (folder / "ledger").exists():
            write(folder / "config.yaml", to_yaml(absolute_paths(job.config)))
        trusted = ["trust_remote_code=true"] if job.config.trust_remote_code else []
        train_run(load_run(folder, trusted), resume=folder)


def _fresh_memory() -> None:
    """Forget the last run's memory and its peak, so that the next one's figure is its own."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: the peak of the resident set starts again from what it is now
        Path("/proc/self/clear_refs").write_text("5")


def _counted(bench: Bench, since: float) -> str:
    over = sum(is_over(bench, job, since) for job in known_jobs(bench, since))
    return f"{over}/{planned_runs(bench)}"


def outcome(bench: Bench, job: Job) -> str:
    """Return a line on how a job ended."""
    folder, c = bench.root / job.name, job.config
    about = f"{job.task}, {job.row}"
    if job.part in ("search", "run"):
        about += f", lr {short(c.lr)}, {'search' if job.part == 'search' else f'seed {c.seed}'}"
    elif job.part == "frame":
        about += f", seed {c.seed}"
    else:
        about += ", gradient"
    if not (folder / "result.json").exists():
        return f"failed {about}: {job_record(folder).get('error', '')}"
    found = result(folder)
    shown = [f"{k} {short(v)}" for k, v in found["after"].items()][:3]
    if job.part == "search":
        shown = [f"training loss {short(late_loss(folder))}"]
    if job.part == "gradient":
        shown = [f"cosine {short(found['cosine'])}"]
    return f"done {about}: {', '.join(shown)}, {found.get('train_seconds', 0.0):.3g} s"


# ---- several processes -----------------------------------------------------------------------------------------------


def share_out(
    bench: Bench, jobs: int, command: Callable[[float], Sequence[str]], device: str, say: Callable[[str], Any],
    after: Callable[[], Any],
) -> None:  # fmt: skip
    """Have `jobs` processes work on a bench, each on one of the GPUs; one that dies is replaced, its job has failed.

    command(since) -> the words of a process that works on it. after() is called now and then.
    """
    import subprocess

    from zoft.sweep.local import gpus, threads

    since, every = time.time(), gpus(os.environ) if device in ("auto", "cuda") else []

    def begin(place: int) -> Any:
        env = {**os.environ, **threads(jobs, os.environ)}
        if every:
            env["CUDA_VISIBLE_DEVICES"] = every[place % len(every)]
        return subprocess.Popen(
            command(since), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=folders.die_with_parent,
        )  # fmt: skip

    running = {place: begin(place) for place in range(jobs)}
    try:
        looked = time.monotonic()
        while running:
            for place, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[place]
                if code and _failed_with(bench, process.pid, code, since, say):
                    running[place] = begin(place)
            if time.monotonic() - looked > 10:
                looked = time.monotonic()
                after()
            time.sleep(WAIT_SECONDS)
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in running.values():
            process.wait()


def _failed_with(bench: Bench, pid: int, code: int, since: float, say: Callable[[str], Any]) -> bool:
    """Note the failure of the job whose process died; say whether there was one, so that others may go on."""
    found = False
    for job in known_jobs(bench, since):
        folder, record = bench.root / job.name, job_record(bench.root / job.name)
        if record.get("pid") != pid or record.get("started", 0.0) < since:
            continue
        if "ended" not in record and not (folder / "result.json").exists():
            folders.ended(folder, code)
            say(outcome(bench, job))
            found = True
        elif record.get("code") == 1:  # it said so itself: a GPU that was unusable afterwards
            found = True
    return found


def reason(bench: Bench, job: Job) -> str:
    """Return why a job failed, "" where it did not."""
    folder = bench.root / job.name
    return str(job_record(folder).get("error", "")) if has_failed(folder) else ""


def finished(bench: Bench, jobs: Sequence[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """Return the finished ones of some jobs with their results."""
    return [(job, found) for job in jobs if (found := result(bench.root / job.name))]
