"""Sum up a bench: one row per task and row of the file, as Markdown and CSV, from the folders of its runs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from zoft.baselines.ask import TRAINING, WITH_GRADIENTS
from zoft.bench.plan import Bench, Entry, Job
from zoft.bench.work import chosen_lr, finished, has_failed, late_loss, reason
from zoft.console import logged, short
from zoft.folder import write
from zoft.sweep.view import default_metric
from zoft.tables import csv_text, markdown

GRADIENT = (
    "cosine",
    "step_cosine",
    "slope",
    "slope_error",
    "curvature",
    "curvature_error",
    "efficiency",
    "draws",
)
TABLE, CSV = "table.md", "table.csv"
ALL_WEIGHTS = WITH_GRADIENTS[0]  # the frame's upper end: AdamW on all weights


def summary(bench: Bench) -> list[dict[str, Any]]:
    """Return a record per task and row, those of a task best first, the frame before them.

    task, row, part ("frame" or "row"), metric, mean and sd of it over the finished runs, finished, planned, gap (the
    share of the gap between the untrained row and AdamW that the mean closes), lr (chosen), lr_tried {lr: training loss},
    forwards of a run, backwards, search_forwards of all the search, seconds and peak_memory_gb of a run (mean, most),
    failures [reason], and with `reach` of the task: reached (runs), reach_forwards, reach_seconds (means over these).
    With --gradient: cosine, efficiency and the rest of what gradient.py measures, or gradient_fault.
    None where there is no figure.
    """
    rows = []
    for task in bench.tasks:
        entries = [e for e in bench.entries if e.task == task]
        metric = _metric(bench, entries)
        some = [_record(bench, e, metric) for e in entries]
        ends = {e.frame[0].ask.method: r["mean"] for e, r in zip(entries, some) if e.frame and e.frame[0].ask}
        low, high = ends.get("zero-shot"), ends.get(ALL_WEIGHTS)
        for r in some:
            if r["mean"] is not None and low is not None and high is not None and low != high:
                r["gap"] = (r["mean"] - low) / (high - low) + 0.0  # + 0.0: no -0
        up = -1 if metric not in ("loss", "perplexity") else 1
        ranked = sorted(
            (r for r in some if r["part"] == "row"), key=lambda r: (r["mean"] is None, up * (r["mean"] or 0))
        )
        rows += [r for r in some if r["part"] == "frame"] + ranked
    return rows


def _metric(bench: Bench, entries: Sequence[Entry]) -> str:
    """Return the metric that a task is ranked by: AUC where it is measured, else accuracy, else the loss."""
    afters = [found["after"] for e in entries for _, found in finished(bench, _runs(bench, e))]
    return "auc" if any("auc" in after for after in afters) else default_metric(afters)


def _runs(bench: Bench, entry: Entry) -> Sequence[Job]:
    """Return the runs whose results a row's figures are of."""
    lr = chosen_lr(bench, entry)
    return entry.frame or ([] if lr is None else entry.runs[lr])


def _record(bench: Bench, entry: Entry, metric: str) -> dict[str, Any]:
    runs, framed = _runs(bench, entry), bool(entry.frame)
    done = finished(bench, runs)
    values = [v for _, found in done if isinstance(v := found["after"].get(metric), (int, float))]
    lr = runs[0].config.lr if runs and (not framed or _has_lr(runs[0])) else None
    searched = finished(bench, list(entry.search.values()))
    jobs = [*runs, *entry.search.values()]
    planned = len(entry.frame) or len(next(iter(entry.runs.values())))
    made: dict[str, Any] = {
        "task": entry.task, "row": entry.row, "part": "frame" if framed else "row", "metric": metric,
        "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "finished": len(done), "planned": planned, "gap": None, "lr": lr,
        "lr_tried": {
            tried: late_loss(bench.root / job.name)
            for tried, job in entry.search.items()
            if (bench.root / job.name / "result.json").exists() or has_failed(bench.root / job.name)
        },
        "forwards": _mean(done, "forwards"), "backwards": _mean(done, "backwards"),
        "search_forwards": sum(int(found["forwards"]) for _, found in searched),
        "seconds": _mean(done, "train_seconds"),
        "peak_memory_gb": max((float(found["peak_memory_gb"]) for _, found in done), default=None),
        "failures": [why for job in jobs if (why := reason(bench, job))],
    }  # fmt: skip
    if entry.task in bench.reach:
        seen = [
            _reached(bench.root / job.name, found, metric, bench.reach[entry.task]) for job, found in done
        ]
        there = [pair for pair in seen if pair]
        made |= {
            "reached": len(there),
            "reach_forwards": fmean(f for f, _ in there) if there else None,
            "reach_seconds": fmean(s for _, s in there) if there else None,
        }
    if entry.gradient:
        made |= {"gradient_fault": reason(bench, entry.gradient)}
        for _, found in finished(bench, [entry.gradient]):
            made |= {k: found[k] for k in GRADIENT}
    return made


def _has_lr(job: Job) -> bool:
    return job.ask is not None and job.ask.method in TRAINING


def _mean(done: Sequence[tuple[Job, Mapping[str, Any]]], key: str) -> float | None:
    values = [float(found[key]) for _, found in done if found.get(key) is not None]
    return fmean(values) if values else None


def _reached(folder: Path, found: Mapping[str, Any], metric: str, value: float) -> tuple[float, float] | None:
    """Return (forwards, seconds) until a run's first evaluation whose metric is at least `value`, None where none is."""
    seconds = 0.0
    for row in logged(folder / "metrics.jsonl"):
        seconds = row.get("seconds") or seconds
        if row.get("eval", {}).get(metric, -1.0) >= value:
            return found["forwards"] * row["step"] / max(1, found["steps"]), seconds
    return None


# ---- as text ---------------------------------------------------------------------------------------------------------


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as CSV; failures and tried learning rates are joined by semicolons."""
    flat = []
    for r in rows:
        tried = "; ".join(f"{short(lr)}: {short(loss)}" for lr, loss in r["lr_tried"].items())
        flat.append({**r, "lr_tried": tried, "failures": "; ".join(r["failures"])})
    return csv_text(flat)


def as_markdown(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table per task, then what the search saw, failures, and where it ran."""
    text: list[str] = []
    for task in bench.tasks:
        mine = [r for r in rows if r["task"] == task]
        head = [
            f"{task}", _words(mine[0]["metric"]), "gap closed", "lr", "forwards", "seconds", "peak GB", "runs",
            "failures",
        ]  # fmt: skip
        reach, gradient = "reached" in mine[0], any("gradient_fault" in r for r in mine)
        if reach:
            head.append(f"to {bench.reach[task]:g}: forwards (seconds)")
        head += ["cosine", "efficiency"] * gradient
        text += [markdown(head, [_cells(r, reach, gradient) for r in mine]), ""]
    text += [*_search(rows), *_failures(rows), *_faults(rows)]
    if where := _where(bench):
        text += [where]
    return "\n".join(text).rstrip() + "\n"


def _cells(r: Mapping[str, Any], reach: bool, gradient: bool) -> list[str]:
    spread = f" ± {r['sd']:.3f}" if r["sd"] is not None else ""
    back = f" + {r['backwards']:,.0f} backwards" if r["backwards"] else ""
    cells = [
        r["row"],
        _shown(r["mean"], ".3f") + spread,
        _shown(r["gap"], ".0%"),
        _shown(r["lr"], ".4g") + _at_an_end(r),
        _shown(r["forwards"], ",.0f") + back,
        _shown(r["seconds"], ".3g"),
        _shown(r["peak_memory_gb"], ".2f"),
        f"{r['finished']} of {r['planned']}" if r["finished"] < r["planned"] else str(r["planned"]),
        str(len(r["failures"])),
    ]
    if reach:
        there = _shown(r["reach_forwards"], ",.0f")
        of = f", {r['reached']} of {r['finished']} runs" if r["reached"] < r["finished"] else ""
        cells.append(f"{there} ({r['reach_seconds']:.3g}{of})" if there else "never" * bool(r["finished"]))
    if gradient:
        cells += [_shown(r.get("cosine"), ".3g"), _shown(r.get("efficiency"), ".3g")]
    return cells


def _at_an_end(r: Mapping[str, Any]) -> str:
    """Return a note where the search chose the lowest or highest lr it tried: a better one may lie beyond."""
    tried = sorted(r["lr_tried"])
    if len(tried) < 2 or r["lr"] not in (tried[0], tried[-1]):
        return ""
    return " (lowest tried)" if r["lr"] == tried[0] else " (highest tried)"


def _search(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the learning rates that were tried, with their training losses."""
    some = [r for r in rows if r["lr_tried"]]
    if not some:
        return []
    lines = []
    for r in some:
        tried = ", ".join(
            f"**{short(lr)}** {short(x)}" if lr == r["lr"] else f"{short(lr)} {short(x)}"
            for lr, x in r["lr_tried"].items()
        )
        lines.append([r["task"], r["row"], tried, f"{r['search_forwards']:,}"])
    said = "The lr of each row was chosen by the training loss of the last fifth of a run with another seed:"
    return [said, "", markdown(["task", "row", "lr and loss", "forwards"], lines), ""]


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"- {r['task']}, {r['row']}: {why}" for r in rows for why in r["failures"]]
    return ["Failures:", "", *lines, ""] if lines else []


def _faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"- {r['task']}, {r['row']}: {r['gradient_fault']}" for r in rows if r.get("gradient_fault")]
    return ["No gradient was measured of:", "", *lines, ""] if lines else []


def _where(bench: Bench) -> str:
    """Return the machine and versions of the runs, as their env.json say."""
    seen: dict[str, None] = {}
    for e in bench.entries:
        for job, _ in finished(bench, _runs(bench, e)):
            with suppress(OSError, ValueError, LookupError, TypeError):
                env = json.loads((bench.root / job.name / "env.json").read_bytes())
                place = env["gpus"] if env["gpus"] not in ("-", "") else env["cpu"]
                versions = ", ".join(f"{n} {env['packages'][n]}" for n in ("torch", "transformers"))
                seen[f"{place}; zoft {env['zoft']}, {versions}"] = None
    return "\n".join(f"{line}." for line in seen)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_tables(bench: Bench) -> str:
    """Write table.md and table.csv into the bench's folder; returns the Markdown."""
    rows = summary(bench)
    text = as_markdown(bench, rows)
    write(bench.root / TABLE, text)
    write(bench.root / CSV, as_csv(rows))
    return text


def draw_tasks(bench: Bench) -> list[str]:
    """Draw a picture per task, the metric and the training loss against forwards; returns the files' names."""
    from zoft.report import plot
    from zoft.report.runs import Group, read

    made = []
    for task in bench.tasks:
        entries = [e for e in bench.entries if e.task == task]
        groups = []
        for e in entries:
            runs = [read(bench.root / job.name) for job, _ in finished(bench, _runs(bench, e))]
            if runs:
                groups.append(Group(runs, e.row, finished=runs))
        if groups:
            out = bench.root / f"curve-{task}.png"
            plot.draw(groups, [_metric(bench, entries)], out)
            made.append(str(out))
    return made
