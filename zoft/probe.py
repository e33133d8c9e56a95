"""The probe axis: one forward pass that answers for several probes θ + s·z at once.

The batch is repeated once per probe, probe-major. Modules that own no trained tensor run over all rows,
untouched; a site runs once per probe on that probe's rows, with its tensors swapped for θ + s·z made from
the seed in a scratch buffer. θ itself is only read, or brought up to date by updates that are still pending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from zoft import noise, routes, update
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
        self.calls: dict[Site, int] = {}  # of each site, in the forward under way
        routes.choose_compute(self.trained, self.sites)
        self._forwards = {s: routes.route(self, s) for s in self.sites}
        self.scratch_bytes = routes.scratch_bytes(self.sites)
        self._arenas: list[torch.Tensor] = []  # the last is in use; others only where the first was too small
        self.used = 0  # bytes of it that running sites hold
        self._blank = self._blanks()
        # Of a lone probe, for forwards that come many to an `at`: its tensors [1, *shape], made once.
        self.hold = False
        self._held: dict[int, torch.Tensor] = {}
        self._held_at: tuple[int, Probe] | None = None
        self._holding = False

    def _blanks(self) -> dict[int, torch.Tensor]:
        # During a forward a trained tensor's own place holds NaN: a read that no site serves shows in the loss.
        return {
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
            self.calls = dict.fromkeys(self.sites, 0)
            if self.hold and len(self.probes) == 1:
                self._make_held(step, self.probes[0])
                self._holding = True
            yield
        finally:
            self._active, self.used, self.first, self._holding = False, 0, 0, False
            del self._arenas[:-1]
            for s in self.sites:
                if own[s] is None:
                    s.module.__dict__.pop("forward", None)
                else:
                    s.module.forward = own[s]
            for t in self.trained:
                t.param.data = t.stored

    def _make_held(self, step: int, probe: Probe) -> None:
        """θ + s·z of every tensor, beside θ; the microbatches of a step find a probe's as they left them."""
        if probe.scale and self._held_at == (step, probe):
            return
        self._held_at = None
        for t in self.trained:
            if t.id not in self._held:
                self._held[t.id] = torch.empty(1, *t.stored.shape, dtype=t.compute, device=t.stored.device)
            self._fill(t, self._held[t.id], [probe], 0)
            self._mark(t)
        self._held_at = (step, probe)

    @contextmanager
    def clean(self, rows: int = 0) -> Iterator[None]:
        """Forwards in this context run at θ: evaluation, with all updates in."""
        with self.at(self.step, CLEAN, rows):
            yield

    def commit(self, change: noise.Update) -> None:
        """Take a step's update; each tensor gets it with its next read, or by flush."""
        self.updates.append(change)
        self._held_at = None
        # What a rule does is no part of a read: it is done at once.
        if len(self.updates) >= PENDING_MAX or any(t.rule for t in self.trained):
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
        if self._holding:
            return [self._held[t.id] for t in tensors]
        arena = self._room(sum(routes.nbytes(t) for t in tensors) * len(group))
        offset, made = 0, []
        for t in tensors:
            size = t.stored.numel() * t.compute.itemsize * len(group)
            out = arena[offset : offset + size].view(t.compute).view(len(group), *t.stored.shape)
            offset += routes.nbytes(t) * len(group)
            self._fill(t, out, group, first)
            self._mark(t)
            made.append(out)
        return made

    def room(self, shape: Sequence[int], dtype: torch.dtype, taken: int) -> torch.Tensor:
        """Scratch of that shape, after the `taken` bytes that the last `perturbed` gave; the next call reuses both."""
        size = math.prod(shape) * dtype.itemsize
        if not self._arenas or self._arenas[-1].numel() < self.used + taken + size:
            self.scratch_bytes = max(self.scratch_bytes, routes.dense_bytes(self.sites, dtype))
        return self._room(taken + size)[taken : taken + size].view(dtype).view(*shape)

    def slabs(
        self, t: Trained, group: list[Probe], first: int
    ) -> Generator[tuple[slice, torch.Tensor], None, None]:
        """(rows, [G, r, D]): a matrix at the probes of the group, some rows at a time, in scratch that the next ones reuse.

        To be closed: what is pending reaches all rows, whatever happens to the one who asks.
        """
        step, end = routes.slab_rows(t), 0
        size = t.stored.shape[1] * t.compute.itemsize * len(group)
        try:
            while end < len(t.stored):
                rows = slice(end, min(end + step, len(t.stored)))
                r = rows.stop - rows.start
                if self._holding:
                    out = self._held[t.id][:, rows]
                else:
                    out = self._room(r * size)[: r * size].view(t.compute).view(len(group), r, -1)
                    self._fill(t, out, group, first, rows)
                end = rows.stop
                yield rows, out
        finally:
            if end < len(t.stored):
                self._fill(t, None, [], first, slice(end, len(t.stored)))
            self._mark(t)

    def _room(self, size: int) -> torch.Tensor:
        """Scratch of that many bytes at least, after what running sites hold."""
        need = self.used + size
        if not self._arenas or self._arenas[-1].numel() < need:
            device = self.trained[0].stored.device
            self._arenas.append(torch.empty(max(need, self.scratch_bytes), dtype=torch.uint8, device=device))
        return self._arenas[-1][self.used :]

    def _fill(
        self, t: Trained, out: torch.Tensor | None, group: list[Probe], first: int, rows: slice = slice(None)
    ) -> None:
        """One pass over rows of θ: the updates they lack, then the probes of the group into out [G, *shape of the rows]."""
        updates = update.due(t, self.updates, self.beta)
        noise.perturb(
            routes.part(t.stored, rows), t.id, out, group, seed=self.seed, step=self.step, noise=self.kind, updates=updates,
            momentum=None if t.momentum is None else routes.part(t.momentum, rows), beta=self.beta,
            start=routes.start(t.stored, rows), floor=t.floor, mask=t.mask,
        )  # fmt: skip

    def _mark(self, t: Trained) -> None:
        """Note that all of a tensor has what was pending."""
        update.mark(t, self.updates)

    def gathered(self, t: Trained, rows: torch.Tensor, group: list[Probe], first: int) -> torch.Tensor:
        """[G, N, D]: rows [G, N] of θ + s·z of a matrix at the probes of the group, noise made for these rows only."""
        if self._holding:
            return self._held[t.id][0][rows]
        update.advance(t, self.updates, self.kind, self.beta)
        out = torch.empty(*rows.shape, t.stored.shape[1], dtype=t.compute, device=t.stored.device)
        where: dict[str, Any] = {"seed": self.seed, "step": self.step, "noise": self.kind, "mask": t.mask}
        for i, probe in enumerate(group):
            noise.gather(t.stored, t.id, rows[i].contiguous(), out[i], *probe, **where)
        return out

    def shortcut(self, site: Site) -> Callable | None:
        """A direct route for this site, or None: its own forward, once per probe."""
        return routes.fast(site)

    def scratch_held(self) -> int:
        """Bytes of scratch that are allocated now."""
        return sum(a.numel() for a in self._arenas)

    def held_bytes(self) -> int:
        """What holding a probe takes."""
        return sum(t.stored.numel() * t.compute.itemsize for t in self.trained)

    def release(self) -> None:
        """Give the scratch back; the routes refer to the axis, so that it would wait for a garbage collection."""
        self._arenas.clear()
        self._forwards.clear()

    def in_scratch(self, x: torch.Tensor) -> bool:
        return any(x.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in self._arenas)


class InPlace:
    """MeZO's Algorithm 1 on the weights themselves: θ is moved to each probe and back, one probe a forward.

    Any module works, whatever it does with its tensors; the moves round in θ's dtype, so they do not quite
    restore it. The cycle is part of the run, and replay repeats it. Same interface as ProbeAxis.

    One pass over θ a probe, two a step of one direction, each of its numbers read, worked on in registers and written:
        1. the way back from the last probe of the step before, that step's update, and on to +eps;
        2. on to -eps, by -2 eps.
    The way back is part of the update and its one rounding (`noise.Update.restore`); where there is no update (between
    directions, after a skipped step, in flush) it is a move of its own, in the same pass as what follows. Every move
    rounds to nearest in θ's dtype, in registers or in memory: so what is done does not depend on how it is cut in passes.
    """

    def __init__(self, trained: Sequence[Trained], *, seed: int, kind: str, beta: float = 0.0) -> None:
        self.trained, self.seed, self.kind, self.beta = list(trained), seed, kind, beta
        self.todo: list[noise.Update] = []  # moves and updates that some tensor still lacks, in order
        self.done = {t.id: 0 for t in self.trained}  # how many of them a tensor has
        self.step, self.here = 0, CLEAN[0]  # where θ is once it has them all: at this probe of this step
        for t in self.trained if beta else ():
            wide = torch.float64 if t.stored.dtype == torch.float64 else torch.float32
            t.momentum = torch.zeros_like(t.stored, dtype=wide)

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        """Forwards in this context run at the one given probe; θ stays there until it is moved or flushed."""
        (probe,) = probes
        try:
            self._go(step, probe)
            self._apply()
            yield
        except BaseException:
            self.flush()
            raise

    @contextmanager
    def clean(self, rows: int = 0) -> Iterator[None]:
        self.flush()
        yield

    def commit(self, change: noise.Update) -> None:
        """Take a step's update, to be applied with the next move; the way back from its last probe is part of it."""
        last = (change.step, len(change.multipliers) - 1)
        if self.here.scale and (self.step, self.here.direction) == last:
            change, self.here = replace(change, restore=-self.here.scale), CLEAN[0]
        self._go(change.step, CLEAN[0])
        self.todo.append(change)
        self._not_too_many()

    def settle(self) -> None:
        """End of a step's forwards: θ stays where it is, the update takes it back."""

    def flush(self) -> None:
        """Back to θ, with every update in."""
        self._go(self.step, CLEAN[0])
        self._apply()

    def repeat_step(self, step: int, q: int, eps: float) -> None:
        """The moves of a step's forwards, for replay: +eps and -2 eps for each direction."""
        for k in range(q):
            self._go(step, Probe(k, eps))
            self._go(step, Probe(k, -eps))
            self._not_too_many()

    def _go(self, step: int, probe: Probe) -> None:
        """Note the move from where θ is to a probe of a step; along another direction the way leads through θ."""
        here = self.here
        if here.scale and (self.step, here.direction) != (step, probe.direction):
            self.todo.append(noise.move(self.seed, self.step, here.direction, -here.scale))
            here = CLEAN[0]
        if probe.scale != here.scale:
            self.todo.append(noise.move(self.seed, step, probe.direction, probe.scale - here.scale))
        self.step, self.here = step, probe

    def _not_too_many(self) -> None:
        if len(self.todo) >= PENDING_MAX:
            self._apply()

    def _apply(self) -> None:
        """Every tensor gets what it lacks, in one pass over it. After an exception on the way the next call goes on."""
        for t in self.trained:
            todo = self.todo[self.done[t.id] :]
            if not t.decays:
                todo = [u if u.is_nothing else replace(u, decay=1.0) for u in todo]
            where: dict[str, Any] = {"noise": self.kind, "momentum": t.momentum, "beta": self.beta}
            where |= {"floor": t.floor, "mask": t.mask}
            if todo and todo[-1].is_nothing:  # a move that ends a pass is written like a probe
                *todo, end = todo
                probe = (len(end.multipliers) - 1, end.restore)
                where |= {"seed": self.seed, "step": end.step, "updates": todo}
                noise.perturb(t.stored, t.id, t.stored[None], [probe], **where)
            elif todo:
                noise.advance(t.stored, t.id, todo, **where)
            update.mark(t, [u for u in todo if not u.is_nothing])
            self.done[t.id] = len(self.todo)
        self.todo, self.done = [], dict.fromkeys(self.done, 0)
