"""One-sided SPSA: each direction is probed at +eps, and all directions share one loss of θ itself.

    c_k = (l(θ + eps·z_k) - l(θ)) / (eps·q)

q + 1 forwards per step, where two-sided takes 2q. The loss's curvature along z_k does not cancel: a slope has the bias
eps/2·z_kᵀHz_k, which is O(eps) where two-sided has O(eps²), so eps should be smaller than there.
Source: the one-sided form of SPSA (Spall 1992); Duchi et al. 2015 (arXiv 1312.2139), the two-point estimate
(f(x + u·z) - f(x))/u·z; the forward difference of ZO-Bench (arXiv 2402.11592). Deviation: the base loss is shared by
the step's q directions, so their errors are not independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoft.method.estimators.estimator import Estimator, Probe

if TYPE_CHECKING:
    from torch import Tensor


def probes(q: int, eps: float) -> list[Probe]:
    """Return θ itself, then + of each direction [q + 1].

    θ comes first: it is made in one pass with direction 0, and in place it needs no way back.
    """
    return [Probe(0, 0.0), *(Probe(k, eps) for k in range(q))]


def coefficients(losses: Tensor, q: int, eps: Tensor) -> Tensor:
    """Return c [q] from losses [q + 1]."""
    return (losses[1:] - losses[0]) / (eps * float(q))


def count(q: int) -> int:
    """Return the number of probes per step."""
    return q + 1


ONE_SIDED = Estimator("one_sided", probes, coefficients, count)
