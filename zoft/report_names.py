"""Short names that tell a report's rows apart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.report_runs import ANY

if TYPE_CHECKING:
    from zoft.report_runs import Run

LONGEST = 60  # characters of a name
LONGEST_VALUE = 30
FIRST = ("model", "train", "objective", "reward", "bits", "lr", "eps")  # said before other keys
PATHS = ("model", "adapter", "reward", "task.train", "task.eval")  # of which the last part is said
OF_BITS = ("group", "zero_points", "quantise_head")  # that say nothing without bits


def names(runs: Sequence[Run], every: Sequence[Sequence[str]]) -> list[str]:
    """A name for each run: its words. Where that is longer than LONGEST, or says too little, it is as many of them as fit,
    those first that tell it from most others, and the run's folder in brackets."""
    whole = [" ".join(some) for some in every]
    return [
        name
        if len(name) <= LONGEST and whole.count(name) == 1
        else _with_folder(run, some, _telling(some, every), runs)
        for run, some, name in zip(runs, every, whole)
    ]


def words(runs: Sequence[Run]) -> list[list[str]]:
    """Of each run its recipe or method, and each key in which it differs from others of that recipe.

    model and task are said where any two runs differ in them.
    """
    shorts = {k: _shorts(k, [r.about.get(k) for r in runs]) for k in _differing([r.about for r in runs])}
    keys = [_keys(run, runs) for run in runs]
    found = [_words(run, some, runs, shorts) for run, some in zip(runs, keys)]
    out = []
    for run, some, own in zip(runs, keys, found):
        if found.count(own) > 1:  # say of these what else they differ in
            twins = [r.about for r, other in zip(runs, found) if other == own]
            own = _words(run, [*some, *sorted(_telling_of(run, _differing(twins)) - {*some})], runs, shorts)
        out.append(own)
    return out


def _keys(run: Run, runs: Sequence[Run]) -> list[str]:
    about, task = run.about, _task(run.about)
    alike = [r.about for r in runs if r.label == run.label]
    # Another task brings other values of most keys with it: but for the best known they are looked at within one task.
    within = [other for other in alike if _task(other) == task]
    differ = (_differing(alike) & {"train", "bits", "lr", "eps"}) | _differing(within)
    differ = _telling_of(run, differ) | (_differing([r.about for r in runs]) & {"model"})
    return [*(k for k in FIRST if k in differ), *(k for k in about if k in differ and k not in FIRST)]


def _telling_of(run: Run, keys: set[str]) -> set[str]:
    """Those of some keys that say something of a run: of a baseline without gradients few."""
    if run.about.get("bits") is None:
        keys = keys - {*OF_BITS}
    if "method" in run.about and not run.label.startswith("first-order"):
        keys = {k for k in keys if k.startswith("task.") or k in (*ANY, "adapter", "demos")}
    return keys


def _words(
    run: Run, keys: Sequence[str], runs: Sequence[Run], shorts: Mapping[str, Mapping[str, str]]
) -> list[str]:
    about, task = run.about, _task(run.about)
    shown = [
        f"{k}={shorts[k][_dumped(about[k])]}" for k in keys if k != "method" and about.get(k) is not None
    ]
    if any(_task(r.about) != task for r in runs):
        shown.insert(0, f"task={one_line(task)}")
    return [run.label, *shown]


def _telling(own: Sequence[str], every: Sequence[Sequence[str]]) -> list[str]:
    """A run's words, after recipe and task those first that leave the fewest others with all the same words so far."""
    n = 2 if own[1:] and own[1].startswith("task=") else 1
    left, told = list(own[n:]), list(own[:n])
    others = [some for some in every if some[:n] == told and some != own]
    while left:
        best = min(left, key=lambda w: sum(w in some for some in others))  # the first of equals
        others = [some for some in others if best in some]
        told.append(best)
        left.remove(best)
    return told


def _with_folder(run: Run, words: Sequence[str], told: Sequence[str], runs: Sequence[Run]) -> str:
    """As many words as fit, those that are told first, and as much of the end of the run's path as no other run has."""
    paths, own = [r.folder.resolve().parts for r in runs], run.folder.resolve().parts
    n = next((n for n in range(1, len(own)) if sum(p[-n:] == own[-n:] for p in paths) == 1), len(own))
    folder, shown = f"({one_line('/'.join(own[-n:]))})", list(words[:1])
    for word in told[1:]:
        more = [w for w in words if w in (*shown, word)]
        if len(" ".join([*more, *["…"][: len(words) - len(more)], folder])) <= LONGEST:
            shown = more
    return " ".join([*shown, *["…"][: len(words) - len(shown)], folder])


def _task(about: Mapping[str, Any]) -> str:
    """A task's name; of one's own data its file's or data set's."""
    name, train = about.get("task.name"), about.get("task.train")
    return Path(str(train)).name if name == "local" and train else str(name)


def _differing(abouts: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys whose values are not the same in all."""
    keys = {k for about in abouts for k in about}
    return {k for k in keys if len({_dumped(a.get(k)) for a in abouts}) > 1}


def _dumped(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _shorts(key: str, values: Sequence[Any]) -> dict[str, str]:
    """How to write each value (by its JSON): LONGEST_VALUE characters where these still tell it from the others."""
    given = {_dumped(v): f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not None}
    full = {k: one_line(text) for k, text in given.items()}
    ways = []
    if key in PATHS:
        longest = max(len(Path(text).parts) for text in given.values())
        ways += [
            {k: one_line("/".join(Path(text).parts[-n:])) or text for k, text in given.items()}
            for n in range(1, longest)
        ]
        ways = [{k: text if len(text) <= LONGEST_VALUE else f"…{text[1 - LONGEST_VALUE:]}" for k, text in way.items()}
                for way in ways]  # fmt: skip
    else:
        same = len(os.path.commonprefix(list(full.values())))
        ways += [{k: _piece(text, start) for k, text in full.items()} for start in (0, max(0, same - 5))]
    return next((way for way in ways if len({*way.values()}) == len(given)), full)


def _piece(text: str, start: int) -> str:
    """LONGEST_VALUE characters of a text from start on, with … where there is more."""
    if len(text) <= LONGEST_VALUE:
        return text
    start = min(start, len(text) - LONGEST_VALUE + 1)
    piece = f"{'…' if start else ''}{text[start:]}"
    return piece if len(piece) <= LONGEST_VALUE else f"{piece[: LONGEST_VALUE - 1]}…"


def one_line(text: str) -> str:
    """The text with what would break a line or a table written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
