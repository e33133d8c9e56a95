"""The probe axis: one forward pass that answers for several probes θ + s·z at once.

The batch is repeated once per probe, probe-major. Modules that own no trained tensor run over all rows,
untouched; a site runs once per probe on that probe's rows, with its tensors swapped for θ + s·z made from
the seed in a scratch buffer. θ itself is only read, or brought up to date by updates that are still pending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.method.updates import advance_trained
from zoft.noise.spec import Update
from zoft.probe.scratch import CLEAN, PENDING_MAX, Scratch
from zoft.probe.site_forwards import choose_compute, fast, route, scratch_bytes
from zoft.probe.sites import Site


class ProbeAxis(Scratch):
    """Run a model's forwards, inside `at`, at θ + s·z for each of a list of probes.

    sites: from sites.find. seed: the run's. kind: the noise distribution. beta: momentum. A committed
    update stays pending until a tensor is next read: it is brought up to date, once, by whoever reads it first.
    """

    def __init__(
        self, trained: Sequence[Trained], sites: Sequence[Site], *, seed: int, kind: str, beta: float = 0.0
    ) -> None:
        choose_compute(trained, sites)
        super().__init__(trained, sites, seed=seed, kind=kind, beta=beta, size=scratch_bytes(sites))
        self._active = False  # within `at`
        self._forwards = {s: route(self, s, self.shortcut(s)) for s in self.sites}
        self._blank = self._blanks()
        self.hold = False  # whether a lone probe's tensors are made once for all forwards of an `at`
        self._held_at: tuple[int, Probe] | None = None

    def _blanks(self) -> dict[int, torch.Tensor]:
        # During a forward a trained tensor's own place holds NaN: a read that no site serves shows in the loss.
        return {
            t.id: torch.full((), float("nan"), dtype=t.compute, device=t.stored.device).expand(t.stored.shape)
            for t in self.trained
        }

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        """Run forwards in this context at the given probes of a step; exceptions restore everything.

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
        """Run forwards in this context at θ: evaluation, with all updates in."""
        with self.at(self.step, CLEAN, rows):
            yield

    def commit(self, change: Update) -> None:
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
            advance_trained(t, self.updates, self.kind, self.beta)
        self.updates.clear()

    def repeat_step(self, step: int, probes: Sequence[Probe]) -> None:
        """Repeat what a step's forwards do to θ, for replay: nothing."""

    def shortcut(self, site: Site) -> Callable | None:
        """Return a direct route for this site, or None: its own forward, once per probe."""
        return fast(site)

    def held_bytes(self) -> int:
        """Return the bytes that holding a probe takes."""
        return sum(t.stored.numel() * t.compute.itemsize for t in self.trained)

    def release(self) -> None:
        """Give the scratch back; the routes refer to the axis, so that it would wait for a garbage collection."""
        self._arenas.clear()
        self._forwards.clear()
