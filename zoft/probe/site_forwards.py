"""Run a site at several probes: a direct route for common modules, a general one for any other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from zoft.method.space import Trained
from zoft.models.quant import linear as quant
from zoft.models.quant.linear import QuantLinear, fused
from zoft.probe.lora_forward import lora, pair
from zoft.probe.outer_forward import is_outer
from zoft.probe.rows import COUNT, LIFT, NO_ROWS, ONE, PLAIN, Call, Unfit
from zoft.probe.scratch import Scratch, in_slabs, nbytes, slab_rows
from zoft.probe.sites import Site


def fast(site: Site) -> Callable | None:
    """Return a direct route for exact types with their own forward and rows in dim 0; None: the general one."""
    kind = type(site.module)
    ways = {nn.Linear: linear, nn.Embedding: embedding, Conv1D: conv1d, QuantLinear: quantised}
    way = ways.get(kind)
    if pair(site) is not None:
        way = lora
    elif not _owns(site):
        return None
    if way is None or "forward" in site.module.__dict__ or site.module._forward_hooks:
        return None
    if any(c.inputs != [0] or c.outputs != [0] for c in site.calls):
        return None
    return None if kind is nn.Embedding and site.module.max_norm is not None else way


def _owns(site: Site) -> bool:
    if isinstance(site.module, QuantLinear):
        return True
    weight = getattr(site.module, "weight", None)
    return any(t.param is weight for t in site.trained)


def route(axis: Scratch, site: Site, direct: Callable | None) -> Callable:
    """Return the forward that takes the place of a site's own while its axis is active; direct: its route, None: the general one."""
    inner = site.module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call(axis, site) if len(axis.probes) > 1 else None
        if direct is not None and (
            call is None or (args or [*kwargs.values()])[0].shape[0] % len(axis.probes) == 0
        ):
            return direct(axis, site, *args, **kwargs)
        return _general(axis, site, call, inner, args, kwargs)

    forward.accepts_tokens = direct is linear  # type: ignore[attr-defined]
    return forward


def _general(axis: Scratch, site: Site, call: Call | None, inner: Callable, args: tuple, kwargs: dict) -> Any:
    """Any module: its own forward, once per probe, on that probe's rows, its tensors swapped.

    Sites within it run meanwhile, at that one probe.
    """
    probes, used, outer = axis.probes, axis.used, axis.first
    count = len(probes)
    before = [t.param.data for t in site.trained]
    upcast = _runs_fp32(site) and all(t.compute == torch.float32 for t in site.trained)
    flat, spec = tree_flatten((args, kwargs))
    if call is not None and call.spec != spec:
        raise Unfit(f"{site.name} is called with other arguments than it was calibrated with")
    narrow = next((x.dtype for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    if upcast:
        flat = [
            x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x
            for x in flat
        ]
    parts = []
    try:
        for first, group in list(axis.groups()):
            made = axis.perturbed(site.trained, group, first)
            axis.used = used + len(group) * sum(nbytes(t) for t in site.trained)
            for i in range(len(group)):
                axis.probes, axis.first = (group[i],), outer + first + i
                for t, scratch in zip(site.trained, made, strict=True):
                    t.param.data = scratch[i]
                a, kw = tree_unflatten(_rows_of(flat, call, first + i, count, site.name), spec)
                out, out_spec = tree_flatten(inner(*a, **kw))
                if upcast and narrow is not None:
                    out = [
                        x.to(narrow) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
                        for x in out
                    ]
                parts.append(
                    [x.clone() if isinstance(x, torch.Tensor) and axis.in_scratch(x) else x for x in out]
                )
            axis.probes, axis.used, axis.first = probes, used, outer
    finally:
        axis.probes, axis.used, axis.first = probes, used, outer
        for t, data in zip(site.trained, before):
            t.param.data = data
    if call is None:
        return tree_unflatten(parts[0], out_spec)
    shared = all(x.shape[d] == 1 for x, d in zip(flat, call.inputs) if d >= 0 and isinstance(x, torch.Tensor))
    joined = _join(parts, call, axis.batch_rows, site.name, shared)
    return tree_unflatten(joined, out_spec)


def _call(axis: Scratch, site: Site) -> Call:
    """The layout of the site's next call. One call more than calibrated is not understood, however alike they look:
    a module that works through its rows in portions would be given probes for portions."""
    k = axis.calls[site]
    axis.calls[site] = k + 1
    if k >= len(site.calls):
        raise Unfit(f"{site.name}: call {k + 1} of a forward, {len(site.calls)} were calibrated")
    return site.calls[k]


def _rows_of(flat: list, call: Call | None, probe: int, count: int, name: str = "") -> list:
    """The leaves of one probe's call: its share of everything that carries rows."""
    if call is None:
        return flat
    assert len(flat) == len(call.inputs), (len(flat), len(call.inputs))
    out: list[Any] = []
    for leaf, (x, dim) in enumerate(zip(flat, call.inputs, strict=True)):
        if dim == COUNT:
            if not isinstance(x, int) or x % count:
                raise Unfit(f"{name} takes a number of rows, {x}, for {count} probes")
            out.append(x // count)
            continue
        if not isinstance(x, torch.Tensor):
            out.append(x)
            continue
        if dim == PLAIN and x.ndim:
            dim = call.inputs[leaf] = _late(x, flat, call, count, name)
        if (dim == ONE and x.shape[0] != 1) or (dim == NO_ROWS and x.ndim == call.ranks[leaf] + 1):
            dim = 0  # expanded to rows by an earlier site
        if dim < 0 or x.shape[dim] == 1:  # what has one row is shared: there are at least as many as probes
            out.append(x)
            continue
        n, rest = divmod(x.shape[dim], count)
        if rest:
            raise Unfit(f"{name} takes {x.shape[dim]} rows for {count} probes")
        out.append(x.narrow(dim, probe * n, n))
    return out


def _late(x: torch.Tensor, flat: list, call: Call, count: int, name: str) -> int:
    """Rows of a tensor that was absent at calibration (a mask where nothing was padded): its dim 0, if it has as many
    as the others and every probe's share is the same, which masks of repeated rows are."""
    rows = {
        y.shape[d] for y, d in zip(flat, call.inputs, strict=True) if isinstance(y, torch.Tensor) and d >= 0
    }
    if x.shape[0] == 1:
        return ONE
    if rows == {x.shape[0]} and x.shape[0] % count == 0:
        shares = x.unflatten(0, (count, -1))
        if torch.equal(shares, shares[:1].expand_as(shares)):
            return 0
    raise Unfit(f"{name} takes a tensor {tuple(x.shape)} that was absent when its rows were calibrated")


def _join(parts: list[list], call: Call, rows: int, name: str = "", shared: bool = False) -> list:
    """One result of all probes' results, probe-major; `shared`: what came in were no rows but one for all."""
    joined: list[Any] = []
    if any(len(p) != len(call.outputs) for p in parts):
        raise Unfit(f"{name} returns {[len(p) for p in parts]} values, {len(call.outputs)} when calibrated")
    for leaf, dim in enumerate(call.outputs):
        values = [p[leaf] for p in parts]
        if shared and dim == 0 and isinstance(values[0], torch.Tensor) and values[0].shape[:1] == (1,):
            dim = ONE
        if dim == COUNT:
            joined.append(sum(values))
        elif not isinstance(values[0], torch.Tensor):
            if isinstance(values[0], int | float | str) and any(v != values[0] for v in values):
                raise Unfit(f"{name} returns a plain value that depends on the probe")
            joined.append(values[0])
        elif dim >= 0:
            joined.append(torch.cat(values, dim))
        elif dim in (ONE, LIFT):
            each = values if dim == ONE else [v[None] for v in values]
            joined.append(torch.cat([v.expand(rows, *v.shape[1:]) for v in each]))
        elif values[0].ndim == 0 and values[0].is_floating_point():
            # A number for the whole batch (an auxiliary loss) mixes probes: whoever uses it shall see NaN.
            joined.append(torch.full_like(values[0], float("nan")))
        elif values[0].numel() == 0:
            joined.append(values[0])
        else:
            raise Unfit(f"{name} returns a tensor {tuple(values[0].shape)} without rows")
    return joined


def linear(
    axis: Scratch, site: Site, input: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute y_p = x_p (W + s_p Z)ᵀ + b_p, all into one output; `tokens` [C] asks for these rows of W only."""
    return _product(axis, site, input, transposed=True, tokens=tokens)


def conv1d(axis: Scratch, site: Site, x: torch.Tensor) -> torch.Tensor:
    """Compute GPT-2's linear, its matrix stored transposed: y_p = x_p (W + s_p Z) + b_p."""
    return _product(axis, site, x, transposed=False)


def _product(
    axis: Scratch, site: Site, x: torch.Tensor, *, transposed: bool, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    module: Any = site.module
    weight = next((t for t in site.trained if t.param is module.weight), None)
    bias = next((t for t in site.trained if t.param is module.bias), None)
    xs = x.reshape(len(axis.probes), -1, x.shape[-1])  # [P, n, in]
    y = None
    if weight is not None and tokens is None and is_outer(weight, axis.kind):
        y = axis.outer(weight, bias, module.bias if bias is None else None, xs, transposed)
        if y is not None:
            return y.view(*x.shape[:-1], -1)
    if weight is not None and tokens is None and transposed and in_slabs(weight):
        return _in_slabs(axis, weight, bias, module, xs).view(*x.shape[:-1], -1)
    for first, group in axis.groups():
        dense = [t for t in (weight if tokens is None else None, bias) if t is not None]
        made = dict(zip((t.id for t in dense), axis.perturbed(dense, group, first), strict=True))
        if weight is None:
            w = (module.weight if tokens is None else module.weight[tokens]).expand(len(group), -1, -1)
        elif tokens is None:
            w = made[weight.id]  # [G, out, in]
        else:
            w = axis.gathered(weight, tokens.expand(len(group), -1), group, first)
        w = w.mT if transposed else w  # [G, in, out]
        if y is None:
            y = x.new_empty(*xs.shape[:2], w.shape[-1])  # [P, n, out]
        b = None
        if module.bias is not None:
            b = module.bias.expand(len(group), -1) if bias is None else made[bias.id]  # [G, out]
            b = b if tokens is None else b[:, tokens]
        alike = b is not None and b.dtype == w.dtype  # else the bias is fp32, and added in fp32
        for i in range(len(group)):
            if b is not None and alike:
                torch.addmm(b[i], xs[first + i], w[i], out=y[first + i])
            else:
                torch.mm(xs[first + i], w[i], out=y[first + i])
        if b is not None and not alike:
            y[first : first + len(group)] += b[:, None]
    assert y is not None
    return y.view(*x.shape[:-1], y.shape[-1])


def quantised(axis: Scratch, site: Site, x: torch.Tensor) -> torch.Tensor:
    """Compute y_p = x_p W_pᵀ + b_p, W_p the codes under probe p's scales; the codes are read once for a group of probes."""
    layer: Any = site.module
    xs = layer.ordered(x).reshape(len(axis.probes), -1, layer.in_features)  # [P, n, in]
    y = x.new_empty(*xs.shape[:2], layer.out_features)  # [P, n, out]
    for first, group in axis.groups():
        end = first + len(group)
        made = {id(t.param): p for t, p in zip(site.trained, axis.perturbed(site.trained, group, first))}
        scales = made.get(id(layer.scales))
        if scales is None:
            scales = layer.scales.expand(len(group), -1, -1)  # [G, out, groups of a row]
        bias = made.get(id(layer.bias), layer.bias)
        w = None
        if not fused(layer, xs[first:end], scales):
            taken = len(group) * sum(nbytes(t) for t in site.trained)
            w = axis.room((len(group), layer.out_features, layer.in_features), x.dtype, taken)
        quant.product(layer, xs[first:end], scales, bias, y[first:end], w)
    return y.view(*x.shape[:-1], y.shape[-1])


def _in_slabs(
    axis: Scratch, weight: Trained, bias: Trained | None, module: Any, xs: torch.Tensor
) -> torch.Tensor:
    """`_product` of a matrix too large for the scratch, some of its rows (columns of y) at a time; [P, n, out]."""
    y = xs.new_empty(*xs.shape[:2], weight.stored.shape[0])
    for first, group in axis.groups():
        b = None
        if module.bias is not None:
            b = (
                module.bias.expand(len(group), -1)
                if bias is None
                else axis.perturbed([bias], group, first)[0]
            )
            b = b.clone() if axis.in_scratch(b) else b  # [G, out]
        alike = b is not None and b.dtype == weight.compute
        with closing(axis.slabs(weight, group, first)) as slabs:
            for rows, w in slabs:  # [G, r, in]
                for i in range(len(group)):
                    x, out = xs[first + i], y[first + i][:, rows]
                    # By way of a contiguous product: one written with a stride takes several times as long on a GPU.
                    out.copy_(torch.addmm(b[i, rows], x, w[i].T) if b is not None and alike else x @ w[i].T)
        if b is not None and not alike:
            y[first : first + len(group)] += b[:, None]
    return y


def embedding(axis: Scratch, site: Site, input: torch.Tensor) -> torch.Tensor:
    """Compute rows of W + s_p Z for each probe's own ids: noise is made for the gathered rows only.

    A table of far fewer rows than are asked for (a prompt, once for every example) is made whole, once a probe.
    """
    (t,) = site.trained
    ids = input.reshape(len(axis.probes), -1)  # [P, n]
    if ids.shape[1] < 4 * t.stored.shape[0]:
        rows = axis.gathered(t, ids, list(axis.probes), 0)  # [P, n, D]
    else:
        rows = torch.empty(*ids.shape, t.stored.shape[1], dtype=t.compute, device=ids.device)
        for first, group in axis.groups():
            (table,) = axis.perturbed([t], group, first)  # [G, V, D]
            for i in range(len(group)):
                torch.index_select(table[i], 0, ids[first + i], out=rows[first + i])
    return rows.view(*input.shape, -1)


def scratch_bytes(sites: Sequence[Site]) -> int:
    """Return the bytes for two probes of any site's tensors and, next to them, one of every site that runs within it."""
    own = {s.module: 0 if fast(s) is embedding else sum(_scratch(s, t) for t in s.trained) for s in sites}
    deep: dict[nn.Module, int] = {}

    def within(module: nn.Module) -> int:
        """Bytes that one probe of the sites below a module takes."""
        if module not in deep:
            deep[module] = max((own.get(m, 0) + within(m) for m in module.children()), default=0)
        return deep[module]

    return max((2 * own[s.module] + within(s.module) for s in sites), default=0)


def _scratch(site: Site, t: Trained) -> int:
    """Scratch that one probe of a site's tensor takes at one time."""
    slab = in_slabs(t) and fast(site) is linear
    return slab_rows(t) * t.stored.shape[1] * t.compute.itemsize if slab else nbytes(t)


def choose_compute(trained: Sequence[Trained], sites: Sequence[Site]) -> None:
    """Let 1-D tensors be probed in fp32 wherever every site that reads them can run in it."""
    able = {t.id for t in trained if t.stored.ndim <= 1 and t.stored.dtype == torch.float32}
    for site in sites:
        if not _runs_fp32(site) and fast(site) not in (linear, conv1d):
            able -= {t.id for t in site.trained}
    for t in trained:
        if t.id in able:
            t.compute = torch.float32


def _runs_fp32(site: Site) -> bool:
    """A site with no parameters but its trained 1-D ones (a norm) may take and give 16 bits yet work in 32."""
    ours = {id(t.param) for t in site.trained}
    return all(t.stored.ndim <= 1 for t in site.trained) and all(
        id(p) in ours for p in site.module.parameters()
    )
