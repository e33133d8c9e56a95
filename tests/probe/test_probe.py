"""The probe axis against weights that really are θ + s·z, on tiny models of many architectures."""

import contextlib
import copy

import noise_twin as slow
import numpy as np
import pytest
import torch
from torch import nn
from zoo import EPS, PROBES, SEED, STEP, ZOO, apart, batch, losses, make, off, twin, zoo

from zoft.method import space
from zoft.method.estimators.estimator import Probe
from zoft.noise import noise
from zoft.noise.spec import Update
from zoft.probe import proof, sites
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.probe.scratch import CLEAN

CASES = [(name, "all") for name in ZOO] + [
    ("lora", "lora"),
    ("llama", "norms"),
    ("llama-tied", "head"),
    ("bert", "bias"),
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name, train", CASES)
def test_stacked_losses_are_those_of_moved_weights(name, train, side):
    b = batch(side, decoder=name == "t5")
    made = make(zoo(name), b, train)
    assert made.found.stacked, made.found.note
    expected = twin(made.untouched, made.trained, b, PROBES)  # [P, rows]
    # A test that could not tell the probes apart would pass whatever the axis did.
    assert apart(expected) > 1e-5, apart(expected)
    tolerance = min(1e-5, apart(expected) / 20)
    for group in (1, 2, len(PROBES)):
        assert off(made.losses(b, PROBES, group), expected) < tolerance, group
    at_zero = made.losses(b, [Probe(0, 0.0), Probe(1, 0.0)])
    assert off(at_zero, twin(made.untouched, [], b, CLEAN).expand(2, -1)) < 1e-6


@pytest.mark.parametrize("found_on, used_on", [("none", "right"), ("none", "left"), ("right", "none")])
@pytest.mark.parametrize("name", ["llama", "t5", "mamba", "modernbert"])
def test_later_batches_may_have_other_sizes_and_padding(name, found_on, used_on):
    made = make(zoo(name), batch(found_on, decoder=name == "t5"))
    b = batch(used_on, rows=3, length=12, decoder=name == "t5", seed=1)
    assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_fp64_is_exact(name):
    b = batch(decoder=name == "t5")
    made = make(zoo(name).double(), b)
    assert made.found.stacked
    assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES)) < 1e-12


@pytest.mark.parametrize(
    "storage, compute", [("fp16", "bf16"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "bf16")]
)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_sixteen_bits(name, storage, compute):
    b = batch()
    model = zoo(name).bfloat16()
    made = make(model, b)
    space.place_in_precision(model, made.trained, storage, compute)
    axis = made.axis = ProbeAxis(made.trained, made.found.sites, seed=SEED, kind="gaussian")
    probes = [Probe(0, 0.1), Probe(0, -0.1), Probe(1, 0.1)]
    untouched = copy.deepcopy(made.untouched).float()
    expected = twin(untouched, made.trained, b, probes)
    got = made.losses(b, probes)
    assert off(got, expected) < 0.02 < apart(expected) * 2
    assert off(got, made.losses(b, probes, 1)) < 0.02
    one_dim = [t for t in axis.trained if t.stored.ndim == 1]
    assert one_dim and all(t.stored.dtype == torch.float32 for t in one_dim)


def test_rademacher():
    b = batch()
    made = make(zoo("llama"), b, kind="rademacher")
    expected = twin(made.untouched, made.trained, b, PROBES, kind="rademacher")
    assert off(made.losses(b, PROBES), expected) < 1e-5 < apart(expected) / 20


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same_bits(model, before):
    return all(
        torch.equal(p.view(torch.uint8), before[n].view(torch.uint8))
        for n, p in model.named_parameters()
        if p.ndim
    )


@pytest.mark.parametrize("name", ["llama-tied", "mamba", "t5"])
def test_an_exception_anywhere_leaves_everything_as_it_was(name):
    b = batch(decoder=name == "t5")
    made = make(zoo(name), b)
    before, clean = bits(made.model), losses(made.model, b)
    plain = {id(p): p.data_ptr() for p in made.model.parameters()}
    for site in made.found.sites:

        def fail(*args):
            raise KeyboardInterrupt

        inside = list(site.module.children())[:1] or [site.module]
        handle = inside[0].register_forward_pre_hook(fail)
        raised = False
        try:
            made.losses(b, PROBES[:2])
        except KeyboardInterrupt:
            raised = True
        finally:
            handle.remove()
        assert raised or inside[0] is not site.module, site.name
        assert same_bits(made.model, before)
        assert all("forward" not in m.__dict__ for m in made.model.modules()), site.name
        assert {id(p): p.data_ptr() for p in made.model.parameters()} == plain
    assert torch.equal(losses(made.model, b), clean)
    assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES)) < 1e-5


def test_probing_leaves_negative_zeros_alone():
    b = batch()
    model = zoo("llama")
    model.lm_head.weight.data[3] = -0.0
    made = make(model, b)
    before = bits(model)
    made.losses(b, PROBES)
    made.axis.commit(Update(STEP, SEED, (0.0, 0.0)))
    made.axis.flush()
    assert same_bits(model, before)


def test_one_axis_within_itself_is_refused():
    b = batch()
    made = make(zoo("llama"), b)
    with (
        pytest.raises(AssertionError, match="another"),
        made.axis.at(0, PROBES[:1], 4),
        made.axis.at(0, PROBES[1:2], 4),
    ):
        pass
    assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES)) < 1e-5


def test_a_replaced_forward_is_put_back():
    b = batch()
    model = zoo("llama")
    old = model.lm_head.forward
    model.lm_head.forward = lambda x: old(x) * 2
    replaced = model.lm_head.forward
    trained = space.adopt(model, space.train_names(model, "all"))
    found = proof.find_sites(model, trained, lambda x: losses(model, x), b.first(2), b, EPS)
    axis = ProbeAxis(trained, found.sites, seed=SEED, kind="gaussian")
    plain = losses(model, b)
    with torch.no_grad(), axis.at(STEP, [Probe(0, 0.0)] * 2, b.rows):
        assert off(losses(model, b.repeat(2)), plain.repeat(2)) < 1e-6
    assert model.lm_head.forward is replaced


def test_checkpointed_blocks_see_the_probes():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.utils.checkpoint.checkpoint(
                lambda y: self.b(self.a(y).tanh()), x, use_reentrant=self.re
            )

    class Net(nn.Module):
        def __init__(self, re):
            super().__init__()
            self.e, self.block, self.head = nn.Embedding(99, 8), Block(), nn.Linear(8, 99)
            self.block.re = re

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.block(self.e(input_ids)))

    for re in (True, False):
        torch.manual_seed(0)
        b = batch()
        made = make(Net(re), b)
        assert made.found.stacked and len(made.found.sites) == 4
        assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inplace_is_its_own_arithmetic(dtype):
    """perturb=inplace moves the stored weights: θ + s·z rounded to the storage dtype at every move."""
    b = batch()
    model = zoo("llama").to(dtype)
    trained = space.adopt(model, space.train_names(model, "all"))
    expected = {t.name: t.stored.clone() for t in trained}
    axis = InPlace(trained, seed=SEED, kind="gaussian")

    def moved(scale):
        for t in trained:
            z = noise.direction(t.stored.shape, t.id, seed=SEED, step=STEP, direction=0, noise="gaussian")
            shift = torch.tensor(scale, dtype=torch.float32) * z
            expected[t.name] = (expected[t.name].float() + shift).to(dtype)

    for scale, move in ((EPS, EPS), (-EPS, -2 * EPS)):
        moved(move)
        with torch.no_grad(), axis.at(STEP, [Probe(0, scale)], b.rows):
            got = losses(model, b)
            assert all(torch.equal(t.stored, expected[t.name]) for t in trained)
            other = copy.deepcopy(model)
            for n, p in other.named_parameters():
                p.data = expected[n]
            assert torch.equal(got, losses(other, b))
    axis.settle()
    assert all(torch.equal(t.stored, expected[t.name]) for t in trained)  # the step's update takes it back
    axis.flush()
    moved(EPS)
    assert all(torch.equal(t.stored, expected[t.name]) for t in trained)
    with pytest.raises(RuntimeError, match="boom"), axis.at(STEP, [Probe(1, EPS)], b.rows):
        raise RuntimeError("boom")
    assert axis.here.scale == 0


@pytest.mark.parametrize("beta, decay", [(0.0, 1.0), (0.9, 0.75)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q", [1, 3])
def test_inplace_is_two_passes_a_direction_that_round_as_told(q, dtype, beta, decay, monkeypatch):
    """Steps with updates, one without (skipped) and one of lr 0, against the rules written out move by move."""
    model, b = zoo("llama").to(dtype), batch()
    trained = space.adopt(model, "model.layers.0.mlp.up_proj.weight model.norm.weight".split())
    axis = InPlace(trained, seed=SEED, kind="gaussian", beta=beta)
    theta = {t.id: slow.numbers(t.stored).astype(np.float32) for t in trained}
    buffer = {i: np.zeros_like(v) for i, v in theta.items()}
    passes, plain = [], noise.perturb
    monkeypatch.setattr(noise, "perturb", lambda *a, **k: passes.append(a[1]) or plain(*a, **k))

    def z(t, step, k):
        where = {"seed": SEED, "step": step, "direction": k, "noise": "gaussian"}
        return noise.direction(t.stored.shape, t.id, **where).numpy().ravel()

    def nearest(x):
        return torch.from_numpy(x).to(dtype).float().numpy()

    eps = np.float32(EPS)
    for step in range(5):
        multipliers = (
            () if step == 2 else tuple([0.0, 0.02, -0.01][(k + step) % 3] * (step != 3) for k in range(q))
        )
        before = len(passes)
        for k in range(q):
            for scale in (EPS, -EPS):
                with torch.no_grad(), axis.at(step, [Probe(k, scale)], b.rows):
                    losses(model, b)
                    for t in trained:
                        move = (eps if scale > 0 else np.float32(-2) * eps) * z(t, step, k)
                        theta[t.id] = nearest(theta[t.id] + move)
                        assert np.array_equal(slow.numbers(t.stored), theta[t.id]), (step, k, scale)
            if k < q - 1:  # the way back, in the pass of the next direction
                for t in trained:
                    theta[t.id] = nearest(theta[t.id] + eps * z(t, step, k))
        assert len(passes) - before == 2 * q * len(trained)
        for t in trained:
            theta[t.id] = theta[t.id] + eps * z(t, step, q - 1)
            stays = not any(multipliers) and not beta and (decay == 1 or not t.decays)
            if step == 2 or stays:
                theta[t.id] = nearest(theta[t.id])
                continue
            s = np.float32(0)
            for k, m in enumerate(multipliers):
                s = s + np.float32(m) * z(t, step, k)
            if beta:
                s = buffer[t.id] = np.float32(beta) * buffer[t.id] + s
            a = (np.float32(decay) * theta[t.id] if t.decays else theta[t.id]) + s
            if dtype != torch.float32:
                bits = slow.rounding_bits(np.arange(len(a)), t.id, slow.key(SEED, step, 0))
                a = slow.round_stochastic(a, bits, dtype).astype(np.float32)
            theta[t.id] = a
        if step != 2:
            axis.commit(Update(step, SEED, tuple(float(np.float32(m)) for m in multipliers), decay))
    axis.flush()
    for t in trained:
        assert np.array_equal(slow.numbers(t.stored), theta[t.id])
        assert not beta or np.array_equal(slow.numbers(t.momentum), buffer[t.id])


def test_inplace_interrupted_between_two_tensors(monkeypatch):
    """Whatever was moved is moved back, and what was not moved yet too: the bits of a run that was not interrupted."""
    b, ends = batch(), []
    for stop in (None, 0, 3, 10):
        model = zoo("llama").bfloat16()
        trained = space.adopt(model, space.train_names(model, "all"))
        axis = InPlace(trained, seed=SEED, kind="gaussian")
        plain, count = noise.perturb, iter(range(1000))

        def perturb(*args, plain=plain, count=count, stop=stop, **keywords):
            if next(count) == stop:
                raise KeyboardInterrupt
            plain(*args, **keywords)

        monkeypatch.setattr(noise, "perturb", perturb)
        with contextlib.suppress(KeyboardInterrupt), axis.at(STEP, [Probe(0, EPS)], b.rows):
            raise KeyboardInterrupt
        monkeypatch.setattr(noise, "perturb", plain)
        ends.append(bits(model))
        assert axis.here.scale == 0 and not axis.todo
    assert all(same_bits(model, end) for end in ends)


def test_sites_need_not_be_stackable_for_one_probe():
    b = batch()
    model = zoo("llama")
    untouched = copy.deepcopy(model)
    trained = space.adopt(model, space.train_names(model, "all"))
    found = sites.Found(
        sites.find(model, trained, lambda x: losses(model, x), b.first(2), b).sites, False, "", []
    )
    for site in found.sites:
        site.calls = []
    axis = ProbeAxis(trained, found.sites, seed=SEED, kind="gaussian")
    got = []
    for p in PROBES:
        with torch.no_grad(), axis.at(STEP, [p], b.rows):
            got.append(losses(model, b))
    assert off(torch.stack(got), twin(untouched, trained, b, PROBES)) < 1e-5
