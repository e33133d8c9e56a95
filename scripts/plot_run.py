"""Draw the learning curve of a run, or of several runs that differ in their seed, from metrics.jsonl to a PNG.

    python scripts/plot_run.py runs/mezo-reviews-seed0
    python scripts/plot_run.py runs/a runs/b runs/c --out curve.png --metrics auc accuracy calibrated_accuracy

Left: the training loss, averaged over a window. Right: the evaluations. Of several runs the mean is drawn, with
the range from the lowest to the highest. Dashed: the same metric before training; dotted: the majority class.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

METRICS = ("auc", "accuracy", "calibrated_accuracy", "macro_f1", "perplexity")
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1b")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or metrics.jsonl files")
    parser.add_argument(
        "--out", type=Path, help="the picture (default: curve.png beside the first metrics.jsonl)"
    )
    parser.add_argument("--metrics", nargs="+", help="which evaluations (default: the first three there are)")
    parser.add_argument("--window", type=int, help="steps that the loss is averaged over (default: a 20th)")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    files = [path / "metrics.jsonl" if path.is_dir() else path for path in args.runs]
    try:
        out = draw([read(file) for file in files], args, args.out or files[0].parent / "curve.png")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(out)


def read(path: Path) -> tuple[list[float], dict[int, dict[str, float]]]:
    """(loss of each step, step -> evaluation of the weights after so many steps)."""
    losses: dict[int, float] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "eval" in row:
            evaluations[row["step"]] = row["eval"]
        else:  # null where the loss was not finite
            losses[row["step"]] = float("nan") if row["loss"] is None else row["loss"]
    if not losses:
        raise ValueError(f"{path}: no steps in it")
    return [losses[step] for step in sorted(losses)], evaluations


def draw(
    runs: list[tuple[list[float], dict[int, dict[str, float]]]], args: argparse.Namespace, out: Path
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    steps = min(len(losses) for losses, _ in runs)
    window = max(1, min(args.window or steps // 20, steps))
    raw = np.array([losses[:steps] for losses, _ in runs])  # [runs, steps]
    smooth = np.stack([np.convolve(r, np.ones(window) / window, mode="valid") for r in raw])
    at = np.arange(window, steps + 1)
    band(left, at, smooth, COLOURS[0], "")
    left.set(xlabel="step", ylabel=f"training loss, mean of {window} steps", xlim=(0, steps))

    common = sorted(set.intersection(*(set(evaluations) for _, evaluations in runs)))
    shown = args.metrics or [m for m in METRICS if common and m in runs[0][1][common[0]]][:3]
    for colour, metric in zip(COLOURS, shown):
        try:
            values = np.array([[evaluations[s][metric] for s in common] for _, evaluations in runs])
        except KeyError:
            raise ValueError(f"--metrics {metric}: not in these evaluations") from None
        band(right, np.array(common), values, colour, metric.replace("_", " "))
        if common and common[0] == 0:
            right.axhline(values[:, 0].mean(), color=colour, linestyle="--", linewidth=0.9)
    if common and "majority" in runs[0][1][common[0]]:
        majority = runs[0][1][common[0]]["majority"]
        right.axhline(majority, color="0.4", linestyle=":", label="majority class")
    if common and common[0] == 0:
        right.plot([], [], color="0.4", linestyle="--", linewidth=0.9, label="before training")
    n = f" (n = {runs[0][1][common[0]]['n']})" if common and "n" in runs[0][1][common[0]] else ""
    right.set(xlabel="step", ylabel=f"held-out examples{n}", xlim=(0, steps))
    right.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    seeds = f"{len(runs)} runs: mean, lowest to highest" if len(runs) > 1 else ""
    figure.suptitle(" · ".join(text for text in (args.title, seeds) if text), fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def band(panel: Any, at: Any, values: Any, colour: str, label: str) -> None:
    """The mean over runs [runs, N] at `at` [N], and its range."""
    marker = "o" if label else ""
    panel.plot(at, values.mean(0), color=colour, label=label or None, marker=marker, markersize=3.5)
    if len(values) > 1:
        panel.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


if __name__ == "__main__":
    main()
