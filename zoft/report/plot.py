"""The picture of a report: training loss and metrics against forwards, a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoft.pictures import pyplot, refuse_other_ends, write_picture
from zoft.report.runs import Group, Run

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1b", "#5c6b73", "#b5651d", "#3a7d7c")
PANELS = 3  # metrics that are drawn where none are asked for
SHARE = 20  # the loss is averaged over this part of the steps
PANEL_INCHES, HEIGHT_INCHES = 4.4, 3.8
LEGEND_POINTS = 8


def draw(some: Sequence[Group], metrics: Sequence[str], out: Path) -> None:
    """Draw a panel for the training loss and one for each metric (the first three of them): mean and range over finished runs.

    Runs of one evaluation, as baselines are, become dashed lines across. Where no run of a group is finished, they are
    drawn as far as they are, dotted, and the legend says so.
    """
    plt = pyplot("--png")
    refuse_other_ends("--png", out)
    shown = list(metrics)[:PANELS]
    trained = any(r.losses for g in some for r in g.runs)
    wrote = any(r.texts for g in some for r in g.runs)  # then minus the loss is the reward
    count = max(1, len(shown) + trained)
    figure, axes = plt.subplots(
        1, count, figsize=(PANEL_INCHES * count, HEIGHT_INCHES), dpi=120, layout="constrained", squeeze=False
    )
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.03)
    named: dict[str, Any] = {}  # a line a group, for the legend
    for g, colour in zip(some, _colours(len(some))):
        runs = g.finished or g.runs
        losses = [[smooth(_trained(r, wrote), r.each) for r in runs]] if trained else []
        curves = [[curve(r.evals, m, r.each) for r in runs] for m in shown]
        for i, (panel, lines) in enumerate(zip(axes[0], losses + curves)):
            line = _band(panel, lines, colour, points=i > 0 or not trained, finished=bool(g.finished))
            if line is not None:
                named[_label(g)] = line
    for panel, title in zip(
        axes[0],
        ["training reward, averaged" if wrote else "training loss, averaged"] * trained
        + [m.replace("_", " ") for m in shown],
    ):
        panel.set(xlabel="forwards", ylabel=title)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if named:
        columns = _columns(list(named), figure.get_figwidth())
        rows = -(-len(named) // columns)
        figure.set_figheight(HEIGHT_INCHES + 1.6 * LEGEND_POINTS / 72 * (rows - 1))  # panels stay as high
        figure.legend(
            list(named.values()), list(named), frameon=False, fontsize=LEGEND_POINTS, loc="outside lower center",
            ncols=columns,
        )  # fmt: skip
    write_picture(figure, out, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)


def _trained(run: Run, wrote: bool) -> dict[int, float]:
    """Return what is drawn of a run's steps: their losses, or where some run wrote texts the rewards of those that did."""
    return {s: told["reward"] for s, told in run.texts.items()} if wrote else run.losses


def curve(evals: dict[int, dict[str, float]], metric: str, each: int) -> list[tuple[int, float]]:
    """Return (forwards, value) of each evaluation that has the metric."""
    return [
        (s * each, float(e[metric]))
        for s, e in sorted(evals.items())
        if isinstance(e.get(metric), (int, float))
    ]


def smooth(losses: dict[int, float], each: int) -> list[tuple[int, float]]:
    """Return (forwards, mean loss of the steps of a window that ends there)."""
    import numpy as np

    steps = sorted(losses)
    window = max(1, len(steps) // SHARE)
    if not steps:
        return []
    means = np.convolve([losses[s] for s in steps], np.ones(window) / window, mode="valid")
    return [((steps[i + window - 1] + 1) * each, float(m)) for i, m in enumerate(means)]


def _band(
    panel: Any, curves: Sequence[Sequence[tuple[int, float]]], colour: Any, *, points: bool, finished: bool
) -> Any:
    """Draw the mean over runs where all of them have a value, and the range; one point of what is finished is a line across.

    Returns the line, None where there is nothing to draw.
    """
    import numpy as np

    curves = [c for c in curves if c]
    at = sorted(set.intersection(*({x for x, _ in c} for c in curves))) if curves else []
    if not at:
        return None
    values = np.array([[dict(c)[x] for x in at] for c in curves])  # [runs, points]
    if len(at) == 1 and points and finished:
        return panel.axhline(values.mean(), color=colour, linestyle="--", linewidth=1)
    if len(values) > 1:
        panel.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    (line,) = panel.plot(
        at,
        values.mean(0),
        color=colour,
        linestyle="-" if finished else ":",
        marker="o" if points else "",
        markersize=3,
    )
    return line


def _label(g: Group) -> str:
    runs = len(g.finished or g.runs)
    several = [f"{runs} runs"] if runs > 1 else []
    extra = ", ".join([*several, *([] if g.finished else ["not finished"])])
    return f"{g.name} ({extra})" if extra else g.name


def _columns(labels: Sequence[str], width_inches: float) -> int:
    """Return how many columns of a legend fit side by side: a letter is about 0.55 of its height wide, a handle 4 letters."""
    each = (max(map(len, labels)) + 6) * 0.55 * LEGEND_POINTS / 72
    return max(1, min(4, len(labels), int(width_inches / each)))


def _colours(n: int) -> list[Any]:
    """n colours, each another one while there are at most 20."""
    import matplotlib

    many = matplotlib.colormaps["tab20"]
    return [COLOURS[i] if n <= len(COLOURS) else many(i % 20) for i in range(n)]
