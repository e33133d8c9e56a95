"""The picture of a sweep's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from zoft.errors import UserError
from zoft.pictures import pyplot, write_picture
from zoft.sweep.view import default_metric, grouped, results


def plot(root: str | Path, out: str | Path, metric: str | None = None) -> str:
    """Draw the metric over the swept key with most numbers, a line a setting of the others, seeds as a range."""
    plt = pyplot("--plot")
    rows = results(root)
    metric = metric or default_metric([r["after"] for r in rows])
    groups = grouped(rows, metric)
    if not groups:
        raise UserError(f"--plot: no finished job of {root} has {metric}")
    keys = [k for k in rows[0]["values"] if k != "seed"]
    axis = _axis(keys, list(groups))
    figure, panel = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    curves: dict[str, list[tuple[Any, list[float]]]] = {}
    for values, found in groups.items():
        label = ", ".join(f"{k}={v}" for i, (k, v) in enumerate(zip(keys, values)) if i != axis)
        curves.setdefault(label, []).append((values[axis] if axis is not None else "all", found))
    numeric = axis is not None and all(_number(v[axis]) is not None for v in groups)
    for label, points in curves.items():
        if numeric:
            points.sort(key=lambda p: _number(p[0]) or 0.0)
        at: list[Any] = [_number(x) if numeric else x for x, _ in points]
        middle = [fmean(v) for _, v in points]
        style = "-" if numeric else ""  # between names there is nothing
        (line,) = panel.plot(at, middle, marker="o", linestyle=style, label=label or None)
        for x, (_, v) in zip(at, points):
            panel.plot([x] * len(v), v, linestyle="", marker=".", alpha=0.5, color=line.get_color())
        if numeric and len(at) > 1:
            panel.fill_between(
                at, [min(v) for _, v in points], [max(v) for _, v in points], alpha=0.15, linewidth=0
            )
    befores = [v for r in rows if isinstance(v := r.get("before", {}).get(metric), (int, float))]
    if befores:
        panel.axhline(fmean(befores), color="0.4", linestyle="--", linewidth=0.9, label="before training")
    if numeric and axis is not None:
        xs = [x for v in groups if (x := _number(v[axis])) is not None]
        if min(xs) > 0 and max(xs) / min(xs) >= 10:
            panel.set_xscale("log")
    panel.set(xlabel=keys[axis] if axis is not None else "", ylabel=metric.replace("_", " "))
    panel.margins(x=0.05 if numeric else 0.2)
    if not numeric and sum(len(str(v[axis])) for v in groups if axis is not None) > 60:
        panel.tick_params(axis="x", rotation=20)
    panel.grid(alpha=0.25)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=9)
    write_picture(figure, Path(out), bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    return str(out)


def _axis(keys: Sequence[str], groups: Sequence[tuple[str, ...]]) -> int | None:
    """Return which key to draw over: of those that are numbers the one with most values, else the one with most values."""
    if not keys:
        return None
    different = [len({g[i] for g in groups}) for i in range(len(keys))]
    numbers = [all(_number(g[i]) is not None for g in groups) for i in range(len(keys))]
    return max(range(len(keys)), key=lambda i: (different[i] > 1, numbers[i], different[i]))


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
