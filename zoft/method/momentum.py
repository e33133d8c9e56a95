"""Momentum by re-weighting the directions of past steps: what a buffer adds to θ, without the buffer.

    θ ← decay·θ + Σ_{s = t-H+1..t} β^(t-s)·m_s·z_s,  m_s = -lr_s·c_s

A buffer b ← β·b + m·z holds just this sum, and z_s is a function of (seed, s): so a step draws its last H directions again and
needs no memory for each number. s counts updates; a skipped step is none. H is the least with β^H < 1e-3 (66 with β = 0.9): what is
left out of a step is below 1e-3 of what it adds in the long run. So the bits are not a buffer's, and update=momentum is a setting of its own.
In the ledger each step has its own multipliers alone; the weights β^(t-s)·m_s, computed in float64 and rounded to fp32 once, follow from them.
It is for directions that cost little to draw (signs, rank 1). Gaussian noise, 66 times a step, would cost seconds: it keeps its buffer (`momentum`).
Source: the sum that heavy-ball SGD is (Polyak 1964), as ZO-SGD-MMT in ZO-Bench (Zhang et al. 2024, arXiv 2402.11592), where it is
torch's buffer without dampening. Deviations: the window; under a schedule older terms keep the lr of their own step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoft.errors import UserError
from zoft.noise.spec import GAUSSIAN, Update

MOMENTUM = "momentum"
LEAST = 1e-3  # a direction whose weight has faded below this share is left out


def window(beta: float) -> int:
    """Return H, the number of steps whose directions a step has: the least with beta^H < LEAST."""
    h = max(1, math.floor(math.log(LEAST) / math.log(beta)))
    while beta**h >= LEAST:
        h += 1
    return h


def reweighted(recent: Sequence[Update], beta: float) -> Update:
    """Return the last of the updates of a window with the faded directions of the others in it, the newest first.

    recent: plain updates as the ledger has them, oldest first, at most `window(beta)` of them.
    """
    import numpy as np  # here, as configs are read without it

    now = recent[-1]
    multipliers: list[float] = []
    steps: list[int] = []
    directions: list[int] = []
    for age, u in enumerate(reversed(recent)):
        multipliers += [float(np.float32(beta**age * m)) for m in u.multipliers]
        steps += [u.step] * len(u.multipliers)
        directions += range(len(u.multipliers))
    return replace(now, multipliers=tuple(multipliers), steps=tuple(steps), directions=tuple(directions))


class Window:
    """Turn a run's plain updates into re-weighted ones, in the order of their steps; beta 0: leave them as they are."""

    def __init__(self, beta: float) -> None:
        self.beta, self.recent = beta, list[Update]()

    def take(self, u: Update) -> Update:
        """Return a step's update as the weights get it."""
        if not self.beta:
            return u
        self.recent = [*self.recent, u][-window(self.beta) :]
        return reweighted(self.recent, self.beta)


def window_beta(config: Any) -> float:
    """Return the decay of momentum by re-weighting, of a Config or of a trainer's Settings; 0 without it."""
    return config.momentum if config.update == MOMENTUM else 0.0


def buffer_beta(config: Any) -> float:
    """Return the decay of a momentum buffer; 0 without one."""
    return 0.0 if config.update == MOMENTUM else config.momentum


def check_momentum(config: Any) -> None:
    """Refuse what momentum by re-weighting does not go with."""
    if config.update != MOMENTUM:
        return
    what = f"update={MOMENTUM}"
    if not config.momentum:
        raise UserError(f"{what}: give the share that a step keeps, momentum=0.9 for example")
    if config.noise == GAUSSIAN:
        raise UserError(
            f"noise={config.noise}: {what} draws {window(config.momentum)} directions again each step; use noise=rademacher or "
            "rank1, or update=sgd, whose momentum is a buffer"
        )
    refused = (
        ("perturb", config.perturb == "inplace", "its way back is along the step's own direction; use perturb=probes"),
        ("anchor", config.anchor, "plain steps alone are pulled; leave one of them out"),
        ("blocks", config.blocks != "all", "past directions are of other blocks; use update=sgd, whose buffers know theirs"),
        ("mask", config.mask == "magnitude" and config.sparsity, "past directions had other masks; use mask=random or update=sgd"),
        ("mask_every", config.mask_every, "past directions had other masks; leave one of them out"),
    )  # fmt: skip
    for name, bad, why in refused:
        if bad:
            value = getattr(config, name)
            raise UserError(f"{name}={value if isinstance(value, str) else f'{value:g}'}: with {what} {why}")
