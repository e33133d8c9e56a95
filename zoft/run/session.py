"""Open a run: its folder with config.yaml, its ledger, which must agree with what goes on, and where metrics go."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.compose import to_yaml
from zoft.config.schema import Config
from zoft.errors import UserError, writing
from zoft.folder import write
from zoft.run.preflight import claim_folder
from zoft.run.tracker import Tracker
from zoft.signals import Stop, listening

if TYPE_CHECKING:
    from zoft.ledger.log import Ledger

LOOK_SECONDS = 1.0  # between looks whether the folder is still there


@dataclass
class Session:
    """Hold an open run: its folder, its ledger, and where its metrics go."""

    folder: Path
    ledger: Ledger
    tracker: Tracker
    config: Config
    stop: Stop


@contextmanager
def session(config: Config, header: Mapping[str, Any], resume: str | Path | None) -> Iterator[Session]:
    """Make or reopen a run's folder and ledger; everything is closed at the end.

    config: with nothing `auto` left; a new run's config.yaml keeps it. header: of the ledger; a resumed run's
    must agree with it. Raises UserError for another base, another plan, or a damaged ledger; Stopped on a signal.
    """
    from zoft.env import environment
    from zoft.ledger.log import Ledger
    from zoft.models.saving import clean_leftovers
    from zoft.parallel.world import this_world
    from zoft.replay.saved_model import folder_name
    from zoft.replay.snapshot import remove_drafts
    from zoft.train.header import agree, said_of_resume

    world = this_world()
    folder, first = Path(resume or str(config.output_dir)), world.rank == 0
    if not first:
        ledger = world.ledger(None)
    elif resume and (folder / "ledger").exists():
        clean_leftovers(folder / folder_name(config))
        remove_drafts(folder)
        ledger = Ledger.open(folder / "ledger", sync=config.sync)
    else:
        if resume is None:  # another run may have begun there while the model was loading
            claim_folder(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", to_yaml(config))
        place = {"processes": world.size, "auto": world.auto}
        write(folder / "env.json", json.dumps(environment() | place, indent=2) + "\n")
        ledger = Ledger.create(folder / "ledger", dict(header), sync=config.sync)
    with kept(ledger), ledger, listening(str(folder)) as stop:
        if first:
            world.ledger(ledger)
        world.stop = stop
        agree(ledger.header, header, folder)
        lines = said_of_resume(ledger.header, header, folder) if resume else []
        with Tracker(
            folder if first else None, config.steps, track=config.track, config=dataclasses.asdict(config),
            resume_step=ledger.last_step + 1, known=steps_of(ledger, config), device=config.device,
        ) as tracker:  # fmt: skip
            for line in lines if first else ():
                tracker.note(line)
            try:
                yield Session(folder, ledger, tracker, config, stop)
            finally:  # steps that were under way when something stopped the run; what does not fit, a resume fills in
                with suppress(UserError):
                    tracker.fill(steps_of(ledger, config))


def steps_of(ledger: Ledger, config: Config) -> list[dict[str, Any]]:
    """Return the metrics of the steps that a ledger has."""
    from zoft.method.estimators.named import estimator_of
    from zoft.train.trainer import metrics_of

    probes = estimator_of(config).probes(config.q, config.eps)
    return [metrics_of(record, probes) for record in ledger.records]


class Presence:
    """Check now and then whether a run's ledger is still at its path: an open file hides that it was deleted.

    files: name -> text of what a run's folder needs beside the ledger (config.yaml).
    """

    def __init__(self, ledger: Ledger, files: Mapping[str, str]) -> None:
        self.ledger, self.files, self.looked = ledger, dict(files), time.monotonic()

    def look(self, now: bool = False) -> None:
        """Raise UserError if the folder was moved or deleted; a deleted ledger is put back first."""
        if not now and time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        self.ledger.check_size()
        path, fd = self.ledger.path, self.ledger.fileno()
        mine = os.fstat(fd)
        with suppress(OSError):
            if os.path.samestat(os.stat(path), mine):
                return
        steps = f"its {len(self.ledger.records)} steps"
        if mine.st_nlink:
            raise UserError(
                f"{path.parent}: the run's folder was moved while the run went on; {steps} went with it: "
                "`zoft train --resume` it where it is now"
            )
        data = os.pread(fd, mine.st_size, 0)
        try:
            place = self._put_back(path.parent, data)
        except UserError:
            place = self._put_back(Path(tempfile.mkdtemp(prefix="zoft-")), data)
        raise UserError(
            f"{path.parent}: the run's folder was deleted while the run went on; {steps} are put back: "
            f"`zoft train --resume {place}`"
        )

    def _put_back(self, folder: Path, data: bytes) -> Path:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            if not (folder / name).exists():
                write(folder / name, text)
        if os.path.lexists(folder / "ledger"):
            raise UserError(f"{folder}: another run's ledger is there")
        write(folder / "ledger", data)
        return folder


@contextmanager
def kept(ledger: Ledger) -> Iterator[None]:
    """Add to a failed write of a run what becomes of its steps, and how to go on."""
    try:
        yield
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UserError(
            f"{error}; the {len(ledger.records)} steps so far are kept: "
            f"put that right, then `zoft train --resume {ledger.path.parent}`"
        ) from error.__cause__
