"""Quantised linear layers: whole-number codes, packed, and one fp32 scale for every group of a row.

    W[o, i] = Δ[o, g]·(c[o, i] − zero[o, g]),  g the group of column i;  c = 0, 1, … 2^bits − 1

The codes stand still; the scales Δ are what QZO trains. Codes of a group lie together; with 4 bits byte j of a
group of n holds column j in its lower half and column j + n/2 in its upper, so that both halves unpack in order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zoft.errors import UserError

BITS = (4, 8)
# A scale is at least this, when made and after every update: the paper's rule has 0, its code this.
FLOOR = 1e-7
# Shares of a group's extreme that are tried as the largest number that is not cut off.
CLIPS = tuple(1.0 - 0.04 * i for i in range(10))
UNIT = 128  # a zero point is so many 128ths of a code: whole numbers, which no cast of a model touches
FUSED_ROWS = 64  # of a probe: up to so many a GPU unpacks the codes within the product
_CHUNK = 1 << 24  # numbers quantised at a time: some ten fp32 copies of them are alive


class Scales(nn.Parameter):
    """Hold the scales of a quantised layer, whoever made it: stored and probed in fp32, without weight decay.

    logged: what is held is ln Δ, so that a step is relative and no scale can reach 0.
    """

    logged = False


class QuantLinear(nn.Module):
    """Compute y = x Wᵀ + b with W as above: an nn.Linear, or a Conv1D, whose weight is codes and scales.

    codes: uint8 [out, G·n·bits/8], n = group (padded to even, and to whole groups in a row). scales: fp32 [out, G].
    zeros: int16 [out, G], in units of 1/UNIT, or None: 2^(bits−1) for all. order: int32 [in], which column stands
    where, or None.
    """

    codes: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(
        self, shape: tuple[int, int], bits: int, group: int, *, zeros: bool = False, ordered: bool = False,
        bias: Tensor | None = None, transposed: bool = False, device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = shape
        self.bits, self.group = bits, group
        self.transposed = transposed  # stood for a Conv1D
        width = -(-self.in_features // group)  # groups in a row
        made: dict[str, Any] = {"dtype": torch.uint8, "device": device}
        self.register_buffer("codes", torch.zeros(self.out_features, width * self.padded * bits // 8, **made))
        self.scales = Scales(torch.ones(self.out_features, width, device=device), requires_grad=False)
        self.register_buffer(
            "zeros",
            torch.zeros(self.out_features, width, dtype=torch.int16, device=device) if zeros else None,
        )
        order = torch.arange(self.in_features, dtype=torch.int32, device=device) if ordered else None
        self.register_buffer("order", order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def padded(self) -> int:
        """Return codes that are kept for a group."""
        return self.group + self.group % 2

    @property
    def weight(self) -> Tensor:
        """Return the matrix, dequantised, in fp32 and in the shape that the layer it stands for has."""
        w = dequantise(self, self.scales.detach()[None], torch.float32)[0]
        if self.order is not None:
            w = torch.empty_like(w).index_copy_(1, self.order.long(), w)
        return w.mT.contiguous() if self.transposed else w

    def forward(self, x: Tensor) -> Tensor:
        x, scales = self.ordered(x), self.scales.detach()[None]
        if fused(self, x.reshape(1, -1, self.in_features), scales):
            y = x.new_empty(*x.shape[:-1], self.out_features)
            product(
                self, x.reshape(1, -1, self.in_features), scales, self.bias, y.view(1, -1, self.out_features)
            )
            return y
        w = dequantise(self, scales, x.dtype)[0]
        if self.bias is None or self.bias.dtype == x.dtype:
            return F.linear(x, w, self.bias)
        return (F.linear(x, w) + self.bias).to(x.dtype)

    def ordered(self, x: Tensor) -> Tensor:
        """Return x [..., in] with its columns as the codes have them."""
        return x if self.order is None else x.index_select(-1, self.order)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"


# ---- codes and back ------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack [out, G, n] whole numbers into uint8 [out, G·n·bits/8]; n even."""
    codes = codes.to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, -1)
        codes = low | (high << 4)
    return codes.flatten(1).contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return uint8 [out, G, n] of what `pack` made."""
    grouped = packed.unflatten(1, (-1, n * bits // 8))
    return torch.cat([grouped & 15, grouped >> 4], -1) if bits == 4 else grouped


def dequantise(layer: QuantLinear, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return [P, out, in]: the matrix under each of P sets of scales [P, out, G]; codes are read once for all.

    fl(Δ·(c − zero)) in the scales' precision, then rounded to dtype; columns in the codes' order.
    out: where to write it.
    """
    shape = (len(scales), layer.out_features, layer.in_features)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=scales.device)
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous(), (out.shape, out.dtype, shape)
    if scales.is_meta:
        return out
    log = layer.scales.logged
    if scales.is_cuda and scales.dtype == torch.float32:
        from zoft.models.quant import triton

        triton.dequantise(layer, scales.contiguous(), out, log)
        return out
    if log:
        scales = scales.exp()
    if scales.device.type == "cpu" and scales.dtype == torch.float32:
        from zoft.models.quant import cpu

        cpu.dequantise(layer, scales.contiguous(), out)
        return out
    whole = unpack(layer.codes, layer.bits, layer.padded)[..., : layer.group].to(scales.dtype)
    zero = 2 ** (layer.bits - 1) if layer.zeros is None else layer.zeros[..., None].to(scales.dtype) / UNIT
    w = scales[..., None] * (whole - zero)  # [P, out, G, n]
    return out.copy_(w.flatten(2)[..., : layer.in_features])


def product(
    layer: QuantLinear, x: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, w: Tensor | None = None
) -> None:
    """Write y_p = x_p W_pᵀ + b_p into y [P, n, out], W_p the matrix under scales [P, out, G].

    x: [P, n, in], columns in the codes' order. bias: [out] for all, [P, out], or None; added in fp32 where it is
    wider than x. w: scratch [P, out, in] of x's dtype.
    """
    assert x.shape[0] == scales.shape[0], (x.shape, scales.shape)
    if fused(layer, x, scales):
        from zoft.models.quant import triton

        bias = None if bias is None else bias.contiguous()
        log = layer.scales.logged
        triton.product(layer, x.contiguous(), scales.contiguous(), bias, y, log)
        return
    made = dequantise(layer, scales, x.dtype, w)
    for p in range(len(x)):
        b = None if bias is None else bias if bias.ndim == 1 else bias[p]
        if b is not None and b.dtype == x.dtype:
            torch.addmm(b, x[p], made[p].mT, out=y[p])
        else:
            torch.mm(x[p], made[p].mT, out=y[p])
            if b is not None:
                y[p] += b


def fused(layer: QuantLinear, x: Tensor, scales: Tensor) -> bool:
    """Say whether the product of these rows [P, n, in] unpacks codes on the way, instead of writing W down first."""
    few = x.is_cuda and x.shape[1] <= FUSED_ROWS and len(x) <= 2
    return few and scales.dtype == torch.float32 and layer.group in (32, 64, 128)


def quantise(
    weight: Tensor, bits: int, group: int, zero_points: bool, clips: tuple[float, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a matrix [out, in] to the nearest codes: (codes [out, G, n], scales fp32 [out, G], zeros int16 or None).

    Of the shares `clips` of each group's extreme (None: CLIPS with 4 bits, all of it with 8) the one with the least
    squared error is kept; the errors are summed in fp64, so that every device finds the same. Padding is any code.
    """
    if clips is None:
        clips = CLIPS if bits == 4 else (1.0,)
    parts = [
        _quantise(rows.float(), bits, group, zero_points, clips)
        for rows in weight.split(max(1, _CHUNK // weight.shape[1]))
    ]
    codes, scales, zeros = zip(*parts)
    return torch.cat(codes), torch.cat(scales), torch.cat(zeros) if zero_points else None


def _quantise(
    w: Tensor, bits: int, group: int, zero_points: bool, clips: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    top, half = 2**bits - 1, 2 ** (bits - 1)
    n = group + group % 2
    w = F.pad(w, (0, -w.shape[1] % group)).unflatten(1, (-1, group))  # [out, G, group]
    w = F.pad(w, (0, n - group))
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    best: tuple[Tensor, ...] | None = None
    for clip in clips:
        if zero_points:
            scale = ((high - low) * (clip / top)).clamp(min=FLOOR)
            zero = (-low * clip / scale).clamp(0, top).mul_(UNIT).round_().div_(UNIT)
        else:
            scale = (torch.maximum(high, -low) * (clip / (half - 1))).clamp(min=FLOOR)
            zero = torch.full_like(scale, half)
        codes = (w / scale).add_(zero).round_().clamp_(0, top)
        if len(clips) == 1:
            best = (codes, scale, zero)
            break
        error = (codes - zero).mul_(scale).sub_(w).square_().sum(-1, keepdim=True, dtype=torch.float64)
        if best is None:
            best, least = (codes, scale, zero), error
        else:
            better = error < least
            best = tuple(torch.where(better, a, b) for a, b in zip((codes, scale, zero), best))
            least = torch.minimum(error, least)
    assert best is not None
    codes, scale, zero = best
    return (
        codes.to(torch.uint8),
        scale[..., 0],
        (zero[..., 0] * UNIT).to(torch.int16) if zero_points else None,
    )


# ---- models --------------------------------------------------------------------------------------------------------


def from_linear(
    linear: nn.Module, bits: int, group: int, zero_points: bool, device: Any = None
) -> QuantLinear:
    """Return the layer's matrix quantised, on the device, its bias as it is; a group larger than a row becomes the row."""
    source: Any = linear
    transposed = type(source) is Conv1D
    weight = source.weight.detach()
    device = weight.device if device is None else torch.device(device)
    weight = weight.to(device)
    weight = weight.mT if transposed else weight
    group = min(group, weight.shape[1])
    bias = None if source.bias is None else source.bias.detach().to(device)
    layer = QuantLinear(
        (weight.shape[0], weight.shape[1]), bits, group, zeros=zero_points, bias=bias, transposed=transposed, device=device
    )  # fmt: skip
    if weight.device.type != "meta":
        codes, scales, zeros = quantise(weight, bits, group, zero_points)
        layer.codes, layer.scales.data, layer.zeros = pack(codes, bits), scales, zeros
    return layer.eval()


def quantise_model(
    model: Any,
    *,
    bits: int,
    group: int = 128,
    zero_points: bool = False,
    head: bool = False,
    device: Any = None,
) -> str:
    """Quantise the linear layers of a model in place, one by one, on the device (default: where each is).

    The output matrix only with `head`, and never one that is tied; embeddings, norms and everything that is no plain
    nn.Linear or Conv1D stay as they are, where they are. Returns a line that says what was done.
    Errors: UserError where the model is quantised already, holds nothing to quantise, or has a tied head.
    """
    if any(isinstance(p, Scales) for p in model.parameters()):
        raise UserError(f"bits={bits}: this model is quantised already; leave bits out")
    readers: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            readers[id(p)] = readers.get(id(p), 0) + 1
    top = getattr(model, "get_output_embeddings", lambda: None)()
    found = [(n, m) for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    if head and (top is None or readers[id(top.weight)] > 1):
        raise UserError("quantise_head: the output matrix of this model is its embedding; leave it out")
    chosen = [(n, m) for n, m in found if readers[id(m.weight)] == 1 and (head or m is not top)]
    if not chosen:
        raise UserError(f"bits={bits}: this model has no linear layer that can be quantised")
    short, quantised, size = 0, 0, 0
    for name, linear in chosen:
        layer = from_linear(linear, bits, group, zero_points, device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
        short += layer.group < group
        quantised += linear.weight.numel()
        size += layer.codes.nbytes + layer.scales.nbytes + (0 if layer.zeros is None else layer.zeros.nbytes)
        linear.weight = None  # its memory goes now, whoever still holds the layer
    rest = sum(p.numel() for p in model.parameters() if not isinstance(p, Scales))
    line = (
        f"{len(chosen)} of {len(found)} linear layers quantised to {bits} bits in groups of {group}"
        f"{' with zero points' if zero_points else ''}: {quantised / (quantised + rest):.0%} of the model's numbers, "
        f"{8 * size / quantised:.2f} bits each"
    )
    return line + (f"; rows of {short} layers are shorter than a group and are one each" if short else "")


def quantised_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantised layers of zoft's own, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def count_numbers(model: nn.Module) -> int:
    """Return the weights of a model as its paper would count them: of a quantised layer its codes, not its scales."""
    ours = sum(m.in_features * m.out_features for m in quantised_layers(model).values())
    return ours + sum(p.numel() for p in model.parameters() if not isinstance(p, Scales))


def dequantise_layers(model: nn.Module) -> None:
    """Put nn.Linear and Conv1D with the dequantised weights, in fp32, where the quantised layers are."""
    for name, layer in quantised_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain(layer, layer.weight))


def plain(layer: QuantLinear, weight: Tensor) -> nn.Module:
    """Return the nn.Linear or Conv1D that the layer stands for, of this weight."""
    shape = (layer.in_features, layer.out_features)
    with torch.device("meta"):
        linear: Any = (
            Conv1D(*reversed(shape)) if layer.transposed else nn.Linear(*shape, bias=layer.bias is not None)
        )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear.eval()


def set_log(model: nn.Module, log: bool) -> None:
    """Hold the scales of zoft's own layers as logarithms, or as they are, from now on; W stays what it is."""
    for layer in quantised_layers(model).values():
        scales = layer.scales
        if scales.logged != log:
            if log and not bool((scales.data > 0).all()):
                raise UserError(
                    "eps_mode=relative: this model has scales that are not positive; use absolute"
                )
            scales.data = scales.data.log() if log else scales.data.exp()
            scales.logged = log
