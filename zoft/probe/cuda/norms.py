"""One kernel for a norm at all probes: on a GPU an eager norm is many small launches a probe."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

WIDTH_MAX = 16384  # one program holds a whole row


@triton.jit
def _norm(
    x,
    w,
    b,
    y,
    rows,
    width,
    stride,
    eps,
    MEAN: tl.constexpr,
    PLUS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[r] = (x[r] − mean)·rsqrt(var + eps)·(w[p] + PLUS) + b[p], p = r // rows; all in fp32, rounded once."""
    r = tl.program_id(0).to(tl.int64)
    p = r // rows
    i = tl.arange(0, BLOCK)
    inside = i < width
    v = tl.load(x + r * width + i, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        v = tl.where(inside, v - tl.sum(v) / width, 0.0)
    scale = tl.rsqrt(tl.sum(v * v) / width + eps)
    out = v * scale * (tl.load(w + p * stride + i, mask=inside, other=0.0) + PLUS)
    if BIAS:
        out += tl.load(b + p * stride + i, mask=inside, other=0.0)
    tl.store(y + r * width + i, out.to(y.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Return the rows of x normalised and scaled by the weight of their probe.

    layer: (x − mean)/√(var + eps)·w + b;  rms: x/√(mean x² + eps)·w;  rms1: x/√(mean x² + eps)·(1 + w)

    x: [P·n, …, H] on a GPU; weight, bias: fp32 [P, H], rows at one stride. Returns x's shape and dtype.
    Raises nothing for any shape; a row is at most WIDTH_MAX wide (`kind_of` sees to it).
    """
    x = x.contiguous()
    width = x.shape[-1]
    lines = x.numel() // width
    y = torch.empty_like(x)
    assert bias is None or bias.stride() == weight.stride(), (weight.stride(), bias.stride())
    block = triton.next_power_of_2(width)
    _norm[(lines,)](
        x, weight, bias if bias is not None else weight, y, lines // weight.shape[0], width, weight.stride(0), eps,
        MEAN=kind == "layer", PLUS=1.0 if kind == "rms1" else 0.0, BIAS=bias is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return y


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Compute the same for one probe in plain torch: what a module must compute to be given to `norm`."""
    v = x.double()
    if kind == "layer":
        v = v - v.mean(-1, keepdim=True)
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    v = v * (weight.double() + (1.0 if kind == "rms1" else 0.0))
    return v if bias is None else v + bias.double()


@torch.no_grad()
def kind_of(module: nn.Module) -> tuple[str, float] | None:
    """Return (kind, eps) of a module that is a norm over its last dimension, found by trying it; None for any other.

    A candidate has one or two 1-D parameters, `weight` and perhaps `bias`, and an epsilon; it is taken if on
    random rows its own forward agrees with a kind's formula to rounding.
    """
    params: dict[str, Any] = dict(module.named_parameters(recurse=False))
    if set(params) not in ({"weight"}, {"weight", "bias"}) or list(module.children()):
        return None
    weight, bias = params["weight"], params.get("bias")
    eps = next(
        (v for k in ("eps", "variance_epsilon") if isinstance(v := getattr(module, k, None), float)), None
    )
    if weight.ndim != 1 or eps is None or weight.shape[0] > WIDTH_MAX:
        return None
    generator = torch.Generator().manual_seed(0)
    # Small rows, so that eps shows; a mean, so that centring shows.
    x = torch.randn(4, weight.shape[0], generator=generator, device="cpu") * 0.02 + 0.01
    x = x.to(weight.device, weight.dtype)
    try:
        got = module(x)
    except (RuntimeError, TypeError):
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    tolerance = 1e-4 if weight.dtype == torch.float32 else 0.02
    for kind in ("layer", "rms", "rms1"):
        want = reference(x, weight, bias, eps, kind)
        if float((got.double() - want).norm()) <= tolerance * float(want.norm()):
            return kind, eps
    return None
