"""Anchored decay: each step pulls the weights towards those that training began with, not towards 0.

    θ ← θ - lr·λ·(θ - θ₀),  then the step's update;  λ the key `anchor`, θ₀ the base

It bounds how far the random part of many steps carries weights that the loss does not hold. All trained tensors are pulled, biases
and norms too. θ₀ is the base as it is stored (in the storage dtype): for LoRA pairs, prefixes and prompts their start. It stays
in memory beside θ, which `zoft estimate` counts; a resume and a replay have it from the base itself, not from the ledger.
It goes through the reference tier (rules.py), for plain steps too: after the decay and before the update, in the work dtype,
each operation rounded on its own: a = a - fl32(lr·λ)·(a - θ₀).
Source: anchored weight decay for evolution strategies (arXiv 2605.30148), against the drift that arXiv 2601.20861 describes; the same
form as L2-SP (Li et al. 2018, arXiv 1802.01483), decoupled. No deviations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BASE = "@base"  # where a rule's step finds θ₀ among its state; no buffer of a snapshot

Step = Callable[["Tensor", "Tensor", dict[str, Any], float], "Tensor"]


def anchored(step: Step, strength: float) -> Step:
    """Return a rule's step that pulls θ towards the base first; strength: λ."""

    import numpy as np  # here, as configs are read without it

    def pulled(theta: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> Tensor:
        with np.errstate(over="ignore"):
            pull = float(np.float32(lr * strength))
        away = theta - state[BASE].to(theta.dtype)
        return step(theta - pull * away, g, state, lr)

    return pulled


def plain(theta: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> Tensor:
    """Move θ by lr times the estimate: what the fused pass does, for a plain step with an anchor."""
    return theta - lr * g
