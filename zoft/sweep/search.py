"""A sweep whose values are searched: Optuna asks for trials in rounds, and is told what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoft.errors import UserError
from zoft.packages import missing
from zoft.sweep import plan, view
from zoft.sweep.grammar import Dimension, as_text
from zoft.sweep.job import job_state, result
from zoft.sweep.plan import Launch, add_job, job_name

JOURNAL = "optuna.journal"


def require() -> Any:
    """Return Optuna. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(missing("--trials", "optuna")) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def search(
    made: plan.Plan,
    launch: Launch,
    trials: int,
    metric: str,
    told: str | None,
    say: Callable[[str], Any],
) -> None:
    """Run trials until `trials` are complete, launch.slots a round; those that were under way are finished first.

    The journal in the sweep's folder keeps them: the same command goes on, with more trials if it asks for more.
    A failed trial counts for this call; the next call puts another in its place.
    Source: TPE (Bergstra et al. 2011), optuna's sampler, its first 10 trials random; seeded by the count of trials.
    """
    optuna = require()
    with plan.hold(made.root):
        study = _study(optuna, made, metric, told)
        distributions = {d.key: _distribution(optuna, d) for d in made.swept}
        under_way = []
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if "job" in trial.user_attrs:
                under_way.append(optuna.trial.Trial(study, trial._trial_id))
            else:  # asked for, and never made
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        failed = 0
        while True:
            complete = len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
            room = min(launch.slots, trials - complete - failed)
            batch = under_way[: max(room, 1)] if under_way else []
            under_way = under_way[len(batch) :]
            try:
                batch += [_ask(made, study, distributions) for _ in range(room - len(batch))]
            except ValueError as error:
                raise UserError(
                    f"{made.root}: it searched other values before: {error}; use another output_dir"
                ) from None
            if not batch:
                return
            names = [t.user_attrs["job"] for t in batch]
            for trial in batch:
                add_job(made, {k: as_text(v) for k, v in trial.params.items()})
            plan.write_down(made, names)
            todo = [n for n in dict.fromkeys(names) if job_state(made.root / n) != "done"]
            if todo:
                launch.run(made.root, todo, made.extra, say)
            for trial, name in zip(batch, names):
                failed += not _tell(optuna, made, study, trial, name, metric)


def _study(optuna: Any, made: plan.Plan, metric: str, told: str | None) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    way = view.direction(metric, told)
    storage = JournalStorage(JournalFileBackend(str(made.root / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=metric, direction=way, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)), constant_liar=True)
    if study.direction.name.lower() != way:
        raise UserError(
            f"{made.root}: its search is to {study.direction.name.lower()} {metric}; leave --direction out"
        )
    return study


def _distribution(optuna: Any, d: Dimension) -> Any:
    i = d.interval
    if i is None:
        return optuna.distributions.CategoricalDistribution(d.values)
    if i.whole:
        return optuna.distributions.IntDistribution(int(i.low), int(i.high), log=i.log)
    return optuna.distributions.FloatDistribution(i.low, i.high, log=i.log)


def _ask(made: plan.Plan, study: Any, distributions: Mapping[str, Any]) -> Any:
    """A new trial; its job's name is in the journal before the job exists."""
    trial = study.ask(dict(distributions))
    row = {k: as_text(v) for k, v in trial.params.items()}
    config = add_job(made, row)
    trial.set_user_attr("job", job_name(config, row))
    return trial


def _tell(optuna: Any, made: plan.Plan, study: Any, trial: Any, name: str, metric: str) -> bool:
    """Tell what came of a trial; whether it has a value."""
    folder = made.root / name
    found = result(folder)
    value = view.score(found, metric) if found else None
    if value is None and found and metric not in found["after"]:
        raise UserError(f"--metric {metric}: the results have {', '.join(found['after'])}")
    if value is None and job_state(folder) in ("stopped", "running"):
        return False  # it goes on with the next call
    study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
    return value is not None
