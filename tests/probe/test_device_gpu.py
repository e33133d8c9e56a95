"""Steps on a GPU: captured, eager from device memory and eager from the CPU are one and the same run."""

import numpy as np
import pytest
import tiny
import torch
from test_estimator_runs import MOVING
from test_trainer import calibration, examples, same_bits, weights

from zoft.config.schema import ADAPTERS, Config
from zoft.data.example import Example
from zoft.ledger.log import Ledger, Record, read_ledger
from zoft.method import masks, space
from zoft.method.estimators.named import estimator_of
from zoft.models.adapters import attach
from zoft.models.quant import linear
from zoft.noise.spec import GAUSSIAN, RADEMACHER, noise_of
from zoft.objectives.losses import collate, losses
from zoft.probe import proof, rows
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.train.batches import batch_indices
from zoft.train.trainer import Settings, Trainer

pytestmark = pytest.mark.gpu


def texts(n=12, seed=0):
    """LM examples: completions of several tokens after prompts of several lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        context = tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 4 + i % 5))
        out.append(
            Example(
                (context,), (tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 2 + i % 3)),), 0, "lm", False
            )
        )
    return out


def build(
    path,
    make,
    how,
    *,
    data,
    storage="fp16",
    compute="bf16",
    beta=0.0,
    kind="gaussian",
    accumulate=1,
    inplace=False,
    mask="none",
    train="all",
    **settings,
):
    from zoft.probe.cuda.axis import DeviceAxis
    from zoft.probe.cuda.inplace import DeviceInPlace
    from zoft.train.batches import bucket
    from zoft.train.cuda_graphs import CapturedTrainer

    model = make().cuda()
    group = {"probes_per_forward": 1} if inplace else {}
    known = {"seed": 7, "steps": 12, "lr": 1e-3, "eps": 1e-3, "batch_size": 4, "accumulate": accumulate}
    settings = Settings(**{**known, **group, **settings})
    kind, even = noise_of(kind, settings.directions), settings.directions == "example"
    trained = space.adopt(model, space.train_names(model, train))
    small, double = (b.to("cuda") for b in calibration(data))
    common = {"seed": settings.seed, "kind": kind, "beta": beta}
    if inplace:
        space.place_in_precision(model, trained, storage, storage, uniform=True)
    else:
        proved = RADEMACHER if kind == GAUSSIAN else kind
        found = proof.find_sites(
            model, trained, lambda b: losses(model, b)[0], small, double, settings.eps, proved
        )
        assert found.stacked, found.note
        trained = proof.live(trained, found)
        space.place_in_precision(model, trained, storage, compute)
    if train in ADAPTERS:
        attach.place_adapter(trained, space.DTYPES[compute])
    masks.mask_tensors(trained, mask, 0.75, settings.seed)
    if inplace:
        axis = (
            InPlace(trained, **common)
            if how == "host"
            else DeviceInPlace(trained, q=settings.q, eps=settings.eps, **common)
        )
    elif how == "plain":
        axis = ProbeAxis(trained, found.sites, **common)
    else:
        probes = estimator_of(settings).probes(settings.q, settings.eps)
        axis = DeviceAxis(
            trained,
            found.sites,
            q=settings.q,
            eps=settings.eps,
            compute=space.DTYPES[compute],
            probes=probes,
            **common,
        )

    def batches(step):
        picks = batch_indices(step, n=len(data), batch_size=4, accumulate=accumulate, seed=7)
        # In the shapes that captured steps have: other widths round differently.
        return [bucket(collate([data[i] for i in p], even=even), even).to("cuda") for p in picks]

    ledger = Ledger.create(path, {"seed": settings.seed})
    if how in ("plain", "host"):
        return Trainer(model, axis, batches, ledger, settings)
    return CapturedTrainer(
        model, axis, batches, ledger, settings, capture="" if how == "captured" else "as asked"
    )


def adapted(train, base=tiny.llama, dtype=torch.bfloat16):
    """A model on the GPU with an adapter away from its start."""
    model = attach.attach_adapter(base().cuda().to(dtype), Config(train=train))
    for i, (_, p) in enumerate(attach.named(model)):
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).cuda()
    return model


def beside_codes(base):
    """A quantised model on the GPU with LoRA pairs on all of its layers, away from their start."""
    model = base().cuda().to(torch.bfloat16)
    linear.quantise_model(model, bits=4, group=32, zero_points=True)
    model = attach.attach_adapter(model, Config(train="lora", lora_targets="all-linear"))
    for i, (_, p) in enumerate(attach.named(model)):
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).cuda()
    return model


PAIRS = {"train": "lora", "storage": "fp32", "eps": 1e-2}
make_trainer = build

CASES = [
    (lambda: adapted("lora"), examples, {**PAIRS, "q": 8, "probes_per_forward": 16, "weight_decay": 0.1}),
    (lambda: adapted("lora", tiny.gpt2), texts, {**PAIRS, "q": 9, "probes_per_forward": 18, "beta": 0.9}),
    (lambda: adapted("lora", tiny.opt, torch.float32), texts, {**PAIRS, "compute": "fp32", "accumulate": 2}),
    (lambda: beside_codes(tiny.llama), examples, {**PAIRS, "q": 4, "probes_per_forward": 8}),
    (lambda: beside_codes(tiny.gpt2), texts, {**PAIRS, "weight_decay": 0.1, "beta": 0.9}),
    (lambda: beside_codes(tiny.llama), texts, {"train": "scales", "lr": 1e-4}),
    (lambda: beside_codes(tiny.opt), examples, {"train": "scales", "lr": 1e-4, "q": 2}),
    (lambda: adapted("prefix"), examples, {**PAIRS, "train": "prefix", "q": 2, "probes_per_forward": 4}),
    # In fp32: a prompt of this model's moves its losses by less than bf16 shows, and the start asks for more.
    (
        lambda: adapted("prompt", tiny.opt, torch.float32),
        texts,
        {**PAIRS, "train": "prompt", "compute": "fp32"},
    ),
    (tiny.llama, examples, {}),
    (tiny.opt, examples, {"q": 2, "weight_decay": 0.1}),
    (tiny.gpt2, texts, {"beta": 0.9}),
    (lambda: tiny.llama(tie=True), texts, {"q": 3, "probes_per_forward": 4, "storage": "bf16"}),
    (tiny.opt, texts, {"accumulate": 2, "storage": "fp32", "compute": "fp32", "kind": "rademacher"}),
    (tiny.gemma2, examples, {"storage": "fp32", "compute": "bf16"}),
    (tiny.llama, examples, {"lr": 0.0, "weight_decay": 0.1}),
    (tiny.llama, examples, {"q": 3, "clip": 0.3, "meazo": 0.9}),
    (tiny.llama, examples, {"q": 3, "estimator": "one_sided"}),
    (tiny.llama, examples, {"q": 4, "estimator": "normalised"}),
    (
        tiny.opt,
        texts,
        {"q": 2, "estimator": "one_sided", "probes_per_forward": 1, "beta": 0.9, "weight_decay": 0.1},
    ),
    (
        tiny.gpt2,
        examples,
        {"q": 5, "estimator": "one_sided", "probes_per_forward": 6, "meazo": 0.9, "clip": 0.3},
    ),
    (
        lambda: adapted("lora"),
        examples,
        {**PAIRS, "q": 20, "estimator": "one_sided", "probes_per_forward": 21},
    ),
    (lambda: tiny.llama(tie=True), texts, {"mask": "magnitude", "estimator": "one_sided", "storage": "bf16"}),
    (tiny.llama, examples, {"q": 2, "estimator": MOVING, "accumulate": 2}),
    (tiny.llama, examples, {"inplace": True, "storage": "bf16"}),
    (tiny.opt, texts, {"inplace": True, "storage": "fp16", "q": 3, "weight_decay": 0.1, "beta": 0.9}),
    (
        lambda: tiny.llama(tie=True),
        texts,
        {"inplace": True, "storage": "fp32", "q": 2, "accumulate": 2, "meazo": 0.9},
    ),
    (lambda: tiny.llama(tie=True), examples, {"mask": "magnitude", "weight_decay": 0.1}),
    (tiny.opt, texts, {"mask": "magnitude", "storage": "bf16", "beta": 0.9, "q": 2}),
    (tiny.gpt2, examples, {"mask": "random", "storage": "fp32", "compute": "fp32"}),
    (tiny.llama, examples, {"mask": "random", "inplace": True, "storage": "bf16"}),
    (tiny.llama, examples, {"kind": "rank1"}),
    (tiny.opt, texts, {"kind": "rank1", "q": 3, "probes_per_forward": 6, "beta": 0.9, "weight_decay": 0.1}),
    (lambda: tiny.llama(tie=True), texts, {"kind": "rank1", "storage": "bf16", "accumulate": 2}),
    (
        tiny.gpt2,
        examples,
        {"kind": "rank1", "storage": "fp32", "compute": "fp32", "estimator": "one_sided", "q": 2},
    ),
    (tiny.llama, examples, {"kind": "rank1", "mask": "magnitude"}),
    (tiny.llama, texts, {"kind": "rank1", "inplace": True, "storage": "bf16"}),
    (tiny.llama, examples, {"directions": "example"}),
    (tiny.opt, texts, {"directions": "example", "kind": "rank1", "accumulate": 2, "weight_decay": 0.1}),
    (
        tiny.gpt2,
        texts,
        {"directions": "example", "kind": "rademacher", "q": 2, "storage": "fp32", "compute": "fp32"},
    ),
    (
        lambda: tiny.llama(tie=True),
        examples,
        {"directions": "example", "kind": "rank1", "probes_per_forward": 1, "beta": 0.9},
    ),
    (lambda: adapted("lora"), examples, {**PAIRS, "directions": "example", "q": 2}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_captured_eager_and_host_fed_steps_are_one_run(tmp_path, case):
    make, data, settings = CASES[case]
    settings = {"schedule": "linear", "warmup": 3, **settings}
    runs = {}
    for how in ("captured", "eager", "host"):
        trainer = build(tmp_path / how, make, how, data=data(), **settings)
        before = weights(trainer.model)
        trainer.run(until=5)
        middle = weights(trainer.model)
        trainer.run()
        runs[how] = (before, middle, weights(trainer.model), (tmp_path / how).read_bytes())
        if how == "captured":
            assert not trainer.capture and any(s.graph for s in trainer.shapes.values())
    for how in ("eager", "host"):
        assert runs["captured"][3] == runs[how][3], how
        for a, b in zip(runs["captured"][:3], runs[how][:3]):
            assert same_bits(a, b), how
    assert same_bits(runs["host"][0], runs["host"][2]) == (settings.get("lr") == 0.0)
    if settings.get("inplace"):
        assert same_bits(runs["host"][2], replayed(tmp_path / "host", make, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_end_to_end_against_the_plain_probe_axis(tmp_path, dtype):
    values = []
    compute = "fp32" if dtype == torch.float32 else "bf16"
    for how in ("captured", "plain"):
        trainer = build(
            tmp_path / how, lambda: adapted("lora", dtype=dtype), how, data=examples(), steps=3, lr=0.0,
            **{**PAIRS, "compute": compute, "q": 4, "probes_per_forward": 8},
        )  # fmt: skip
        if how == "captured":
            (pack,) = trainer.axis.packs
            assert (
                len(pack.ids) == 8 and pack.decays and (pack.narrow is not None) == (dtype == torch.bfloat16)
            )
        trainer.run()
        values.append([r.losses for r in trainer.ledger.records])
    np.testing.assert_allclose(*values, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("storage,compute", [("fp32", "fp32"), ("fp16", "bf16")])
def test_against_the_plain_probe_axis(tmp_path, storage, compute):
    """Without fused norms and batched small tensors: the same losses within rounding."""
    for make in (tiny.llama, tiny.opt, tiny.gemma2):
        values = []
        for how in ("captured", "plain"):
            name = f"{how}-{make.__name__}"
            trainer = build(
                tmp_path / name, make, how, data=examples(), storage=storage, compute=compute, steps=3, lr=0.0
            )
            trainer.run()
            values.append([r.losses for r in trainer.ledger.records])
        tolerance = 1e-5 if compute == "fp32" else 0.05
        np.testing.assert_allclose(values[0], values[1], rtol=tolerance)


@pytest.mark.parametrize(
    "inplace,more",
    [
        (False, {}),
        (True, {}),
        (False, {"estimator": "one_sided", "q": 3}),
        (False, {"estimator": "one_sided", "q": 3, "meazo": 0.9}),
        (False, {"estimator": MOVING, "q": 3}),
        (False, {"kind": "rank1"}),
        (False, {"kind": "rank1", "directions": "example"}),
        (False, {"directions": "example"}),
    ],
)
def test_resume_and_replay_end_with_the_same_bits(tmp_path, inplace, more):
    def build(*args, **rest):
        return make_trainer(*args, inplace=inplace, storage="fp16", **more, **rest)

    whole = build(tmp_path / "whole", tiny.opt, "captured", data=examples(), beta=0.9)
    whole.run()
    end = weights(whole.model)
    part = build(tmp_path / "part", tiny.opt, "captured", data=examples(), beta=0.9)
    part.run(until=7)
    part.ledger.close()
    again = build(tmp_path / "unused", tiny.opt, "captured", data=examples(), beta=0.9)
    again.ledger = Ledger.open(tmp_path / "part")
    again.replay(list(again.ledger.records))
    again.run()
    assert same_bits(end, weights(again.model))
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    replayed = build(tmp_path / "replayed", tiny.opt, "captured", data=examples(), beta=0.9)
    replayed.replay(read_ledger(tmp_path / "whole")[1])
    assert same_bits(end, weights(replayed.model))


@pytest.mark.parametrize("mask", ["none", "magnitude", "random"])
@pytest.mark.parametrize("policy", ["probes", "inplace"])
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_a_ledger_gives_the_same_bits_on_both_devices(tmp_path, storage, policy, mask):
    """Signs as noise; masks, momentum, the cycle of perturb=inplace, skipped steps: replayed here and there."""
    if policy == "inplace" and mask == "magnitude":
        pytest.skip("refused")
    records = []
    for step in range(30):
        multipliers = (0.01 * (step % 3 - 1), 0.003)
        skipped = step in (4, 11)
        records.append(
            Record(
                step,
                (0.0, 0.0) if skipped else multipliers,
                1.0 if skipped else 0.875,
                (0.0,) * 4,
                skipped,
                0.01,
            )
        )
    ends = []
    for place in ("cpu", "cuda"):
        model = tiny.llama(tie=True).to(place)
        trained = space.adopt(model, space.train_names(model, "all"))
        space.place_in_precision(model, trained, storage, storage, uniform=policy == "inplace")
        masks.mask_tensors(trained, mask, 0.75, 7)
        common = {"seed": 7, "kind": "rademacher", "beta": 0.9}
        axis = InPlace(trained, **common) if policy == "inplace" else ProbeAxis(trained, [], **common)
        Trainer(
            model, axis, lambda step: [], None, Settings(seed=7, steps=30, lr=0.01, eps=1e-2, q=2)
        ).replay(records)
        ends.append({n: p.detach().cpu() for n, p in model.named_parameters()})
    assert same_bits(*ends)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_that_is_not_finite_is_skipped_on_the_device(tmp_path, inplace):
    trainer = build(tmp_path / "l", tiny.llama, "eager", data=examples(), lr=1e-2, inplace=inplace)
    plain = trainer.forward

    def forward(model, batch):
        sums, counts = plain(model, batch)
        return (sums * float("inf") if trainer.next in (3, 4) else sums), counts

    trainer.forward = forward
    trainer.run(until=3)
    before = weights(trainer.model)
    trainer.run(until=5)
    assert inplace or same_bits(before, weights(trainer.model))
    trainer.run()
    assert same_bits(weights(trainer.model), replayed(tmp_path / "l", tiny.llama, inplace=inplace))
    assert [r.skipped for r in trainer.ledger.records] == [i in (3, 4) for i in range(12)]


def replayed(path, make, **settings):
    trainer = build(path.with_name("replayed"), make, "captured", data=examples(), **settings)
    trainer.replay(read_ledger(path)[1])
    return weights(trainer.model)


@pytest.mark.parametrize("probe", [0, 1, 2, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_exception_leaves_the_weights_that_the_ledger_tells(tmp_path, inplace, probe):
    """In any forward of a step. In place, what the broken step has moved is moved back, which rounds."""
    storage = {"inplace": inplace, "storage": "fp32" if inplace else "fp16", "q": 2}
    trainer = build(tmp_path / "l", tiny.llama, "eager", data=examples(), probes_per_forward=1, **storage)
    calls = [0]
    plain = trainer.forward

    def forward(model, batch):
        calls[0] += trainer.next == 6
        if calls[0] == probe + 1:
            raise ValueError("in mid-run")
        return plain(model, batch)

    trainer.forward = forward
    with pytest.raises(ValueError):
        trainer.run()
    assert len(trainer.ledger.records) == 6
    again = replayed(tmp_path / "l", tiny.llama, **storage)
    if not inplace:
        assert same_bits(weights(trainer.model), again)
    for name, w in weights(trainer.model).items():
        torch.testing.assert_close(w, again[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("how", ["captured", "eager"])
def test_a_batch_that_cannot_be_stacked_gets_one_probe_a_forward(tmp_path, how):
    trainer = build(tmp_path / "l", tiny.llama, how, data=examples())
    plain = trainer.forward

    def forward(model, batch):
        if trainer.next >= 6 and trainer.settings.probes_per_forward > 1:
            raise rows.Unfit("rows of an odd kind")
        return plain(model, batch)

    trainer.run(until=6)
    trainer.forward = forward
    trainer.shapes.clear()
    trainer.run()
    assert trainer.settings.probes_per_forward == 1 and len(trainer.ledger.records) == 12
    assert same_bits(weights(trainer.model), replayed(tmp_path / "l", tiny.llama))


@pytest.mark.parametrize("kind", ["layer", "rms", "rms1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_kernel(kind, dtype):
    from zoft.probe.cuda import norms

    for width in (16, 100, 768, 5120):
        x = torch.randn(6, 5, width, device="cuda").to(dtype) * 3 + 1
        w, b = torch.randn(2, 3, 2 * width, device="cuda")[:, :, :width]
        bias = b if kind == "layer" else None
        y = norms.norm(x, w, bias, 1e-5, kind)
        for p in range(3):
            want = norms.reference(x[2 * p : 2 * p + 2], w[p], None if bias is None else bias[p], 1e-5, kind)
            got = y[2 * p : 2 * p + 2].double()
            assert float((got - want).norm() / want.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("keys", [{}, {"clip": 0.5}, {"meazo": 0.9}, {"meazo": 0.9, "clip": 0.5}])
@pytest.mark.parametrize("name", ["two_sided", "one_sided"])
def test_estimators_give_the_same_bits_on_both_devices(name, keys):
    for q in (1, 2, 3, 7, 66):
        settings = Settings(seed=0, steps=1, lr=1.0, eps=1e-3, q=q, estimator=name, **keys)
        e, ends = estimator_of(settings), []
        for place in ("cpu", "cuda"):
            rng, eps = np.random.default_rng(q), torch.tensor(1e-3, dtype=torch.float64, device=place)
            state, found = eps.new_tensor(e.state), []
            for _ in range(5):
                losses = torch.from_numpy(rng.normal(2.0, 1e-3, e.count(q))).to(place)
                c, state = e.run(losses, q, eps, state)
                found += [*c.tolist(), *state.tolist()]
            ends.append(found)
        assert ends[0] == ends[1], q


def test_in_place_one_sided_runs_are_eager_and_replay(tmp_path):
    from zoft.train import axis as setup_axis

    ends, batch = [], collate(examples()[:4]).to("cuda")
    config = Config(
        model="tiny", estimator="one_sided", q=2, eps=1e-3, lr=1e-3, device="cuda", storage="bf16", compute="bf16",
        perturb="inplace",
    )  # fmt: skip
    for name in ("run", "replay"):
        model = tiny.llama().cuda()
        trained = space.adopt(model, space.train_names(model, "all"))
        config, trained, axis = setup_axis.placed_axis(config, model, trained)
        assert type(axis) is InPlace
        settings = Settings(
            seed=0, steps=6, lr=1e-3, eps=1e-3, q=2, estimator="one_sided", probes_per_forward=1
        )
        ledger = Ledger.create(tmp_path / name, {"seed": 0})
        trainer = Trainer(model, axis, lambda step: [batch], ledger, settings)
        if name == "run":
            trainer.run()
        else:
            trainer.replay(read_ledger(tmp_path / "run").records)
        ends.append(weights(model))
    assert same_bits(*ends)
