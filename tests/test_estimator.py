import math

import numpy as np
import pytest

from zoft.estimator import Moment, finite, two_sided


def test_one_direction_is_the_projected_gradient():
    assert two_sided([1.5, 1.0], eps=0.25) == [1.0]


@pytest.mark.parametrize("q", [1, 2, 5])
def test_exact_on_a_quadratic(q):
    """Two sides cancel the even terms: c_k = g·z_k / q, whatever eps."""
    rng = np.random.default_rng(0)
    a, theta, z = rng.normal(size=(6, 6)), rng.normal(size=6), rng.normal(size=(q, 6))
    a = a @ a.T
    for eps in (1e-1, 1e-3):
        losses = [0.5 * (p @ a @ p) for k in range(q) for p in (theta + eps * z[k], theta - eps * z[k])]
        np.testing.assert_allclose(two_sided(losses, eps), z @ (a @ theta) / q, rtol=1e-9)


def test_the_mean_over_directions_is_the_gradient():
    rng = np.random.default_rng(1)
    g, z = rng.normal(size=4), rng.choice([-1.0, 1.0], size=(40_000, 4))
    losses = np.stack([z @ g, -(z @ g)], axis=1).ravel() * 1e-3
    np.testing.assert_allclose(np.array(two_sided(losses, 1e-3)) @ z, g, atol=0.05)  # deviation |g|/200


def test_float64_keeps_what_float32_losses_have():
    plus, minus = float(np.float32(2.3000002)), float(np.float32(2.3))
    assert two_sided([plus, minus], 1e-3) == [(plus - minus) / 2e-3]


def test_values_that_are_not_finite_come_through_and_are_seen():
    assert math.isnan(two_sided([math.inf, math.inf], 1e-3)[0])
    assert two_sided([math.inf, 0.0, 1.0, 1.0], 1e-3) == [math.inf, 0.0]
    assert finite([0.0, -1e300]) and finite([])
    assert not any(finite([1.0, bad]) for bad in (math.nan, math.inf, -math.inf))


def test_an_odd_number_of_losses_is_refused():
    with pytest.raises(AssertionError, match="3 losses"):
        two_sided([1.0, 2.0, 3.0], 1e-3)


def test_clipping_limits_each_projected_gradient():
    losses = [3.0, 1.0, 1.0, 1.5, 1.0, 3.0]  # projected gradients 1000, -250, -1000 at eps 1e-3
    assert two_sided(losses, 1e-3, clip=300.0) == pytest.approx([100.0, -250 / 3, -100.0])
    assert two_sided(losses, 1e-3, clip=1e9) == two_sided(losses, 1e-3)
    assert math.isnan(two_sided([math.nan, 1.0], 1e-3, clip=1.0)[0])


def test_the_second_moment_is_adams_of_the_projected_gradient():
    rng = np.random.default_rng(2)
    moment, beta = Moment(0.9), 0.9
    slopes = []
    for t in range(1, 20):
        losses = rng.normal(1.0, 0.1, size=4).astype(np.float32).astype(float)
        moment.see(losses.tolist(), 1e-2)
        slopes.append(((losses[0] - losses[1]) + (losses[2] - losses[3])) / 4e-2)
        weights = (1 - beta) * beta ** np.arange(t)[::-1]
        root = np.sqrt((weights @ np.square(slopes)) / weights.sum())
        got = moment.scaled(two_sided(losses.tolist(), 1e-2))
        np.testing.assert_allclose(np.sum(got), slopes[-1] / root, rtol=1e-6)
    assert Moment().scaled([1.5]) == [1.5]
