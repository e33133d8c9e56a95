"""ZO-Bench's set on small problems: against twins, buffers, autograd and counts, and down to a fixed loss at a fixed seed."""

import math

import noise_twin as slow
import numpy as np
import pytest
import tiny
import torch
from test_trainer import build, examples, fp64, same_bits, weights, z

from zoft.errors import UserError
from zoft.ledger.log import Ledger
from zoft.method import blocks, masks, rules, space
from zoft.method.anchor import anchored, plain
from zoft.method.blocks import Turn, block_at, give_turns
from zoft.method.estimators.conservative import CONSERVATIVE
from zoft.method.estimators.estimator import Estimator, Probe, SecondRound
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.method.momentum import Window, reweighted, window
from zoft.method.rules import Rule
from zoft.method.space import Trained
from zoft.method.updates import advance_trained, make_update
from zoft.noise import noise, reference
from zoft.noise.noise import moving
from zoft.noise.spec import Mask, Update
from zoft.objectives.losses import collate, losses

SEED, TID = 11, 77


def tensor(theta, **more):
    return Trained("w", torch.nn.Parameter(theta, requires_grad=False), theta, theta.dtype, TID, True, **more)


# ---- conservative ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, taken",
    [
        ((3.0, 2.0, 1.0), -0.5),
        ((3.0, 1.0, 2.0), 0.5),
        ((1.0, 2.0, 3.0), 0.0),
        ((1.0, 1.0, 1.0), 0.0),  # a tie keeps θ
        ((2.0, 1.0, 1.0), 0.5),
        ((2.0, math.nan, 1.0), -0.5),
        ((2.0, math.nan, -math.inf), 0.0),
        ((math.nan, 5.0, math.inf), 0.5),
        ((math.nan, math.inf, math.nan), 0.0),
    ],
)
def test_the_best_of_three_points_is_taken(found, taken):
    assert CONSERVATIVE.probes([0.5]) == [Probe(0, 0.0), Probe(0, 0.5), Probe(0, -0.5)]
    assert CONSERVATIVE.choose(found, [0.5]) == [taken] and CONSERVATIVE.count(1) == 3


def test_conservative_steps_never_raise_the_loss_of_their_batch(tmp_path):
    """Losses before and after each step, by really moved weights; where θ wins no bit moves."""
    trainer = build(tmp_path, tiny.llama(tie=True), lr=0.05, steps=40, update="conservative")
    kept = moved = 0
    for step in range(40):
        (batch,) = trainer.batches(step)

        def loss(batch=batch):
            sums, counts = losses(trainer.model, batch)
            return float(sums.sum() / counts.sum())

        trainer.axis.flush()
        before, start = loss(), weights(trainer.model)
        metrics = trainer.step()
        trainer.axis.flush()
        (m,) = trainer.ledger.records[-1].multipliers
        full = np.float32(-0.05 * metrics["projected_gradient"])
        assert m == 0 or abs(abs(m) - abs(full)) < 1e-3 * abs(full)
        assert loss() <= before + 1e-6 * abs(before)
        if m == 0:
            kept += 1
            assert same_bits(start, weights(trainer.model))
        else:
            moved += 1
            assert loss() < before
    assert kept > 3 and moved > 3, (kept, moved)
    assert trainer.forwards == 40 * 4 * (2 + 3)
    again = build(tmp_path, tiny.llama(tie=True), name="again", update="conservative")
    again.replay(trainer.ledger.records)
    assert same_bits(weights(again.model), weights(trainer.model))


def test_the_candidates_are_the_points_that_a_step_would_reach(tmp_path):
    """The loss that chose is, to the bit, the loss of the next step's probe of scale 0 on the same batch."""
    trainer = build(tmp_path, tiny.llama(), lr=0.05, update="conservative", estimator="one_sided")
    seen, plain_losses = [], trainer.losses_at
    trainer.losses_at = lambda *args: seen.append(plain_losses(*args)) or seen[-1]
    first = trainer.batches(0)
    trainer.batches = lambda step: first
    trainer.run(until=6)
    for i in range(0, 10, 2):
        assert min(seen[i + 1]) == pytest.approx(seen[i + 2][0], rel=1e-6)


def test_a_second_round_of_the_users_own(tmp_path):
    """A step that is halved until the loss no longer rises, or is not taken."""

    def probes(multipliers):
        return [Probe(0, 0.0), *(Probe(0, multipliers[0] / 2**k) for k in range(3))]

    def choose(found, multipliers):
        return [next((multipliers[0] / 2**k for k in range(3) if found[k + 1] < found[0]), 0.0)]

    halving = SecondRound("halving", probes, choose, lambda q: 4)
    mine = Estimator("mine", TWO_SIDED.probes, TWO_SIDED.coefficients, TWO_SIDED.count, second=halving)
    trainer = build(tmp_path, tiny.llama(), lr=0.3, steps=12, estimator=mine)
    trainer.run()
    plain_steps = build(tmp_path, tiny.llama(), name="plain", lr=0.3, steps=1)
    plain_steps.run()
    (full,) = plain_steps.ledger.records[0].multipliers
    assert trainer.ledger.records[0].multipliers[0] / full in (0, 0.25, 0.5, 1)
    assert trainer.forwards == 12 * 4 * 6
    again = build(tmp_path, tiny.llama(), name="again", estimator=mine)
    again.replay(trainer.ledger.records)
    assert same_bits(weights(again.model), weights(trainer.model))


def test_a_skipped_step_asks_no_second_time(tmp_path):
    trainer = build(tmp_path, tiny.llama(), update="conservative")
    asked, plain_losses = [], trainer.losses_at

    def losses_at(step, probes, batches):
        asked.append(step)
        return [math.nan] * len(probes) if step == 1 else plain_losses(step, probes, batches)

    trainer.losses_at = losses_at
    trainer.run(until=3)
    assert asked == [0, 0, 1, 2, 2] and [r.skipped for r in trainer.ledger.records] == [False, True, False]


# ---- momentum by re-weighting ----------------------------------------------------------------------------------------


def test_the_window():
    assert window(0.9) == 66 and window(0.5) == 10 and window(1e-9) == 1
    for beta in (0.1, 0.3, 0.7, 0.95, 0.99):
        assert beta ** window(beta) < 1e-3 <= beta ** (window(beta) - 1)


@pytest.mark.parametrize("kind", ["rademacher", "rank1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_by_reweighting_is_the_buffer(kind, dtype):
    """To 1e-6 while the window holds all steps, decay included; then as near as what is left out."""
    rng, beta = np.random.default_rng(0), 0.9
    theta = torch.linspace(-1, 1, 32 * 40).view(32, 40).to(dtype)
    where = {"width": noise.width_of(theta.shape)}
    a, b, taken = tensor(theta.clone(), **where), tensor(theta.clone(), **where), Window(beta)
    left_out = 0.0
    for step in range(90):
        if step in (7, 8, 40):
            continue  # skipped steps are none
        u = make_update(step, SEED, rng.normal(size=2).tolist(), lr=1e-3, weight_decay=5.0)
        advance_trained(a, [u], kind, beta)
        advance_trained(b, [taken.take(u)], kind)
        if step < window(beta):
            assert (a.stored - b.stored).abs().max() < 1e-6
    left_out = 2 * 4 * 1e-3 * beta ** window(beta) / (1 - beta) * (90 - window(beta))
    assert 0 < (a.stored - b.stored).abs().max() < left_out
    assert b.momentum is None and (a.stored - theta).abs().max() > 0.01


def test_a_reweighted_update_names_its_directions():
    old = [Update(s, SEED, (0.5, 0.25), decay=0.5) for s in (3, 5)]
    found = reweighted([*old, Update(6, SEED, (1.0, -1.0), decay=0.75)], 0.5)
    assert (found.step, found.decay) == (6, 0.75)
    assert found.multipliers == (1.0, -1.0, 0.25, 0.125, 0.125, 0.0625)
    assert found.steps == (6, 6, 5, 5, 3, 3) and found.directions == (0, 1) * 3


def test_trainers_with_and_without_a_buffer_agree_and_snapshots_know_the_window(tmp_path):
    keys = {"kind": "rademacher", "lr": 1e-2, "steps": 12, "q": 2, "storage": "fp64", "compute": "fp64"}
    buffer = build(tmp_path, fp64(tiny.llama()), beta=0.5, **keys)
    buffer.run()
    free = build(tmp_path, fp64(tiny.llama()), name="free", update="momentum", momentum=0.5, **keys)
    free.run(until=9)
    for (n, a), b in zip(buffer.model.named_parameters(), free.model.parameters(), strict=True):
        assert a.shape == b.shape, n
    kept, state = list(free.ledger.records), weights(free.model)
    (tmp_path / "second").write_bytes((tmp_path / "free").read_bytes())
    free.run()
    # From a snapshot after 9 steps: the weights are put in, the records alone tell of the window.
    second = build(
        tmp_path, fp64(tiny.llama()), opened=Ledger.open(tmp_path / "second"), update="momentum", momentum=0.5, **keys
    )  # fmt: skip
    for t in second.axis.trained:
        t.stored.copy_(state[t.name])
        t.step = 9
    second.skip_to(9, kept)
    second.run()
    assert same_bits(weights(second.model), weights(free.model))
    for (n, a), b in zip(buffer.model.named_parameters(), free.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3, n  # beyond the window of 10 steps; same losses until there


# ---- block-wise steps ------------------------------------------------------------------------------------------------


def test_whose_turn_it_is():
    assert [block_at("cyclic", 3, SEED, s) for s in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    drawn = [block_at("random", 5, SEED, s) for s in range(5000)]
    counts = np.bincount(drawn, minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 18.5  # χ² of 4 degrees, beyond it once in a thousand
    assert drawn != [block_at("random", 5, SEED + 1, s) for s in range(5000)]
    pairs = np.bincount([5 * a + b for a, b in zip(drawn, drawn[1:])], minlength=25)
    assert ((pairs - 200) ** 2 / 200).sum() < 51.2
    word = slow.philox((3, 2, 0, blocks.TAG), (5, 1))[0]
    assert block_at("random", 7, 5 + 2**32, 3 + 2**33) == int(word) * 7 >> 32


@pytest.mark.parametrize("order", ["random", "cyclic"])
def test_a_step_probes_and_moves_its_block_alone(tmp_path, order):
    """The slope is g·z over that block's tensors, by autograd in fp64; bits elsewhere stay, decay included."""
    model, reference_model = fp64(tiny.llama()), fp64(tiny.llama()).requires_grad_(True)
    trainer = build(
        tmp_path, model, storage="fp64", compute="fp64", eps=1e-6, q=2, lr=1e-4, weight_decay=1.0, estimator="one_sided"
    )  # fmt: skip
    give_turns(model, trainer.axis.trained, order)
    turns = {t.name: t.turn.mine for t in trainer.axis.trained}
    assert {*turns.values()} == {0, 1, 2}
    assert (
        turns["model.layers.1.mlp.up_proj.weight"] == 1
        and turns["lm_head.weight"] == turns["model.norm.weight"] == 2
    )
    met = set()
    for step in range(6):
        mine = block_at(order, 3, trainer.settings.seed, step)
        met.add(mine)
        before = weights(model)
        with torch.no_grad():
            for p, q in zip(reference_model.parameters(), model.parameters(), strict=True):
                p.copy_(q)
                p.grad = None
        sums, counts = losses(reference_model, trainer.batches(step)[0])
        (sums.sum() / counts.sum()).backward()
        grads = {n: p.grad for n, p in reference_model.named_parameters() if p.grad is not None}
        own = [t for t in trainer.axis.trained if turns[t.name] == mine]
        got, _ = trainer.estimate(trainer.losses_at(step, trainer.probes, trainer.batches(step)))
        for k in range(2):
            slope = sum(float((grads[t.name] * z(t, step, k)).sum()) for t in own if t.name in grads)
            assert got[k] * 2 == pytest.approx(slope, rel=1e-3)
        trainer.step()
        trainer.axis.flush()
        after = weights(model)
        for t in trainer.axis.trained:
            assert torch.equal(before[t.name], after[t.name]) == (turns[t.name] != mine), (step, t.name)
    assert len(met) > 1


def test_tensors_of_one_shape_in_two_blocks_have_other_noise_and_embedded_rows_are_silent(tmp_path):
    trainer = build(tmp_path, tiny.llama())
    a, b = (t for t in trainer.axis.trained if t.name.endswith("mlp.up_proj.weight"))
    assert a.stored.shape == b.stored.shape and abs(float((z(a, 0, 0) * z(b, 0, 0)).mean())) < 0.2
    (e,) = (t for t in trainer.axis.trained if "embed" in t.name)
    e.turn = Turn("cyclic", 2, 1)
    rows = torch.tensor([[3, 4]])
    with trainer.axis.at(0, [Probe(0, 0.5)], 1):
        assert torch.equal(trainer.axis.gathered(e, rows, [Probe(0, 0.5)], 0)[0], e.stored[rows[0]])
    with trainer.axis.at(1, [Probe(0, 0.5)], 1):
        assert not torch.equal(trainer.axis.gathered(e, rows, [Probe(0, 0.5)], 0)[0], e.stored[rows[0]])


def test_rank_1_products_are_silent_out_of_turn(tmp_path):
    found = []
    for order in ("all", "cyclic"):
        trainer = build(tmp_path, tiny.llama(), name=order, kind="rank1")
        for t in trainer.axis.trained:
            t.turn = Turn("cyclic", 2, 1) if order == "cyclic" else None
        found.append(
            trainer.losses_at(0, [Probe(0, 0.05), Probe(0, -0.05), Probe(0, 0.0)], trainer.batches(0))
        )
    (a, b, c), silent = found
    assert len({a, b, c}) == 3 and silent == pytest.approx([c] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rank1"])
def test_directions_of_each_example_are_silent_out_of_turn(tmp_path, kind):
    trainer = build(tmp_path, tiny.llama(), kind=kind, directions="example", eps=0.05)
    trainer.batches = lambda step: [collate(examples()[:4], even=True)]
    for own in (True, False):
        for t in trainer.axis.trained:
            t.turn = Turn("cyclic", 2, 0 if own else 1)
        found = trainer.own_losses_at(0, trainer.probes, trainer.batches(0))
        plus, minus = found[:4], found[4:]
        assert (plus == pytest.approx(minus, rel=1e-6)) != own


def test_one_block_is_refused():
    model = tiny.llama()
    trained = space.adopt(model, space.train_names(model, r"layers\.1\."))
    with pytest.raises(
        UserError, match="blocks=random: all that is trained lies in one block; use blocks=all"
    ):
        give_turns(model, trained, "random")


# ---- masks that are drawn anew ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_each_draw_is_as_sparse_as_it_says(sparsity):
    """ZO-Bench's own code leaves out 0.54, 0.69 and 0.82 of these."""
    t = tensor(torch.ones(300, 500))
    masks.mask_tensor(t, "random", sparsity, SEED, 2)
    before = None
    for step in range(0, 8, 2):
        on = moving(t.stored, TID, t.mask.at(step))
        assert abs(1 - float(on.float().mean()) - sparsity) < 0.01
        assert torch.equal(on, moving(t.stored, TID, t.mask.at(step + 1)))
        if before is not None:  # independent draws agree as chance has it
            both = float((on & before).float().mean())
            assert abs(both - (1 - sparsity) ** 2) < 0.01
        before = on


def test_a_drawn_mask_is_that_of_the_specification():
    mask = Mask(seed=SEED, share=20_000, every=3)
    index = np.arange(1000)
    for step in (0, 2, 3, 3 * 2**33 + 1):
        words = slow._words(index, 8, TID, 2, slow.key(SEED, step // 3, 0))
        want = (
            np.array([int(w[i % 8 // 2]) >> (16 * (i % 2)) & 0xFFFF for i, w in zip(index, words)]) < 20_000
        )
        assert np.array_equal(moving(torch.ones(1000), TID, mask.at(step)).numpy(), want)
        assert np.array_equal(reference.drawn(torch.ones(1000), TID, mask.at(step), 0).numpy(), want)
    once = Mask(seed=SEED, share=20_000)
    assert once.at(99) == once and torch.equal(
        moving(torch.ones(1000), TID, once), moving(torch.ones(1000), TID, mask.at(0))
    )


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_in_one_pass_each_have_the_mask_of_their_step(dtype, beta):
    mask = Mask(seed=SEED, share=30_000, every=2)
    torch.manual_seed(0)
    theta = torch.randn(3000).to(dtype)
    updates = [Update(s, SEED, (1e-2, 2e-2), decay=0.5) for s in range(5)]
    once, each = theta.clone(), theta.clone()
    m, n = torch.zeros(3000), torch.zeros(3000)
    more = {"beta": beta, "noise": "gaussian"}
    probe, alone = torch.empty(2, 3000), torch.empty(2, 3000)
    noise.perturb(
        once, TID, probe, [(0, 0.1), (0, 0.0)], seed=SEED, step=7, updates=updates, mask=mask,
        momentum=m if beta else None, **more,
    )  # fmt: skip
    for u in updates:
        at = Mask(seed=SEED, share=30_000, period=u.step // 2)
        noise.advance(each, TID, [u], mask=at, momentum=n if beta else None, **more)
    assert torch.equal(once, each) and torch.equal(m, n)
    at = Mask(seed=SEED, share=30_000, period=3)
    noise.perturb(each, TID, alone, [(0, 0.1), (0, 0.0)], seed=SEED, step=7, noise="gaussian", mask=at)
    assert torch.equal(probe, alone)
    on = moving(theta, TID, at)
    assert torch.equal(probe[0][~on], probe[1][~on]) and not torch.equal(probe[0][on], probe[1][on])
    rows = torch.tensor([1, 2])
    out = torch.empty(2, 60)
    noise.gather(each.view(50, 60), TID, rows, out, 0, 0.1, seed=SEED, step=7, noise="gaussian", mask=mask)
    assert torch.equal(out, alone[0].view(50, 60)[rows])


def test_rules_see_the_mask_of_their_step():
    for every in (1, 2):
        mask = Mask(seed=SEED, share=30_000, every=every)
        a, b = (tensor(torch.linspace(-1, 1, 3000), mask=mask) for _ in range(2))
        rules.attach_rule([b], Rule("plain", lambda theta, g, state, lr: theta - g))
        updates = [Update(s, SEED, (1e-2,), lr=1.0) for s in range(4)]
        advance_trained(a, updates, "gaussian")
        advance_trained(b, updates, "gaussian")
        assert torch.equal(a.stored, b.stored)


# ---- anchored decay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_anchored_steps_are_those_of_the_twin(dtype):
    torch.manual_seed(3)
    theta = torch.randn(700).to(dtype)
    t = tensor(theta.clone())
    rules.attach_rule([t], Rule("sgd", anchored(plain, 3.0), anchor=3.0))
    assert t.base.dtype == dtype and torch.equal(t.base, theta)
    f = np.float32
    a, base, index = slow.numbers(theta).astype(f), slow.numbers(theta).astype(f), np.arange(700)
    for step, c in enumerate((3.0, -1.0, 0.5, 2.0)):
        u = make_update(step, SEED, [c], lr=0.05, weight_decay=0.5, ruled=True)
        advance_trained(t, [u], "rademacher")
        g = -(f(u.multipliers[0]) * slow.z(index, TID, slow.key(SEED, step, 0), "rademacher").astype(f))
        a = f(u.decay) * a
        a = a - f(np.float64(f(0.05)) * 3.0) * (a - base)
        a = a - f(0.05) * g
        if dtype != torch.float32:
            bits = slow.rounding_bits(index, TID, slow.key(SEED, step, 0))
            a = slow.round_stochastic(a, bits, dtype).astype(f)
    np.testing.assert_array_equal(slow.numbers(t.stored), a)
    assert set(t.state) == {"t"}  # the base is no part of a snapshot


def test_the_pull_is_towards_the_base_and_lr_0_writes_nothing():
    base = torch.tensor([0.0, -0.0, 5.0, -3.0] * 50)
    t = tensor(base.clone())
    rules.attach_rule([t], Rule("sgd", anchored(plain, 1.0), anchor=1.0))
    advance_trained(t, [make_update(0, SEED, [1.0], lr=0.0, ruled=True)], "gaussian")
    assert same_bits({"": t.stored}, {"": base})
    t.stored.add_(1.0)
    for step in range(1, 100):
        advance_trained(t, [make_update(step, SEED, [0.0], lr=0.1, ruled=True)], "gaussian")
    assert (t.stored - base).abs().max() < 1e-4
