"""What a step's launches read from device memory: keys, multipliers, scales; and where its losses become an update."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from zoft.estimator import Moment
from zoft.noise import spec
from zoft.noise import triton as kernels
from zoft.noise.triton import Plan
from zoft.noise.triton_kernels import NOTHING
from zoft.scratch import Probe

_SLOTS = 8  # uploads that may be on their way
_ROOM = 4096  # entries of all plans together


@triton.jit
def _close(totals, rates, moment, master, record, Q, BLOCK: tl.constexpr, MEAZO: tl.constexpr):
    """Losses → coefficients → multipliers of the next passes: the estimator and update.make_update on the device.

    totals fp64 [2Q, 2] (sums, counts); rates fp64 [5] (lr, decay, 2·eps·Q, clip ÷ Q, beta); moment fp64 [2] (v, betaᵗ) of
    estimator.Moment; master: its first Q + 2 become the multipliers, the decay and 1, or 0 and NOTHING if anything is
    not finite; record fp64 [3Q + 2]: losses, multipliers, whether all is finite, and a place for whoever calls.
    """
    k = tl.arange(0, BLOCK)
    ours = k < Q
    plus = tl.load(totals + 4 * k, mask=ours, other=0.0) / tl.load(totals + 4 * k + 1, mask=ours, other=1.0)
    minus = tl.load(totals + 4 * k + 2, mask=ours, other=0.0) / tl.load(
        totals + 4 * k + 3, mask=ours, other=1.0
    )
    tl.store(record + 2 * k, plus, mask=ours)
    tl.store(record + 2 * k + 1, minus, mask=ours)
    most, size = tl.load(rates + 3), tl.load(rates + 2)
    slope = (plus - minus) / size
    slope = tl.where(slope > most, most, tl.where(slope < -most, -most, slope))
    if MEAZO:
        beta = tl.load(rates + 4)
        g = tl.full([], 0.0, tl.float64)
        for i in range(Q):  # in the order, and from the fp32 losses, that a replay has
            here = tl.load(totals + 4 * i) / tl.load(totals + 4 * i + 1)
            there = tl.load(totals + 4 * i + 2) / tl.load(totals + 4 * i + 3)
            g = g + (here.to(tl.float32).to(tl.float64) - there.to(tl.float32).to(tl.float64)) / size
        v = beta * tl.load(moment) + (1.0 - beta) * (g * g)
        power = tl.load(moment + 1) * beta
        slope = slope / (tl.sqrt(v / (1.0 - power)) + 1e-8)
    multiplier = (tl.load(rates) * -1.0 * slope).to(tl.float32)  # lr 0: -0, as there
    wide = multiplier.to(tl.float64)
    # x − x is 0 for finite x and NaN for any other.
    bad = (plus - plus != 0) | (minus - minus != 0) | (wide - wide != 0)
    good = tl.sum(bad.to(tl.int32)) == 0
    if MEAZO:
        tl.store(moment, v, mask=good)
        tl.store(moment + 1, power, mask=good)
    tl.store(master + k, tl.where(good, multiplier, 0.0), mask=ours)
    tl.store(master + Q, tl.where(good, tl.load(rates + 1), NOTHING).to(tl.float32))
    tl.store(master + Q + 1, tl.where(good, 1.0, NOTHING))
    tl.store(record + 2 * Q + k, wide, mask=ours)
    tl.store(record + 3 * Q, good.to(tl.float64))


class Control:
    """The device buffers that a step's launches read, and the plans that are slices of them.

    master fp32 [3q + 8]: multipliers of the pending update, its decay, 1 (for tensors that do not decay; both NOTHING
    where no update is pending), the 2q scales, beta; and for steps in place: the restore of the pending update (0 where
    nothing is to be restored), then eps, -2·eps, 0 and NOTHING. Each plan has its own contiguous copy of the entries it
    needs, made at the start of a step.
    """

    def __init__(self, q: int, eps: float, beta: float, seed: int, device: torch.device) -> None:
        self.q, self.seed = q, seed
        self.meazo = 0.0
        self.probes = [Probe(k, s * eps) for k in range(q) for s in (1.0, -1.0)]
        scales = [p.scale for p in self.probes]
        self.master = torch.tensor(
            [0.0] * q + [NOTHING.value] * 2 + [*scales, beta, 0.0, eps, -2 * eps, 0.0, NOTHING.value],
            dtype=torch.float32,
            device=device,
        )
        self.rates = torch.zeros(5, dtype=torch.float64, device=device)
        self.moment = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
        self.totals = torch.zeros(2 * q, 2, dtype=torch.float64, device=device)
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
                torch.tensor([0.0, 0.0, 2.0 * eps * q, torch.inf, 0.0], dtype=torch.float64).pin_memory(),
            )
            for _ in range(_SLOTS)
        ]

    def plan(self, first: int, count: int, updates: bool, decays: bool) -> Plan:
        """Probes first to first + count (of all 2q), after the pending update if `updates`."""
        q = self.q
        before = list(range(q + 1)) if updates else []  # previous directions, their rounding
        keys = before + [q + 1 + first + p for p in range(count)]
        values = [*range(q), q if decays else q + 1] if updates else []
        values += [q + 2 + first + p for p in range(count)] + [3 * q + 2]
        return self._plan(keys, values, int(updates), q, self.probes[first : first + count])

    def move(self, k: int, sign: float, decays: bool) -> Plan:
        """In place, θ on to probe (k, sign): from the probe before it, with the update before the first one of a step."""
        q = self.q
        beta, restore, eps, twice, zero, nothing = range(3 * q + 2, 3 * q + 8)
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
            start, end = self.used, self.used + len(values)
            assert end <= _ROOM, (start, len(values))
            assert not torch.cuda.is_current_stream_capturing(), f"plan {what} was not met while warming up"
            self.which[start : start + len(keys)] = keys
            self.pick[start:end] = torch.tensor(values)
            self.used = end
            restores = len(values) > updates * q + updates + len(probes) + 1
            self.plans[what] = Plan(
                self.keys[start : start + len(keys)], self.values[start:end], updates, q * updates, len(probes),
                *kernels.shape_of(probes), restores,
            )  # fmt: skip
            if self.step is not None:
                self.upload(*self.step)
                self.refresh()
        return self.plans[what]

    step: tuple[int, float, float] | None = None  # what was uploaded last

    def upload(self, step: int, lr: float, decay: float) -> None:
        """Keys of a step and of the one before it, and its rates; the device takes them when it gets there."""
        self.step = (step, lr, decay)
        before = [spec.key(self.seed, max(step - 1, 0), k) for k in range(self.q)]
        now = [spec.key(self.seed, step, p.direction) for p in self.probes]
        words = np.array([*before, before[0], *now], np.uint32).view(np.int32)  # [3q + 1, 2]
        keys, rates = self.staged[step % _SLOTS]
        keys.numpy()[: self.used] = words[self.which[: self.used]]
        rates[0], rates[1] = lr, decay
        self.keys[: self.used].copy_(keys[: self.used], non_blocking=True)
        self.rates.copy_(rates, non_blocking=True)

    def refresh(self) -> None:
        """Give every plan the multipliers that the last step left."""
        torch.index_select(self.master, 0, self.pick[: self.used], out=self.values[: self.used])

    def close(self) -> None:
        """This step's totals become the pending update and its record."""
        restore = 3 * self.q + 3
        self.master[restore] = self.master[restore + 1]
        _close[(1,)](
            self.totals, self.rates, self.moment, self.master, self.record, self.q, MEAZO=self.meazo > 0,
            BLOCK=triton.next_power_of_2(self.q), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip

    def configure(self, clip: float | None, moment: Moment) -> None:
        """How slopes become coefficients: their limit, and the second moment so far."""
        self.meazo = moment.beta
        for _, rates in self.staged:
            rates[3], rates[4] = torch.inf if clip is None else clip / self.q, moment.beta
        self.moment.copy_(torch.tensor([moment.v, moment.power], dtype=torch.float64))

    def forget(self) -> None:
        """No update is pending."""
        self.master[: self.q] = 0.0
        self.master[self.q : self.q + 2] = NOTHING.value
        self.master[3 * self.q + 3] = 0.0

    def still(self) -> torch.Tensor:
        """Probes of no size, for warming up; returns what `master` is to become again."""
        kept, q = self.master.clone(), self.q
        self.master[q + 2 : 3 * q + 2] = 0.0
        self.master[3 * q + 3 : 3 * q + 6] = 0.0
        return kept
