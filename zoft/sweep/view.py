"""Show what a sweep has done, from its folder alone: status, results, the best config."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from zoft.console import escaped, short
from zoft.errors import UserError
from zoft.folder import write
from zoft.run.selection import LOWER_IS_BETTER
from zoft.sweep import job
from zoft.sweep.job import STATES, job_is_held, job_record, job_state
from zoft.sweep.plan import MACHINE, read_plan
from zoft.tables import aligned, csv_text
from zoft.yaml_files import yaml_tree

WATCH_SECONDS = 2.0


def status(root: str | Path) -> list[dict[str, Any]]:
    """Return a row per job: name, state, step, steps, loss, metrics after training, seconds left, error, attempts."""
    root = Path(root)
    rows = []
    for name in read_plan(root)["jobs"]:
        folder = root / name
        state, record, last = job_state(folder), job_record(folder), job.progress(folder)
        steps, after = _steps(folder), job.result(folder).get("after", {})
        done = steps if state == "done" else last.get("step", -1) + 1
        rows.append({
            "name": name, "state": state, "step": done, "steps": steps, "loss": last.get("loss"), "after": after,
            "left": _left(record, done, steps) if state == "running" else None,
            "error": record.get("error", "") if state == "failed" else "", "attempts": record.get("attempts", 0),
        })  # fmt: skip
    return rows


def _steps(folder: Path) -> int:
    """All steps of a job, from the config in its folder, which a run may have shortened."""
    with contextlib.suppress(UserError, OSError):
        return int(yaml_tree(folder / "config.yaml").get("steps", 0))
    return 0


def _left(record: Mapping[str, Any], done: int, steps: int) -> float | None:
    """Seconds that are left at the rate of this attempt, its start-up included; None before its first steps."""
    new = done - record.get("steps", 0)
    return (steps - done) * (time.time() - record.get("started", time.time())) / new if new > 0 else None


def status_text(root: str | Path, metric: str | None = None) -> str:
    """Return the table of `--status`: a line per job, then how many are in which state and what is left in all."""
    rows = status(root)
    metric = metric or default_metric([r["after"] for r in rows])
    head = ["job", "state", "step", "loss", metric, "left"]
    lines = [
        [
            r["name"], r["state"], f"{r['step']}/{r['steps']}", _shown(r["loss"]), _shown(r["after"].get(metric)),
            r["error"] or (clock(r["left"]) if r["left"] is not None else ""),
        ]
        for r in rows
    ]  # fmt: skip
    counts = [f"{n} {s}" for s in STATES if (n := sum(r["state"] == s for r in rows))]
    left = in_all(rows)
    return escaped(
        "\n".join(
            [
                *aligned([head, *lines]),
                f"{root}: {', '.join(counts)}" + (f"; about {clock(left)} left" if left else ""),
            ]
        )
    )


def in_all(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return seconds until all is done if as many jobs go on as now, at the rate of those that run."""
    going = [r for r in rows if r["left"] is not None and r["step"] < r["steps"]]
    if not going:
        return None
    each = sum(r["left"] / (r["steps"] - r["step"]) for r in going) / len(going)
    waiting = sum(r["steps"] - r["step"] for r in rows if r["state"] in ("pending", "stopped"))
    return max(max(r["left"] for r in going), (sum(r["left"] for r in going) + each * waiting) / len(going))


def watch(root: str | Path, metric: str | None = None) -> None:
    """Show the status until nothing runs or waits any more."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(Text(status_text(root, metric), no_wrap=True, overflow="ellipsis"), refresh=True)
            at_work = job_is_held(Path(root)) or any(r["state"] == "running" for r in status(root))
            if not at_work:
                return
            time.sleep(WATCH_SECONDS)


def results(root: str | Path) -> list[dict[str, Any]]:
    """Return a row per finished job: its name, the keys that were swept, and its result {before, after, train_seconds, …}."""
    root = Path(root)
    found = read_plan(root)
    rows = []
    for name, values in found["jobs"].items():
        result = job.result(root / name)
        if result:
            rows.append({"name": name, "values": {k: values.get(k, "") for k in found["swept"]}, **result})
    return rows


def default_metric(afters: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy where it is measured, else loss."""
    return "accuracy" if any("accuracy" in after for after in afters) else "loss"


def direction(metric: str, told: str | None = None) -> str:
    """Return minimize or maximize: the one given, else by what the metric is."""
    return told or ("minimize" if metric in LOWER_IS_BETTER else "maximize")


def score(row: Mapping[str, Any], metric: str) -> float | None:
    """Return the metric of a result, None where it has none, or no number."""
    value = row["after"].get(metric)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def best(rows: Sequence[Mapping[str, Any]], metric: str, told: str | None = None) -> Mapping[str, Any]:
    """Return the row with the best metric. Raises UserError where none has it."""
    good = [(value, row) for row in rows if (value := score(row, metric)) is not None]
    if not good:
        known = sorted({k for row in rows for k in row["after"]})
        raise UserError(
            f"--metric {metric}: no finished job has it; there are {', '.join(known) or 'none yet'}"
        )
    pick = min if direction(metric, told) == "minimize" else max
    return pick(good, key=lambda pair: pair[0])[1]


def grouped(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, ...], list[float]]:
    """Return the metric of each combination of swept values, all seeds of it together."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        value = score(row, metric)
        if value is not None:
            found.setdefault(tuple(v for k, v in row["values"].items() if k != "seed"), []).append(value)
    return found


def results_text(
    root: str | Path, metric: str | None = None, told: str | None = None, *, own: bool = False
) -> str:
    """Return the table of `--results`; results.csv and the best job's config to copy are written in the folder.

    A line a job, best first; where seeds are swept, mean ± standard deviation of each setting after it. The config is
    best.yaml where it is best by what the sweep goes by: what it was told (own), else what best.yaml says, else the default.
    By another metric or direction it is best-METRIC.yaml, and best.yaml stays.
    """
    root, rows = Path(root), results(root)
    if not rows:
        return f"{root}: no job is done yet"
    said = {} if own else goes_by(root / "best.yaml")
    default = said.get("metric") or default_metric([r["after"] for r in rows])
    metric, way = metric or default, told
    if metric == said.get("metric"):
        told = told or said["direction"]
    goal = {"metric": metric, "direction": direction(metric, told)}
    same = goal == said if said else own or (metric == default and way is None)
    top = best(rows, metric, told)
    turn = 1 if direction(metric, told) == "minimize" else -1
    rows.sort(
        key=lambda r: (value := score(r, metric)) is None or turn * value
    )  # True after any metric below 1
    rows.sort(key=lambda r: score(r, metric) is None)
    keys = list(rows[0]["values"])
    shown = list(dict.fromkeys([metric, *rows[0]["after"]]))[:5]
    lines = [[*keys, *(f"{m} (before)" if m == metric else m for m in shown), "seconds"]]
    for r in rows:
        cells = [_shown(r["after"].get(m)) for m in shown]
        cells[0] += f" ({_shown(r.get('before', {}).get(metric))})"
        lines.append([*r["values"].values(), *cells, _shown(r.get("train_seconds"))])
    text = [*aligned(lines)]
    groups = grouped(rows, metric)
    if any(len(values) > 1 for values in groups.values()):
        order = sorted(groups.items(), key=lambda pair: turn * fmean(pair[1]))
        head = [*(k for k in keys if k != "seed"), f"{metric}, mean ± sd", "runs"]
        means = [
            [*k, f"{short(fmean(v))} ± {short(stdev(v) if len(v) > 1 else 0.0)}", str(len(v))]
            for k, v in order
        ]
        text += ["", *aligned([head, *means])]
    write(root / "results.csv", as_csv(rows))
    config = yaml_tree(root / top["name"] / "config.yaml")
    file = root / ("best.yaml" if same else f"best-{metric}.yaml")
    write(file, copyable(config, top, goal))
    values = " ".join(f"{k}={v}" for k, v in top["values"].items())
    text += ["", f"best {metric} {_shown(top['after'][metric])}: {values or top['name']} ({file})"]
    if not any(improved(r, metric, turn) for r in rows):
        text.append(f"no job has a better {metric} than before training")
    return escaped("\n".join(text))


def improved(row: Mapping[str, Any], metric: str, turn: int) -> bool:
    """Say whether a job's metric is better than it was before training, or what it was is not known. turn: 1 is downwards."""
    before, after = score({"after": row.get("before", {})}, metric), score(row, metric)
    return before is None or (after is not None and turn * after < turn * before)


def goes_by(file: Path) -> dict[str, str]:
    """Return {metric, direction} that a best.yaml is best by, from its first line; nothing where there is no such file."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = re.match(r"# (lowest|highest) (\S+) ", file.read_text(encoding="utf-8"))
        if found:
            return {"metric": found[2], "direction": "minimize" if found[1] == "lowest" else "maximize"}
    return {}


def copyable(config: Mapping[str, Any], top: Mapping[str, Any], goal: Mapping[str, str]) -> str:
    """Return the config of the best job as a file to train from: without its folder, and what the machine had resolved.

    goal: {metric, direction} that it is best by, said in the first line.
    """
    from zoft.config.compose import dump
    from zoft.config.schema import SECTIONS, fields

    known = fields()
    tree = {k: v for k, v in config.items() if k not in MACHINE and (k in SECTIONS or v != known[k].default)}
    for group in SECTIONS:
        held = config.get(group, {}).items()
        tree[group] = {k: v for k, v in held if v not in (None, {}, known[f"{group}.{k}"].default)}
    if not tree["limits"]:
        del tree["limits"]
    if str(tree.get("recipe", "")).endswith(".py"):  # a file names no page: --recipe does
        del tree["recipe"]
    metric, word = goal["metric"], "lowest" if goal["direction"] == "minimize" else "highest"
    return f"# {word} {metric} {_shown(top['after'][metric])}, of {top['name']}\n{dump(tree)}"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return results as CSV: swept keys, before.… and after.… metrics, seconds, memory."""
    flat = []
    for r in rows:
        row = {"name": r["name"], **r["values"]}
        for when in ("before", "after"):
            row |= {f"{when}.{k}": v for k, v in r.get(when, {}).items()}
        flat.append(
            row | {k: r[k] for k in ("steps", "forwards", "train_seconds", "peak_memory_gb") if k in r}
        )
    return csv_text(flat)


def _shown(value: Any) -> str:
    return "" if value is None else short(value)


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
