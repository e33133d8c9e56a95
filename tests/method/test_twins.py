"""Fifty steps of every recipe, in every storage dtype and both ways of probing, against one slow twin of them all.

The twin has θ of its own in NumPy, draws the noise from its specification, and asks a plain copy of the model for its
losses. Its multipliers agree with the ledger's within the rounding of a loss; moved by the ledger's, its weights are the
run's weights, to the bit.
"""

import copy
import math

import noise_twin as slow
import numpy as np
import pytest
import tiny
import torch
from test_adapters import attach
from test_qzo import Twin as Dequantised
from test_qzo import quantised
from test_trainer import build, fp64

from zoft.ledger.log import read_ledger
from zoft.models.quant import linear
from zoft.objectives.losses import losses

SEED, EPS, LR, DECAY, STEPS, SHARE = 7, 2.0**-6, 2e-2, 0.3, 50, 16384 / 2**16
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Some of the model's own tensors, matrices and vectors, and the table that is its head, too.
OWN = r"embed_tokens|layers\.1\.self_attn\.[qv]|layers\.1\.mlp\.up|norm"


class Theta:
    """One tensor by the rules: its numbers as they are stored, what moves, what decays."""

    def __init__(self, t, mask):
        self.shape, self.id, self.dtype = t.stored.shape, t.id, t.stored.dtype
        self.work = np.float64 if self.dtype == torch.float64 else np.float32
        self.values = slow.numbers(t.stored).astype(self.work)  # [n]
        self.start, self.buffer = self.values.copy(), np.zeros_like(self.values)
        self.index, self.mask = np.arange(len(self.values)), mask if len(self.shape) > 1 else "none"
        scales = isinstance(t.param, linear.Scales)
        self.floor = 1e-7 if scales and not t.param.logged else None
        self.decays = len(self.shape) > 1 and not scales
        count = round(SHARE * len(self.values))
        self.threshold = np.sort(np.abs(self.values))[count - 1] if self.mask == "magnitude" else None
        self.drawn = slow.chosen(self.index, self.id, SEED, 16384) if self.mask == "random" else None

    def on(self):
        if self.mask == "magnitude":
            return np.abs(self.values) <= self.threshold
        return self.drawn if self.mask == "random" else np.full(len(self.values), True)

    def z(self, step, k):
        return slow.z(self.index, self.id, slow.key(SEED, step, k), "rademacher").astype(self.work)

    def moved(self, scale, step, k):
        """θ + scale·z where it moves, as arithmetic has it, in the work dtype."""
        shift = self.work(np.float32(scale)) * self.z(step, k)
        return np.where(self.on(), self.values + shift, self.values)

    def nearest(self, x):
        return x if self.dtype.itemsize > 2 else slow.round_nearest(x, self.dtype).astype(self.work)

    def update(self, step, multipliers, decay, beta, back):
        """θ ← round(max(decay·(θ + back·z) + m, floor)),  m ← beta·m + Σ multipliers·z."""
        on, a = self.on(), self.values
        s = np.zeros_like(a)
        for k, m in enumerate(multipliers):
            s = s + self.work(m) * self.z(step, k)
        if beta:
            s = self.buffer = np.where(on, self.work(beta) * self.buffer + s, self.work(beta) * self.buffer)
        if back:
            a = a + self.work(np.float32(back)) * self.z(step, len(multipliers) - 1)
        a = (self.work(decay) * a if self.decays else a) + s
        if self.floor is not None:
            a = np.maximum(a, self.work(self.floor))
        if self.dtype.itemsize == 2:
            bits = slow.rounding_bits(self.index, self.id, slow.key(SEED, step, 0))
            a = slow.round_stochastic(a.astype(np.float32), bits, self.dtype).astype(self.work)
        self.values = np.where(on, a, self.values)


class Plain:
    """A copy of the model that is given its trained tensors as plain numbers; quantised layers as plain matrices."""

    def __init__(self, model):
        wide = any(p.dtype == torch.float64 for p in model.parameters())
        self.model, self.layers = copy.deepcopy(model), None
        if linear.quantised_layers(model):
            self.layers = Dequantised(model, np.float64 if wide else np.float32)
            self.logged = next(iter(linear.quantised_layers(model).values())).scales.logged
            self.model = self.layers.plain
        if wide:
            fp64(self.model)  # whose norms are the copy's own

    def at(self, values, theta, compute):
        params = dict(self.model.named_parameters())
        for n, x in values.items():
            if n in params:
                params[n].data = torch.from_numpy(x.reshape(theta[n].shape)).to(compute)
        if self.layers is not None:
            scales = {n: values[n].reshape(theta[n].shape) for n in self.layers.parts}
            self.layers.write({n: np.exp(s) if self.logged else s for n, s in scales.items()})
        for p in self.model.parameters():
            p.data = p.data.to(compute)


def coefficients(found, clip, meazo, seen):
    """One a direction, from losses (+, -) in turn."""
    q = len(found) // 2
    slopes = [(found[2 * k] - found[2 * k + 1]) / (2 * EPS) for k in range(q)]
    if meazo:
        seen.append(sum(slopes) / q)
        ages = meazo ** np.arange(len(seen))[::-1]
        root = math.sqrt(ages @ np.square(seen) / ages.sum())
    return [min(max(s, -clip), clip) / q / (root if meazo else 1.0) for s in slopes]


def model_of(what, storage):
    train = what.partition(" ")[0]
    if train == "qzo":
        return quantised(tiny.llama, 4, what == "qzo relative", storage == "fp64")
    model = fp64(tiny.llama(tie=True)) if storage == "fp64" else tiny.llama(tie=True)
    return model if train in ("mezo", "magnitude", "random") else attach(model, train)


def cases():
    """Every recipe, dtype and way of probing; half of those that differ least are left to the slow tests."""
    for row, what in enumerate(
        ("mezo", "lora", "random", "magnitude", "prefix", "prompt", "qzo", "qzo relative")
    ):
        for column, storage in enumerate(DTYPES):
            for policy in ("probes", "inplace"):
                if (what, policy) == ("magnitude", "inplace"):  # which is refused
                    continue
                slow_one = row > 1 and (row + column + (policy == "inplace")) % 2
                yield pytest.param(what, storage, policy, marks=[pytest.mark.slow] if slow_one else [])


@pytest.mark.parametrize("what, storage, policy", list(cases()))
def test_fifty_steps_are_those_of_the_twin(tmp_path, what, storage, policy):
    inplace, odd = policy == "inplace", storage in ("fp64", "bf16")
    compute = storage if inplace or storage == "fp64" else "fp32"
    beta, q, clip, meazo = 0.9 * (not odd), 1 + odd, 0.2, 0.9 * (storage == "fp64")
    mask = what if what in ("magnitude", "random") else "none"
    train = (
        "layers.*scales|embed_tokens|norm"
        if "qzo" in what
        else OWN
        if mask != "none" or what == "mezo"
        else what
    )
    model = model_of(what, storage)
    plain = Plain(model)
    trainer = build(
        tmp_path, model, train=train, storage=storage, compute=compute, policy=policy, mask=mask, kind="rademacher",
        beta=beta, q=q, clip=clip, meazo=meazo, lr=LR, eps=EPS, steps=STEPS, weight_decay=DECAY, schedule="cosine",
    )  # fmt: skip
    theta = {t.name: Theta(t, mask) for t in trainer.axis.trained}
    trainer.run()
    trainer.ledger.close()
    seen, clipped, room = [], 0, {"fp64": 1e-7}.get(storage, 4e-6)
    if what == "qzo relative" and inplace and storage in ("fp16", "bf16"):
        room = {"fp16": 2e-3, "bf16": 2e-2}[
            storage
        ]  # an exponential's last bit shows where W is rounded to 16 bits
    for record in read_ledger(tmp_path / "ledger").records:
        step, (batch,), found = record.step, trainer.batches(record.step), []
        for k in range(q):
            for side in (1, -1):
                moves = {
                    n: t.moved(EPS * (side if not inplace or side > 0 else -2), step, k)
                    for n, t in theta.items()
                }
                if inplace:
                    for n, t in theta.items():
                        t.values = moves[n] = t.nearest(moves[n])
                plain.at(moves, theta, DTYPES[compute])
                with torch.no_grad():
                    sums, counts = losses(plain.model, batch)
                found.append(float(sums.double().sum() / counts.sum()))
            if inplace and k < q - 1:
                for t in theta.values():
                    t.values = t.nearest(t.moved(EPS, step, k))
        np.testing.assert_allclose(record.losses, found, rtol=room)
        lr = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        want = [-lr * c for c in coefficients(record.losses, clip, meazo, seen)]
        # The run's losses have 64 bits, the ledger's 32.
        off = lr * 2e-7 / EPS * (10 if meazo else 1)
        np.testing.assert_allclose(record.multipliers, want, rtol=1e-6, atol=off)
        clipped += sum(abs(a - b) > 2 * clip * EPS for a, b in zip(found[::2], found[1::2]))
        assert record.decay == np.float32(1 - lr * DECAY)
        for t in theta.values():
            t.update(step, record.multipliers, record.decay, beta, EPS if inplace else 0)
    assert 0 < clipped < 2 * STEPS
    assert {t.stored.dtype for t in trainer.axis.trained if t.stored.ndim > 1} <= {
        DTYPES[storage],
        torch.float32,
    }
    for t in trainer.axis.trained:
        mine = theta[t.name]
        assert np.array_equal(slow.numbers(t.stored), mine.values), t.name
        assert (mine.values != mine.start).any()
        assert mine.mask != "random" or (mine.values == mine.start)[~mine.drawn].all()
