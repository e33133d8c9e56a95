"""Large matrices, made some rows at a time: the same products, the same updates, less scratch."""

import pytest
import tiny
import torch
from test_estimate import llama
from test_trainer import build, examples, same_bits, weights

from zoft.method.estimators.estimator import Probe
from zoft.probe import scratch


@pytest.mark.parametrize("storage,beta,q", [("fp32", 0.0, 1), ("fp16", 0.9, 2), ("bf16", 0.0, 2)])
def test_slabs_are_one_run_with_the_whole(tmp_path, monkeypatch, storage, beta, q):
    """The noise and the updates have the same bits; products of other shapes may round differently."""
    ends = {}
    for name, slab in (("whole", 1 << 30), ("slabs", 1 << 10)):
        monkeypatch.setattr(scratch, "SLAB", slab)
        trainer = build(
            tmp_path,
            tiny.opt(),
            name=name,
            storage=storage,
            compute="fp32",
            beta=beta,
            q=q,
            lr=1e-3,
            weight_decay=0.1,
        )
        trainer.run()
        held = trainer.axis.scratch_held()
        assert any(map(scratch.in_slabs, trainer.axis.trained)) == (name == "slabs")
        ends[name] = weights(trainer.model), [r.losses for r in trainer.ledger.records], held
    # An update that differs in its last bit makes some stochastic roundings fall to the other side: a step of the grid.
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[storage]
    for a, b in zip(ends["whole"][1], ends["slabs"][1]):
        assert a == pytest.approx(b, rel=tolerance)
    for n, w in ends["whole"][0].items():
        torch.testing.assert_close(w, ends["slabs"][0][n], rtol=tolerance, atol=tolerance)


def test_slabs_hold_the_rows_of_the_whole_and_what_is_pending_reaches_all_rows(tmp_path, monkeypatch):
    probes = [Probe(0, 1e-3), Probe(0, -1e-3)]

    def pending(name):
        trainer = build(tmp_path, tiny.opt(), name=name, storage="fp16", compute="fp32", weight_decay=0.1)
        trainer.step()
        trainer.axis.step, trainer.axis.probes = 1, tuple(probes)
        t = next(t for t in trainer.axis.trained if t.name.endswith("fc1.weight"))
        assert t.step == 0  # the step's update is pending
        return trainer.axis, t

    (axis, t), (axis_again, again), (axis_broken, broken) = map(pending, ("whole", "slabs", "broken"))
    whole = axis.perturbed([t], probes, 0)[0].clone()
    monkeypatch.setattr(scratch, "SLAB", 1 << 9)
    slabs = [(rows, made.clone()) for rows, made in axis_again.slabs(again, probes, 0)]
    assert len(slabs) > 2 and torch.equal(torch.cat([made for _, made in slabs], 1), whole)
    made = axis_broken.slabs(broken, probes, 0)
    next(made)
    made.close()
    for other in (again, broken):
        assert other.step == t.step == 1 and same_bits({"": t.stored}, {"": other.stored})


def test_scratch_is_bounded(tmp_path, monkeypatch):
    sizes = {}
    for slab in (1 << 30, 1 << 12):
        monkeypatch.setattr(scratch, "SLAB", slab)
        trainer = build(tmp_path, llama(), name=str(slab), data=examples())
        trainer.step()
        sizes[slab] = trainer.axis.scratch_held()
    assert sizes == {1 << 30: 2 * 300 * 64 * 4, 1 << 12: 2 << 12}  # of the output matrix
