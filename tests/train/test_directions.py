"""A direction per example, and rank 1: the trainer's coefficients against weights really moved, and what must not matter."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_trainer import build, examples, padded, same_bits, weights

from zoft.data.example import Example
from zoft.noise import noise
from zoft.objectives.losses import collate, losses

EPS = 1e-3


def texts(n=8, seed=3):
    """Rows of the lm objective, with completions of several lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        context, rest = (
            tuple(int(t) for t in rng.integers(3, tiny.VOCAB, k)) for k in (3 + i % 3, 2 + i % 4)
        )
        out.append(Example((context,), (rest,), 0, "lm", False))
    return out


def ragged(n=8, seed=4):
    """Choices between two or three candidates of several tokens."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        context, count = tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 4)), 2 + i % 2
        candidates = tuple(
            tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 1 + (i + c) % 3)) for c in range(count)
        )
        out.append(Example((context,) * count, candidates, 0, "choice", False))
    return out


DATA = {"narrow": examples, "lm": texts, "ragged": ragged}


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "rank1"])
@pytest.mark.parametrize("data", DATA)
def test_each_coefficient_is_that_of_an_example_moved_along_its_own_direction(tmp_path, data, kind):
    """(l(θ + eps·z_e) - l(θ - eps·z_e)) / (2·eps·N), l the example's part of the step's mean: by weights really set."""
    rows, q = DATA[data](8), 2
    model = tiny.llama(tie=True).double()
    untouched = copy.deepcopy(model)
    how = {
        "directions": "example",
        "kind": kind,
        "storage": "fp64",
        "compute": "fp64",
        "q": q,
        "eps": EPS,
        "lr": 1.0,
    }
    trainer = build(tmp_path, model, data=rows, batch_size=4, accumulate=2, **how)
    batches = trainer.batches(0)
    trained, drawn = trainer.axis.trained, trainer.axis.kind
    trainer.step()
    record = trainer.ledger.records[0]
    assert len(record.multipliers) == 2 * 8 and len(record.losses) == 4 * 8

    def moved(direction, scale):
        other = copy.deepcopy(untouched)
        for t in trained:
            where = {"seed": 7, "step": 0, "direction": direction, "dtype": torch.float64, "width": t.width}
            other.get_parameter(t.name).data.add_(
                scale * noise.direction(t.stored.shape, t.id, noise=drawn, **where)
            )
        found = [torch.stack(losses(other, b)) for b in batches]
        return torch.cat(found, 1)  # [2, 8]: sums and counts of all examples

    mean_count = float(moved(0, 0.0)[1].mean())
    for k in range(q):
        for e in range(8):
            plus, minus = (float(moved(k * 8 + e, s)[0, e]) / mean_count for s in (EPS, -EPS))
            expected = -(plus - minus) / (2 * EPS * 8 * q)
            assert abs(record.multipliers[k * 8 + e] - expected) < 2e-5 * (1 + abs(expected)), (k, e)


def test_rank_1_probes_groups_alike(tmp_path):
    found = []
    for group in (1, 2, 6):
        trainer = build(
            tmp_path, tiny.gemma2(), name=f"g{group}", q=3, probes_per_forward=group, kind="rank1"
        )
        trainer.step()
        found.append(trainer.ledger.records[0].losses)
    np.testing.assert_allclose(found[1:], np.array([found[0]] * 2), rtol=2e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rank1"])
def test_padding_and_accumulation_do_not_change_what_an_example_says(tmp_path, kind):
    trainer = build(tmp_path, tiny.llama(), batch_size=8, directions="example", kind=kind)
    data = examples(8)
    want = trainer.own_losses_at(0, trainer.probes, [collate(data, even=True)])
    assert len(want) == 16 and len({round(v, 4) for v in want}) > 4
    for batch_size, batches in (
        (4, [collate(data[:4], even=True), collate(data[4:], even=True)]),
        (8, [padded(collate(data, even=True), 9)]),
    ):
        trainer.settings = replace(trainer.settings, batch_size=batch_size)
        np.testing.assert_allclose(trainer.own_losses_at(0, trainer.probes, batches), want, rtol=3e-6)


@pytest.mark.parametrize("rows", [examples, texts, ragged])
def test_an_even_batch_scores_what_the_plain_one_scores(rows):
    model, data = tiny.llama(), rows(7)
    plain, even = collate(data), collate(data, even=True)
    assert even.rows % 7 == 0 and even.positions.numel() % 7 == 0
    for a, b in zip(losses(model, plain), losses(model, even)):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "rank1"])
def test_lr_zero_leaves_every_bit_and_training_lowers_the_loss(tmp_path, kind):
    model = tiny.llama(tie=True)
    before = weights(model)
    trainer = build(tmp_path, model, name="still", lr=0.0, directions="example", kind=kind)
    trainer.run()
    assert same_bits(before, weights(model))
    trainer = build(tmp_path, model, lr=2e-3, steps=200, batch_size=12, directions="example", kind=kind)
    trainer.run()
    found = [np.mean(r.losses) for r in trainer.ledger.records]
    assert np.mean(found[-20:]) < 0.9 * np.mean(found[:20])


def test_mean_of_many_estimates_is_the_gradient(tmp_path):
    """E Σ_e c_e·z_e = ∇ of the mean loss: its cosine with autograd's grows as √(steps·N/d) has it."""
    model = tiny.llama().double()
    trainer = build(
        tmp_path, model, train="norms", lr=1.0, steps=400, batch_size=12, directions="example", kind="rank1",
        storage="fp64", compute="fp64", eps=1e-4,
    )  # fmt: skip
    batch = trainer.batches(0)
    g = torch.zeros(sum(t.stored.numel() for t in trainer.axis.trained), dtype=torch.float64)
    for step in range(400):
        found = trainer.own_losses_at(step, trainer.probes, batch)
        c, _ = trainer.estimate(found)
        for k, value in enumerate(c):
            z = [
                noise.direction(
                    t.stored.shape, t.id, seed=7, step=step, direction=k, noise="rank1", width=t.width
                )
                for t in trainer.axis.trained
            ]
            g += value * torch.cat([x.flatten() for x in z]).double() / 400
    for t in trainer.axis.trained:
        t.param.requires_grad_(True)
    sums, counts = losses(model, batch[0])
    (sums.sum() / counts.sum()).backward()
    true = torch.cat([t.param.grad.flatten() for t in trainer.axis.trained])
    assert float(torch.cosine_similarity(g, true, 0)) > 0.9
