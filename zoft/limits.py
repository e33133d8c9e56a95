"""Bounds on what is read from outside: files, cells, names, nesting, templates and patterns.

A file is bounded before it is believed: what it claims to hold is compared with these limits first, and every message
names its limit. docs/running.md has them in a table. Keys of the group `limits` raise the first three.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoft.errors import UserError

ROWS = 2_000_000  # rows of a data file or folder (limits.rows)
BYTES = 8_000_000_000  # bytes of data: of a file, or of what a packed file holds (limits.bytes)
CELL = 10_000_000  # characters of a cell or of a line (limits.cell)
COLUMNS = 10_000  # columns of a table, names of a JSON object
DEPTH = 100  # lists and objects within each other
CONFIG_BYTES = 1 << 20  # bytes of a config file
TEMPLATE_SECONDS = 10.0  # of writing one conversation with a chat template
TEMPLATE_BYTES = 1 << 30  # of memory that this may take
PATTERN_SECONDS = 10.0  # of looking for a pattern in all names of a model's tensors
READER_BYTES = 1 << 28  # of memory that a packed file may take, and READER_TIMES its own bytes on top
READER_TIMES = 200


def read_bytes(path: Path, most: int, what: str) -> bytes:
    """Return the bytes of a file that has at most `most` of them.

    what: what a larger file is not, or the key that raises the limit, for the message. Raises UserError, before more than
    `most` bytes are in memory.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise UserError(f"{path}: more than {most:,} bytes; {what}")
    return data


def parse_json(text: str | bytes, *, depth: int = DEPTH) -> Any:
    """Return the value of a JSON text in which no object names a key twice, or more than COLUMNS keys.

    depth: levels of lists and objects. Raises ValueError (json.JSONDecodeError for its grammar) with a message of one line;
    never RecursionError.
    """
    nested = f"nested more than {depth} deep"
    if not isinstance(text, str):
        text = text.decode(json.detect_encoding(text))
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(nested) from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):
            raise ValueError("a number of more than 4,300 digits; write it as text") from None
        raise
    if text.count("[") + text.count("{") > depth and _deeper(value, depth):
        raise ValueError(nested)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a name that comes twice JSON would silently keep the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shortened(twice)!r} is there twice")
    if len(made) > COLUMNS:
        raise ValueError(f"an object of {len(made):,} names; at most {COLUMNS:,} are read")
    return made


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once
)  # one for all texts: making it takes longer than a short text


def _deeper(value: Any, depth: int) -> bool:
    """Say whether lists and dicts stand more than `depth` deep within each other."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(depth):
        held = (x for item in level for x in (item.values() if isinstance(item, dict) else item))
        level = [x for x in held if isinstance(x, (list, dict))]
        if not level:
            return False
    return True


def shortened(text: str, most: int = 60) -> str:
    """Return a text of at most `most` characters: of a longer one its two ends."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) + 1 :]}"


class TooLong(BaseException):
    """Signal that time is up within `at_most_seconds`; no `except Exception` of foreign code stops it."""


@contextmanager
def at_most_seconds(seconds: float, message: str) -> Iterator[None]:
    """Raise UserError(message) when the code in this context takes longer.

    Python code and the engine of regular expressions are interrupted. Only a process's main thread can be: elsewhere,
    and where there is no such timer, nothing is bounded. Contexts nest; so do timers of others, which go on afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def up(number: int, frame: Any) -> None:
        raise TooLong

    handler = signal.signal(signal.SIGALRM, up)
    left, every = signal.setitimer(
        signal.ITIMER_REAL, seconds, 1.0
    )  # again each second, where foreign code catches it
    began = time.monotonic()
    try:
        yield
    except TooLong:
        raise UserError(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)), every)


@contextmanager
def at_most_memory(most: int, message: str) -> Iterator[None]:
    """Raise UserError(message) when the process asks for `most` bytes more than it has now (Linux; nothing elsewhere).

    An allocation beyond that fails: Python and Arrow say so by an exception. For code that allocates on this thread only.
    """
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + most
    for bound in (soft, hard):
        limit = limit if bound == resource.RLIM_INFINITY else min(limit, bound)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError:
        raise UserError(message) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
