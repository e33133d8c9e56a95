"""Rows in the layouts that other tools use: recognised by their columns, and made into prompts and targets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from zoft.data.tasks import template
from zoft.data.tasks.template import near, refuse_cell
from zoft.errors import UserError
from zoft.limits import shortened

FORMATS = ("text", "completion", "instruction", "messages", "sharegpt", "preference", "label")
# What a column may be called, by what it is.
PROMPT = ("prompt", "question", "query", "input")
COMPLETION = ("completion", "response", "answer", "output")
CONTEXT = ("input", "context")
OPTIONS = ("choices", "options")  # what a question lets choose from
DIALOGUE = ("messages", "conversations", "conversation")
NAMES = (
    "text",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "messages",
    "role",
    "content",
    "chosen",
    "rejected",
)
# Columns that say that a file is more than its format takes: left unread, they would change what is learned.
SIGNS = {
    "text": {*PROMPT, *COMPLETION, "instruction", "target", "summary", "label", "labels", "chosen", "rejected"},
    "completion": {*PROMPT, *COMPLETION, "instruction", "context", "history", "label", "labels", "chosen", "rejected",
                   *OPTIONS},
    "instruction": {*PROMPT, *COMPLETION, *CONTEXT, "history", "label", "labels", "chosen", "rejected", *OPTIONS},
    "preference": set(),
    "messages": {"tools", "label", "labels", "chosen", "rejected"},
    "sharegpt": {"tools", "label", "labels", "chosen", "rejected"},
}  # fmt: skip
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
CALLS = (
    "function_call",
    "function-call",
    "tool_call",
    "tool-call",
    "tool_calls",
)  # roles of an assistant's call
# Keys of a turn that change what it says or what of it is learned, in ways that are not rendered here.
OTHER = ("tool_calls", "function_call", "audio", "refusal", "thinking", "reasoning", "reasoning_content",
         "train_detail", "masked")  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """Describe how a file is read. columns: what it is -> its column; turn: the two keys of a turn, role and content."""

    format: str
    columns: dict[str, str]
    turn: tuple[str, str] = ("role", "content")
    unread: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """Return what is learned from which columns, for a person."""
        c = {name: f"{{{column}}}" for name, column in self.columns.items()}
        learned = {
            "text": "all of {text}",
            "preference": "to prefer {chosen} over {rejected}"
            + (", after {prompt}" if "prompt" in c else ""),
            "completion": "{completion} after {prompt}",
            "instruction": "{output} after {instruction}" + (" and {input}" if "input" in c else ""),
            "messages": "the assistant's turns of {completion}, after {prompt}",
            "sharegpt": "the assistant's turns of {messages}",
        }[self.format if self.format != "messages" or "prompt" in c else "sharegpt"].format(**c)
        with_system = f", system turn {c['system']}" if "system" in c else ""
        shown = [shortened(c) if c else "(a column without a name)" for c in self.unread[:20]]
        more = f" and {len(self.unread) - 20:,} more" if len(self.unread) > 20 else ""
        unread = f"; not read: {', '.join(shown)}{more}" if shown else ""
        return f"format {self.format}: learns {learned}{with_system}{unread}"


def wanted(task: Any) -> bool:
    """Say whether a task's rows are read by their layout rather than by templates of its own.

    Errors: UserError for keys that do not go together, or do not apply.
    """
    kind = task.format
    own = [k for k in ("prompt", "label", "choices", "target") if getattr(task, k)]
    if task.name == "local" and not own and kind != "label":
        if bad := [k for k in task.columns if k not in NAMES]:
            hint = near(bad[0], NAMES)
            raise UserError(f"task.columns: {bad[0]} is none of {', '.join(NAMES)}{hint}")
        return True
    if task.name != "local":
        why = f"task={task.name} brings its own layout"
    elif own and kind not in ("auto", "label"):
        raise UserError(
            f"task.format={kind}: with task.{own[0]} the columns are named in templates; leave one of both out"
        )
    else:
        why = "templates (task.prompt, …) name the columns themselves"
    defaults: dict[str, Any] = {"format": "auto", "columns": {}, "chat": "auto", "pack": False}
    for name, default in defaults.items():
        value: Any = getattr(task, name)
        if value != default and (name, value, task.name) != ("format", "label", "local"):
            raise UserError(f"task.{name}: {why}; leave it out")
    return False


def recognise(key: str, rows: list[tuple[str, dict[str, Any]]], task: Any) -> Reading:
    """Return the layout of some rows, from the names of their columns, or as task.format and task.columns say.

    key: the setting the rows come from ("task.train"). rows: (where, column -> value).
    Errors: UserError in one line with the columns seen and the key that decides, where nothing fits, more than
    one reading does, or a column says that there is more in the rows than the format takes.
    """
    named = {k: str(v) for k, v in task.columns.items()}
    first: dict[str, Any] = {}  # column -> its first value
    for _, row in rows:
        for column, value in row.items():
            if column not in first or empty(first[column]):
                first[column] = value
    seen = ", ".join(first)
    for name, column in named.items():
        if name not in ("role", "content") and column not in first:
            raise UserError(f"task.columns: {column} is no column of {key} ({seen}){near(column, first)}")
    found = _readings(first, named)
    kind = task.format
    if kind != "auto":
        if kind not in found:
            raise UserError(f"task.format={kind}: {key} lacks {_needs(kind)}; its columns are {seen}")
        return found[kind]
    found.pop("preference", None)  # asked for by name alone: who learns the chosen ones does not mean it
    found = {k: r for k, r in found.items() if named.keys() <= {*r.columns, "role", "content"}}
    if not found:
        if {"chosen", "rejected"} <= first.keys():
            raise UserError(
                f"{key}: pairs to prefer one of ({seen}) are no format here; "
                f"objective=preference learns from both, {_chosen(first)} learns the chosen ones"
            )
        if why := _hidden(rows, first):
            raise UserError(f"{key}: {why}")
        raise UserError(
            f"{key}: no known format has the columns {seen}; say which is which, as in "
            f"task.columns={{prompt: …, completion: …}}, or write task.prompt and task.target{_labelled(rows, first)}"
        )
    if len(found) > 1:
        raise UserError(
            f"{key}: its columns ({seen}) can be read as {' or '.join(found)}; "
            f"say {' or '.join(f'task.format={k}' for k in found)}"
        )
    (reading,) = found.values()
    signs = [c for c in reading.unread if c in SIGNS[reading.format] and not empty(first[c])]
    if signs and not named:
        label = signs[0] in ("label", "labels")
        other = f"task.prompt, task.label={signs[0]} and task.choices" if label else "task.columns"
        if signs[0] in OPTIONS:
            answer = reading.columns["completion" if "completion" in reading.columns else "output"]
            shown = '{0: " A", 1: " B", …}'
            other = f"write them into the question's text, for task.prompt, task.label={answer} and task.choices='{shown}'"
        raise UserError(
            f"{key}: its columns ({seen}) fit format {reading.format} but for {signs[0]}; say "
            f"task.format={reading.format} to leave that unread, or {other}"
        )
    return reading


def _chosen(first: dict[str, Any]) -> str:
    """The columns that learn the chosen ones of pairs: turns go on from their prompt, or hold it themselves."""
    prompt = next((c for c in PROMPT if c in first), None)
    turns = _turns(first["chosen"])
    if prompt and turns == _turns(first[prompt]):
        return f"task.columns={{prompt: {prompt}, completion: chosen}}"
    return "task.columns={messages: chosen}" if turns else "task.columns={text: chosen}"


def _labelled(rows: list[tuple[str, dict[str, Any]]], first: Iterable[str]) -> str:
    """The keys that a column of few short values asks for, beside another one to read; nothing where there is none."""
    rows = rows[:10_000]
    for column in islice(first, 100):
        values = [row.get(column) for _, row in rows]
        held = sorted({str(v) for v in values if isinstance(v, str | int) and len(str(v)) <= 20})
        if 2 <= len(held) <= min(10, len(rows) // 2) and all(str(v) in held for v in values):
            shown = ", ".join(f'{v}: " …"' for v in held)
            return (
                f"; {column} looks like a label: task.prompt, task.label={column}, task.choices='{{{shown}}}'"
            )
    return ""


def _readings(first: dict[str, Any], named: dict[str, str]) -> dict[str, Reading]:
    """All formats that the columns fit: format -> reading."""
    taken = set(named.values())

    def find(name: str, *spellings: str) -> str | None:
        if name in named:
            return named[name]
        held = [s for s in spellings or (name,) if s in first and s not in taken]
        return held[0] if held else None

    instruction = find("instruction")
    columns: dict[str, dict[str, str | None]] = {}
    turn = (named.get("role", "role"), named.get("content", "content"))
    dialogue = find("messages", *DIALOGUE)
    prompt, completion = find("prompt", *PROMPT), find("completion", *COMPLETION)
    if dialogue and _turns(first[dialogue]):
        keys = next((t for t in first[dialogue] if isinstance(t, dict)), {}).keys()
        sharegpt = turn[0] not in keys and {"from", "value"} <= keys
        if sharegpt:
            turn = ("from", "value")
        columns["sharegpt" if sharegpt else "messages"] = {"messages": dialogue, "system": find("system")}
    if prompt and completion and _turns(first[prompt]) and _turns(first[completion]):
        columns.setdefault("messages", {"prompt": prompt, "completion": completion})
    elif instruction and (output := find("output", *COMPLETION[::-1])):
        given = find("input", *CONTEXT)
        columns["instruction"] = {
            "instruction": instruction,
            "input": given,
            "output": output,
            "system": find("system"),
        }
    elif prompt and completion:
        columns["completion"] = {"prompt": prompt, "completion": completion, "system": find("system")}
    chosen, rejected = find("chosen"), find("rejected")
    if chosen and rejected and (prompt or _turns(first[chosen])):
        columns["preference"] = {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "system": find("system"),
        }
    if text := find("text"):
        columns["text"] = {"text": text}
    made = {}
    for kind, names in columns.items():
        held = {name: column for name, column in names.items() if column}
        unread = tuple(c for c in first if c not in held.values())
        made[kind] = Reading(kind, held, turn, unread)
    return made


def _turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def _hidden(rows: list[tuple[str, dict[str, Any]]], first: dict[str, Any]) -> str:
    """Return where rows that are no format's may hold what is: turns that are no list, or a list of rows; "" elsewhere."""
    for column in DIALOGUE:
        if column in first and not _turns(first[column]):
            held = (
                "text (JSON in it, perhaps)"
                if isinstance(first[column], str)
                else type(first[column]).__name__
            )
            return f"column {column} holds {held}, not a list of turns {{role, content}}; write it as one"
    wrapped = [c for c, value in first.items() if _turns(value)]
    if len(rows) == 1 and wrapped and ".json:" in rows[0][0].lower():  # not of .jsonl
        file = re.sub(r":( item )?\d+$", "", rows[0][0])
        return f"{file} is one object, whose {wrapped[0]} is a list of {len(first[wrapped[0]])}; if those are the rows, save them alone"
    return ""


def _needs(kind: str) -> str:
    return {
        "text": "a column text",
        "preference": "columns prompt, chosen and rejected, or chosen and rejected of turns",
        "completion": "columns prompt and completion",
        "instruction": "columns instruction and output",
        "messages": "a column messages of {role, content}",
        "sharegpt": "a column conversations of {from, value}",
    }[kind] + " (task.columns says what stands for them)"


def empty(value: Any) -> bool:
    return template.missing(value) or value in ("", [], {})


# --- rows -------------------------------------------------------------------------------------------------


def make(where: str, row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Return one example of a recognised format.

    Returns {prompt, candidates: [what is learned], gold: 0, where, key, words} and, but for text, `messages`:
    turns {role, content, scored}. `pieces` marks text, whose prompt is empty; `joins` a prompt and completion that
    can also be one text. answers: the text to give, where the last turn is the only one that is learned.
    Errors: UserError naming the row where a cell or turn is missing, of another kind, or leaves no target.
    """
    c = reading.columns
    if reading.format == "preference":
        return _pair(where, row, reading)
    if reading.format == "text":
        text = _cell(where, row, c["text"])
        return _example(where, "", text, [text]) | {"pieces": True}
    if reading.format == "completion":
        prompt, target = _cell(where, row, c["prompt"]), _cell(where, row, c["completion"])
    elif reading.format == "instruction":
        given = _cell(where, row, c["input"], may_lack=True) if "input" in c else ""
        prompt = _cell(where, row, c["instruction"])
        prompt, target = f"{prompt}\n\n{given}" if given.strip() else prompt, _cell(where, row, c["output"])
    else:
        return _conversation(where, row, reading)
    turns = [{"role": "user", "content": prompt, "scored": False}]
    system = _cell(where, row, c["system"], may_lack=True) if "system" in c else ""
    if system.strip():
        turns.insert(0, {"role": "system", "content": system, "scored": False})
        prompt = f"{system}\n\n{prompt}"
    turns.append({"role": "assistant", "content": target, "scored": True})
    more = {"messages": turns, "answers": [target.strip()], "joins": True}
    return _example(where, prompt, target, [prompt]) | more


def _pair(where: str, row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """One pair: {pair: [row of the chosen answer, row of the rejected one]}, either as its own format would make it."""
    c, sides = reading.columns, []
    for side in ("chosen", "rejected"):
        answer = c[side]
        turns = _turns(row.get(answer))
        whole = turns and not ("prompt" in c and _turns(row.get(c["prompt"])))  # turns that hold their prompt
        columns = {k: v for k, v in c.items() if k == "system"}
        columns |= {"messages": answer} if whole else {"prompt": c.get("prompt", ""), "completion": answer}
        made = make(
            where,
            row,
            Reading("messages" if turns else "completion", columns, _turn_keys(row.get(answer), reading)),
        )
        if "answers" not in made:
            last = made["messages"][-1]
            if last["role"] != "assistant":
                raise UserError(
                    f"{where}: column {answer} does not end with a turn of the assistant; leave the row out"
                )
            for turn in made["messages"][:-1]:  # what both have in common says nothing of either
                turn["scored"] = False
            made["prompt"] = "\n".join(f"{t['role']}: {t['content']}" for t in made["messages"][:-1])
            made["candidates"] = [last["content"]]
        sides.append(made)
    first, second = sides
    prompt = first["prompt"]
    content = [prompt, first["candidates"][0], second["candidates"][0]]
    words = max(s["words"] for s in sides)
    example = _example(where, prompt, first["candidates"][0], [prompt or json.dumps(content)])
    return example | {"pair": sides, "candidates": content[1:], "words": words}


def _turn_keys(value: Any, reading: Reading) -> tuple[str, str]:
    """Return the keys of a turn, role and content: as named, or as ShareGPT has them."""
    keys = next((t for t in value if isinstance(t, dict)), {}).keys() if isinstance(value, list) else ()
    return ("from", "value") if reading.turn[0] not in keys and {"from", "value"} <= {*keys} else reading.turn


def _conversation(where: str, row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    c = reading.columns
    turns: list[dict[str, Any]] = []
    for name in ("prompt", "completion") if "prompt" in c else ("messages",):
        held = row.get(c[name])
        if empty(held):
            raise UserError(f"{where}: column {c[name]} is empty; fill it or leave the row out")
        if not isinstance(held, list):
            raise UserError(f"{where}: column {c[name]} holds a {type(held).__name__}, not a list of turns")
        for turn in held:
            turns.append(_turn(f"{where}: turn {len(turns) + 1}", turn, reading, name != "prompt"))
    if "system" in c and turns[0]["role"] != "system":
        system = _cell(where, row, c["system"], may_lack=True)
        if system.strip():
            turns.insert(0, {"role": "system", "content": system, "scored": False})
    scored = [i for i, turn in enumerate(turns) if turn["scored"]]
    if not scored:
        raise UserError(f"{where}: no turn of the assistant is there to learn; leave the row out")
    before = turns[: scored[0]]
    content = [f"{t['role']}: {t['content']}" for t in before]
    target = "\n".join(turns[i]["content"] for i in scored)
    key = content if any(t["role"] != "system" for t in before) else [*content, target]
    made = _example(where, "\n".join(content), target, key) | {"messages": turns}
    if scored == [len(turns) - 1]:
        made["answers"] = [target.strip()]
    return made


def _turn(where: str, turn: Any, reading: Reading, learned: bool) -> dict[str, Any]:
    """One turn, checked: {role, content, scored}."""
    of, says = reading.turn
    if not isinstance(turn, dict):
        raise UserError(f"{where} is a {type(turn).__name__}, not an object with {of} and {says}")
    if held := [k for k in OTHER if not empty(turn.get(k))]:
        raise UserError(f"{where} has {held[0]}, which is not learned from here; write it into {says}")
    if of not in turn or says not in turn:
        lacks = says if of in turn else of
        raise UserError(f"{where} has no {lacks} ({', '.join(map(str, turn))}); task.columns={{{lacks}: …}}")
    role = ROLES.get(str(turn[of]).strip().lower())
    if role is None and str(turn[of]).strip().lower() in CALLS:
        raise UserError(
            f"{where} has {of}={turn[of]}: tool calls are not learned from here; {of}=gpt learns its text"
        )
    if role is None:
        known = ", ".join(ROLES)
        raise UserError(f"{where} has {of}={turn[of]}, which is none of {known}{near(str(turn[of]), ROLES)}")
    content = turn[says]
    if isinstance(content, list):  # parts, as of models that see pictures
        if other := [p for p in content if not (isinstance(p, dict) and isinstance(p.get("text"), str))]:
            kind = other[0].get("type") if isinstance(other[0], dict) else type(other[0]).__name__
            raise UserError(f"{where} has a part of type {kind}; only text is learned from")
        content = "".join(p["text"] for p in content)
    weight = [turn[k] for k in ("weight", "train") if not template.missing(turn.get(k))]
    if any(w not in (0, 1) for w in weight):
        raise UserError(f"{where} has weight {weight[0]}; use 1 (learned) or 0")
    if template.missing(content) or not str(content).strip() and role != "system":
        raise UserError(f"{where} ({turn[of]}) is empty; fill it or leave the row out")
    refuse_cell(where, says, content)
    scored = role == "assistant" and learned and all(weight)
    return {"role": role, "content": template.as_text(content), "scored": scored}


def _cell(where: str, row: dict[str, Any], column: str, may_lack: bool = False) -> str:
    value = row.get(column)
    if template.missing(value) or not str(value).strip():
        if may_lack:
            return ""
        raise UserError(f"{where}: column {column} is empty; fill it or leave the row out")
    refuse_cell(where, column, value)
    return template.as_text(value)


def _example(where: str, prompt: str, target: str, content: Iterable[str]) -> dict[str, Any]:
    digest = hashlib.blake2b(json.dumps(list(content)).encode(), digest_size=8).digest()
    return {
        "prompt": prompt,
        "candidates": [target],
        "gold": 0,
        "where": where,
        "key": int.from_bytes(digest, "big"),
        "words": len(prompt.split()) + len(target.split()),
    }


def joined(rows: list[dict[str, Any]]) -> str:
    """Return what stands between a prompt and its completion in plain text: nothing where they bring their own blanks."""
    for row in rows:
        if row["prompt"][-1:].isspace() or row["candidates"][0][:1].isspace():
            return ""
    return "\n"
