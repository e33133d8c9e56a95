"""Codes to weights on a GPU: into bf16 scratch for a product of many rows, or within the product of few.

Both read the codes once for all probes. Group sizes are powers of two in `product`; `dequantise` takes any.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(128.0)  # quant.UNIT; the division is exact
_CODES = 4096  # that a program of `_dequantise` unpacks


@triton.jit
def _scale(scales, at, inside, LOG: tl.constexpr):
    s = tl.load(scales + at, mask=inside, other=0.0)
    return tl.exp(s) if LOG else s


@triton.jit
def _dequantise(
    codes,  # uint8 [out·G, HELD]
    scales,  # fp32 [PROBES, out·G]
    zeros,  # int16 [out·G], or none
    out,  # [PROBES, out, width]
    count,  # out·G
    groups,  # G
    width,
    size,  # out·width
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HELD: tl.constexpr,  # bytes of a group
    WHOLE: tl.constexpr,  # width = G·GROUP and no group is padded: groups follow each other in out, too
    HAS_ZEROS: tl.constexpr,
    LOG: tl.constexpr,
    PROBES: tl.constexpr,
    GROUPS: tl.constexpr,  # that a program works on
    BLOCK: tl.constexpr,  # HELD, up to a power of two
):
    at = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    j = tl.arange(0, BLOCK)[None, :]
    inside = at < count
    live = inside if HELD == BLOCK else inside & (j < HELD)
    c = tl.load(codes + at * HELD + j, mask=live, other=0)
    if HAS_ZEROS:
        zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) / UNIT
    else:
        zero = 2.0 ** (BITS - 1)
    if BITS == 4:
        low, high = (c & 15).to(tl.float32) - zero, (c >> 4).to(tl.float32) - zero
    else:
        low, high = c.to(tl.float32) - zero, zero
    if WHOLE:
        place, first, second = at * GROUP + j, live, live
    else:
        start = at % groups * GROUP
        place, limit = at // groups * width + start + j, tl.minimum(width - start, GROUP)
        first, second = live & (j < limit), live & (j + HELD < limit)
    for p in tl.static_range(PROBES):
        s = _scale(scales + p * count, at, inside, LOG)
        row = out + tl.full([], p, tl.int64) * size + place
        tl.store(row, (s * low).to(out.dtype.element_ty), mask=first)
        if BITS == 4:
            tl.store(row + HELD, (s * high).to(out.dtype.element_ty), mask=second)


@triton.jit
def _product(
    x,  # [PROBES, rows, width]
    codes,  # uint8 [out, G·HELD]
    scales,  # fp32 [PROBES, out, G]
    zeros,  # int16 [out, G], or none
    bias,  # [out], or [PROBES, out], or none
    y,  # [PROBES, rows, out]
    rows,
    width,
    outs,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HELD: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIASES: tl.constexpr,  # a bias of its own for each probe
    LOG: tl.constexpr,
    PROBES: tl.constexpr,  # 1 or 2
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
):
    """yᵀ = W xᵀ a tile at a time: codes are unpacked in registers, where a product may take its left side from."""
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, HELD)
    o_in, r_in = o < outs, r < rows
    first = tl.zeros([OUTS, ROWS], tl.float32)
    second = tl.zeros([OUTS, ROWS], tl.float32)
    code_at = codes + o.to(tl.int64)[:, None] * (groups * HELD) + j[None, :]
    x_at = x + r.to(tl.int64)[None, :] * width + j[:, None]
    for g in range(groups):
        c = tl.load(code_at + g * HELD, mask=o_in[:, None], other=0)  # [OUTS, HELD]
        if HAS_ZEROS:
            zero = tl.load(zeros + o * groups + g, mask=o_in, other=0).to(tl.float32)[:, None] / UNIT
        else:
            zero = 2.0 ** (BITS - 1)
        k = g * GROUP + j
        if BITS == 4:
            low, high = (c & 15).to(tl.float32) - zero, (c >> 4).to(tl.float32) - zero
        else:
            low, high = c.to(tl.float32) - zero, zero
        for p in tl.static_range(PROBES):
            s = _scale(scales + p * outs * groups, o * groups + g, o_in, LOG)[:, None]
            here = x_at + tl.full([], p, tl.int64) * rows * width + g * GROUP
            left = tl.load(here, mask=r_in[None, :] & (k < width)[:, None], other=0.0)  # [HELD, ROWS]
            if p == 0:
                first = tl.dot((s * low).to(left.dtype), left, first, input_precision="ieee")
            else:
                second = tl.dot((s * low).to(left.dtype), left, second, input_precision="ieee")
            if BITS == 4:
                right = tl.load(here + HELD, mask=r_in[None, :] & (k + HELD < width)[:, None], other=0.0)
                if p == 0:
                    first = tl.dot((s * high).to(left.dtype), right, first, input_precision="ieee")
                else:
                    second = tl.dot((s * high).to(left.dtype), right, second, input_precision="ieee")
    for p in tl.static_range(PROBES):
        made = first if p == 0 else second
        if HAS_BIAS:
            made += tl.load(bias + BIASES * p * outs + o, mask=o_in, other=0.0).to(tl.float32)[:, None]
        at = y + (tl.full([], p, tl.int64) * rows + r.to(tl.int64)[None, :]) * outs + o[:, None]
        tl.store(at, made.to(y.dtype.element_ty), mask=o_in[:, None] & r_in[None, :])


def dequantise(layer: Any, scales: Tensor, out: Tensor, log: bool) -> None:
    """Run `zoft.models.quant.linear.dequantise` of fp32 scales [P, out, G] on a GPU; layer: a `zoft.models.quant.linear.QuantLinear`."""
    probes, outs, groups = scales.shape
    held = layer.padded * layer.bits // 8
    block = max(16, triton.next_power_of_2(held))
    each = max(1, _CODES // (block * 8 // layer.bits))
    with _on(scales):
        _dequantise[(triton.cdiv(outs * groups, each),)](
            layer.codes, scales, scales if layer.zeros is None else layer.zeros, out,
            outs * groups, groups, layer.in_features, outs * layer.in_features,
            BITS=layer.bits, GROUP=layer.group, HELD=held, WHOLE=layer.in_features == groups * layer.padded,
            HAS_ZEROS=layer.zeros is not None, LOG=log, PROBES=probes, GROUPS=each, BLOCK=block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def product(layer: Any, x: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, log: bool) -> None:
    """Compute y_p = x_p W_pᵀ + b: x [P, n, in] in the codes' order, scales fp32 [P, out, G], bias [out] or [P, out]; P is 1 or 2.

    layer: a `zoft.models.quant.linear.QuantLinear`. Made for few rows: what a program unpacks it uses for `ROWS` of them only.
    """
    probes, rows, width = x.shape
    outs, groups = scales.shape[1:]
    block = min(64, max(16, triton.next_power_of_2(rows)))
    with _on(x):
        _product[(triton.cdiv(outs, 64), triton.cdiv(rows, block))](
            x, layer.codes, scales, scales if layer.zeros is None else layer.zeros, x if bias is None else bias, y,
            rows, width, outs, groups, BITS=layer.bits, GROUP=layer.group, HELD=layer.group * layer.bits // 8,
            HAS_ZEROS=layer.zeros is not None, HAS_BIAS=bias is not None, BIASES=bias is not None and bias.ndim == 2,
            LOG=log, PROBES=probes, ROWS=block, OUTS=64, num_warps=4, num_stages=3,
        )  # fmt: skip


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
