"""Guard and write the folder of a run while it goes on: what is done when it fills up or loses its permissions."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zoft.errors import UserError, writing

ASKED = "baseline.json"  # in its folder from the start: what was asked for


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
        if path.exists() and not path.is_file():  # a pipe, or a device such as /dev/stdout
            path.write_bytes(data)
            return
        try:
            draft.unlink(missing_ok=True)  # of a killed process; or a link, which would be written through
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise
