"""Select the best evaluation of a run, and whether to go on: functions of the evaluations that are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.evaluation.best_by import chooses, fields_of_best
from zoft.ledger.format import Event
from zoft.replay.snapshot import file_of

if TYPE_CHECKING:
    from zoft.method.space import Trained

LOWER_IS_BETTER = ("loss", "perplexity")

Evals = Mapping[int, Mapping[str, Any]]  # step -> metrics, those on the dev set as dev_…


def best_step(config: Config, evals: Evals) -> int:
    """Return the step of the best evaluation by best_by, on the dev set where there is one; the earliest of equals."""
    return min(sorted(evals), key=lambda s: badness(of_best(config, evals[s]), config.best_by))


def stops_early(config: Config, evals: Evals) -> bool:
    """Say whether the last early_stop evaluations brought nothing better: the run ends here."""
    if not config.early_stop or not evals:
        return False
    return sum(s > best_step(config, evals) for s in evals) >= config.early_stop


def score_step(
    config: Config,
    evals: Evals,
    step: int,
    test: Callable[[], dict[str, Any]],
    dev: Callable[[], dict[str, Any]] | None,
) -> dict[str, Any]:
    """Return a step's metrics. With a dev set these are dev_…; the evaluation rows are looked at before and after training, and
    where save_best may keep this step's weights."""
    if dev is None:
        return test()
    found = {f"dev_{k}": v for k, v in dev().items()}
    ends = step in (0, config.steps)
    better = config.save_best and best_step(config, {**evals, step: found}) == step
    return {**test(), **found} if ends or better else found


def has_test_metrics(metrics: Mapping[str, Any]) -> bool:
    """Say whether a step's metrics have those of the evaluation rows."""
    return any(not name.startswith("dev_") for name in metrics)


def selection_note(config: Config, evals: Evals) -> str:
    """Return a line where the evaluation rows themselves choose, "" where they do not."""
    if not chooses(config) or any(name.startswith("dev_") for name in evals[0]):
        return ""
    return (
        f"best_by={config.best_by}: there is no dev set, so the evaluation rows choose among this run's weights, and its "
        "figures on them are too good; task.num_dev=… makes a dev set for the choice"
    )


def look_back(
    config: Config, folder: Path, step: int, trained: Sequence[Trained], test: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return a past step's metrics on the evaluation rows, where nobody looked at them then (save_best came later). Leaves the
    weights in memory at that step, rebuilt from base and ledger."""
    from zoft.replay.live import live
    from zoft.replay.tensors import Ask, requested

    config, log = requested(config, folder, Ask(step))
    model, _, _ = live(config, folder, log)
    made = dict(model.named_parameters())
    for t in trained:
        t.stored.copy_(made[t.name])
    return test()


def save_step(config: Config, folder: Path, out: Path, step: int) -> None:
    """Write the model (or adapter) as it was after `step` steps: base and ledger give its bits."""
    from zoft.replay.live import replay_run
    from zoft.replay.tensors import Ask

    replay_run(config, folder, out, Ask(step))


def check_metric(config: Config, metrics: Mapping[str, Any]) -> None:
    """Refuse a best_by that this run's evaluations do not have."""
    if chooses(config) and of_best(config, metrics) is None:
        known = [m for m in fields_of_best() if of_best(replace(config, best_by=m), metrics) is not None]
        raise UserError(
            f"best_by={config.best_by}: evaluations here have no such metric; use {', '.join(known)}"
        )


def prune_snapshots(
    folder: Path, config: Config, events: Iterable[Event], evals: Mapping[int, Mapping[str, Any]]
) -> None:
    """Delete the snapshots that are neither among the newest keep_last nor the best keep_best.

    evals: step -> metrics. Ties go to the earlier step; a metric that is missing or no number is the worst.
    """
    steps = [e.step for e in events if e.kind == "snapshot" and file_of(folder, e.step).exists()]
    ranked = sorted(steps, key=lambda s: (badness(of_best(config, evals.get(s, {})), config.best_by), s))
    for step in set(steps) - set(steps[-config.keep_last :]) - set(ranked[: config.keep_best]):
        try:
            file_of(folder, step).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"snapshot: cannot delete {file_of(folder, step)}: {error.strerror}") from error


def of_best(config: Config, metrics: Mapping[str, Any]) -> float | None:
    """Return the metric that best_by names, on the dev set where there is one: then no other rows decide."""
    dev = "dev_" if any(name.startswith("dev_") for name in metrics) else ""
    return metrics.get(dev + config.best_by)


def badness(value: float | None, metric: str) -> float:
    """Return a metric as a number of which less is better."""
    if value is None or value != value:
        return float("inf")
    return value if metric in LOWER_IS_BETTER else -value
