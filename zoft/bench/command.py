"""Run `zoft bench`: its plan, its runs, its table and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.signals import listening
from zoft.sweep.plan import Interrupted


@dataclass(frozen=True)
class Asked:
    """Hold the options as typed. worker: the time since which failed jobs are not tried again, for a process of --jobs."""

    config: str | None = None
    only: Sequence[str] = ()
    tasks: str = ""
    seeds: int | None = None
    jobs: int = 1
    gradient: bool = False
    dry_run: bool = False
    worker: float | None = None


def run_bench_command(
    asked: Asked, overrides: Sequence[str], say: Callable[[str], Any], note: Callable[[str], Any]
) -> None:
    """Do what is asked. say: where the plan or the table goes. note: where progress goes."""
    from zoft.bench.plan import Wanted, read_bench

    if asked.config is None:
        raise UserError("bench: name a bench file: --config bench/estimators, or a .yaml file of your own")
    for option, value in (("--jobs", asked.jobs), ("--seeds", asked.seeds)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be ≥ 1")
    only = [name.strip() for text in asked.only for name in text.split(",") if name.strip()]
    tasks = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    bench = read_bench(asked.config, overrides, Wanted(only, tasks, asked.seeds, asked.gradient))
    if asked.dry_run:
        return say(plan_text(bench))
    from zoft.bench import table
    from zoft.bench.work import share_out, work
    from zoft.folder import refuse_unwritable
    from zoft.packages import zoft_command

    _look(bench)
    refuse_unwritable("output_dir", bench.root)
    bench.root.mkdir(parents=True, exist_ok=True)
    try:
        with listening(str(bench.root)):
            if asked.worker is not None:
                return work(bench, note, asked.worker)
            if asked.jobs == 1:
                work(bench, note, time.time(), lambda: table.write_tables(bench))
            else:
                words = ["bench", "--config", asked.config, *overrides]
                words += [w for name in only for w in ("--only", name)]
                words += ["--tasks", ",".join(tasks)] if tasks else []
                words += ["--seeds", str(asked.seeds)] if asked.seeds else []
                words += ["--gradient"] if asked.gradient else []
                device = next((j.config.device for e in bench.entries for j in _first(e)), "auto")
                share_out(
                    bench, asked.jobs, lambda since: zoft_command(*words, "--worker", repr(since)), device, note,
                    lambda: table.write_tables(bench),
                )  # fmt: skip
    except KeyboardInterrupt:
        if asked.worker is None:
            table.write_tables(bench)
        raise Interrupted(f"stopped; the same command goes on with {bench.root}") from None
    text = table.write_tables(bench)
    say(text.rstrip())
    try:
        pictures = table.draw_tasks(bench)
    except UserError as error:  # matplotlib is an extra package, and the table is there
        return note(str(error))
    note(f"{', '.join([str(bench.root / table.TABLE), str(bench.root / table.CSV), *pictures])}")


def plan_text(bench: Any) -> str:
    """Return the plan: a line per task and row, then the number of runs and their counted forwards."""
    from zoft.bench.work import is_over, known_jobs, planned_runs
    from zoft.console import short
    from zoft.tables import aligned

    lines, total = [["task", "row", "lr", "search", "runs", "forwards"]], 0
    for e in bench.entries:
        runs = next(iter(e.runs.values()), ())
        counted = sum(j.forwards for j in (*e.search.values(), *runs))
        total += counted
        search, own = (_several([j.forwards for j in jobs]) for jobs in (list(e.search.values()), runs))
        if e.frame:
            own = f"{len(e.frame)} × {e.frame[0].ask.method}"
        rates = ", ".join(short(lr) for lr in e.runs)
        lines.append([e.task, e.row, rates, search, own, f"{counted:,}" if runs else ""])
    done = sum(is_over(bench, job) for job in known_jobs(bench))
    return "\n".join(
        [
            *aligned(lines),
            f"{bench.root}: {planned_runs(bench)} runs, {done} of them over; {total:,} counted forwards, "
            "those of baselines beside them",
        ]
    )


def _several(forwards: Sequence[int]) -> str:
    return f"{len(forwards)} × {forwards[0]:,}" if forwards else ""


def _first(entry: Any) -> list[Any]:
    """Return one job of an entry."""
    return [*entry.frame, *(j for jobs in entry.runs.values() for j in jobs)][:1]


def _look(bench: Any) -> None:
    """Refuse models and data that are missing, before anything loads."""
    from zoft.data.tasks import check_task
    from zoft.models.load import check_model, find_model

    seen: list[Any] = []
    for e in bench.entries:
        for job in _first(e):
            if job.config.model not in seen:
                check_model(find_model(job.config.model))
                seen.append(job.config.model)
            if job.config.task not in seen:
                check_task(job.config.task)
                seen.append(job.config.task)
