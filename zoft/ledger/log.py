"""The append-only log that is the run: a header, then 32 bytes a direction a step or an event (docs/ledger.md)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, final

from zoft.errors import UserError
from zoft.ledger.format import EVENTS, Event, Log, Record, decode, encode, encode_event, encode_header
from zoft.noise.spec import Update

__all__ = ["Event", "Ledger", "Log", "Record", "read_ledger", "update_of", "updates_of"]

PIECE = 1 << 26  # bytes read at a time


def read_ledger(path: str | os.PathLike) -> Log:
    """Return header, whole steps and events of a ledger, also one in use; the file stays as it is.

    Raises UserError that names the byte offset of any damage.
    """
    _refuse_devices(Path(path))
    return decode(ledger_bytes(path), path)[0]


def ledger_bytes(path: str | os.PathLike) -> bytes:
    """Return what `decode` needs of a ledger's file. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return _up_to_zeros(file)
    except OSError as error:
        raise UserError(f"ledger: cannot read {path}: {error.strerror}") from error


def _up_to_zeros(file: IO[bytes]) -> bytes:
    """Return a file's bytes up to the end of the first piece of zeros alone: a sparse file may say that it has any number."""
    pieces = []
    while piece := file.read(PIECE):
        pieces.append(piece)
        if piece.count(0) == len(piece):  # no record is, so that `decode` never gets further
            break
    return b"".join(pieces)


def updates_of(header: dict, records: Sequence[Record]) -> list[Update]:
    """Return the weight updates of `records`, in order; skipped steps give none. Raises UserError without a seed."""
    seed = header.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(
            f"ledger: seed={seed!r} in its header is no whole number: its noise cannot be made again"
        )
    return [update_of(r, seed) for r in records if not r.skipped]


def update_of(record: Record, seed: int) -> Update:
    """Return the weight update of a step that was not skipped."""
    return Update(record.step, seed, record.multipliers, record.decay, lr=record.lr)


@final
class Ledger:
    """Append to a ledger that belongs to this process alone; made by `Ledger.create` or `Ledger.open`."""

    def __init__(self, fd: int, path: Path, log: Log, size: int, crc: int, sync: int | str):
        self.path, self._policy, self._synced = path, sync, time.monotonic()
        self.header, self.records, self.events = log
        self._fd, self._size, self._crc = fd, size, crc

    @staticmethod
    def create(path: str | os.PathLike, header: dict, sync: int | str = "end") -> Ledger:
        """Start a ledger; the header is on disk, whole, when its name appears.

        header: strict JSON ("format" is added; `updates` needs "seed"). sync: when what is appended is forced to
        the disk: "end" (by `sync` and `close` alone), "step" (each time), or at most so many seconds late.
        Raises UserError if the file exists.
        """
        path = Path(path)
        head, crc = encode_header(header)
        _refuse_existing(path)

        # Locked, written and synced under another name first: a crash in here leaves no ledger at all, and of
        # two creators the second meets the lock or the finished file.
        draft = path.with_name(path.name + ".new")
        fd = _open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)  # a link there would be written through
        try:
            _lock(fd, path)
            _refuse_existing(path)  # again: now nobody else can make it
            os.ftruncate(fd, 0)
            size = _write(fd, head, 0)
            os.fsync(fd)
            os.rename(draft, path)
            sync_folder(path.parent)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise UserError(f"ledger: cannot write {path}: {error.strerror}") from error
            raise
        return Ledger(fd, path, decode(head, path)[0], size, crc, sync)

    @staticmethod
    def open(path: str | os.PathLike, sync: int | str = "end") -> Ledger:
        """Open a ledger to append to it: all of it is checked, an incomplete last step is cut off the file.

        Raises UserError if it is missing, damaged (with the byte offset) or being written by a process.
        """
        path = Path(path)
        _refuse_devices(path)
        fd = _open(path, os.O_RDWR)
        try:
            _lock(fd, path)
            with open(fd, "rb", closefd=False) as file:
                data = _up_to_zeros(file)
            log, size, crc = decode(data, path)
            if size < len(data):
                os.ftruncate(fd, size)
                os.fsync(fd)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise UserError(f"ledger: cannot open {path}: {error.strerror}") from error
            raise
        return Ledger(fd, path, log, size, crc, sync)

    @property
    def last_step(self) -> int:
        """Return the last step written; -1 before the first."""
        return len(self.records) - 1

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._fd

    def append(self, record: Record) -> None:
        """Write one step in one system call: once back, a kill -9 does not lose it (a power cut: see `create`).

        Multipliers and decay must be fp32 values, finite unless skipped; losses and lr are rounded to fp32.
        Raises UserError if it cannot be written; the file then ends with the last whole step.
        """
        assert self._fd >= 0, f"append to {self.path}, which is closed"
        assert record.step == self.last_step + 1, f"step {record.step} after step {self.last_step}"
        data, crc, kept = encode(record, self._crc)
        self._extend(data, crc, f"step {record.step}")
        self.records.append(kept)

    def note(self, event: Event) -> None:
        """Write an event, as `append` writes a step; events of one step go in the order of EVENTS, each once."""
        assert self._fd >= 0, f"note in {self.path}, which is closed"
        done = len(self.records)
        assert event.step == done, f"{event.kind} at step {event.step}, after {done} steps"
        here = [e.kind for e in self.events if e.step == done]
        assert all(EVENTS[kind] < EVENTS[event.kind] for kind in here), (
            f"step {done}: {event.kind} after {here}"
        )
        self._extend(*encode_event(event, self._crc), f"the {event.kind} at step {done}")
        self.events.append(event)

    def check_size(self) -> None:
        """Raise UserError where another process has cut the file, or written to it, since this one last did."""
        found = os.fstat(self._fd).st_size
        if found != self._size:
            raise UserError(
                f"ledger: another program changed {self.path} while the run went on: it has {found:,} bytes in place of "
                f"{self._size:,}; resume the run, which goes on after the last whole step"
            )

    def _extend(self, data: bytes, crc: int, what: str) -> None:
        self.check_size()
        try:
            size = _write(self._fd, data, self._size)
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the next open drops the tail
                os.ftruncate(self._fd, self._size)
            raise UserError(f"ledger: cannot write {what} to {self.path}: {error.strerror}") from error
        self._size, self._crc = size, crc
        if self._policy == "step" or (
            self._policy != "end" and time.monotonic() - self._synced >= float(self._policy)
        ):
            self.sync()

    def sync(self) -> None:
        """Wait until all steps are on the disk (before anything durable that depends on them is written)."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise UserError(f"ledger: cannot write {self.path}: {error.strerror}") from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, close and let go of the lock; a second call does nothing."""
        if self._fd < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"ledger: {path} exists: resume that run, or choose another name")


def _refuse_devices(path: Path) -> None:
    """A link to /dev/zero has no end, a pipe no beginning."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"ledger: {path} is no file, but a device, a pipe or a socket")


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"ledger: cannot open {path}: {error.strerror}") from error


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"ledger: another process is writing this run ({path}): wait for it, or stop it"
        raise UserError(message) from None
    except OSError as error:  # some cluster file systems have no locks
        warnings.warn(f"{path}: no lock ({error.strerror}); let one process write it", stacklevel=3)


def _write(fd: int, data: bytes, at: int) -> int:
    """Write at byte `at`, in one call unless the system takes less; gives the byte after. Raises OSError."""
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done
    return at


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last through a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
