"""`zoft report`: runs side by side, those that differ in their seed as mean ± sd. Loads no model."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoft import report_names, results
from zoft.baseline import ASKED
from zoft.config_digest import FREE
from zoft.errors import UserError
from zoft.estimators.named import ESTIMATORS
from zoft.estimators.two_sided import TWO_SIDED
from zoft.tracking import logged
from zoft.yamlfile import yaml_tree

METRICS = (
    "accuracy", "macro_f1", "auc", "calibrated_accuracy", "exact_match", "f1", "reward", "loss", "perplexity"
)  # fmt: skip
# Keys that do not tell runs apart; what a run is judged on does, though it decides no weight.
SAME = {"seed", "output_dir", *FREE} - {"model", "adapter", "reward", "save_best", "best_by", "eval_limit", "task.train",
        "task.eval", "task.num_eval", "task.null_prompt"}  # fmt: skip


@dataclass
class Run:
    """A run or a baseline, as its folder has it."""

    folder: Path
    seed: int
    about: dict[str, Any]  # what tells it from others: method, and its keys but SAME
    steps: int  # of the plan
    each: int  # forwards a step
    result: dict[str, Any]  # empty where it is not finished
    losses: dict[int, float]  # of each step
    evals: dict[int, dict[str, float]]  # of the weights after so many steps

    @property
    def label(self) -> str:
        """What kind it is: a baseline's method, else the recipe."""
        return str(self.about.get("method") or self.about.get("recipe"))


@dataclass
class Group:
    """Runs that differ in their seed alone; `name` tells it from the report's other groups, `settings` says all it differs in."""

    runs: list[Run]
    name: str = ""
    settings: str = ""
    finished: list[Run] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """A metric at the end of each finished run that has it."""
        found = [run.result["after"].get(metric) for run in self.finished]
        return [float(v) for v in found if isinstance(v, (int, float))]


def read(folder: Path) -> Run:
    """A run's folder. Raises UserError where it is none, or damaged."""
    tree = yaml_tree(folder / "config.yaml")
    task = tree.pop("task", {})
    flat = tree | {f"task.{k}": v for k, v in (task if isinstance(task, dict) else {"name": task}).items()}
    about = {k: v for k, v in flat.items() if k not in SAME}
    if (folder / ASKED).is_file():
        try:
            about |= json.loads((folder / ASKED).read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{folder / ASKED}: damaged; make the baseline again") from None
    rows = logged(folder / "metrics.jsonl")
    result = results.outcome(folder)
    steps = int(result.get("steps", flat.get("steps", 0)))
    used = ESTIMATORS.get(str(flat.get("estimator")), TWO_SIDED)
    each = used.count(int(flat.get("q", 1))) * int(flat.get("batch_size", 1)) * int(flat.get("accumulate", 1))
    if result and steps:
        each = int(result["forwards"]) // steps
    return Run(
        folder, int(flat.get("seed", 0)), about, steps, each, result,
        {r["step"]: float("nan") if r.get("loss") is None else r["loss"] for r in rows if "eval" not in r},
        {r["step"]: r["eval"] for r in rows if "eval" in r},
    )  # fmt: skip


def folders(paths: Sequence[str]) -> list[Path]:
    """The runs' folders that are meant: each path itself, or all runs below it. Raises UserError where there is none."""
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


def groups(runs: Sequence[Run], say: Callable[[str], Any] = lambda line: None) -> list[Group]:
    """Runs by what they are apart from their seed, in the order given, named by what tells them apart.

    A deviation is over seeds, so a group has one finished run of a seed: one that equals another is left out, one of other
    figures goes to another group, and a line says so.
    """
    made: dict[str, list[Group]] = {}
    for run in runs:
        _put(run, made.setdefault(json.dumps(run.about, sort_keys=True, default=str), []), say)
    out = [g for alike in made.values() for g in alike]
    for g in out:
        g.runs.sort(key=lambda r: r.seed)
        g.finished = [r for r in g.runs if r.result]
    first = [(g.finished or g.runs)[0] for g in out]
    every = report_names.words(first)
    for g, words, name in zip(out, every, report_names.names(first, every)):
        g.name, g.settings = name, " ".join(words)
    return out


def _put(run: Run, alike: list[Group], say: Callable[[str], Any]) -> None:
    """Put a run into the first of some groups, of settings like its own, that has no finished run of its seed."""
    known = [r for g in alike for r in g.runs if run.result and r.result and r.seed == run.seed]
    for other in known:
        if _figures(other) == _figures(run):
            say(f"{run.folder}: the settings, seed and figures of {other.folder}; counted once")
            return
    if known:
        say(
            f"{run.folder}: the settings and seed {run.seed} of {known[0].folder}, but other figures; in a row apart, "
            "as a deviation is over seeds"
        )
    if len(alike) == len(known):
        alike.append(Group([]))
    alike[len(known)].runs.append(run)


def _figures(run: Run) -> str:
    return json.dumps([run.result["steps"], run.result["after"]], sort_keys=True)


def metrics_of(some: Sequence[Group], asked: Sequence[str] = ()) -> list[str]:
    """The metrics to show: those asked for, or those that any finished run has. Raises UserError for an unknown one."""
    have = {
        m for g in some for r in g.runs for e in (r.result.get("after", {}), *r.evals.values()) for m in e
    }
    for m in asked:
        if m not in have:
            raise UserError(
                f"--metrics {m}: not in these evaluations; they have {', '.join(sorted(have)) or 'none'}"
            )
    return list(asked) or [m for m in METRICS if m in have]


def rows(some: Sequence[Group], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a group with a finished run: name, settings, n, unfinished, seeds, folders, steps, forwards, each metric with _sd,
    train_seconds, peak_memory_gb; and what the models of the runs scored before training, under the name untrained."""
    out = []
    before = [r.result["before"] for g in some for r in g.finished if r.result["before"]]
    if before and all(b == before[0] for b in before):  # one model, one task
        out.append(
            {"name": "untrained", "n": 1, "steps": 0, "forwards": 0, **{m: before[0].get(m) for m in metrics}}
        )
    for g in (g for g in some if g.finished):
        row: dict[str, Any] = {
            "name": g.name,
            "settings": g.settings,
            "n": len(g.finished),
            "unfinished": len(g.runs) - len(g.finished),
        }
        row["seeds"] = " ".join(str(r.seed) for r in g.finished)
        row["folders"] = " ".join(str(r.folder) for r in g.finished)
        for key in ("steps", "forwards", "train_seconds", "peak_memory_gb"):
            row |= _summed(key, [float(r.result[key]) for r in g.finished])
        for m in metrics:
            row |= _summed(m, g.values(m))
        out.append(row)
    return out


def _summed(key: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, None where there is none."""
    return {
        key: statistics.fmean(values) if values else None,
        f"{key}_sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def markdown(found: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The rows as a table of mean ± sd."""
    head = ["", "n", "steps", "forwards", *metrics, "seconds", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in found:
        cells = [str(row["name"]), str(row["n"]), _whole(row.get("steps")), _whole(row.get("forwards"))]
        for m in metrics:
            value, sd = row.get(m), row.get(f"{m}_sd")
            cells.append("" if value is None else f"{value:.4f}" + (f" ± {sd:.4f}" if sd is not None else ""))
        cells.append(_whole(row.get("train_seconds")))
        memory = row.get("peak_memory_gb")
        cells.append("" if memory is None else f"{memory:.2f}")
        lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    return "\n".join(lines)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV."""
    names = list(dict.fromkeys(k for row in found for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def cut(some: Sequence[Group]) -> list[str]:
    """A line for each name in the table that has no room for all that its runs differ in."""
    return [f"{g.name}: {g.settings}" for g in some if g.finished and not g.name.startswith(g.settings)]


def unfinished(some: Sequence[Group]) -> list[str]:
    """A line for each run that the table leaves out because it is not finished."""
    lines = []
    for run in (r for g in some for r in g.runs if not r.result):
        done = max([-1, *run.losses]) + 1
        last = max(run.evals, default=None)
        seen = "" if last is None else f"; at step {last}: " + ", ".join(
            f"{m} {run.evals[last][m]:.4g}" for m in METRICS if isinstance(run.evals[last].get(m), (int, float))
        )  # fmt: skip
        lines.append(
            f"not finished, so not in the table: {run.folder}, {done:,} of {run.steps:,} steps{seen}"
        )
    return lines


def report(
    paths: Sequence[str], metrics: Sequence[str] = (), *, csv_to: str | None = None, png_to: str | None = None
) -> str:
    """The markdown table, what its names leave out, and what it leaves out; writes the CSV and the picture where asked."""
    from zoft.errors import writing

    some = groups([read(f) for f in folders(paths)], lambda line: print(line, file=sys.stderr))
    chosen = metrics_of(some, metrics)
    found = rows(some, chosen)
    if csv_to:
        with writing(csv_to):
            Path(csv_to).write_text(table(found), encoding="utf-8")
    if png_to:
        from zoft import report_plot

        report_plot.draw(some, list(metrics) or chosen, Path(png_to))
    left_out = [*cut(some), *unfinished(some)]
    tabled = [markdown(found, chosen)] if found else []
    return "\n".join([*tabled, *[""][: len(tabled) and len(left_out)], *left_out])
