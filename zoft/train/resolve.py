"""Resolve a config: every function that changes one before or while a run is assembled stands in this room."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.limits import read_bytes
from zoft.method.estimators.named import forwards_per_step
from zoft.method.recipes import is_page
from zoft.yaml_files import yaml_tree

if TYPE_CHECKING:
    from zoft.data.tasks import TaskData

# What another number of processes resolves anew where it was `auto`: no weight depends on it beyond rounding.
ELSEWHERE = ("threads", "hold_probe")


def settled(config: Config, resume: str | Path | None) -> Config:
    """Return the config with what is known before anything loads: absolute paths, allowed steps, elastic runs' grouping."""
    if config.elastic:
        config = dataclasses.replace(
            config, probes_per_forward=1
        )  # a pair of a probe and a batch is a forward
    return allowed_steps(absolute_paths(resolved_anew(config, resume)))


def with_objective(config: Config, data: TaskData) -> Config:
    """Return the config with its objective named, and what follows from it. Raises UserError as `objective_keys` does."""
    from zoft.objectives.objectives import objective_keys

    return dataclasses.replace(config, **objective_keys(config, data))


def with_lr(config: Config, lr: float) -> Config:
    """Return the config with the learning rate that lr=auto found. Raises UserError where the decay is too much for it."""
    if lr * config.weight_decay >= 1:
        raise UserError(
            f"weight_decay={config.weight_decay:g}: times lr={lr:g}, which lr=auto found, it takes each weight away in one step; lower it"
        )
    return dataclasses.replace(config, lr=lr)


def resolved_anew(config: Config, resume: str | Path | None) -> Config:
    """Return a resumed run's config, with `auto` again for keys that decide no weight, where another number of processes
    goes on: each process has its share of this machine. What config.yaml was given by hand since then stays."""
    from zoft.parallel.world import this_world

    world = this_world()
    path = Path(resume or "") / "env.json"

    def began() -> dict[str, Any]:
        with suppress(UserError, ValueError, RecursionError):
            found = json.loads(read_bytes(path, 1 << 24, "it is no env.json"))
            if isinstance(found, dict) and isinstance(found.get("auto"), dict):
                return found
        return {}

    found = world.broadcast(began) if resume else {}
    if found.get("processes", world.size) == world.size:
        return config
    now: dict[str, Any] = {
        k: "auto" for k in ELSEWHERE if k in found["auto"] and found["auto"][k] == getattr(config, k)
    }
    return dataclasses.replace(config, **now)


def allowed_steps(config: Config) -> Config:
    """Return the config with as many steps as `max_forwards` allows. Raises UserError if it allows none."""
    if config.max_forwards is None:
        return config
    each = forwards_per_step(config)
    steps = min(config.steps, config.max_forwards // each)
    if not steps:
        raise UserError(
            f"max_forwards={config.max_forwards}: a step takes {each}; allow more, or lower q or batch_size"
        )
    if steps < config.steps:
        print(f"max_forwards={config.max_forwards}: {steps} steps of {each} forwards", file=sys.stderr)
    for name in ("warmup", "snapshot_every"):
        if getattr(config, name) > steps:
            raise UserError(
                f"{name}={getattr(config, name):g}: more than the {steps} steps that max_forwards allows"
            )
    return dataclasses.replace(config, steps=steps)


def absolute_paths(config: Config) -> Config:
    """Return the config with its paths made absolute, so that a run resumes from any folder."""

    def fixed(text: str | None) -> str | None:
        return str(Path(text).expanduser().resolve()) if text and Path(text).expanduser().exists() else text

    from zoft.models.load import PACKAGED

    task = dataclasses.replace(config.task, train=fixed(config.task.train), eval=fixed(config.task.eval))
    model = config.model if config.model in PACKAGED else str(fixed(config.model))
    reward = config.reward
    if reward is not None and "://" not in reward:
        place, _, function = reward.rpartition(":")
        reward = f"{fixed(place)}:{function}"
    recipe = str(fixed(config.recipe)) if is_page(config.recipe) else config.recipe
    return dataclasses.replace(
        config, recipe=recipe, model=model, adapter=fixed(config.adapter), task=task, reward=reward
    )


def with_group(config: Config, probes_per_forward: int) -> Config:
    """Return the config of a run one of whose batches could not be stacked: with that many probes in a forward."""
    return dataclasses.replace(config, probes_per_forward=probes_per_forward)


def as_begun(config: Config, folder: Path) -> Config:
    """Return a run's config with the keys that another number of processes resolves for itself as config.yaml has them."""
    path = folder / "config.yaml"
    tree = yaml_tree(path) if path.is_file() else {}
    return dataclasses.replace(config, **{k: tree[k] for k in ELSEWHERE if k in tree})
