"""A reward that a server on this machine gives: `--reward http://127.0.0.1:8000/score`.

    POST {"rows": [{"prompt": …, and the row's columns}, …], "texts": ["…", …]}   ->   {"rewards": [0.5, …]}, or the list alone

Texts are sent in requests of at most TEXTS, up to AT_ONCE of them at a time; rewards come back in the order of the texts. A
request that cannot connect, is cut off, or is answered by 429 or 5xx is sent again, up to TRIES times. Only loopback addresses
are taken, so that no text leaves the machine.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from zoft.errors import UserError

TEXTS, AT_ONCE, TRIES = 64, 4, 4
WAIT = 0.25  # seconds before the second try; twice as long before each one after
MOST = 1 << 24  # bytes of an answer


def is_address(named: str) -> bool:
    """Say whether a reward is named by an address."""
    return "://" in named


@dataclass(frozen=True)
class Server:
    """Ask a server on this machine for rewards.

    host, port, path: of its address. seconds: what one request may take.
    """

    named: str
    host: str
    port: int
    path: str
    seconds: float

    def __call__(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Any]:
        """Return the server's answers, one per text, in order. Raises UserError where it gives none."""
        parts = [(rows[i : i + TEXTS], texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)]
        if len(parts) == 1:
            return self._asked(*parts[0])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [value for found in pool.map(lambda part: self._asked(*part), parts) for value in found]

    def _asked(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Any]:
        body = json.dumps({"rows": list(rows), "texts": list(texts)}, default=str).encode()
        why = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                status, data = self._posted(body)
            except TimeoutError:
                raise UserError(
                    f"reward {self.named}: no answer in reward_seconds={self.seconds:g} for {len(texts)} texts; make it faster, or "
                    "raise reward_seconds"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}{f': {error}' if str(error) else ''}"
                continue
            if status == 200:
                return self._read(data, len(texts))
            why = f"status {status}"
            if status != 429 and status < 500:
                break
        raise UserError(
            f"reward {self.named}: {why}, after {attempt + 1} tries; is the server up, and is this its path?"
        )

    def _posted(self, body: bytes) -> tuple[int, bytes]:
        link = http.client.HTTPConnection(self.host, self.port, timeout=self.seconds)
        try:
            link.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = link.getresponse()
            return answer.status, answer.read(MOST + 1)
        finally:
            link.close()

    def _read(self, data: bytes, count: int) -> list[Any]:
        try:
            found = json.loads(data) if len(data) <= MOST else None
        except (ValueError, RecursionError):
            found = None
        found = found.get("rewards") if isinstance(found, dict) else found
        if not isinstance(found, list) or len(found) != count:
            said = f"a list of {len(found)}" if isinstance(found, list) else "no list"
            raise UserError(
                f"reward {self.named}: answered {said} for {count} texts; it must be "
                '{"rewards": [one number per text]}'
            )
        return found


def server_of(named: str, seconds: float) -> Server:
    """Return the server at an address. Raises UserError for an address that is none, or is not on this machine."""
    try:
        parts = urlsplit(named)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError as error:
        raise UserError(f"reward={named}: {error}; give http://127.0.0.1:PORT/PATH") from None
    if parts.scheme != "http" or not host or parts.username or parts.password:
        raise UserError(f"reward={named}: no address of this kind; give http://127.0.0.1:PORT/PATH")
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near:
        raise UserError(
            f"reward={named}: {host} is another machine, and texts stay on this one; forward a port of it: http://127.0.0.1:PORT"
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Server(named, host, port, path, seconds)


def digest_of(named: str) -> str:
    """Return what a ledger's header says of a served reward: which address it had."""
    return f"served:{hashlib.blake2b(named.encode(), digest_size=8).hexdigest()}"
