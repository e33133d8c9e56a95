"""Normalised one-sided estimate (FZOO): differences to the shared base loss, over the spread of the step's losses.

    c_k = (l(θ + eps·z_k) - l(θ)) / (q·σ),  σ² = mean over k of (l(θ + eps·z_k) - their mean)²

q + 1 forwards per step. eps cancels but for the curvature that the probes meet, and so does the loss's scale: lr is the
size of a step, about lr/√q per number with signs for z. q is at least 2, since one loss has no spread. Where all losses of
a step are equal, σ is 0 and the step is skipped.
Source: FZOO, arXiv 2506.09034, with noise=rademacher there. Deviations: schedules and weight decay apply as everywhere in
zoft (the released code leaves both out); gaussian noise is allowed. A GPU's root may differ from a CPU's in the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoft.method.estimators.estimator import Estimator, total
from zoft.method.estimators.one_sided import count, probes

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(losses: Tensor, q: int, eps: Tensor) -> Tensor:
    """Return c [q] from losses [q + 1], the base loss first."""
    own, n = losses[1:], losses.new_full((), float(q))
    centred = own - total(own) / n  # [q]
    spread = (total(centred * centred) / n).sqrt()
    return (own - losses[0]) / (n * spread)


NORMALISED = Estimator("normalised", probes, coefficients, count, sized=True)
