"""The CUDA backend of `zoft.noise`: one kernel a tensor reads θ, applies updates and writes every probe.

Keys, multipliers, decays, scales and beta are read from device memory (a `Plan`), so that a captured graph can
be fed new ones. Every operation is rounded as the specification says (fusion of products and sums is off, and
fused where it is spelled out), so rademacher gives the bits of the CPU backend; a gaussian uses the hardware's
own lg2, sin and cos, and stays within GAUSSIAN_BOUND_GPU.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from zoft.noise import GAUSSIAN, PART, Mask, Probes, Update, key
from zoft.noise import NOTHING as _NOTHING

_PLAIN = ["tid", "threshold", "share", "mask0", "mask1"]  # arguments whose values no kernel is compiled for
PROBES_MAX = 16  # probes that one launch unrolls
_LANES = 128  # of 8 elements each: what one program of 2 warps works on
_SMALL = 64  # lanes of a program of one warp, where tensors are small
_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
_OPTIONS_SMALL = {"num_warps": 1, "enable_fp_fusion": False}
NOTHING = tl.constexpr(_NOTHING)
ALL, SMALL, CHOSEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of mask, as in kernels.py
# Triton's interpreter knows no assembly: there the same functions, exact, stand in for the hardware's.
_HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")


# ---- noise ---------------------------------------------------------------------------------------------------------


@triton.jit
def _words(counter, tid, purpose: tl.constexpr, k0, k1):
    """The four words [n] uint32 of counters [n] int64. Products are 64 bits wide: one instruction gives both halves."""
    a, b = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c, d = a * 0 + tid, a * 0 + purpose
    for _ in tl.static_range(10):
        x = a.to(tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        y = c.to(tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        a, c = (y >> 32).to(tl.uint32) ^ b ^ k0, (x >> 32).to(tl.uint32) ^ d ^ k1
        b, d = y.to(tl.uint32), x.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return a, b, c, d


@triton.jit
def _unary(x, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(PTX + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _pair(word):
    """sqrt(-2 ln u)·(cos 2πv, sin 2πv); u from the upper half of the word, v from the lower."""
    u = tl.fma((word >> 16).to(tl.float32), 1.52587890625e-05, 7.62939453125e-06)  # exact
    turn = ((word << 16).to(tl.int32, bitcast=True) >> 16).to(tl.float32)
    angle = tl.fma(turn, 9.587379924285257e-05, 4.7936899621426287e-05)
    if _HARDWARE:
        r = _unary(_unary(u, "lg2.approx.ftz.f32") * -1.3862943611198906, "sqrt.approx.ftz.f32")
        return r * _unary(angle, "cos.approx.ftz.f32"), r * _unary(angle, "sin.approx.ftz.f32")
    r = tl.sqrt(tl.log(u) * -2.0)
    return r * tl.cos(angle), r * tl.sin(angle)


@triton.jit
def _in_order(a, b, c, d):
    """[4n] from four [n]: a[0], b[0], c[0], d[0], a[1], …"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _key(keys, k):
    return tl.load(keys + 2 * k).to(tl.uint32, bitcast=True), tl.load(keys + 2 * k + 1).to(
        tl.uint32, bitcast=True
    )


@triton.jit
def _noise(base, tid, keys, k, GAUSSIAN: tl.constexpr, LANES: tl.constexpr):
    """z of the 8·LANES elements from base (a multiple of 128) on, fp32; key k of keys int32 [., 2]."""
    k0, k1 = _key(keys, k)
    if GAUSSIAN:
        w0, w1, w2, w3 = _words((base >> 3) + tl.arange(0, LANES), tid, 0, k0, k1)
        a0, a1 = _pair(w0)
        b0, b1 = _pair(w1)
        c0, c1 = _pair(w2)
        d0, d1 = _pair(w3)
        return tl.interleave(_in_order(a0, b0, c0, d0), _in_order(a1, b1, c1, d1))
    word = tl.arange(0, LANES // 4)  # of 32 elements each
    w0, w1, w2, w3 = _words((base >> 7) + word // 4, tid, 0, k0, k1)
    which = word % 4
    bits = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    spread = (bits[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.reshape(spread.to(tl.float32) * 2.0 - 1.0, [8 * LANES])


@triton.jit
def _pairs(base, tid, purpose: tl.constexpr, k0, k1, LANES: tl.constexpr):
    """Words [4·LANES], each of two elements' 16 bits from base (a multiple of 128) on, the even one's low."""
    w0, w1, w2, w3 = _words((base >> 3) + tl.arange(0, LANES), tid, purpose, k0, k1)
    return _in_order(w0, w1, w2, w3)


@triton.jit
def _moving(a, base, tid, MASK: tl.constexpr, threshold, share, mask0, mask1, LANES: tl.constexpr):
    """Which of the 8·LANES elements a mask lets move."""
    if MASK == SMALL:
        return tl.abs(a) <= threshold
    k0, k1 = mask0.to(tl.uint32, bitcast=True), mask1.to(tl.uint32, bitcast=True)
    pairs = _pairs(base, tid, 2, k0, k1, LANES)
    return tl.interleave(pairs & 0xFFFF, pairs >> 16).to(tl.int32, bitcast=True) < share


@triton.jit
def _round_stochastic(a, base, tid, keys, k, BF16: tl.constexpr, LANES: tl.constexpr):
    """The finite fp32 values a [8·LANES] on the grid of bf16 or fp16, still fp32."""
    k0, k1 = _key(keys, k)
    pairs = _pairs(base, tid, 1, k0, k1, LANES)
    bits = a.to(tl.int32, bitcast=True)
    if BF16:
        r = tl.interleave(pairs & 0xFFFF, pairs >> 16).to(tl.int32, bitcast=True)
        return ((bits + r) & -0x10000).to(tl.float32, bitcast=True)
    # (r >> 3)·2⁻¹³ as the mantissa of a float in [2⁻¹⁰, 2⁻⁹), then less 2⁻¹⁰: times 2^e it is that share of an ulp.
    low, high = ((pairs << 16) >> 9) & 0x007FFC00, (pairs >> 9) & 0x007FFC00
    share = (tl.interleave(low, high) | 0x3A800000).to(tl.float32, bitcast=True) - 0.0009765625
    power = tl.maximum(bits & 0x7F800000, 0x38800000) | (bits & -0x80000000)
    s = tl.fma(share, power.to(tl.float32, bitcast=True), a)
    if not _HARDWARE:  # which itself stops at the largest number when it rounds toward zero
        s = tl.minimum(tl.maximum(s, -65504.0), 65504.0)
    return s.to(tl.float16, fp_downcast_rounding="rtz").to(tl.float32)


@triton.jit
def _round_nearest(a, BF16: tl.constexpr):
    """The finite fp32 values a on the grid of bf16 or fp16, nearest even, still fp32."""
    if BF16:
        bits = a.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return a.to(tl.float16).to(tl.float32)


# ---- the pass ------------------------------------------------------------------------------------------------------


@triton.jit
def _nothing(like):
    """-0.0 in that shape and dtype: what adds nothing, not even to the sign of a zero. Triton makes +0.0 of the literal."""
    if like.dtype == tl.float64:
        return tl.full(like.shape, -0x8000000000000000, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full(like.shape, -0x80000000, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _restored(a, z, scale):
    """a + scale·z; a itself where scale is 0, signs of zeros included."""
    return tl.where(scale == 0, a, a + scale * z)


@triton.jit
def _moved(
    a, base, tid, keys, k, scale, keep, MASK: tl.constexpr,
    STOCHASTIC: tl.constexpr, BF16: tl.constexpr, GAUSSIAN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """θ after a move by scale along key k; a mask by magnitude goes with no move."""
    z = _noise(base, tid, keys, k, GAUSSIAN, LANES).to(a.dtype)
    b = a + scale * z
    if STOCHASTIC:
        b = _round_nearest(b, BF16)
    if MASK:
        b = tl.where(keep, b, a)
    return b


@triton.jit
def _step(
    a, m, s, z, u, base, tid, keys, UQ, decay, beta, restores, keep, threshold, RESTORE: tl.constexpr, MASK: tl.constexpr,
    MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, BF16: tl.constexpr, LANES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """θ (and momentum) after update u, whose directions sum to s, z the last of them; UQ: multipliers in all."""
    old = a
    if MASK == SMALL:
        keep = tl.abs(a) <= threshold
    if MASK and MOMENTUM:
        s = tl.where(keep, s, _nothing(s))
    if RESTORE:
        a = _restored(a, z, tl.load(restores + u))
    a = decay * a
    if MOMENTUM:
        m = beta * m + s
        a = tl.where(m == 0, a, a + m)  # a buffer that is still empty leaves the signs of zeros alone
    else:
        a = a + s
    if FLOOR is not None:
        a = tl.maximum(a, tl.full([], FLOOR, a.dtype))
    if STOCHASTIC:
        a = _round_stochastic(a, base, tid, keys, UQ + u, BF16, LANES)
    if MASK:
        a = tl.where(keep, a, old)
    return a, m


@triton.jit
def _updated(
    a, m, base, tid, keys, values, U, Q, keep, threshold,
    PROBES: tl.constexpr, ONE: tl.constexpr, RESTORE: tl.constexpr, MASK: tl.constexpr, MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr, BF16: tl.constexpr, GAUSSIAN: tl.constexpr, LANES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """θ (and momentum) after U updates of Q directions each; one whose multipliers are all 0 changes nothing, unless
    there is momentum; one whose decay is NOTHING changes nothing at all: but their restores are done.

    keep: what moves, under a random mask. ONE: there is one update of ONE directions, as in training: nothing is left
    to a loop. RESTORE: some restore is not 0.
    """
    restores = values + U * Q + U + PROBES + 1
    beta = tl.load(restores - 1)
    if ONE:
        decay = tl.load(values + ONE)
        live = MOMENTUM | (decay != 1)
        for k in tl.static_range(ONE):
            live = live | (tl.load(values + k) != 0)
        if live & (decay != NOTHING):
            z = _noise(base, tid, keys, 0, GAUSSIAN, LANES).to(a.dtype)
            s = tl.load(values) * z
            for k in tl.static_range(1, ONE):
                z = _noise(base, tid, keys, k, GAUSSIAN, LANES).to(a.dtype)
                s = s + tl.load(values + k) * z
            a, m = _step(
                a, m, s, z, 0, base, tid, keys, ONE, decay, beta, restores, keep, threshold,
                RESTORE, MASK, MOMENTUM, STOCHASTIC, BF16, LANES, FLOOR,
            )  # fmt: skip
        else:
            if RESTORE:
                if tl.load(restores) != 0:
                    back = tl.load(restores)
                    a = _moved(
                        a, base, tid, keys, ONE - 1, back, keep, MASK, STOCHASTIC, BF16, GAUSSIAN, LANES
                    )
    else:
        for u in range(U):
            decay = tl.load(values + U * Q + u)
            live = MOMENTUM | (decay != 1)
            for k in range(Q):
                live = live | (tl.load(values + u * Q + k) != 0)
            if live & (decay != NOTHING):
                s = _nothing(a)
                z = s
                for k in range(Q):
                    z = _noise(base, tid, keys, u * Q + k, GAUSSIAN, LANES).to(a.dtype)
                    product = tl.load(values + u * Q + k) * z
                    s = tl.where(k == 0, product, s + product)
                a, m = _step(
                    a, m, s, z, u, base, tid, keys, U * Q, decay, beta, restores, keep, threshold,
                    RESTORE, MASK, MOMENTUM, STOCHASTIC, BF16, LANES, FLOOR,
                )  # fmt: skip
            else:
                if RESTORE:
                    if tl.load(restores + u) != 0:
                        last, back = u * Q + Q - 1, tl.load(restores + u)
                        a = _moved(
                            a, base, tid, keys, last, back, keep, MASK, STOCHASTIC, BF16, GAUSSIAN, LANES
                        )
    return a, m


@triton.jit(do_not_specialize=_PLAIN)
def _pass(
    theta,  # or none
    momentum,  # or none
    out,  # [PROBES, n], or none
    keys,  # int32 [U·Q + U + PROBES, 2]: of directions, rounding, probes
    values,  # of the work dtype [U·Q + U + PROBES + 1 (+ U)]: multipliers, decays, scales, beta, restores
    n,
    start,  # index of theta's first element in its tensor, a multiple of 128
    tid,  # int32, the bits of the tensor's id
    U,
    Q,
    threshold,  # of a mask by magnitude
    share,  # of a random mask, and its key, int32 bits
    mask0,
    mask1,
    PARTIAL: tl.constexpr,  # start is not 0
    WORK: tl.constexpr,
    HAS_THETA: tl.constexpr,
    HAS_UPDATES: tl.constexpr,
    ONE: tl.constexpr,
    RESTORE: tl.constexpr,
    MASK: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    WRITE_THETA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BF16: tl.constexpr,
    PROBES: tl.constexpr,
    FRESH: tl.constexpr,  # bit p: probe p needs another draw than the one before it
    SILENT: tl.constexpr,  # bit p: probe p needs no noise
    NARROW: tl.constexpr,  # out has 16 bits
    GAUSSIAN: tl.constexpr,
    LANES: tl.constexpr,
    FLOOR: tl.constexpr = None,  # no update brings θ below it
):
    base = tl.program_id(0).to(tl.int64) * (8 * LANES)
    at = base + tl.arange(0, 8 * LANES)
    inside = at < n
    if PARTIAL:
        base += start  # of the noise from here on
    tid = tid.to(tl.uint32, bitcast=True)
    if HAS_THETA:
        a = tl.load(theta + at, mask=inside, other=0.0).to(WORK)
    else:
        a = _nothing(tl.full([8 * LANES], 0.0, WORK))
    keep = inside
    if MASK == CHOSEN:
        keep = _moving(a, base, tid, MASK, threshold, share, mask0, mask1, LANES)
    if HAS_UPDATES:
        m = a
        if HAS_MOMENTUM:
            m = tl.load(momentum + at, mask=inside, other=0.0)
        a, m = _updated(
            a, m, base, tid, keys, values, U, Q, keep, threshold,
            PROBES, ONE, RESTORE, MASK, HAS_MOMENTUM, STOCHASTIC, BF16, GAUSSIAN, LANES, FLOOR,
        )  # fmt: skip
        if HAS_MOMENTUM:
            tl.store(momentum + at, m, mask=inside)
        if WRITE_THETA:
            tl.store(theta + at, a.to(theta.dtype.element_ty), mask=inside)
    if MASK == SMALL:
        keep = _moving(a, base, tid, MASK, threshold, share, mask0, mask1, LANES)
    z = tl.zeros([8 * LANES], tl.float32)
    for p in tl.static_range(PROBES):
        if (FRESH >> p) & 1:
            z = _noise(base, tid, keys, U * Q + U + p, GAUSSIAN, LANES)
        if (SILENT >> p) & 1:
            probe = a
        else:
            probe = a + tl.load(values + U * Q + U + p) * z.to(WORK)
            if MASK:
                probe = tl.where(keep, probe, a)
        if NARROW:  # also what fp64 becomes goes through fp32
            probe = probe.to(tl.float32)
        tl.store(out + tl.full([], p, tl.int64) * n + at, probe.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pass_small(
    theta,  # fp32, all small tensors end to end
    momentum,  # like theta, or none
    out,  # fp32 [PROBES, total], or none
    narrow,  # the same in 16 bits, or none
    table,  # int64 [programs, 4]: start in theta, start in its tensor (a multiple of 128), elements, id as int32 bits
    keys,
    values,
    total,
    U,
    Q,
    HAS_UPDATES: tl.constexpr,
    ONE: tl.constexpr,
    RESTORE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    PROBES: tl.constexpr,
    FRESH: tl.constexpr,
    SILENT: tl.constexpr,
    NARROW: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    LANES: tl.constexpr,
):
    """`_pass` for many small fp32 tensors in one launch; none of them has a mask or a floor."""
    row = table + 4 * tl.program_id(0)
    start, base, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    tid = tl.load(row + 3).to(tl.int32).to(tl.uint32, bitcast=True)
    i = tl.arange(0, 8 * LANES)
    inside = i < count
    at = start + i
    a = tl.load(theta + at, mask=inside, other=0.0)
    if HAS_UPDATES:
        m = a
        if HAS_MOMENTUM:
            m = tl.load(momentum + at, mask=inside, other=0.0)
        a, m = _updated(
            a, m, base, tid, keys, values, U, Q, inside, 0.0,
            PROBES, ONE, RESTORE, ALL, HAS_MOMENTUM, False, False, GAUSSIAN, LANES, None,
        )  # fmt: skip
        if HAS_MOMENTUM:
            tl.store(momentum + at, m, mask=inside)
        tl.store(theta + at, a, mask=inside)
    z = tl.zeros([8 * LANES], tl.float32)
    for p in tl.static_range(PROBES):
        if (FRESH >> p) & 1:
            z = _noise(base, tid, keys, U * Q + U + p, GAUSSIAN, LANES)
        if (SILENT >> p) & 1:
            probe = a
        else:
            probe = a + tl.load(values + U * Q + U + p) * z
        tl.store(out + total * p + at, probe, mask=inside)
        if NARROW:
            tl.store(narrow + total * p + at, probe.to(narrow.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def _rows(
    theta,
    rows,  # int64 [PROBES·per_probe]
    out,  # [PROBES·per_probe, width]
    keys,  # int32 [PROBES, 2]
    values,  # [PROBES]: scales
    width,
    origin,  # index of theta's first element in its tensor
    per_probe,
    tid,
    threshold,
    share,
    mask0,
    mask1,
    WORK: tl.constexpr,
    MASK: tl.constexpr,
    SILENT: tl.constexpr,
    NARROW: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (n, j): out[n] = θ[rows[n]] + scale·z[rows[n]], the j-th stretch that starts at a multiple of 128."""
    row = tl.program_id(0).to(tl.int64)
    theta -= origin  # where element 0 would be
    start = origin + tl.load(rows + row) * width
    base = start // 128 * 128 + tl.program_id(1).to(tl.int64) * (8 * LANES)
    at = base + tl.arange(0, 8 * LANES)
    inside = (at >= start) & (at < start + width)
    probe = tl.load(theta + at, mask=inside, other=0.0).to(WORK)
    if not SILENT:
        p = row // per_probe
        tid = tid.to(tl.uint32, bitcast=True)
        z = _noise(base, tid, keys, p, GAUSSIAN, LANES)
        a = probe
        probe = a + tl.load(values + p) * z.to(WORK)
        if MASK:
            probe = tl.where(_moving(a, base, tid, MASK, threshold, share, mask0, mask1, LANES), probe, a)
    if NARROW:
        probe = probe.to(tl.float32)
    tl.store(out + row * width + (at - start), probe.to(out.dtype.element_ty), mask=inside)


# ---- plans ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a launch reads from the device, and what of it is fixed in the compiled kernel.

    keys: int32 [U·Q + U + P, 2], of the updates' directions, their rounding, the probes.
    values: work dtype [U·Q + U + P + 1], multipliers, decays, scales, beta; [U] more where there are restores.
    fresh, silent: bit p says that probe p draws anew, or has scale 0.
    """

    keys: Tensor
    values: Tensor
    updates: int  # U
    directions: int  # Q
    probes: int  # P
    fresh: int
    silent: int
    restores: bool = False  # of the updates, along their last directions


def shape_of(probes: Probes) -> tuple[int, int]:
    """(fresh, silent) of a plan's probes."""
    fresh = silent = 0
    drawn = None
    for p, (direction, scale) in enumerate(probes):
        if scale == 0:
            silent |= 1 << p
        elif direction != drawn:
            fresh, drawn = fresh | 1 << p, direction
    return fresh, silent


@lru_cache(maxsize=64)  # one upload a step serves all its tensors
def plan_of(
    updates: tuple[Update, ...], probes: tuple[tuple[int, float], ...], seed: int, step: int, beta: float, wide: bool,
    device: torch.device,
) -> Plan:  # fmt: skip
    """The plan of these updates (all of one number of directions, moves aside) and probes, uploaded."""
    directions = max((1 if u.is_nothing else len(u.multipliers) for u in updates), default=0)
    keys: list[tuple[int, int]] = []
    values: list[float] = []
    restores = any(u.restore for u in updates)
    for u in updates:
        last = len(u.multipliers) - 1
        keys += [key(u.seed, u.step, last if u.is_nothing else k) for k in range(directions)]
        values += [0.0] * directions if u.is_nothing else u.multipliers
    keys += [key(u.seed, u.step, 0) for u in updates]
    keys += [key(seed, step, direction) for direction, _ in probes]
    values += [u.decay for u in updates] + [scale for _, scale in probes] + [beta]
    values += [u.restore for u in updates] if restores else []
    keys_host = torch.from_numpy(np.array(keys or [(0, 0)], np.uint32).view(np.int32))
    values_host = (
        torch.tensor(values, dtype=torch.float64 if wide else torch.float32, device="cpu") + 0.0
    )  # -0 is 0: equal plans
    return Plan(
        _upload(keys_host, device),
        _upload(values_host, device),
        len(updates),
        directions,
        len(probes),
        *shape_of(probes),
        restores,
    )


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the CPU does not wait for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# ---- launches ------------------------------------------------------------------------------------------------------


def launch(
    theta: Tensor | None, tid: int, out: Tensor | None, plan: Plan, noise: str, momentum: Tensor | None = None,
    start: int = 0, floor: float | None = None, mask: Mask | None = None,
) -> None:  # fmt: skip
    """θ (None: zeros) through a plan: updates in place, then its probes into out [P, *theta.shape].

    start: θ (and momentum) is a contiguous part of the tensor, from this element on, a multiple of PART. floor, mask:
    the tensor's.
    """
    assert start % PART == 0, start
    some = theta if theta is not None else out
    assert some is not None
    n = some.numel() if theta is not None else some.numel() // plan.probes
    in_place = theta is not None and out is not None and out.data_ptr() == theta.data_ptr()
    with _on(some):
        _pass[(triton.cdiv(n, 8 * _LANES),)](
            some, momentum if momentum is not None else some, out if out is not None else some,
            plan.keys, plan.values, n, start, _signed(tid), plan.updates, plan.directions,
            **_mask(mask), PARTIAL=start != 0, WORK=tl.float64 if some.dtype == torch.float64 and theta is not None else tl.float32,
            HAS_THETA=theta is not None, HAS_UPDATES=plan.updates > 0, ONE=_one(plan), RESTORE=plan.restores, HAS_MOMENTUM=momentum is not None,
            WRITE_THETA=not in_place, STOCHASTIC=some.dtype in (torch.float16, torch.bfloat16),
            BF16=some.dtype == torch.bfloat16, PROBES=plan.probes, FRESH=plan.fresh, SILENT=plan.silent,
            NARROW=out is not None and out.itemsize == 2, GAUSSIAN=noise == GAUSSIAN, LANES=_LANES, FLOOR=floor, **_OPTIONS,
        )  # fmt: skip


def table_of(sizes: list[int], tids: list[int], device: torch.device) -> Tensor:
    """The table by which `launch_small` finds its tensors, which lie end to end in the given order."""
    rows, start = [], 0
    for size, tid in zip(sizes, tids):
        for at in range(0, size, 8 * _SMALL):
            rows.append((start + at, at, min(8 * _SMALL, size - at), _signed(tid)))
        start += size
    return torch.tensor(rows, dtype=torch.int64).to(device)


def launch_small(
    theta: Tensor,
    table: Tensor,
    out: Tensor | None,
    plan: Plan,
    noise: str,
    momentum: Tensor | None = None,
    narrow: Tensor | None = None,
) -> None:
    """Many small fp32 tensors, end to end in theta [total], through a plan in one launch.

    out: fp32 [P, total]; narrow: the same in 16 bits.
    """
    with _on(theta):
        _pass_small[(len(table),)](
            theta, momentum if momentum is not None else theta, out if out is not None else theta,
            narrow if narrow is not None else theta, table,
            plan.keys, plan.values, theta.numel(), plan.updates, plan.directions,
            NARROW=narrow is not None, HAS_UPDATES=plan.updates > 0, ONE=_one(plan), RESTORE=plan.restores, HAS_MOMENTUM=momentum is not None, PROBES=plan.probes,
            FRESH=plan.fresh, SILENT=plan.silent, GAUSSIAN=noise == GAUSSIAN, LANES=_SMALL, **_OPTIONS_SMALL,
        )  # fmt: skip


def launch_rows(
    theta: Tensor, tid: int, rows: Tensor, out: Tensor, plan: Plan, noise: str, start: int = 0,
    mask: Mask | None = None,
) -> None:  # fmt: skip
    """out[n] = cast(θ[rows[n]] + scale·z[rows[n]]), rows [P·N] probe-major; rows are not checked. plan: no updates."""
    width = out.numel() // len(rows)
    lanes = min(_LANES, max(16, triton.next_power_of_2(triton.cdiv(width + 127, 8))))
    assert plan.updates == 0 and len(rows) % plan.probes == 0, (plan.updates, len(rows), plan.probes)
    with _on(theta):
        _rows[(len(rows), triton.cdiv(width + 127, 8 * lanes))](
            theta, rows, out, plan.keys, plan.values, width, start, len(rows) // plan.probes, _signed(tid), **_mask(mask),
            WORK=tl.float64 if theta.dtype == torch.float64 else tl.float32,
            SILENT=plan.silent == (1 << plan.probes) - 1, NARROW=out.itemsize == 2, GAUSSIAN=noise == GAUSSIAN, LANES=lanes,
            **(_OPTIONS if lanes == _LANES else _OPTIONS_SMALL),
        )  # fmt: skip


def perturb(
    theta: Tensor, tid: int, out: Tensor | None, probes: tuple[tuple[int, float], ...], seed: int, step: int, noise: str,
    updates: tuple[Update, ...], momentum: Tensor | None, beta: float, start: int = 0, floor: float | None = None,
    mask: Mask | None = None,
) -> None:  # fmt: skip
    """`zoft.noise.perturb` of a CUDA tensor. More than PROBES_MAX probes take more launches."""
    wide = theta.dtype == torch.float64
    runs, where = _alike(updates), (start, floor, mask)
    for early in runs[:-1]:
        plan = plan_of(early, (), seed, step, beta, wide, theta.device)
        launch(theta, tid, None, plan, noise, momentum, *where)
    last = runs[-1] if runs else ()
    rows = None if out is None else out.view(len(probes), theta.numel())
    for first in range(0, max(1, len(probes)), PROBES_MAX):
        some = probes[first : first + PROBES_MAX]
        plan = plan_of(() if first else last, some, seed, step, beta, wide, theta.device)
        part = None if rows is None else rows[first : first + len(some)]
        launch(theta, tid, part, plan, noise, momentum, *where)


def _alike(updates: tuple[Update, ...]) -> list[tuple[Update, ...]]:
    """Cut where the number of directions changes, which a launch has one of; moves go with any but none."""
    runs: list[tuple[Update, ...]] = []
    size = None  # of the last run; None: moves so far
    for u in updates:
        own = None if u.is_nothing else len(u.multipliers)
        if runs and (own == size or (own is None and size) or (size is None and own)):
            runs[-1] += (u,)
            size = size or own
        else:
            runs.append((u,))
            size = own
    return runs


def direction(out: Tensor, tid: int, seed: int, step: int, direction: int, noise: str) -> None:
    """`zoft.noise.direction` into a CUDA tensor."""
    launch(
        None,
        tid,
        out.view(1, -1),
        plan_of((), ((direction, 1.0),), seed, step, 0.0, False, out.device),
        noise,
    )


def gather(
    theta: Tensor,
    tid: int,
    rows: Tensor,
    out: Tensor,
    direction: int,
    scale: float,
    seed: int,
    step: int,
    noise: str,
    start: int = 0,
    mask: Mask | None = None,
) -> None:
    """`zoft.noise.gather` of a CUDA tensor; rows are not checked."""
    plan = plan_of((), ((direction, scale),), seed, step, 0.0, theta.dtype == torch.float64, theta.device)
    launch_rows(theta, tid, rows, out, plan, noise, start, mask)


def _one(plan: Plan) -> int:
    """The directions of a plan's only update, where they are few enough to be unrolled; else 0."""
    return plan.directions if plan.updates == 1 and plan.directions <= 4 else 0


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _mask(mask: Mask | None) -> dict[str, Any]:
    """What a launch is told of a mask."""
    share, k0, k1 = 0, 0, 0
    if mask is not None and mask.threshold is None:
        share, (k0, k1) = mask.share, key(mask.seed, 0, 0)
    kind = ALL if mask is None else CHOSEN if mask.threshold is None else SMALL
    threshold = mask.threshold if mask is not None and mask.threshold is not None else 0.0
    return {"threshold": threshold, "share": share, "mask0": _signed(k0), "mask1": _signed(k1), "MASK": kind}


def _on(tensor: Tensor):
    return (
        torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    )  # a CPU: Triton's interpreter
