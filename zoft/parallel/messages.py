"""Messages between processes that know one secret: frames of JSON and bytes over TCP, each with a code of its own.

Both sides prove the secret before anything is read but 64 bytes; every frame carries 16 bytes of HMAC-SHA256 over its
direction, its number and its content, so that nothing can be put in, repeated or left out. Nothing is hidden: who can
listen can read losses and multipliers. Nothing that arrives is ever run: no pickle. An elastic run's invitation, and the
bytes of its steps and pairs, are written and read here too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from zoft.errors import UserError, writing
from zoft.ledger.format import Record

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # of the messages between a run and its workers; another one is refused before anything is taken from it
LARGEST = 1 << 32  # bytes of a frame: a ledger of 2²⁷ records
HEAD = struct.Struct("<IQ")  # bytes of the JSON, bytes after it
CODE = 16
HANDSHAKE_SECONDS = 20.0  # for both proofs together


class Closed(Exception):
    """Signal that the other side is gone, or does not belong to the run."""


class Line:
    """Hold one authenticated connection; `send` and `receive` may be used from different threads."""

    def __init__(self, connection: socket.socket, secret: bytes, serves: bool) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self.sent = self.received = 0  # bytes
        mine = os.urandom(32)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            until = time.monotonic() + HANDSHAKE_SECONDS
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.sendall(mine)
            theirs = self._exactly(32, until)
            nonces = mine + theirs if serves else theirs + mine
            self._keys = {  # of what this side sends (True) and receives
                ours: hmac.digest(
                    secret, nonces + (b"server" if serves == ours else b"worker"), hashlib.sha256
                )
                for ours in (True, False)
            }
            connection.sendall(self._code(True, b"hello"))
            if not hmac.compare_digest(self._exactly(CODE, until), self._code(False, b"hello")):
                raise Closed("another secret")
        except OSError as error:
            connection.close()
            raise Closed(str(error)) from error
        except Closed:
            connection.close()
            raise
        self._count = {True: 0, False: 0}
        connection.settimeout(None)
        # One that does not read does not hold up the others for ever.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))

    def send(self, kind: str, data: bytes = b"", **facts: object) -> None:
        """Send one message. Raises Closed."""
        text = json.dumps({"kind": kind, **facts}).encode()
        body = HEAD.pack(len(text), len(data)) + text + data
        try:
            with self._lock:
                frame = body + self._code(True, self._number(True) + body)
                self.connection.sendall(frame)
                self.sent += len(frame)
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self) -> tuple[dict, bytes]:
        """Return the next message: (what `send` was given, data). Raises Closed."""
        try:
            head = self._exactly(HEAD.size)
            text, data = HEAD.unpack(head)
            if text + data > LARGEST:
                raise Closed(f"a message of {text + data} bytes")
            rest = self._exactly(text + data)
            code = self._exactly(CODE)
        except OSError as error:
            raise Closed(str(error)) from error
        if not hmac.compare_digest(code, self._code(False, self._number(False) + head + rest)):
            raise Closed("a message that is not theirs")
        self.received += HEAD.size + len(rest) + CODE
        facts = json.loads(rest[:text])
        if not isinstance(facts, dict) or not isinstance(facts.get("kind"), str):
            raise Closed("a message that says nothing")
        return facts, rest[text:]

    def close(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.connection.close()

    def _number(self, ours: bool) -> bytes:
        self._count[ours] += 1
        return self._count[ours].to_bytes(8, "little")

    def _code(self, ours: bool, content: bytes) -> bytes:
        return hmac.digest(self._keys[ours], content, hashlib.sha256)[:CODE]

    def _exactly(self, size: int, until: float | None = None) -> bytes:
        parts = []
        while size:
            if until is not None:  # however slowly its bytes come
                self.connection.settimeout(max(1e-3, until - time.monotonic()))
            part = self.connection.recv(min(size, 1 << 20))
            if not part:
                raise Closed("the connection was closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def address(text: str) -> tuple[str, int]:
    """Return ("host", port) of "host:port". Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"{text}: is no address; give HOST:PORT, such as 127.0.0.1:29555")
    return host.strip("[]"), int(port)


JOIN = "join.json"  # in the run's folder: where workers connect, and the secret
PAIR = struct.Struct("<II")  # probe, batch; then come the pair's K totals, fp64 (K = 2: loss sum, count)


def invite(folder: Path, where: str, secret: bytes) -> Path:
    """Write the invitation to connect to where (HOST:PORT), for its owner alone; returns its path. Raises UserError."""
    path = folder / JOIN
    draft = path.with_name(f".{JOIN}.new")
    with writing(path):
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps({"address": where, "secret": secret.hex()}) + "\n")
        draft.replace(path)
    return path


def invitation(place: str, secret_file: str | None) -> tuple[str, bytes]:
    """Return HOST:PORT and secret of the run in folder `place`, or of HOST:PORT with a copy of its join.json. Raises UserError."""
    path = Path(secret_file) if secret_file else Path(place) / JOIN
    if not secret_file and not Path(place).is_dir():
        raise UserError(
            f"{place}: no folder of a run; for HOST:PORT give --secret FILE, a copy of its {JOIN}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        secret = bytes.fromhex(found["secret"])
        return (place if secret_file else found["address"]), secret
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "strerror", None) or "damaged"
        raise UserError(f"{path}: {why}; a run with elastic=true writes it while it goes on") from None


def packed_pair(probe: int, batch: int, totals: Tensor) -> bytes:
    """Return a pair that a worker answers; totals fp64 [K]."""
    return PAIR.pack(probe, batch) + totals.numpy().tobytes()


def pairs_of(data: bytes, columns: int) -> list[tuple[int, int, Tensor]]:
    """Return (probe, batch, totals fp64 [K]) of each pair that a worker answers."""
    import torch

    size = PAIR.size + 8 * columns
    assert len(data) % size == 0, (len(data), columns)
    return [
        (
            *PAIR.unpack_from(data, at),
            torch.frombuffer(bytearray(data[at + PAIR.size : at + size]), dtype=torch.float64),
        )
        for at in range(0, len(data), size)
    ]


def packed(record: Record) -> bytes:
    """Return a step as the ledger keeps it, all fp32 bits: 13 bytes and 12 per direction."""
    q = len(record.multipliers)
    floats = (record.decay, record.lr, *record.multipliers, *record.losses)
    return struct.pack(f"<IB{2 + 3 * q}f", record.step, record.skipped, *floats)


def unpacked(data: bytes) -> Record:
    """Return the step that `packed` made these bytes of."""
    q = (len(data) - 13) // 12
    step, skipped, decay, lr, *rest = struct.unpack(f"<IB{2 + 3 * q}f", data)
    return Record(step, tuple(rest[:q]), decay, tuple(rest[q:]), bool(skipped), lr)
