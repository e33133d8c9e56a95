"""Losses of the probes -> one coefficient a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
    slopes = [(plus - minus) / (2.0 * eps * q) for plus, minus in zip(values[0::2], values[1::2], strict=True)]
    if clip is None:
        return slopes
    most = clip / q
    return [s if math.isnan(s) else max(-most, min(most, s)) for s in slopes]


def finite(values: Sequence[float]) -> bool:
    """Whether no value is NaN or infinite: to be asked of a step's losses, and of its multipliers."""
    return all(math.isfinite(value) for value in values)
