"""The specification's words, roundings and masks as plain torch operations: slow, right, on any device.

What applies an update rule that no kernel has (`advance`), a chunk of a tensor at a time. tests/method/test_rules.py
compares it with the kernels, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoft.noise.noise import moving, perturb
from zoft.noise.spec import PART, Mask, Update, key

CHUNK = 1 << 18  # elements worked on at a time: about 20 MB of temporaries; a multiple of PART
_LOW = 0xFFFFFFFF
_FP16_MAX = 65504.0


def words(first: int, count: int, tid: int, purpose: int, key: tuple[int, int], device: Any) -> Tensor:
    """Return the four words of `count` counters from `first` on: int64 [count, 4], each below 2³²."""
    counter = torch.arange(first, first + count, device=device)  # int64 [count]
    a, b = counter & _LOW, counter >> 32
    c, d = torch.full_like(a, tid), torch.full_like(a, purpose)
    p, q = key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2⁶⁴: all their bits, the sign's place included
        a, b, c, d = (y >> 32 & _LOW) ^ b ^ p, y & _LOW, (x >> 32 & _LOW) ^ d ^ q, x & _LOW
        p, q = (p + 0x9E3779B9) & _LOW, (q + 0xBB67AE85) & _LOW
    return torch.stack((a, b, c, d), 1)


def halves(start: int, n: int, tid: int, purpose: int, key: tuple[int, int], device: Any) -> Tensor:
    """Return the 16 random bits of each of n elements from `start` on, a multiple of 8: int32 [n]."""
    w = words(start // 8, -(-n // 8), tid, purpose, key, device).int()  # [c, 4], wrapped to int32
    return torch.stack((w & 0xFFFF, w >> 16 & 0xFFFF), 2).flatten()[:n]


def round_stochastic(x: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite fp32 x [n] to fp16 or bf16 with the bits r, int32 [n]: up with the share of an ulp that is lost."""
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        return (bits + r >> 16).to(torch.int16).view(dtype)
    # ±2^e of each x, with the e of fp16's subnormals at least; times (r >> 3)·2⁻²³ it is that share of an ulp.
    power = ((bits & 0x7F800000).clamp_min(0x38800000) | (bits & -0x80000000)).view(torch.float32)
    s = (x + ((r >> 3) * 2.0**-23) * power).clamp(-_FP16_MAX, _FP16_MAX)
    h = s.half()  # to nearest: one grid point too far wherever that is away from zero
    far = h.float().abs() > s.abs()
    return (h.view(torch.int16) - far.to(torch.int16)).view(dtype)


def drawn(theta: Tensor, tid: int, mask: Mask, start: int) -> Tensor:
    """Return which of theta's elements [n], from `start` on, a mask lets move: bool [n]."""
    if mask.threshold is not None:
        return moving(theta, tid, mask)
    return halves(start, theta.numel(), tid, 2, key(mask.seed, mask.period, 0), theta.device) < mask.share


def summed(u: Update, n: int, tid: int, noise: str, start: int, like: Tensor, width: int = 0) -> Tensor:
    """Return Σ_k multipliers[k]·z_k of n elements from `start` on, in the order of directions; like's dtype, [n]."""
    zero = torch.full((n,), -0.0, device=like.device)  # fp32: what z is added to without a change
    z, total = torch.empty(1, n, device=like.device), zero.to(like.dtype)
    for k, (multiplier, (step, direction)) in enumerate(zip(u.multipliers, u.where())):
        perturb(
            zero, tid, z, [(direction, 1.0)], seed=u.seed, step=step, noise=noise, start=start, width=width
        )
        product = z[0].to(like.dtype) * (multiplier + 0.0)  # a multiplier of -0 counts as +0
        total = product if k == 0 else total + product
    return total


@torch.no_grad()
def advance(
    theta: Tensor,
    tid: int,
    u: Update,
    noise: str,
    step: Callable[[Tensor, Tensor, dict[str, Any], float], Tensor],
    state: Mapping[str, Tensor],
    *,
    count: int = 1,
    floor: float | None = None,
    mask: Mask | None = None,
    width: int = 0,
) -> None:
    """Apply one update to θ in place by any rule: θ ← round(max(step(decay·θ, g, state, lr), floor)), g = -Σ m_k·z_k.

    Everything is computed in fp32, or in fp64 for an fp64 θ, and rounded as the fused pass rounds: same bits of noise,
    same order. An element that the mask leaves out keeps its bits, and its g is 0. With lr 0 and without decay θ is
    not written at all; state is.

    theta: contiguous. width: as in `noise.advance`. state: buffers of its shape. step gets contiguous parts of all of them, [n] each, may change
    those of the state in place or put others in their places, and returns the new θ. In its state, "t" is `count`,
    the number of this update, from 1.
    """
    assert theta.is_contiguous() and CHUNK % PART == 0, theta.stride()
    work = torch.float64 if theta.dtype == torch.float64 else torch.float32
    flat, buffers = theta.view(-1), {name: b.view(-1) for name, b in state.items()}
    for start in range(0, flat.numel(), CHUNK):
        old = flat[start : start + CHUNK]
        n, a = old.numel(), old.to(work, copy=True)
        g = summed(u, n, tid, noise, start, a, width).neg_()
        keep = None if mask is None else drawn(old, tid, mask.at(u.step), start)
        if keep is not None:
            g.masked_fill_(~keep, 0.0)
        if u.decay != 1:
            a = a * u.decay
        mine = {name: b[start : start + n] for name, b in buffers.items()}
        given: dict[str, Any] = {**mine, "t": count}
        a = step(a, g, given, u.lr)
        for name, b in mine.items():
            if given[name] is not b:
                b.copy_(given[name])
        if u.lr == 0 and u.decay == 1:
            continue
        if floor is not None:
            a = a.clamp_min(floor)
        if theta.itemsize == 2:
            r = halves(start, n, tid, 1, key(u.seed, u.step, 0), theta.device)
            a = round_stochastic(a, r, theta.dtype)
        old.copy_(a if keep is None else torch.where(keep, a, old))
