"""`elastic: true`: workers come and go while a run goes on; a step's (probe, batch) pairs are dealt out to who is there.

The process that trains is the coordinator, and evaluates pairs itself. A worker that joins gets the config and the ledger,
never a weight: it loads the base, replays the ledger while the others work, and takes part from a step's beginning. Each
pair is one forward of one whole batch at one probe, whoever runs it, and sums are added up in the order of pairs: the run
has the bits of one process with probes_per_forward=1, whatever happens to its workers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from zoft import __version__, distributed, noise, processes
from zoft.config import GENERATED, Config, Task
from zoft.errors import UserError, writing
from zoft.ledger import Record
from zoft.ledger_format import decode
from zoft.objective import Batch
from zoft.probe import Probe
from zoft.stop import Stopped
from zoft.trainer import Trainer
from zoft.wire import VERSION, Closed, Line, address

JOIN = "join.json"  # in the run's folder: where workers connect, and the secret
LAG = 8  # steps that a worker may lack when it is given its first pairs
PATIENCE = 60.0  # seconds that the others may take longer than the coordinator's own share, at least
PAIR = struct.Struct("<II")  # probe, batch; then come the pair's K totals, fp64 (K = 2: loss sum, count)


class Worker:
    """The coordinator's view of one worker: its line, and the pairs of this step that it owes."""

    def __init__(self, line: Line, name: str) -> None:
        self.line, self.name = line, name
        self.ready = False
        self.owes: set[tuple[int, int]] = set()


class ElasticTrainer(Trainer):
    """A Trainer, the coordinator, whose losses come from whoever is there."""

    check_every = 0
    closed = False

    def open(self, config: Config) -> None:
        """Listen for workers."""
        assert self.ledger is not None
        processes.with_parent()
        self.config, self.check_every = config, config.check_every
        self.folder = self.ledger.path.parent
        self.secret = secrets.token_bytes(32)
        self.events: queue.Queue[tuple[Worker, dict | None, bytes]] = queue.Queue()
        self.workers: list[Worker] = []
        host, port = address(config.listen)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self.server = socket.create_server((host, port), family=family)
        except OSError as error:
            raise UserError(f"listen={config.listen}: {error.strerror}; choose another address") from None
        where = f"{host}:{self.server.getsockname()[1]}"
        path = self.folder / JOIN
        draft = path.with_name(f".{JOIN}.new")
        with writing(path):
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(json.dumps({"address": where, "secret": self.secret.hex()}) + "\n")
            draft.replace(path)
        print(
            f"workers may join: `zoft join {self.folder}`, or `zoft join {where}` with {path}",
            file=sys.stderr,
        )
        threading.Thread(target=self._welcome, daemon=True).start()

    def _welcome(self) -> None:
        while True:
            try:
                connection, (host, port, *_) = self.server.accept()
            except OSError:
                if self.server.fileno() < 0 or self.closed:
                    return
                time.sleep(0.1)  # one that went away while it waited, or no descriptors left for now
                continue
            threading.Thread(target=self._listen, args=(connection, f"{host}:{port}"), daemon=True).start()

    def _listen(self, connection: socket.socket, name: str) -> None:
        try:
            worker = Worker(Line(connection, self.secret, serves=True), name)
        except Closed:
            return  # a stranger
        try:
            while True:
                facts, data = worker.line.receive()
                self.events.put((worker, facts, data))
        except (Closed, ValueError):
            self.events.put((worker, None, b""))

    def losses_at(self, step: int, probes: Sequence[Probe], batches: Sequence[Batch]) -> list[float]:
        """Mean loss at each probe, [len(probes)]: pairs dealt out, and again where a worker is lost."""
        while not self.events.empty():
            self._take(*self.events.get())
        found: dict[tuple[int, int], torch.Tensor] = {}  # [K] of each pair
        todo = [(p, b) for p in range(len(probes)) for b in range(len(batches))]
        own = 0.0  # seconds of this process's share
        while len(found) < len(probes) * len(batches):
            mine = self._deal(step, todo)
            todo = []
            # From each deal anew: who takes over what another one owed has as long for it.
            began = start = time.monotonic()
            for p, b in mine:
                with torch.no_grad():
                    found[p, b] = self.sums_at(step, [probes[p]], batches[b])[0]
            own += time.monotonic() - start
            while not todo and any(w.owes for w in self.workers):
                late = time.monotonic() - began > PATIENCE + 20 * own
                try:
                    worker, facts, data = self.events.get(timeout=1.0)
                except queue.Empty:
                    if late:
                        for w in [w for w in self.workers if w.owes]:
                            todo += self._lose(w, "does not answer")
                    continue
                if facts is not None and facts["kind"] == "pairs" and facts["step"] == step:
                    for p, b, totals in pairs_of(data, facts["columns"]):
                        worker.owes.discard((p, b))
                        found[p, b] = totals
                else:
                    todo += self._take(worker, facts, data)
        self.axis.settle()
        # In the order that one process adds them up in.
        rows = [reduce(torch.add, [found[p, b] for b in range(len(batches))]) for p in range(len(probes))]
        return self.value(torch.stack(rows)).tolist()

    def _deal(self, step: int, todo: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Send each worker its pairs; returns this process's."""
        there = [w for w in self.workers if w.ready]
        shares: list[list[tuple[int, int]]] = [todo[i :: len(there) + 1] for i in range(len(there) + 1)]
        mine = shares[0]
        for worker, share in zip(there, shares[1:]):
            if not share:
                continue
            worker.owes |= set(share)
            try:
                worker.line.send("step", step=step, pairs=share)
            except Closed as error:
                mine = mine + self._lose(worker, str(error))
        return mine

    def _take(self, worker: Worker, facts: dict | None, data: bytes) -> list[tuple[int, int]]:
        """Whatever a worker says that is no loss; returns the pairs that nobody owes any more."""
        assert self.ledger is not None
        if facts is None:
            return self._lose(worker, "is gone")
        if facts["kind"] == "hello" and worker not in self.workers:
            if facts.get("wire") != VERSION:
                self._say(
                    f"worker {worker.name} cannot join: it is of zoft {facts.get('zoft')}, which sends other messages"
                )
                with suppress(Closed):
                    worker.line.send("refused", wire=VERSION, zoft=__version__)
                return []
            self.workers.append(worker)
            whole = self.ledger.path.read_bytes()
            try:
                tree = dataclasses.asdict(self.config)
                worker.line.send("run", whole, config=tree, name=worker.name, wire=VERSION, zoft=__version__)
            except Closed as error:
                return self._lose(worker, str(error))
        elif facts["kind"] == "at" and worker in self.workers and not worker.ready:
            if facts["step"] >= self.next - LAG:
                worker.ready = True
                self._say(f"step {self.next}: worker {worker.name} joins, {self._count()} processes")
        elif facts["kind"] == "refuses":
            self._say(f"worker {worker.name} cannot join: {facts['why']}")
        return []

    def _lose(self, worker: Worker, why: str) -> list[tuple[int, int]]:
        if worker not in self.workers:
            return []
        self.workers.remove(worker)
        worker.line.close()
        if worker.ready:
            self._say(f"step {self.next}: worker {worker.name} {why}, {self._count()} processes go on")
        return sorted(worker.owes)

    def _count(self) -> int:
        return 1 + sum(w.ready for w in self.workers)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def write_down(self, record: Record) -> dict[str, Any]:
        metrics = super().write_down(record)
        assert self.ledger is not None
        data = packed(self.ledger.records[-1])
        self._tell("commit", data, step=record.step)
        if self.check_every and (record.step + 1) % self.check_every == 0:
            self._check_next = True
        return metrics

    _check_next = False

    def step(self) -> dict[str, Any] | None:
        metrics = super().step()
        if self._check_next:
            self._check_next = False
            self.check()
        return metrics

    def _tell(self, kind: str, data: bytes = b"", **facts: Any) -> None:
        for worker in list(self.workers):
            try:
                worker.line.send(kind, data, **facts)
            except Closed as error:
                self._lose(worker, str(error))

    def check(self) -> None:
        """Raise UserError where a worker's weights are not these."""
        self.axis.flush()
        mine = distributed.digest(self.axis.trained)
        asked = [w for w in self.workers if w.ready]
        self._tell("check", step=self.next)
        deadline = time.monotonic() + PATIENCE
        while asked and time.monotonic() < deadline:
            try:
                worker, facts, data = self.events.get(timeout=1.0)
            except queue.Empty:
                continue
            if facts is not None and facts["kind"] == "digest":
                if (
                    facts["step"] != self.next
                ):  # of an earlier check, from a worker that was still loading then
                    continue
                asked = [w for w in asked if w is not worker]
                if facts["digest"] != mine:
                    raise UserError(
                        f"step {self.next}: weights differ: {mine} here, {facts['digest']} on worker {worker.name}; steps since "
                        "the last check are not to be trusted: start again"
                    )
            else:
                self._take(worker, facts, data)
                asked = [w for w in asked if w in self.workers]
        for worker in asked:
            self._lose(worker, "does not answer")

    def run(
        self, on_step: Callable[[dict[str, Any]], None] = lambda metrics: None, until: int | None = None
    ) -> None:
        try:
            super().run(on_step, until)
        except BaseException:
            self.close("stopped")
            raise

    def end(self) -> None:
        try:
            self.check()
        except BaseException:
            self.close("stopped")
            raise
        self._say(f"weights at the end: {distributed.digest(self.axis.trained)}")
        self.close("done")

    def close(self, why: str) -> None:
        """Send the workers home."""
        self._tell("bye", why=why)
        self.closed = True
        with suppress(
            OSError
        ):  # else the thread that waits in `accept` lets one more in, whom nobody answers
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        deadline = (
            time.monotonic() + 5.0
        )  # a connection that is torn down may take with it what was not read yet
        while self.workers and time.monotonic() < deadline:
            try:
                worker, facts, _ = self.events.get(timeout=0.2)
            except queue.Empty:
                continue
            if facts is None and worker in self.workers:
                self.workers.remove(worker)
        (self.folder / JOIN).unlink(missing_ok=True)


def pairs_of(data: bytes, columns: int) -> list[tuple[int, int, torch.Tensor]]:
    """(probe, batch, totals fp64 [K]) of each pair that a worker answers."""
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
    """A step as the ledger keeps it, all fp32 bits: 13 bytes and 12 a direction."""
    q = len(record.multipliers)
    floats = (record.decay, record.lr, *record.multipliers, *record.losses)
    return struct.pack(f"<IB{2 + 3 * q}f", record.step, record.skipped, *floats)


def unpacked(data: bytes) -> Record:
    q = (len(data) - 13) // 12
    step, skipped, decay, lr, *rest = struct.unpack(f"<IB{2 + 3 * q}f", data)
    return Record(step, tuple(rest[:q]), decay, tuple(rest[q:]), bool(skipped), lr)


def work(place: str, secret_file: str | None, trust_remote_code: bool) -> str:
    """Take part in a run until it ends; returns a line about it. Raises UserError where it cannot, Stopped where it broke off.

    place: the run's folder, or HOST:PORT with secret_file, a copy of the run's join.json.
    """
    processes.with_parent()
    where, secret = _invitation(place, secret_file)
    try:
        line = Line(socket.create_connection(address(where), timeout=20), secret, serves=False)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}; is the run there, with elastic=true?") from None
    except Closed as error:
        raise UserError(f"{where}: refused ({error}): take join.json from the run as it is now") from None
    with suppress(Closed):
        line.send("hello", zoft=__version__, wire=VERSION)
    inbox: queue.Queue[tuple[dict | None, bytes]] = queue.Queue()

    def read() -> (
        None
    ):  # while weights load and the ledger is replayed, too: nobody waits to be rid of a message
        try:
            while True:
                inbox.put(line.receive())
        except (Closed, ValueError):
            inbox.put((None, b""))

    threading.Thread(target=read, daemon=True).start()
    facts, data = inbox.get()
    if facts is None:
        raise Stopped(0, "", "the coordinator is gone")
    if facts.get("wire") != VERSION or facts["kind"] != "run":
        raise UserError(
            f"{where}: the run is of zoft {facts.get('zoft', 'before 0.1')}, and this one ({__version__}) sends other "
            "messages: join with the zoft that the run has"
        )
    try:
        trainer = _built(facts["config"], data, trust_remote_code)
    except UserError as error:
        with suppress(Closed):
            line.send("refuses", why=str(error))
        raise
    return _serve(trainer, line, inbox)


def _serve(trainer: Trainer, line: Line, inbox: queue.Queue[tuple[dict | None, bytes]]) -> str:
    """Answer until the run ends."""
    probes = [Probe(k, s * trainer.settings.eps) for k in range(trainer.settings.q) for s in (1.0, -1.0)]
    joined, pairs = False, 0
    with suppress(Closed):  # the run may have ended meanwhile: the inbox says so
        line.send("at", step=trainer.next)
    while True:
        facts, data = inbox.get()
        if facts is None:
            raise Stopped(0, "", "the coordinator is gone")
        try:
            if facts["kind"] == "step":
                joined, t = True, facts["step"]
                assert t == trainer.next, (t, trainer.next)
                batches, answer = trainer.batches(t), b""
                for p, b in facts["pairs"]:
                    with torch.no_grad():
                        totals = trainer.sums_at(t, [probes[p]], batches[b])[0]
                    answer += PAIR.pack(p, b) + totals.numpy().tobytes()
                    pairs += 1
                line.send("pairs", answer, step=t, columns=len(totals))
            elif facts["kind"] == "commit":
                record = unpacked(data)
                if record.step >= trainer.next:  # else the ledger that came first had it
                    if not record.skipped:
                        update = noise.Update(
                            record.step, trainer.settings.seed, record.multipliers, record.decay
                        )
                        trainer.axis.commit(update)
                    trainer.pass_by(record)
                if not joined:
                    line.send("at", step=trainer.next)
                trainer.axis.settle()
            elif facts["kind"] == "check":
                trainer.axis.flush()
                line.send("digest", step=trainer.next, digest=distributed.digest(trainer.axis.trained))
            elif facts["kind"] == "bye":
                trainer.axis.flush()
                line.close()
                digest = distributed.digest(trainer.axis.trained)
                return f"the run is {facts['why']} after {trainer.next} steps; {pairs} pairs were mine; weights: {digest}"
        except Closed:  # its last words may be in the inbox
            continue


def _invitation(place: str, secret_file: str | None) -> tuple[str, bytes]:
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


def _built(tree: dict[str, Any], data: bytes, trust_remote_code: bool) -> Trainer:
    """The run's trainer at the ledger's last step: base and replay, nothing else."""
    from zoft import data_order, goal, headers, setup, setup_axis, space, tasks
    from zoft.session import agree

    log, _, _ = decode(data, "the run's ledger")
    config = _config(tree)
    if config.trust_remote_code and not trust_remote_code:
        raise UserError(
            "the run has trust_remote_code=true: join with --trust-remote-code if you do trust it"
        )
    config = setup.device(config)
    loaded = tasks.load(config.task)
    refuse(config)  # whoever sends a config does not choose what code runs here
    model, tokenizer, base = setup.model(config)
    train, _ = setup.examples(config, tokenizer, loaded)
    aim = goal.make(config, loaded, tokenizer)
    scored = aim.examples(train)
    names = space.train_names(model, config.train)
    config = setup.dtypes(config, model, names)
    config, trained, axis = setup_axis.make(config, model, space.adopt(model, names), scored)
    agree(log.header, headers.of(config, base, trained, train), Path("the run"))
    at = data_order.batches(config, scored)
    trainer = Trainer(model, axis, at, None, setup.settings(config), aim.forward, aim.value)
    trainer.replay(log.records)
    return trainer


def _config(tree: dict[str, Any]) -> Config:
    """The run's config. Raises UserError for keys that this zoft does not have: they may decide what a step is."""
    for kind, keys in ((Config, tree), (Task, tree.get("task", {}))):
        if new := sorted({*keys} - {f.name for f in dataclasses.fields(kind)}):
            raise UserError(
                f"{', '.join(new)}: the run's config has what zoft {__version__} does not know: join with the zoft that the run has"
            )
    return Config(**{**tree, "task": Task(**tree["task"])})


def refuse(config: Config) -> None:
    """Raise UserError for what elastic=true cannot have."""
    if processes.place()[1] > 1:
        raise UserError(
            "elastic=true: torchrun starts all again where one dies; use `zoft train --nproc N` and `zoft join`"
        )
    if config.perturb == "inplace":
        raise UserError("elastic=true: perturb=inplace moves weights as it probes; use perturb=probes")
    if config.objective in GENERATED:
        raise UserError(
            f"elastic=true: objective={config.objective} scores texts; use `zoft train --nproc N`"
        )
    if config.denoise_every:
        raise UserError(f"elastic=true: denoise_every={config.denoise_every} rebuilds weights; leave it out")
    if config.probes_per_forward not in ("auto", 1):
        raise UserError(
            f"elastic=true: probes_per_forward={config.probes_per_forward}: a pair is one probe; leave it out"
        )
    if config.parallel != "auto":
        raise UserError(
            f"elastic=true: parallel={config.parallel}: pairs of probe and batch are dealt out; leave it out"
        )
