"""Text to learn as a whole: long texts in pieces of max_length, short ones a row each, or packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zoft.data.example import Example, front_of
from zoft.errors import UserError

BATCH = 512  # texts tokenised together


def encode(rows: Sequence[dict], tokenizer: Any, max_length: int, *, pack: bool = False) -> list[Example]:
    """Turn texts into token ids, each of their tokens scored once, and the EOS after them.

    A text is BOS (where the tokenizer puts one), its tokens, EOS (where there is one). One longer than max_length
    is cut into pieces; each begins with the last token of the piece before, which is not scored again. BOS is not
    scored, nor is a first token that nothing precedes. pack: all texts are one such text, one after the other, so
    that a token sees what of the texts before stands in its row.

    rows: dicts {candidates: [text], where}. max_length: tokens a row. Returns "lm" Examples in the order of the
    text, as many as it takes.
    Errors: UserError naming a row that leaves no token to score; for pack without an EOS.
    """
    if pack and tokenizer.eos_token_id is None:
        raise UserError(
            "task.pack=true: this tokenizer has no end-of-text token to put between texts; leave it out"
        )
    front = list(front_of(tokenizer))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    marks: list[bool] = []
    out: list[Example] = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        texts = [row["candidates"][0] for row in part]
        for row, ids in zip(part, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
            if not ids or len(front) + len(ids) + len(end) < 2:
                raise UserError(f"{row['where']}: its text has no token to learn; leave it out")
            tokens = front + ids + end
            learned = [False] * len(front) + [True] * (len(tokens) - len(front))
            if pack:
                stream += tokens
                marks += learned
            else:
                out += _cut(tokens, learned, max_length)
    return list(_cut(stream, marks, max_length)) if pack else out


def _cut(tokens: list[int], marks: list[bool], max_length: int) -> Iterator[Example]:
    """Rows of max_length, each from the last token of the one before."""
    part = 0
    for start in range(0, max(len(tokens) - 1, 1), max_length - 1):
        row, mask = tokens[start : start + max_length], marks[start : start + max_length]
        while mask and not mask[-1]:
            row, mask = row[:-1], mask[:-1]
        first = next((i for i, m in enumerate(mask) if m and i), 0)
        if first:
            # A first token of a row is context; so are those that are not scored before the first that is.
            rest = None if all(mask[first:]) else tuple(mask[first:])
            yield Example((tuple(row[:first]),), (tuple(row[first:]),), 0, "lm", scored=rest, part=part)
            part += 1
