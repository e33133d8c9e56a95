"""The picture of a report: training loss and metrics against forwards, a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoft.errors import UserError, writing
from zoft.report import Group

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1b", "#5c6b73", "#b5651d", "#3a7d7c")
PANELS = 3  # metrics that are drawn where none are asked for
SHARE = 20  # the loss is averaged over this part of the steps


def draw(some: Sequence[Group], metrics: Sequence[str], out: Path) -> None:
    """A panel for the training loss, one for each metric (the first three of them), mean and range over runs.

    Runs of one evaluation, as baselines are, become horizontal lines; unfinished runs are drawn as far as they are.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError('--png: matplotlib is not installed; pip install "zoft[plot]"') from None
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--png {out}: the name must end in .png, .svg or .pdf")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = any(r.losses for g in some for r in g.runs)
    shown = list(metrics)[:PANELS]
    count = len(shown) + trained
    figure, axes = plt.subplots(
        1, count, figsize=(4.4 * count, 3.8), dpi=120, layout="constrained", squeeze=False
    )
    panels = list(axes[0])
    if trained:
        left = panels.pop(0)
        for g, colour in zip(some, _cycle(len(some))):
            curves = [smooth(r.losses, r.each) for r in g.runs if r.losses]
            _band(left, curves, colour, "")
        left.set(xlabel="forwards", ylabel="training loss, averaged")
    for panel, metric in zip(panels, shown):
        for g, colour in zip(some, _cycle(len(some))):
            _band(panel, [curve(r.evals, metric, r.each) for r in g.runs], colour, _label(g))
        panel.set(xlabel="forwards", ylabel=metric.replace("_", " "))
    for panel in axes[0]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[-1].get_legend_handles_labels() if panels else ([], [])
    if labels:
        figure.legend(
            handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(4, len(labels))
        )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    plt.close(figure)


def curve(evals: dict[int, dict[str, float]], metric: str, each: int) -> list[tuple[int, float]]:
    """(forwards, value) of each evaluation that has the metric."""
    return [
        (s * each, float(e[metric]))
        for s, e in sorted(evals.items())
        if isinstance(e.get(metric), (int, float))
    ]


def smooth(losses: dict[int, float], each: int) -> list[tuple[int, float]]:
    """(forwards, mean loss of the steps of a window that ends there)."""
    import numpy as np

    steps = sorted(losses)
    window = max(1, len(steps) // SHARE)
    means = np.convolve([losses[s] for s in steps], np.ones(window) / window, mode="valid")
    return [((steps[i + window - 1] + 1) * each, float(m)) for i, m in enumerate(means)]


def _band(panel: Any, curves: Sequence[Sequence[tuple[int, float]]], colour: str, label: str) -> None:
    """The mean over runs where all of them have a value, and the range; one point is a line across."""
    import numpy as np

    curves = [c for c in curves if c]
    if not curves:
        return
    at = sorted(set.intersection(*({x for x, _ in c} for c in curves)))
    values = np.array([[dict(c)[x] for x in at] for c in curves])  # [runs, points]
    if len(at) == 1:
        panel.axhline(values.mean(), color=colour, linestyle="--", linewidth=1, label=label or None)
        return
    panel.plot(
        at, values.mean(0), color=colour, label=label or None, marker="o" if label else "", markersize=3
    )
    if len(values) > 1:
        panel.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def _label(g: Group) -> str:
    runs = f" ({len(g.runs)} runs)" if len(g.runs) > 1 else ""
    return f"{g.name}{runs}"


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
