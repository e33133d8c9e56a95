"""Short names that tell a report's rows apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoft.report import Run

LONGEST = 60  # characters of a name
LONGEST_VALUE = 30
FIRST = ("model", "train", "objective", "reward", "bits", "lr", "eps")  # said before other keys
PATHS = ("model", "adapter", "reward", "task.train", "task.eval")  # of which the last part is said
NOT_OF_RECIPE = (
    "model",
    "max_length",
    "demos",
    "eval_limit",
)  # keys that say something of a baseline, besides task.…


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its recipe or method, and each key in which it differs from others of that recipe.

    model and task are said where any two runs differ in them. Where that is longer than LONGEST, or says too little, it is as
    many of these words as fit and the run's folder in brackets.
    """
    every = [_words(run, runs) for run in runs]
    whole = [" ".join(words) for words in every]
    return [
        name if len(name) <= LONGEST and whole.count(name) == 1 else _with_folder(run, words, runs)
        for run, words, name in zip(runs, every, whole)
    ]


def _words(run: Run, runs: Sequence[Run]) -> list[str]:
    about, task = run.about, _task(run.about)
    alike = [r.about for r in runs if r.label == run.label]
    # Another task brings other values of most keys with it: but for the best known they are looked at within one task.
    within = [other for other in alike if _task(other) == task]
    differ = (_differing(alike) & {"train", "lr", "eps"}) | _differing(within)
    if "method" in about and not run.label.startswith("first-order"):
        differ = {k for k in differ if k.startswith("task.") or k in NOT_OF_RECIPE}
    differ |= _differing([r.about for r in runs]) & {"model"}
    keys = [*(k for k in FIRST if k in differ), *(k for k in about if k in differ and k not in FIRST)]
    shown = [(k, about[k]) for k in keys if k != "method" and about.get(k) is not None]
    if any(_task(r.about) != task for r in runs):
        shown.insert(0, ("task", task))
    return [run.label, *(f"{k}={_short(k, v)}" for k, v in shown)]


def _with_folder(run: Run, words: Sequence[str], runs: Sequence[Run]) -> str:
    """As many words as fit and as much of the end of the run's path as no other run has."""
    paths, own = [r.folder.resolve().parts for r in runs], run.folder.resolve().parts
    n = next((n for n in range(1, len(own)) if sum(p[-n:] == own[-n:] for p in paths) == 1), len(own))
    folder = f"({one_line('/'.join(own[-n:]))})"
    fit = 1
    while fit < len(words) and len(" ".join([*words[: fit + 1], "…", folder])) <= LONGEST:
        fit += 1
    return " ".join([*words[:fit], *["…"][: len(words) - fit], folder])


def _task(about: Mapping[str, Any]) -> str:
    """A task's name; of one's own data its file's or data set's."""
    name, train = about.get("task.name"), about.get("task.train")
    return Path(str(train)).name if name == "local" and train else str(name)


def _differing(abouts: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys whose values are not the same in all."""
    keys = {k for about in abouts for k in about}
    return {k for k in keys if len({json.dumps(a.get(k), sort_keys=True, default=str) for a in abouts}) > 1}


def _short(key: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if key in PATHS:
        text = Path(text).name or text
    text = one_line(text)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def one_line(text: str) -> str:
    """The text with what would break a line or a table written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
