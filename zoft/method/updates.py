"""Coefficients -> weight change: learning-rate schedules, an update's numbers, and bringing tensors to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from zoft.errors import UserError
from zoft.method.anchor import BASE
from zoft.method.blocks import their_turn
from zoft.noise.noise import advance as advance_tensor
from zoft.noise.spec import Update

if TYPE_CHECKING:
    from zoft.method.space import Trained

# Share of lr left after the share t in [0, 1] of the steps that follow warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
}


def lr_at(step: int, *, lr: float, steps: int, schedule: str = "constant", warmup: float = 0) -> float:
    """The learning rate of a step: warm-up, then the schedule, which would reach 0 at step `steps`.

    step < w: lr·(step + 1)/w;  else lr·schedule((step - w)/(steps - w)), w the steps of warm-up.
    step: from 0. steps: of the run. warmup: a number of steps, or a fraction < 1 of `steps` (rounded up).
    Raises UserError for an unknown schedule or a warm-up that is neither.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule}: no such schedule; use {', '.join(SCHEDULES)}")
    w = warmup_steps(warmup, steps)
    if step < w:
        return lr * (step + 1) / w
    share = min((step - w) / (steps - w), 1.0) if steps > w else 1.0
    return lr * SCHEDULES[schedule](share)


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warm-up: `warmup` itself, or that fraction of `steps` if it is below 1. Raises UserError."""
    if 0 <= warmup < 1:
        return math.ceil(warmup * steps - 1e-9)  # 0.1 of 30 is 3, not the 4 of 3.0000000000000004
    if warmup < 0 or warmup != int(warmup):
        raise UserError(f"warmup={warmup}: use a whole number of steps, or a fraction of them below 1")
    return int(warmup)


def make_update(
    step: int, seed: int, coefficients: Sequence[float], *, lr: float, weight_decay: float = 0.0, ruled: bool = False
) -> Update:  # fmt: skip
    """The update θ ← θ - lr·(Σ_k c_k·z_k + weight_decay·θ), as the fp32 numbers that the ledger keeps.

    multipliers[k] = fl32(-lr·c_k), decay = fl32(1 - lr·weight_decay): computed in float64, rounded once.
    ruled: an update rule takes the step, with lr itself, and multipliers[k] = fl32(-c_k).
    A multiplier can overflow: ask `estimator.finite(update.multipliers)` and skip the step if not.
    lr·weight_decay below 3e-8 rounds to no decay at all: `decay_is_lost` tells.
    Source: Malladi et al. 2023 (MeZO), algorithm 1; decay decoupled as in its code and in AdamW.
    """
    with np.errstate(over="ignore"):
        scale = 1.0 if ruled else lr
        multipliers = np.asarray([-scale * c for c in coefficients], np.float64).astype(np.float32)  # [q]
    decay = float(np.float32(1.0 - lr * weight_decay))
    return Update(step, seed, tuple(multipliers.tolist()), decay, lr=float(np.float32(lr)) if ruled else 0.0)


def decay_is_lost(lr: float, weight_decay: float) -> bool:
    """Say whether a weight decay that was asked for rounds away: fl32(1 - lr·weight_decay) = 1."""
    return lr > 0 and weight_decay > 0 and float(np.float32(1.0 - lr * weight_decay)) == 1.0


def pending_updates(trained: Trained, updates: Sequence[Update], beta: float) -> list[Update]:
    """Those of `updates` that still change this tensor; makes its momentum buffer when first needed.

    Left out: steps it has behind it, steps of other blocks, and updates that write nothing. With beta = 0 these are the ones with
    all multipliers 0 and no decay. With momentum such an update still moves the weights by what is in the
    buffer: it is left out only while there is no buffer, all of which would be 0. Decay is 1 where the tensor
    has none. What is done to θ does not depend on how `updates` is cut into calls. Skipped steps are no
    updates: they leave weights and momentum as they were.

    updates: in order of their steps. To be handed to `noise.advance` or `noise.perturb`, then `mark`.
    """
    assert all(a.step < b.step for a, b in pairwise(updates)), "updates out of order"
    todo = [u for u in their_turn(trained, updates) if u.step >= trained.step]
    assert not (todo and trained.rule), f"{trained.name}: a rule's updates wait for `advance`"
    if not trained.decays:
        todo = [u if u.is_nothing else replace(u, decay=1.0) for u in todo]
    if beta == 0:
        return [u for u in todo if not u.is_noop]
    if trained.momentum is None:
        import torch  # here, as schedules are of use without it

        while todo and todo[0].is_noop:
            del todo[0]
        if todo:
            dtype = torch.float64 if trained.stored.dtype == torch.float64 else torch.float32
            trained.momentum = torch.zeros_like(trained.stored, dtype=dtype)
    return todo


def mark_advanced(trained: Trained, updates: Sequence[Update]) -> None:
    """Note that the tensor is past the last of `updates` (as given to `due`)."""
    if updates:
        trained.step = max(trained.step, updates[-1].step + 1)


def advance_trained(trained: Trained, updates: Sequence[Update], noise: str, beta: float = 0.0) -> None:
    """Bring one tensor to the step after the last of `updates`, in place and in one pass over it.

    θ ← round(decay·θ + Σ_k multipliers[k]·z_k), for each update in turn; with momentum
    m ← beta·m + Σ_k multipliers[k]·z_k;  θ ← round(decay·θ + m).
    The learning rate is inside the multipliers, so inside m. At constant lr this is exactly
    torch.optim.SGD(momentum=beta), m = -lr·buffer. Under a schedule older terms keep the lr of their own
    step, where torch scales the whole buffer with today's: here a step of lr 0 still coasts.

    updates: in order; those the tensor has behind it are passed over. noise: gaussian | rademacher.
    beta: the run's, the same in every call. A tensor with a rule is moved by that instead.
    """
    if trained.rule is not None:
        return _by_rule(trained, updates, noise)
    todo = pending_updates(trained, updates, beta)
    if todo:
        advance_tensor(
            trained.stored, trained.id, todo, noise, momentum=trained.momentum, beta=beta, floor=trained.floor,
            mask=trained.mask, width=trained.width,
        )  # fmt: skip
    mark_advanced(trained, updates)


def _by_rule(trained: Trained, updates: Sequence[Update], noise: str) -> None:
    """Apply the updates that a tensor lacks by its rule, one after the other."""
    from zoft.noise import reference  # here, as schedules are of use without torch

    rule, state = trained.rule, {k: v for k, v in trained.state.items() if k != "t"}
    assert rule is not None
    if trained.base is not None:
        state[BASE] = trained.base
    for u in their_turn(trained, updates):
        if u.step >= trained.step and not u.is_nothing:
            u = u if trained.decays else replace(u, decay=1.0)
            trained.state["t"] += 1
            reference.advance(
                trained.stored, trained.id, u, noise, rule.step, state, count=int(trained.state["t"]),
                floor=trained.floor, mask=trained.mask, width=trained.width,
            )  # fmt: skip
            mark_advanced(trained, [u])
    mark_advanced(trained, updates)
