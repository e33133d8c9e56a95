"""Objectives without a gradient on a GPU: the CPU's numbers, and runs that resume and replay to the same bits."""

import pytest
import tiny
import torch
from test_goal import ASKED, build
from test_trainer import same_bits, weights

from zoft.ledger.log import Ledger, read_ledger

pytest.importorskip("triton")
from zoft.train.cuda_graphs import CapturedTrainer  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.mark.parametrize("objective", ASKED)
def test_a_step_has_the_cpus_numbers(tmp_path, objective):
    on_gpu = build(
        tmp_path, objective, name="gpu", device="cuda", model=tiny.llama().cuda(), noise="rademacher"
    )
    on_cpu = build(tmp_path, objective, name="cpu", noise="rademacher", made=on_gpu.made)
    assert isinstance(on_gpu, CapturedTrainer) == (objective == "accuracy")
    for trainer in (on_gpu, on_cpu):
        trainer.run(until=1)
    assert on_gpu.ledger.records[0].losses == pytest.approx(on_cpu.ledger.records[0].losses, abs=1e-6)


@pytest.mark.parametrize("precision", [{}, {"storage": "fp16", "compute": "bf16"}])
@pytest.mark.parametrize("perturb", ["probes", "inplace"])
@pytest.mark.parametrize("objective", ASKED)
def test_interrupted_resumed_and_replayed_runs_end_with_the_same_bits(
    tmp_path, objective, perturb, precision
):
    if perturb == "inplace" and precision:
        precision = {"storage": "bf16", "compute": "bf16"}

    def made(name, **more):
        model = tiny.llama().cuda()
        return build(
            tmp_path, objective, name=name, device="cuda", model=model, perturb=perturb, **precision, **more
        )

    whole = made("whole")
    start = weights(whole.model)
    whole.run()
    end = weights(whole.model)
    assert not same_bits(start, end)
    first = made("part")
    first.run(until=2)
    first.ledger.close()
    again = Ledger.open(tmp_path / "part")
    second = made("part", opened=again)
    second.replay(list(again.records))
    second.run()
    again.close()
    assert same_bits(end, weights(second.model))
    replayed = made("replayed")
    replayed.replay(read_ledger(tmp_path / "whole")[1])
    assert same_bits(end, weights(replayed.model))


@pytest.mark.parametrize("hold", [True, False])
def test_lr_zero_leaves_every_bit(tmp_path, hold):
    how = {"storage": "fp16", "compute": "bf16", "hold_probe": hold}
    trainer = build(tmp_path, "f1", lr=0.0, device="cuda", model=tiny.llama().cuda(), **how)
    before = weights(trainer.model)
    trainer.run()
    assert same_bits(before, weights(trainer.model))
    assert len({r.losses for r in trainer.ledger.records}) > 1
