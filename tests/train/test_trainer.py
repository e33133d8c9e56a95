"""The loop: against autograd, against itself interrupted, and doing nothing where it must."""

import math

import numpy as np
import pytest
import tiny
import torch
import transformers as hf

from zoft.data.example import Example
from zoft.ledger.log import Ledger, read_ledger
from zoft.method import masks, space
from zoft.method.estimators.estimator import Probe
from zoft.noise import noise
from zoft.noise.spec import noise_of
from zoft.objectives.losses import Batch, collate, losses
from zoft.probe import proof
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.train.batches import batch_indices
from zoft.train.trainer import Settings, Trainer


def examples(n=12, seed=0):
    """Choices of two single tokens after prompts of several lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        context = tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 4 + i % 5))
        out.append(Example((context, context), ((5,), (9,)), int(rng.integers(2)), "choice", True))
    return out


def build(tmp_path, model, *, name="ledger", storage="fp32", compute="fp32", policy="probes", train="all", kind="gaussian",
          beta=0.0, data=None, batch_size=4, accumulate=1, opened=None, mask="none", sparsity=0.75, **settings):  # fmt: skip
    data = data or examples()
    group = 1 if policy == "inplace" else 2
    settings = Settings(
        **{"seed": 7, "steps": 10, "lr": 1e-2, "eps": 1e-3, "probes_per_forward": group, **settings},
        batch_size=batch_size,
        accumulate=accumulate,
    )
    even = settings.directions == "example"
    trained = space.adopt(model, space.train_names(model, train))

    def run(batch):
        return losses(model, batch)[0]

    if policy == "probes":
        pair = calibration(data)
        found = proof.find_sites(model, trained, run, *pair, settings.eps)
        trained = proof.live(trained, found)
        space.place_in_precision(model, trained, storage, compute)
        masks.mask_tensors(trained, mask, sparsity, settings.seed)
        drawn = noise_of(kind, settings.directions)
        axis = ProbeAxis(trained, found.sites, seed=settings.seed, kind=drawn, beta=beta)
        assert found.stacked, found.note
    else:
        space.place_in_precision(model, trained, storage, compute, uniform=True)
        masks.mask_tensors(trained, mask, sparsity, settings.seed)
        axis = InPlace(trained, seed=settings.seed, kind=kind, beta=beta)

    def batches(step):
        picks = batch_indices(
            step, n=len(data), batch_size=batch_size, accumulate=accumulate, seed=settings.seed
        )
        return [collate([data[i] for i in p], even=even) for p in picks]

    ledger = opened or Ledger.create(tmp_path / name, {"seed": settings.seed})
    return Trainer(model, axis, batches, ledger, settings)


def calibration(data):
    small = collate(data[:2])
    ids = small.inputs["input_ids"]
    double = small.repeat(2)
    double.inputs["input_ids"][len(ids) :] = ids.flip(1)
    return small, double


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same_bits(a, b):
    def bits(x):
        return x.contiguous().view(torch.uint8)

    assert a.keys() == b.keys()
    return all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


def fp64(model):
    """The model in double precision throughout: RMS norms of transformers compute in fp32 whatever they are given."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            one = 1.0 if "Gemma" in type(module).__name__ else 0.0
            module.forward = lambda x, m=module, one=one: (
                (m.weight + one) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            )
    return model


def gemma3():
    config = hf.Gemma3TextConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.Gemma3ForCausalLM, config)


def bert():
    config = hf.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.BertForMaskedLM, config)


@pytest.mark.parametrize("make", [tiny.opt, tiny.llama, gemma3, bert, tiny.gpt2])
def test_projected_gradient_is_the_directional_derivative(tmp_path, make):
    model = fp64(make())
    reference = fp64(make()).requires_grad_(True)
    trainer = build(tmp_path, model, storage="fp64", compute="fp64", eps=1e-5)
    batch = trainer.batches(0)[0]
    sums, counts = losses(reference, batch)
    (sums.sum() / counts.sum()).backward()
    gradient = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    for step in range(3):
        slope = sum(
            float((gradient[t.name] * z(t, step)).sum()) for t in trainer.axis.trained if t.name in gradient
        )
        plus, minus = trainer.losses_at(step, [Probe(0, 1e-5), Probe(0, -1e-5)], [batch])
        assert (plus - minus) / 2e-5 == pytest.approx(slope, rel=1e-4)


def z(t, step, direction=0, kind="gaussian", seed=7):
    drawn = noise.direction(t.stored.shape, t.id, seed=seed, step=step, direction=direction, noise=kind)
    return drawn.to(t.stored.dtype)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_mean_estimate_points_along_the_gradient(tmp_path, kind):
    """Over 100·d directions of the norms of a Llama (d = 80) the mean of c·z has a cosine ≥ 0.99 with autograd."""
    model, reference = fp64(tiny.llama()), fp64(tiny.llama()).requires_grad_(True)
    q = 100 * 80
    trainer = build(
        tmp_path,
        model,
        storage="fp64",
        compute="fp64",
        train="norms",
        kind=kind,
        eps=1e-5,
        probes_per_forward=500,
    )
    batch = trainer.batches(0)[0]
    sums, counts = losses(reference, batch)
    (sums.sum() / counts.sum()).backward()
    gradient = {n: p.grad for n, p in reference.named_parameters()}
    probes = [Probe(k, s) for k in range(q) for s in (1e-5, -1e-5)]
    values = np.array(trainer.losses_at(0, probes, [batch]))
    c = (values[0::2] - values[1::2]) / 2e-5
    dot = mine = true = 0.0
    for t in trainer.axis.trained:
        estimate = sum(float(c[k]) * z(t, 0, k, kind) for k in range(q)) / q
        dot += float((estimate * gradient[t.name]).sum())
        mine += float((estimate**2).sum())
        true += float((gradient[t.name] ** 2).sum())
    assert sum(t.stored.numel() for t in trainer.axis.trained) == 80
    assert dot / math.sqrt(mine * true) >= 0.99


@pytest.mark.parametrize(
    "storage,compute", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "bf16")]
)
def test_lr_zero_leaves_every_bit(tmp_path, storage, compute):
    model = tiny.opt()
    with torch.no_grad():  # −0.0 survives too
        model.model.decoder.layers[0].fc1.weight[0, :4] = -0.0
    trainer = build(tmp_path, model, storage=storage, compute=compute, lr=0.0, weight_decay=0.1, steps=200)
    before = weights(model)
    trainer.run()
    assert trainer.next == 200 and same_bits(before, weights(model))


def test_exception_in_a_forward_leaves_every_bit(tmp_path):
    model = tiny.llama()
    trainer = build(tmp_path, model, storage="bf16", compute="bf16", lr=0.0)
    before = weights(model)

    def boom(module, args):
        raise KeyboardInterrupt

    for module in [
        model.model.layers[1].mlp.down_proj,
        model.model.norm,
        model.lm_head,
        model.model.embed_tokens,
    ]:
        handle = module.register_forward_pre_hook(boom)
        with pytest.raises(KeyboardInterrupt):
            trainer.step()
        handle.remove()
        assert same_bits(before, weights(model))
        assert not any("forward" in m.__dict__ for m in model.modules())
    trainer.step()


@pytest.mark.parametrize("policy", ["probes", "inplace"])
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "beta,q,more",
    [
        (0.0, 1, {}),
        (0.9, 2, {}),
        (0.0, 2, {"clip": 2.0, "meazo": 0.9}),
        (0.0, 2, {"kind": "rank1"}),
        (0.9, 1, {"kind": "rank1", "directions": "example"}),
        (0.0, 2, {"directions": "example", "clip": 2.0, "accumulate": 2}),
    ],
)
def test_interrupted_resumed_and_replayed_runs_end_with_the_same_bits(
    tmp_path, policy, storage, beta, q, more
):
    if policy == "inplace" and "directions" in more:
        pytest.skip("one move of the weights serves all examples")
    same = {
        **more,
        "storage": storage,
        "compute": storage,
        "policy": policy,
        "beta": beta,
        "q": q,
        "weight_decay": 0.01,
    }
    whole = build(tmp_path, tiny.llama(tie=True), name="whole", **same)
    start = weights(whole.model)
    whole.run()
    end = weights(whole.model)
    assert not same_bits(start, end)
    for stop in (0, 1, 7, 10):
        first = build(tmp_path, tiny.llama(tie=True), name=f"stop{stop}", **same)
        first.run(until=stop)
        first.ledger.close()
        again = Ledger.open(tmp_path / f"stop{stop}")
        second = build(tmp_path, tiny.llama(tie=True), opened=again, **same)
        second.replay(list(again.records))
        assert second.next == stop
        second.run()
        assert same_bits(end, weights(second.model)), stop
        again.close()
        assert (tmp_path / f"stop{stop}").read_bytes() == (tmp_path / "whole").read_bytes()
    replayed = build(tmp_path, tiny.llama(tie=True), name="replayed", **same)
    replayed.replay(read_ledger(tmp_path / "whole")[1])
    assert same_bits(end, weights(replayed.model))


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_pending_updates_end_as_eager_ones(tmp_path, storage):
    """Whoever reads a tensor first brings it up to date, or the flush does: the same bits."""
    lazy = build(tmp_path, tiny.llama(tie=True), name="lazy", storage=storage, compute=storage, q=2)
    eager = build(tmp_path, tiny.llama(tie=True), name="eager", storage=storage, compute=storage, q=2)
    lazy.run()
    for _ in range(10):
        eager.step()
        eager.axis.flush()
    assert same_bits(weights(lazy.model), weights(eager.model))
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "eager").read_bytes()


def test_probe_grouping_gives_the_same_coefficients(tmp_path):
    values = []
    for group in (1, 2, 3, 6):
        trainer = build(tmp_path, tiny.gemma2(), name=f"g{group}", q=3, probes_per_forward=group)
        trainer.step()
        values.append(trainer.ledger.records[0].losses)
    np.testing.assert_allclose(values[1:], np.array([values[0]] * 3), rtol=2e-6)


def test_batch_order_padding_and_accumulation_do_not_change_the_losses(tmp_path):
    trainer = build(tmp_path, tiny.llama())
    data, probes = examples(8), [Probe(0, 1e-3), Probe(0, -1e-3)]
    want = trainer.losses_at(0, probes, [collate(data)])
    for batches in (
        [collate(data[::-1])],
        [collate(data[:3]), collate(data[3:])],
        [padded(collate(data), 9)],
    ):
        np.testing.assert_allclose(trainer.losses_at(0, probes, batches), want, rtol=2e-6)


def padded(batch: Batch, more: int) -> Batch:
    rows, width = batch.inputs["input_ids"].shape
    inputs = {k: torch.nn.functional.pad(v, (0, more)) for k, v in batch.inputs.items()}
    moved = batch.positions // width * (width + more) + batch.positions % width
    return Batch(inputs, moved, batch.targets, batch.slots, batch.gold, batch.objective, batch.tokens)


def test_a_loss_that_is_not_finite_is_skipped_and_logged(tmp_path):
    trainer = build(tmp_path, tiny.llama())
    plain, bad = trainer.forward, {3, 4}

    def forward(model, batch):
        sums, counts = plain(model, batch)
        return (sums * float("inf") if trainer.next in bad else sums), counts

    trainer.forward = forward
    trainer.run(until=3)
    before = weights(trainer.model)
    trainer.run(until=5)
    assert same_bits(before, weights(trainer.model))
    trainer.run()
    assert [r.skipped for r in trainer.ledger.records] == [i in bad for i in range(10)]
    trainer.ledger.close()
    resumed = build(tmp_path, tiny.llama(), name="again")
    resumed.replay(read_ledger(tmp_path / "ledger").records)
    assert same_bits(weights(trainer.model), weights(resumed.model))


class Portions(torch.nn.Module):
    """An MLP that works through long rows in two portions, so that its layers are called twice."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        if x.shape[1] <= 7:
            return self.mlp(x)
        return torch.cat([self.mlp(part) for part in x.split(7, dim=1)], 1)


def test_a_batch_that_cannot_be_stacked_gets_one_forward_a_probe(tmp_path, capsys):
    """Calibrated on short rows; the first long batch is run again, apart, and so are all that follow."""

    def model():
        made = tiny.llama()
        made.model.layers[0].mlp = Portions(made.model.layers[0].mlp)
        return made

    short, long = ([e for e in examples(48) if (len(e.contexts[0]) > 7) is wide] for wide in (False, True))

    def batches(step):
        return [collate(short[step : step + 2]), collate((long if step >= 2 else short)[step : step + 2])]

    same = {"data": short, "q": 2, "steps": 4}
    stacked = build(tmp_path, model(), name="stacked", probes_per_forward=4, **same)
    apart = build(tmp_path, model(), name="apart", probes_per_forward=1, **same)
    seen, plain = [], stacked.forward
    stacked.batches = apart.batches = batches
    stacked.forward = lambda m, b: seen.append(b.inputs["input_ids"].shape) or plain(m, b)
    stacked.run(), apart.run()
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "one probe per forward" in said[0] and "were calibrated" in said[0], said
    # Steps 0 and 1, the short half of step 2, and its long half, which breaks: 8 rows each; then 4 and 16 of 2 rows.
    assert [rows for rows, _ in seen] == [8] * 6 + [2] * (4 + 8)
    assert stacked.forwards == apart.forwards == 4 * 2 * 2 * 4
    for a, b in zip(stacked.ledger.records, apart.ledger.records, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-5)


def test_training_lowers_the_loss(tmp_path):
    data = examples(8)
    trainer = build(tmp_path, tiny.llama(), data=data, batch_size=8, steps=300, lr=2e-2, q=2)
    with torch.no_grad():
        before = losses(trainer.model, collate(data))[0].mean()
        trainer.run()
        after = losses(trainer.model, collate(data))[0].mean()
    assert after < 0.5 * before, (before, after)
