"""Show the line that lr=auto goes by: a table, a picture, and the learning rate that the rule takes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.schema import Config
from zoft.errors import writing

if TYPE_CHECKING:
    from zoft.train.learning_rate import Line


def measure_lr(config: Config) -> Line:
    """Measure a config's line, as a run of it would with lr=auto; trains nothing. Raises UserError as that run would."""
    from zoft.method.auto_lr import check_auto_lr
    from zoft.parallel.world import joined_processes
    from zoft.run.guards import explain_memory
    from zoft.train.assemble import assemble
    from zoft.train.resolve import settled

    config = settled(dataclasses.replace(config, lr="auto"), None)
    check_auto_lr(config)
    with explain_memory(config), joined_processes(config, ""):
        line = assemble(config).line
    assert line is not None, "lr=auto is measured"
    return line


def line_json(line: Line) -> dict[str, Any]:
    """Return a line as JSON has it."""
    return dataclasses.asdict(line)


def line_text(line: Line, own: float | str) -> str:
    """Return a line's table, the rule's figure and how to use it; own: the config's lr."""
    rows = [f"{'lr':>12}{'loss':>12}{'±':>10}"]
    for lr, rise, error in line.points:
        shown = "" if math.isnan(error) else f"{error:.2g}"
        rows.append(f"{lr:12.3g}{line.start + rise:12.5g}{shown:>10}")
    rows.append(f"loss at the start {line.start:.5g}; a step gains nothing from lr={line.zero:.3g} on")
    beside = "" if own == "auto" else f"; the config has lr={float(own):g}"
    rows.append(f"lr=auto takes lr={line.lr:g} ({line.lines} lines, {line.forwards} forwards){beside}")
    rows.append(
        f"to use it: zoft train … lr=auto, or lr={line.lr:g}; if the run's loss stays above its start, halve it"
    )
    return "\n".join(rows)


def draw_line(line: Line, out: str) -> None:
    """Draw a line's losses against lr, with the rule's figure. Raises UserError without matplotlib."""
    from zoft.pictures import pyplot, refuse_other_ends

    plt, path = pyplot("--png"), Path(out)
    refuse_other_ends("--png", path)
    finite = [
        (lr, line.start + rise, 0.0 if math.isnan(e) else e)
        for lr, rise, e in line.points
        if math.isfinite(rise)
    ]
    figure, panel = plt.subplots(figsize=(6, 3.8), dpi=120, layout="constrained")
    panel.errorbar(
        *zip(*[p[:2] for p in finite]),
        yerr=[e for *_, e in finite],
        marker="o",
        markersize=4,
        capsize=3,
        color="#1b6ca8",
    )
    panel.axhline(line.start, color="#5c6b73", linewidth=1, linestyle="--", label=f"start {line.start:.4g}")
    panel.axvline(
        line.zero, color="#d1495b", linewidth=1, linestyle=":", label=f"no gain from {line.zero:.3g}"
    )
    panel.axvline(line.lr, color="#2e8b57", linewidth=1.5, label=f"lr=auto takes {line.lr:g}")
    panel.set(xscale="log", xlabel="lr of one step", ylabel="loss of the step's own batch")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    plt.close(figure)
