"""Prompt templates: text with {column} in it, and nothing that could run code."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from zoft.errors import UserError, nearest

MASK = (
    "[MASK]"  # in a template: the place that a masked language model fills, whatever its tokenizer calls it
)
Piece = tuple[str, str | None]  # text, and the column that follows it


def parse(key: str, template: str) -> list[tuple[str, str | None]]:
    """Split a template into (text, column or None) pieces; `{{` and `}}` stand for braces.

    Only plain column names may stand in braces: {a.b}, {a[0]}, {a!r}, {a:>9} are refused, nothing being nested here.
    key: the setting it comes from, for messages ("task.prompt"). Errors: UserError.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}: {error} in {template!r}; a literal brace is written {{{{ or }}}}") from None
    for _, column, spec, conversion in pieces:
        if column is None:
            continue
        if not column:
            raise UserError(f"{key}: empty braces in {template!r}; write the column's name: {{text}}")
        if spec or conversion or set(column) & set(".[]{}"):
            if not (spec or conversion) and plain(column) != column:
                raise UserError(
                    f"{key}: {{{column}}} is more than a column's name; nested fields are not read: give it a column of its own"
                )
            tail = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"{key}: {{{column}{tail}}} is more than a column's name; write {{{plain(column)}}}"
            )
    return [(text, column) for text, column, _, _ in pieces]


def at_mask(key: str, pieces: list[Piece]) -> tuple[list[Piece], list[Piece] | None]:
    """Return what a template has before and after `[MASK]`; None after it where there is no mask. Errors: UserError."""
    found = [i for i, (text, _) in enumerate(pieces) if MASK in text]
    if not found:
        return pieces, None
    text, column = pieces[found[0]]
    before, _, after = text.partition(MASK)
    if len(found) > 1 or MASK in after:
        raise UserError(f"{key}: {MASK} is there twice; a masked language model fills one")
    return [*pieces[: found[0]], (before, None)], [(after, column), *pieces[found[0] + 1 :]]


def plain(column: str) -> str:
    """Return the part of a replacement field that could be a column's name."""
    return column.split(".")[0].split("[")[0] or "text"


def columns(pieces: Iterable[tuple[str, str | None]]) -> list[str]:
    """Return the columns that a template reads, in order, each once."""
    return list(dict.fromkeys(c for _, c in pieces if c is not None))


def fill(pieces: Iterable[tuple[str, str | None]], row: dict[str, Any], *, strip: bool) -> str:
    """Return the template with a row's values in it; strip: blanks at a value's end are dropped."""
    parts = []
    for text, column in pieces:
        parts.append(text)
        if column is not None:
            value = as_text(row[column])
            parts.append(value.rstrip() if strip else value)
    return "".join(parts)


def as_text(value: Any) -> str:
    """Return a cell as text; a whole float is written as the integer it stands for, a bool in lower case."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def refuse_cell(where: str, column: str, value: Any) -> None:
    """Raise UserError for a value that is no text, nor can be written as text."""
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: column {column} holds a {type(value).__name__}, not text")
    if isinstance(value, (bytes, bytearray)):
        raise UserError(f"{where}: column {column} holds bytes, not text")
    if isinstance(value, str) and (bad := _no_text(value)):
        raise UserError(f"{where}: column {column} holds {bad}; give it plain text")


def _no_text(value: str) -> str:
    """Return what is in a text that no tokenizer takes, or nothing."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a character (a lone surrogate)"
    return "a zero byte" if "\0" in value else ""


def near(word: str, words: Iterable[str], shown: Mapping[str, Any] | None = None) -> str:
    """Return a hint with the nearest of words, or nothing; of one that looks the same, the code points in which they differ.

    shown: what stands for each of them in the hint.
    """
    words = list(words)
    same = [
        w
        for w in words
        if w != word and unicodedata.normalize("NFC", w) == unicodedata.normalize("NFC", word)
    ]
    if same:
        return f"; {ascii(same[0])} is, in other code points than {ascii(word)}"
    close = nearest(word, words)
    return f"; did you mean {(shown or {}).get(close, close)}?" if close else ""
