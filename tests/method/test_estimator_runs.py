"""Runs of other estimators than two-sided SPSA: what they estimate, resumed and replayed, counted, over two processes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import ranks
import tiny
import torch
from test_cli import zoft
from test_noise_gpu import run_python, without_gpu
from test_trainer import build, fp64, same_bits, weights, z

from zoft.config.check import check_config
from zoft.config.digest import changed, digests
from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.ledger.log import Ledger, read_ledger
from zoft.method.configured import load_run
from zoft.method.estimators.estimator import Estimator, Probe, rows_of
from zoft.method.method import settle
from zoft.method.recipes import method_of
from zoft.objectives.losses import losses
from zoft.parallel.world import probe_grid
from zoft.train import header, resolve


def moving_baseline(losses, q, eps, state):
    """One loss per direction, against the mean of earlier steps' losses."""
    mean = losses.mean()
    baseline = (state[0] / state[1]).where(state[1] > 0, mean)
    new = state * 0.9
    new[0].add_(0.1 * mean)
    new[1].add_(0.1)
    return (losses - baseline) / (eps * q), new


MOVING = Estimator(
    "moving", lambda q, eps: [Probe(k, eps) for k in range(q)], moving_baseline, lambda q: q, (0.0, 0.0)
)
KINDS = {
    "one_sided": {"estimator": "one_sided"},
    "one_sided, meazo, clip": {"estimator": "one_sided", "meazo": 0.9, "clip": 2.0},
    "meazo": {"meazo": 0.9},
    "normalised": {"estimator": "normalised"},
    "moving": {"estimator": MOVING, "lr": 1e-4},
}


@pytest.mark.parametrize("make", [tiny.opt, tiny.llama])
@pytest.mark.parametrize("name", ["one_sided", "two_sided"])
def test_coefficients_are_directional_derivatives(tmp_path, make, name):
    """Against autograd in fp64: c_k·q = g·z_k, up to eps/2·zHz on one side."""
    model, reference = fp64(make()), fp64(make()).requires_grad_(True)
    eps, q = 1e-6, 3
    trainer = build(tmp_path, model, storage="fp64", compute="fp64", eps=eps, q=q, estimator=name)
    batch = trainer.batches(0)[0]
    sums, counts = losses(reference, batch)
    (sums.sum() / counts.sum()).backward()
    gradient = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    got, _ = trainer.estimate(trainer.losses_at(0, trainer.probes, [batch]))
    trained = [t for t in trainer.axis.trained if t.name in gradient]
    for k in range(q):
        slope = sum(float((gradient[t.name] * z(t, 0, k)).sum()) for t in trained)
        assert got[k] * q == pytest.approx(slope, rel=1e-3)


def test_one_sided_rows_multipliers_and_metrics(tmp_path):
    """Each row has (multiplier, l_k, l_0); a NumPy twin of the step from the losses that were seen."""
    trainer = build(tmp_path, tiny.llama(), q=3, estimator="one_sided", lr=0.01, eps=0.05, steps=4)
    seen, plain = [], trainer.losses_at
    trainer.losses_at = lambda *args: seen.append(plain(*args)) or seen[-1]
    rows = []
    trainer.run(rows.append)
    assert trainer.forwards == 4 * 4 * 4  # steps × (q + 1) × batch
    for record, found, metrics in zip(trainer.ledger.records, seen, rows, strict=True):
        base, *plus = map(np.float64, found)
        slopes = [(p - base) / (0.05 * 3) for p in plus]
        assert record.multipliers == tuple(np.float32(-0.01 * c) for c in slopes)
        assert record.losses == tuple(np.float32([x for p in plus for x in (p, base)]).tolist())
        assert metrics["loss"] == pytest.approx(np.mean(found), rel=1e-6)
        assert metrics["projected_gradient"] == pytest.approx(sum(slopes), rel=1e-3, abs=1e-5)


def test_a_private_moving_baseline_against_its_twin(tmp_path):
    """From the ledger alone, whose fp32 losses are those that the estimator saw."""
    trainer = build(tmp_path, tiny.llama(), q=2, steps=8, eps=0.05, **KINDS["moving"])
    metrics = []
    trainer.run(metrics.append)
    total = weight = 0.0
    for record, line in zip(trainer.ledger.records, metrics, strict=True):
        found = record.losses[0::2]
        assert found == record.losses[1::2]
        mean = sum(found) / 2
        baseline = total / weight if weight else mean
        want = [-1e-4 * (x - baseline) / (0.05 * 2) for x in found]
        np.testing.assert_allclose(record.multipliers, want, rtol=1e-6)
        total, weight = 0.9 * total + 0.1 * mean, 0.9 * weight + 0.1
        assert line["projected_gradient"] == pytest.approx(sum(want) / -1e-4, rel=1e-5)
    assert trainer.state.tolist() == pytest.approx([total, weight])


@pytest.mark.parametrize("policy", ["probes", "inplace"])
@pytest.mark.parametrize("storage,beta", [("fp32", 0.0), ("bf16", 0.9)])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_resumed_and_replayed_runs_end_with_the_same_bits(tmp_path, policy, storage, beta, kind):
    same = {
        **KINDS[kind], "storage": storage, "compute": storage, "policy": policy, "beta": beta, "q": 2, "weight_decay": 0.01,
    }  # fmt: skip
    whole = build(tmp_path, tiny.llama(tie=True), name="whole", **same)
    start = weights(whole.model)
    whole.run()
    end = weights(whole.model)
    assert not same_bits(start, end)
    data = (tmp_path / "whole").read_bytes()
    for stop in (0, 1, 7):
        # Killed: the ledger ends inside a record.
        (tmp_path / f"stop{stop}").write_bytes(data[: len(data) - (10 - stop) * 2 * 32 + 5 * (stop > 0)])
        again = Ledger.open(tmp_path / f"stop{stop}")
        second = build(tmp_path, tiny.llama(tie=True), opened=again, **same)
        second.replay(list(again.records))
        assert second.next == stop
        second.run()
        assert same_bits(end, weights(second.model)), stop
        assert torch.equal(second.state, whole.state)
        again.close()
        assert (tmp_path / f"stop{stop}").read_bytes() == data
    replayed = build(tmp_path, tiny.llama(tie=True), name="replayed", **same)
    replayed.replay(read_ledger(tmp_path / "whole").records)
    assert same_bits(end, weights(replayed.model))


@pytest.mark.parametrize("kind", ["meazo", "moving"])
def test_a_skipped_step_leaves_the_state(tmp_path, kind):
    trainer = build(tmp_path, tiny.llama(), **KINDS[kind])
    plain = trainer.losses_at
    trainer.losses_at = lambda t, *args: [math.inf] * len(plain(t, *args)) if t == 3 else plain(t, *args)
    trainer.run(until=3)
    before = trainer.state.clone()
    trainer.run(until=4)
    assert torch.equal(trainer.state, before)
    trainer.run()
    assert [r.skipped for r in trainer.ledger.records] == [t == 3 for t in range(10)]
    assert trainer.state.isfinite().all()
    again = build(tmp_path, tiny.llama(), name="again", **KINDS[kind])
    again.replay(read_ledger(tmp_path / "ledger").records)
    assert torch.equal(again.state, trainer.state)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_grouping_does_not_change_one_sided_losses(tmp_path, group):
    found = []
    for name, each in (("alone", 1), ("group", group)):
        trainer = build(
            tmp_path, tiny.gemma2(), name=name, q=3, probes_per_forward=each, estimator="one_sided"
        )
        trainer.step()
        found.append(trainer.ledger.records[0].losses)
    np.testing.assert_allclose(found[1], found[0], rtol=2e-6)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = ranks.make_place(tmp_path_factory.mktemp("work"), estimator="one_sided", q=3, steps=12)
    assert ranks.zoft(folder, "output_dir=one") == [0]
    return folder


def same(place, name, other="one"):
    return all(
        (place / name / f).read_bytes() == (place / other / f).read_bytes()
        for f in ("ledger", "model/model.safetensors")
    )


def test_a_run_counts_and_its_header_says_so(place):
    result = json.loads((place / "one" / "result.json").read_text())
    assert result["forwards"] == 12 * 4 * 4  # steps × (q + 1) × batch
    log = read_ledger(place / "one" / "ledger")
    assert log.header["estimator"] == "one_sided"
    assert len(log.records[0].losses) == 6 and len({r.losses[1] for r in log.records}) > 1
    assert all(r.losses[1] == r.losses[3] == r.losses[5] for r in log.records)
    assert load_run(place / "one").estimator == "one_sided"


def test_four_probes_over_two_processes_are_the_run_of_one_to_the_bit(place):
    assert ranks.zoft(place, "output_dir=probes", "parallel=probes", size=2) == [0, 0]
    assert "parallel=probes: each has 2 of 4 probes" in (place / "said-0").read_text()
    assert same(place, "probes")


def test_slices_of_the_batch_over_two_processes_within_rounding(place):
    keys = ["lr=0", "steps=5", "save_model=false", "q=2"]  # 3 probes: auto shares out the examples
    assert ranks.zoft(place, "output_dir=still", *keys) == [0]
    assert ranks.zoft(place, "output_dir=data", *keys, size=2) == [0, 0]
    assert "parallel=data: each has 3 of 3 probes" in (place / "said-0").read_text()
    want, got = (
        [r.losses for r in read_ledger(place / name / "ledger").records] for name in ("still", "data")
    )
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_an_elastic_run_has_the_same_bits(place):
    assert ranks.zoft(place, "output_dir=elastic", "elastic=true") == [0]
    assert same(place, "elastic")


def stop_at_5(rank):
    from test_distributed import stop_at

    stop_at(5)


def test_a_stopped_run_goes_on_and_replays(place):
    for name, keys in (("stopped", []), ("moment", ["meazo=0.9"])):
        other = "one"
        if keys:
            other = "moment-whole"
            assert ranks.zoft(place, f"output_dir={other}", *keys) == [0]
        assert ranks.zoft(place, f"output_dir={name}", *keys, hook=stop_at_5) == [75]
        assert ranks.zoft(place, "--resume", name) == [0]
        assert same(place, name, other)
    done = zoft("replay", "one", "--out", "replayed", cwd=place)
    assert done.returncode == 0, done.stderr
    whole, again = (place / n / "model.safetensors" for n in ("one/model", "replayed"))
    assert whole.read_bytes() == again.read_bytes()


def test_in_place_runs_replay(place):
    keys = ["perturb=inplace", "steps=6", "q=2"]
    assert ranks.zoft(place, "output_dir=moved", *keys) == [0]
    done = zoft("replay", "moved", "--out", "moved-again", cwd=place)
    assert done.returncode == 0, done.stderr
    whole, again = (place / n / "model.safetensors" for n in ("moved/model", "moved-again"))
    assert whole.read_bytes() == again.read_bytes()


def test_estimate_counts_the_forwards(place, monkeypatch):
    from zoft.run import estimate as rates

    monkeypatch.setattr(rates, "MEASURED", 0.0)
    found = {}
    for name in ("two_sided", "one_sided"):
        done = zoft("estimate", "--config", "mine.yaml", "q=7", f"estimator={name}", "--json", cwd=place)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["flops_per_step"]
    assert found["one_sided"] / found["two_sided"] == pytest.approx(8 / 14, rel=1e-6)


def config(**keys):
    made = check_config(Config(model="m", task=Task(name="x"), **{"batch_size": 4, **keys}))
    return settle(made, method_of(made.recipe), {})


def test_a_budget_of_forwards(capsys):
    assert (
        resolve.allowed_steps(config(q=3, estimator="one_sided", max_forwards=100)).steps == 6
    )  # of 16 each
    with pytest.raises(UserError, match="a step takes 16"):
        resolve.allowed_steps(config(q=3, estimator="one_sided", max_forwards=15))


def test_an_odd_number_of_probes_is_not_cut_in_two():
    assert probe_grid(config(q=2, estimator="one_sided"), 2) == (1, 2)
    assert probe_grid(config(q=2, estimator="one_sided"), 6) == (3, 2)
    with pytest.raises(UserError, match="3 probes per step .* use parallel=auto, another q, or .* divide 3"):
        probe_grid(config(q=2, estimator="one_sided", parallel="probes"), 2)


def test_two_sided_runs_have_the_headers_that_they_had(tmp_path):
    trained = build(tmp_path, tiny.llama()).axis.trained
    plain, one = (
        dataclasses.replace(c, storage="fp32", compute="fp32")
        for c in (config(), config(estimator="one_sided"))
    )
    assert plain.estimator == "two_sided"  # auto, resolved
    found = header.header_of(plain, "b", trained)
    assert "estimator" not in found and "estimator" not in found["config"]
    other = header.header_of(one, "b", trained)
    assert other["estimator"] == "one_sided"
    # A ledger of either is not continued under the other.
    assert changed(digests(plain), digests(one)) == changed(digests(one), digests(plain)) == ["estimator"]
    assert not changed(digests(one), digests(one))
    assert header.with_plan(plain, other).estimator == "one_sided"
    assert header.with_plan(one, found).estimator == "two_sided"


# ---- the end of a captured step, without a GPU -----------------------------------------------------------------------


def close_as_the_trainer_does():
    """Control.close, its kernel interpreted, against the eager arithmetic of Trainer.step."""
    from zoft.method.estimators.named import estimator_of
    from zoft.noise.triton_kernels import NOTHING
    from zoft.probe.cuda.buffers import Control
    from zoft.train.trainer import Settings

    torch.Tensor.pin_memory = lambda self: self  # nothing is sent to a device
    for keys in KINDS.values():
        s = Settings(**{"seed": 1, "steps": 1, "lr": 0.3, "eps": 1e-3, "q": 3, **keys})
        e, rng = estimator_of(s), np.random.default_rng(0)
        probes, eps = e.probes(s.q, s.eps), torch.tensor(s.eps, dtype=torch.float64)
        control = Control(probes, s.q, s.eps, 0.0, s.seed, torch.device("cpu"))
        control.configure(e)
        control.rates.copy_(torch.tensor([s.lr, 0.875], dtype=torch.float64))
        state = eps.new_tensor(e.state)
        for step in range(4):
            sums = torch.from_numpy(rng.normal(3.0, 1e-3, len(probes)))
            sums[-1] = math.nan if step == 2 else sums[-1]
            control.totals.copy_(torch.stack([sums, torch.full_like(sums, 3.0)], 1))
            control.close()
            c, new = e.run(sums / 3.0, s.q, eps, state)
            record, good = control.record.tolist(), step != 2
            state = new if good else state
            assert torch.equal(control.state, state), (keys, step)
            want = np.array([-s.lr * x for x in c.tolist()], np.float32)
            rows = np.array(rows_of((sums / 3.0).tolist(), probes))
            np.testing.assert_array_equal(record[: 2 * s.q], rows)
            np.testing.assert_array_equal(np.float32(record[2 * s.q : 3 * s.q]), want)
            assert bool(record[3 * s.q]) == good
            pending = [*want.tolist(), 0.875, 1.0] if good else [0.0] * s.q + [NOTHING.value] * 2
            assert control.master[: s.q + 2].tolist() == np.float32(pending).tolist()
            assert control.master[control.at_beta + 1] == np.float32(s.eps)  # the way back, in place


@without_gpu
def test_the_end_of_a_captured_step_interpreted():
    run_python(
        "import test_estimator_runs as t; t.close_as_the_trainer_does()",
        TRITON_INTERPRET="1", PYTHONWARNINGS="ignore",
    )  # fmt: skip
