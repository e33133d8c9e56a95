"""`zoft report`: runs side by side, those that differ in their seed as mean ± sd. Loads no model."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoft import tables
from zoft.errors import UserError
from zoft.report import names
from zoft.report.runs import METRICS, TOLD, Group, Run, folders, read
from zoft.tables import csv_text


def groups(runs: Sequence[Run], say: Callable[[str], Any] = lambda line: None) -> list[Group]:
    """Group runs by all but their seed, in the order given, named by what tells them apart.

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
    every = names.words(first)
    for g, words, name in zip(out, every, names.names(first, every)):
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
            f"{run.folder}: the settings and seed {run.seed} are those of {known[0].folder}, but the figures differ; it has a row of its own, "
            "because a deviation is over seeds"
        )
    if len(alike) == len(known):
        alike.append(Group([]))
    alike[len(known)].runs.append(run)


def _figures(run: Run) -> str:
    return json.dumps([run.result["steps"], run.result["after"]], sort_keys=True)


def metrics_of(some: Sequence[Group], asked: Sequence[str] = ()) -> list[str]:
    """Return the metrics to show: those asked for, or those that any finished run has. Raises UserError for an unknown one."""
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
    """Return one dict per group with a finished run: name, settings, n, unfinished, seeds, folders, steps, forwards, each metric with _sd,
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
    """Return the rows as a table of mean ± sd."""
    lines = []
    for row in found:
        cells = [str(row["name"]), str(row["n"]), _whole(row.get("steps")), _whole(row.get("forwards"))]
        for m in metrics:
            value, sd = row.get(m), row.get(f"{m}_sd")
            cells.append("" if value is None else f"{value:.4f}" + (f" ± {sd:.4f}" if sd is not None else ""))
        cells.append(_whole(row.get("train_seconds")))
        memory = row.get("peak_memory_gb")
        lines.append([*cells, "" if memory is None else f"{memory:.2f}"])
    return tables.markdown(["", "n", "steps", "forwards", *metrics, "seconds", "peak GB"], lines)


def texts_table(some: Sequence[Group]) -> str:
    """Return a table of what finished runs wrote while they trained, first and last tenth of their steps; "" where none wrote."""
    lines = []
    for g in some:
        wrote = [run for run in g.finished if run.texts]
        if not wrote:
            continue
        cells = [g.name]
        for key in TOLD:
            ends = []
            for last in (False, True):
                means = [statistics.fmean(values) for run in wrote if (values := _tenth(run, key, last))]
                sd = f" ± {statistics.stdev(means):.4g}" if len(means) > 1 else ""
                ends.append(f"{statistics.fmean(means):.4g}{sd}")
            cells.append(" → ".join(ends))
        lines.append(cells)
    heads = ["texts while training", "reward", "spread over members", "tokens", "differ"]
    return tables.markdown(heads, lines) if lines else ""


def _tenth(run: Run, key: str, last: bool) -> list[float]:
    """Return a figure of the first or last tenth of a run's steps."""
    steps = sorted(run.texts)
    n = max(1, len(steps) // 10)
    return [run.texts[s][key] for s in (steps[-n:] if last else steps[:n])]


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def cut(some: Sequence[Group]) -> list[str]:
    """Return a line for each name in the table that has no room for all that its runs differ in."""
    return [f"{g.name}: {g.settings}" for g in some if g.finished and not g.name.startswith(g.settings)]


def unfinished(some: Sequence[Group]) -> list[str]:
    """Return a line for each run that the table leaves out because it is not finished."""
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


def report_runs(
    paths: Sequence[str], metrics: Sequence[str] = (), *, csv_to: str | None = None, png_to: str | None = None
) -> str:
    """Return the markdown table, what its names leave out, and what it leaves out; writes the CSV and the picture where asked."""
    from zoft.folder import write

    some = groups([read(f) for f in folders(paths)], lambda line: print(line, file=sys.stderr))
    chosen = metrics_of(some, metrics)
    found = rows(some, chosen)
    if csv_to:
        write(Path(csv_to), csv_text(found))
    if png_to:
        from zoft.report import plot

        plot.draw(some, list(metrics) or chosen, Path(png_to))
    left_out = [*cut(some), *unfinished(some)]
    tabled = [markdown(found, chosen)] if found else []
    if texts := texts_table(some):
        tabled += ["", texts]
    return "\n".join([*tabled, *[""][: len(tabled) and len(left_out)], *left_out])
