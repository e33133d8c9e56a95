"""Name a report's rows by what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoft.errors import one_line
from zoft.report.runs import ANY

if TYPE_CHECKING:
    from zoft.report.runs import Run

LONGEST = 60  # characters of a name
FIRST = ("model", "train", "objective", "reward", "bits", "lr", "eps")  # said before other keys
PATHS = ("model", "adapter", "reward", "task.train", "task.eval")  # of which the last part is said


def names(runs: Sequence[Run], every: Sequence[Sequence[str]]) -> list[str]:
    """Return a name for each run: its words; where these are too long, or another's too, the first of them and its folder."""
    out, paths = [], [r.folder.resolve().parts for r in runs]
    for own, words in zip(paths, every):
        if len(" ".join(words)) > LONGEST or every.count(words) > 1:
            n = next((n for n in range(1, len(own)) if sum(p[-n:] == own[-n:] for p in paths) == 1), len(own))
            folder, shown = f"({one_line('/'.join(own[-n:]))})", list(words)
            while len(" ".join([*shown, "…", folder])) > LONGEST and len(shown) > 1:
                shown.pop()
            words = [*shown, *["…"][: len(words) - len(shown)], folder]
        out.append(" ".join(words))
    return out


def words(runs: Sequence[Run]) -> list[list[str]]:
    """Return for each run its recipe or method, its task and model where any two differ, and what else others like it differ in."""
    tasks = [
        _short(r, "task.train" if r.about.get("task.name") == "local" else "task.name", runs) for r in runs
    ]
    return [
        [r.label, *[f"task={task}"][: len({*tasks}) - 1], *(f"{k}={_short(r, k, runs)}" for k in told)]
        for r, task in zip(runs, tasks)
        for told in [_told(r, runs, [other for other, t in zip(runs, tasks) if t == task])]
    ]


def _told(run: Run, runs: Sequence[Run], of_task: Sequence[Run]) -> list[str]:
    """Return the keys to say of a run; what goes without bits is not said without them, nor a recipe's keys of a baseline."""
    alike = [r for r in runs if r.label == run.label]
    keys = _differing([r for r in of_task if r.label == run.label])
    keys |= _differing(runs) & {"model"} | _differing(alike) & {"train", "bits", "lr", "eps"}
    if "method" in run.about and not run.label.startswith(("first-order", "checkpointed")):
        keys &= {*ANY, "adapter", "demos"} | {k for k in keys if k.startswith("task.")}
    keys -= {"method", *(("group", "zero_points", "quantise_head") if run.about.get("bits") is None else ())}
    return [k for k in dict.fromkeys([*FIRST, *run.about]) if k in keys and run.about.get(k) is not None]


def _differing(runs: Sequence[Run]) -> set[str]:
    return {k for r in runs for k in r.about if any(r.about.get(k) != s.about.get(k) for s in runs)}


def _short(run: Run, key: str, runs: Sequence[Run]) -> str:
    """Return a value as text, a path as its last part where that tells it from the others."""
    value = run.about.get(key)
    text, others = str(value), {str(r.about.get(key)) for r in runs}
    if key in PATHS and sum(Path(o).name == Path(text).name for o in others) == 1:
        text = Path(text).name or text
    return one_line(f"{value:g}" if isinstance(value, float) else text)
