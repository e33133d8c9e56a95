"""Rewards from a real server on this machine: order, retries, timeouts, answers of every wrong kind."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from zoft.errors import UserError
from zoft.objectives import served
from zoft.objectives.reward import check_reward, load

ROWS = [{"prompt": f"p{i}", "n": i} for i in range(150)]
TEXTS = [f"text {i}" for i in range(150)]
WHERE = [f"f:{i}" for i in range(150)]


@pytest.fixture
def server():
    """Serve `answer(body, call) -> (status, bytes)`, to be set by a test."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with owner.lock:
                owner.calls += 1
                call = owner.calls
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = owner.answer(body, call)
            if status == 0:  # cut off
                self.connection.close()
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    owner = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    owner.calls, owner.lock = 0, threading.Lock()
    thread = threading.Thread(target=owner.serve_forever, daemon=True)
    thread.start()
    owner.url = f"http://127.0.0.1:{owner.server_port}/score"
    yield owner
    owner.shutdown()
    owner.server_close()


def lengths(body, call):
    return 200, json.dumps(
        {"rewards": [r["n"] + len(t) / 100 for r, t in zip(body["rows"], body["texts"])]}
    ).encode()


def test_rewards_keep_the_order_of_the_texts(server):
    def slow_first(body, call):
        time.sleep(0.2 if body["rows"][0]["n"] == 0 else 0)
        return lengths(body, call)

    server.answer = slow_first
    found = load(server.url, 5.0)(ROWS, TEXTS, WHERE)
    assert found == [i + len(t) / 100 for i, t in enumerate(TEXTS)] and server.calls == 3
    server.answer = lambda body, call: (200, json.dumps([0.5] * len(body["texts"])).encode())
    assert load(server.url, 5.0)(ROWS[:2], TEXTS[:2], WHERE[:2]) == [0.5, 0.5]


@pytest.mark.parametrize("first", [500, 503, 429, 0])
def test_what_may_pass_is_tried_again(server, first, monkeypatch):
    monkeypatch.setattr(served, "WAIT", 0.01)
    server.answer = lambda body, call: (first, b"") if call < 3 else lengths(body, call)
    assert load(server.url, 5.0)(ROWS[:1], TEXTS[:1], WHERE[:1]) == [0.06] and server.calls == 3


@pytest.mark.parametrize(
    "answer, said, calls",
    [
        ((500, b""), "status 500, after 4 tries", 4),
        ((404, b""), "status 404, after 1 tries; is the server up, and is this its path", 1),
        ((200, b"{"), "answered no list for 2 texts", 1),
        ((200, b"[" * 100000), "answered no list for 2 texts", 1),
        ((200, b'{"rewards": [1]}'), "answered a list of 1 for 2 texts", 1),
        ((200, b'{"rewards": [1, null]}'), "None is no finite number, for f:1", 1),
        ((200, b'{"rewards": [1, "2"]}'), "'2' is no finite number, for f:1", 1),
        ((200, b'{"rewards": [1, NaN]}'), "nan is no finite number, for f:1", 1),
    ],
)
def test_what_goes_wrong_is_one_line(server, answer, said, calls, monkeypatch):
    monkeypatch.setattr(served, "WAIT", 0.01)
    server.answer = lambda body, call: answer
    with pytest.raises(UserError, match=said) as error:
        load(server.url, 5.0)(ROWS[:2], TEXTS[:2], WHERE[:2])
    assert "\n" not in str(error.value) and server.calls == calls


def test_a_server_that_is_slow_or_gone(server, monkeypatch):
    monkeypatch.setattr(served, "WAIT", 0.01)
    server.answer = lambda body, call: time.sleep(2) or (200, b"[1]")
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer in reward_seconds=0.3 for 1 texts"):
        load(server.url, 0.3)(ROWS[:1], TEXTS[:1], WHERE[:1])
    assert time.monotonic() - began < 1.5
    with pytest.raises(UserError, match="ConnectionRefusedError.*after 4 tries; is the server up"):
        load("http://127.0.0.1:9/", 1.0)(ROWS[:1], TEXTS[:1], WHERE[:1])


@pytest.mark.parametrize(
    "named, said",
    [
        ("http://example.com/score", "example.com is another machine"),
        ("http://10.0.0.1:80", "10.0.0.1 is another machine"),
        ("http://127.0.0.1.example.com", "is another machine"),
        ("https://127.0.0.1", "no address of this kind"),
        ("file:///etc/passwd", "no address of this kind"),
        ("http://a:b@127.0.0.1", "no address of this kind"),
        ("http://127.0.0.1:99999", "out of range"),
        ("http://[::1", "Invalid IPv6 URL"),
    ],
)
def test_addresses_of_other_machines_and_kinds_are_refused(named, said):
    with pytest.raises(UserError, match=said):
        check_reward(named)
    check_reward("http://localhost:8000/x?y=1")
    check_reward("http://[::1]:8000")
