import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from zoft.errors import UserError
from zoft.method.estimators.estimator import finite
from zoft.method.space import Trained
from zoft.method.updates import (
    advance_trained,
    decay_is_lost,
    lr_at,
    make_update,
    mark_advanced,
    pending_updates,
)
from zoft.noise.noise import direction
from zoft.noise.spec import Update, tensor_id

SEED = 12


def trained(theta: torch.Tensor, decays: bool = True, name: str = "w") -> Trained:
    return Trained(name, nn.Parameter(theta), theta, theta.dtype, tensor_id(name), decays)


def z(t: Trained, step: int, k: int = 0, noise: str = "gaussian") -> torch.Tensor:
    return direction(t.stored.shape, t.id, seed=SEED, step=step, direction=k, noise=noise).to(t.stored.dtype)


def weights(dtype=torch.float64, n: int = 300) -> torch.Tensor:
    return torch.linspace(-2, 2, n, dtype=torch.float64).to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


# ---- schedules ---------------------------------------------------------------------------------------------


def test_constant_and_warm_up():
    rates = [lr_at(s, lr=0.8, steps=10, schedule="constant", warmup=4) for s in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 7, rel=1e-15)
    assert [lr_at(s, lr=0.8, steps=10, schedule="constant", warmup=0) for s in (0, 9, 99)] == [0.8] * 3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("w", [0, 5])
def test_decay_agrees_with_torchs_schedulers(schedule, w):
    steps, lr = 25, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    if schedule == "linear":
        theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps - w)
    else:
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - w)
    for step in range(w, steps + 1):
        got = lr_at(step, lr=lr, steps=steps, schedule=schedule, warmup=w)
        assert got == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        assert got > 0 or step == steps
        optimizer.step()
        theirs.step()
    assert lr_at(steps + 7, lr=lr, steps=steps, schedule=schedule, warmup=w) == 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_lr_then_never_rises(schedule):
    rates = [lr_at(s, lr=1.0, steps=40, schedule=schedule, warmup=8) for s in range(40)]
    assert rates[0] == 1 / 8 and rates[7] == rates[8] == 1.0
    assert all(a < b for a, b in pairwise(rates[:8])) and all(a >= b > 0 for a, b in pairwise(rates[8:]))


@pytest.mark.parametrize(("warmup", "w"), [(0.1, 3), (0.001, 1), (0.5, 15), (0.11, 4), (1, 1), (2.0, 2)])
def test_warm_up_as_a_fraction_of_the_steps(warmup, w):
    for step in range(30):
        sizes = {"lr": 1.0, "steps": 30, "schedule": "cosine"}
        assert lr_at(step, warmup=warmup, **sizes) == lr_at(step, warmup=w, **sizes)
    assert lr_at(0, lr=1.0, steps=30, schedule="constant", warmup=warmup) == 1 / w


def test_warm_up_that_fills_or_outlasts_the_run():
    assert lr_at(9, lr=1.0, steps=10, schedule="linear", warmup=10) == 1.0
    assert lr_at(10, lr=1.0, steps=10, schedule="linear", warmup=10) == 0.0
    assert lr_at(9, lr=1.0, steps=10, schedule="cosine", warmup=20) == 0.5


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="constant, linear, cosine"):
        lr_at(0, lr=1.0, steps=10, schedule="cosin", warmup=0)
    for warmup in (1.5, -1, -0.1):
        with pytest.raises(UserError, match="warmup="):
            lr_at(0, lr=1.0, steps=10, schedule="linear", warmup=warmup)


# ---- the numbers of an update ------------------------------------------------------------------------------


def test_numbers_are_rounded_once_to_fp32():
    coefficients, lr, wd = [0.1234567890123, -7.7e5, 0.0], 3.3e-5, 0.7
    u = make_update(4, SEED, coefficients, lr=lr, weight_decay=wd)
    assert (u.step, u.seed) == (4, SEED)
    assert all(type(m) is float for m in (*u.multipliers, u.decay))
    for got, exact in zip(
        (*u.multipliers, u.decay), [*(-lr * c for c in coefficients), 1 - lr * wd], strict=True
    ):
        above, below = (float(np.nextafter(np.float32(got), np.float32(to))) for to in (np.inf, -np.inf))
        assert got == float(np.float32(got))
        assert abs(got - exact) <= min(abs(above - exact), abs(below - exact))


def test_lr_0_is_a_no_op_and_an_overflow_is_seen():
    assert make_update(0, SEED, [3.0, -2.0], lr=0.0, weight_decay=0.1).is_noop
    assert not finite(make_update(0, SEED, [1e30, 1.0], lr=1e10).multipliers)
    assert not finite(make_update(0, SEED, [math.nan], lr=1e-3).multipliers)


def test_a_decay_that_rounds_away_is_told():
    for lr, wd in [
        (1e-6, 0.01),
        (1e-6, 0.1),
        (1e-3, 0.1),
        (1e-2, 0.0),
        (0.0, 0.1),
        (3e-8, 1.0),
        (2.9e-8, 1.0),
    ]:
        kept = make_update(0, SEED, [0.0], lr=lr, weight_decay=wd).decay < 1
        assert decay_is_lost(lr, wd) == (lr * wd > 0 and not kept)
    assert decay_is_lost(1e-6, 0.01) and not decay_is_lost(1e-3, 0.1)


# ---- bringing a tensor there -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("wd", [0.0, 0.5])
def test_constant_lr_is_torchs_sgd(noise, beta, wd):
    """fp64, and numbers that fp32 holds: the same gradients Σ c_k z_k through torch.optim.SGD."""
    lr, steps, coefficients = 2**-6, 12, [[0.5 * (-1) ** s, 0.25 + s / 8] for s in range(12)]
    t = trained(weights())
    theirs = nn.Parameter(weights())
    optimizer = torch.optim.SGD([theirs], lr=lr, momentum=beta)
    for s in range(steps):
        theirs.grad = sum(c * z(t, s, k, noise) for k, c in enumerate(coefficients[s]))
        with torch.no_grad():
            theirs *= 1 - lr * wd
        optimizer.step()
    updates = [make_update(s, SEED, coefficients[s], lr=lr, weight_decay=wd) for s in range(steps)]
    advance_trained(t, updates, noise, beta)
    torch.testing.assert_close(t.stored, theirs.data, rtol=0, atol=1e-13)
    assert (t.momentum is not None) == (beta > 0) and t.step == steps


def test_closed_form_of_momentum_under_a_schedule():
    """θ = θ0 + Σ_s a_s z_s (1 + β + … + β^(T-1-s)): each direction keeps the lr of its own step."""
    beta, steps = 0.75, 6
    t = trained(weights())
    updates = [
        make_update(s, SEED, [1.0], lr=lr_at(s, lr=2**-4, steps=8, schedule="linear", warmup=0))
        for s in range(steps)
    ]
    advance_trained(t, updates, "gaussian", beta)
    expected = weights()
    for s in range(steps):
        expected += -(2**-4) * (1 - s / 8) * (1 - beta ** (steps - s)) / (1 - beta) * z(t, s)
    torch.testing.assert_close(t.stored, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_how_updates_are_cut_into_calls_changes_no_bit(dtype, beta):
    c = [[0.0, 0.0], [0.3, -0.1], [0.0, 0.0], [0.7, 0.2], [-0.4, 0.9], [0.0, 0.0], [0.1, 0.1]]
    updates = [
        make_update(s, SEED, c[s], lr=2e-2, weight_decay=0.1 * (s == 4)) for s in (0, 1, 2, 4, 5, 6)
    ]  # 3 skipped
    whole = trained(weights(dtype))
    advance_trained(whole, updates, "gaussian", beta)
    for cuts in ([1, 2, 3, 4, 5], [2], [3, 4]):
        parts = trained(weights(dtype))
        for a, b in pairwise([0, *cuts, len(updates)]):
            advance_trained(parts, updates[a:b], "gaussian", beta)
        assert torch.equal(bits(parts.stored), bits(whole.stored)) and parts.step == whole.step == 7
        if beta:
            assert torch.equal(bits(parts.momentum), bits(whole.momentum))
    before = bits(whole.stored).clone()
    advance_trained(whole, updates, "gaussian", beta)  # all behind it
    assert torch.equal(bits(whole.stored), before)


def test_only_the_steps_ahead_are_applied():
    updates = [make_update(s, SEED, [1.0], lr=2**-5) for s in range(4)]
    t = trained(weights())
    t.step = 2
    advance_trained(t, updates, "gaussian")
    torch.testing.assert_close(t.stored, weights() - 2**-5 * (z(t, 2) + z(t, 3)), rtol=0, atol=1e-14)
    assert t.step == 4
    advance_trained(t, [], "gaussian")
    mark_advanced(t, updates[:1])
    assert t.step == 4
    with pytest.raises(AssertionError, match="out of order"):
        advance_trained(t, updates[::-1], "gaussian")


def test_decay_spares_the_tensors_it_must():
    updates = [make_update(s, SEED, [0.0], lr=0.5, weight_decay=0.5) for s in range(3)]
    decayed, spared = trained(weights()), trained(weights(), decays=False)
    for t in (decayed, spared):
        advance_trained(t, updates, "gaussian")
    torch.testing.assert_close(decayed.stored, weights() * 0.75**3, rtol=1e-15, atol=0)
    assert torch.equal(bits(spared.stored), bits(weights())) and spared.step == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_lr_0_writes_nothing_with_momentum_too(dtype, beta):
    theta = torch.tensor([-0.0, 0.0, 1.0, -3.0, 2**-24, math.nan]).to(dtype)
    t = trained(theta.clone())
    for s in range(200):
        advance_trained(t, [make_update(s, SEED, [0.7, -0.3], lr=0.0, weight_decay=0.1)], "gaussian", beta)
    assert torch.equal(bits(t.stored), bits(theta)) and t.momentum is None and t.step == 200


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_zero_step_still_coasts_on_momentum_and_a_skipped_one_does_not(dtype):
    first, zero = make_update(0, SEED, [1.0], lr=0.25), make_update(1, SEED, [0.0], lr=0.25)
    assert zero.is_noop
    t = trained(weights(dtype))
    push = -0.25 * z(t, 0)
    advance_trained(t, [first], "gaussian", 0.5)
    torch.testing.assert_close(t.stored, weights(dtype) + push)
    advance_trained(t, [zero], "gaussian", 0.5)
    torch.testing.assert_close(t.stored, weights(dtype) + 1.5 * push)
    torch.testing.assert_close(t.momentum, 0.5 * push)

    skipped = trained(
        weights(dtype)
    )  # step 1 had a loss that was not finite: the ledger gives no update for it
    last = make_update(2, SEED, [1.0], lr=0.25)
    advance_trained(skipped, [first, last], "gaussian", 0.5)
    torch.testing.assert_close(skipped.momentum, 0.5 * push - 0.25 * z(t, 2))
    assert skipped.step == 3


def test_due_says_what_a_fused_pass_must_apply():
    updates = [Update(s, SEED, (0.5 * (s == 1),), 0.5 if s == 3 else 1.0) for s in range(4)]
    plain = trained(weights())
    assert pending_updates(plain, updates, 0.0) == [updates[1], updates[3]] and plain.momentum is None
    heavy = trained(weights(torch.float16), decays=False)
    assert pending_updates(heavy, updates[:1], 0.9) == [] and heavy.momentum is None
    assert pending_updates(heavy, updates, 0.9) == [*updates[1:3], Update(3, SEED, (0.0,), 1.0)]
    assert heavy.momentum.dtype == torch.float32 and heavy.momentum.shape == heavy.stored.shape
    assert heavy.step == 0 and not heavy.momentum.any()
