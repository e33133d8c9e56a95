"""Tasks: rows of data made into prompts and what is scored after them. No model and no tokenizer here."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from zoft.config.schema import VERIFIED, Limits
from zoft.data.tasks import formats, local, split, template
from zoft.data.tasks.formats import recognise
from zoft.data.tasks.local import is_folder
from zoft.data.tasks.named import PROMPTS, READERS
from zoft.data.tasks.papers import ROWS, Made
from zoft.data.tasks.template import MASK, at_mask, columns, near, refuse_cell
from zoft.data.tasks.verifiable import (
    GSM8K,
    MAKERS,
    check_verifiable,
    generated,
    gsm8k,
    refuse_generator_keys,
)
from zoft.errors import UserError
from zoft.limits import shortened

FEW = 50  # evaluation rows: 0.5/√50 is a standard error of 7 points of accuracy
HELD_OUT = 0.15  # share of the data that a hash puts aside where no evaluation data is given


@dataclass
class TaskData:
    """Hold what a run trains on and is judged by.

    train, eval: rows {prompt: str, candidates: [str], gold: int, where: str, key: int}; key is a 64-bit hash
    of the columns the prompt reads; columns: the row as it was read. Further fields where they apply: after (str: the
    prompt goes on behind the mask that the candidates fill), golds ([int]: all right candidates, gold being the first),
    answers ([str]: texts that count as right where one is generated), null (the prompt without what it asks about).
    objective: "choice" (candidates compete) | "lm" (the gold candidate is the text to learn; where there are others,
    they are for evaluation). label: its column. choices: label -> candidate text, in the order of the candidates; empty
    for lm. dev: rows to choose a model by, None where not asked for. notes: lines on where the rows came from and how
    they were split, for a person.
    reading: what a recognised layout of a file is and what is learned of it, "" where templates name the columns;
    its rows hold `messages` (turns {role, content, scored}) or `pieces` (text). chat: "auto" | "template" |
    "plain"; pack: short texts share rows; joint: what stands between prompt and completion in plain text.
    left_out: lines on what its files hold and no row does.
    """

    name: str
    objective: str
    prompt: str
    label: str | None
    choices: dict[str, str]
    train: list[dict[str, Any]] = field(repr=False)
    eval: list[dict[str, Any]] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    dev: list[dict[str, Any]] | None = field(default=None, repr=False)
    reading: str = ""
    chat: str = "auto"
    pack: bool = False
    joint: str = ""
    left_out: list[str] = field(default_factory=list)


def load_task(task: Any, limits: Limits | None = None) -> TaskData:
    """Read, check, render and split the rows of a task.

    Without evaluation data, rows whose key falls in the lowest 15 % of hashes are held out (a Hub data set's
    own validation or test split is taken first): the split depends on the rows alone, and rows of equal text
    stay on one side.

    task: the task's settings (name, train, eval, subset, train_limit, prompt, label, choices, target,
    max_words: rows with more words in the prompt's columns are left out; and those of `zoft.data.tasks.split`).
    limits: what its files may hold; the defaults without.
    Errors: UserError in one line naming file, line, key, value and fix.
    """
    refuse_generator_keys(task)
    if task.name in VERIFIED:
        return _verifiable(task, limits)
    settings = _settings(task)
    laid_out = formats.wanted(task)
    prompt, after = at_mask("task.prompt", template.parse("task.prompt", settings["prompt"]))
    target = template.parse("task.target", task.target) if task.target else None
    null = None if task.null_prompt is None else template.parse("task.null_prompt", task.null_prompt)
    make = ROWS.get(task.name)
    left_out: list[str] = []
    if task.name in READERS:
        rows = READERS[task.name]()
        held: local.Rows = []
        notes = [f"{task.name}: {len(rows):,} rows"]
    else:

        def read(key: str, place: str, **which: bool) -> local.Rows:
            # A local copy of a paper's data set is a file; the configuration is that of the data set at the Hub.
            subset = None if make and local.is_file(place) else task.subset
            return local.read(key, place, subset, limits, notes=left_out, **which)

        rows = read("task.train", task.train)
        same = task.eval is None and not local.is_file(task.train)
        whole = is_folder(task.train)
        place = task.train if same and whole else task.train.partition(":")[0] if same else task.eval
        held = read("task.train" if same and whole else "task.eval", place, held_out=True) if place else []
        notes = [f"{task.train}: {len(rows):,} rows"]
        if held:
            notes.append(f"{place}: {len(held):,} rows for evaluation")

    if laid_out:
        reading = recognise("task.train", rows, task)
        notes.append(reading.line)
        settings |= {"reading": reading.line, "chat": task.chat, "pack": task.pack}
        if reading.format == "preference":
            settings["objective"] = "preference"
        if task.pack and reading.format != "text":
            raise UserError(
                f"task.pack: is for format text, not {reading.format}: other examples must not see each other"
            )

    def rendered(key: str, rows: local.Rows) -> list[dict[str, Any]]:
        if laid_out:
            return _short_enough(
                key, [formats.make(w, row, reading) | {"columns": row} for w, row in rows], task
            )
        pairs = [(where, row, Made()) for where, row in rows]
        if make:
            pairs = _made(task.name, rows, make)
            if len(pairs) < len(rows):
                notes.append(f"{key}: {len(rows) - len(pairs):,} rows without a label left out")
            if not pairs:
                raise UserError(f"{key}: no row of it has a label")
        _check_columns(
            key, [(w, row) for w, row, _ in pairs], [*prompt, *(after or [])], target, settings["label"]
        )
        made = [_render(w, row, prompt, after, target, settings, more) for w, row, more in pairs]
        for r, (w, row, _) in zip(made, pairs if null is not None else ()):
            if lacks := [c for c in columns(null or []) if c not in row]:
                raise UserError(
                    f"{w}: task.null_prompt: {{{lacks[0]}}} is no column of it ({', '.join(row)})"
                )
            r["null"] = template.fill(null or [], row, strip=True)
        for r in made if make else ():
            r["prompt"] = r["prompt"].strip(" ")
        return _short_enough(key, made, task)

    def drawn(train: list[dict[str, Any]], held: list[dict[str, Any]]) -> TaskData:
        train, dev, held, said = split.draw(train, held, task, list(settings["choices"]))
        train = subset(train, task.train_limit)
        return TaskData(
            task.name,
            **settings,
            train=train,
            eval=held,
            notes=[*notes, *said],
            dev=dev,
            left_out=list(dict.fromkeys(left_out)),
        )

    train = rendered("task.train", rows)
    if laid_out:
        settings["joint"] = formats.joined(train)
    if held:
        return drawn(train, rendered("task.eval", held))
    train, held_out = _held_out(train, notes)
    return drawn(train, held_out)


def _held_out(
    rows: list[dict[str, Any]], notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (rows to train on, rows held out by the hash of their text). Raises UserError where either is empty."""
    bar = int(HELD_OUT * 2**64)
    train, held_out = [r for r in rows if r["key"] >= bar], [r for r in rows if r["key"] < bar]
    if not train or not held_out:
        raise UserError(
            f"task.train: {len(rows)} rows ({len({r['key'] for r in rows})} of different text) are too few to hold "
            "some out; give task.eval a file"
        )
    few = "; these are few, so set task.eval=FILE to rows of your own" if len(held_out) < FEW else ""
    notes.append(f"{len(held_out):,} of them held out for evaluation by a hash of their text{few}")
    return train, held_out


def _verifiable(task: Any, limits: Limits | None) -> TaskData:
    """Return the rows of a task whose answers a program checks: made by its generator, or read."""
    check_task(task)
    left_out: list[str] = []
    held: list[dict[str, Any]] = []
    if task.name in MAKERS:
        rows, notes = generated(task)
    else:

        def read(key: str, place: str, **which: bool) -> list[dict[str, Any]]:
            subset = None if local.is_file(place) else task.subset or "main"
            found = local.read(key, place, subset, limits, notes=left_out, **which)
            return [gsm8k(where, row) for where, row in found]

        place = task.train or GSM8K
        rows = read("task.train", place)
        notes = [f"{place}: {len(rows):,} rows"]
        ours = None if local.is_file(place) else place.partition(":")[0]
        if other := task.eval or ours:
            held = read("task.eval", other, held_out=True)
            notes.append(f"{other}: {len(held):,} rows for evaluation")
    train, judged = (rows, held) if held else _held_out(rows, notes)
    train, judged = (
        _short_enough(key, some, task) for key, some in (("task.train", train), ("task.eval", judged))
    )
    train, dev, judged, said = split.draw(train, judged, task, [])
    return TaskData(
        task.name, "lm", "", None, {}, train=subset(train, task.train_limit), eval=judged, notes=[*notes, *said], dev=dev,
        reading=f"task={task.name}: a question and an answer that is checked", chat=task.chat, left_out=left_out,
    )  # fmt: skip


def check_task(task: Any) -> None:
    """Refuse what can be refused before anything heavy loads: settings, templates, a file that is not there."""
    refuse_generator_keys(task)
    if task.name in VERIFIED:
        check_verifiable(task)
        split.check(task, classes=False)
        for key, place in (("task.train", task.train), ("task.eval", task.eval)):
            if place:
                local.look(key, place)
        return
    settings = _settings(task)
    at_mask("task.prompt", template.parse("task.prompt", settings["prompt"]))
    if task.target:
        template.parse("task.target", task.target)
    if task.name not in READERS:
        for key, place in (("task.train", task.train), ("task.eval", task.eval)):
            if place:
                local.look(key, place)


def subset(rows: Sequence[dict[str, Any]], n: int | None) -> list[dict[str, Any]]:
    """Return the n rows of lowest key, in their own order: always the same ones. None takes all."""
    if n is None or n >= len(rows):
        return list(rows)
    chosen = sorted(range(len(rows)), key=lambda i: (rows[i]["key"], i))[:n]
    return [rows[i] for i in sorted(chosen)]


def _short_enough(key: str, rows: list[dict[str, Any]], task: Any) -> list[dict[str, Any]]:
    """The rows of at most task.max_words."""
    limit = task.max_words
    kept = [r for r in rows if r.pop("words") <= (math.inf if limit is None else limit)]
    if not kept:
        raise UserError(f"task.max_words={limit}: leaves no row of {key}; raise it")
    return kept


def _settings(task: Any) -> dict[str, Any]:
    """The task's settings with a named task's own words filled in, checked as far as no data is needed."""
    if task.name in PROMPTS:
        for key in ("train", "eval", "subset", "label"):
            if getattr(task, key):
                raise UserError(f"task.{key}: task={task.name} brings its own data; for yours say task=local")
        prompt, choices = PROMPTS[task.name]
        prompt, choices = task.prompt or prompt, {} if task.target else dict(task.choices or choices)
        label = None if task.target else "label"
        formats.wanted(task)  # refuses its keys
        if choices and set(choices) != set(PROMPTS[task.name][1]):
            raise UserError(
                f"task.choices: task={task.name} has the labels {', '.join(PROMPTS[task.name][1])}"
            )
    elif task.name != "local" and task.name not in ROWS:
        known = [*ROWS, *PROMPTS, *VERIFIED]
        hint = near(task.name, [*known, "local"])
        raise UserError(f"task={task.name}: no such task; use {', '.join(known)} or local{hint}")
    else:
        if not task.train:
            raise UserError("task.train is not set: a .jsonl, .csv or .parquet file, or a Hub data set id")
        if formats.wanted(task):
            split.check(task, classes=False)
            return {"objective": "lm", "prompt": "", "label": None, "choices": {}}
        prompt, label, choices = task.prompt, task.label, {str(k): v for k, v in task.choices.items()}
        if prompt is None:
            raise UserError("task.prompt is not set: a template such as 'Review: {text}\\nSentiment:'")
        if task.target and (label or choices):
            raise UserError(
                "task.target: it is for text to learn; with task.label and task.choices leave it out"
            )
        if not task.target and not (label and choices):
            raise UserError(
                "task.label and task.choices are not both set: task.label=label "
                'task.choices=\'{negative: " terrible", positive: " great"}\' (or task.target for text to learn)'
            )
    if label and len(choices) < 2:
        raise UserError(f"task.choices: {len(choices)} choice; at least 2 are needed")
    for name, text in choices.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"task.choices: {name} stands for {text!r}; give it some text")
        if same := [k for k in choices if choices[k] == text and k != name]:
            raise UserError(
                f"task.choices: {name} and {same[0]} are both {text!r}; each needs text of its own"
            )
    if task.target and MASK in prompt:
        raise UserError(f"task.target: {MASK} in task.prompt is filled by one of task.choices; leave one out")
    read = columns(template.parse("task.prompt", prompt))
    if not task.target and not read:  # with a target, an empty prompt learns to begin
        raise UserError(
            f"task.prompt: {prompt!r} names no column, so that all rows are alike; write one in braces: "
            f"{prompt.rstrip() + ' {text}'!r}"
        )
    split.check(task, classes=bool(choices))
    objective = "lm" if task.target else "choice"
    return {"objective": objective, "prompt": prompt, "label": label, "choices": choices}


def _check_columns(key: str, rows: local.Rows, prompt: list, target: list | None, label: str | None) -> None:
    where, first = rows[0]
    held = sorted({column for _, row in rows for column in row})
    wanted = [("task.prompt", c) for c in columns(prompt)]
    wanted += [("task.target", c) for c in columns(target or [])]
    wanted += [("task.label", label)] if label else []
    for setting, column in wanted:
        if column not in held:
            name = column if setting == "task.label" else f"{{{column}}}"
            raise UserError(
                f"{setting}: {name} is no column of {key} ({', '.join(held)}){near(column, held)}"
            )


def _made(name: str, rows: local.Rows, make: Any) -> list[tuple[str, dict[str, Any], Made]]:
    """(where, row with the task's own columns, what else the task makes of it); rows that it leaves out are gone."""
    pairs = []
    for where, row in rows:
        try:
            made = make(row)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            lacks = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
            raise UserError(
                f"{where}: no row as task={name} has them at the Hub ({lacks}; columns: {', '.join(row)})"
            ) from None
        if made is not None:
            own = {"candidate": made.candidates[made.golds[0]]} if made.candidates else {}
            pairs.append((where, row | made.columns | own, made))
    return pairs


def _render(
    where: str,
    row: dict,
    prompt: list,
    after: list | None,
    target: list | None,
    settings: dict,
    more: Made,
) -> dict[str, Any]:
    read = columns([*prompt, *(after or [])])
    label, choices = settings["label"], settings["choices"]
    for column in [*read, *columns(target or []), *([label] if label else [])]:
        value = row.get(column)
        if template.missing(value):
            raise UserError(f"{where}: column {column} is empty; fill it or leave the row out")
        refuse_cell(where, column, value)
    content = [template.as_text(row[c]) for c in read] or [template.fill(target or [], row, strip=False)]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    text = template.fill(prompt, row, strip=True)
    extra: dict[str, Any] = {}
    if target is None:
        candidates, gold = list(choices.values()), _gold(where, label, row[label], list(choices))
    elif more.candidates:
        candidates = [template.fill(target, row | {"candidate": c}, strip=False) for c in more.candidates]
        gold, extra["golds"] = more.golds[0], more.golds
    else:
        candidates, gold = [template.fill(target, row, strip=False)], 0
        extra["answers"] = more.answers or [candidates[0].strip()]
    if after is not None:
        extra["after"] = template.fill(after, row, strip=True)
    return extra | {
        "prompt": text,
        "candidates": candidates,
        "gold": gold,
        "where": where,
        "key": int.from_bytes(digest, "big"),
        "words": sum(len(c.split()) for c in content),
        "columns": row,
    }


def _gold(where: str, column: str, value: Any, labels: list[str]) -> int:
    """Return which choice a label is: by its text, a class of the Hub by its name too, True by "true" and the reverse."""
    word = template.as_text(value).strip()
    if word in labels:
        return labels.index(word)
    truth = [word.lower(), word.capitalize(), word.upper()] if word.lower() in ("true", "false") else []
    for name in (getattr(value, "name", None), *truth):
        if name in labels:
            return labels.index(name)
    same = [i for i, label in enumerate(labels) if _same(word, label)]
    if len(same) == 1:
        return same[0]
    # Only another way to write this very label is a hint: the most similar one may be the opposite class.
    plain = [label for label in labels if _same_but_for_a_slip(_letters(label), _letters(word))]
    hint = f"; did you mean {plain[0]}?" if len(plain) == 1 else ""
    known = ", ".join(shortened(label) for label in labels[:20]) + ", …" * (len(labels) > 20)
    raise UserError(f"{where}: {column}={word} is none of task.choices ({known}){hint}")


NUMBER = re.compile(r"-?(0|[1-9]\d{0,40})(\.\d{1,40})?", re.ASCII)


def _same(word: str, label: str) -> bool:
    """Say whether two texts are one number, as 1 and 1.0 are, or the same characters in other code points."""
    if NUMBER.fullmatch(word) and NUMBER.fullmatch(label):
        return Decimal(word) == Decimal(label)
    return unicodedata.normalize("NFC", word) == unicodedata.normalize("NFC", label)


def _same_but_for_a_slip(a: str, b: str) -> bool:
    """Say whether two words are one, or one with a letter left out that is not its first one.

    A letter in front (moral, amoral), another letter (micro, macro) and digits make other words.
    """
    long, short = (a, b) if len(a) > len(b) else (b, a)
    if a == b or len(short) < 5 or len(long) != len(short) + 1 or not (a + b).isalpha():
        return a == b != ""
    return any(long[:i] + long[i + 1 :] == short for i in range(1, len(long))) and long[0] == short[0]


def _letters(text: str) -> str:
    """Return a text's letters and digits alone, in one case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
