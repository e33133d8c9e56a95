"""The probe axis on a GPU, fed from device memory, so that a step can be captured once and replayed.

A step's keys, multipliers and decay live in device buffers. The update of the step before rides on this step's
passes over θ; this step's multipliers are made where its losses are. Nothing waits for the CPU, and the
arithmetic is that of the eager path, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoft.method.estimators.estimator import Probe
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.method.precision import cosine
from zoft.method.space import Trained
from zoft.method.updates import advance_trained
from zoft.models.quant.linear import QuantLinear
from zoft.noise.spec import COLUMNS, FLIPPED, KINDS, RANK1, ROWS, Update
from zoft.noise.triton import (
    PROBES_MAX,
    launch,
    launch_rows,
    launch_small,
    plan_of,
    sign_words,
    signs,
    table_of,
)
from zoft.probe.axis import ProbeAxis
from zoft.probe.cuda import norms
from zoft.probe.cuda.buffers import Control
from zoft.probe.cuda.norms import norm
from zoft.probe.cuda.outer import fused_product, pays
from zoft.probe.lora_forward import lora
from zoft.probe.scratch import CLEAN, in_slabs, nbytes, part, slab_rows, start
from zoft.probe.site_forwards import conv1d, fast, linear
from zoft.probe.sites import Site

NARROW_COSINE = 0.99  # between z and the realised direction of a bias that is probed in 16 bits


@dataclass
class Pack:
    """Hold small fp32 tensors that lie end to end and are probed in one launch per forward."""

    theta: Tensor  # [N]
    table: Tensor  # kernels.table_of
    out: Tensor  # fp32 [P, N], θ + s·z at a step's probes
    narrow: Tensor | None  # the same in 16 bits, where some tensor is probed so
    momentum: Tensor | None  # fp32 [N]
    decays: bool
    ids: set[int]  # of its tensors


class DeviceAxis(ProbeAxis):
    """Run a probe axis whose steps, inside `stepping`, take everything that changes from device memory.

    All 1-D tensors and LoRA pairs (kept in fp32) lie end to end and are probed in one launch a forward, or two where
    only some decay; norms over the last dimension run as one kernel for all probes. Outside `stepping` it is an
    ordinary probe axis.

    compute: what the model computes in, which quantised layers, having no weight, do not tell. probes: a step's, in order;
    two-sided ones unless given.
    """

    def __init__(
        self, trained: Sequence[Trained], sites: Sequence[Site], *, seed: int, kind: str, q: int, eps: float, beta: float = 0.0,
        compute: torch.dtype = torch.float32, probes: Sequence[Probe] = (),
    ) -> None:  # fmt: skip
        super().__init__(trained, sites, seed=seed, kind=kind, beta=beta)
        self.flat_device = device = self.trained[0].stored.device
        asked = probes or TWO_SIDED.probes(q, eps)
        directions = len({p.direction for p in asked if p.scale})
        self.control = Control(asked, directions, eps, beta, seed, device)
        self.control.flipped = bool(KINDS[kind] & FLIPPED)
        self.live = False
        self.ahead = False  # a step broke off after the update before it had reached every tensor
        self._index = {p: i for i, p in enumerate(self.control.probes)}
        self.where: list[int] = []  # of this forward's probes, their places among the step's
        self._indices: dict[tuple, Tensor] = {}
        self._done: set[int] = set()  # tensors that have the pending update, in the step under way
        pairs = {t.id for s in self.sites if fast(s) is lora for t in s.trained}
        small = [
            t
            for t in self.trained
            if (t.stored.ndim <= 1 or t.id in pairs)
            and t.stored.dtype == t.compute == torch.float32
            and t.floor is None
        ]
        self.narrow = _narrowed(self.sites, small, eps, seed, kind, compute)
        self.small: dict[int, tuple[Pack, slice]] = {}
        self.packs = [
            self._packed(some, bool(beta))
            for decays in (False, True)
            if (some := [t for t in small if t.decays == decays])
        ]
        self._blank = self._blanks()
        if beta:
            for t in self.trained:
                if t.momentum is None:
                    t.momentum = torch.zeros_like(t.stored, dtype=torch.float32)

    def _packed(self, some: list[Trained], momentum: bool) -> Pack:
        """The tensors moved to one place, end to end."""
        assert all(t.mask is None and t.floor is None for t in some), [t.name for t in some]
        sizes = [t.stored.numel() for t in some]
        theta = torch.cat([t.stored.flatten() for t in some])
        out = torch.empty(len(self.control.probes), theta.numel(), dtype=torch.float32, device=theta.device)
        width = next((self.narrow[t.id] for t in some if t.id in self.narrow), None)
        pack = Pack(
            theta, table_of(sizes, [t.id for t in some], theta.device), out,
            None if width is None else torch.empty_like(out, dtype=width),
            torch.zeros_like(theta) if momentum else None, some[0].decays, {t.id for t in some},
        )  # fmt: skip
        for t, at, n in zip(some, np.cumsum([0, *sizes]).tolist(), sizes):
            self.small[t.id] = pack, slice(at, at + n)
            t.param.data = t.stored = theta[at : at + n].view(t.stored.shape)
            if pack.momentum is not None:
                t.momentum = pack.momentum[at : at + n].view(t.stored.shape)
        return pack

    def scratch(self) -> list[Tensor]:
        """Return the scratch in use, for whoever must keep it."""
        return list(self._arenas)

    def land(self, step: int, pending: Update | None) -> None:
        """Bring θ to what the ledger has after `step`, the last one that was sent; pending: its update, None if it was skipped."""
        if pending is not None:
            for t in self.trained:
                t.step = pending.step + self.ahead
            self.commit(pending)
        self.ahead = False
        self.flush()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run a step's forwards; at its end every tensor has the update that was pending at its start."""
        self.live, self._done, self.ahead = True, set(), False
        self.control.refresh()
        try:
            yield
            for t in self.trained:
                self._catch_up(t)
        except BaseException:
            if not torch.cuda.is_current_stream_capturing():  # while capturing, nothing has run
                for t in self.trained:
                    self._catch_up(t)
                self.control.forget()
                self.ahead = True
            raise
        finally:
            self.live = False

    def _catch_up(self, t: Trained) -> None:
        """The pending update alone, for a tensor that is read in another way, or not at all."""
        if t.id in self._done:
            return
        if t.id in self.small:
            pack = self.small[t.id][0]
            plan = self.control.plan([], True, pack.decays)
            launch_small(pack.theta, pack.table, None, plan, self.kind, pack.momentum)
            self._done |= pack.ids
        else:
            plan = self.control.plan([], True, t.decays)
            where: dict[str, Any] = {"floor": t.floor, "mask": t.mask, "width": t.width}
            launch(t.stored, t.id, None, plan, self.kind, t.momentum, **where)
            self._done.add(t.id)

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        with super().at(step, probes, rows):
            if self.live:
                self.where = [self._index[p] for p in probes]
                for pack in self.packs:
                    for i in range(0, len(probes), PROBES_MAX):
                        self._probe(pack, i, min(i + PROBES_MAX, len(probes)))
            yield

    def _probe(self, pack: Pack, start: int, end: int) -> None:
        """Probes start to end of this forward of all of a pack's tensors, after the pending update if they lack it."""
        plan = self.control.plan(self.where[start:end], not self._done & pack.ids, pack.decays)
        narrow = None if pack.narrow is None else pack.narrow[start:end]
        launch_small(pack.theta, pack.table, pack.out[start:end], plan, self.kind, pack.momentum, narrow)
        self._done |= pack.ids

    def _which(self, first: int, count: int) -> list[int]:
        """The places among the step's probes of some of those that the site under way runs at."""
        return self.where[self.first + first : self.first + first + count]

    def perturbed(self, tensors: list[Trained], group: list[Probe], first: int) -> list[Tensor]:
        if not self.live:
            return super().perturbed(tensors, group, first)
        dense = [t for t in tensors if t.id not in self.small]
        made = dict(zip((t.id for t in dense), super().perturbed(dense, group, first), strict=True))
        return [made[t.id] if t.id in made else self._of_small(t, first, len(group)) for t in tensors]

    def _of_small(self, t: Trained, first: int, count: int) -> Tensor:
        at = self.first + first
        pack, where = self.small[t.id]
        out = pack.narrow if t.id in self.narrow else pack.out
        assert out is not None
        return out[at : at + count, where].unflatten(1, t.stored.shape or (1,))

    def _fill(
        self, t: Trained, out: Tensor | None, group: list[Probe], first: int, rows: slice = slice(None)
    ) -> None:
        if not self.live:
            return super()._fill(t, out, group, first, rows)
        plan = self.control.plan(self._which(first, len(group)), t.id not in self._done, t.decays)
        launch(
            part(t.stored, rows), t.id, out, plan, self.kind, None if t.momentum is None else part(t.momentum, rows),
            start=start(t.stored, rows), floor=t.floor, mask=t.mask, width=t.width,
        )  # fmt: skip

    def _mark(self, t: Trained) -> None:
        if not self.live:
            return super()._mark(t)
        self._done.add(t.id)

    def gathered(self, t: Trained, rows: Tensor, group: list[Probe], first: int) -> Tensor:
        if not self.live:
            return super().gathered(t, rows, group, first)
        self._catch_up(t)
        out = torch.empty(*rows.shape, t.stored.shape[1], dtype=t.compute, device=t.stored.device)
        plan = self.control.plan(self._which(first, len(group)), False, False)
        launch_rows(
            t.stored, t.id, rows.reshape(-1), out.flatten(0, 1), plan, self.kind, mask=t.mask, width=t.width
        )
        return out

    def outer(
        self, weight: Trained, bias: Trained | None, plain_bias: Any, xs: Tensor, transposed: bool
    ) -> Tensor | None:
        if self.kind != RANK1 or self._holding:
            return super().outer(weight, bias, plain_bias, xs, transposed)
        m, n = weight.stored.shape
        ins, outs = (n, m) if transposed else (m, n)
        converted = weight.stored.dtype != weight.compute
        unique = len({p.direction for p in self.probes})
        if in_slabs(weight) or not pays(xs.shape[0] * xs.shape[1], ins, outs, max(unique, 2), converted):
            # Of many directions even a few rows each are better off here than with weights of their own.
            if in_slabs(weight) or unique <= 2:
                return None
        own = list(dict.fromkeys(p.direction for p in self.probes))
        which = self._places([own.index(p.direction) for p in self.probes], torch.int32)
        firsts = [next(i for i, p in enumerate(self.probes) if p.direction == d) for d in own]
        if self.live:
            plan = self.control.plan([self._which(i, 1)[0] for i in firsts], False, False)
            scales = self.control.plan(self._which(0, len(self.probes)), False, False).values
        else:
            probes = tuple((self.probes[i].direction, self.probes[i].scale) for i in firsts)
            plan = plan_of((), probes, self.seed, self.step, 0.0, False, weight.stored.device)
            scales = torch.tensor([p.scale for p in self.probes], device=weight.stored.device)
        words, _ = sign_words(plan, weight.id, m, n)
        rows, columns = words[:, :m], words[:, m:]
        inward, outward = (columns, rows) if transposed else (rows, columns)
        w = self._plain(weight)
        made = plain_bias[None] if bias is None and plain_bias is not None else None
        if bias is not None:
            # After W, which lies in scratch where it was converted.
            made = self._beside(weight, bias)
        return fused_product(xs, w.T if transposed else w, inward, outward, which, scales, made)

    def _beside(self, weight: Trained, bias: Trained) -> Tensor:
        """A bias at all probes [P, out], in scratch that W's is not touched by."""
        used = self.used
        self.used = used + nbytes(weight)
        try:
            made = self.perturbed([bias], list(self.probes), 0)[0]
            return made.clone() if self.in_scratch(made) else made
        finally:
            self.used = used

    def _plain(self, t: Trained) -> Tensor:
        """A matrix at θ itself in its compute dtype, with all updates in."""
        if t.stored.dtype == t.compute:
            if self.live:
                self._catch_up(t)
            else:
                advance_trained(t, self.updates, self.kind, self.beta)
            return t.stored
        if not self.live:
            return self.perturbed([t], list(CLEAN), 0)[0][0]
        plan = self.control.clean(t.id not in self._done, t.decays)
        w = (
            self._room(nbytes(t))[: t.stored.numel() * t.compute.itemsize]
            .view(t.compute)
            .view(1, *t.stored.shape)
        )
        launch(t.stored, t.id, w, plan, self.kind, t.momentum, floor=t.floor, mask=t.mask, width=t.width)
        self._done.add(t.id)
        return w[0]

    def plain_product(self, t: Trained, x: Tensor, transposed: bool) -> Tensor:
        if not self.live:
            return super().plain_product(t, x, transposed)
        if t.stored.dtype == t.compute or not (transposed and in_slabs(t)):
            w = self._plain(t)
            return x @ (w.T if transposed else w)
        plan = self.control.clean(t.id not in self._done, t.decays)
        where: dict[str, Any] = {"floor": t.floor, "mask": t.mask, "width": t.width}
        step, parts = slab_rows(t), []
        for rows in [slice(i, min(i + step, len(t.stored))) for i in range(0, len(t.stored), step)]:
            theta = part(t.stored, rows)
            momentum = None if t.momentum is None else part(t.momentum, rows)
            w = self._room(theta.numel() * t.compute.itemsize)[: theta.numel() * t.compute.itemsize]
            w = w.view(t.compute).view(1, *theta.shape)
            launch(theta, t.id, w, plan, self.kind, momentum, start=start(t.stored, rows), **where)
            parts.append(x @ w[0].T)
        self._done.add(t.id)
        return torch.cat(parts, -1)

    def scales_of(self, probes: Sequence[Probe], like: Tensor) -> Tensor:
        if not self.live:
            return super().scales_of(probes, like)
        plan = self.control.plan(self._which(0, len(probes)), False, False)
        return plan.values[: len(probes)].to(like.dtype)

    def signs_of(self, t: Trained, probes: Sequence[Probe], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not self.live:
            return super().signs_of(t, probes, dtype)
        plan = self.control.plan(self._which(0, len(probes)), False, False)
        which = [p.direction for p in probes]
        own = list(dict.fromkeys(which))
        m, n = t.stored.shape
        a, b = (torch.empty(len(own), size, dtype=dtype, device=t.stored.device) for size in (m, n))
        # The first probes of all directions stand at the front where probes are p-major, as an example's are.
        front = which[: len(own)] == own
        keys = plan.keys[: len(own)] if front else plan.keys[self._places([which.index(k) for k in own])]
        for out, purpose in ((a, ROWS), (b, COLUMNS)):
            signs(out, t.id, purpose, keys)
        if len(own) < len(which):
            places = self._places([own.index(k) for k in which])
            a, b = a.index_select(0, places), b.index_select(0, places)
        return a, b

    def _places(self, places: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Indices on the device; made once, since nothing may be copied from the CPU while a step is captured."""
        key = dtype, *places
        if key not in self._indices:
            self._indices[key] = torch.tensor(places, dtype=dtype, device=self.flat_device)
        return self._indices[key]

    def shared_noise(self, t: Trained) -> Tensor:
        if not self.live:
            return super().shared_noise(t)
        base = self.kind.removesuffix("_flipped")
        out = torch.empty_like(t.stored, dtype=t.compute)
        launch(None, t.id, out.view(1, -1), self.control.shared(), base)
        return out

    def shortcut(self, site: Site) -> Callable | None:
        direct = fast(site)
        if direct is not None or any(c.inputs != [0] or c.outputs != [0] for c in site.calls):
            return direct
        if (
            "forward" in site.module.__dict__
            or site.module._forward_hooks
            or len(site.module.state_dict()) != len(site.trained)
        ):
            return None
        if any(t.stored.ndim != 1 or t.compute != torch.float32 for t in site.trained):
            return None
        found = norms.kind_of(site.module)
        return None if found is None else partial(_norm, kind=found[0], eps=found[1])


def _narrowed(
    sites: Sequence[Site], small: list[Trained], eps: float, seed: int, kind: str, compute: torch.dtype
) -> dict[int, torch.dtype]:
    """Biases and LoRA pairs that may be probed in their matrix's dtype: where the probe survives that.

    A product adds its bias then; a bias of size 1 loses a bf16 probe of eps 1e-3 and stays in fp32, at a pass over the
    output of its own. A pair multiplies the layer's 16-bit inputs as they are; else these are widened first.
    """
    ours = {t.id for t in small}
    found: dict[int, torch.dtype] = {}
    for site in sites:
        if fast(site) in (linear, conv1d):
            module: Any = site.module
            weight = next((t for t in site.trained if t.param is module.weight), None)
            dtype = module.weight.dtype if weight is None else weight.compute
            for t in site.trained:
                bias = t.param is module.bias and t.id in ours and dtype.itemsize == 2
                if bias and cosine(t, eps, seed, kind, dtype) >= NARROW_COSINE:
                    t.compute = found[t.id] = dtype
        elif fast(site) is lora:
            base: Any = site.module
            codes = type(base.base_layer) is QuantLinear
            dtype = compute if codes else base.base_layer.weight.dtype
            fits = dtype.is_floating_point and dtype.itemsize == 2 and all(t.id in ours for t in site.trained)
            if fits and all(cosine(t, eps, seed, kind, dtype) >= NARROW_COSINE for t in site.trained):
                for t in site.trained:
                    t.compute = found[t.id] = dtype
    return found


def _norm(axis: DeviceAxis, site: Site, x: Tensor, *, kind: str, eps: float) -> Tensor:
    """A norm over the last dimension at all probes in one kernel."""
    named: dict[int, list[Tensor]] = {id(t.param): [] for t in site.trained}  # [P, H] in parts, a group each
    for first, group in [(0, list(axis.probes))] if axis.live else list(axis.groups()):
        for t, made in zip(site.trained, axis.perturbed(site.trained, group, first), strict=True):
            named[id(t.param)].append(made if axis.live else made.clone())
    parts = {p: v[0] if len(v) == 1 else torch.cat(v) for p, v in named.items()}
    bias = parts.get(id(getattr(site.module, "bias", None)))
    return norm(x, parts[id(site.module.weight)], bias, eps, kind)
