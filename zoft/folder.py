"""A run's folder while the run goes on: what is done when it fills up, loses its permissions, or vanishes."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from zoft.errors import UserError, writing

if TYPE_CHECKING:
    from zoft.ledger import Ledger

ASKED = "baseline.json"  # in its folder from the start: what was asked for

LOOK_SECONDS = 1.0  # between looks whether the folder is still there


def refuse_unwritable(key: str, folder: Path) -> None:
    """Raise UserError, before anything heavy, where a folder could not be made or written in."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{key}={folder}: {error.strerror}; choose another name") from None
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(there):
        raise UserError(f"{key}={folder}: {there} is no folder; choose another name")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{key}={folder}: {there} cannot be written in; choose another place")


@contextmanager
def alone(folder: Path, new: bool) -> Iterator[None]:
    """Let no other process train in a run's folder meanwhile; a folder that is made for this, and stays empty, goes again.

    new: whether a run begins there, or one goes on. Raises UserError where another has it, or it cannot be made.
    """
    made = [p for p in (folder, *folder.parents) if new and not os.path.lexists(p)]
    if new:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir={folder}: cannot be made ({error.strerror}); choose another place"
            ) from error
    fd = -1
    try:
        with suppress(OSError):  # some cluster file systems have no locks of folders; the ledger has its own
            fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                place = f"output_dir={folder}" if new else f"{folder}"
                fix = "choose another name with output_dir=…" if new else "stop it"
                raise UserError(
                    f"{place}: another process is writing this run: wait for it, or {fix}"
                ) from None
        yield
    finally:
        if fd >= 0:
            os.close(fd)
        with suppress(OSError):
            for p in made:
                p.rmdir()


def write(path: Path, text: str | bytes) -> None:
    """Write a file so that its name never holds half of it. Raises UserError where it cannot be written."""
    draft = path.with_name(f".{path.name}.new")
    data = text.encode("utf-8") if isinstance(text, str) else text
    with writing(path):
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise


@contextmanager
def kept(ledger: Ledger) -> Iterator[None]:
    """Adds to a failed write of a run what becomes of its steps, and how to go on."""
    try:
        yield
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UserError(
            f"{error}; the {len(ledger.records)} steps so far are kept: "
            f"put that right, then `zoft train --resume {ledger.path.parent}`"
        ) from error.__cause__


class Presence:
    """Looks now and then whether a run's ledger is still at its path: an open file hides that it was deleted.

    files: name -> text of what a run's folder needs beside the ledger (config.yaml).
    """

    def __init__(self, ledger: Ledger, files: Mapping[str, str]) -> None:
        self.ledger, self.files, self.looked = ledger, dict(files), time.monotonic()

    def look(self, now: bool = False) -> None:
        """Raise UserError if the folder was moved or deleted; a deleted ledger is put back first."""
        if not now and time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        path, fd = self.ledger.path, self.ledger.fileno()
        mine = os.fstat(fd)
        with suppress(OSError):
            if os.path.samestat(os.stat(path), mine):
                return
        steps = f"its {len(self.ledger.records)} steps"
        if mine.st_nlink:
            raise UserError(
                f"{path.parent}: the run's folder was moved while the run went on; {steps} went with it: "
                "`zoft train --resume` it where it is now"
            )
        data = os.pread(fd, mine.st_size, 0)
        try:
            place = self._put_back(path.parent, data)
        except UserError:
            place = self._put_back(Path(tempfile.mkdtemp(prefix="zoft-")), data)
        raise UserError(
            f"{path.parent}: the run's folder was deleted while the run went on; {steps} are put back: "
            f"`zoft train --resume {place}`"
        )

    def _put_back(self, folder: Path, data: bytes) -> Path:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            if not (folder / name).exists():
                write(folder / name, text)
        if os.path.lexists(folder / "ledger"):
            raise UserError(f"{folder}: another run's ledger is there")
        write(folder / "ledger", data)
        return folder
