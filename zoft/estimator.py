"""Losses of the probes -> one coefficient a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ZETA = 1e-8  # keeps the division of `Moment.scaled` finite


@dataclass
class Moment:
    """The second moment of the projected gradient, one number for all weights (MEAZO, arXiv 2605.03869).

    v ← beta·v + (1 - beta)·g²,  g = Σ_k c_k of a step;  c_k ← c_k / (sqrt(v / (1 - betaᵗ)) + 1e-8)

    So a step has the size lr·z whatever the loss's scale. beta = 0 keeps nothing and changes nothing. g is made of the
    losses as the ledger keeps them, in fp32, so that a resumed run has the same v. The paper's beta was not to be had.
    """

    beta: float = 0.0
    v: float = 0.0
    power: float = 1.0  # betaᵗ

    def see(self, losses: Sequence[float], eps: float) -> None:
        """Take in a step's losses [2q], fp32 values; steps that are skipped are not to be seen."""
        g = 0.0
        for c in two_sided(losses, eps):
            g += c
        self.v = self.beta * self.v + (1.0 - self.beta) * (g * g)
        self.power *= self.beta

    def scaled(self, coefficients: Sequence[float]) -> list[float]:
        """The coefficients after `see`."""
        if not self.beta:
            return list(coefficients)
        return [c / (math.sqrt(self.v / (1.0 - self.power)) + ZETA) for c in coefficients]


def two_sided(losses: Sequence[float], eps: float, clip: float | None = None) -> list[float]:
    """The projected gradient of each direction over q, so that Σ_k c_k·z_k estimates the gradient (SPSA).

    c_k = (l(θ + eps·z_k) - l(θ - eps·z_k)) / (2·eps·q);  with clip, at most ±clip/q

    losses: [2q], (+, -) of each direction in turn; eps > 0. All in float64.
    Losses that are not finite give what arithmetic makes of them: ask `finite` first.
    clip: limit of the size of each projected gradient; the estimate is biased where it bites (QZO, arXiv 2505.13430).
    Source: Spall 1992; Malladi et al. 2023 (MeZO), definition 1 and its n-SPSA.
    """
    assert len(losses) >= 2 and len(losses) % 2 == 0, f"{len(losses)} losses, not two a direction"
    values = [float(loss) for loss in losses]
    q = len(values) // 2
    slopes = [
        (plus - minus) / (2.0 * eps * q) for plus, minus in zip(values[0::2], values[1::2], strict=True)
    ]
    if clip is None:
        return slopes
    most = clip / q
    return [s if math.isnan(s) else max(-most, min(most, s)) for s in slopes]


def finite(values: Sequence[float]) -> bool:
    """Whether no value is NaN or infinite: to be asked of a step's losses, and of its multipliers."""
    return all(math.isfinite(value) for value in values)
