"""Score the texts of verifiable tasks: 1 for a right answer, a little for one of the right form, else 0.

    arithmetic  1: the text is the right number;  0.1: it is another number
    countdown   1: an expression of exactly the given numbers that makes the target;  0.1: one that makes something else
    gsm8k       1: the number behind the last ####, or the last number, is the right one;  0.1: another number behind ####

What is read of a text: what stands in its last <answer> … </answer>, if it has some (GSM8K: all of it), else its first line
that is not empty, without "Answer:" in front, and without "= number" behind an expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoft.data.tasks.expression import LENGTH, last_number, numbers_in, value_of

FORM = 0.1  # what an answer of the right form is worth
_INTEGER = re.compile(r"-?\d{1,20}\.?", re.ASCII)


def answer_in(text: str) -> str:
    """Return the part of a text that is its answer."""
    _, opened, rest = text.rpartition("<answer>")
    inner, closed, _ = rest.partition("</answer>")
    if opened and closed:
        return inner.strip()
    line = next((line.strip() for line in text[:4000].splitlines() if line.strip()), "")
    return line[len("answer:") :].strip() if line[:7].lower() == "answer:" else line


def arithmetic(row: Mapping[str, Any], text: str) -> float:
    """Return the score of a text that should be a whole number."""
    said = answer_in(text)
    if not _INTEGER.fullmatch(said):
        return 0.0
    return 1.0 if int(said.rstrip(".")) == int(row["answer"]) else FORM


def countdown(row: Mapping[str, Any], text: str) -> float:
    """Return the score of a text that should be an expression."""
    said = answer_in(text)[: LENGTH + 20]
    head, equals, tail = said.partition("=")
    if equals:
        said = head if re.fullmatch(r"\s*-?\d{1,20}\.?\s*", tail, re.ASCII) else said
    numbers = numbers_in(said)
    if numbers is None or sorted(numbers) != sorted(row["numbers"]):
        return 0.0
    value = value_of(said)
    return 0.0 if value is None else 1.0 if value == row["target"] else FORM


def gsm8k(row: Mapping[str, Any], text: str) -> float:
    """Return the score of a text that should end in `#### number`."""
    right = last_number(row["answer"].rpartition("####")[2])
    _, marked, tail = text.rpartition("####")
    said = last_number(tail.lstrip()[:40].partition("\n")[0]) if marked else last_number(text)
    if said is None:
        return 0.0
    return 1.0 if said == right else FORM if marked else 0.0


SCORERS: dict[str, Callable[[Mapping[str, Any], str], float]] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "gsm8k": gsm8k,
}


def scores(task: str, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[float]:
    """Return a score per text of a verifiable task."""
    return [SCORERS[task](row, text) for row, text in zip(rows, texts, strict=True)]
