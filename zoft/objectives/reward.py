"""A reward of the user's own: a Python function that is named on the command line, and what may go wrong in it."""

from __future__ import annotations

import ast
import faulthandler
import hashlib
import importlib.util
import math
import os
import reprlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zoft.errors import UserError, nearest
from zoft.objectives.served import digest_of, is_address, server_of

TRIES_OF_SERVED = 10  # times reward_seconds that a call of a server may take, its requests one after another
GRACE = 5.0  # seconds, before a process is ended that its reward does not give back


@dataclass
class Reward:
    """Call score(rows, texts), which returns a number per row, the larger the better.

    name: file.py:function, as messages say it. seconds: what one call may take. digest: of the file.
    """

    name: str
    path: Path
    function: Callable[[list[dict[str, Any]], list[str]], Any]
    seconds: float
    digest: str

    def __call__(
        self, rows: Sequence[dict[str, Any]], texts: Sequence[str], where: Sequence[str], times: int = 1
    ) -> list[float]:
        """The rewards [R] of texts made after rows; where: what messages call the rows.

        rows: the user's own columns, and `prompt`; copies, so that nothing done to them lasts. times: how many times `seconds`
        the call may take. Raises UserError, one
        line with the function and the row, for an exception, a call that lasts too long, a wrong number of
        rewards, or one that is no finite number.
        """
        ended, found = self._call(rows, texts, where, times)
        if not ended:
            many = f"{times} × " if times > 1 else ""
            raise UserError(
                f"reward {self.name}: no answer in {many}reward_seconds={self.seconds:g} for {_rows(where)}; "
                "make it faster, or raise reward_seconds"
            )
        if isinstance(found, UserError):
            raise found
        if isinstance(found, BaseException):
            raise UserError(
                f"reward {self.name}: {self._said(found)}, for {self._culprit(rows, texts, where)}"
            )
        return found

    def _call(
        self, rows: Sequence[dict[str, Any]], texts: Sequence[str], where: Sequence[str], times: int = 1
    ) -> tuple[bool, Any]:
        """Return (whether it ended in time, the rewards or what was raised).

        Whatever runs code of the user's file is within the time: what is returned may be a generator, or numbers that
        are made when they are asked for.
        """
        copies = [dict(row) for row in rows], list(texts)
        return run_for(times * self.seconds, lambda: self._numbers(self.function(*copies), where))

    def _numbers(self, found: Any, where: Sequence[str]) -> list[float]:
        """Return what the function returned as one number per row. Raises UserError."""
        n = len(where)
        values = None
        if not isinstance(found, (str, bytes, Mapping, Set)):  # these have no order, or no numbers
            with suppress(TypeError):
                values = iter(found)
        if values is None:
            raise UserError(
                f"reward {self.name}: returned {_shown(found)} for {_rows(where)}; a list of {n} numbers is wanted"
            )
        held = list(islice(values, n + 1))
        if len(held) != n:
            more = (
                f"more than {n}"
                if len(held) > n and not hasattr(found, "__len__")
                else str(_length(found, held))
            )
            raise UserError(
                f"reward {self.name}: returned {more} numbers for {_rows(where)}; return one per row, {n}"
            )
        return [self._number(value, place) for value, place in zip(held, where, strict=True)]

    def _number(self, value: Any, place: str) -> float:
        try:
            number = float("nan") if isinstance(value, str | bytes) else float(value)
        except Exception as error:
            known = isinstance(error, (TypeError, ValueError, OverflowError, RuntimeError))
            why = "" if known else f" ({self._said(error)})"
            raise UserError(
                f"reward {self.name}: {_shown(value)} is no finite number, for {place}{why}"
            ) from None
        if not math.isfinite(number):
            raise UserError(f"reward {self.name}: {_shown(value)} is no finite number, for {place}")
        return number

    def _said(self, error: BaseException) -> str:
        """The exception, and the last line of the user's file that it went through."""
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.path)]
        text = _text(error)
        return f"{type(error).__name__}{f': {text}' if text else ''}" + (
            f" (line {lines[-1]})" if lines else ""
        )

    def _culprit(self, rows: Sequence[dict[str, Any]], texts: Sequence[str], where: Sequence[str]) -> str:
        """The first row that breaks it alone, if that is found in the time of one call, or all of them."""
        began = time.monotonic()
        for row, text, place in zip(rows, texts, where, strict=True):
            ended, found = self._call([row], [text], [place])
            if not ended or time.monotonic() - began > self.seconds:
                break
            if isinstance(found, BaseException) and not isinstance(found, UserError):
                return f"{place} and the text {_shown(text)}"
        return _rows(where)


def run_for(seconds: float, work: Callable[[], Any]) -> tuple[bool, Any]:
    """Return (whether some code of the user's ended in time, what it returned or raised).

    It runs on a thread of its own, and one that does not end is left to itself. Code that never lets another thread run
    (a regular expression that backtracks) cannot be left: the process ends, with the place where it stood, after twice the
    time and GRACE seconds. os._exit in it is an error like any other, for a process that is gone has no result.
    """
    box: list[Any] = []
    here, leave = os.getpid(), os._exit

    def refuse(status: int) -> Any:
        if os.getpid() != here:  # a process that it started
            leave(status)
        raise SystemExit(f"os._exit({status}) would end the run")

    def run() -> None:
        try:
            box.append(work())
        except BaseException as error:  # a sys.exit() too
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    os._exit = refuse  # type: ignore[assignment]
    with suppress(RuntimeError, ValueError, OSError, OverflowError):  # no stderr, a time of years
        faulthandler.dump_traceback_later(2 * seconds + GRACE, exit=True, file=2)
    try:
        thread.start()
        thread.join(seconds)
    finally:
        faulthandler.cancel_dump_traceback_later()
        os._exit = leave  # type: ignore[assignment]
    return bool(box), box[0] if box else None


def check_reward(named: str) -> None:
    """Refuse a reward that is not there, before anything heavy loads. Raises UserError."""
    if is_address(named):
        server_of(named, 1.0)
    else:
        look(named)


def load(named: str, seconds: float) -> Reward:
    """Return the function that `path/to/file.py:function` names, or the server at an address; runs the file, for `seconds` at most.

    Raises UserError."""
    if is_address(named):
        return Reward(
            named, Path(named), server_of(named, seconds), TRIES_OF_SERVED * seconds, digest_of(named)
        )
    path, function = look(named)
    name = f"{path.name}:{function}"
    try:
        code = path.read_bytes()
        spec = importlib.util.spec_from_file_location("zoft_reward", path)
        assert spec and spec.loader, path
        module = importlib.util.module_from_spec(spec)
        sys.modules["zoft_reward"] = module  # dataclasses look their module up
        run = spec.loader.exec_module
        ended, found = run_for(seconds, lambda: run(module))
        if not ended:
            raise UserError(
                f"reward={named}: the file itself did not end in reward_seconds={seconds:g}; leave long work to the function, "
                "or raise reward_seconds"
            )
        if isinstance(found, BaseException):
            raise found
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"reward={named}: line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"line {lines[-1]}: " if lines else ""
        said = _text(error)
        raise UserError(f"reward={named}: {place}{type(error).__name__}: {said}") from None
    made = getattr(module, function, None)
    if not callable(made):
        ours = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == "zoft_reward"
        ]
        hint = _near(function, ours) or f" ({', '.join(ours) or 'there is none at all'})"
        raise UserError(f"reward={named}: there is no function {function} in it{hint}")
    digest = f"blake2b:{hashlib.blake2b(code, digest_size=16).hexdigest()}"
    return Reward(name, path, made, seconds, digest)


def look(named: str) -> tuple[Path, str]:
    """Return (file, function) of `path/to/file.py:function`. Raises UserError, before anything heavy loads."""
    place, colon, function = named.rpartition(":")
    path = Path(place if colon else named).expanduser()
    if not colon or not function.isidentifier():
        raise UserError(f"reward={named}: name a file and a function in it: my_reward.py:score")
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"reward={named}: {path}: no such .py file")
    try:
        bound = _bound(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"reward={named}: line {error.lineno}: {error.msg}") from None
    except (OSError, ValueError, RecursionError):  # running it says so
        bound = {"*"}
    if not bound & {function, "*"}:
        raise UserError(f"reward={named}: there is no function {function} in it{_near(function, bound)}")
    return path.resolve(), function


def _bound(code: bytes) -> set[str]:
    """All names that a file gives to anything, without running it; `*` where only running it can tell."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Name) and node.id in ("globals", "vars", "locals", "exec", "setattr"):
            found.add("*")
    return found


def _text(error: BaseException) -> str:
    """Return what an exception says, in one line; nothing where that raises another."""
    try:
        return " ".join(str(error).split())[:200]
    except Exception:
        return ""


def _length(found: Any, held: list[Any]) -> int:
    """Return how many values were returned, as they say themselves or as they were counted."""
    try:
        return len(found)
    except Exception:
        return len(held)


def _near(function: str, names: Iterable[str]) -> str:
    near = nearest(function, names)
    return f"; did you mean {near}?" if near else ""


def _rows(where: Sequence[str]) -> str:
    return where[0] if len(where) == 1 else f"{len(where)} rows ({where[0]} … {where[-1]})"


def _shown(value: Any) -> str:
    try:
        text = " ".join(reprlib.repr(value).split())
    except Exception:  # of the user's own class
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
