"""Turn rankings of a step's members into coefficients: what is known of whom being better, and by nothing else.

    w_i = #{j known worse than i} - #{j known better}     |E| = the pairs that are strictly ordered
    d = 1/|E| Σ_{(i, j) ∈ E} (x_i - x_j) = 1/|E| Σ_i w_i x_i,     c_k = -Σ_{i along direction k} ± w_i / |E|

Rankings of several prompts add up, in w and in |E|. Members that tie, and such that nothing is known of, order no pair; rankings that
contradict each other cancel. No reward and no eps appears in c, so that lr is the size of a step and every monotone change of a score
gives the same step. The best k in order: those named stand above all others, who tie.
Source: ZO-RankSGD (Tang et al. 2023, arXiv 2303.03751). Deviations: weights sum to 0 (the released code's sum to k, which pulls
towards the ranked points' middle); partial orders and ties; ± pairs where the estimator has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoft.method.estimators.estimator import Probe


@dataclass(frozen=True)
class Order:
    """Hold a ranking: tiers of members, the best first. Members in no tier stand below all tiers, but for unknown ones, which are
    compared with nobody."""

    tiers: tuple[tuple[int, ...], ...]
    unknown: frozenset[int] = frozenset()


def order_of(scores: Sequence[float], best: int | None = None) -> Order:
    """Return the ranking of members by their scores, the larger the better; best: only so many are named, and who ties with them."""
    tiers: list[tuple[int, ...]] = []
    for value in sorted(set(scores), reverse=True):
        if best is not None and sum(map(len, tiers)) >= best:
            break
        tiers.append(tuple(i for i, score in enumerate(scores) if score == value))
    return Order(tuple(tiers))


def weights(orders: Sequence[Order], members: int) -> tuple[list[int], int]:
    """Return (w [members], |E|) of rankings of the same members."""
    total, pairs = [0] * members, 0
    for order in orders:
        place = {i: t for t, tier in enumerate(order.tiers) for i in tier}
        known = [i for i in range(members) if i not in order.unknown]
        level = {i: place.get(i, len(order.tiers)) for i in known}
        counts = [0] * (len(order.tiers) + 1)
        for i in known:
            counts[level[i]] += 1
        above = [sum(counts[:t]) for t in range(len(counts))]
        for i in known:
            below = len(known) - above[level[i]] - counts[level[i]]
            total[i] += below - above[level[i]]
        pairs += sum(counts[t] * above[t] for t in range(len(counts)))
    return total, pairs


def rank_coefficients(w: Sequence[int], pairs: int, probes: Sequence[Probe], directions: int) -> list[float]:
    """Return c [directions] of a step's members; probes: where each of them is. pairs: above 0."""
    c = [0] * directions
    for weight, (direction, scale) in zip(w, probes, strict=True):
        c[direction] += weight * ((scale > 0) - (scale < 0))
    return [0.0 - x / pairs for x in c]
