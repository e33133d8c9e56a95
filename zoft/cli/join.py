"""`zoft join`: a worker of an elastic run. It builds the run's trainer from config and ledger, and answers pairs until the end.

It gets no weight: it loads the base and replays the ledger while the others work. `zoft.train.elastic` is the other side.
"""

from __future__ import annotations

import dataclasses
import queue
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft import __version__
from zoft.config.schema import SECTIONS, Config
from zoft.errors import UserError
from zoft.ledger.format import decode
from zoft.parallel.launch import with_parent
from zoft.parallel.messages import VERSION, Closed, Line, address, invitation, packed_pair, unpacked
from zoft.run.preflight import check_elastic
from zoft.signals import Stopped

if TYPE_CHECKING:
    from zoft.train.trainer import Trainer


def join_run(place: str, secret_file: str | None, trust_remote_code: bool) -> str:
    """Take part in a run until it ends; returns a line about it. Raises UserError where it cannot, Stopped where it broke off.

    place: the run's folder, or HOST:PORT with secret_file, a copy of the run's join.json.
    """
    with_parent()
    where, secret = invitation(place, secret_file)
    try:
        line = Line(socket.create_connection(address(where), timeout=20), secret, serves=False)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}; is the run there, with elastic=true?") from None
    except Closed as error:
        raise UserError(f"{where}: refused ({error}): take join.json from the run as it is now") from None
    with suppress(Closed):
        line.send("hello", zoft=__version__, wire=VERSION)
    inbox: queue.Queue[tuple[dict | None, bytes]] = queue.Queue()

    def read() -> None:
        # While weights load and the ledger is replayed, too: nobody waits to be rid of a message.
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


def _config(tree: dict[str, Any]) -> Config:
    """The run's config. Raises UserError for keys that this zoft does not have: they may decide what a step is."""
    for kind, keys in ((Config, tree), *((group, tree.get(name, {})) for name, group in SECTIONS.items())):
        if new := sorted({*keys} - {f.name for f in dataclasses.fields(kind)}):
            raise UserError(
                f"{', '.join(new)}: the run's config has what zoft {__version__} does not know: join with the zoft that the run has"
            )
    return Config(**{**tree, **{name: group(**tree.get(name, {})) for name, group in SECTIONS.items()}})


def _built(tree: dict[str, Any], data: bytes, trust_remote_code: bool) -> Trainer:
    """The run's trainer at the ledger's last step: base and replay, nothing else."""
    from zoft.probe.nodes import NodeAxis
    from zoft.train.assemble import assemble
    from zoft.train.batches import batches_of
    from zoft.train.header import agree
    from zoft.train.parts import trainer_settings
    from zoft.train.trainer import Trainer

    log, _, _ = decode(data, "the run's ledger")
    config = _config(tree)
    if config.trust_remote_code and not trust_remote_code:
        raise UserError(
            "the run has trust_remote_code=true: join with --trust-remote-code if you do trust it"
        )
    check_elastic(config)  # whoever sends a config does not choose what code runs here
    parts = assemble(config)
    agree(log.header, parts.header, Path("the run"))
    at = batches_of(parts.config, parts.scored)
    aim = parts.objective
    assert not isinstance(parts.axis, NodeAxis), "elastic=true refuses perturb=nodes"
    trainer = Trainer(
        parts.model, parts.axis, at, None, trainer_settings(parts.config), aim.forward, aim.value
    )
    trainer.replay(log.records)
    return trainer


def _serve(trainer: Trainer, line: Line, inbox: queue.Queue[tuple[dict | None, bytes]]) -> str:
    """Answer until the run ends; returns a line about it."""
    import torch

    from zoft.ledger.log import update_of
    from zoft.parallel.world import weights_digest

    probes = trainer.probes
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
                    answer += packed_pair(p, b, totals)
                    pairs += 1
                line.send("pairs", answer, step=t, columns=len(totals))
            elif facts["kind"] == "commit":
                record = unpacked(data)
                if record.step >= trainer.next:  # else the ledger that came first had it
                    if not record.skipped:
                        trainer.commit(update_of(record, trainer.settings.seed))
                    trainer.pass_by(record)
                if not joined:
                    line.send("at", step=trainer.next)
                trainer.axis.settle()
            elif facts["kind"] == "check":
                trainer.axis.flush()
                line.send("digest", step=trainer.next, digest=weights_digest(trainer.axis.trained))
            elif facts["kind"] == "bye":
                trainer.axis.flush()
                line.close()
                digest = weights_digest(trainer.axis.trained)
                return f"the run is {facts['why']} after {trainer.next} steps; {pairs} pairs were mine; weights: {digest}"
        except Closed:  # its last words may be in the inbox
            continue
