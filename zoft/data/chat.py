"""Conversations as a model reads them: its tokenizer's chat template, and which tokens the assistant has to say.

Where a turn lies in the text is never guessed from the text. The template is rendered with a marker for each
turn's content, so that what stands between the markers is the template's own; that skeleton, filled with the
real contents, must be the real rendering, letter by letter. What is scored, decoded, must be what was to be said.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from zoft.data.example import Example, front_of
from zoft.errors import UserError
from zoft.limits import TEMPLATE_BYTES, TEMPLATE_SECONDS, at_most_memory, at_most_seconds

# Turns as plain text, for tokenizers without a template of their own.
PLAIN = (
    "{% for m in messages %}{{ m['role'][:1].upper() + m['role'][1:] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Some templates write today's date. A run's data must be the same tomorrow, so it is always the same day there.
FIXED = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
         "%H": "12", "%M": "00", "%S": "00", "%p": "PM", "%I": "12", "%j": "208"}  # fmt: skip
DATE = (
    "{%- macro strftime_now(f) -%}{{ f"
    + "".join(f"|replace('{code}', '{value}')" for code, value in FIXED.items())
    + " }}{%- endmacro %}{{ '' }}"
)
BATCH = 512  # rows tokenised together
MUCH = (
    f"the chat template takes more than {TEMPLATE_BYTES >> 20} MiB of memory; task.chat=plain does without it"
)


@dataclass
class Chat:
    """Hold a chat template at work. special: pattern of the tokenizer's special tokens, or None."""

    tokenizer: Any
    template: str
    special: re.Pattern[str] | None
    front: list[int]  # token ids before a row, where the template does not write them itself
    skeletons: dict[tuple, Skeleton] = field(default_factory=dict)


@dataclass(frozen=True)
class Skeleton:
    """Hold what a template writes around the contents of turns of some roles.

    pieces: n + 1 texts around n contents. ends: for each turn that is scored, how much of the piece after it
    belongs to it: up to the end of the token that ends a turn, 0 if the template has none; -1 for other turns.
    gaps: how much of the piece before it is not there yet when the model is asked for it.
    """

    pieces: tuple[str, ...]
    ends: tuple[int, ...]
    gaps: tuple[int, ...]


@dataclass(frozen=True)
class Spans:
    """Hold a rendered conversation, by letters.

    contents: (start, end) of each turn's. says: the end of what is scored of it, or 0. seams: where the model is
    asked for the turns that are scored.
    """

    text: str
    contents: tuple[tuple[int, int], ...]
    says: tuple[int, ...]
    seams: tuple[int, ...]


def of(tokenizer: Any, kind: str) -> Chat:
    """Return the template that conversations of a task are written with.

    kind: "auto" or "template" (the tokenizer's own) | "plain". Errors: UserError where the tokenizer has none, or
    does not say where its tokens stand in a text.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if kind != "plain" and not own:
        raise UserError(
            "task.chat: this model's tokenizer has no chat template to write turns with; task.chat=plain writes "
            "'User: …' and 'Assistant: …', or take a model that was made for chat"
        )
    if not tokenizer.is_fast:
        raise UserError(
            "task.chat: this model's tokenizer does not say where its tokens stand in a text (no fast tokenizer), so "
            "that turns cannot be told apart; give prompts and completions with task.chat=plain"
        )
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    tokens += [tokenizer.eos_token] if tokenizer.eos_token and tokenizer.eos_token not in tokens else []
    special = (
        re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True))) if tokens else None
    )
    template = PLAIN if kind == "plain" else (DATE if "strftime_now" in str(own) else "") + str(own)
    front = list(front_of(tokenizer)) if kind == "plain" else []
    return Chat(tokenizer, template, special, front)


def encode(rows: Sequence[dict], chat: Chat, max_length: int) -> list[Example]:
    """Turn conversations into token ids, the assistant's turns scored.

    Scored are the tokens of each turn {role: assistant, scored: True}, from the first one that has a letter of it
    to the token with which the template ends a turn. What follows the last scored token is left out. A row longer
    than max_length loses its oldest exchanges (system turns stay), then the beginning of what the assistant answers
    last; an answer is never cut.

    rows: dicts {messages: [{role, content, scored}], where}. Returns one "lm" Example a row, in order.
    Errors: UserError naming the row where the template refuses it, writes it otherwise than it would when asked to
    answer, or leaves a turn out; where what is scored, decoded, is not what was to be said; where an answer does
    not fit in max_length.
    """
    out = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        with at_most_memory(TEMPLATE_BYTES, f"{part[0]['where']} and the rows after it: {MUCH}"):
            spans = [_spans(row["messages"], chat, row["where"]) for row in part]
        for row, span, (ids, offsets) in zip(part, spans, _tokenise(spans, chat)):
            out.append(_example(row, span, ids, offsets, chat, max_length))
    return out


def prompts(rows: Sequence[dict], chat: Chat, most: int) -> list[tuple[int, ...]]:
    """Return what stands before the answer of each row, at most so many tokens of it, cut as in `encode`.

    Raises UserError naming a row that has more than one answer.
    """
    out = []
    for row, e in zip(rows, encode(rows, chat, 1 << 30)):
        if not row["messages"][-1]["scored"] or sum(m["scored"] for m in row["messages"]) > 1:
            raise UserError(
                f"{row['where']}: texts are written after a question; this row has several answers, or goes on"
            )
        if len(e.contexts[0]) > most:
            (e,) = encode([row], chat, most + len(e.completions[0]))
        out.append(e.contexts[0])
    return out


Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and where each stands in the text


def _tokenise(spans: Sequence[Spans], chat: Chat) -> list[Tokens]:
    """Each text as the model meets it: a token that lies across a seam is none that it could be asked after."""
    found = _with_offsets([span.text for span in spans], chat)
    return [_seamed(span, *tokens, chat) for span, tokens in zip(spans, found)]


def _with_offsets(texts: list[str], chat: Chat) -> list[Tokens]:
    made = chat.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(zip(made["input_ids"], made["offset_mapping"]))


def _seamed(span: Spans, ids: list[int], offsets: list[tuple[int, int]], chat: Chat) -> Tokens:
    """The tokens of a text, those before and after each seam by themselves where one would lie across it."""
    starts = [a for a, _ in offsets]
    before = [bisect_left(starts, seam) - 1 for seam in span.seams]  # the last token that begins before each
    cuts = [seam for seam, i in zip(span.seams, before) if i >= 0 and offsets[i][1] > seam]
    if not cuts:
        return ids, offsets
    bounds = [0, *cuts, len(span.text)]
    parts = [span.text[a:b] for a, b in zip(bounds, bounds[1:])]
    found = _with_offsets(parts, chat)
    if any(
        chat.tokenizer.decode(t, clean_up_tokenization_spaces=False) != p for (t, _), p in zip(found, parts)
    ):
        return ids, offsets  # a tokenizer that begins every text with a blank: as one text after all
    ids = [i for part, _ in found for i in part]
    return ids, [(a + at, b + at) for (_, part), at in zip(found, bounds) for a, b in part]


def _example(row: dict, span: Spans, ids: list[int], offsets: list, chat: Chat, max_length: int) -> Example:
    where, messages, dropped = row["where"], row["messages"], 0
    whole = len(ids)
    while True:
        scored = _scored(span, ids, offsets, chat, where)
        last = max(i for i, s in enumerate(scored) if s) + 1
        excess = len(chat.front) + last - max_length
        if excess <= 0 or (shorter := _without_oldest(messages)) is None:
            break
        messages = shorter
        with at_most_memory(TEMPLATE_BYTES, f"{where}: {MUCH}"):
            span = _spans(messages, chat, where)
        ((ids, offsets),) = _tokenise([span], chat)
    keep = set(range(last))
    if excess > 0:
        keep -= set(_beginning(span, messages, offsets[:last], excess, where, max_length))
    dropped = whole - len(ids) + max(excess, 0)
    kept = [i for i in range(last) if i in keep]
    tokens = chat.front + [ids[i] for i in kept]
    marks = [False] * len(chat.front) + [scored[i] for i in kept]
    first = max(marks.index(True), 1)
    completion, mask = tuple(tokens[first:]), tuple(marks[first:])
    if not any(mask):
        raise UserError(f"{where}: no token is left to learn; leave the row out")
    more: dict = {"answers": tuple(row.get("answers", ())), "cut": dropped}
    return Example(
        (tuple(tokens[:first]),), (completion,), 0, "lm", scored=None if all(mask) else mask, **more
    )


def _scored(span: Spans, ids: list[int], offsets: list, chat: Chat, where: str) -> list[bool]:
    """Return which tokens are scored, checked: decoded they are what was to be said."""
    marks = [False] * len(ids)
    for number, ((start, _), end) in enumerate(zip(span.contents, span.says), 1):
        if not end:
            continue
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not inside:
            raise UserError(
                f"{where}: turn {number}: the tokenizer says of none of its tokens that it is there"
            )
        first, last = min(start, offsets[inside[0]][0]), max(end, offsets[inside[-1]][1])
        said = chat.tokenizer.decode([ids[i] for i in inside], clean_up_tokenization_spaces=False)
        wanted = span.text[first:last]  # with the blank before it that its first token may hold
        joins = bool((span.text[first:start] + span.text[end:last]).strip())
        if joins or said != wanted and not _says(said, wanted, chat):
            raise UserError(
                f"{where}: turn {number}: its tokens read {_short(said)} where {_short(span.text[start:end])} is to be "
                "said; the tokenizer joins the template with the text: leave the row out, or task.chat=plain"
            )
        for i in inside:
            marks[i] = True
    return marks


def _says(said: str, wanted: str, chat: Chat) -> bool:
    """Say whether tokens read as a text does that the tokenizer does not give back as it was: one that changes letters."""
    again = chat.tokenizer(wanted, add_special_tokens=False, verbose=False)["input_ids"]
    read = chat.tokenizer.decode(again, clean_up_tokenization_spaces=False)
    return read != wanted and "".join(said.split()) == "".join(read.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:30]}…{text[-30:]}")


def _without_oldest(messages: list[dict]) -> list[dict] | None:
    """The conversation without its first exchange, system turns kept; None where only one question is left."""
    start = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    for i in range(start + 1, len(messages)):
        if messages[i]["role"] == "user" and any(m["scored"] for m in messages[i:]):
            return messages[:start] + messages[i:]
    return None


def _beginning(
    span: Spans, messages: list[dict], offsets: list, n: int, where: str, max_length: int
) -> list[int]:
    """The first n tokens that are nothing but the content of turns which are neither system nor scored."""
    found: list[int] = []
    for message, (start, end), says in zip(messages, span.contents, span.says):
        if message["role"] != "system" and not says:
            found += [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
    if len(found) <= n:  # something of the question must stay
        raise UserError(
            f"{where}: the last exchange has {n} tokens more than max_length={max_length} leaves room for; raise "
            "max_length (task.max_words leaves long rows out)"
        )
    return found[:n]


def _spans(messages: list[dict], chat: Chat, where: str) -> Spans:
    """Render a conversation and find each turn in it."""
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    for number, turn in enumerate(turns, 1):
        if chat.special and (found := chat.special.search(turn["content"])):
            raise UserError(
                f"{where}: turn {number} holds {found[0]}, a special token of this tokenizer; take it out of the text"
            )
    wanted = tuple(m["scored"] for m in messages)
    key = (tuple(m["role"] for m in messages), tuple(not m["content"] for m in messages), wanted)
    if key not in chat.skeletons:
        chat.skeletons[key] = _skeleton(turns, wanted, chat, where)
    skeleton = chat.skeletons[key]
    text = _render(turns, chat, where)
    at = len(skeleton.pieces[0])
    contents: list[tuple[int, int]] = []
    says: list[int] = []
    seams: list[int] = []
    fits = text.startswith(skeleton.pieces[0])
    for turn, piece, end, gap in zip(turns, skeleton.pieces[1:], skeleton.ends, skeleton.gaps):
        content = turn["content"]
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((f for f in forms if text.startswith(f + piece, at)), None)
        if form is None:
            fits = False
            break
        contents.append((at, at + len(form)))
        says.append(at + len(form) + end if end >= 0 else 0)
        seams += [at - gap] if end >= 0 and at > gap else []
        at += len(form) + len(piece)
    if not fits or at != len(text):
        number = len(contents) + 1
        raise UserError(
            f"{where}: the chat template changes the text of turn {min(number, len(turns))}, so that its tokens cannot be "
            "told from the template's; task.chat=plain, or leave the row out"
        )
    return Spans(text, tuple(contents), tuple(says), tuple(seams))


def _skeleton(turns: list[dict], wanted: tuple[bool, ...], chat: Chat, where: str) -> Skeleton:
    """Return what the template writes around turns like these."""
    marked = [t | {"content": _marker(i) if t["content"] else ""} for i, t in enumerate(turns)]
    text = _render(marked, chat, where)
    pieces, at = [], 0
    for i, turn in enumerate(marked):
        found = text.find(turn["content"], at)
        if found < 0 or turn["content"] and text.count(turn["content"]) > 1:
            how = "repeats or moves" if turn["content"] in text else "leaves out"
            raise UserError(
                f"{where}: the chat template {how} turn {i + 1} ({turn['role']}); task.chat=plain, or leave the turn out"
            )
        pieces.append(text[at:found])
        at = found + len(turn["content"])
    pieces.append(text[at:])
    ends, gaps = [], [0] * len(turns)
    for i, scored in enumerate(wanted):
        ends.append(_end(marked[: i + 1], pieces[i + 1], chat, where) if scored else -1)
        if scored and i:
            asked = _render(marked[:i], chat, where, ask=True)
            if not text.startswith(asked):
                raise UserError(
                    f"{where}: turn {i + 1}: the chat template writes what stands before it otherwise than when it asks "
                    "for an answer there; task.chat=plain, or weight 0 for all but the last answer"
                )
            gaps[i] = text.index(_marker(i)) - len(asked)
    return Skeleton(tuple(pieces), tuple(ends), tuple(gaps))


def _end(turns: list[dict], after: str, chat: Chat, where: str) -> int:
    """Return how much of what follows the last of these turns ends it: up to its first special token, 0 if there is none."""
    alone = _render(turns, chat, where).partition(turns[-1]["content"])[2]
    found = chat.special.search(commonprefix([alone, after])) if chat.special else None
    return found.end() if found else 0


def ends_turns(chat: Chat, row: dict) -> bool:
    """Say whether the template ends each answer of a row with a token of its own, which is scored."""
    with at_most_memory(TEMPLATE_BYTES, f"{row['where']}: {MUCH}"):
        span = _spans(row["messages"], chat, row["where"])
    return all(end > stop for (_, stop), end in zip(span.contents, span.says) if end)


def _marker(i: int) -> str:
    return f"Q{i:05d}zoft"


def _render(turns: list[dict], chat: Chat, where: str, ask: bool = False) -> str:
    from jinja2 import TemplateError

    long = f"{where}: the chat template takes more than {TEMPLATE_SECONDS:g} s to write this conversation; task.chat=plain does without it"
    try:
        with at_most_seconds(TEMPLATE_SECONDS, long):
            text = chat.tokenizer.apply_chat_template(
                turns, chat_template=chat.template, tokenize=False, add_generation_prompt=ask
            )
        return str(text)
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"{where}: the chat template refuses this conversation: {said}") from None
