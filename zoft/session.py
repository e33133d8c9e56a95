"""An open run: its folder with config.yaml, its ledger, which must agree with what goes on, and where metrics go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft import compose, tracking
from zoft.config import Config
from zoft.config_digest import changed
from zoft.errors import UserError, writing
from zoft.folder import kept, write
from zoft.preflight import claim
from zoft.stop import Stop, listening
from zoft.yamlfile import yaml_tree

if TYPE_CHECKING:
    from zoft.ledger import Ledger

# What another number of processes resolves anew where it was `auto`: no weight depends on it beyond rounding.
ELSEWHERE = ("threads", "hold_probe")

# What it means where a resumed run's ledger says something else.
DIFFERS = {
    "base": "starts from other weights ({found}) than this model has ({value})",
    "data": "was begun on other training data: put back what was changed there",
    "rows": "was begun on rows with other columns or answers: put back what was changed there",
    "noise_version": "has noise of version {found}, this zoft makes version {value}: use the zoft that wrote it",
    "adapter": "starts from an adapter ({found}) that is not made here ({value}): put back start.safetensors",
}


@dataclass
class Session:
    """An open run: its folder, its ledger, and where its metrics go."""

    folder: Path
    ledger: Ledger
    tracker: tracking.Tracker
    config: Config
    stop: Stop


@contextmanager
def session(config: Config, header: Mapping[str, Any], resume: str | Path | None) -> Iterator[Session]:
    """Make or reopen a run's folder and ledger; everything is closed at the end.

    config: with nothing `auto` left; a new run's config.yaml keeps it. header: of the ledger; a resumed run's
    must agree with it. Raises UserError for another base, another plan, or a damaged ledger; Stopped on a signal.
    """
    from zoft import distributed
    from zoft.env import environment
    from zoft.ledger import Ledger

    world = distributed.current()
    folder, first = Path(resume or str(config.output_dir)), world.rank == 0
    if not first:
        ledger = world.ledger(None)
    elif resume and (folder / "ledger").exists():
        ledger = Ledger.open(folder / "ledger", sync=config.sync)
    else:
        if resume is None:  # another run may have begun there while the model was loading
            claim(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", compose.to_yaml(config))
        place = {"processes": world.size, "auto": world.auto}
        write(folder / "env.json", json.dumps(environment() | place, indent=2) + "\n")
        ledger = Ledger.create(folder / "ledger", dict(header), sync=config.sync)
    with kept(ledger), ledger, listening(str(folder)) as stop:
        if first:
            world.ledger(ledger)
        world.stop = stop
        agree(ledger.header, header, folder)
        with tracking.Tracker(
            folder if first else None, config.steps, track=config.track, config=dataclasses.asdict(config),
            resume_step=ledger.last_step + 1, known=steps_of(ledger, config), device=config.device,
        ) as tracker:  # fmt: skip
            try:
                yield Session(folder, ledger, tracker, config, stop)
            finally:  # steps that were under way when something stopped the run; what does not fit, a resume fills in
                with suppress(UserError):
                    tracker.fill(steps_of(ledger, config))


def steps_of(ledger: Ledger, config: Config) -> list[dict[str, Any]]:
    """The metrics of the steps that a ledger has."""
    from zoft.trainer import metrics_of

    return [metrics_of(record, config.eps) for record in ledger.records]


def agree(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue or replay a ledger on anything but what it was written on."""
    if "config" in wanted and (began := found.get("update", "sgd")) != wanted.get("update", "sgd"):
        raise UserError(f"{folder}: its ledger was written with update={began}: put that back in config.yaml")
    for name, value in wanted.items():
        if name in ("zoft", "plan", "reward") or name not in found or found[name] == value:
            continue
        other = DIFFERS.get(name, f"was written with {name}={found[name]}, not {value}")
        if name == "config":
            keys = changed(found[name], value)
            if not keys:  # a zoft that knows other keys
                continue
            other = f"was begun with another {', '.join(keys)} than config.yaml has now: put back what it was"
        if name == "trained":
            names = [n for n in {**found[name], **value} if found[name].get(n) != value.get(n)]
            other = f"trains other tensors than this model has now, {names[0]} among them"
        raise UserError(f"{folder}: its ledger {other.format(found=found[name], value=value)}")


def resolved_anew(config: Config, resume: str | Path | None) -> Config:
    """Of a resumed run, what was `auto` and decides no weight is `auto` again where another number of processes goes on:
    each has its share of this machine. What config.yaml was given by hand since stays."""
    from zoft import distributed

    world = distributed.current()
    path = Path(resume or "") / "env.json"

    def began() -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_bytes())
            if isinstance(found, dict) and isinstance(found.get("auto"), dict):
                return found
        return {}

    found = world.told(began) if resume else {}
    if found.get("processes", world.size) == world.size:
        return config
    now: dict[str, Any] = {
        k: "auto" for k in ELSEWHERE if k in found["auto"] and found["auto"][k] == getattr(config, k)
    }
    return dataclasses.replace(config, **now)


def as_begun(s: Session) -> Config:
    """A run's config with those keys as its config.yaml has them that another number of processes resolves for itself."""
    path = s.folder / "config.yaml"
    tree = yaml_tree(path) if path.is_file() else {}
    return dataclasses.replace(s.config, **{k: tree[k] for k in ELSEWHERE if k in tree})
