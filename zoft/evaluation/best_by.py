"""Say which metrics an evaluation of a task's rows has, and refuse a best_by that is none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoft.config.schema import GENERATED, VERIFIED, Config, fields
from zoft.errors import UserError

if TYPE_CHECKING:
    from zoft.data.tasks import TaskData


def chooses(config: Config) -> bool:
    """Say whether anything in this run goes by best_by."""
    return bool(config.keep_best or config.save_best or config.early_stop)


def refuse_best_by(config: Config, data: TaskData) -> None:
    """Refuse a best_by that evaluations of this task's rows cannot have, before the model loads."""
    if chooses(config) and config.best_by not in (known := metrics_of_task(config, data)):
        raise UserError(
            f"best_by={config.best_by}: evaluations of task={data.name} have no such metric; "
            f"use {', '.join(m for m in fields_of_best() if m in known)}"
        )


def metrics_of_task(config: Config, data: TaskData) -> set[str]:
    """Return the metrics that evaluate.figures, and the texts of a resolved objective, give of the rows that best_by goes by."""
    from zoft.data.tasks import subset

    rows = data.dev or subset(data.eval, config.eval_limit)
    counts = {len(r["candidates"]) for r in [*rows, *data.train]}
    found = {"loss"}
    if config.objective in GENERATED:
        found |= (
            {"reward"}
            if config.objective == "reward" or config.reward or config.task.name in VERIFIED
            else {"exact_match", "f1"}
        )
    if data.objective == "preference":
        return {"loss", "accuracy"}
    if data.objective == "lm":
        found |= {"perplexity"} | ({"accuracy"} if max(len(r["candidates"]) for r in rows) > 1 else set())
        writes = config.objective not in GENERATED and all(r.get("answers") for r in rows)
        return found | ({"exact_match", "f1"} if writes else set())
    found |= {"accuracy"}
    if len(counts) == 1 and all(len(r.get("golds", ())) < 2 for r in rows):
        found |= {"macro_f1", "calibrated_accuracy"}
        found |= {"auc"} if counts == {2} and len({r["gold"] for r in rows}) == 2 else set()
    return found


def fields_of_best() -> tuple[str, ...]:
    """Return the metrics that best_by may name."""
    return fields()["best_by"].metadata["one_of"]
