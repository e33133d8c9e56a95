"""Messages between processes that know one secret: frames of JSON and bytes over TCP, each with a code of its own.

Both sides prove the secret before anything is read but 64 bytes; every frame carries 16 bytes of HMAC-SHA256 over its
direction, its number and its content, so that nothing can be put in, repeated or left out. Nothing is hidden: who can
listen can read losses and multipliers. Nothing that arrives is ever run: no pickle.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import threading

from zoft.errors import UserError

VERSION = 1  # of the messages between a run and its workers; another one is refused before anything is taken from it
LARGEST = 1 << 32  # bytes of a frame: a ledger of 2²⁷ records
HEAD = struct.Struct("<IQ")  # bytes of the JSON, bytes after it
CODE = 16
HANDSHAKE_SECONDS = 20.0


class Closed(Exception):
    """The other side is gone, or was never one of us."""


class Line:
    """One connection, made known to each other; `send` and `receive` may be used from different threads."""

    def __init__(self, connection: socket.socket, secret: bytes, serves: bool) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self.sent = self.received = 0  # bytes
        mine = os.urandom(32)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.sendall(mine)
            theirs = self._exactly(32)
            nonces = mine + theirs if serves else theirs + mine
            self._keys = {  # of what this side sends (True) and receives
                ours: hmac.digest(
                    secret, nonces + (b"server" if serves == ours else b"worker"), hashlib.sha256
                )
                for ours in (True, False)
            }
            connection.sendall(self._code(True, b"hello"))
            if not hmac.compare_digest(self._exactly(CODE), self._code(False, b"hello")):
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
        """One message. Raises Closed."""
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
        """The next message: (what `send` was given, data). Raises Closed."""
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

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.connection.recv(min(size, 1 << 20))
            if not part:
                raise Closed("the connection was closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def address(text: str) -> tuple[str, int]:
    """("host", port) of "host:port". Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"{text}: is no address; give HOST:PORT, such as 127.0.0.1:29555")
    return host.strip("[]"), int(port)
