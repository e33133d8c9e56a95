"""Conservative steps: of θ, θ - lr·ĝ and θ + lr·ĝ a step takes the one whose loss on its own batch is the smallest.

    m = -lr·c;  θ ← argmin of L(θ), L(θ + m·z), L(θ - m·z)

The three losses are a second round of probes along the step's direction, so θ is never moved to be compared: 2 + 3 forwards
per step with two-sided losses. A loss that is not finite counts as +inf. On a tie θ stays, and where θ wins nothing is written.
The ledger has the multiplier that was taken, 0, m or -m, which is all that a replay needs; the three losses are not in it.
Source: ZO-SGD-Cons of ZO-Bench (Zhang et al. 2024, arXiv 2402.11592). Deviations: their released code moves θ by an AdamW step
to each candidate and does not find back; NaN behind the second candidate keeps the third there. One direction only: with
several, the candidates lie along a sum of directions, which no probe has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zoft.method.estimators.estimator import Probe, SecondRound


def probes(multipliers: Sequence[float]) -> list[Probe]:
    """Return θ itself, where the step would go, and as far the other way [3]."""
    (m,) = multipliers
    return [Probe(0, 0.0), Probe(0, m), Probe(0, -m)]


def choose(losses: Sequence[float], multipliers: Sequence[float]) -> list[float]:
    """Return the multiplier [1] of the smallest of the three losses, the first of equal ones."""
    sizes = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return [probes(multipliers)[sizes.index(min(sizes))].scale]


def count(q: int) -> int:
    """Return the number of probes of the second round."""
    return 3


CONSERVATIVE = SecondRound("conservative", probes, choose, count)
