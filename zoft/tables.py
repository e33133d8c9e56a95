"""Print tables: aligned for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def aligned(lines: Sequence[Sequence[Any]]) -> list[str]:
    """Return a line per row, each column as wide as its widest cell and the last one as it comes."""
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(f"{cell!s:{w}}" for cell, w in zip(line, widths)).rstrip() for line in lines]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a | within a cell is escaped."""
    rows = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (head, *lines)]
    return "\n".join([f"| {rows[0]} |", "| --- " * len(head) + "|", *(f"| {row} |" for row in rows[1:])])


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with a column for each key that any of them has."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
