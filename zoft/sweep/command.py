"""Do what the options of `zoft sweep` ask: one of run, status, cancel, results."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.errors import UserError


@dataclass(frozen=True)
class Asked:
    """Hold the options as typed; None or False where they were not."""

    config: str | None = None
    launcher: str = "local"
    jobs: int | None = None
    detach: bool = False
    slurm: str | None = None
    trials: int | None = None
    metric: str | None = None
    direction: str | None = None
    plot: str | None = None
    status: str | None = None
    watch: bool = False
    cancel: str | None = None
    results: str | None = None
    as_json: bool = False


# Options that each way of using the verb takes, besides its own.
TAKES = {
    "config": ("launcher", "jobs", "detach", "slurm", "trials", "metric", "direction", "plot"),
    "status": ("watch", "metric", "as_json"),
    "cancel": (),
    "results": ("metric", "direction", "plot", "as_json"),
}


def run_sweep_command(asked: Asked, words: Sequence[str], say: Callable[[str], Any]) -> None:
    """Do what is asked. words: key=value, or the jobs to cancel. Raises UserError where jobs have failed."""
    way = next((w for w in ("status", "cancel", "results") if getattr(asked, w) is not None), "config")
    for name in vars(asked):
        default = getattr(Asked(), name)
        if name != way and name not in TAKES[way] and getattr(asked, name) != default:
            said = "--json" if name == "as_json" else f"--{name}"
            raise UserError(
                f"{said}: does nothing with {'a new sweep' if way == 'config' else '--' + way}; leave it out"
            )
    if asked.direction not in (None, "minimize", "maximize"):
        raise UserError(f"--direction {asked.direction}: use minimize or maximize")
    if words and way in ("status", "results"):
        raise UserError(f"{words[0]}: --{way} takes a folder alone")
    if way == "config":
        return _sweep(asked, words, say)
    if way == "cancel":
        from zoft.sweep import cancel as sweep_cancel

        return say(sweep_cancel.cancel(str(asked.cancel), words))
    from zoft.console import finite
    from zoft.sweep import view
    from zoft.sweep.view import status_text

    if way == "status":
        if asked.watch:
            return view.watch(str(asked.status), asked.metric)
        if asked.as_json:
            return say(json.dumps(finite(view.status(str(asked.status)))))
        return say(status_text(str(asked.status), asked.metric))
    if asked.as_json:
        return say(json.dumps(finite(view.results(str(asked.results)))))
    _show(Path(str(asked.results)), asked, say)


def _sweep(asked: Asked, words: Sequence[str], say: Callable[[str], Any]) -> None:
    from zoft.sweep import local, plan
    from zoft.sweep.job import job_is_held, job_record, job_state
    from zoft.sweep.plan import Launch, in_background

    told = [w for w in words if w.startswith("slurm.")]
    words = [w for w in words if w not in told]
    if asked.launcher not in ("local", "slurm"):
        raise UserError(f"--launcher {asked.launcher}: use local or slurm")
    if asked.launcher == "local" and (told or asked.slurm):
        raise UserError(f"{(told or ['--slurm'])[0]}: is for --launcher slurm; leave it out")
    if asked.jobs is not None and asked.jobs < 1:
        raise UserError(f"--jobs {asked.jobs}: must be ≥ 1")
    if asked.trials is not None and asked.trials < 1:
        raise UserError(f"--trials {asked.trials}: must be ≥ 1")
    if asked.trials is None and asked.direction and not asked.metric:
        raise UserError(f"--direction {asked.direction}: of which metric? set --metric, too")
    metric = asked.metric or "loss"
    searched = [w for w in words if "output_dir=" not in w] if asked.trials else []
    made = plan.plan(asked.config, words, search=f"{metric} {searched}" if asked.trials else "")
    if asked.trials:
        from zoft.sweep import search

        search.require()
        if not made.swept:
            raise UserError(
                "--trials: nothing to search: give a list or an interval, lr=tag(log,interval(1e-6,1e-4))"
            )
    device = next(iter(made.devices)) if len(made.devices) == 1 else "auto"
    slots = local.slots(asked.jobs, device)
    launcher: Any = functools.partial(local.run, jobs=slots, device=device)
    if asked.launcher == "slurm":
        from zoft.sweep import slurm as launch_slurm

        launch_slurm.require()
        options = launch_slurm.options(
            asked.slurm, [*told, *([f"slurm.parallel={asked.jobs}"] if asked.jobs else [])]
        )
        slots = asked.jobs or 4  # trials of a round
        alone = asked.detach and not asked.trials  # Slurm needs no parent for a list of jobs
        launcher = functools.partial(launch_slurm.run, slurm=options, detach=alone)
    if asked.detach and (asked.launcher == "local" or asked.trials):
        if job_is_held(made.root):
            raise UserError(f"{made.root}: another `zoft sweep` is at work on it")
        arguments = [a for a in sys.argv[1:] if a != "--detach"]
        return say(in_background(made.root, arguments[arguments.index("sweep") + 1 :]))
    launch = Launch(launcher, slots)
    if asked.trials:
        search.search(made, launch, asked.trials, metric, asked.direction, say)
    else:
        plan.sweep(made, launch, say)
    if asked.detach:
        return say(f"`zoft sweep --status {made.root}` and `--cancel {made.root}` tell and stop")
    _show(made.root, asked, say, own=True)
    states = {name: job_state(made.root / name) for name in made.jobs}
    wrong = [name for name, state in states.items() if state not in ("done", "cancelled")]
    if wrong:
        why = job_record(made.root / wrong[0]).get("error") or states[wrong[0]]
        raise UserError(
            f"{len(wrong)} of {len(states)} jobs did not finish, {wrong[0]}: {why} "
            f"(log: {made.root / wrong[0] / 'job.log'}); the same command runs them again"
        )


def _show(root: Path, asked: Asked, say: Callable[[str], Any], own: bool = False) -> None:
    from zoft.sweep import view
    from zoft.sweep.view import goes_by, results_text

    say(results_text(root, asked.metric, asked.direction, own=own))
    if asked.plot and view.results(root):
        from zoft.sweep import plot as sweep_plot

        goal = asked.metric or goes_by(root / "best.yaml").get("metric")
        say(sweep_plot.plot(root, asked.plot, goal))
