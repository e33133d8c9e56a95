"""Move the weights themselves to each probe and back, one probe per forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from zoft.method.blocks import their_turn
from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.method.updates import mark_advanced
from zoft.noise import noise, spec
from zoft.noise.spec import Update
from zoft.probe.scratch import CLEAN, PENDING_MAX


class InPlace:
    """Run MeZO's Algorithm 1 on the weights themselves: θ is moved to each probe and back, one probe per forward.

    Any module works, whatever it does with its tensors; the moves round in θ's dtype, so they do not quite
    restore it. The cycle is part of the run, and replay repeats it. Same interface as ProbeAxis.

    One pass over θ a probe, each of its numbers read, worked on in registers and written; of a two-sided direction:
        1. the way back from the last probe of the step before, that step's update, and on to +eps;
        2. on to -eps, by -2 eps.
    The way back is part of the update and its one rounding (`spec.Update.restore`); where there is no update (between
    directions, after a skipped step, in flush) it is a move of its own, in the same pass as what follows. Every move
    rounds to nearest in θ's dtype, in registers or in memory: so what is done does not depend on how it is cut in passes.
    """

    def __init__(self, trained: Sequence[Trained], *, seed: int, kind: str, beta: float = 0.0) -> None:
        self.trained, self.seed, self.kind, self.beta = list(trained), seed, kind, beta
        self.todo: list[Update] = []  # moves and updates that some tensor still lacks, in order
        self.done = {t.id: 0 for t in self.trained}  # how many of them a tensor has
        self.step, self.here = 0, CLEAN[0]  # where θ is once it has them all: at this probe of this step
        for t in self.trained if beta else ():
            wide = torch.float64 if t.stored.dtype == torch.float64 else torch.float32
            t.momentum = torch.zeros_like(t.stored, dtype=wide)

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        """Run forwards in this context at the one given probe; θ stays there until it is moved or flushed."""
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

    def commit(self, change: Update) -> None:
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
        """Bring the weights back to θ, with every update in."""
        self._go(self.step, CLEAN[0])
        self._apply()

    def repeat_step(self, step: int, probes: Sequence[Probe]) -> None:
        """Repeat the moves of a step's forwards, for replay: on to each probe in turn."""
        for probe in probes:
            self._go(step, probe)
            self._not_too_many()

    def _go(self, step: int, probe: Probe) -> None:
        """Note the move from where θ is to a probe of a step; along another direction the way leads through θ."""
        here = self.here
        if here.scale and (self.step, here.direction) != (step, probe.direction):
            self.todo.append(spec.move(self.seed, self.step, here.direction, -here.scale))
            here = CLEAN[0]
        if probe.scale != here.scale:
            self.todo.append(spec.move(self.seed, step, probe.direction, probe.scale - here.scale))
        self.step, self.here = step, probe

    def _not_too_many(self) -> None:
        if len(self.todo) >= PENDING_MAX:
            self._apply()

    def _apply(self) -> None:
        """Every tensor gets what it lacks, in one pass over it. After an exception on the way the next call goes on."""
        for t in self.trained:
            todo = their_turn(t, self.todo[self.done[t.id] :])
            if not t.decays:
                todo = [u if u.is_nothing else replace(u, decay=1.0) for u in todo]
            where: dict[str, Any] = {"noise": self.kind, "momentum": t.momentum, "beta": self.beta}
            where |= {"floor": t.floor, "mask": t.mask, "width": t.width}
            if todo and todo[-1].is_nothing:  # a move that ends a pass is written like a probe
                *todo, end = todo
                probe = (len(end.multipliers) - 1, end.restore)
                where |= {"seed": self.seed, "step": end.step, "updates": todo}
                noise.perturb(t.stored, t.id, t.stored[None], [probe], **where)
            elif todo:
                noise.advance(t.stored, t.id, todo, **where)
            mark_advanced(t, [u for u in todo if not u.is_nothing])
            self.done[t.id] = len(self.todo)
        self.todo, self.done = [], dict.fromkeys(self.done, 0)
