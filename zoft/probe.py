"""The probe axis: one forward pass that answers for several probes θ + s·z at once.

The batch is repeated once per probe, probe-major. Modules that own no trained tensor run over all rows,
untouched; a site runs once per probe on that probe's rows, with its tensors swapped for θ + s·z made from
the seed in a scratch buffer. θ itself is only read, or brought up to date by updates that are still pending.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from zoft import noise, update
from zoft.layout import COUNT, LIFT, NO_ROWS, ONE, PLAIN, Call, Unfit
from zoft.sites import Site
from zoft.space import Trained


class Probe(NamedTuple):
    """One evaluation point θ + scale·z_direction."""

    direction: int
    scale: float


PENDING_MAX = 64  # a tensor that no forward reads is brought up to date at least this often
CLEAN = (Probe(0, 0.0),)  # θ itself: no noise is made for a scale of 0


class ProbeAxis:
    """A model whose forwards, inside `at`, run at θ + s·z for each of a list of probes.

    sites: from sites.find. seed: the run's. kind: the noise distribution. beta: momentum. A committed
    update stays pending until a tensor is next read: it is brought up to date, once, by whoever reads it first.
    """

    def __init__(
        self, trained: Sequence[Trained], sites: Sequence[Site], *, seed: int, kind: str, beta: float = 0.0
    ) -> None:
        self.trained, self.sites, self.seed, self.kind = list(trained), list(sites), seed, kind
        self.beta = beta
        self.updates: list[noise.Update] = []  # committed, and lacked by some tensor
        self.step, self.batch_rows = 0, 0
        self.probes: tuple[Probe, ...] = CLEAN
        self.first = 0  # index of probes[0] in the forward's list: within a site, one probe of it runs
        self._active = False  # within `at`
        self._calls: dict[Site, int] = {}
        _choose_compute(self.trained, self.sites)
        self._forwards = {s: _route(self, s) for s in self.sites}
        self.scratch_bytes = _scratch(self.sites)
        self._arenas: list[torch.Tensor] = []  # the last is in use; others only where the first was too small
        self._used = 0  # bytes of it that running sites hold
        # During a forward a trained tensor's own place holds NaN: a read that no site serves shows in the loss.
        self._blank = {
            t.id: torch.full((), float("nan"), dtype=t.compute, device=t.stored.device).expand(t.stored.shape)
            for t in self.trained
        }

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        """Forwards in this context run at the given probes of a step; exceptions restore everything.

        rows: of one probe's batch; the forward gets len(probes) · rows, probe-major.
        """
        assert probes and not self._active, (
            f"{len(probes)} probes, {'inside' if self._active else 'outside'} another `at`"
        )
        self._active = True
        self.step, self.probes, self.batch_rows = step, tuple(probes), rows
        own: dict[Site, Any] = {s: s.module.__dict__.get("forward") for s in self.sites}
        try:
            for t in self.trained:
                t.param.data = self._blank[t.id]
            for s in self.sites:
                s.module.forward = self._forwards[s]
            self._calls = dict.fromkeys(self.sites, 0)
            yield
        finally:
            self._active, self._used, self.first = False, 0, 0
            del self._arenas[:-1]
            for s in self.sites:
                if own[s] is None:
                    s.module.__dict__.pop("forward", None)
                else:
                    s.module.forward = own[s]
            for t in self.trained:
                t.param.data = t.stored

    @contextmanager
    def clean(self, rows: int = 0) -> Iterator[None]:
        """Forwards in this context run at θ: evaluation, with all updates in."""
        with self.at(self.step, CLEAN, rows):
            yield

    def commit(self, change: noise.Update) -> None:
        """Take a step's update; each tensor gets it with its next read, or by flush."""
        self.updates.append(change)
        if len(self.updates) >= PENDING_MAX:
            self.flush()

    def settle(self) -> None:
        """End of a step's forwards: forget the updates that every tensor has."""
        oldest = min(t.step for t in self.trained)
        while self.updates and self.updates[0].step < oldest:
            self.updates.pop(0)

    def flush(self) -> None:
        """Apply every update that some tensor still lacks: before anyone reads the stored weights."""
        for t in self.trained:
            update.advance(t, self.updates, self.kind, self.beta)
        self.updates.clear()

    def repeat_step(self, step: int, q: int, eps: float) -> None:
        """What a step's forwards do to θ, for replay: nothing."""

    def groups(self) -> Iterator[tuple[int, list[Probe]]]:
        """(first index, probes) of each run of at most two probes that share a direction, hence one draw of z."""
        i = 0
        while i < len(self.probes):
            pair = [p.direction for p in self.probes[i : i + 2]]
            n = 2 if len(pair) == 2 and pair[0] == pair[1] else 1
            yield i, list(self.probes[i : i + n])
            i += n

    def perturbed(self, tensors: list[Trained], group: list[Probe], first: int) -> list[torch.Tensor]:
        """[G, *shape] for each tensor: θ + s·z at the probes of the group, in scratch that the next call reuses.

        first: index of the group's first probe among axis.probes.
        """
        need = self._used + sum(_bytes(t) for t in tensors) * len(group)
        if not self._arenas or self._arenas[-1].numel() < need:
            device = self.trained[0].stored.device
            self._arenas.append(torch.empty(max(need, self.scratch_bytes), dtype=torch.uint8, device=device))
        offset, made = self._used, []
        for t in tensors:
            size = t.stored.numel() * t.compute.itemsize * len(group)
            out = self._arenas[-1][offset : offset + size].view(t.compute).view(len(group), *t.stored.shape)
            offset += _bytes(t) * len(group)
            self._fill(t, out, group, first)
            made.append(out)
        return made

    def _fill(self, t: Trained, out: torch.Tensor, group: list[Probe], first: int) -> None:
        """One pass over θ: the updates it lacks, then the probes of the group into out [G, *shape]."""
        noise.perturb(
            t.stored, t.id, out, group, seed=self.seed, step=self.step, noise=self.kind,
            updates=update.due(t, self.updates, self.beta), momentum=t.momentum, beta=self.beta,
        )  # fmt: skip
        update.mark(t, self.updates)

    def gathered(self, t: Trained, rows: torch.Tensor, group: list[Probe], first: int) -> torch.Tensor:
        """[G, N, D]: rows [G, N] of θ + s·z of a matrix at the probes of the group, noise made for these rows only."""
        update.advance(t, self.updates, self.kind, self.beta)
        out = torch.empty(*rows.shape, t.stored.shape[1], dtype=t.compute, device=t.stored.device)
        where: dict[str, Any] = {"seed": self.seed, "step": self.step, "noise": self.kind}
        for i, probe in enumerate(group):
            noise.gather(t.stored, t.id, rows[i].contiguous(), out[i], *probe, **where)
        return out

    def shortcut(self, site: Site) -> Callable | None:
        """A direct route for this site, or None: its own forward, once per probe."""
        return _fast(site)

    def in_scratch(self, x: torch.Tensor) -> bool:
        return any(x.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in self._arenas)


class InPlace:
    """MeZO's Algorithm 1 to the letter: θ is moved to each probe and back, one probe a forward.

    Any module works, whatever it does with its tensors; the moves round in θ's dtype, so they do not quite
    restore it. The cycle is part of the run, and replay repeats it. Same interface as ProbeAxis.
    """

    def __init__(self, trained: Sequence[Trained], *, seed: int, kind: str, beta: float = 0.0) -> None:
        self.trained, self.seed, self.kind, self.beta = list(trained), seed, kind, beta
        self.step = 0
        self.here = CLEAN[0]  # where θ stands now

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        """Forwards in this context run at the one given probe; θ stays there until it is moved or settled."""
        (probe,) = probes
        self.step = step
        self._move(probe)
        try:
            yield
        except BaseException:
            self.settle()
            raise

    @contextmanager
    def clean(self, rows: int = 0) -> Iterator[None]:
        self.settle()
        yield

    def _move(self, probe: Probe) -> None:
        """θ ← θ + (s' − s)·z along one direction; a change of direction goes through θ itself."""
        if self.here.scale and self.here.direction != probe.direction:
            self._move(Probe(self.here.direction, 0.0))
        shift = Probe(probe.direction, probe.scale - self.here.scale)
        if shift.scale:
            for t in self.trained:
                noise.perturb(
                    t.stored, t.id, t.stored[None], [shift], seed=self.seed, step=self.step, noise=self.kind
                )
        self.here = probe

    def settle(self) -> None:
        self._move(Probe(self.here.direction, 0.0))

    def commit(self, change: noise.Update) -> None:
        for t in self.trained:
            update.advance(t, [change], self.kind, self.beta)

    def flush(self) -> None:
        self.settle()

    def repeat_step(self, step: int, q: int, eps: float) -> None:
        """The moves of a step's forwards, for replay: +eps, −2 eps, +eps for each direction."""
        self.step = step
        for k in range(q):
            self._move(Probe(k, eps))
            self._move(Probe(k, -eps))
        self.settle()


def _bytes(t: Trained) -> int:
    return -(-t.stored.numel() * t.compute.itemsize // 64) * 64  # each tensor starts on a cache line


def _scratch(sites: Sequence[Site]) -> int:
    """Bytes for two probes of any site's tensors and, next to them, one of every site that runs within it."""
    own = {s.module: 0 if _fast(s) is _embedding else sum(_bytes(t) for t in s.trained) for s in sites}
    deep: dict[nn.Module, int] = {}

    def within(module: nn.Module) -> int:
        """Bytes that one probe of the sites below a module takes."""
        if module not in deep:
            deep[module] = max((own.get(m, 0) + within(m) for m in module.children()), default=0)
        return deep[module]

    return max((2 * own[s.module] + within(s.module) for s in sites), default=0)


def _choose_compute(trained: Sequence[Trained], sites: Sequence[Site]) -> None:
    """1-D tensors are probed in fp32 wherever every site that reads them can run in it."""
    able = {t.id for t in trained if t.stored.ndim <= 1 and t.stored.dtype == torch.float32}
    for site in sites:
        if not _runs_fp32(site) and _fast(site) not in (_linear, _conv1d):
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


# --- how a site runs -------------------------------------------------------------------------------------


def _fast(site: Site) -> Callable | None:
    """A direct route for exact types with their own forward and rows in dim 0; None: the general one."""
    kind = type(site.module)
    route = {nn.Linear: _linear, nn.Embedding: _embedding, Conv1D: _conv1d}.get(kind)
    if route is None or "forward" in site.module.__dict__ or site.module._forward_hooks or not _owns(site):
        return None
    if any(c.inputs != [0] or c.outputs != [0] for c in site.calls):
        return None
    return None if kind is nn.Embedding and site.module.max_norm is not None else route


def _owns(site: Site) -> bool:
    weight = getattr(site.module, "weight", None)
    return any(t.param is weight for t in site.trained)


def _route(axis: ProbeAxis, site: Site) -> Callable:
    inner = site.module.forward
    fast = axis.shortcut(site)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call(axis, site) if len(axis.probes) > 1 else None
        if fast is not None and (
            call is None or (args or [*kwargs.values()])[0].shape[0] % len(axis.probes) == 0
        ):
            return fast(axis, site, *args, **kwargs)
        return _general(axis, site, call, inner, args, kwargs)

    forward.accepts_tokens = fast is _linear  # type: ignore[attr-defined]
    return forward


def _general(
    axis: ProbeAxis, site: Site, call: Call | None, inner: Callable, args: tuple, kwargs: dict
) -> Any:
    """Any module: its own forward, once per probe, on that probe's rows, its tensors swapped.

    Sites within it run meanwhile, at that one probe.
    """
    probes, used, outer = axis.probes, axis._used, axis.first
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
            axis._used = used + len(group) * sum(_bytes(t) for t in site.trained)
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
            axis.probes, axis._used, axis.first = probes, used, outer
    finally:
        axis.probes, axis._used, axis.first = probes, used, outer
        for t, data in zip(site.trained, before):
            t.param.data = data
    if call is None:
        return tree_unflatten(parts[0], out_spec)
    shared = all(x.shape[d] == 1 for x, d in zip(flat, call.inputs) if d >= 0 and isinstance(x, torch.Tensor))
    joined = _join(parts, call, axis.batch_rows, site.name, shared)
    return tree_unflatten(joined, out_spec)


def _call(axis: ProbeAxis, site: Site) -> Call:
    """The layout of the site's next call. One call more than calibrated is not understood, however alike they look:
    a module that works through its rows in portions would be given probes for portions."""
    k = axis._calls[site]
    axis._calls[site] = k + 1
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


def _linear(
    axis: ProbeAxis, site: Site, input: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """y_p = x_p (W + s_p Z)ᵀ + b_p, all into one output; `tokens` [C] asks for these rows of W only."""
    return _product(axis, site, input, transposed=True, tokens=tokens)


def _conv1d(axis: ProbeAxis, site: Site, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's linear, its matrix stored transposed: y_p = x_p (W + s_p Z) + b_p."""
    return _product(axis, site, x, transposed=False)


def _product(
    axis: ProbeAxis, site: Site, x: torch.Tensor, *, transposed: bool, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    module: Any = site.module
    weight = next((t for t in site.trained if t.param is module.weight), None)
    bias = next((t for t in site.trained if t.param is module.bias), None)
    xs = x.reshape(len(axis.probes), -1, x.shape[-1])  # [P, n, in]
    y = None
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
        for i in range(len(group)):
            torch.mm(xs[first + i], w[i], out=y[first + i])
        if module.bias is not None:
            b = module.bias[None] if bias is None else made[bias.id]  # [G, out] or [1, out]
            y[first : first + len(group)] += (b if tokens is None else b[:, tokens])[:, None]
    assert y is not None
    return y.view(*x.shape[:-1], y.shape[-1])


def _embedding(axis: ProbeAxis, site: Site, input: torch.Tensor) -> torch.Tensor:
    """Rows of W + s_p Z for each probe's own ids: noise is made for the gathered rows only."""
    (t,) = site.trained
    rows = axis.gathered(t, input.reshape(len(axis.probes), -1), list(axis.probes), 0)  # [P, n, D]
    return rows.view(*input.shape, -1)
