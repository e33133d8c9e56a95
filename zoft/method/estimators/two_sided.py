"""Two-sided SPSA, the default: each direction is probed at +eps and at -eps.

    c_k = (l(θ + eps·z_k) - l(θ - eps·z_k)) / (2·eps·q)

2q forwards per step. Even terms of the loss cancel, so the error of a slope is O(eps²).
Source: Spall 1992; Malladi et al. 2023 (MeZO, arXiv 2305.17333), definition 1 and its n-SPSA. No deviations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoft.method.estimators.estimator import Estimator, Probe

if TYPE_CHECKING:
    from torch import Tensor


def probes(q: int, eps: float) -> list[Probe]:
    """Return (+, -) of each direction in turn [2q]."""
    return [Probe(k, scale) for k in range(q) for scale in (eps, -eps)]


def coefficients(losses: Tensor, q: int, eps: Tensor) -> Tensor:
    """Return c [q] from losses [2q]."""
    # eps·(2q), rounded once, has the bits of 2·eps·q, and is one kernel.
    return (losses[0::2] - losses[1::2]) / (eps * (2.0 * q))


def count(q: int) -> int:
    """Return the number of probes per step."""
    return 2 * q


TWO_SIDED = Estimator("two_sided", probes, coefficients, count)
