"""Read the folders of runs and baselines for a report, which puts them side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoft.config.digest import FREE
from zoft.console import logged
from zoft.errors import UserError
from zoft.folder import ASKED
from zoft.method.estimators.named import ESTIMATORS
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.replay.saved_model import read_result
from zoft.yaml_files import yaml_tree

METRICS = (
    "accuracy", "macro_f1", "auc", "calibrated_accuracy", "exact_match", "f1", "reward", "preference_accuracy", "preference_loss", "loss", "perplexity"
)  # fmt: skip
# What a step that writes texts says of them.
TOLD = ("reward", "reward_spread", "length", "differ")
# Keys that do not tell runs apart; what a run is judged on does, though it decides no weight.
SAME = {"seed", "output_dir", *FREE} - {"model", "adapter", "reward", "save_best", "best_by", "eval_limit", "task.train",
        "task.eval", "task.num_eval", "task.null_prompt"}  # fmt: skip
# Keys that a baseline takes from the command line; what a config says besides is of its recipe.
ANY = ("model", "task", "limits", "max_length", "eval_limit", "seed", "device", "threads", "output_dir", "trust_remote_code",
       "max_new_tokens", "stop", "bits", "group", "zero_points", "quantise_head")  # fmt: skip


@dataclass
class Run:
    """Hold a run or a baseline, as its folder has it."""

    folder: Path
    seed: int
    about: dict[str, Any]  # what tells it from others: method, and its keys but SAME
    steps: int  # of the plan
    each: int  # forwards a step
    result: dict[str, Any]  # empty where it is not finished
    losses: dict[int, float]  # of each step
    evals: dict[int, dict[str, float]]  # of the weights after so many steps
    texts: dict[int, dict[str, float]] = field(
        default_factory=dict
    )  # of each step, where it wrote some: TOLD

    @property
    def label(self) -> str:
        """Return its kind: a baseline's method, else the recipe."""
        return str(self.about.get("method") or self.about.get("recipe"))


@dataclass
class Group:
    """Hold runs that differ in their seed alone; `name` tells it from the report's other groups, `settings` says all it differs in."""

    runs: list[Run]
    name: str = ""
    settings: str = ""
    finished: list[Run] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """Return a metric at the end of each finished run that has it."""
        found = [run.result["after"].get(metric) for run in self.finished]
        return [float(v) for v in found if isinstance(v, (int, float))]


def read(folder: Path) -> Run:
    """Read a run's folder. Raises UserError where it is none, or damaged."""
    tree = yaml_tree(folder / "config.yaml")
    task = tree.pop("task", {})
    tree.pop("limits", None)  # how much of the data is read at most says nothing of a run
    flat = tree | {f"task.{k}": v for k, v in (task if isinstance(task, dict) else {"name": task}).items()}
    about = {k: v for k, v in flat.items() if k not in SAME}
    if (folder / ASKED).is_file():
        try:
            about |= json.loads((folder / ASKED).read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{folder / ASKED}: damaged; make the baseline again") from None
    rows = logged(folder / "metrics.jsonl")
    result = read_result(folder)
    steps = int(result.get("steps", flat.get("steps", 0)))
    used = ESTIMATORS.get(str(flat.get("estimator")), TWO_SIDED)
    again = 3 if flat.get("update") == "conservative" else 0
    each = (
        (used.count(int(flat.get("q", 1))) + again)
        * int(flat.get("batch_size", 1))
        * int(flat.get("accumulate", 1))
    )
    if result and steps:
        each = int(result["forwards"]) // steps
    return Run(
        folder, int(flat.get("seed", 0)), about, steps, each, result,
        {r["step"]: float("nan") if r.get("loss") is None else r["loss"] for r in rows if "eval" not in r},
        {r["step"]: r["eval"] for r in rows if "eval" in r},
        {r["step"]: {k: r[k] for k in TOLD} for r in rows if all(isinstance(r.get(k), (int, float)) for k in TOLD)},
    )  # fmt: skip


def folders(paths: Sequence[str]) -> list[Path]:
    """Return the runs' folders that are meant: each path itself, or all runs below it. Raises UserError where there is none."""
    found: list[Path] = []
    for text in paths:
        path = Path(text)
        below = (
            [path]
            if _is_run(path)
            else sorted(p.parent for p in path.rglob("config.yaml") if _is_run(p.parent))
        )
        if not below:
            raise UserError(
                f"{text}: no run's folder, and none below it (one has config.yaml and metrics.jsonl)"
            )
        found += below
    return list({p.resolve(): p for p in found}.values())


def _is_run(path: Path) -> bool:
    signs = ("ledger", "metrics.jsonl", "result.json", ASKED)
    return (path / "config.yaml").is_file() and any((path / s).exists() for s in signs)
