"""Read numbers and expressions that a model has written, by a grammar and never by eval.

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = digits | "(" sum ")"

`×`, `·`, `÷` and `−` are read as their plain forms. There is no power, no sign in front and no name, so that `44**19**35` is no
expression. Everything is bounded: LENGTH characters, DIGITS digits in a number, DEPTH brackets; values are exact fractions.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

LENGTH, DIGITS, DEPTH = 200, 6, 20
_TOKEN = re.compile(r"\s*(?:(\d+)|([-+*/()]))", re.ASCII)
_SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_NUMBER = re.compile(r"(?<![\d.])-?\d{1,3}(?:,\d{3})+(?:\.\d{1,10})?|-?\d{1,20}(?:\.\d{1,10})?", re.ASCII)


def tokens_of(text: str) -> list[str] | None:
    """Return the tokens of an expression; None where a character is of none, or a bound is passed."""
    text = text.strip()
    if not 0 < len(text) <= LENGTH:
        return None
    text, at, found = text.translate(_SAME), 0, list[str]()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or len(match[1] or "") > DIGITS:
            return None
        found.append(match[1] or match[2])
        at = match.end()
    return found


def numbers_in(text: str) -> list[int] | None:
    """Return the numbers that an expression reads, in order; None where it has no tokens."""
    tokens = tokens_of(text)
    return None if tokens is None else [int(t) for t in tokens if t.isdigit()]


def value_of(text: str) -> Fraction | None:
    """Return the value of an expression; None where it is none, or divides by 0."""
    tokens = tokens_of(text)
    if tokens is None:
        return None
    try:
        value, rest = _sum(tokens, 0, 0)
    except (_NotOne, ZeroDivisionError):
        return None
    return value if rest == len(tokens) else None


class _NotOne(Exception):
    """The tokens are no expression."""


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        other, after = _product(tokens, at + 1, depth)
        value = value + other if tokens[at] == "+" else value - other
        at = after
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        other, after = _factor(tokens, at + 1, depth)
        value = value * other if tokens[at] == "*" else value / other
        at = after
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if at == len(tokens) or depth > DEPTH:
        raise _NotOne
    if tokens[at].isdigit():
        return Fraction(int(tokens[at])), at + 1
    if tokens[at] != "(":
        raise _NotOne
    value, at = _sum(tokens, at + 1, depth + 1)
    if at == len(tokens) or tokens[at] != ")":
        raise _NotOne
    return value, at + 1


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, thousands' commas allowed; None where there is none."""
    found = _NUMBER.findall(text[-2000:])
    return Decimal(found[-1].replace(",", "")) if found else None
