"""Show a person what a model is trained on: tokens with their loss mask, and counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from zoft.config.schema import Config
from zoft.console import escaped
from zoft.data.example import Example

FOLD = 160  # tokens of an unscored run that are shown; of a longer one, half of them at either end
SCORED, DIM, OFF = "\033[32m", "\033[2m", "\033[0m"


def show(example: Example, tokenizer: Any, *, colour: bool = False, fold: bool = False) -> str:
    """Return what the model reads, decoded, with each scored token in ⟦ ⟧, a line break in it as ↵, controls written out.

    One text where there is one completion; else the context, then a line a candidate, `*` before the gold one.
    example: as encode() gives it. tokenizer: the one that encoded it. colour: for a terminal; scored tokens green,
    all else dim. fold: leave out the middle of long stretches that are not scored.
    """
    shared = len(set(example.contexts)) == 1
    single = len(example.completions) == 1
    lines = (
        []
        if single or not shared
        else [_plain([*example.contexts[0], *example.after], tokenizer, colour, fold)]
    )
    for c, (context, completion) in enumerate(zip(example.contexts, example.completions)):
        lead = "" if shared and not single else _plain(context, tokenizer, colour, fold)
        mark = "" if single else "* " if c == example.gold else "  "
        lines.append(mark + lead + _marked(completion, example.scored, tokenizer, colour, fold))
    return "\n".join(lines)


def _marked(tokens: Sequence[int], scored: Any, tokenizer: Any, colour: bool, fold: bool) -> str:
    parts: list[str] = []
    plain: list[int] = []
    held: list[int] = []
    marks = list(scored or [True] * len(tokens))
    for token, counts, last in zip(tokens, marks, [not m for m in marks[1:]] + [True]):
        if not counts:
            plain.append(token)
            continue
        if plain:
            parts.append(_plain(plain, tokenizer, colour, fold))
            plain = []
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < 4 and not last:  # a character of several tokens
            continue
        text, held = f"⟦{escaped(text).replace(chr(10), '↵')}⟧" + "\n" * text.count("\n"), []
        parts.append(f"{SCORED}{text}{OFF}" if colour else text)
    return "".join(parts)


def _plain(tokens: Sequence[int], tokenizer: Any, colour: bool, fold: bool) -> str:
    tokens = list(tokens)
    if fold and len(tokens) > FOLD:
        half = FOLD // 2
        hidden = f" … {len(tokens) - FOLD} tokens … "
        text = tokenizer.decode(tokens[:half]) + hidden + tokenizer.decode(tokens[-half:])
    else:
        text = tokenizer.decode(tokens)
    text = escaped(text)
    return f"{DIM}{text}{OFF}" if colour and text else text


def counts(examples: Sequence[Example]) -> dict[str, Any]:
    """Return {examples, tokens, scored, cut (examples that max_length shortened), longest}, the gold row of each counted."""
    rows = [
        (len(e.contexts[e.gold]) + len(e.completions[e.gold]) + len(e.after) - e.masked, _scored(e))
        for e in examples
    ]
    return {
        "examples": len(rows),
        "tokens": sum(length for length, _ in rows),
        "scored": sum(n for _, n in rows),
        "cut": sum(e.cut > 0 for e in examples),
        "longest": max(e.length for e in examples),
    }


def _scored(e: Example) -> int:
    return len(e.completions[e.gold]) if e.scored is None else sum(e.scored)


def counted(found: dict[str, Any]) -> str:
    """Return counts in one line."""
    n, tokens = found["examples"], found["tokens"]
    return (
        f"{n:,} training examples, {tokens:,} tokens, {found['scored']:,} scored ({found['scored'] / tokens:.1%}); "
        f"the longest has {found['longest']:,}, {found['cut']:,} ({found['cut'] / n:.1%}) are cut to max_length"
    )


def as_tree(example: Example, tokenizer: Any) -> dict[str, Any]:
    """Return an example for a program: rows of {token, text, scored}, one per candidate, and which is gold."""
    rows = []
    for context, completion in zip(example.contexts, example.completions):
        marks = [False] * len(context) + list(example.scored or [True] * len(completion))
        rows.append(
            [
                {"token": token, "text": tokenizer.decode([token]), "scored": mark}
                for token, mark in zip(
                    [*context, *completion, *example.after], [*marks, *[False] * len(example.after)]
                )
            ]
        )
    return {"rows": rows, "gold": example.gold}


def show_data(
    config: Config, count: int, say: Callable[[str], Any], *, as_json: bool = False, colour: bool = False
) -> None:
    """Print the first examples of training as the model reads them, scored tokens in ⟦ ⟧, and counts of them all.

    colour: for a terminal, where long stretches that are not scored are folded, too.
    """
    from zoft.data import tasks
    from zoft.data.tasks import check_task, subset
    from zoft.models import load
    from zoft.models.load import find_model

    load.check_model(find_model(config.model))
    check_task(config.task)
    from zoft.data.encode import encode, refuse_foreign_ids
    from zoft.models.vocabulary import embedding_rows
    from zoft.train.parts import reading, run_tokenizer

    data = tasks.load_task(config.task, config.limits)
    tokenizer = run_tokenizer(config)
    examples = encode(data.train, tokenizer, data, config.max_length, pack=data.pack)
    size = embedding_rows(config.model, config.trust_remote_code)
    refuse_foreign_ids(data.train, examples, tokenizer, size)
    held_out = subset(data.eval, config.eval_limit)
    refuse_foreign_ids(held_out, encode(held_out, tokenizer, data, config.max_length), tokenizer, size)
    found = counts(examples)
    notes = [n for n in data.notes if n != data.reading] + reading(tokenizer, data)
    if as_json:
        shown = [as_tree(e, tokenizer) for e in examples[:count]]
        say(json.dumps({"notes": notes, **found, "shown": shown}))
        return
    for line in [*notes, counted(found)]:
        say(escaped(line))
    for example in examples[:count]:
        say(f"\n{show(example, tokenizer, colour=colour, fold=True)}")
