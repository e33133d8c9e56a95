"""Hold what a step's launches read from device memory (keys, multipliers, scales), and turn its losses into an update there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from zoft.method.estimators.estimator import Estimator, Probe, row_places
from zoft.noise import spec
from zoft.noise.triton import Plan, shape_of
from zoft.noise.triton_kernels import NOTHING

_SLOTS = 8  # uploads that may be on their way
_ROOM = 1 << 14  # entries of all plans together


@triton.jit
def _close(
    losses,
    coefficients,
    rows,
    rates,
    new,
    state,
    master,
    record,
    Q,
    RESTORE,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
):
    """Coefficients → multipliers of the next passes, and the step's record: updates.make_update on the device.

    losses fp64 [P]; coefficients fp64 [Q]; rows int32 [2Q], of losses, as the ledger has them; rates fp64 [2] (lr, decay);
    new fp64 [STATE], which replaces state if the step is finite; master: its first Q + 2 become the multipliers, the decay
    and 1, or 0 and NOTHING if anything is not finite, and its entry RESTORE becomes the one after it (eps); record fp64
    [3Q + 2]: losses in rows, multipliers, whether all is finite, and a place for whoever calls.
    """
    k = tl.arange(0, BLOCK)
    ours = k < Q
    plus = tl.load(losses + tl.load(rows + 2 * k, mask=ours, other=0), mask=ours, other=0.0)
    minus = tl.load(losses + tl.load(rows + 2 * k + 1, mask=ours, other=0), mask=ours, other=0.0)
    tl.store(record + 2 * k, plus, mask=ours)
    tl.store(record + 2 * k + 1, minus, mask=ours)
    c = tl.load(coefficients + k, mask=ours, other=0.0)
    multiplier = (tl.load(rates) * -1.0 * c).to(tl.float32)  # lr 0: -0, as there
    wide = multiplier.to(tl.float64)
    # x − x is 0 for finite x and NaN for any other.
    bad = (plus - plus != 0) | (minus - minus != 0) | (wide - wide != 0)
    good = tl.sum(bad.to(tl.int32)) == 0
    for i in tl.static_range(STATE):
        tl.store(state + i, tl.load(new + i), mask=good)
    tl.store(master + k, tl.where(good, multiplier, 0.0), mask=ours)
    tl.store(master + Q, tl.where(good, tl.load(rates + 1), NOTHING).to(tl.float32))
    tl.store(master + Q + 1, tl.where(good, 1.0, NOTHING))
    tl.store(master + RESTORE, tl.load(master + RESTORE + 1))
    tl.store(record + 2 * Q + k, wide, mask=ours)
    tl.store(record + 3 * Q, good.to(tl.float64))


class Control:
    """Hold the device buffers that a step's launches read, and the plans that are slices of them.

    q: the step's directions. master fp32 [q + P + 9]: multipliers of the pending update, its decay, 1 (for tensors that do not decay; both NOTHING
    where no update is pending), the P scales, beta; and for two-sided steps in place: the restore of the pending update (0 where
    nothing is to be restored), then eps, -2·eps, 0, NOTHING and 1. Each plan has its own contiguous copy of the entries it
    needs, made at the start of a step.
    """

    def __init__(
        self, probes: Sequence[Probe], q: int, eps: float, beta: float, seed: int, device: torch.device
    ) -> None:
        self.q, self.seed = q, seed
        self.flipped = False  # whether plans name the noise that directions share
        self.probes = list(probes)  # [P]
        self.at_beta = q + 2 + len(self.probes)  # of master; what steps in place read follows
        scales = [p.scale for p in self.probes]
        self.master = torch.tensor(
            [0.0] * q + [NOTHING.value] * 2 + [*scales, beta, 0.0, eps, -2 * eps, 0.0, NOTHING.value, 1.0],
            dtype=torch.float32,
            device=device,
        )
        self.rates = torch.zeros(2, dtype=torch.float64, device=device)
        self.eps = torch.tensor(eps, dtype=torch.float64, device=device)
        self.state = torch.zeros(0, dtype=torch.float64, device=device)  # [S] of the estimator
        self.rows = torch.tensor(row_places(self.probes), dtype=torch.int32, device=device)  # [2q]
        self.totals = torch.zeros(len(self.probes), 2, dtype=torch.float64, device=device)
        self.record = torch.zeros(3 * q + 2, dtype=torch.float64, device=device)
        self.keys = torch.zeros(_ROOM, 2, dtype=torch.int32, device=device)
        self.values = torch.zeros(_ROOM, dtype=torch.float32, device=device)
        self.pick = torch.zeros(_ROOM, dtype=torch.int64, device=device)  # of master, for values
        self.which = np.zeros(_ROOM, np.int64)  # of this step's keys, for keys
        self.used = 0
        self.plans: dict[tuple, Plan] = {}
        self.staged = [
            (
                torch.zeros(_ROOM, 2, dtype=torch.int32).pin_memory(),
                torch.zeros(2, dtype=torch.float64).pin_memory(),
            )
            for _ in range(_SLOTS)
        ]

    def plan(self, which: Sequence[int], updates: bool, decays: bool) -> Plan:
        """Return the probes at these places among all P, after the pending update if `updates`."""
        q = self.q
        before = list(range(q + 1)) if updates else []  # previous directions, their rounding
        keys = before + [q + 1 + p for p in which]
        if self.flipped:
            shared = q + 1 + len(self.probes)
            keys += [shared] * int(updates) + [shared + 1]
        values = [*range(q), q if decays else q + 1] if updates else []
        values += [q + 2 + p for p in which] + [self.at_beta]
        return self._plan(keys, values, int(updates), q, [self.probes[p] for p in which])

    def clean(self, updates: bool, decays: bool) -> Plan:
        """Return θ itself, after the pending update if `updates`."""
        q, zero = self.q, self.at_beta + 4
        keys = [*range(q + 1), q + 1] if updates else [q + 1]
        if self.flipped:
            keys += [q + 1 + len(self.probes)] * (int(updates) + 1)
        values = [*range(q), q if decays else q + 1] if updates else []
        return self._plan(keys, [*values, zero, self.at_beta], int(updates), q, [Probe(0, 0.0)])

    def shared(self) -> Plan:
        """Return the noise that this step's directions share, at scale 1."""
        q = self.q
        return self._plan([q + 2 + len(self.probes)], [self.at_beta + 6, self.at_beta], 0, 0, [Probe(0, 1.0)])

    def move(self, k: int, sign: float, decays: bool) -> Plan:
        """Return the plan that moves θ in place on to probe (k, sign) of two-sided steps: from the probe before it, with the update before the first
        one of a step."""
        q = self.q
        beta, restore, eps, twice, zero, nothing = range(self.at_beta, self.at_beta + 6)
        now = q + 1 + 2 * k
        to = [Probe(k, sign)]
        if sign < 0:
            return self._plan([now], [twice, beta], 0, 0, to)
        if k > 0:
            return self._plan([now - 2, now - 2, now], [zero, nothing, eps, beta, eps], 1, 1, to)
        values = [*range(q), q if decays else q + 1, eps, beta, restore]
        return self._plan([*range(q + 1), now], values, 1, q, to)

    def _plan(self, keys: list[int], values: list[int], updates: int, q: int, probes: list[Probe]) -> Plan:
        """The plan of these entries of the words that `upload` makes, and of master."""
        what = (*keys, -1, *values)
        if what not in self.plans:
            start, end = self.used, self.used + max(len(keys), len(values))
            assert end <= _ROOM, (start, len(keys), len(values))
            assert not torch.cuda.is_current_stream_capturing(), f"plan {what} was not met while warming up"
            self.which[start : start + len(keys)] = keys
            self.pick[start : start + len(values)] = torch.tensor(values)
            self.used = end
            restores = len(values) > updates * q + updates + len(probes) + 1
            self.plans[what] = Plan(
                self.keys[start : start + len(keys)], self.values[start : start + len(values)], updates, q * updates, len(probes),
                *shape_of(probes), restores,
            )  # fmt: skip
            if self.step is not None:
                self.upload(*self.step)
                self.refresh()
        return self.plans[what]

    step: tuple[int, float, float] | None = None  # what was uploaded last

    def upload(self, step: int, lr: float, decay: float) -> None:
        """Send the keys of a step and of the one before it, and its rates; the device takes them when it gets there."""
        self.step = (step, lr, decay)
        before = [spec.key(self.seed, max(step - 1, 0), k) for k in range(self.q)]
        now = [spec.key(self.seed, step, p.direction) for p in self.probes]
        shared = [spec.key(self.seed, s, spec.SHARED) for s in (max(step - 1, 0), step)]
        words = np.array([*before, before[0], *now, *shared], np.uint32).view(np.int32)  # [q + 1 + P + 2, 2]
        keys, rates = self.staged[step % _SLOTS]
        keys.numpy()[: self.used] = words[self.which[: self.used]]
        rates[0], rates[1] = lr, decay
        self.keys[: self.used].copy_(keys[: self.used], non_blocking=True)
        self.rates.copy_(rates, non_blocking=True)

    def refresh(self) -> None:
        """Give every plan the multipliers that the last step left."""
        torch.index_select(self.master, 0, self.pick[: self.used], out=self.values[: self.used])

    def close(self) -> None:
        """Make this step's totals the pending update and its record."""
        per = self.estimator.per
        sums, counts = self.totals.unbind(1)  # [P] each
        if per > 1:  # an example's part of the step's mean, as in Trainer.own_losses_at
            counts = counts.view(-1, per).mean(1, keepdim=True).expand(-1, per).flatten()
        losses = sums / counts  # [P]
        coefficients, state = self.estimator.run(losses, self.q // per, self.eps, self.state)  # [q], [S]
        _close[(1,)](
            losses, coefficients.contiguous(), self.rows, self.rates, state.contiguous(), self.state, self.master, self.record,
            self.q, self.at_beta + 1, BLOCK=triton.next_power_of_2(self.q), STATE=len(self.state), num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip

    def configure(self, estimator: Estimator) -> None:
        """Take the estimator that turns losses into coefficients, its state at the beginning."""
        self.estimator = estimator
        self.state = self.eps.new_tensor(estimator.state)

    def forget(self) -> None:
        """Forget the pending update."""
        self.master[: self.q] = 0.0
        self.master[self.q : self.q + 2] = NOTHING.value
        self.master[self.at_beta + 1] = 0.0

    def still(self) -> torch.Tensor:
        """Set probes of no size, for warming up; returns what `master` is to become again."""
        kept, q = self.master.clone(), self.q
        self.master[q + 2 : self.at_beta] = 0.0
        self.master[self.at_beta + 1 : self.at_beta + 4] = 0.0
        return kept
