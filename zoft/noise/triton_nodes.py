"""Kernels of node perturbation on a GPU: signs added to a layer's outputs, signs weighed for Ĝ, and a matrix's move.

Signs and rounding bits are those of the specification (noise.spec: node, rounding), so they are the CPU's.
What changes from step to step is read from device memory, so that a captured graph can be fed new values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoft.noise.spec import NODE as _NODE
from zoft.noise.spec import NODE_BITS as _NODE_BITS
from zoft.noise.triton import _on, _signed
from zoft.noise.triton_kernels import _round_stochastic, _words

NODE, NODE_BITS = tl.constexpr(_NODE), tl.constexpr(_NODE_BITS)
_TOKENS, _BLOCKS = 8, 2  # of a program: tokens, and counters of 128 units each
_LANES = 128  # of 8 elements each: what one program of `_move` works on


@triton.jit
def _signs(cells, token, inside, count, block, tid, TOKENS: tl.constexpr, BLOCKS: tl.constexpr):
    """u of TOKENS tokens and the 128·BLOCKS units from `block` on: fp32 [TOKENS, 128·BLOCKS], ±1; 0 at no token."""
    row = tl.load(cells + token, mask=inside, other=0)
    position = tl.load(cells + count + token, mask=inside, other=0)
    k0 = tl.load(cells + 2 * count + token, mask=inside, other=0).to(tl.uint32, bitcast=True)
    k1 = tl.load(cells + 3 * count + token, mask=inside, other=0).to(tl.uint32, bitcast=True)
    valid = tl.load(cells + 4 * count + token, mask=inside, other=0)
    high = row.to(tl.uint32, bitcast=True).to(tl.int64) << 32
    low = (position.to(tl.uint32, bitcast=True).to(tl.int64) << NODE_BITS)[:, None] + (
        block + tl.arange(0, BLOCKS)[None, :]
    ).to(tl.int64)
    w0, w1, w2, w3 = _words(
        high[:, None] + low, tid.to(tl.uint32, bitcast=True), NODE, k0[:, None], k1[:, None]
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TOKENS, 4 * BLOCKS])  # in order
    bits = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    u = tl.reshape(bits, [TOKENS, 128 * BLOCKS]).to(tl.float32) * 2.0 - 1.0
    return u * valid.to(tl.float32)[:, None]


@triton.jit
def _add(
    y, cells, scales, sigma, places, count, units, tid, WIDE: tl.constexpr, PROBES: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """y[p, place of t] += scales[p]·sigma·u[t] in place; program (i, j): TOKENS tokens, 128·BLOCKS units."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = tl.load(cells + 4 * count + token, mask=token < count, other=0) != 0
    place = tl.load(cells + 5 * count + token, mask=token < count, other=0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS
    unit = block * 128 + tl.arange(0, 128 * BLOCKS)
    u = _signs(cells, token, token < count, count, block, tid, TOKENS, BLOCKS)
    inside = real[:, None] & (unit < units)[None, :]
    for p in tl.static_range(PROBES):
        at = y + (p * places + place)[:, None] * units + unit[None, :]
        v = tl.load(at, mask=inside, other=0.0)
        s = tl.load(scales + p) * sigma
        if WIDE:
            v = v + s.to(tl.float64) * u.to(tl.float64)
        else:
            v = v.to(tl.float32) + s * u
        tl.store(at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weigh(out, cells, weights, count, units, tid, TOKENS: tl.constexpr, BLOCKS: tl.constexpr):
    """out[t] = weights[t]·u[t]; program (i, j): TOKENS tokens, 128·BLOCKS units."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1) * BLOCKS
    unit = block * 128 + tl.arange(0, 128 * BLOCKS)
    u = _signs(cells, token, token < count, count, block, tid, TOKENS, BLOCKS)
    weight = tl.load(weights + token, mask=token < count, other=0.0)
    inside = (token < count)[:, None] & (unit < units)[None, :]
    at = out + token.to(tl.int64)[:, None] * units + unit[None, :]
    tl.store(at, (u.to(weight.dtype) * weight[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _move(
    w, g, factor, decay, keys, n, tid, STOCHASTIC: tl.constexpr, BF16: tl.constexpr, LANES: tl.constexpr
):
    """w ← round(decay·w - factor·g) of n elements; with factor 0 and decay 1 nothing is written."""
    f, d = tl.load(factor), tl.load(decay)
    if (f != 0) | (d != 1):
        base = tl.program_id(0).to(tl.int64) * (8 * LANES)
        at = base + tl.arange(0, 8 * LANES)
        v = tl.load(g + at, mask=at < n, other=0.0)
        old = tl.load(w + at, mask=at < n, other=0.0).to(v.dtype)
        new = old * d.to(v.dtype) - v * f.to(v.dtype)
        if STOCHASTIC:
            new = _round_stochastic(new, base, tid.to(tl.uint32, bitcast=True), keys, 0, BF16, LANES)
        tl.store(w + at, new.to(w.dtype.element_ty), mask=at < n)


def _grid(count: int, units: int) -> tuple[int, int]:
    return triton.cdiv(count, _TOKENS), triton.cdiv(units, 128 * _BLOCKS)


def add_signs(y: Tensor, cells: Tensor, scales: Tensor, sigma: float, tid: int) -> None:
    """Add scales[p]·sigma·u to the outputs y [P, R·T, m] of a layer at the places of N tokens, in place.

    cells: int32 [6, N], noise.nodes.cells_of. scales: fp32 [P]. tid: of the layer's matrix.
    """
    probes, places, units = y.shape
    count = cells.shape[1]
    assert y.is_contiguous() and len(cells) == 6 and len(scales) == probes, (y.shape, cells.shape)
    with _on(y):
        _add[_grid(count, units)](
            y, cells, scales, sigma, places, count, units, _signed(tid), WIDE=y.dtype == torch.float64, PROBES=probes, TOKENS=_TOKENS,
            BLOCKS=_BLOCKS, num_warps=4,
        )  # fmt: skip


def weighed_signs(cells: Tensor, weights: Tensor, units: int, tid: int, dtype: torch.dtype) -> Tensor:
    """Return weights[t]·u[t] for each token: [N, units] in a dtype. weights: fp32 or fp64 [N]."""
    out = torch.empty(cells.shape[1], units, dtype=dtype, device=cells.device)
    with _on(out):
        _weigh[_grid(*out.shape)](
            out, cells, weights, out.shape[0], units, _signed(tid), TOKENS=_TOKENS, BLOCKS=_BLOCKS, num_warps=4
        )  # fmt: skip
    return out


def move_matrix(w: Tensor, g: Tensor, factor: Tensor, decay: Tensor, keys: Tensor, tid: int) -> None:
    """Move a matrix in place: w ← round(decay·w - factor·g), rounded stochastically to 16 bits.

    g: of w's shape, in the work dtype (fp32; fp64 for fp64). factor, decay: one number each, on the device. keys: int32 [1, 2],
    the step's rounding key.
    """
    assert w.is_contiguous() and g.is_contiguous() and w.shape == g.shape, (w.shape, g.shape)
    with _on(w):
        _move[(triton.cdiv(w.numel(), 8 * _LANES),)](
            w, g, factor, decay, keys, w.numel(), _signed(tid), STOCHASTIC=w.itemsize == 2,
            BF16=w.dtype == torch.bfloat16, LANES=_LANES, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
