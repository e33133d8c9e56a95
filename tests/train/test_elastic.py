"""Workers that die and workers that join: the run of one process to the bit, whatever happens."""

import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ranks
import torch

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.ledger.log import Record, read_ledger
from zoft.parallel.messages import PAIR, Closed, Line, address, packed, unpacked
from zoft.run.preflight import check_elastic

KEYS = ["q=2", "accumulate=2", "steps=100", "check_every=25"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = ranks.make_place(tmp_path_factory.mktemp("work"))
    assert ranks.zoft(folder, "output_dir=one", *KEYS) == [0]
    return folder


def slow(rank):
    """Steps that leave time for accidents: until the file `go` is there."""
    import time
    from pathlib import Path

    from zoft.train.trainer import Trainer

    plain = Trainer.sums_at

    def sums_at(self, *args):
        time.sleep(0.0 if Path("go").exists() else 0.25)
        return plain(self, *args)

    Trainer.sums_at = sums_at


def said(place, rank):
    return (place / f"said-{rank}").read_text()


def coordinator(place, name):
    (place / "go").unlink(missing_ok=True)
    process = ranks.start(
        place, ["train", "--config", "mine.yaml", *KEYS, f"output_dir={name}", "elastic=true"], hook=slow
    )
    ranks.until(lambda: (place / name / "join.json").exists() or process.exitcode is not None)
    return process


def same(place, name):
    return all(
        (place / name / f).read_bytes() == (place / "one" / f).read_bytes()
        for f in ("ledger", "model/model.safetensors")
    )


def test_one_worker_killed_another_joining(place):
    run = coordinator(place, "accident")
    mode = stat.S_IMODE((place / "accident" / "join.json").stat().st_mode)
    assert mode == 0o600  # the secret is in it
    first = ranks.start(place, ["join", "accident"], rank=1, hook=slow)
    second = ranks.start(place, ["join", "accident"], rank=2, hook=slow)
    ranks.until(lambda: said(place, 0).count(" joins, ") == 2)
    began = len(read_ledger(place / "accident" / "ledger").records)
    ranks.until(lambda: len(read_ledger(place / "accident" / "ledger").records) > began + 2)
    os.kill(first.pid, signal.SIGKILL)
    ranks.until(lambda: "is gone, 2 processes go on" in said(place, 0))
    late = ranks.start(place, ["join", "accident"], rank=3)
    ranks.until(lambda: said(place, 0).count(" joins, ") == 3)
    joined = int(re.findall(r"step (\d+): worker \S+ joins", said(place, 0))[-1])
    (place / "go").touch()
    assert 0 < began < joined < 100
    assert ranks.ended([run, second, late]) == [0, 0, 0], [said(place, r) for r in range(4)]
    assert same(place, "accident")
    digests = {re.search(r"weights(?: at the end)?: ([0-9a-f]{16})", said(place, r))[1] for r in (0, 2, 3)}
    assert len(digests) == 1
    shares = [int(re.search(r"(\d+) pairs were mine", said(place, r))[1]) for r in (2, 3)]
    assert all(shares)
    assert not (place / "accident" / "join.json").exists()


def test_the_coordinator_killed_is_a_run_to_resume_and_workers_say_so(place):
    run = coordinator(place, "headless")
    worker = ranks.start(place, ["join", "headless"], rank=1)
    ranks.until(lambda: " joins, " in said(place, 0))
    os.kill(run.pid, signal.SIGKILL)
    assert ranks.ended([worker]) == [75] and said(place, 1).splitlines()[-1] == "the coordinator is gone"
    (place / "go").touch()
    assert ranks.zoft(place, "--resume", "headless") == [0]
    assert same(place, "headless")


def flip(rank):
    """One bit of the worker's weights, in its first step; the highest of a significand: roundings make the lowest equal again."""
    from zoft.train.trainer import Trainer

    plain, done = Trainer.sums_at, []

    def sums_at(self, step, probes, batch):
        if not done:
            done.append(self.axis.trained[3].stored.view(torch.int16).flatten()[5].bitwise_xor_(64))
        return plain(self, step, probes, batch)

    Trainer.sums_at = sums_at


def test_a_worker_whose_weights_differ_stops_the_run(place):
    run = coordinator(place, "bent")
    worker = ranks.start(place, ["join", "bent"], rank=1, hook=flip)
    ranks.until(lambda: " joins, " in said(place, 0))
    (place / "go").touch()
    assert ranks.ended([run, worker])[0] == 2
    assert re.search(r"weights differ: [0-9a-f]{16} here, [0-9a-f]{16} on worker 127.0.0.1", said(place, 0))


def pair(secrets):
    """Both ends of a connection, or what became of them."""
    a, b = socket.socketpair(socket.AF_UNIX)
    server, port = socket.create_server(("127.0.0.1", 0)), None
    port = server.getsockname()[1]
    a.close(), b.close()
    ends: list = [None, None]

    def end(i, make):
        try:
            ends[i] = Line(make(), secrets[i], serves=i == 0)
        except Closed as error:
            ends[i] = error

    threads = [
        threading.Thread(target=end, args=(0, lambda: server.accept()[0])),
        threading.Thread(target=end, args=(1, lambda: socket.create_connection(("127.0.0.1", port)))),
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    server.close()
    return ends


def test_a_line_carries_what_was_sent_and_nothing_else():
    a, b = pair([b"s" * 32, b"s" * 32])
    a.send("step", b"\0\1", step=3, pairs=[[1, 2]])
    assert b.receive() == ({"kind": "step", "step": 3, "pairs": [[1, 2]]}, b"\0\1")
    b.send("x", lost=float("nan"))
    assert a.receive()[0]["kind"] == "x"
    a._count[True] += 1  # as if a message had been left out
    a.send("y")
    with pytest.raises(Closed, match="not theirs"):
        b.receive()
    a.close()
    with pytest.raises(Closed):
        b.receive()


def test_another_secret_is_refused_on_both_sides():
    assert all(isinstance(end, Closed) for end in pair([b"s" * 32, b"t" * 32]))


def test_records_travel_as_the_ledger_keeps_them():
    record = Record(7, (0.5, -0.25), 0.875, (1.0, 2.0, 3.0, float("inf")), True, 2.0**-20)
    assert unpacked(packed(record)) == record and len(packed(record)) == 13 + 24


@pytest.mark.parametrize(
    "key,value",
    [
        ("perturb", "inplace"),
        ("denoise_every", 5),
        ("probes_per_forward", 2),
        ("parallel", "data"),
        ("recipe", "mine.py"),
    ],
)
def test_what_elastic_runs_cannot_have(key, value):
    with pytest.raises(UserError, match=f"elastic=true.*{key}"):
        check_elastic(Config(elastic=True, **{key: value}))


def test_join_says_what_is_wrong(tmp_path):
    from zoft.cli.join import join_run

    for args, text in [
        (("nowhere", None), "no folder of a run"),
        ((str(tmp_path), None), "join.json"),
        (("127.0.0.1:1", str(tmp_path / "x")), "x: No such file"),
    ]:
        with pytest.raises(UserError, match=text):
            join_run(*args, False)
    (tmp_path / "join.json").write_text(json.dumps({"address": "127.0.0.1:1", "secret": "00"}))
    with pytest.raises(UserError, match="127.0.0.1:1: .*elastic=true"):
        join_run(str(tmp_path), None, False)
    with pytest.raises(UserError, match="no address"):
        address("here")


@pytest.mark.slow
def test_workers_as_ray_tasks(place):
    pytest.importorskip("ray", reason="ray is not installed")
    run = coordinator(place, "rays")
    script = str(Path(__file__).parents[2] / "scripts" / "ray_workers.py")
    tasks = subprocess.Popen(
        [sys.executable, script, "rays", "--workers", "2"], cwd=place, stdout=subprocess.PIPE, text=True
    )
    ranks.until(lambda: said(place, 0).count(" joins, ") == 2)
    (place / "go").touch()
    assert ranks.ended([run]) == [0] and same(place, "rays")
    assert tasks.communicate(timeout=60)[0].count("pairs were mine") == 2


def other_messages(rank):
    from zoft.cli import join

    join.VERSION = 99


def test_a_worker_of_another_zoft_is_told_so_in_a_line_and_the_run_goes_on(place):
    run = coordinator(place, "others")
    worker = ranks.start(place, ["join", "others"], rank=1, hook=other_messages)
    assert ranks.ended([worker]) == [2]
    (line,) = said(place, 1).splitlines()
    assert re.match(
        r"error: 127\S+: the run is of zoft \S+, and this one \(\S+\) sends other messages: join with", line
    )
    assert re.search(
        r"worker 127\S+ cannot join: it is of zoft \S+, which has another version of the messages",
        said(place, 0),
    )
    (place / "go").touch()
    assert ranks.ended([run]) == [0] and same(place, "others")


def test_keys_that_a_worker_does_not_have_are_named():
    import dataclasses

    from zoft.cli.join import _config

    tree = dataclasses.asdict(Config(model="m", lr=0.5))
    assert _config(tree) == Config(model="m", lr=0.5)
    with pytest.raises(UserError, match="warp: the run's config has what zoft .* does not know"):
        _config({**tree, "warp": 9})
    with pytest.raises(UserError, match="drive: the run's"):
        _config({**tree, "task": {**tree["task"], "drive": 1}})


def test_a_message_that_says_nothing_is_none():
    a, b = pair([b"s" * 32, b"s" * 32])
    for text in (b"[1, 2]", b'{"step": 1}'):
        body = struct.pack("<IQ", len(text), 0) + text
        a.connection.sendall(body + a._code(True, a._number(True) + body))
        with pytest.raises(Closed, match="says nothing"):
            b.receive()


def test_nobody_is_let_in_once_a_run_has_ended(tmp_path, capsys):
    from types import SimpleNamespace

    from zoft.train.elastic import ElasticTrainer

    run = ElasticTrainer.__new__(ElasticTrainer)
    run.ledger = SimpleNamespace(path=tmp_path / "ledger")
    run.open(Config(elastic=True))
    where = json.loads((tmp_path / "join.json").read_text())
    run.close("done")
    with pytest.raises(OSError):  # a connection that is taken would be one that nobody answers
        Line(
            socket.create_connection(address(where["address"]), timeout=5),
            bytes.fromhex(where["secret"]),
            False,
        )


def test_who_takes_over_for_a_worker_that_hangs_has_as_long_for_it(monkeypatch, capsys):
    """Three processes: one worker never answers; the other needs a while for its share, and again for the rest."""
    import time
    from types import SimpleNamespace

    from zoft.method.estimators.estimator import Probe
    from zoft.train import elastic

    monkeypatch.setattr(elastic, "PATIENCE", 2.0)
    run = elastic.ElasticTrainer.__new__(elastic.ElasticTrainer)
    run.events, run.workers, run.next = elastic.queue.Queue(), [], 0
    run.axis = SimpleNamespace(settle=lambda: None)
    run.value = lambda totals: totals[:, 0] / totals[:, 1]
    run.sums_at = lambda step, probes, batch: torch.tensor([[probes[0].scale, 2.0]], dtype=torch.float64)
    ends = [pair([b"s" * 32, b"s" * 32]) for _ in range(2)]

    def answer(line):
        try:
            while True:
                facts, _ = line.receive()
                time.sleep(1.5)
                data = b"".join(
                    PAIR.pack(p, b) + struct.pack("<2d", probes[p].scale, 2.0) for p, b in facts["pairs"]
                )
                line.send("pairs", data, step=facts["step"], columns=2)
        except Closed:
            pass

    for name, (here, _) in zip(("slow", "silent"), ends):
        run.workers.append(elastic.Worker(here, name))
        run.workers[-1].ready = True

    def listen(worker):
        try:
            while True:
                run.events.put((worker, *worker.line.receive()))
        except Closed:
            pass

    probes = [Probe(k, s) for k in range(4) for s in (1.0, -1.0)]
    for target, of in ((answer, ends[0][1]), (listen, run.workers[0])):
        threading.Thread(target=target, args=(of,), daemon=True).start()
    assert run.losses_at(0, probes, [None]) == [p.scale / 2 for p in probes]
    assert "worker silent does not answer, 2 processes go on" in capsys.readouterr().err
    assert [w.name for w in run.workers] == ["slow"]


def test_a_run_may_listen_on_ipv6(tmp_path):
    from types import SimpleNamespace

    from zoft.train.elastic import ElasticTrainer

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    run = ElasticTrainer.__new__(ElasticTrainer)
    run.ledger = SimpleNamespace(path=tmp_path / "ledger")
    run.open(Config(elastic=True, listen="[::1]:0"))
    found = json.loads((tmp_path / "join.json").read_text())
    line = Line(
        socket.create_connection(address(found["address"]), 5), bytes.fromhex(found["secret"]), serves=False
    )
    line.close()
    run.close("done")


@pytest.fixture
def listening(tmp_path, monkeypatch):
    """A coordinator that listens, and (address, secret) of it."""
    from types import SimpleNamespace

    from zoft.parallel import messages
    from zoft.train import elastic

    monkeypatch.setattr(messages, "HANDSHAKE_SECONDS", 1.5)
    monkeypatch.setattr(elastic, "STRANGERS", 8)
    run = elastic.ElasticTrainer.__new__(elastic.ElasticTrainer)
    run.ledger = SimpleNamespace(path=tmp_path / "ledger")
    run.open(Config(elastic=True))
    where = json.loads((tmp_path / "join.json").read_text())
    yield run, address(where["address"]), bytes.fromhex(where["secret"])
    run.close("done")


def test_strangers_are_few_at_a_time_and_have_no_time(listening):
    """140 connections that say nothing, or a byte now and then, take no descriptor for long; a worker gets in after them."""
    import os
    import time

    _, place, secret = listening
    before = len(os.listdir("/proc/self/fd"))
    idle = [socket.create_connection(place, timeout=5) for _ in range(140)]
    time.sleep(0.5)
    theirs = len(os.listdir("/proc/self/fd")) - before - len(idle)
    assert theirs <= 8
    until = time.monotonic() + 4
    while time.monotonic() < until:  # slow bytes buy no time
        for s in idle:
            try:
                s.sendall(b"x")
            except OSError:
                pass
        time.sleep(0.5)
    Line(socket.create_connection(place, timeout=5), secret, False).close()
    for s in idle:
        s.close()


@pytest.mark.parametrize(
    "kind, data, facts",
    [
        ("at", b"", {}), ("at", b"", {"step": "x"}), ("at", b"", {"step": -1}), ("refuses", b"", {}),
        ("pairs", b"", {"step": 0}), ("pairs", b"x" * 16, {"step": 0, "columns": -1}),
        ("pairs", b"x" * 9, {"step": 0, "columns": 2}), ("digest", b"", {"step": 0}), ("digest", b"", {"digest": "x"}),
    ],
)  # fmt: skip
def test_a_message_of_another_form_ends_its_own_connection(listening, kind, data, facts):
    run, place, secret = listening
    line = Line(socket.create_connection(place, timeout=5), secret, False)
    line.send(kind, data, **facts)
    assert run.events.get(timeout=5)[1] is None  # as of a worker that is gone


def test_pairs_that_were_not_asked_for_are_passed_over(listening):
    from types import SimpleNamespace

    from zoft.method.estimators.estimator import Probe

    run, place, secret = listening
    run.axis, run.next = SimpleNamespace(settle=lambda: None), 0
    run.value = lambda totals: totals[:, 0] / totals[:, 1]
    run.sums_at = lambda step, probes, batch: torch.tensor([[probes[0].scale, 2.0]], dtype=torch.float64)
    line = Line(socket.create_connection(place, timeout=5), secret, False)
    line.send("at", step=0)
    worker = run.events.get(timeout=5)[0]
    worker.ready = True
    run.workers.append(worker)

    def answer():
        facts, _ = line.receive()
        wrong = PAIR.pack(9, 9) + struct.pack("<2d", 1e9, 1) + PAIR.pack(0, 0) + struct.pack("<2d", 1e9, 1)
        line.send("pairs", wrong, step=0, columns=2)
        line.send("pairs", PAIR.pack(*facts["pairs"][0]) + struct.pack("<3d", 1e9, 1, 1), step=0, columns=3)
        good = b"".join(PAIR.pack(p, b) + struct.pack("<2d", probes[p].scale, 2.0) for p, b in facts["pairs"])
        line.send("pairs", good, step=0, columns=2)

    probes = [Probe(k, s) for k in range(2) for s in (1.0, -1.0)]
    threading.Thread(target=answer, daemon=True).start()
    assert run.losses_at(0, probes, [None]) == [p.scale / 2 for p in probes]
