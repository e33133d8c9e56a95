"""Choose a run's learning rate before it starts, from lines of clean losses along its own first steps: lr=auto.

    D_k(η) = what step k would do to the start's weights at lr η;  Δ(η) = mean over k of L_k(θ + D_k(η)) - L_k(θ)
    η× > 0 where Δ(η×) = 0;  lr = SHARE · η×

L_k is the loss of the step's own batch, so Δ(η) = -aη + bη² with a > 0: small steps lower it, and η× = a/b is where a step undoes
what it gained. For a plain step along z it is 2/(zᵀHz), which is about 2/tr H. A run survives a share of that, since its
steps meet other examples than those they were made from (docs/learning_rate.md has the measurements behind SHARE).

Held-out rows are never seen. Weights are put back from a copy, bit for bit.
Sources: the idea of a line of losses before training is FlowOpt's empirical step size; the rule is zoft's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.method.auto_lr import TRIALS, check_auto_lr, forwards_of, lines_allowed
from zoft.method.estimators.estimator import Probe
from zoft.method.updates import advance_trained, make_update
from zoft.objectives.objectives import Goal
from zoft.parallel.world import alone_here, this_world
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.train.batches import batches_of
from zoft.train.parts import trainer_settings
from zoft.train.trainer import Trainer

FACTOR = 4.0  # between neighbours
SHARE = 0.12  # of η×
PLAIN_START = 16  # times eps: how far along z the first trial of a plain step lies


@dataclass(frozen=True)
class Line:
    """Hold what was found: the rule's lr, η×, how many forwards it took, and per trial (lr, mean of Δ, its standard error)."""

    lr: float
    zero: float
    start: float
    forwards: int
    lines: int
    points: list[tuple[float, float, float]]

    def header(self) -> dict[str, Any]:
        """Return what a ledger's header says of it."""
        return {"forwards": self.forwards, "lines": self.lines, "zero": float(f"{self.zero:.6g}")}


def find_lr(
    config: Config,
    loaded: nn.Module,
    axis: Any,
    train: Sequence[Example],
    goal: Goal,
) -> Line:
    """Measure the lines of a run that is about to start and return the learning rate that the rule takes.

    config: lr=auto, all else resolved. train: its training rows as the objective scores them. Several processes each
    measure all of it, and take the first one's figure. Raises UserError where no trial raises the loss, or all do.
    """
    check_auto_lr(config)
    if config.device.startswith("cuda"):
        raise UserError(
            "lr=auto: its lines are measured on a CPU; run `zoft lr … device=cpu` and set lr to what it shows"
        )
    world = this_world()
    with alone_here():
        found = measured_line(config, loaded, axis, train, goal)
    lr, zero = world.broadcast(lambda: [found.lr, found.zero])
    return replace(found, lr=lr, zero=zero)


def measured_line(
    config: Config, loaded: nn.Module, axis: ProbeAxis | InPlace, train: Sequence[Example], goal: Goal
) -> Line:  # fmt: skip
    """Return the line of a run, measured by this process alone; see `find_lr`."""
    settings = replace(trainer_settings(replace(config, lr=0.0)), schedule="constant", warmup=0.0)
    trainer = Trainer(loaded, axis, batches_of(config, train), None, settings, goal.forward, goal.value)
    steps = range(lines_allowed(config))
    kept = [(t, t.stored.clone(), t.step) for t in axis.trained]
    try:
        return _found(config, trainer, steps, kept)
    finally:
        _put_back(kept)


@torch.no_grad()
def _found(config: Config, trainer: Trainer, steps: range, kept: Sequence[Any]) -> Line:
    own = trainer.estimator.per > 1
    made, clean = [], []  # of each line: its coefficients, its loss at the start
    for k in steps:
        batches = trainer.batches(k)
        ask = trainer.own_losses_at if own else trainer.losses_at
        made.append(trainer.estimate(ask(k, trainer.probes, batches))[0])
        clean.append(_loss(trainer, k))
    if not all(map(math.isfinite, [*clean, *(c for some in made for c in some)])):
        raise UserError("lr=auto: the loss at the start is not finite; use compute=fp32")
    size = math.sqrt(fmean(sum(c * c for c in some) for some in made))
    if not size:
        raise UserError(f"lr=auto: both probes of a direction give the same loss: raise eps={config.eps:g}")
    start = PLAIN_START * config.eps / size
    points: dict[int, tuple[float, float, float]] = {}

    def ask_at(i: int) -> float:
        lr = float(f"{start * FACTOR**i:.4g}")
        rises = []
        for k in steps:
            change = make_update(k, config.seed, made[k], lr=lr)
            for t in trainer.axis.trained:
                advance_trained(t, [change], trainer.axis.kind)
            rises.append(_loss(trainer, k) - clean[k])
            _put_back(kept)
        rises = [r if math.isfinite(r) else math.inf for r in rises]
        mean = fmean(rises)
        error = stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 and math.isfinite(mean) else math.nan
        points[i] = (lr, mean, error)
        return mean

    up = ask_at(0) < 0
    at = 0
    while len(points) < TRIALS:
        at += 1 if up else -1
        if (ask_at(at) < 0) != up:
            break
    else:
        way = "raises" if up else "lowers"
        raise UserError(
            f"lr=auto: no lr of {points[min(points)][0]:.2g} to {points[max(points)][0]:.2g} {way} the loss of its own batch; "
            f"set lr to a number, or try another eps than {config.eps:g}"
        )
    low, high = (points[at - 1], points[at]) if up else (points[at], points[at + 1])
    zero = crossing(low[:2], high[:2])
    spent = forwards_of(config, len(steps), len(points))
    line = [points[i] for i in sorted(points)]
    return Line(float(f"{SHARE * zero:.2g}"), zero, fmean(clean), spent, len(steps), line)


def crossing(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Return where -aη + bη² through two points (η, Δ), Δ < 0 at the lower one and ≥ 0 at the upper one, comes back to 0.

    a = bη₁ - Δ₁/η₁,  b = (Δ₂/η₂ - Δ₁/η₁)/(η₂ - η₁),  η× = a/b.
    """
    (x1, y1), (x2, y2) = low, high
    if not math.isfinite(y2):
        return x1
    b = (y2 / x2 - y1 / x1) / (x2 - x1)
    return x1 - y1 / (x1 * b)


def _loss(trainer: Trainer, step: int) -> float:
    """Return the loss of a step's own batches at the weights as they are."""
    batches = trainer.batches(step)
    if trainer.estimator.per == 1:
        return trainer.losses_at(step, [Probe(0, 0.0)], batches)[0]
    return fmean(trainer.own_losses_at(step, [Probe(e, 0.0) for e in range(trainer.estimator.per)], batches))


def _put_back(kept: Sequence[Any]) -> None:
    for t, stored, step in kept:
        t.stored.copy_(stored)
        t.step = step
