"""Rankings: weights against sums over all pairs, and a bowl that falls by rankings alone."""

import numpy as np
import pytest
import torch

from zoft.method.estimators.estimator import Probe
from zoft.method.ranking import Order, order_of, rank_coefficients, weights


def brute(order, members):
    """All ordered pairs, one by one."""
    w, pairs = [0] * members, 0
    place = {i: t for t, tier in enumerate(order.tiers) for i in tier}
    for i in range(members):
        for j in range(members):
            if i in order.unknown or j in order.unknown:
                continue
            if place.get(i, 999) < place.get(j, 999):
                w[i] += 1
                w[j] -= 1
                pairs += 1
    return w, pairs


def drawn(rng, members):
    order = rng.permutation(members).tolist()
    unknown = frozenset(order[: rng.integers(0, members // 2)])
    rest = [i for i in order if i not in unknown]
    tiers, at = [], 0
    while at < len(rest) and rng.random() < 0.8:
        n = int(rng.integers(1, 4))
        tiers.append(tuple(rest[at : at + n]))
        at += n
    return Order(tuple(tiers), unknown)


def test_weights_are_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    for _ in range(300):
        members = int(rng.integers(2, 12))
        orders = [drawn(rng, members) for _ in range(int(rng.integers(1, 4)))]
        each = [brute(order, members) for order in orders]
        w, pairs = weights(orders, members)
        assert w == [sum(found[0][i] for found in each) for i in range(members)] and sum(w) == 0
        assert pairs == sum(found[1] for found in each)


def test_the_best_k_in_order_have_the_papers_weights():
    m, k = 8, 3
    w, pairs = weights([order_of([float(m - i) for i in range(m)], best=k)], m)
    assert w == [m - 1 - 2 * t for t in range(k)] + [-k] * (m - k)
    assert pairs == k * (k - 1) // 2 + k * (m - k)


def test_contradictions_cancel_and_ties_say_nothing():
    assert weights([Order(((0,), (1,))), Order(((1,), (0,)))], 2) == ([0, 0], 2)
    assert weights([order_of([1.0, 1.0, 1.0])], 3) == ([0, 0, 0], 0)
    assert order_of([1.0, 3.0, 3.0, 2.0], best=1).tiers == ((1, 2),)


@pytest.mark.parametrize("change", [np.exp, lambda x: x**3, lambda x: 2 * x + 7])
def test_monotone_changes_change_nothing(change):
    scores = np.random.default_rng(1).normal(size=9)
    assert order_of(scores.tolist()) == order_of(change(scores).tolist())


@pytest.mark.parametrize("best", [None, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_a_bowl_falls_to_a_hundredth_by_rankings_alone(best, paired):
    """50 dimensions, eight members a step; the step's length shrinks with the steps."""
    rng = torch.Generator().manual_seed(0)
    d, q = 50, 4 if paired else 8
    scales = torch.linspace(0.5, 2, d, dtype=torch.float64)
    bowl = lambda x: float((scales * x * x).sum())  # noqa: E731
    x = torch.ones(d, dtype=torch.float64)
    start, eps, steps = bowl(x), 1e-3, 1500
    probes = [Probe(k, s) for k in range(q) for s in ((eps, -eps) if paired else (eps,))]
    for t in range(steps):
        z = torch.randn(q, d, generator=rng, dtype=torch.float64)
        scores = [-bowl(x + p.scale * z[p.direction]) for p in probes]
        w, pairs = weights([order_of(scores, best)], len(probes))
        c = rank_coefficients(w, pairs, probes, q)
        x = x - 0.1 * (1 - t / steps) * (torch.tensor(c, dtype=torch.float64)[:, None] * z).sum(0)
    assert bowl(x) < 0.01 * start
