"""Linear layers at directions of rank 1 on a GPU: what a probe adds to the product is put into y first, the product on top.

    h[p, r] = x[p, r]·b_p;   y[p, r] = bias_p + s_p·h[p, r]·a_p;   y += x Wᵀ

Signs stay packed, a bit for each direction of a word. The two small kernels read x once and write y once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCHES = 6e7  # bytes of traffic that the launches here are worth: about 14 µs (docs/benchmarks/step.md)


@triton.jit
def _bit(words, direction, stride, place, inside):
    """±1 of the places for a direction: bit direction % 32 of word [direction // 32, place]."""
    word = tl.load(words + (direction // 32) * stride + place, mask=inside, other=0)
    return ((word >> (direction % 32)) & 1).to(tl.float32) * 2.0 - 1.0


@triton.jit
def _inner(
    x, h, words, which, stride, rows, width, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """h[p, r] = Σ_i x[p, r, i]·b_p[i], in fp32 (fp64 if WIDE); program (j, p): ROWS rows."""
    p = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    direction = tl.load(which + p)
    start = (p.to(tl.int64) * rows + r.to(tl.int64)) * width
    total = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
    for at in range(0, width, BLOCK):
        i = at + tl.arange(0, BLOCK)
        inside = i < width
        sign = _bit(words, direction, stride, i, inside)
        v = tl.load(x + start[:, None] + i[None, :], mask=(r < rows)[:, None] & inside[None, :], other=0.0)
        total += v.to(total.dtype) * sign[None, :].to(total.dtype)
    tl.store(h + p * rows + r, tl.sum(total, 1), mask=r < rows)


@triton.jit
def _outer(
    y, h, words, which, scales, bias, bias_stride, stride, rows, width,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, r, i] = bias[p, i] + s_p·h[p, r]·a_p[i]; program (j, k, p): ROWS rows, BLOCK columns."""
    p = tl.program_id(2)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    sign = _bit(words, tl.load(which + p), stride, i, inside)
    mine = tl.load(h + p * rows + r, mask=r < rows, other=0.0)
    out = (mine * tl.load(scales + p).to(mine.dtype))[:, None] * sign[None, :].to(mine.dtype)
    if BIAS:
        out += tl.load(bias + p * bias_stride + i, mask=inside, other=0.0).to(mine.dtype)[None, :]
    at = (p.to(tl.int64) * rows + r.to(tl.int64))[:, None] * width + i[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(r < rows)[:, None] & inside[None, :])


def pays(rows: int, ins: int, outs: int, probes: int, converted: bool) -> bool:
    """Say whether these kernels move fewer bytes than making each probe's weights does.

    They read x once, write y once and let the product read it; without them each probe's weights are written and read.
    converted: W is stored in another dtype than it computes in, so that one copy of it is made in any case.
    """
    return 2.0 * rows * (ins + 2 * outs) + LAUNCHES < 4.0 * ins * outs * (probes - converted)


def fused_product(
    xs: Tensor, w: Tensor, inward: Tensor, outward: Tensor, which: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """Return y [P, n, out] of xs [P, n, in] and w [in, out]: x W + s·(x·b) aᵀ + bias, at each probe.

    inward, outward: int32 [J, in] and [J, out], the packed signs of b and a, rows at one stride. which: int32 [P], the
    direction of each probe. scales: fp32 [P]. bias: [P, out] or [1, out].
    """
    probes, rows, ins = xs.shape
    outs = w.shape[1]
    xs = xs.contiguous()
    wide = xs.dtype == torch.float64
    h = torch.empty(probes, rows, dtype=torch.float64 if wide else torch.float32, device=xs.device)
    y = torch.empty(probes, rows, outs, dtype=xs.dtype, device=xs.device)
    assert inward.stride(1) == outward.stride(1) == 1, (inward.stride(), outward.stride())
    _inner[(triton.cdiv(rows, 4), probes)](
        xs, h, inward, which, inward.stride(0), rows, ins, WIDE=wide, ROWS=4, BLOCK=512, num_warps=4
    )  # fmt: skip
    stride = 0 if bias is None or len(bias) == 1 else bias.stride(0)
    _outer[(triton.cdiv(rows, 8), triton.cdiv(outs, 512), probes)](
        y, h, outward, which, scales, h if bias is None else bias, stride, outward.stride(0), rows, outs,
        BIAS=bias is not None, ROWS=8, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return y.flatten(0, 1).addmm_(xs.flatten(0, 1), w).view_as(y)
