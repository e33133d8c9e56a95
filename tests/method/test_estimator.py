"""Estimators: against slow twins in NumPy and Python, what they estimate, and what the ledger's rows hold of them."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zoft.errors import UserError
from zoft.ledger.log import Record
from zoft.method.estimators.estimator import (
    Estimator,
    Probe,
    clipped,
    finite,
    losses_of,
    projected_gradient,
    rows_of,
    total,
)
from zoft.method.estimators.meazo import meazo
from zoft.method.estimators.named import ESTIMATORS, estimator_of, forwards_per_step
from zoft.method.estimators.one_sided import ONE_SIDED
from zoft.method.estimators.two_sided import TWO_SIDED


def fp64(x):
    return torch.tensor(x, dtype=torch.float64)


def found(estimator, losses, q, eps, state=()):
    c, new = estimator.run(fp64(losses), q, fp64(eps), fp64(list(state)))
    return c.tolist(), new.tolist()


def two_sided(losses, eps, clip=None):
    return found(clipped(TWO_SIDED, clip), losses, max(1, len(losses) // 2), eps)[0]


def one_sided(losses, eps, clip=None):
    return found(clipped(ONE_SIDED, clip), losses, len(losses) - 1, eps)[0]


def by_hand(name, losses, q, eps):
    """A loop over directions in fp64, from the probes' own scales."""
    at = dict(zip(ESTIMATORS[name].probes(q, eps), map(np.float64, losses), strict=True))
    if name == "two_sided":
        return [(at[Probe(k, eps)] - at[Probe(k, -eps)]) / (2.0 * eps * q) for k in range(q)]
    differences = [at[Probe(k, eps)] - at[Probe(0, 0.0)] for k in range(q)]
    if name == "normalised":
        return [d / (q * np.std([at[Probe(k, eps)] for k in range(q)])) for d in differences]
    return [d / (eps * q) for d in differences]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("q", [1, 2, 3, 5, 66])
def test_coefficients_are_those_of_a_loop_to_the_bit(name, q):
    e, rng = ESTIMATORS[name], np.random.default_rng(q)
    for eps in (1e-3, 3e-2, 0.1):
        losses = rng.normal(2.0, 0.1, e.count(q)).tolist()
        got = found(e, losses, q, eps)[0]
        if not e.sized:
            assert got == by_hand(name, losses, q, eps)
        elif q > 1:  # NumPy adds up in another order
            assert got == pytest.approx(by_hand(name, losses, q, eps), rel=1e-13)
        else:
            assert not np.isfinite(got).any()  # one loss has no spread: the step would be skipped
        assert len(e.probes(q, eps)) == e.count(q)


def test_one_direction_is_the_projected_gradient():
    assert two_sided([1.5, 1.0], eps=0.25) == [1.0]
    assert one_sided([1.0, 1.5], eps=0.25) == [2.0]


@pytest.mark.parametrize("q", [1, 2, 5])
def test_a_quadratic(q):
    """Two sides cancel the even terms: c_k = g·z_k / q, whatever eps; one side adds eps/2·z_kᵀ A z_k / q."""
    rng = np.random.default_rng(0)
    a, theta, z = rng.normal(size=(6, 6)), rng.normal(size=6), rng.normal(size=(q, 6))
    a = a @ a.T
    for eps in (1e-1, 1e-3):

        def losses(e, eps=eps):
            points = [theta + p.scale * z[p.direction] for p in e.probes(q, eps)]
            return [float(0.5 * (p @ a @ p)) for p in points]

        slopes, bias = z @ (a @ theta), eps / 2 * np.einsum("ki,ij,kj->k", z, a, z)
        np.testing.assert_allclose(two_sided(losses(TWO_SIDED), eps), slopes / q, rtol=1e-9)
        np.testing.assert_allclose(one_sided(losses(ONE_SIDED), eps), (slopes + bias) / q, rtol=1e-8)


def test_the_mean_over_directions_is_the_gradient():
    rng = np.random.default_rng(1)
    g, z = rng.normal(size=4), rng.choice([-1.0, 1.0], size=(40_000, 4))
    losses = np.stack([z @ g, -(z @ g)], axis=1).ravel() * 1e-3
    np.testing.assert_allclose(np.array(two_sided(losses.tolist(), 1e-3)) @ z, g, atol=0.05)  # |g|/200
    one = [0.0, *(z @ g * 1e-3)]
    np.testing.assert_allclose(np.array(one_sided(one, 1e-3)) @ z, g, atol=0.05)


def test_float64_keeps_what_float32_losses_have():
    plus, minus = float(np.float32(2.3000002)), float(np.float32(2.3))
    assert two_sided([plus, minus], 1e-3) == [(plus - minus) / 2e-3]
    assert one_sided([minus, plus], 1e-3) == [(plus - minus) / 1e-3]


def test_values_that_are_not_finite_come_through_and_are_seen():
    assert math.isnan(two_sided([math.inf, math.inf], 1e-3)[0])
    assert two_sided([math.inf, 0.0, 1.0, 1.0], 1e-3) == [math.inf, 0.0]
    assert one_sided([1.0, math.inf, 1.0], 1e-3) == [math.inf, 0.0]
    assert finite([0.0, -1e300]) and finite([])
    assert not any(finite([1.0, bad]) for bad in (math.nan, math.inf, -math.inf))


def test_an_odd_number_of_losses_is_refused():
    with pytest.raises(AssertionError, match="3 losses"):
        two_sided([1.0, 2.0, 3.0], 1e-3)


def test_a_wrong_number_of_coefficients_is_one_line():
    bad = Estimator("mine", ONE_SIDED.probes, lambda losses, q, eps: losses / eps, ONE_SIDED.count)
    with pytest.raises(UserError, match="estimator=mine: 3 coefficients .* of 2 directions"):
        found(bad, [1.0, 2.0, 3.0], 2, 1e-3)


def test_clipping_limits_each_projected_gradient():
    losses = [3.0, 1.0, 1.0, 1.5, 1.0, 3.0]  # projected gradients 1000, -250, -1000 at eps 1e-3
    assert two_sided(losses, 1e-3, clip=300.0) == pytest.approx([100.0, -250 / 3, -100.0])
    assert two_sided(losses, 1e-3, clip=1e9) == two_sided(losses, 1e-3)
    assert math.isnan(two_sided([math.nan, 1.0], 1e-3, clip=1.0)[0])
    assert one_sided([1.0, 3.0, 1.1], 1e-3, clip=300.0) == pytest.approx([150.0, 50.0])


def test_the_second_moment_is_adams_of_the_projected_gradient():
    rng = np.random.default_rng(2)
    beta = 0.9
    e = meazo(TWO_SIDED, beta)
    state, slopes = e.state, []
    for t in range(1, 20):
        losses = rng.normal(1.0, 0.1, size=4).astype(np.float32).astype(float)
        got, state = found(e, losses.tolist(), 2, 1e-2, state)
        slopes.append(((losses[0] - losses[1]) + (losses[2] - losses[3])) / 4e-2)
        weights = (1 - beta) * beta ** np.arange(t)[::-1]
        root = np.sqrt((weights @ np.square(slopes)) / weights.sum())
        np.testing.assert_allclose(np.sum(got), slopes[-1] / root, rtol=1e-6)


def test_the_second_moment_goes_with_one_side_and_a_limit_is_not_in_it():
    losses = [1.0, 1.5, 0.75]  # slopes 4, -2 of eps 0.125, so c = 2, -1 and g = 1
    plain, v = found(meazo(ONE_SIDED, 0.5), losses, 2, 0.125, (0.0, 1.0))
    assert v == [0.5, 0.5] and plain == pytest.approx([2.0, -1.0], rel=1e-7)
    limited, same = found(meazo(ONE_SIDED, 0.5, clip=3.0), losses, 2, 0.125, (0.0, 1.0))
    assert same == v and limited == pytest.approx([1.5, -1.0], rel=1e-7)
    with pytest.raises(UserError, match="meazo=0.9: estimator=two_sided has a state"):
        meazo(meazo(TWO_SIDED, 0.5), 0.9)


def test_an_estimator_with_a_state_sees_the_losses_that_the_ledger_keeps():
    seen = []

    def coefficients(losses, q, eps, state):
        seen.append(losses.tolist())
        return losses, state + 1.0

    e = Estimator("mine", lambda q, eps: [], coefficients, lambda q: q, (0.0,))
    assert found(e, [0.1, 0.2], 2, 1e-3, (4.0,))[1] == [5.0]
    assert seen == [np.float32([0.1, 0.2]).tolist()]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 66, 1000])
def test_a_total_in_halves(n):
    x = torch.from_numpy(np.random.default_rng(n).normal(size=n))
    assert float(total(x.clone())) == pytest.approx(math.fsum(x.tolist()), rel=1e-12, abs=1e-13)


def test_rows_of_the_ledger():
    """plus and minus of each direction; of one-sided steps the base stands in every row."""
    assert rows_of([1.0, 2.0, 3.0, 4.0], TWO_SIDED.probes(2, 0.1)) == (1.0, 2.0, 3.0, 4.0)
    assert rows_of([0.5, 1.0, 2.0, 3.0], ONE_SIDED.probes(3, 0.1)) == (1.0, 0.5, 2.0, 0.5, 3.0, 0.5)
    lone = [Probe(1, 0.1), Probe(0, 0.1)]  # in any order
    assert rows_of([1.0, 2.0], lone) == (2.0, 2.0, 1.0, 1.0)
    for probes in (TWO_SIDED.probes(3, 0.1), ONE_SIDED.probes(3, 0.1), lone):
        losses = [0.25 * i for i in range(len(probes))]
        assert losses_of(rows_of(losses, probes), probes) == losses
    with pytest.raises(AssertionError, match="3 probes do not fit 1 rows"):
        rows_of([1.0, 2.0, 3.0], [Probe(0, 0.1), Probe(0, -0.1), Probe(0, 0.2)])


def test_the_projected_gradient_of_a_record():
    record = Record(0, (-0.5, 1.0), 1.0, (3.0, 1.0, 2.0, 1.0), False, 0.25)
    assert projected_gradient(record, TWO_SIDED.probes(2, 0.5)) == (2.0 + 1.0) / 2
    assert projected_gradient(record, ONE_SIDED.probes(2, 0.5)) == (4.0 + 2.0) / 2
    # A direction with one loss has no slope of its own: it is what the update used.
    lone = Record(0, (-0.5, 1.0), 1.0, (3.0, 3.0, 2.0, 2.0), False, 0.25)
    assert projected_gradient(lone, [Probe(0, 0.5), Probe(1, 0.5)]) == (0.5 - 1.0) / 0.25


def test_names():
    config = SimpleNamespace(
        recipe="mezo",
        estimator="auto",
        update="auto",
        directions="shared",
        perturb="auto",
        clip=None,
        meazo=0.0,
        q=3,
        batch_size=4,
        accumulate=2,
    )
    assert estimator_of(config) is TWO_SIDED and forwards_per_step(config) == 6 * 8
    config.estimator = "one_sided"
    assert estimator_of(config) is ONE_SIDED and forwards_per_step(config) == 4 * 8
    config.meazo = 0.9
    assert estimator_of(config).state == (0.0, 1.0) and forwards_per_step(config) == 4 * 8
    config.node_inputs = "pass"
    config.perturb = "nodes"  # its update pass is a forward more
    assert forwards_per_step(config) == 5 * 8


def test_estimators_are_there_without_torch():
    code = "import sys, zoft.method.estimators.named; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
