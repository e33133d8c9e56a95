"""A reward of the user's own: a Python function that is named on the command line, and what may go wrong in it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.errors import UserError, nearest


@dataclass
class Reward:
    """score(rows, texts) -> a number a row, the larger the better.

    name: file.py:function, as messages say it. seconds: what one call may take. digest: of the file.
    """

    name: str
    path: Path
    function: Callable[[list[dict[str, Any]], list[str]], Any]
    seconds: float
    digest: str

    def __call__(
        self, rows: Sequence[dict[str, Any]], texts: Sequence[str], where: Sequence[str]
    ) -> list[float]:
        """The rewards [R] of texts made after rows; where: what messages call the rows.

        rows: the user's own columns, and `prompt`; copies, so that nothing done to them lasts. Raises UserError, one
        line with the function and the row, for an exception, a call that lasts too long, a wrong number of
        rewards, or one that is no finite number.
        """
        ended, found = self._call(rows, texts)
        if not ended:
            raise UserError(
                f"reward {self.name}: no answer in reward_seconds={self.seconds:g} for {_rows(where)}; "
                "make it faster, or raise reward_seconds"
            )
        if isinstance(found, BaseException):
            raise UserError(
                f"reward {self.name}: {self._said(found)}, for {self._culprit(rows, texts, where)}"
            )
        try:
            values = list(found)
        except TypeError:
            raise UserError(
                f"reward {self.name}: returned {_shown(found)} for {_rows(where)}; a list of {len(rows)} numbers is wanted"
            ) from None
        if len(values) != len(rows):
            raise UserError(
                f"reward {self.name}: returned {len(values)} numbers for {_rows(where)}; one a row is wanted, {len(rows)}"
            )
        return [self._number(value, place) for value, place in zip(values, where, strict=True)]

    def _number(self, value: Any, place: str) -> float:
        try:
            number = float("nan") if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = float("nan")
        if not math.isfinite(number):
            raise UserError(f"reward {self.name}: {_shown(value)} is no finite number, for {place}")
        return number

    def _call(self, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> tuple[bool, Any]:
        """(whether it ended in time, what it returned or raised). A call that does not end is left to itself."""
        box: list[Any] = []

        def work() -> None:
            try:
                box.append(self.function([dict(row) for row in rows], list(texts)))
            except BaseException as error:  # a sys.exit() too
                box.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.seconds)
        return bool(box), box[0] if box else None

    def _said(self, error: BaseException) -> str:
        """The exception, and the last line of the user's file that it went through."""
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.path)]
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}{f': {text}' if text else ''}" + (
            f" (line {lines[-1]})" if lines else ""
        )

    def _culprit(self, rows: Sequence[dict[str, Any]], texts: Sequence[str], where: Sequence[str]) -> str:
        """The first row that breaks it alone, if that is found in the time of one call, or all of them."""
        began = time.monotonic()
        for row, text, place in zip(rows, texts, where, strict=True):
            ended, found = self._call([row], [text])
            if not ended or time.monotonic() - began > self.seconds:
                break
            if isinstance(found, BaseException):
                return f"{place} and the text {_shown(text)}"
        return _rows(where)


def load(named: str, seconds: float) -> Reward:
    """The function that `path/to/file.py:function` names; runs the file. Raises UserError."""
    path, function = look(named)
    name = f"{path.name}:{function}"
    try:
        code = path.read_bytes()
        spec = importlib.util.spec_from_file_location("zoft_reward", path)
        assert spec and spec.loader, path
        module = importlib.util.module_from_spec(spec)
        sys.modules["zoft_reward"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"reward={named}: line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"line {lines[-1]}: " if lines else ""
        said = " ".join(str(error).split())[:200]
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
    """(file, function) of `path/to/file.py:function`. Raises UserError, before anything heavy loads."""
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


def _near(function: str, names: Iterable[str]) -> str:
    near = nearest(function, names)
    return f"; did you mean {near}?" if near else ""


def _rows(where: Sequence[str]) -> str:
    return where[0] if len(where) == 1 else f"{len(where)} rows ({where[0]} … {where[-1]})"


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
