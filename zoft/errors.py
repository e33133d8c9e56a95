"""The one exception that a user is meant to see, and what helps to word it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice


class UserError(Exception):
    """A mistake in what the user gave: one line that names the key, the value and the fix (exit code 2)."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What stops a write (a full disk, a folder that is read-only or gone) as a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the most similar of words, or None when none is close, among the first 1,000 that are not too long to compare."""
    some = [w for w in islice(words, 1000) if len(w) <= 200] if len(word) <= 200 else []
    close = difflib.get_close_matches(word, some, n=1, cutoff=0.5)
    return close[0] if close else None


def one_line(text: str) -> str:
    """Return the text with what would break a line or a table written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a CPU or a GPU."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in words)
