"""Node perturbation on a GPU: its kernels against the specification, its steps against the CPU's, captured against eager."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_node_runs import SETTINGS, again, model, run, trainer_in
from test_nodes import MODELS, SEED, STEP, axis_of, examples, node_losses

from zoft.cli.replay import replay_run_folder
from zoft.method.estimators.estimator import Probe
from zoft.noise import nodes as signs
from zoft.noise import reference
from zoft.noise.spec import Update, key
from zoft.train.node_trainer import rows_with_tokens

pytestmark = pytest.mark.gpu
TID = 2**32 - 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import tiny

    monkeypatch.chdir(tiny.place(tmp_path, SETTINGS.replace("device: cpu", "device: cuda")))
    return tmp_path


@pytest.mark.parametrize("units", [40, 128, 300, 1000])
def test_signs_are_the_cpus(units):
    """Added to outputs and weighed, at places with tokens alone."""
    from zoft.noise.triton_nodes import add_signs, weighed_signs

    rows = rows_with_tokens(examples(4, 3), [3, 8, 2**20, 2**31 - 1], "cpu", True)
    count, n = rows.batch.inputs["input_ids"].numel(), len(rows.tokens.places)
    drawn = signs.node_signs(rows.tokens, units, TID, 1, 2)  # [N, m]
    u = torch.zeros(count, units)
    u[rows.tokens.places] = drawn
    cells = signs.cells_of(rows.tokens, n + 5, 1, 2).cuda()
    weights = torch.rand(n + 5, generator=torch.Generator().manual_seed(0))
    got = weighed_signs(cells, weights.cuda(), units, TID, torch.float32)
    assert torch.equal(got[:n].cpu(), drawn * weights[:n, None]) and not got[n:].any()
    scales = torch.tensor([0.01, -0.01, 0.5])
    for dtype, off in ((torch.float32, 1e-6), (torch.float64, 1e-8), (torch.bfloat16, 2e-2)):
        y = torch.randn(3, count, units, generator=torch.Generator().manual_seed(1)).to(dtype)
        moved = y.cuda()
        add_signs(moved, cells, scales.cuda(), 0.7, TID)
        want = y.double() + scales.double()[:, None, None] * 0.7 * u.double()
        assert float((moved.cpu().double() - want).abs().max()) < off
        assert torch.equal(moved.cpu()[:, u[:, 0] == 0], y[:, u[:, 0] == 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_move_has_the_references_bits(dtype):
    from zoft.noise.triton_nodes import move_matrix

    w, g = torch.randn(70, 301).to(dtype), torch.randn(70, 301)
    factor, decay = torch.tensor([0.013]), torch.tensor([0.99])
    words = torch.from_numpy(np.array([key(5, 9, 0)], np.uint32).view(np.int32)).cuda()
    got = w.cuda()
    move_matrix(got, g.cuda(), factor.cuda(), decay.cuda(), words, TID)
    want = w.float() * decay - g * factor
    if dtype != torch.float32:
        bits = reference.halves(0, want.numel(), TID, 1, key(5, 9, 0), "cpu")
        want = reference.round_stochastic(want.view(-1), bits, dtype).view_as(w)
    assert torch.equal(got.cpu(), want)
    still = torch.full((3, 4), -0.0, dtype=dtype, device="cuda")
    move_matrix(still, torch.ones(3, 4).cuda(), torch.zeros(1).cuda(), torch.ones(1).cuda(), words, TID)
    assert bool(torch.signbit(still).all())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bert"])
def test_probes_and_update_pass_are_the_cpus(name):
    """In fp64, whitened: the losses of both probes, and the weights after the update pass over two microbatches."""
    from zoft.probe.cuda.nodes import DeviceNodes

    data = examples(6, masked=name == "bert")
    here = axis_of(MODELS[name]().double(), "upper", data)
    there = axis_of(MODELS[name]().double().cuda(), "upper", data)
    device = DeviceNodes(there.model, there.layers, seed=SEED)
    for layer, other in zip(here.layers, device.layers, strict=True):
        from test_nodes import whitener_of

        width = layer.trained.stored.shape[0 if layer.turned else 1]
        a = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
        w = whitener_of(a @ a.T, 0.1, 4)
        layer.whitener, layer.sigma = w, 0.5
        other.whitener = type(w)(w.vectors.cuda(), w.gains.cuda(), w.mean.cuda())
        other.sigma = 0.5
    rows = [rows_with_tokens(data[i : i + 3], range(i, i + 3), "cpu", True) for i in (0, 3)]
    probes = [Probe(0, 1e-2), Probe(0, -1e-2)]
    on = [type(r)(r.batch.to("cuda"), r.tokens.to("cuda")) for r in rows]
    for r, d in zip(rows, on, strict=True):
        want, got = node_losses(here, r, probes), node_losses(device, d, probes)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-7)
    change = Update(STEP, SEED, tuple(np.float32([0.3, -0.2, 0.5, -0.4, 0.1, 0.7]).tolist()), 0.99, lr=1e-2)
    here.update(change, [(r.batch.inputs, r.tokens) for r in rows])
    device.update(change, [(r.batch.inputs, r.tokens) for r in on])
    for layer, other in zip(here.layers, device.layers, strict=True):
        torch.testing.assert_close(other.trained.stored.cpu(), layer.trained.stored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("more", [[], ["node_inputs=kept", "node_tokens=2"]], ids=["pass", "kept"])
@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_steps_have_the_bits_of_eager_ones(folder, storage, accumulate, more):
    found = []
    for name, why in (("a", ""), ("b", "asked not to")):
        trainer = trainer_in(name, f"storage={storage}", f"accumulate={accumulate}", *more)
        trainer.capture, trainer.masked = (
            why,
            True,
        )  # without a mask some versions capture another attention kernel
        trainer.run()
        assert bool(trainer.graphs) == (not why) and trainer.capture == why
        found.append({n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()})
        trainer.ledger.close()
    assert Path("a/ledger").read_bytes() == Path("b/ledger").read_bytes()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("more", [[], ["node_inputs=kept", "node_tokens=2"]], ids=["pass", "kept"])
def test_a_run_resumes_and_is_replayed(folder, capsys, more):
    run("a", *more)
    for steps in (0, 3, 7):
        again(f"b{steps}", "a", steps)
        assert Path(f"b{steps}/ledger").read_bytes() == Path("a/ledger").read_bytes()
        assert model(f"b{steps}/model") == model("a/model")
    replay_run_folder("a", "whole")
    assert model("whole") == model("a/model") != model("tiny")
    capsys.readouterr()


def test_a_learning_rate_of_0_writes_nothing(folder):
    trainer = trainer_in("a", "lr=0", "storage=fp16")
    before = [t.stored.clone().view(torch.int16) for t in trainer.axis.trained]
    trainer.run()
    assert all(torch.equal(a, t.stored.view(torch.int16)) for a, t in zip(before, trainer.axis.trained))
    assert all(any(r.multipliers) for r in trainer.ledger.records)
