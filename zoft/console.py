"""Show figures and progress to a person, and read a run's lines of metrics back."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LINE_BYTES = 1 << 20  # of metrics.jsonl
QUIET_SECONDS = 10.0  # between plain lines where the output is no terminal
# What makes a terminal do or show something else than this text: controls but for tab and line break, the marks that
# reverse the direction of what follows, other line separators, invisible tags, halves of characters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str) -> str:
    """Return a text from outside as a terminal may have it: \\x1b and its like written out, all else as it is."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _Lasting(io.FileIO):
    """A standard stream whose reader may go away: what is written then goes nowhere, and the work goes on."""

    first: TextIO
    lost = False  # whether it could not be written to, and somebody was told

    def write(self, data: Any, /) -> int:
        if self.lost:
            return len(data)
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)
        except OSError as error:  # a full disk: said by name
            if self.fileno() == 2:  # to nobody
                return len(data)
            raise OSError(error.errno, error.strerror, "standard output") from None


def lasting(stream: TextIO) -> TextIO:
    """Return a standard stream that outlives its reader, as in `zoft data | head`; a stream of another kind is itself.

    A run whose progress nobody reads any more is not ended by that.
    """
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    stream.flush()
    raw = _Lasting(number, "w", closefd=False)
    raw.first = stream  # whose end would close the file
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace"
        if stream.errors == "strict"
        else stream.errors,  # a terminal of few characters
        line_buffering=number == 2 or stream.isatty(),
    )


def peak_memory_gb(device: str = "cpu") -> float:
    """Return peak memory so far in GB (1e9 bytes): what a CUDA device allocated, else the process's resident set."""
    torch = sys.modules.get("torch")  # never the one to import it
    if device.startswith("cuda") and torch is not None:
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        # Unlike getrusage, this starts afresh with the program and not with its parent's size.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="ignore").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def logged(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics.jsonl; what is damaged is left out, for the ledger is the run."""
    rows = []
    for line in _lines(path) if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a killed run
            continue
        if isinstance(row, dict) and is_line(row):
            rows.append(row)
    return rows


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, up to one that is longer than any of ours."""
    with path.open("rb") as file:
        while len(line := file.readline(LINE_BYTES)) not in (0, LINE_BYTES):
            yield line


def is_line(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the shape of a line that a run writes: numbers, and one level of them below `eval`."""

    def number(x: Any) -> bool:
        return x is None or (isinstance(x, int | float) and abs(x) < 1e300) or x != x

    step, evals = row.get("step"), row.get("eval", {})
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 32:
        return False
    if not isinstance(evals, dict) or not all(map(number, evals.values())):
        return False
    seconds = row.get("seconds", 0.0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
        return False
    return all(number(value) for key, value in row.items() if key != "eval")


def finite(value: Any) -> Any:
    """Return the value as JSON can hold it: null for every NaN and infinity in it."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> str:
    """Return a number for the eye: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def bar(text: str, total: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, elsewhere a line every QUIET_SECONDS; yields did(amount of total)."""
    stream = stream or sys.stderr
    if stream.isatty():
        from rich import progress
        from rich.console import Console

        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
        ]
        with progress.Progress(
            *columns, progress.TimeRemainingColumn(), console=Console(file=stream)
        ) as shown:
            task = shown.add_task(text, total=total)
            yield lambda amount: shown.advance(task, amount)
        return
    done, began = 0, time.monotonic()
    said = began

    def did(amount: int) -> None:
        nonlocal done, said
        done, now = done + amount, time.monotonic()
        if now - said >= QUIET_SECONDS:
            said = now
            left = _clock((now - began) * max(0, total - done) / done)
            print(f"{text}: {min(1.0, done / total):.0%}, ETA {left}", file=stream, flush=True)

    yield did
