"""Build the trainer of an assembled run, or the plan of a dry run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.ledger.log import Ledger
from zoft.method.advice import advice_at_start
from zoft.method.estimators.named import forwards_per_step
from zoft.method.precision import realised_cosines
from zoft.models.quant.linear import count_numbers
from zoft.objectives.losses import collate, losses, mean_loss
from zoft.objectives.objectives import Goal, Prompts
from zoft.parallel.world import this_world
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.probe.members import Members
from zoft.probe.nodes import NodeAxis
from zoft.train.assemble import Parts
from zoft.train.axis import drawn, why_eager
from zoft.train.batches import batches_of, picked
from zoft.train.node_trainer import NodeTrainer, node_rows_of
from zoft.train.parts import say, trainer_settings
from zoft.train.rollouts import RolloutTrainer
from zoft.train.trainer import Trainer


def build_trainer(parts: Parts, ledger: Ledger) -> Trainer:
    """Build the trainer of a run: on a GPU, one whose steps are captured where the objective is a mean over rows."""
    return build_trainer_of(
        parts.config, parts.model, parts.axis, parts.scored, ledger, parts.objective, parts.members
    )


def build_trainer_of(
    config: Config, loaded: nn.Module, made: ProbeAxis | InPlace | NodeAxis, train: Sequence[Example],
    ledger: Ledger | None, goal: Goal | None = None, members: Members | None = None,
) -> Trainer:  # fmt: skip
    """Build a trainer of parts that were put together by hand; see `build_trainer`. ledger: None only to replay."""
    goal = goal or Goal(train[0].objective)
    for line in advice_at_start(config, made.trained) if ledger is not None and ledger.last_step < 0 else ():
        say(line)
    if isinstance(made, NodeAxis):
        return node_trainer_of(config, loaded, made, train, ledger, goal)
    if config.elastic:
        from zoft.train.elastic import ElasticTrainer

        found = ElasticTrainer(
            loaded,
            made,
            batches_of(config, train),
            ledger,
            trainer_settings(config),
            goal.forward,
            goal.value,
        )
        found.open(config)
        return found
    at: Callable[[int], Sequence[Any]] = batches_of(config, train)
    if goal.texts is not None:

        def at(step: int) -> list[Prompts]:
            mine = this_world().examples
            return [Prompts(tuple(mine(picks)), step) for picks in picked(config, len(train), step)]

        return RolloutTrainer(loaded, made, at, ledger, trainer_settings(config), goal.texts, members)

    why = why_eager(config) or ("objective=preference has a reference for each pair" if goal.pairs else "")
    if why and config.device.startswith("cuda"):
        say(f"steps are not captured as CUDA graphs: {why}")
    eager = goal.pairs is not None or goal.value is not mean_loss or bool(why)
    if eager or not config.device.startswith("cuda") or type(made) in (ProbeAxis, InPlace):
        return Trainer(loaded, made, at, ledger, trainer_settings(config), goal.forward, goal.value)
    from zoft.probe.cuda.axis import DeviceAxis
    from zoft.probe.cuda.inplace import DeviceInPlace
    from zoft.train.cuda_graphs import CapturedTrainer

    assert isinstance(made, (DeviceAxis, DeviceInPlace)), type(made)
    why = "cache_frozen looks rows up on the CPU" if config.cache_frozen else ""
    if not why:  # captured steps send their batches to the device themselves, and do not wait for it
        at = plain = batches_of(replace(config, device="cpu"), train)
        if mask_is_idle(config, loaded, made, train):
            at = lambda step: [b.unmasked() for b in plain(step)]  # noqa: E731
    return CapturedTrainer(loaded, made, at, ledger, trainer_settings(config), goal.forward, capture=why)


def node_trainer_of(
    config: Config, model: nn.Module, axis: NodeAxis, train: Sequence[Example], ledger: Ledger | None, goal: Goal
) -> NodeTrainer:  # fmt: skip
    """Build the trainer of a run of node perturbation; ledger None: one that repeats the steps of a ledger."""
    device = config.device.startswith("cuda")
    where = "cpu" if device else config.device
    whole = node_rows_of(config, train, False, where, device)
    mine = whole if this_world().size == 1 else node_rows_of(config, train, True, where, device)
    settings, keeps = trainer_settings(config), config.node_inputs == "kept"
    if not device:
        return NodeTrainer(model, axis, mine, ledger, settings, goal.forward, whole, keeps=keeps)
    from zoft.train.node_graphs import DeviceNodeTrainer

    why = "cache_frozen looks rows up on the CPU" if config.cache_frozen else ""
    masked = not mask_is_idle(config, model, axis, train)
    return DeviceNodeTrainer(
        model, axis, mine, ledger, settings, goal.forward, whole, keeps=keeps, capture=why, masked=masked
    )


@torch.no_grad()
def mask_is_idle(
    config: Config, loaded: nn.Module, made: ProbeAxis | InPlace | NodeAxis, train: Sequence[Example]
) -> bool:
    """Say whether padding on the right changes nothing, as in a causal model: then attention needs no mask."""
    by_length = sorted(train, key=lambda e: e.length)
    batch = collate([by_length[0], by_length[-1]]).to(config.device)
    with made.clean(batch.rows):
        masked = losses(loaded, batch)[0]
    with made.clean(batch.rows):
        plain = losses(loaded, batch.unmasked())[0]
    tolerance = 1e-4 if config.compute == "fp32" else 0.02
    idle = bool(((masked - plain).abs() <= tolerance * (1 + masked.abs())).all())
    return this_world().all(idle)  # the probes of a direction are run in one way


def plan_run(parts: Parts) -> dict[str, Any]:
    """Say what a run would do: the resolved config and the counts that follow from it."""
    config, trained, train, held_out = parts.config, parts.trained, parts.train, parts.held_out
    for line in advice_at_start(config, trained):
        say(line)
    numbers = sum(t.stored.numel() for t in trained)
    realised = realised_cosines(trained, config.eps, seed=config.seed, kind=drawn(config))
    weakest = min(realised, key=lambda name: realised[name])
    total = count_numbers(parts.model)
    return {
        "config": asdict(config),
        "train_examples": len(train),
        "eval_examples": len(held_out),
        "longest": max(e.length for e in [*train, *held_out]),
        "trained_tensors": len(trained),
        "trained_numbers": numbers,
        "trained_share": numbers / total,
        "weakest_direction": weakest,
        "weakest_cosine": realised[weakest],
        "forwards": config.steps * forwards_per_step(config),
    }
