"""`zoft eval RUN --lm-eval TASKS`: EleutherAI's lm-evaluation-harness on a model that is loaded already, in process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.packages import missing


def require_tasks(tasks: str, path: str | None) -> list[str]:
    """Return the tasks' names. Raises UserError without the package, or for names or a folder that cannot be."""
    names = [t for t in tasks.replace(",", " ").split() if t]
    if not names:
        raise UserError("--lm-eval is empty: name tasks, as in --lm-eval arc_easy,boolq")
    if path is not None and not Path(path).is_dir():
        raise UserError(
            f"--lm-eval-path {path}: no such folder; give the one that your task files (.yaml) are in"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(missing("--lm-eval", "lm-eval"))
    return names


def run_tasks(
    config: Config,
    model: Any,
    tokenizer: Any,
    names: list[str],
    path: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return {task: {metric: value}} of the harness, its bootstrap errors as metric_stderr.

    model: with or without an adapter, on its device. path: a folder of task files besides the harness's own; those need
    no network where their data is local. limit: examples of each task, the first ones.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=path)
    known = set(manager.all_tasks)
    if unknown := [n for n in names if n not in known and not Path(n).is_file()]:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--lm-eval {unknown[0]}: no such task{hint}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, max_length=None, batch_size=config.batch_size)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=names, task_manager=manager, limit=limit, random_seed=config.seed % (1 << 32),
        numpy_random_seed=config.seed % (1 << 32), torch_random_seed=config.seed % (1 << 32),
        fewshot_random_seed=config.seed % (1 << 32),
    )  # fmt: skip
    assert found is not None, "one process"
    return {
        name: {_metric(k): v for k, v in metrics.items() if k != "alias" and isinstance(v, (int, float))}
        for name, metrics in found["results"].items()
    }


def _metric(key: str) -> str:
    """The harness's `acc,none` is acc, and `f1,strict` is f1 (strict)."""
    name, _, how = key.partition(",")
    return name if how in ("", "none") else f"{name} ({how})"


def tasks_text(result: dict[str, dict[str, Any]]) -> str:
    """Return a line per task and metric, ± its standard error."""
    from zoft.console import short

    lines = []
    for task, metrics in result.items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                error = metrics.get(
                    name.replace(name.partition(" ")[0], name.partition(" ")[0] + "_stderr", 1)
                )
                lines.append(
                    f"{task:22}{name:16}{short(value):>10}"
                    + (f" ± {short(error)}" if isinstance(error, float) else "")
                )
    return "\n".join(lines)
