"""MEAZO: coefficients over the root of the projected gradient's running second moment, one number for all weights.

    v ← beta·v + (1 - beta)·g²,  g = Σ_k c_k of a step;  c_k ← c_k / (sqrt(v / (1 - betaᵗ)) + 1e-8)

So a step has the size lr·z whatever the loss's scale.
Source: MEAZO, arXiv 2605.03869. Deviations: the paper's beta was not to be had. The losses are rounded to fp32 first, as
those of every estimator with a state are; a limit (`clip`) is laid on c_k and not on g.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from zoft.errors import UserError
from zoft.method.estimators.estimator import Estimator, total

if TYPE_CHECKING:
    from torch import Tensor

ZETA = 1e-8  # keeps the division finite


def meazo(base: Estimator, beta: float, clip: float | None = None) -> Estimator:
    """Return `base` with its coefficients scaled; beta: the moment's decay, in (0, 1).

    Raises UserError for a base that has a state of its own.
    """
    if base.state or base.sized:
        has = "a state" if base.state else "a scale"
        raise UserError(f"meazo={beta:g}: estimator={base.name} has {has} of its own; leave meazo out")

    def coefficients(losses: Tensor, q: int, eps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        c = base.coefficients(losses, q, eps)  # [q]
        g = total(c)
        new = state * beta  # [2]: v, betaᵗ
        new[0].add_((1.0 - beta) * (g * g))
        if clip is not None:
            c = c.clamp(-clip / q, clip / q)
        return c / ((new[0] / (1.0 - new[1])).sqrt() + ZETA), new

    return replace(base, coefficients=coefficients, state=(0.0, 1.0), sized=True)
