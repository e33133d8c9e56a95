"""zoft.noise on a CPU against the slow twin, published vectors and statistics."""

import ast
import inspect
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import noise_twin as twin
import numba
import numpy as np
import pytest
import torch

from zoft.noise import cpu, distributions, kernels, noise, spec, storage
from zoft.noise.spec import GAUSSIAN, GAUSSIAN_BOUND, NOTHING, RADEMACHER, RANK1, Mask, Update, tensor_id

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 3, 4, 127, 129, 1000, 2049, 4200)
SEED, STEP, TID = 0x1234_5678_9ABC, 7, 0xDEADBEEF


def drawn(n, direction=0, step=STEP, kind=GAUSSIAN, tid=TID, seed=SEED, **keywords):
    return noise.direction((n,), tid, seed=seed, step=step, direction=direction, noise=kind, **keywords)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def weights(n, dtype, seed=0):
    """Weights of all sizes, subnormals of fp16 among them, both zeros too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 7)
    x[1::17], x[2::19] = 0.0, -0.0
    return x.to(dtype)


# ---- generator -----------------------------------------------------------------------------------------------------

KNOWN = [  # Random123's known-answer vectors for philox4x32-10
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@numba.njit
def compiled_philox(start, n, tid, purpose, k0, k1):
    words = np.empty(2 * n, np.uint64)
    distributions.philox(words, start, n, tid, purpose, k0, k1)
    return words.view(np.uint32)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    expected = tuple(int(word, 16) for word in words.split())
    assert spec.philox(counter, key) == expected
    assert tuple(twin.philox(counter, key)) == expected
    start = np.uint64(counter[0] | counter[1] << 32)
    compiled = compiled_philox(start, 1, counter[2], counter[3], np.uint32(key[0]), np.uint32(key[1]))
    assert tuple(compiled) == expected


def test_key():
    for seed, step, direction in ((0, 0, 0), (2**64 - 1, 2**40 + 3, 5), (SEED, STEP, 1)):
        assert spec.key(seed, step, direction) == twin.key(seed, step, direction)
    assert len({spec.key(s, t, d) for s in range(4) for t in range(4) for d in range(4)}) == 64


GOLDEN_ID = 0xAC43D4FC  # of "model.embed_tokens.weight"
GOLDEN = [  # seed, step, direction, name, element -> key, 4 gaussians from there, 32 signs from there as bits
    (
        (0, 0, 0, "w", 0),
        (0x4D0AA3B9, 0x7A38EEB0),
        (0x3F096618, 0xBF434F5C, 0xBF4243B9, 0xBE88FBC2),
        0xA5B0D8FA,
    ),
    (
        (1234567, 19999, 1, "model.layers.3.mlp.up_proj.weight", 12345),
        (0x6424B4AF, 0x60067258),
        (0x404FCE7E, 0xBFB093B2, 0x3FAAA265, 0xBF2164A8),
        0x96242968,
    ),
    (
        (2**63 + 5, 2**32 + 1, 7, "lm_head.weight", 2**20),
        (0x1BD6F2DD, 0xB4DD933C),
        (0xBE6F85DE, 0x3F68C052, 0x3F226347, 0xBEBF5AFE),
        0xAF653131,
    ),
]
GOLDEN_BF16 = (
    0x3F80,
    0x3F81,
    0x3F80,
    0x3F7F,
    0x3F80,
    0x3F7F,
    0x3F81,
    0x3F80,
)  # 1 + 0.004·z rounded, tensor "w"
GOLDEN_FP16 = (0x1F7, 0x1F8, 0x1F7, 0x1F7, 0x1F7, 0x1F6, 0x1F8, 0x1F7)  # 3e-5 + 2⁻²⁵·z, a subnormal


def test_golden_values():
    """Frozen: whoever changes one of these makes every ledger that was ever written unreadable."""
    assert tensor_id("model.embed_tokens.weight") == GOLDEN_ID
    for (seed, step, direction, name, at), key, gaussian, signs in GOLDEN:
        where = {"seed": seed, "step": step, "direction": direction}
        tid = tensor_id(name)
        assert spec.key(seed, step, direction) == key
        z = noise.direction((at + 4,), tid, noise=GAUSSIAN, **where)[at:]
        assert tuple(z.numpy().view(np.uint32)) == gaussian
        z = noise.direction((at + 32,), tid, noise=RADEMACHER, **where)[at:]
        assert sum(1 << i for i, sign in enumerate(z.tolist()) if sign > 0) == signs
    for dtype, value, multiplier, bits in (
        (torch.bfloat16, 1.0, 0.004, GOLDEN_BF16),
        (torch.float16, 3e-5, 2.0**-25, GOLDEN_FP16),
    ):
        theta = torch.full((8,), value, dtype=dtype)
        noise.advance(theta, tensor_id("w"), [Update(3, 5, (multiplier,))], RADEMACHER)
        assert tuple(theta.view(torch.int16).tolist()) == bits


# ---- distributions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_direction_is_the_specification(n):
    for direction in (0, 3):
        key = twin.key(SEED, STEP, direction)
        exact = twin.z(np.arange(n), TID, key, RADEMACHER)
        assert np.array_equal(twin.numbers(drawn(n, direction, kind=RADEMACHER)), exact)
        exact = twin.z(np.arange(n), TID, key, GAUSSIAN)
        assert np.abs(twin.numbers(drawn(n, direction)) - exact).max() <= GAUSSIAN_BOUND


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("start", (5, 2**31 - 70, 2**32 - 1, 2**34 - 129, 2**39 + 77))
def test_elements_far_out(kind, start):
    """The element index has 64 bits."""
    part, n = start // 128 * 128, 428
    out, where = torch.empty(1, n), {"seed": SEED, "step": STEP, "noise": kind}
    noise.perturb(torch.zeros(n), TID, out, [(2, 1.0)], start=part, **where)
    exact = twin.z(np.arange(part, part + n), TID, twin.key(SEED, STEP, 2), kind)
    assert np.abs(out[0].numpy() - exact).max() <= (GAUSSIAN_BOUND if kind == GAUSSIAN else 0)


@numba.njit
def factors(upper, lower):
    """Radii of words with these upper halves; cosines and sines of words with these lower halves."""
    radius, cosine, sine = (
        np.empty(2**16, np.float32),
        np.empty(2**16, np.float32),
        np.empty(2**16, np.float32),
    )
    for i in range(2**16):
        radius[i] = distributions.radius(upper[i])
        cosine[i], sine[i] = distributions.half_turn(lower[i])
    return radius, cosine, sine


@numba.njit
def pairs(words):
    out = np.empty((len(words), 2), np.float32)
    for i in range(len(words)):
        out[i] = distributions.gaussian_pair(words[i])
    return out


def test_gaussian_of_every_word():
    """All 2³² of them: what a word makes is one of 65,536 radii times one of 65,536 angles."""
    half = np.arange(2**16, dtype=np.uint32)
    u = np.array([twin.uniform(int(k) << 16) for k in half])
    v = np.array([twin.turn(int(j)) for j in half])
    assert u.min() == 1 - u.max() == 2.0**-17 and v.min() == -v.max() == 2.0**-17 - 0.5
    exact_radius = np.sqrt(-2 * np.log(u))
    back = np.where(v < 0, -1, 1)  # half_turn's angle is v or, for v < 0, v + ½
    exact = np.stack([np.cos(2 * np.pi * v) * back, np.sin(2 * np.pi * v) * back])
    radius, *angle = factors(half << 16 | half[::-1], half * 65537)
    angle = np.stack(angle)
    error = np.abs(radius - exact_radius)
    assert error.max() < 4.5e-7 and np.abs(angle - exact).max() < 1.5e-7
    # z = fl(radius·angle): a bound for every radius, and where it is not good enough all the products
    bound = error + exact_radius * np.abs(angle - exact).max() + np.spacing(radius) / 2
    tight = bound > GAUSSIAN_BOUND
    assert 0 < tight.sum() < 1000
    for r, e in zip(radius[tight], exact_radius[tight]):
        assert np.abs((r * angle).astype(np.float64) - e * exact).max() <= GAUSSIAN_BOUND
    assert 1.8e-7 < radius.min() * np.abs(angle).min() and radius.max() * angle.max() < 4.8546  # never 0
    # and the pairs are these products: every upper half, every lower half
    words = np.concatenate([half << 16 | half * 40503 & 0xFFFF, half * 30011 << 16 | half])
    k, j = words >> 16, words & 0xFFFF
    assert np.array_equal(pairs(words), (radius[k] * angle[:, j] * back[j].astype(np.float32)).T)


def test_moments_of_every_word():
    """The numbers that the specification states, summed over all words."""
    half = np.arange(2**16, dtype=np.uint32)
    radius, cosine, sine = (x.astype(np.float64) for x in factors(half << 16, half))
    for angle in (cosine, sine):
        assert abs((radius**2).mean() * (angle**2).mean() - (1 - 5.29e-6)) < 1e-7
        assert abs((radius**4).mean() * (angle**4).mean() - 2.99979) < 1e-5
    for threshold, short in ((3.0, 3.1e-5), (4.0, 1.73e-3)):
        far = radius[radius > threshold]
        beyond = sum(np.count_nonzero(np.abs(cosine) > threshold / r) for r in far) / 2**32
        assert abs(1 - beyond / math.erfc(threshold / math.sqrt(2)) - short) < 0.05 * short


def test_gaussian_is_gaussian():
    n = 1 << 20
    z = drawn(n).double()
    moments = [(z**k).mean().item() for k in (1, 2, 3, 4)]
    spread = [1, 2, 15, 96]  # variances of z, z², z³, z⁴
    for moment, exact, variance in zip(moments, (0, 1, 0, 3), spread):
        assert abs(moment - exact) < 4 * math.sqrt(variance / n)
    cdf = torch.special.ndtr(z.sort().values)
    grid = torch.arange(n, dtype=torch.float64) / n
    kolmogorov = max((cdf - grid).max().item(), (grid + 1 / n - cdf).max().item())
    assert (
        kolmogorov * math.sqrt(n) < 1.95
    )  # one in a thousand would be above; the grid of 16 bits is worth 0.0006
    for threshold in (3.0, 4.0):  # short of a normal one by 0.1 at most
        expected = n * math.erfc(threshold / math.sqrt(2))
        assert abs((z.abs() > threshold).sum().item() - expected) < 4 * math.sqrt(expected)
    assert z.abs().max() < 4.8546


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
def test_everything_that_differs_is_independent(kind):
    n = 1 << 16
    draws = [
        drawn(n, kind=kind),
        drawn(n, kind=kind, direction=1),
        drawn(n, kind=kind, step=STEP + 1),
        drawn(n, kind=kind, step=STEP + 2**32),
        drawn(n, kind=kind, seed=SEED + 1),
        drawn(n, kind=kind, seed=SEED + 2**32),
        drawn(n, kind=kind, tid=TID + 1),
        drawn(n + 128, kind=kind)[128:],
        drawn(n + 1, kind=kind)[1:],
        drawn(n + 2, kind=kind)[2:],
    ]
    gram = torch.stack(draws).double().corrcoef() - torch.eye(len(draws))
    assert gram.abs().max() * math.sqrt(n) < 4.5
    squares = (torch.stack(draws).double() ** 2).corrcoef() if kind == GAUSSIAN else torch.eye(len(draws))
    assert (squares - torch.eye(len(draws))).abs().max() * math.sqrt(n) < 4.5


# ---- updates -------------------------------------------------------------------------------------------------------

UPDATES = (
    Update(STEP, SEED, (1e-3,)),
    Update(STEP + 1, SEED, (0.0, -0.0)),  # a no-op
    Update(STEP + 2, SEED, (-3e-4, 2e-4, 0.0), decay=float(np.float32(0.999))),
    Update(2**33, SEED, (0.25,), decay=0.5),
)


@pytest.mark.parametrize("with_momentum", (False, True))
@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (3, 1000, 4200))
def test_advance_is_the_twin_bit_for_bit(n, dtype, kind, with_momentum):
    before = weights(n, dtype)
    theta = before.clone()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    momentum = weights(n, wide, seed=1) if with_momentum else None
    expected, buffer = twin.advance(
        before,
        lambda u, k: drawn(n, k, u.step, kind).numpy(),
        lambda u: twin.rounding_bits(np.arange(n), TID, twin.key(u.seed, u.step, 0)),
        UPDATES,
        momentum,
        0.9,
    )
    noise.advance(theta, TID, UPDATES, kind, momentum=momentum, beta=0.9)
    assert np.array_equal(twin.numbers(theta), expected)
    assert not np.array_equal(twin.numbers(theta), twin.numbers(before))
    if momentum is not None:
        assert np.array_equal(twin.numbers(momentum), twin.numbers(torch.from_numpy(buffer)))


RESTORES = (  # in-place probing: there and back, with an update on the way, with a no-op, with nothing
    spec.move(SEED, STEP, 0, 0.01),
    spec.move(SEED, STEP, 0, -0.02),
    Update(STEP, SEED, (3e-3,), restore=0.01),
    spec.move(SEED, STEP + 1, 2, -0.5),
    Update(STEP + 1, SEED, (1e-3, 0.0, -2e-3), 0.75, 0.5),
    spec.move(SEED, STEP + 2, 1, 3e-8),
    Update(STEP + 2, SEED, (0.0, -0.0), restore=-3e-8),
    spec.move(SEED, STEP + 3, 0, 0.25),
    Update(STEP + 3, SEED, (7.0,), NOTHING, -0.25),
    Update(STEP + 4, SEED, (7.0,), NOTHING),
    Update(STEP + 5, SEED, (), 0.5),
    spec.move(SEED, STEP + 6, 0, 0.125),
)


@pytest.mark.parametrize("beta", (None, 0.0, 0.9))
@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("dtype", DTYPES)
def test_restores_are_the_twins_bit_for_bit(dtype, kind, beta):
    n = 500
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    before = weights(n, dtype)
    momentum = None if beta is None else weights(n, wide, seed=1)
    for upto in (7, len(RESTORES)):
        theta, buffer = before.clone(), None if momentum is None else momentum.clone()
        expected, twins = twin.advance(
            before,
            lambda u, k: drawn(n, k, u.step, kind).numpy(),
            lambda u: twin.rounding_bits(np.arange(n), TID, twin.key(u.seed, u.step, 0)),
            RESTORES[:upto],
            momentum,
            beta or 0.0,
        )
        noise.advance(theta, TID, RESTORES[:upto], kind, momentum=buffer, beta=beta or 0.0)
        assert np.array_equal(twin.numbers(theta), expected), upto
        if buffer is not None:
            assert np.array_equal(twin.numbers(buffer), twin.numbers(torch.from_numpy(twins)))


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_with_restore_update_and_move_is_as_many_passes(dtype, kind):
    whole, pieces = weights(3000, dtype), weights(3000, dtype)
    noise.advance(whole, TID, RESTORES, kind)
    for u in RESTORES:
        if u.is_nothing and u.restore:
            probe = [(len(u.multipliers) - 1, u.restore)]
            noise.perturb(pieces, TID, pieces[None], probe, seed=u.seed, step=u.step, noise=kind)
        else:
            noise.advance(pieces, TID, [u], kind)
    assert same_bits(whole, pieces)
    fused, (update, end) = weights(3000, dtype), RESTORES[2:4]
    where = {"seed": SEED, "step": end.step, "noise": kind}
    noise.perturb(fused, TID, fused[None], [(2, end.restore)], updates=[update], **where)
    apart = weights(3000, dtype)
    noise.advance(apart, TID, [update], kind)
    noise.perturb(apart, TID, apart[None], [(2, end.restore)], **where)
    assert same_bits(fused, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_updates_at_once_or_one_by_one(dtype):
    at_once, one_by_one = weights(3000, dtype), weights(3000, dtype)
    noise.advance(at_once, TID, UPDATES, GAUSSIAN)
    for u in UPDATES:
        noise.advance(one_by_one, TID, [u], GAUSSIAN)
    assert same_bits(at_once, one_by_one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_no_op_writes_nothing(dtype):
    theta = weights(400, dtype)
    bits = theta.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[theta.element_size()])
    bits[7] = -1  # a NaN with a payload
    bits[8] = torch.iinfo(bits.dtype).min  # -0.0
    before, momentum = (
        theta.clone(),
        torch.ones(400, dtype=torch.float64 if dtype is torch.float64 else torch.float32),
    )
    nothing = [Update(1, 0, (0.0, -0.0)), Update(2, 0, ())]
    assert all(u.is_noop for u in nothing)
    out = torch.empty(1, 400, dtype=dtype)
    noise.advance(theta, TID, nothing, GAUSSIAN)
    noise.advance(theta, TID, nothing, GAUSSIAN, momentum=momentum, beta=0.0)
    noise.perturb(theta, TID, out, [(0, 1e-3)], seed=0, step=3, noise=GAUSSIAN, updates=nothing)
    assert same_bits(theta, before) and (momentum == 1).all()
    assert not Update(1, 0, (0.0,), decay=0.5).is_noop


def test_decay_without_directions():
    theta, momentum = weights(300, torch.float32), torch.full((300,), 2.0)
    expected = 0.5 * theta + 0.5 * momentum
    noise.advance(theta, TID, [Update(1, 0, (), decay=0.5)], GAUSSIAN, momentum=momentum, beta=0.5)
    assert torch.equal(theta, expected) and (momentum == 1).all()


# ---- rounding ------------------------------------------------------------------------------------------------------

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0**-24,
    2.0**-25,
    2.0**-26,
    2.0**-14,
    2.0**-14 - 2.0**-25,
    6e-5,
    1e-7,
    1e-30,
    1e-42,
]
SPECIAL += [
    65504.0,
    65519.0,
    65519.996,
    65520.0,
    7e4,
    1e30,
    3.38e38,
    3.4028235e38,
    math.inf,
    -math.inf,
    math.nan,
]
SPECIAL += [-3.3e-6, -0.1, 1 / 3, 2047.5, 2048.5, 2.0**-126, 2.0**-133, -(2.0**-149)]


@numba.njit
def rounded(x, r, out):
    """out [4, n]: fp16 and bf16, nearest and stochastic (for finite x)."""
    for i in range(len(x)):
        out[0, i] = storage.to_fp16(x[i])
        out[1, i] = storage.to_bf16(x[i])
        out[2, i] = storage.to_fp16_stochastic(x[i], r[i])
        out[3, i] = storage.to_bf16_stochastic(x[i], r[i])
    return out


def test_rounding_of_special_values_and_bits():
    r = np.array([0, 1, 7, 8, 9, 4095, 0x7FFF, 0x8000, 0xBFFF, 0xFFF7, 0xFFF8, 0xFFFF], np.uint16)
    random = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([np.array(SPECIAL, np.float32), random])
    x, r = np.repeat(x, len(r)), np.tile(r, len(x))
    out = rounded(x, r, np.empty((4, len(x)), np.uint16))
    for row, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        nearest = torch.from_numpy(out[row].view(np.int16)).view(dtype)
        expected = torch.from_numpy(x).to(dtype)
        assert torch.equal(nearest.isnan(), expected.isnan())
        ok = ~expected.isnan()
        assert same_bits(nearest[ok], expected[ok])
        finite = np.isfinite(x)
        stochastic = torch.from_numpy(out[row + 2][finite].view(np.int16)).view(dtype)
        exact = twin.round_stochastic(x[finite], r[finite].astype(int), dtype)
        assert np.array_equal(twin.numbers(stochastic), exact)
        assert np.array_equal(np.signbit(twin.numbers(stochastic)), np.signbit(exact))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_16_bit_value_survives_load_and_store(dtype):
    """All 65,536 patterns through the probe (nearest) and through a stochastic rounding of an exact value."""
    theta = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out, wide = torch.empty(1, 2**16, dtype=dtype), torch.empty(1, 2**16)
    for target in (out, wide):
        noise.perturb(theta, TID, target, [(0, 0.0)], seed=0, step=0, noise=GAUSSIAN)
    number = ~theta.isnan()
    assert same_bits(out[0][number], theta[number]) and out[0][~number].isnan().all()
    assert same_bits(wide[0][number], theta.float()[number])
    moved = theta.clone()
    noise.advance(moved, TID, [Update(1, 0, (1e-38,))], RADEMACHER)
    noise.advance(moved, TID, [Update(1, 0, (-1e-38,))], RADEMACHER)
    large = (theta.abs() > 1e-6) & theta.isfinite()
    assert torch.equal(moved[large], theta[large])


@pytest.mark.parametrize("value", (1.0, -0.37, 3e-6, 5e-8, 6.09e-5))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_stochastic_rounding_is_unbiased(dtype, value):
    n = 1 << 18
    theta = torch.full((n,), value, dtype=dtype)
    exact = theta[0].float() * np.float32(0.9873)
    noise.advance(theta, TID, [Update(STEP, SEED, (0.0,), decay=float(np.float32(0.9873)))], RADEMACHER)
    found = theta.double()
    assert len(found.unique()) <= 2
    spread = (found.max() - found.min()).item()
    bits = 16 if dtype is torch.bfloat16 else 13
    assert abs(found.mean().item() - exact.double().item()) <= spread * (2.5 / math.sqrt(n) + 2.0**-bits)
    neighbours = (found[1:] > exact.item()).double(), (found[:-1] > exact.item()).double()
    if 0 < neighbours[0].mean() < 1:
        assert abs(torch.stack(neighbours).corrcoef()[0, 1].item()) < 4.5 / math.sqrt(n)


# ---- probes --------------------------------------------------------------------------------------------------------

PROBES = [(0, 1e-3), (0, -1e-3), (1, 0.5), (1, 0.0), (1, -2.0), (0, 3.0)]


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb(dtype, out_dtype, kind):
    shape = (7, 300)
    before = weights(2100, dtype).view(shape)
    advanced = before.clone()
    noise.advance(advanced, TID, UPDATES, kind)
    for updates, base in (((), before), (UPDATES, advanced)):
        theta, out = before.clone(), torch.full((len(PROBES), *shape), math.nan, dtype=out_dtype)
        noise.perturb(theta, TID, out, PROBES, seed=SEED, step=STEP + 3, noise=kind, updates=updates)
        assert same_bits(theta, base)
        work = torch.float64 if dtype is torch.float64 else torch.float32
        for row, (direction, scale) in zip(out, PROBES):
            z = drawn(2100, direction, STEP + 3, kind).to(work).view(shape)
            exact = base.to(work) if scale == 0 else base.to(work) + torch.tensor(scale, dtype=work) * z
            exact = exact.float() if work is torch.float64 and out_dtype.itemsize == 2 else exact
            assert same_bits(row, exact.to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_in_place(dtype):
    theta = weights(5000, dtype)
    expected = torch.empty(1, 5000, dtype=dtype)
    noise.perturb(
        theta.clone(), TID, expected, [(1, 0.01)], seed=SEED, step=9, noise=GAUSSIAN, updates=UPDATES
    )
    noise.perturb(theta, TID, theta[None], [(1, 0.01)], seed=SEED, step=9, noise=GAUSSIAN, updates=UPDATES)
    assert same_bits(theta, expected[0])


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 6, 64, 129, 2500))
def test_gather_is_rows_of_the_dense_probe(width, dtype, kind):
    theta = weights(11 * width, dtype).view(11, width)
    rows = torch.tensor([3, 0, 10, 3, 7])
    for scale in (0.01, 0.0):
        where = {"seed": SEED, "step": STEP, "noise": kind}
        dense = torch.empty(1, 11, width, dtype=torch.bfloat16)
        noise.perturb(theta, TID, dense, [(2, scale)], **where)
        out = torch.empty(5, width, dtype=torch.bfloat16)
        noise.gather(theta, TID, rows, out, 2, scale, **where)
        assert same_bits(out, dense[0][rows])
    with pytest.raises(IndexError, match="11"):
        noise.gather(theta, TID, torch.tensor([0, 11]), out[:2], 2, 0.1, **where)


@pytest.mark.parametrize("mask", (None, Mask(threshold=0.125), Mask(seed=SEED, share=20000)))
@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_tensor_have_the_bits_of_the_whole(dtype, kind, mask):
    where = {"seed": SEED, "step": STEP + 3, "noise": kind, "mask": mask}
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    shape, keep = (9, 640), torch.bfloat16
    theta, momentum = weights(9 * 640, dtype).view(shape), weights(9 * 640, wide, 1).view(shape)
    parts, buffers = theta.clone(), momentum.clone()
    out = torch.empty(len(PROBES), *shape, dtype=keep)
    updates = {"updates": UPDATES, "beta": 0.9}
    noise.perturb(theta, TID, out, PROBES, momentum=momentum, **updates, **where)
    for r0, r1 in ((0, 1), (1, 4), (4, 9)):
        some, buffer, at = parts[r0:r1], buffers[r0:r1], {"start": r0 * 640}
        if r0 == 1:
            noise.advance(some, TID, UPDATES, kind, momentum=buffer, beta=0.9, mask=mask, **at)
            made = torch.empty(len(PROBES), r1 - r0, 640, dtype=keep)
            noise.perturb(some, TID, made, PROBES, **where, **at)
        else:
            made = torch.empty(len(PROBES), r1 - r0, 640, dtype=keep)
            noise.perturb(some, TID, made, PROBES, momentum=buffer, **updates, **where, **at)
        assert same_bits(made, out[:, r0:r1])
        rows = torch.empty(2, 640, dtype=keep)
        noise.gather(some, TID, torch.tensor([r1 - r0 - 1, 0]), rows, *PROBES[2], **where, **at)
        assert same_bits(rows, out[2, [r1 - 1, r0]])
    assert same_bits(parts, theta) and same_bits(buffers, momentum)
    with pytest.raises(AssertionError, match="64"):
        noise.advance(parts[1:], TID, UPDATES, kind, start=64)


def test_parts_far_out():
    start = 2**35 + 128 * 7
    theta = torch.zeros(500)
    noise.advance(theta, TID, [Update(STEP, SEED, (1.0,))], RADEMACHER, start=start)
    exact = twin.z(np.arange(start, start + 500), TID, twin.key(SEED, STEP, 0), RADEMACHER)
    assert np.array_equal(theta.numpy(), exact)


def test_nothing_touches_the_global_generators():
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise.perturb(weights(99, torch.bfloat16), TID, None, (), seed=1, step=1, noise=GAUSSIAN, updates=UPDATES)
    drawn(99)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


def test_empty_tensors():
    empty = torch.empty(0, 5)
    noise.advance(empty, TID, UPDATES, GAUSSIAN)
    noise.perturb(empty, TID, torch.empty(2, 0, 5), PROBES[:2], seed=0, step=0, noise=GAUSSIAN)
    noise.gather(
        torch.ones(3, 5),
        TID,
        torch.empty(0, dtype=torch.int64),
        empty,
        0,
        1.0,
        seed=0,
        step=0,
        noise=GAUSSIAN,
    )
    assert drawn(0).shape == (0,)


# ---- masks ---------------------------------------------------------------------------------------------------------

MASKS = {"small": Mask(threshold=float(np.float32(0.01))), "chosen": Mask(seed=SEED, share=20000)}


def twin_moving(mask, n, start=0):
    """The twin's answer: theta [n] as numbers -> bool [n]."""
    if mask.threshold is not None:
        return lambda theta: np.abs(theta) <= mask.threshold
    chosen = twin.chosen(np.arange(start, start + n), TID, mask.seed, mask.share)
    return lambda theta: chosen


@pytest.mark.parametrize("beta", (None, 0.9))
@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", MASKS)
def test_masked_updates_are_the_twins_bit_for_bit(which, dtype, kind, beta):
    n, start, mask = 700, 256, MASKS[which]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    updates = (
        UPDATES if which == "small" else (*UPDATES, *RESTORES)
    )  # a mask by magnitude goes with no restore
    before, moving = weights(n, dtype), twin_moving(mask, n, start)
    momentum = None if beta is None else weights(n, wide, seed=1)
    index = np.arange(start, start + n)
    expected, buffer = twin.advance(
        before,
        lambda u, k: drawn(start + n, k, u.step, kind).numpy()[start:],
        lambda u: twin.rounding_bits(index, TID, twin.key(u.seed, u.step, 0)),
        updates,
        momentum,
        beta or 0.0,
        moving,
    )
    theta, fast = before.clone(), None if momentum is None else momentum.clone()
    noise.advance(theta, TID, updates, kind, momentum=fast, beta=beta or 0.0, start=start, mask=mask)
    assert np.array_equal(twin.numbers(theta), expected)
    assert np.array_equal(
        np.signbit(twin.numbers(theta)), np.signbit(expected)
    )  # zeros that stay keep theirs
    assert fast is None or np.array_equal(twin.numbers(fast), twin.numbers(torch.from_numpy(buffer)))
    share = moving(twin.numbers(before)).mean()
    changed = (twin.numbers(theta) != twin.numbers(before)).mean()
    assert 0.1 < changed < 0.9 and (which == "small" or changed <= share < 1)
    alone, buffers = before.clone(), None if momentum is None else momentum.clone()
    for u in updates:
        noise.advance(alone, TID, [u], kind, momentum=buffers, beta=beta or 0.0, start=start, mask=mask)
    assert same_bits(alone, theta) and (buffers is None or same_bits(buffers, fast))


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
@pytest.mark.parametrize("out_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", MASKS)
def test_masked_probes(which, dtype, out_dtype, kind):
    """What stays is θ itself in every probe, what moves has the bits of a probe without a mask: of θ after the updates."""
    n, width, mask = 4200, 300, MASKS[which]
    before = weights(n, dtype).view(-1, width)
    advanced, where = before.clone(), {"seed": SEED, "step": STEP + 3, "noise": kind}
    noise.advance(advanced, TID, UPDATES[:3], kind, mask=mask)
    theta = before.clone()
    out, plain = torch.empty(2, len(PROBES), *before.shape, dtype=out_dtype)
    noise.perturb(theta, TID, out, PROBES, updates=UPDATES[:3], mask=mask, **where)
    assert same_bits(theta, advanced)
    on = torch.from_numpy(twin_moving(mask, n)(twin.numbers(advanced))).view(-1, width)
    assert torch.equal(on, noise.moving(advanced, TID, mask)) and 0.2 < on.double().mean() < 0.8
    noise.perturb(advanced, TID, plain, PROBES, **where)
    narrow = advanced.float() if out_dtype is torch.bfloat16 else advanced
    for row, full in zip(out, plain):
        assert same_bits(row, torch.where(on, full, narrow.to(out_dtype)))
    rows, some = torch.tensor([3, 0, 13, 3, 7]), torch.empty(5, width, dtype=out_dtype)
    noise.gather(advanced, TID, rows, some, *PROBES[2], mask=mask, **where)
    assert same_bits(some, out[2][rows])


def test_a_random_mask_is_random_and_lasts():
    n = 1 << 18
    for share in (0, 1, 16384, 65536):
        on = noise.moving(torch.zeros(n), TID, Mask(seed=SEED, share=share)).double()
        assert abs(on.mean().item() - share / 65536) <= 4 * math.sqrt(max(share, 1) / 65536 / n)
    masks = [noise.moving(torch.zeros(n), t, Mask(seed=s, share=16384)) for t, s in ((1, 5), (2, 5), (1, 6))]
    masks += [drawn(n, 0, 0, seed=5, tid=1) > 0.6745]
    gram = torch.stack(masks).double().corrcoef() - torch.eye(len(masks))
    assert gram.abs().max() * math.sqrt(n) < 4.5


def test_a_mask_by_magnitude_goes_with_no_move_in_place():
    theta, mask = weights(300, torch.float32), MASKS["small"]
    with pytest.raises(AssertionError, match="in place"):
        noise.advance(theta, TID, RESTORES[:1], GAUSSIAN, mask=mask)
    with pytest.raises(AssertionError, match="in place"):
        noise.perturb(theta, TID, theta[None], PROBES[:1], seed=0, step=0, noise=GAUSSIAN, mask=mask)


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (GAUSSIAN, RADEMACHER))
def test_threads_do_not_change_the_result(kind):
    n, before = 4 * cpu._PIECE + 12345, torch.get_num_threads()
    start = weights(n, torch.float16)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            theta, momentum, out = start.clone(), torch.zeros(n), torch.empty(2, n, dtype=torch.bfloat16)
            where = {"seed": SEED, "step": STEP + 3, "noise": kind}
            noise.perturb(
                theta, TID, out, PROBES[:2], updates=UPDATES[:3], momentum=momentum, beta=0.9, **where
            )
            rows = torch.empty(600, 1000)
            noise.gather(
                theta[:900000].view(900, 1000), TID, torch.arange(600) * 7 % 900, rows, 0, 0.5, **where
            )
            results.append((theta, momentum, out, rows))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


def test_an_interrupt_leaves_nothing_half_done():
    """Ctrl-C (twice) while pieces are at work: it arrives, after the last piece."""
    before, done = torch.get_num_threads(), []

    def piece(start, end):
        time.sleep(0.02)
        done.append((start, end))

    main = threading.get_ident()
    timers = [threading.Timer(after, signal.pthread_kill, (main, signal.SIGINT)) for after in (0.03, 0.05)]
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            for timer in timers:
                timer.start()
            cpu._spread(piece, 17, 1)
    finally:
        torch.set_num_threads(before)
        for timer in timers:
            timer.join()
    assert sorted(start for start, _ in done) == sorted({start for start, _ in done})
    assert sum(end - start for start, end in done) == 17


def test_an_error_in_a_piece_reaches_the_caller():
    before = torch.get_num_threads()

    def piece(start, end):
        raise ValueError(start)

    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError):
            cpu._spread(piece, 100, 1)
    finally:
        torch.set_num_threads(before)


# ---- other processes -----------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, torch
from zoft.noise import noise
from zoft.noise.spec import Update
theta = (torch.arange(3000) / 7 - 200).to(torch.float16)
out = torch.empty(2, 3000, dtype=torch.bfloat16)
u = Update(4, 9, (1e-3, 2e-3), 0.75)
noise.perturb(theta, 1, out, [(0, 0.01), (0, -0.01)], seed=9, step=5, noise="gaussian", updates=[u])
z = noise.direction((100001,), 1, seed=9, step=5, direction=0, noise="gaussian")
print(hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in (theta, out, z))).hexdigest())
"""


ROOT = Path(noise.__file__).parents[2]


def digest(root=ROOT, **environment):
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_every_cpu_gives_the_same_bits(tmp_path):
    """This machine's vectors against the oldest 64-bit processor's, which has no fused multiply-add at all."""
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert digest() == digest(**generic)


@pytest.mark.slow
def test_works_where_no_compiled_code_can_be_kept(tmp_path):
    assert digest() == digest(
        NUMBA_CACHE_DIR="/dev/null/x", NUMBA_CACHE_LOCATOR_CLASSES="_UserProvidedCacheLocator"
    )


def test_the_codes_of_kinds_are_those_of_the_specification():
    assert {
        GAUSSIAN: distributions.GAUSSIAN,
        RADEMACHER: distributions.RADEMACHER,
        RANK1: distributions.RANK1,
    } == {k: c for k, c in spec.KINDS.items() if c < spec.FLIPPED}
    assert all(spec.KINDS[f"{k}_flipped"] == c + spec.FLIPPED for k, c in spec.KINDS.items() if c < 2)
    ours = distributions.FLIPPED, distributions.ROWS, distributions.COLUMNS
    assert ours == (spec.FLIPPED, spec.ROWS, spec.COLUMNS)


def test_a_change_to_anything_that_compiled_code_is_made_of_changes_its_name():
    """What the kernels and what they call take from other files of zoft is all in the digest."""
    hashed = {module.__name__ for module in kernels.COMPILED}
    for module in (kernels, *kernels.COMPILED):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            assert not (isinstance(node, ast.Import) and any(a.name.startswith("zoft") for a in node.names))
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("zoft")):
                assert node.module in hashed or {f"{node.module}.{a.name}" for a in node.names} <= hashed


@pytest.mark.slow
def test_kept_code_does_not_outlive_a_change_to_what_it_calls(tmp_path):
    """numba keeps `run`, and looks for changes in kernels.py alone; what changes here is in another file."""
    shutil.copytree(ROOT / "zoft", tmp_path / "zoft", ignore=shutil.ignore_patterns("__pycache__"))
    called = tmp_path / "zoft" / "noise" / "distributions.py"
    text, plain = called.read_text(), digest(tmp_path)
    assert plain == digest()
    assert text.count("return -s, c") == 1
    called.write_text(text.replace("return -s, c", "return c, -s"))
    assert digest(tmp_path) != plain
    called.write_text(text)
    assert digest(tmp_path) == plain
