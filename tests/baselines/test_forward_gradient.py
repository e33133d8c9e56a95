"""Forward gradients: the slope against autograd and against MeZO's, steps against a loop by hand, and learning."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_trainer import build, examples, fp64
from typer.testing import CliRunner

from zoft.baselines.forward_gradient import directional_derivative, train_forward_gradient
from zoft.cli.main import app
from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.method.space import adopt, train_names
from zoft.noise import noise
from zoft.objectives.losses import collate, losses


def direction(t, step=0):
    return noise.direction(t.stored.shape, t.id, seed=7, step=step, direction=0, noise="gaussian")


@pytest.mark.parametrize("objective", ["choice", "lm"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.opt, tiny.gpt2, tiny.gemma2, lambda: tiny.llama(tie=True)])
def test_the_slope_is_autograds_and_what_mezo_measures(tmp_path, make, objective):
    import dataclasses

    data = [dataclasses.replace(e, objective=objective) for e in examples()]
    model, other = fp64(make()), fp64(make()).requires_grad_(True)
    batches = [collate(data[:5]), collate(data[5:8])]
    sums, counts = (
        sum(x) for x in zip(*((s.sum(), n.sum()) for s, n in (losses(other, b) for b in batches)))
    )
    (sums / counts).backward()
    trained = adopt(model, train_names(model, "all"))
    v = [direction(t).double() for t in trained]
    loss, slope = directional_derivative(model, trained, v, batches)
    grads = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    want = sum(float((grads[t.name] * d).sum()) for t, d in zip(trained, v) if t.name in grads)
    assert loss == pytest.approx(float(sums / counts), rel=1e-12) and slope == pytest.approx(
        want,
        rel=1e-6 if make is tiny.gemma2 else 1e-9,  # whose softmax is in fp32 whatever it is given
    )
    if make is tiny.gemma2:  # its rounding is beyond what an eps of 1e-6 can tell
        return
    trainer = build(tmp_path, fp64(make()), data=data, storage="fp64", compute="fp64", eps=1e-6)
    measured, _ = trainer.estimate(trainer.losses_at(0, trainer.probes, batches))
    assert measured[0] == pytest.approx(slope, rel=1e-4)


def config(**keys):
    return Config(model="m", batch_size=4, seed=7, device="cpu", **keys)


def test_steps_are_those_of_a_loop_by_hand():
    from zoft.train.batches import batches_of

    made = config(steps=4, lr=2e-3, weight_decay=0.5, schedule="linear", accumulate=2)
    model, other = tiny.llama(), tiny.llama().requires_grad_(True)
    found = train_forward_gradient(made, model, None, examples(), examples(8, 1), None)
    trained = {t.name: t for t in adopt(tiny.llama(), train_names(other, "all"))}
    at = batches_of(made, examples())
    for step in range(4):
        sums, counts = zip(*((s.sum(), n.sum()) for s, n in (losses(other, b) for b in at(step))))
        gradients = torch.autograd.grad(sum(sums) / sum(counts), [*other.parameters()], allow_unused=True)
        v = {n: direction(trained[n], step) for n, _ in other.named_parameters()}
        slope = sum(
            float((g * v[n]).sum()) for (n, _), g in zip(other.named_parameters(), gradients) if g is not None
        )
        lr = 2e-3 * (1 - step / 4)
        with torch.no_grad():
            for n, p in other.named_parameters():
                p.mul_(1 - lr * 0.5 if trained[n].decays else 1.0).sub_(lr * slope * v[n])
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5, msg=n)
    assert found["steps"] == 4 and found["forwards"] == 2 * 4 * 8 and {"loss"} <= found["after"].keys()


def test_it_learns_and_scores_on_the_way():
    data = examples()
    made = config(steps=300, lr=1e-3, eval_every=100)
    found = train_forward_gradient(made, tiny.llama(), None, data, data, None)
    assert [row["step"] for row in found["between"]] == [100, 200]
    assert found["after"]["loss"] < 0.6 * found["before"]["loss"]
    assert np.isfinite(found["after"]["loss"])


def test_what_diverges_stops_in_one_line():
    with pytest.raises(
        UserError, match="lr=1e[+]37: the loss is .* at step 1, its slope nan; start again with a lower lr"
    ):
        train_forward_gradient(config(steps=5, lr=1e37), tiny.llama(), None, examples(), examples(), None)


def test_the_verb(tmp_path, monkeypatch):
    tiny.place(tmp_path, "steps: 6\nbatch_size: 4\nmax_length: 32\nthreads: 1\nlr: 1e-3\ndevice: cpu\n")
    monkeypatch.chdir(tmp_path)
    words = ["baseline", "--config", "mine.yaml", "-m", "forward-gradient"]
    done = CliRunner().invoke(app, [*words, "eval_every=2", "train=last-1", "output_dir=out"])
    assert done.exit_code == 0, (done.output, done.stderr)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (found["method"], found["steps"], found["forwards"]) == ("forward-gradient", 6, 2 * 6 * 4)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for key, says in (
        ("train=lora", "use train=all"),
        ("q=2", "does nothing"),
        ("save_model=false", "does nothing"),
    ):
        done = CliRunner().invoke(app, [*words, key, "output_dir=other"])
        assert isinstance(done.exception, UserError) or done.exit_code == 2
        assert says in done.output + done.stderr + str(done.exception)
