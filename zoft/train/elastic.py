"""`elastic: true`: workers come and go while a run goes on; a step's (probe, batch) pairs are dealt out to who is there.

The process that trains is the coordinator, and evaluates pairs itself. A worker that joins gets the config and the ledger,
never a weight, and takes part from a step's beginning once it has replayed the ledger (`zoft.cli.join`). Each
pair is one forward of one whole batch at one probe, whoever runs it, and sums are added up in the order of pairs: the run
has the bits of one process with probes_per_forward=1, whatever happens to its workers.
"""

from __future__ import annotations

import dataclasses
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import torch

from zoft import __version__
from zoft.config.schema import Config
from zoft.console import escaped
from zoft.errors import UserError
from zoft.ledger.log import Record
from zoft.method.estimators.estimator import Probe
from zoft.objectives.losses import Batch
from zoft.parallel.launch import with_parent
from zoft.parallel.messages import JOIN, PAIR, VERSION, Closed, Line, address, invite, packed, pairs_of
from zoft.parallel.world import weights_digest
from zoft.train.trainer import Trainer

LAG = 8  # steps that a worker may lack when it is given its first pairs
STRANGERS = 64  # connections at a time that have not proven the secret; more are closed at once
PATIENCE = 60.0  # seconds that the others may take longer than the coordinator's own share, at least


class Worker:
    """Hold the coordinator's view of one worker: its line, and the pairs of this step that it owes."""

    def __init__(self, line: Line, name: str) -> None:
        self.line, self.name = line, name
        self.ready = False
        self.owes: set[tuple[int, int]] = set()


def is_sound(facts: dict[str, Any], data: bytes) -> bool:
    """Return whether a worker's message has the form that its kind has. Kinds that nobody reads may have any."""

    def whole(key: str) -> bool:
        return isinstance(facts.get(key), int) and 0 <= facts[key] < 1 << 32

    match facts["kind"]:
        case "at":
            return whole("step")
        case "pairs":
            return whole("step") and whole("columns") and len(data) % (PAIR.size + 8 * facts["columns"]) == 0
        case "digest":
            return whole("step") and isinstance(facts.get("digest"), str)
        case "refuses":
            return isinstance(facts.get("why"), str)
    return True


class ElasticTrainer(Trainer):
    """Train as the coordinator, with losses that come from whoever is there."""

    check_every = 0
    closed = False

    def open(self, config: Config) -> None:
        """Listen for workers."""
        assert self.ledger is not None
        with_parent()
        self.config, self.check_every = config, config.check_every
        self.folder = self.ledger.path.parent
        self.secret = secrets.token_bytes(32)
        self.events: queue.Queue[tuple[Worker, dict | None, bytes]] = queue.Queue()
        self.workers: list[Worker] = []
        self.unproven = threading.BoundedSemaphore(STRANGERS)
        host, port = address(config.listen)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self.server = socket.create_server((host, port), family=family)
        except OSError as error:
            raise UserError(f"listen={config.listen}: {error.strerror}; choose another address") from None
        where = f"{host}:{self.server.getsockname()[1]}"
        path = invite(self.folder, where, self.secret)
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
            if not self.unproven.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._listen, args=(connection, f"{host}:{port}"), daemon=True).start()

    def _listen(self, connection: socket.socket, name: str) -> None:
        try:
            worker = Worker(Line(connection, self.secret, serves=True), name)
        except Closed:
            return  # a stranger
        finally:
            self.unproven.release()
        try:
            while True:
                facts, data = worker.line.receive()
                if not is_sound(facts, data):
                    raise Closed("a message of another form")
                self.events.put((worker, facts, data))
        except (Closed, ValueError, RecursionError):
            self.events.put((worker, None, b""))

    def losses_at(self, step: int, probes: Sequence[Probe], batches: Sequence[Batch]) -> list[float]:
        """Return the mean loss at each probe, [len(probes)]: pairs dealt out, and again where a worker is lost."""
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
                    known = next(iter(found.values()))  # of this process's own share
                    for p, b, totals in pairs_of(data, facts["columns"]):
                        if (
                            p,
                            b,
                        ) in worker.owes and totals.shape == known.shape:  # nothing that was not asked for
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
                    f"worker {worker.name} cannot join: it is of zoft {facts.get('zoft')}, which has another version of the messages"
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
        print(escaped(line), file=sys.stderr, flush=True)

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
        mine = weights_digest(self.axis.trained)
        asked = [w for w in self.workers if w.ready]
        self._tell("check", step=self.next)
        deadline = time.monotonic() + PATIENCE
        while asked and time.monotonic() < deadline:
            try:
                worker, facts, data = self.events.get(timeout=1.0)
            except queue.Empty:
                continue
            if facts is not None and facts["kind"] == "digest":
                if facts["step"] != self.next:
                    continue  # of an earlier check, from a worker that was still loading then
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
        self._say(f"weights at the end: {weights_digest(self.axis.trained)}")
        self.close("done")

    def close(self, why: str) -> None:
        """Send the workers home."""
        self._tell("bye", why=why)
        self.closed = True
        # Else the thread that waits in `accept` lets one more in, whom nobody answers.
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        # A connection that is torn down may take with it what was not read yet.
        deadline = time.monotonic() + 5.0
        while self.workers and time.monotonic() < deadline:
            try:
                worker, facts, _ = self.events.get(timeout=0.2)
            except queue.Empty:
                continue
            if facts is None and worker in self.workers:
                self.workers.remove(worker)
        (self.folder / JOIN).unlink(missing_ok=True)
