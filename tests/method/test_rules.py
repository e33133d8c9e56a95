"""Update rules without kernels: against the kernels where those have the rule, a slow twin, resumed and replayed runs."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import noise_twin as slow
import numpy as np
import pytest
import tiny
import torch
from ranks import free_port, start
from safetensors import safe_open
from test_replay import bits, configured, place, train  # noqa: F401 (place is a fixture)
from test_trainer import build, same_bits, weights

from zoft.cli import replay
from zoft.config.check import check_config
from zoft.config.digest import digests
from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.ledger import log as ledger
from zoft.method import advice, rules, space
from zoft.method.configured import compose, load_run
from zoft.method.rules import RULES, Rule
from zoft.method.space import Trained
from zoft.method.updates import advance_trained, make_update
from zoft.noise import noise, reference
from zoft.noise.spec import PART, Mask, Update, key, philox
from zoft.replay import snapshot
from zoft.run import estimate
from zoft.run.start import train_run
from zoft.train import header
from zoft.train.header import agree

SEED, TID = 2**40 + 5, 2**32 - 3
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN = Rule(
    "plain", lambda theta, g, state, lr: theta - g
)  # what the fused pass does, lr being in the multipliers


def momentum(theta, g, state, lr):
    state["m"] = 0.5 * state["m"] - g
    return theta + state["m"]


# ---- the specification as torch operations ---------------------------------------------------------------------------


def test_words_and_halves_are_those_of_the_specification():
    word = key(SEED, 7, 1)
    for first in (0, 3, 2**32 - 2, 2**40 + 1):  # over the edge of the counter's low word, too
        found = reference.words(first, 4, TID, 2, word, "cpu")
        for i in range(4):
            c = first + i
            assert tuple(found[i].tolist()) == philox((c & 0xFFFFFFFF, c >> 32, TID, 2), word)
    for first, n in ((0, 1000), (PART, 37), (2**35, 9)):
        index = np.arange(first, first + n)
        want = slow.rounding_bits(index, TID, word)
        assert reference.halves(first, n, TID, 1, word, "cpu").tolist() == want.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_the_specification(dtype):
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.uniform(-1, 1, 20_000), rng.integers(-140, 128, 20_000)).astype(np.float32)
    x[:12] = [0.0, -0.0, 65504, -65504, 65519, 1e-45, -1e-45, 6e-8, 6.1e-5, 3.4e38, 2.0**-24, -1.0]
    r = rng.integers(0, 2**16, len(x)).astype(np.int32)
    r[:6], r[-100:] = 65535, 0
    found = reference.round_stochastic(torch.from_numpy(x), torch.from_numpy(r), dtype)
    want = slow.round_stochastic(x, r, dtype)
    assert np.array_equal(slow.numbers(found), want)
    assert np.array_equal(np.signbit(slow.numbers(found)), np.signbit(want))


UPDATES = [
    Update(3, SEED, (1e-3,), lr=1.0),
    Update(4, SEED, (-3e-4, 2e-4, 0.0), decay=float(np.float32(0.99)), lr=1.0),
    Update(2**33, SEED, (0.25, -0.125), decay=0.5, lr=1.0),
]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("what", ["all", "random", "magnitude", "floor"])
def test_plain_and_momentum_steps_by_rule_have_the_bits_of_the_fused_pass(monkeypatch, what, storage, kind):
    """Over several chunks, the last one ragged: the tier is right where a kernel can judge it."""
    monkeypatch.setattr(reference, "CHUNK", 5 * PART)
    mask = {"random": Mask(seed=9, share=20_000), "magnitude": Mask(threshold=float(np.float32(0.4)))}.get(
        what
    )
    floor = 0.01 if what == "floor" else None
    torch.manual_seed(1)
    for rule, beta in ((PLAIN, 0.0), (Rule("momentum", momentum, ("m",)), 0.5)):
        t = trained(torch.randn(37, 53).to(DTYPES[storage]), rule)
        t.floor, t.mask = floor, mask
        fused = dataclasses.replace(t, stored=t.stored.clone(), rule=None, state={})
        advance_trained(t, UPDATES, kind)
        advance_trained(fused, UPDATES, kind, beta)
        assert same_bits({"": t.stored}, {"": fused.stored}) and t.step == fused.step == 2**33 + 1
        assert int(t.state["t"]) == len(UPDATES)
        if beta:
            assert torch.equal(t.state["m"], fused.momentum) and t.state["m"].abs().max() > 0
        advance_trained(t, UPDATES, kind)  # all behind it
        assert torch.equal(t.stored, fused.stored)


def trained(theta, rule):
    t = Trained("w", torch.nn.Parameter(theta, requires_grad=False), theta, theta.dtype, TID, True)
    rules.attach_rule([t], rule)
    return t


def test_lr_0_leaves_every_bit_and_decay_is_where_it_belongs():
    theta = torch.tensor([0.0, -0.0, 1e-45, 3.0] * 40)
    for name in RULES:
        t = trained(theta.clone(), RULES[name])
        advance_trained(
            t,
            [make_update(s, SEED, [0.3], lr=0.0, weight_decay=0.1, ruled=True) for s in range(4)],
            "gaussian",
        )
        assert same_bits({"": t.stored}, {"": theta}) and int(t.state["t"]) == 4
        still = trained(torch.ones(200), RULES[name])
        still.decays = False
        advance_trained(
            still, [make_update(0, SEED, [0.0], lr=0.5, weight_decay=0.5, ruled=True)], "gaussian"
        )
        assert torch.equal(still.stored, torch.ones(200))
        still.decays = True
        advance_trained(
            still, [make_update(1, SEED, [0.0], lr=0.5, weight_decay=0.5, ruled=True)], "gaussian"
        )
        assert torch.equal(still.stored, torch.full((200,), 0.75))


# ---- against a slow twin ---------------------------------------------------------------------------------------------


class Twin:
    """One tensor under a rule in NumPy: noise, rounding and arithmetic by the specification alone."""

    def __init__(self, t):
        self.id, self.dtype, self.decays = t.id, t.stored.dtype, t.decays
        self.work = np.float64 if self.dtype == torch.float64 else np.float32
        self.values = slow.numbers(t.stored).astype(self.work)
        self.index, self.t = np.arange(len(self.values)), 0
        self.m, self.v = np.zeros_like(self.values), np.zeros_like(self.values)

    def update(self, record, rule, seed):
        w = self.work
        g = np.zeros_like(self.values)
        for k, multiplier in enumerate(record.multipliers):
            g = g - w(multiplier) * slow.z(
                self.index, self.id, slow.key(seed, record.step, k), "rademacher"
            ).astype(w)
        a = w(record.decay) * self.values if self.decays else self.values
        lr = w(np.float32(record.lr))
        if rule == "sign":
            a = a - lr * np.sign(g)
        else:
            self.t += 1
            self.m = w(0.9) * self.m + w(1 - 0.9) * g
            self.v = w(0.999) * self.v + w(1 - 0.999) * (g * g)
            root = np.sqrt(self.v * w(1 / (1 - 0.999**self.t)))
            a = a - lr * ((self.m * w(1 / (1 - 0.9**self.t))) / (root + w(1e-8)))
        assert a.dtype == w
        if self.dtype.itemsize == 2:
            bits = slow.rounding_bits(self.index, self.id, slow.key(seed, record.step, 0))
            a = slow.round_stochastic(a, bits, self.dtype).astype(w)
        self.values = a


OWN = r"layers\.1\.self_attn\.[qv]|norm"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("storage", DTYPES)
def test_fifty_steps_are_those_of_the_twin(tmp_path, rule, storage):
    from test_trainer import fp64

    model = fp64(tiny.llama(tie=True)) if storage == "fp64" else tiny.llama(tie=True)
    trainer = build(
        tmp_path, model, train=OWN, storage=storage, compute="fp64" if storage == "fp64" else "fp32", kind="rademacher",
        q=2, lr=3e-3, steps=50, weight_decay=0.3, schedule="cosine",
    )  # fmt: skip
    rules.attach_rule(trainer.axis.trained, RULES[rule])
    twins = {t.name: Twin(t) for t in trainer.axis.trained}
    begun = weights(model)
    trainer.run()
    trainer.ledger.close()
    log = ledger.read_ledger(tmp_path / "ledger")
    assert any(abs(m) > 1e-3 for r in log.records for m in r.multipliers)  # not times lr
    for record in log.records:
        slopes = (np.array(record.losses[::2]) - np.array(record.losses[1::2])) / (4 * trainer.settings.eps)
        np.testing.assert_allclose(record.multipliers, -slopes, atol=1e-3, rtol=1e-3)
        for twin in twins.values():
            twin.update(record, rule, trainer.settings.seed)
    for t in trainer.axis.trained:
        # An fp64 root is right to its last bit but one.
        off = 1e-12 if (rule, storage) == ("adam", "fp64") else 0
        np.testing.assert_allclose(
            slow.numbers(t.stored), twins[t.name].values, rtol=0, atol=off, err_msg=t.name
        )
        assert not torch.equal(t.stored.flatten(), begun[t.name].flatten().to(t.stored.dtype))
    # Replayed from the ledger alone.
    model = fp64(tiny.llama(tie=True)) if storage == "fp64" else tiny.llama(tie=True)
    again = build(
        tmp_path, model, name="other", train=OWN, storage=storage, compute="fp64" if storage == "fp64" else "fp32",
        kind="rademacher", q=2, lr=3e-3, steps=50,
    )  # fmt: skip
    rules.attach_rule(again.axis.trained, RULES[rule])
    again.replay(log.records)
    assert same_bits(weights(again.model), weights(trainer.model))


def quadratic(rule, lr, steps, kind, d=50, q=1):
    """θ after steps on ½ Σ a_i θ_i², with exact directional derivatives; the losses and the coefficients."""
    theta = torch.linspace(-1, 1, d)
    curvature = torch.logspace(-1, 0, d)
    t, found, losses = trained(theta.clone(), rule), [], []
    for step in range(steps):
        z = [noise.direction((d,), TID, seed=SEED, step=step, direction=k, noise=kind) for k in range(q)]
        c = [float(curvature * t.stored @ x) / q for x in z]
        losses.append(float((curvature * t.stored**2).sum() / 2))
        advance_trained(t, [make_update(step, SEED, c, lr=lr, ruled=True)], kind)
        found.append(c)
    return t, losses, found


@pytest.mark.parametrize("name, lr", [("sign", 2e-3), ("adam", 5e-3)])
def test_rules_descend_a_quadratic(name, lr):
    _, losses, _ = quadratic(RULES[name], lr, 800, "gaussian", q=4)
    assert min(losses[-100:]) < 0.2 * losses[0], (losses[0], losses[-1])


def test_adam_with_signs_and_one_direction_is_momentum_over_one_number():
    """z² = 1, so that the second moment is the same number everywhere: the mean of c²."""
    t, _, coefficients = quadratic(RULES["adam"], 1e-2, 200, "rademacher")
    assert float(t.state["v"].max() / t.state["v"].min()) - 1 < 1e-6
    theta, buffer, v = torch.linspace(-1, 1, 50).double(), torch.zeros(50).double(), 0.0
    for step, (c,) in enumerate(coefficients):
        z = noise.direction((50,), TID, seed=SEED, step=step, direction=0, noise="rademacher").double()
        buffer, v = 0.9 * buffer + 0.1 * c * z, 0.999 * v + 0.001 * c * c
        scale = 1e-2 / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))) ** 0.5 + 1e-8)
        theta = theta - scale * buffer
    assert (t.stored - theta).abs().max() < 1e-5 * theta.abs().max()
    assert (t.stored - theta).abs().mean() < 1e-6


def test_sign_with_signs_and_one_direction_is_the_sign_of_the_slope_along_z():
    a, b = trained(torch.zeros(300), RULES["sign"]), torch.zeros(300)
    for step, c in enumerate([0.3, -7.0, 1e-9]):
        advance_trained(a, [make_update(step, SEED, [c], lr=0.25, ruled=True)], "rademacher")
        z = noise.direction((300,), TID, seed=SEED, step=step, direction=0, noise="rademacher")
        b = b - 0.25 * np.sign(c) * z
    assert torch.equal(a.stored, b)


# ---- runs ------------------------------------------------------------------------------------------------------------

WAYS = {
    "sign": ("update=sign", "storage=bf16", "lr=1e-3", "weight_decay=0.1"),
    "adam": ("update=adam", "storage=fp16", "lr=1e-3", "q=2", "snapshot_every=4"),
    "adam-fp32": ("update=adam", "storage=fp32", "noise=rademacher", "lr=1e-3", "snapshot_every=4"),
    "adam-sparse": ("update=adam", "recipe=sparse_mezo", "storage=bf16", "lr=1e-3", "weight_decay=0.1"),
    "adam-lora": ("update=adam", "recipe=lora_zo", "lr=1e-2", "snapshot_every=4"),
    "sign-qzo": ("update=sign", "recipe=qzo", "bits=4", "group=32", "lr=1e-3"),
}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_and_replayed_runs_have_the_bits_of_the_run(place, way, tmp_path):  # noqa: F811
    run = train(place, f"rule-{way}", *WAYS[way])
    model = "adapter" if "lora" in way else "model"
    file = next(p.name for p in (run / model).iterdir() if p.suffix == ".safetensors")
    end, data = (run / model / file).read_bytes(), (run / "ledger").read_bytes()
    log = ledger.read_ledger(run / "ledger")
    assert log.header["update"] == way.partition("-")[0] and "update" in log.header["config"]
    replay.replay_run_folder(run, tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == end
    count = len(log.records) * load_run(run).q + len(log.events)
    for kept in (1, count // 2, count - 1, count):
        cut = place / f"cut-{way}-{kept}"
        cut.mkdir()
        (cut / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), str(cut)))
        (cut / "ledger").write_bytes(data[: len(data) - 32 * (count - kept)])
        for extra in ("snapshots", "start.safetensors"):
            if (run / extra).is_dir():
                shutil.copytree(run / extra, cut / extra)
            elif (run / extra).exists():
                shutil.copy(run / extra, cut / extra)
        train_run(load_run(cut), resume=cut)
        assert (cut / model / file).read_bytes() == end, kept
        assert (cut / "ledger").read_bytes() == data, kept


def test_a_snapshot_has_the_state_and_a_run_starts_from_it(place, tmp_path, capsys):  # noqa: F811
    run = train(place, "rule-state", "update=adam", "storage=bf16", "lr=1e-3", "snapshot_every=3")
    trained = ledger.read_ledger(run / "ledger").header["trained"]
    with safe_open(snapshot.file_of(run, 6), "pt") as file:
        assert {*file.keys()} == {*trained} | {f"{n}@{k}" for n in trained for k in "mvt"}
        for name in trained:
            assert file.get_tensor(f"{name}@t").tolist() == [6]
            assert (
                file.get_tensor(f"{name}@v").dtype == torch.float32 and file.get_tensor(f"{name}@v").min() > 0
            )
    capsys.readouterr()
    replay.replay_run_folder(run, tmp_path / "five", step=5)
    assert "starting from the snapshot at step 3" in capsys.readouterr().err
    short = train(place, "rule-five", "update=adam", "storage=bf16", "lr=1e-3", "steps=5")
    assert bits(tmp_path / "five") == bits(short / "model")


def test_no_other_rule_goes_on_with_a_ledger(place):  # noqa: F811
    for before, now in (("sgd", "sign"), ("adam", "sgd")):
        run = train(place, f"rule-{before}-{now}", f"update={before}", "lr=1e-4", "steps=2")
        (run / "result.json").unlink()
        config = dataclasses.replace(load_run(run), update=now)
        with pytest.raises(UserError, match=f"was written with update={before}: put that back"):
            train_run(config, resume=run)


def test_headers_of_plain_runs_say_nothing_new():
    plain = Config(model="m", momentum=0.5)
    assert "update" not in digests(plain) and "update" in digests(dataclasses.replace(plain, update="sign"))
    assert "reward" not in digests(plain) and "clip" in digests(plain)  # null is a value like any other
    found = header.header_of(plain, "base", [])
    assert "update" not in found and header.with_plan(plain, found) == dataclasses.replace(
        plain, estimator="two_sided", update="sgd"
    )
    found = header.header_of(dataclasses.replace(plain, update="adam"), "base", [])
    assert header.with_plan(plain, found).update == "adam"
    agree(found, {"base": "base"}, "run")


def test_two_processes_make_one_run(place):  # noqa: F811
    keys = [
        "update=adam",
        "storage=bf16",
        "noise=rademacher",
        "lr=1e-3",
        "parallel=probes",
        "probes_per_forward=1",
    ]
    one = train(place, "rule-one", *keys)
    port = free_port()
    args = [
        "train",
        "--config",
        str(place / "mine.yaml"),
        f"model={place / 'half'}",
        *keys,
        f"output_dir={place / 'rule-two'}",
    ]
    both = [start(place, args, rank, 2, port) for rank in range(2)]
    for process in both:
        process.join(240)
    assert [p.exitcode for p in both] == [0, 0], (place / "said-0").read_text()[-2000:]
    assert bits(place / "rule-two" / "model") == bits(one / "model")


def test_a_private_rule_needs_no_name(tmp_path):
    """The text of docs/updates.md, on a trainer: nothing knows the rule's name."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "updates.md").read_text()
    shown: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], shown)
    model = tiny.llama(tie=True)
    trainer = build(tmp_path, model, storage="bf16", lr=1e-3, steps=6)
    rules.attach_rule(trainer.axis.trained, shown["LION"])
    begun = weights(model)
    trainer.run()
    again = build(tmp_path, tiny.llama(tie=True), name="other", storage="bf16")
    rules.attach_rule(again.axis.trained, shown["LION"])
    again.replay(trainer.ledger.records)
    assert same_bits(weights(again.model), weights(model)) and not same_bits(begun, weights(model))


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, words",
    [
        (["update=adamw"], ["update=adamw: use auto, sgd, sign, adam", "did you mean adam?"]),
        (["update=sign", "momentum=0.9"], ["momentum=0.9", "update=sgd, not sign", "leave one of them out"]),
        (["update=adam", "perturb=inplace"], ["update=adam", "perturb=inplace", "use perturb=probes"]),
        (["update=adam", "denoise_every=5"], ["denoise_every=5", "update=adam", "leave it out"]),
        (["update=sign", "meazo=0.9"], ["meazo=0.9", "update=sign", "leave it out"]),
    ],
)
def test_refused_in_one_line(place, keys, words):  # noqa: F811
    with pytest.raises(UserError) as caught:
        check_config(compose(str(place / "mine.yaml"), [f"model={place / 'half'}", *keys]))
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), str(caught.value)


def test_exact_and_denoised_replays_are_refused(place, tmp_path):  # noqa: F811
    run = train(place, "rule-refused", "update=sign", "storage=bf16", "lr=1e-4", "steps=2")
    for wish in ({"storage": "fp32"}, {"denoise": True}):
        with pytest.raises(UserError, match="trained with update=sign, so base and ledger give no plain sum"):
            replay.replay_run_folder(run, tmp_path / "out", **wish)


def test_advice_and_estimate(place):  # noqa: F811
    model = tiny.llama(tie=True)
    trained = space.adopt(model, space.train_names(model, "all"))
    numbers = sum(t.stored.numel() for t in trained)
    said = {}
    for name in ("sgd", "sign", "adam"):
        config = configured(place, "none", f"update={name}", "lr=10", "noise=rademacher")
        said[name] = advice.advice_at_start(config, trained)
        found = estimate.estimate_run(config)
        assert found["state_bytes"] == {"sgd": 0, "sign": 0, "adam": 8 * found["trained"]}[name]
        assert found["trained"] == numbers
        assert any("slower" in n for n in found["notes"]) == (name != "sgd")
        assert ("moments of the update rule" in estimate.estimate_text(found)) == (name == "adam")
    assert (
        "is far above" in said["sgd"][0] and not said["sign"]
    )  # nobody has searched the size of a sign's step
    assert "this is momentum divided by one number" in said["adam"][0] and "8 bytes" in said["adam"][0]
    assert not advice.advice_at_start(configured(place, "none", "update=adam", "train=norms"), trained)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", RULES)
def test_a_gpu_has_the_bits_of_a_cpu(name, storage):
    torch.manual_seed(3)
    here = trained(torch.randn(700, 900).to(DTYPES[storage]), RULES[name])
    there = trained(here.stored.cuda(), RULES[name])
    for t in (here, there):
        t.mask = Mask(seed=9, share=40_000)
        updates = [
            make_update(s, SEED, [0.3 / (s + 1), -0.2], lr=1e-3, weight_decay=0.1, ruled=True)
            for s in range(6)
        ]
        advance_trained(t, updates, "rademacher")
    assert same_bits({"": here.stored}, {"": there.stored.cpu()})
    for k, value in here.state.items():
        assert torch.equal(value, there.state[k].cpu()), k


@pytest.mark.gpu
def test_a_run_on_a_gpu_replays_on_both(place, tmp_path):  # noqa: F811
    keys = ("update=adam", "noise=rademacher", "storage=bf16", "lr=1e-3", "snapshot_every=4", "device=cuda")
    run = train(place, "rule-gpu", *keys)
    for device in ("cuda", "cpu"):
        replay.replay_run_folder(run, tmp_path / device, device=device)
        assert bits(tmp_path / device) == bits(run / "model")
