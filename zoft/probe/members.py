"""Run the forwards of a generation at many probes at once, over one copy of the weights.

    y_p = x_p Wᵀ + s_p (x_p b_p) a_pᵀ     a matrix with directions of rank 1
    y_p = base(x)_p + (x_p A_pᵀ) B_pᵀ     a LoRA pair

A member may also stand on a line, at θ + f·Σ_k c_k z_k: then its matrices have K pairs of vectors, and two products of rank K.

A generation has one forward per token. All that differs from probe to probe (the signs a and b, LoRA pairs, biases, norms, a
prefix's table) is therefore made once, held for the whole generation, and gathered when members leave the batch. The rows of a
forward are probe-major, and each member has as many rows as any other.
Sources: flipout (arXiv 1803.04386), EGGROLL (arXiv 2511.16652).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoft.method.blocks import seen_by
from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.models.kind import ADDED
from zoft.models.quant.linear import QuantLinear
from zoft.noise import noise
from zoft.noise.spec import RANK1
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.probe.lora_forward import pair
from zoft.probe.outer_forward import is_outer
from zoft.probe.rows import Unfit
from zoft.probe.scratch import CLEAN, signs_at
from zoft.probe.site_forwards import conv1d, fast, linear
from zoft.probe.sites import METADATA, Site

SMALL = 0.05  # of a model's numbers: what may be made whole for every member


def why_alone(axis: Any, numbers: int) -> str:
    """Say why the members of a step cannot write together; "" where they can.

    numbers: of the whole model.
    """
    if isinstance(axis, InPlace):
        return "perturb=inplace moves the weights themselves"
    assert isinstance(axis, ProbeAxis), type(axis)
    # Vectors, adapters and matrices too narrow for rank 1 are small.
    dense = [t for t in axis.trained if t.stored.ndim > 1 and not is_outer(t, axis.kind)]
    dense = [t for t in dense if not ADDED.search(t.name) and (axis.kind != RANK1 or t.width)]
    whole = sum(t.stored.numel() for t in dense)
    if any(isinstance(s.module, QuantLinear) for s in axis.sites):
        return "scales of quantised layers have no product that members share"
    if whole > SMALL * numbers:
        return f"noise={axis.kind} makes whole weights for each member"
    return ""


class Members:
    """Run a model's forwards, inside `at`, at θ + s·z of many probes, row by row, with what differs held.

    axis: the run's; updates that are pending are applied before θ is read. copies: matrices that are stored in another dtype
    than they are computed with are converted once, beside the weights; else anew in each forward.
    """

    def __init__(self, axis: ProbeAxis, copies: bool = True) -> None:
        self.axis, self.copies = axis, copies
        self.probes: tuple[Probe, ...] = CLEAN
        self.all: tuple[tuple[Probe, ...], int] = CLEAN, 0
        self.line: tuple[float, ...] | None = None  # c [K] of members that stand on a line
        # a [P, m, K], b [P, n, K], s [P, K]: K = 1 at probes, the step's directions on a line.
        self.outer: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.made: dict[int, torch.Tensor] = {}  # [P, *shape]
        self.plain: dict[int, torch.Tensor] = {}  # θ in its compute dtype
        self._forwards = {s: self._route(s) for s in axis.sites}

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], line: Sequence[float] | None = None) -> Iterator[None]:
        """Run forwards in this context at the given probes of a step; exceptions restore everything.

        Rows are probe-major, as many of each probe. line: c [K] of the step's directions; then a probe's scale is f, and the
        member is θ + f·Σ_k c_k z_k.
        """
        axis = self.axis
        axis.flush()
        own: dict[Site, Any] = {s: s.module.__dict__.get("forward") for s in axis.sites}
        try:
            self.all, self.line = (tuple(probes), step), None if line is None else tuple(line)
            self.again()
            for t in axis.trained:  # a read that nobody serves shows in the logits
                t.param.data = torch.full((), float("nan"), dtype=t.compute, device=t.stored.device).expand(
                    t.stored.shape
                )
            for s in axis.sites:
                s.module.forward = self._forwards[s]
            yield
        finally:
            for s in axis.sites:
                if own[s] is None:
                    s.module.__dict__.pop("forward", None)
                else:
                    s.module.forward = own[s]
            for t in axis.trained:
                t.param.data = t.stored
            self.probes = CLEAN
            self.outer.clear()
            self.made.clear()
            if not self.copies:
                self.plain.clear()

    def again(self) -> None:
        """Let all members be there again, for another generation at the same probes."""
        self.probes, step = self.all
        for t in self.axis.trained:
            self._make(t, step)

    def keep(self, places: torch.Tensor) -> None:
        """Let the members at these places stay, in this order, and all others go."""
        self.probes = tuple(self.probes[i] for i in places.tolist())
        self.outer = {k: (a[places], b[places], s[places]) for k, (a, b, s) in self.outer.items()}
        self.made = {k: x[places] for k, x in self.made.items()}

    def held_bytes(self, members: int) -> int:
        """Return what is held for so many members."""
        total = 0
        for t in self.axis.trained:
            each = sum(t.stored.shape) if is_outer(t, self.axis.kind) else t.stored.numel()
            total += members * each * t.compute.itemsize
        return total

    def copied_bytes(self) -> int:
        """Return what the converted matrices take."""
        kind = self.axis.kind
        return sum(
            t.stored.numel() * t.compute.itemsize
            for t in self.axis.trained
            if is_outer(t, kind) and t.stored.dtype != t.compute
        )

    def _make(self, t: Trained, step: int) -> None:
        axis = self.axis
        seen = [Probe(*p) for p in seen_by(t, self.probes, axis.seed, step)]
        if is_outer(t, axis.kind):
            along = self.probes if self.line is None else [Probe(k, 1.0) for k in range(len(self.line))]
            a, b = signs_at(t, axis.seed, step, along, t.compute)
            s = torch.tensor([[p.scale] for p in seen], dtype=torch.float64, device=a.device)  # [P, 1]
            if self.line is None:
                self.outer[t.id] = a[..., None], b[..., None], s.to(t.compute)
            else:
                a, b = (x.T.expand(len(seen), -1, -1) for x in (a, b))
                self.outer[t.id] = a, b, (s * s.new_tensor(self.line)).to(t.compute)
            if t.stored.dtype == t.compute:
                self.plain[t.id] = t.stored
            elif self.copies:
                if t.id not in self.plain:
                    self.plain[t.id] = torch.empty_like(t.stored, dtype=t.compute)
                self.plain[t.id].copy_(t.stored)
            return
        if self.line is not None:
            self.made[t.id] = self._along(t, step, self.line, [p.scale for p in seen])
            return
        out = torch.empty(len(seen), *t.stored.shape, dtype=t.compute, device=t.stored.device)
        i = 0
        while i < len(seen):  # the two probes of a direction share a draw
            n = 2 if i + 1 < len(seen) and seen[i].direction == seen[i + 1].direction else 1
            noise.perturb(
                t.stored, t.id, out[i : i + n], seen[i : i + n], seed=axis.seed, step=step, noise=axis.kind,
                floor=t.floor, mask=t.mask, width=t.width,
            )  # fmt: skip
            i += n
        self.made[t.id] = out

    def _along(self, t: Trained, step: int, line: Sequence[float], factors: Sequence[float]) -> torch.Tensor:
        """Return θ + f·Σ_k c_k z_k of a small tensor at each factor, [P, *shape]."""
        assert t.mask is None and t.floor is None, t.name
        wide = torch.promote_types(t.compute, torch.float32)
        moved = torch.zeros_like(t.stored, dtype=wide)
        for k, c in enumerate(line):
            moved += c * noise.direction(
                t.stored.shape, t.id, seed=self.axis.seed, step=step, direction=k, noise=self.axis.kind, width=t.width,
                device=t.stored.device, dtype=wide,
            )  # fmt: skip
        return torch.stack([(t.stored.to(wide) + f * moved).to(t.compute) for f in factors])

    def _matrix(self, t: Trained) -> torch.Tensor:
        return self.plain[t.id] if t.id in self.plain else t.stored.to(t.compute)

    # ---- routes

    def _route(self, site: Site) -> Callable:
        direct = fast(site)
        kind = type(site.module)
        if pair(site) is not None:
            return lambda x, *a, **k: self._lora(site, x, *a, **k)
        if direct in (linear, conv1d):
            return lambda x: self._product(site, x, direct is linear)
        if all(t.stored.ndim == 1 for t in site.trained):
            if kind is nn.LayerNorm and "forward" not in site.module.__dict__:
                return lambda x: self._layer_norm(site, x)
            return self._broadcast(site, site.module.forward)
        return self._watched(site, site.module.forward)

    def _product(self, site: Site, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        """y_p = x_p W_pᵀ + b_p of a linear layer (transposed), or of GPT-2's, whose matrix lies the other way."""
        module: Any = site.module
        weight = next((t for t in site.trained if t.param is module.weight), None)
        bias = next((t for t in site.trained if t.param is module.bias), None)
        return self._linear(x, weight, module.weight, bias, module.bias, transposed)

    def _linear(
        self, x: torch.Tensor, weight: Trained | None, plain: Any, bias: Trained | None, own: Any, transposed: bool
    ) -> torch.Tensor:  # fmt: skip
        p = len(self.probes)
        xs = x.reshape(p, -1, x.shape[-1])  # [P, n, in]
        if weight is not None and weight.id in self.made:
            w = self.made[weight.id]  # [P, out, in]
            y = torch.bmm(xs, w.mT if transposed else w)
        else:
            w = plain if weight is None else self._matrix(weight)
            y = xs.flatten(0, 1) @ (w.T if transposed else w)
            y = y.view(p, -1, y.shape[-1])  # [P, n, out]
            if weight is not None:
                a, b, s = self.outer[weight.id]
                a, b = (a, b) if transposed else (b, a)
                h = torch.bmm(xs, b) * s[:, None]  # [P, n, K]
                y.baddbmm_(h, a.mT)
        if bias is not None:
            y = (y + self.made[bias.id][:, None]).to(y.dtype)
        elif own is not None:
            y = y + own
        return y.view(*x.shape[:-1], y.shape[-1])

    def _gather(self, ids: torch.Tensor, t: Trained) -> torch.Tensor:
        """Return rows of a table at each member's probe; ids: [rows, …]."""
        p = len(self.probes)
        each = ids.reshape(p, -1)  # [P, n]
        if t.id in self.made:
            table = self.made[t.id]  # [P, V, D]
            rows = table[torch.arange(p, device=ids.device)[:, None], each]
        else:
            a, b, s = self.outer[t.id]
            rows = self._matrix(t)[each] if t.id in self.plain else t.stored[each].to(t.compute)
            own = a.gather(1, each[..., None].expand(-1, -1, a.shape[-1])) * s[:, None]  # [P, n, K]
            rows = rows + torch.bmm(own, b.mT)
        return rows.view(*ids.shape, -1)

    def _lora(self, site: Site, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        m: Any = site.module
        found = pair(site)
        assert found is not None, site.name
        (name,) = m.active_adapters
        a, b = (self.made[t.id] for t in found)  # [P, r, in], [P, out, r]
        y = m.base_layer(x, *args, **kwargs)
        xs = x.reshape(len(a), -1, x.shape[-1])
        more = m.scaling[name] * torch.bmm(torch.bmm(xs.to(a.dtype), a.mT), b.mT)
        return (y.view(len(a), -1, y.shape[-1]) + more).to(y.dtype).view(y.shape)

    def _layer_norm(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        m: Any = site.module
        by_id = {id(t.param): self.made[t.id] for t in site.trained}
        width = by_id[next(iter(by_id))].shape[-1]
        y = F.layer_norm(x.to(next(iter(by_id.values())).dtype), m.normalized_shape, eps=m.eps)
        ys = y.view(len(self.probes), -1, width)
        if m.weight is not None:
            ys = ys * (by_id[id(m.weight)][:, None] if id(m.weight) in by_id else m.weight)
        if m.bias is not None:
            ys = ys + (by_id[id(m.bias)][:, None] if id(m.bias) in by_id else m.bias)
        return ys.view(x.shape).to(x.dtype)

    def _broadcast(self, site: Site, inner: Callable) -> Callable:
        """Return the forward of a module that reads vectors only: its own, on rows [P, R, …] and vectors [P, 1, …]."""
        alone = all(any(p is t.param for t in site.trained) for p in site.module.parameters())

        def forward(*args: Any, **kwargs: Any) -> Any:
            p = len(self.probes)
            flat, spec = tree_flatten((args, kwargs))
            rows = [x for x in flat if isinstance(x, torch.Tensor)]
            if not rows or any(x.ndim < 2 or x.shape[0] % p for x in rows):
                raise Unfit(f"{site.name} takes no rows of {p} members")
            narrow = rows[0].dtype
            wide = next(iter(self.made[t.id].dtype for t in site.trained))
            up = alone and rows[0].is_floating_point()
            flat = [
                x.reshape(p, -1, *x.shape[1:]).to(wide if up else x.dtype)
                if isinstance(x, torch.Tensor)
                else x
                for x in flat
            ]
            rank = rows[0].ndim + 1
            before = [t.param.data for t in site.trained]
            try:
                for t in site.trained:
                    t.param.data = self.made[t.id].view(p, *[1] * (rank - 2), -1)
                a, kw = tree_unflatten(flat, spec)
                out = inner(*a, **kw)
            except RuntimeError as error:
                raise Unfit(
                    f"{site.name} does not work on all members' rows ({' '.join(str(error).split())[:80]})"
                ) from None
            finally:
                for t, data in zip(site.trained, before, strict=True):
                    t.param.data = data
            if not isinstance(out, torch.Tensor) or out.shape[:1] != (p,):
                raise Unfit(f"{site.name} returns no rows of {p} members")
            return out.flatten(0, 1).to(narrow)

        return forward

    def _watched(self, site: Site, inner: Callable) -> Callable:
        """Return the forward of a module whose reads of its tables and matrices are served one by one."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Served(self, site):
                return inner(*args, **kwargs)

        return forward


class _Served(TorchFunctionMode):
    """Serve the reads of a module's trained tensors at each member's probe; a read of another kind is not understood."""

    def __init__(self, members: Members, site: Site) -> None:
        super().__init__()
        self.members, self.site = members, site
        self.by_id = {id(t.param): t for t in site.trained}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        read = [x for x in tree_flatten((args, kwargs))[0] if id(x) in self.by_id]
        if not read or name in METADATA:
            return func(*args, **kwargs)
        if func is F.embedding and len(read) == 1 and args[1] is read[0]:
            if kwargs.get("max_norm") is None and (len(args) < 4 or args[3] is None):
                return self.members._gather(args[0], self.by_id[id(read[0])])
        if func is F.linear and not any(args[0] is x for x in read):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            w, b = self.by_id.get(id(weight)), self.by_id.get(id(bias))
            return self.members._linear(args[0], w, weight, b, bias, True)
        raise Unfit(f"{self.site.name} reads {self.by_id[id(read[0])].name} by {name}")
