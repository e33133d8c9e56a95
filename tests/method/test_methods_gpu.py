"""ZO-Bench's set on a GPU: steps run eagerly and say so, and their runs replay on both devices."""

import pytest
import torch
from test_method_runs import MASKED
from test_methods import SEED, TID, tensor
from test_replay import bits, place, train  # noqa: F401 (place is a fixture)
from test_trainer import same_bits

from zoft.cli import replay
from zoft.method import rules
from zoft.method.anchor import anchored, plain
from zoft.method.momentum import Window
from zoft.method.rules import RULES, Rule
from zoft.method.updates import advance_trained, make_update
from zoft.noise import noise
from zoft.noise.spec import Mask

pytestmark = pytest.mark.gpu

WAYS = {
    "conservative": ("update=conservative", "storage=fp16"),
    "reweighted": ("update=momentum", "momentum=0.9", "storage=bf16", "q=2"),
    "blocks": ("blocks=random", "storage=bf16", "momentum=0.5", "weight_decay=0.1"),
    "blocks-inplace": ("blocks=cyclic", "storage=bf16", "compute=bf16", "perturb=inplace"),
    "masks": (*MASKED, "mask_every=1", "storage=bf16"),
    "anchor": ("anchor=0.5", "storage=fp16", "snapshot_every=4"),
    "anchor-adam": ("anchor=0.5", "update=adam", "storage=bf16", "lr=1e-3"),
}


@pytest.mark.parametrize("noise_kind", ["rademacher", "rank1"])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_a_gpu_says_why_it_is_eager_and_replays_on_both(place, way, noise_kind, tmp_path, capsys):  # noqa: F811
    run = train(place, f"gpu-{way}-{noise_kind}", *WAYS[way], f"noise={noise_kind}", "device=cuda")
    assert "steps are not captured as CUDA graphs: " in capsys.readouterr().err
    for device in ("cuda", "cpu"):
        replay.replay_run_folder(run, tmp_path / device, device=device)
        assert bits(tmp_path / device) == bits(run / "model")


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", *RULES])
def test_anchored_steps_have_the_bits_of_a_cpu(name, storage):
    torch.manual_seed(3)
    rule = RULES.get(name, Rule("sgd", plain))
    rule = Rule(name, anchored(rule.step, 20.0), rule.state, anchor=20.0)
    here = tensor(torch.randn(700, 900).to(storage))
    there = tensor(here.stored.cuda())
    for t in (here, there):
        rules.attach_rule([t], rule)
        for s in range(5):
            u = make_update(s, SEED, [0.3 / (s + 1), -0.2], lr=1e-2, weight_decay=0.1, ruled=True)
            advance_trained(t, [u], "rademacher")
    assert same_bits({"": here.stored}, {"": there.stored.cpu()})


@pytest.mark.parametrize("kind", ["rademacher", "rank1"])
def test_reweighted_and_masked_updates_have_the_bits_of_a_cpu(kind):
    torch.manual_seed(3)
    theta = torch.randn(700, 900).bfloat16()
    mask = Mask(seed=9, share=40_000, every=2)
    for given, beta in ((None, 0.9), (mask, 0.0)):
        here = tensor(theta.clone(), width=noise.width_of(theta.shape), mask=given)
        there = tensor(theta.cuda(), width=here.width, mask=given)
        for t in (here, there):
            taken = Window(beta)
            updates = [
                taken.take(make_update(s, SEED, [0.3, -0.2], lr=1e-2, weight_decay=0.1)) for s in range(9)
            ]
            advance_trained(t, updates[:6], kind)
            out = torch.empty(2, 700, 900, device=t.stored.device)
            noise.perturb(
                t.stored, TID, out, [(0, 0.1), (0, -0.1)], seed=SEED, step=9, noise=kind, updates=updates[6:],
                mask=given, width=t.width,
            )  # fmt: skip
            t.probes = out.cpu()
        assert same_bits({"": here.stored}, {"": there.stored.cpu()}) and torch.equal(
            here.probes, there.probes
        )
