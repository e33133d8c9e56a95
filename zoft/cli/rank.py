"""`zoft rank`: one local page where a person ranks the texts that a run waits for.

The server listens on the loopback address only. Its address holds a token, and requests under another path, host name or origin are
refused, so that no other page or user of the machine can read or answer. What is chosen is written at each click; an answer is
written whole and synced, under the name that the run reads.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from zoft.cli.rank_page import PAGE
from zoft.errors import UserError
from zoft.folder import write
from zoft.signals import way_on
from zoft.train.asked import checked, place_of, waiting

MOST = 1 << 22  # bytes of a request
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip


class RankServer(ThreadingHTTPServer):
    """Serve one question until it is answered.

    folder: the run's. name: of the question. answered: set once the answer is on the disk.
    """

    daemon_threads = True

    def __init__(self, folder: Path, name: str, port: int = 0) -> None:
        self.folder, self.name = folder, name
        self.token = secrets.token_urlsafe(24)
        self.question = json.loads(place_of(folder, name).read_text(encoding="utf-8"))
        self.step = self.question["step"]
        self.answered = threading.Event()
        self.lock = threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; leave it out for a free one") from None

    @property
    def address(self) -> str:
        """Return where the page is."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def state(self) -> dict[str, Any]:
        """Return what the page shows: the question and what was chosen so far, or that it is done."""
        if self.answered.is_set():
            return {"question": None, "done": "Done. The ranking is saved; this page may be closed."}
        draft = place_of(self.folder, self.name, "draft")
        kept = None
        if draft.exists():
            try:
                kept = self.read(draft.read_bytes())
            except UserError:  # an older question's, or damaged
                kept = None
        shown = {k: self.question[k] for k in ("step", "questions")}
        return {"question": shown, "draft": kept}

    def read(self, body: bytes) -> dict[str, Any]:
        """Return an answer as the page sends it, checked. Raises UserError."""
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            raise UserError("the page: no JSON") from None
        texts = [q["texts"] for q in self.question["questions"]]
        found = checked(tree, texts, "the page")
        at = tree.get("at", 0)
        if tree.get("step") != self.step or not isinstance(at, int) or not 0 <= at < len(texts):
            raise UserError("the page: is of another step; load it again")
        return {
            "step": self.step,
            "at": at,
            "rankings": [{"order": tiers, "unknown": unknown} for tiers, unknown in found],
        }

    def take(self, body: bytes, whole: bool) -> None:
        """Write a draft, or the answer. Raises UserError for what is neither."""
        found = self.read(body)
        with self.lock:
            if self.answered.is_set():
                raise UserError("the page: this step is answered already")
            write(place_of(self.folder, self.name, "draft"), json.dumps(found) + "\n")
            if whole:
                write(
                    place_of(self.folder, self.name, "answer"),
                    json.dumps({"rankings": found["rankings"]}) + "\n",
                )
                self.answered.set()


class Handler(BaseHTTPRequestHandler):
    server: RankServer
    server_version, sys_version = "zoft", ""

    def _path(self) -> str | None:
        """Return what is asked for below the token; None, and an answer was sent, where this is not the page."""
        hosts = {f"127.0.0.1:{self.server.server_port}", f"localhost:{self.server.server_port}"}
        origin = self.headers.get("Origin")
        _, _, rest = self.path.partition("/")
        token, _, what = rest.partition("/")
        mine = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        near = self.headers.get("Host") in hosts and (
            origin is None or origin.removeprefix("http://") in hosts
        )
        if mine and near:
            return what
        self._send(404, "text/plain", b"not here")
        return None

    def do_GET(self) -> None:
        what = self._path()
        if what == "":
            self._send(200, "text/html; charset=utf-8", PAGE.encode())
        elif what == "question":
            self._send(200, "application/json", json.dumps(self.server.state()).encode())
        elif what is not None:
            self._send(404, "text/plain", b"not here")

    def do_POST(self) -> None:
        what = self._path()
        if what is None:
            return
        length = self.headers.get("Content-Length", "")
        if what not in ("draft", "answer") or not length.isdigit() or int(length) > MOST:
            self.close_connection = True
            self._send(400, "text/plain", b"not understood")
            return
        try:
            self.server.take(self.rfile.read(int(length)), what == "answer")
        except UserError as error:
            self._send(400, "text/plain; charset=utf-8", str(error).encode())
            return
        self._send(200, "application/json", b"{}")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store", "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a line would hold the token."""


def rank_run(run: str, port: int, echo: Callable[[str], Any]) -> None:
    """Serve the page of the step that a run waits for, until it is answered; then say how the run goes on.

    Raises UserError where it waits for none.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{run}: not a run's folder (it has no config.yaml)")
    name = waiting(folder)
    if name is None:
        raise UserError(
            f"{run}: waits for no ranking; `{way_on(run)}` goes on (objective=rank rank_by=file asks)"
        )
    server = RankServer(folder, name, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    echo(f"step {server.step}: rank its texts at {server.address}")
    try:
        while not server.answered.wait(0.2):
            pass
        threading.Event().wait(1.0)  # the page asks once more, and says that it is done
    finally:
        server.shutdown()
        server.server_close()
    echo(f"step {server.step} is ranked; go on with `{way_on(run)}`")
