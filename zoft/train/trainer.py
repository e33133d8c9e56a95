"""The forward-only loop that every recipe shares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn

from zoft.errors import UserError
from zoft.ledger.log import Ledger, Record, update_of
from zoft.method.estimators.estimator import (
    Estimator,
    Probe,
    SecondRound,
    finite,
    losses_of,
    projected_gradient,
    rows_of,
)
from zoft.method.estimators.named import estimator_of
from zoft.method.momentum import Window, window_beta
from zoft.method.updates import lr_at, make_update
from zoft.noise.spec import Update
from zoft.objectives.losses import Batch, losses, mean_loss
from zoft.parallel.world import ALONE, STOP, this_world
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.probe.rows import Unfit


@dataclass(frozen=True)
class Settings:
    """Hold the settings of a step, named as the config's keys.

    Args:
        seed: The seed of the noise.
        steps: The number of steps that the schedule counts.
        lr: The learning rate.
        eps: The size of a probe.
        q: The number of directions.
        estimator: The name of a packaged estimator, or an `Estimator`.
        directions: "shared", or "example" for directions of each example's own.
        batch_size: Examples per batch, over all processes together.
        accumulate: Batches per step.
        schedule: "constant", "linear" or "cosine".
        warmup: Steps of warm-up; below 1 a share of all steps.
        weight_decay: Decoupled decay, times lr.
        probes_per_forward: Probes that share one forward pass.
        clip: The largest projected gradient, or None.
        meazo: The decay of MEAZO's second moment; 0 turns it off.
        update: The update rule; here only "conservative" and "momentum" differ from a plain step.
        momentum: The share of the previous step's update.
        max_skipped: Skipped steps in a row that stop the run.
        shaping: "none", "zscore" or "ranks", of the rewards of a step's members.
        shaping_group: "all" or "prompt".
    """

    seed: int
    steps: int
    lr: float
    eps: float
    q: int = 1
    estimator: str | Estimator = "two_sided"
    directions: str = "shared"
    batch_size: int = 1
    accumulate: int = 1
    schedule: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    probes_per_forward: int = 2
    clip: float | None = None
    meazo: float = 0.0
    update: str = "auto"
    momentum: float = 0.0
    max_skipped: int = 20
    members_per_batch: int = 1
    shaping: str = "none"
    shaping_group: str = "all"
    objective: str = "auto"
    rank_by: str = "score"
    rank_best: int | None = None
    rank_line: int = 0


def metrics_of(record: Record, probes: Sequence[Probe]) -> dict[str, Any]:
    """Return a step's line in metrics.jsonl: {step, loss: the mean over its probes, projected_gradient, lr, skipped}."""
    found = losses_of(record.losses, probes)  # [P]
    loss, slope = sum(found) / len(found), projected_gradient(record, probes)
    return {
        "step": record.step, "loss": loss, "projected_gradient": slope, "lr": record.lr, "skipped": record.skipped
    }  # fmt: skip


class Trainer:
    """Train a model with zeroth-order steps, from losses at an estimator's probes θ + s·z alone.

    Args:
        model: The model; its trained tensors belong to the axis.
        axis: The way to run the model at a probe (`ProbeAxis` or `InPlace`).
        batches: batches(step) returns the step's microbatches, which all use the same directions.
        ledger: The ledger, open for appending; None only to replay.
        settings: The step's settings.
        forward: forward(model, batch) returns K numbers per example, the last of them a count.
        value: value(totals) returns what is minimised [P], from the totals over all examples of a step [P, K]. So an
            objective need not be a mean over rows.

    Attributes:
        state: The estimator's state, fp64 [S]. Steps that are not skipped change it in place.

    Source: MeZO (arXiv 2305.17333), Algorithm 1 and, for q > 1, Algorithm 2 with one batch for all directions.
    """

    lr_apart = False  # whether the multipliers have no learning rate in them

    def __init__(
        self,
        model: nn.Module,
        axis: ProbeAxis | InPlace,
        batches: Callable[[int], Sequence[Batch]],
        ledger: Ledger | None,
        settings: Settings,
        forward: Callable[[nn.Module, Batch], tuple[torch.Tensor, ...]] = losses,
        value: Callable[[torch.Tensor], torch.Tensor] = mean_loss,
    ) -> None:
        self.model, self.axis, self.batches = model, axis, batches
        self.ledger, self.settings = ledger, settings
        self.forward, self.value = forward, value
        self.next = 0  # the step to be taken
        self.forwards = 0  # examples × probes so far
        self.skipped_in_a_row = 0
        self.flat = False  # the step's losses say nothing about its directions
        self.halted = False  # a process of the run was asked to stop; all know it after the same step
        self.estimator = estimator_of(settings)
        self.probes = self.estimator.probes(settings.q, settings.eps)  # [P]
        self.eps = torch.tensor(settings.eps, dtype=torch.float64)
        self.state = torch.tensor(self.estimator.state, dtype=torch.float64)
        self.window = Window(window_beta(settings))
        self.world = this_world()

    def step(self) -> dict[str, Any] | None:
        """Update θ once and return the step's metrics, or None while they are on their way from the device.

        θ ← θ - lr·(Σ_k c_k·z_k + weight_decay·θ),  c = estimator.coefficients(losses)
        """
        s, t = self.settings, self.next
        batches = self.batches(t)
        ask = self.losses_at if self.estimator.per == 1 else self.own_losses_at
        losses = ask(t, self.probes, batches)  # [P]
        coefficients, state = self.estimate(losses)  # [q], [S]
        lr = lr_at(t, lr=s.lr, steps=s.steps, schedule=s.schedule, warmup=s.warmup)
        ruled = self.lr_apart or self.axis.trained[0].rule is not None
        change = make_update(t, s.seed, coefficients, lr=lr, weight_decay=s.weight_decay, ruled=ruled)
        # A multiplier may overflow fp32 where its losses do not.
        good = finite([*losses, *change.multipliers]) and not self.flat
        if good:
            change = self.chosen(change, batches)
            good = finite(change.multipliers)
        if not good:
            change = Update(t, s.seed, (0.0,) * self.estimator.directions(s.q))
        rows = rows_of(losses, self.probes)  # [2q]
        metrics = self.write_down(Record(t, change.multipliers, change.decay, rows, not good, lr))
        if good:  # the step is now a fact; the next reader of each tensor applies it
            self.commit(change)
            self.state.copy_(state)
        self.next = t + 1
        return metrics

    def commit(self, change: Update) -> None:
        """Hand a step's update, as the ledger has it, to the weights, with past steps' directions where momentum has them."""
        self.axis.commit(self.window.take(change))

    def chosen(self, change: Update, batches: Sequence[Batch]) -> Update:
        """Return a step's update after its second round of probes, where its method has one."""
        second = self.estimator.second
        return change if second is None else self.asked_again(second, change, batches)

    def asked_again(self, second: SecondRound, change: Update, batches: Sequence[Batch]) -> Update:
        """Return a step's update with the multipliers that a second round of probes chooses."""
        losses = self.losses_at(change.step, second.probes(change.multipliers), batches)
        chosen = np.asarray(second.choose(losses, change.multipliers), np.float32)  # [q]
        assert len(chosen) == len(change.multipliers), (len(chosen), second.name)
        return replace(change, multipliers=tuple(chosen.tolist()))

    @torch.no_grad()
    def losses_at(self, step: int, probes: Sequence[Probe], batches: Sequence[Batch]) -> list[float]:
        """Return the objective at each probe [len(probes)], of the totals over all microbatches in fp64: Σ sums / Σ counts."""
        group = self.settings.probes_per_forward
        mine = probes[self.world.probes(len(probes))]
        parts = []
        for i in range(0, len(mine), group):
            here = mine[i : i + group]
            parts.append(reduce(torch.add, [self.sums_at(step, here, batch) for batch in batches]))
        self.axis.settle()
        return self.value(self.exchanged(step, torch.cat(parts))).tolist()

    def exchanged(self, step: int, totals: torch.Tensor) -> torch.Tensor:
        """Return the totals of all probes from this process's [m, K], the last column a count."""
        if self.world.size > 1:
            totals, flags = self.world.exchange(totals, self.settings.probes_per_forward == 1)
            self.halted = self.halted or bool(int(flags) & STOP)
            if int(flags) & ALONE:
                self.alone(step, "so does another process of this run")
        return totals

    @torch.no_grad()
    def own_losses_at(self, step: int, probes: Sequence[Probe], batches: Sequence[Batch]) -> list[float]:
        """Return the loss of each example at each of its own probes, [p·N + e]: N times its part of the step's mean.

        l[p, e] = N·S[p, e] / Σ_e n[p, e], so that the mean over examples is the objective. probes: p-major, [P·N].
        """
        n, group = self.estimator.per, self.settings.probes_per_forward
        count = len(probes) // n
        mine = range(count)[self.world.probes(count)]
        each = self.settings.batch_size
        own = [[j * each + e for e in self.world.examples(range(each))] for j in range(len(batches))]
        totals = torch.zeros(len(mine), n, 2, dtype=torch.float64)  # of other processes' examples: 0
        for i in range(0, len(mine), group):
            here = mine[i : i + group]
            for places, batch in zip(own, batches, strict=True):
                found = self.own_sums_at(step, [[probes[p * n + e] for e in places] for p in here], batch)
                totals[i : i + len(here), places] = found
        self.axis.settle()
        flat = torch.cat([totals.flatten(1), totals[..., 1].sum(1, keepdim=True)], 1)  # [m, 2N + 1]
        both = self.exchanged(step, flat)[:, :-1].view(count, n, 2)
        return (both[..., 0] / both[..., 1].mean(1, keepdim=True)).flatten().tolist()

    def own_sums_at(self, step: int, probes: Sequence[Sequence[Probe]], batch: Batch) -> torch.Tensor:
        """Return [P, E, 2]: loss sum and count of each example of a batch at its own probe, probes [P][E].

        To the axis each example is a batch of its own, with a probe of its own: that is all there is to it.
        """
        rows, rest = divmod(batch.rows, batch.examples)
        assert not rest, f"{batch.rows} rows of {batch.examples} examples: an even batch has as many for each"
        with self.axis.at(step, [p for some in probes for p in some], rows):
            sums, counts = self.forward(self.model, batch.repeat(len(probes)))  # [P·E] each
        self.forwards += batch.examples * len(probes)
        return torch.stack([sums, counts], -1).view(len(probes), -1, 2).double().cpu()

    def sums_at(self, step: int, probes: Sequence[Probe], batch: Batch) -> torch.Tensor:
        """Return [P, K]: a batch's totals at each probe (K = 2: loss sum, count), from one forward.

        A batch that cannot be stacked gets one forward a probe, and so do all that follow it.
        """
        if len(probes) > self.settings.probes_per_forward:
            return torch.cat([self.sums_at(step, [p], batch) for p in probes])
        try:
            with self.axis.at(step, probes, batch.rows):
                columns = self.forward(self.model, batch.repeat(len(probes)))  # K of [P·E]
        except Unfit as error:
            if len(probes) == 1:
                raise
            self.alone(step, error)
            return self.sums_at(step, probes, batch)
        self.forwards += batch.examples * len(probes)
        return torch.stack(columns, -1).view(len(probes), -1, len(columns)).double().sum(1).cpu()

    def alone(self, step: int, why: Unfit | str) -> None:
        """Run one probe per forward from here on."""
        if self.settings.probes_per_forward == 1:
            return
        print(f"step {step}: one probe per forward from here on: {why}", file=sys.stderr, flush=True)
        self.settings = replace(self.settings, probes_per_forward=1)

    def estimate(self, losses: Sequence[float]) -> tuple[list[float], torch.Tensor]:
        """Return a step's coefficients [q] from its losses [P], and the state [S] that the estimator has after it."""
        values = torch.tensor(losses, dtype=torch.float64, device=self.state.device)
        coefficients, state = self.estimator.run(values, self.settings.q, self.eps, self.state)
        return coefficients.tolist(), state

    def write_down(self, record: Record) -> dict[str, Any]:
        """Append a step to the ledger; returns its metrics. Raises UserError after too many skipped ones in a row."""
        assert self.ledger is not None, "a step is written down"
        self.ledger.append(record)
        self.count_skipped(record)
        s = self.settings
        if self.skipped_in_a_row >= s.max_skipped:
            raise UserError(
                f"lr={s.lr:g}, eps={s.eps:g}: the loss was not finite for max_skipped={s.max_skipped} steps in a row; "
                "the weights are as before them: start again with a lower lr, or with compute=fp32"
            )
        return metrics_of(record, self.probes)

    def count_skipped(self, record: Record) -> None:
        """Count the steps in a row whose losses were not finite."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped else 0

    def run(
        self, on_step: Callable[[dict[str, Any]], None] = lambda metrics: None, until: int | None = None
    ) -> None:
        """Run steps until `until` (default: settings.steps); the weights are up to date on return and on exceptions."""
        try:
            while self.next < (self.settings.steps if until is None else until) and not self.halted:
                metrics = self.step()
                assert metrics is not None
                on_step(metrics)
        finally:
            self.axis.flush()

    def end(self) -> None:
        """End the run after its last step."""

    def skip_to(self, step: int, records: Sequence[Record]) -> None:
        """Go on from weights that have the first `step` of these records in them already (a snapshot's)."""
        assert self.next == 0, f"skip to {step} after {self.next} steps"
        for record in records[:step]:
            if not record.skipped:
                self.window.take(update_of(record, self.settings.seed))
            self.pass_by(record)

    def pass_by(self, record: Record) -> None:
        """Note all that a step leaves behind outside the weights."""
        assert record.step == self.next, (record.step, self.next)
        if self.estimator.state and not record.skipped:
            self.state.copy_(self.estimate(losses_of(record.losses, self.probes))[1])
        self.count_skipped(record)
        self.next += 1

    def replay(self, records: Sequence[Record], on_step: Callable[[int], None] = lambda step: None) -> None:
        """Repeat the updates of a ledger's records in order: θ, momentum and counters as the run had them."""
        for record in records:
            self.axis.repeat_step(record.step, self.probes)
            if not record.skipped:
                self.commit(update_of(record, self.settings.seed))
            self.pass_by(record)
            on_step(record.step)
        self.axis.flush()
