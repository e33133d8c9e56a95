"""Sparse-MeZO: thresholds against sorting, runs against a slow twin that keeps its masks, resume and replay."""

import copy

import noise_twin as twin
import numpy as np
import pytest
import tiny
import torch
from test_trainer import build, same_bits, weights
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.ledger.log import Ledger, read_ledger
from zoft.method import masks, precision, space
from zoft.noise import noise
from zoft.noise.spec import Mask
from zoft.objectives.losses import losses
from zoft.probe.axis import ProbeAxis


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_kth_smallest_is_that_of_a_sort(dtype, monkeypatch):
    monkeypatch.setattr(masks, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 999, 5003):
        x = (
            torch.randn(n, generator=generator) * 10.0 ** torch.randint(-8, 3, (n,), generator=generator)
        ).to(dtype)
        x[: n // 5] = x[0]  # ties
        x[n // 2 :: 7] = 0.0
        size = np.sort(np.abs(x.double().numpy()))
        for k in {1, n // 4 + 1, n // 2 + 1, n}:
            h, count = masks.kth_smallest(x, k)
            near = np.float32(size[k - 1])
            above = near if near >= size[k - 1] else np.nextafter(near, np.float32(np.inf))
            assert h == above and count == (size <= h).sum() >= k
            moving = noise.moving(x, 1, Mask(threshold=h))
            assert int(moving.sum()) == count


@pytest.mark.parametrize("kind", ["magnitude", "random"])
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.8])
def test_every_matrix_has_its_share_and_1d_tensors_move_whole(kind, storage, sparsity):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:] = torch.randn(24, 16) * 1e-6  # subnormal in fp16
        model.lm_head.weight[:, :8] = 0.5
    trained = space.adopt(model, space.train_names(model, "all"))
    space.place_in_precision(model, trained, storage, "fp32")
    said = masks.mask_tensors(trained, kind, sparsity, seed=3)
    total = moves = 0
    for t in trained:
        on = noise.moving(t.stored, t.id, t.mask)
        if t.stored.ndim == 1:
            assert t.mask is None and on.all()
            continue
        n, share = on.numel(), on.double().mean().item()
        total, moves = total + n, moves + int(on.sum())
        if kind == "random":
            assert abs(share - (1 - sparsity)) < 4 * (sparsity * (1 - sparsity) / n) ** 0.5
            continue
        size = t.stored.float().abs()
        assert torch.equal(on, size <= t.threshold) and (size == t.threshold).any()
        tied = int((size == t.threshold).sum()) - 1
        assert -0.5 <= n * (share - (1 - sparsity)) <= tied + 0.5
        assert abs(share - (1 - sparsity)) < 0.01 + tied / n
    told = moves / total if kind == "magnitude" else 1 - sparsity
    assert f"{told:.1%} of the {total:,} numbers" in said[0]
    if storage == "fp32":  # half of lm_head is one number, which is among the smaller ones
        assert ("lm_head.weight (9" in said[-1]) == (kind == "magnitude" and sparsity == 0.5)
    assert not masks.mask_tensors(trained, "none", sparsity, 3) and not masks.mask_tensors(
        trained, kind, 0.0, 3
    )
    assert all(t.mask is None for t in trained)
    (line,) = masks.mask_tensors([t for t in trained if t.stored.ndim == 1], kind, sparsity, 3)
    assert "no matrix is trained" in line


@pytest.mark.parametrize("storage, beta, kind", [
    ("fp32", 0.0, "rademacher"), ("fp16", 0.0, "rademacher"), ("bf16", 0.0, "rademacher"),
    ("fp16", 0.9, "rademacher"), ("fp32", 0.9, "gaussian"), ("bf16", 0.0, "gaussian"),
])  # fmt: skip
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_fifty_steps_are_those_of_a_twin_that_keeps_its_masks(tmp_path, mask, storage, beta, kind):
    """θ of its own, a mask made at the start of each step and used for both probes and the update, decay within it.

    Signs: every weight equal. Gaussian: z to 1e-6, so that weights are equal within fp32's rounding, and 16 bits rarely
    fall to the other side. The losses are of a plain model that holds θ ± eps·m∘z.
    """
    model = tiny.llama(tie=True)
    plain = copy.deepcopy(model)
    run = build(
        tmp_path, model, storage=storage, mask=mask, beta=beta, kind=kind, steps=50, lr=1e-2, weight_decay=0.3,
        schedule="linear", eps=1e-2,
    )  # fmt: skip
    tensors = {t.name: (t, twin.numbers(t.stored).astype(np.float32)) for t in run.axis.trained}
    params = dict(plain.named_parameters())
    buffers = {n: np.zeros_like(v) for n, (_, v) in tensors.items()}
    theta = {n: v for n, (_, v) in tensors.items()}
    first = {}
    run.run(until=50)
    for record in read_ledger(tmp_path / "ledger").records:
        step, moving, z = record.step, {}, {}
        for n, (t, _) in tensors.items():
            index = np.arange(len(theta[n]))
            moving[n] = np.full(len(index), True)
            if t.stored.ndim > 1 and mask == "magnitude":
                h = np.sort(np.abs(tensors[n][1]))[round(0.25 * len(index)) - 1]
                moving[n] = np.abs(theta[n]) <= h
            elif t.stored.ndim > 1:
                moving[n] = twin.chosen(index, t.id, 7, 16384)
            first.setdefault(n, moving[n])
            z[n] = twin.z(index, t.id, twin.key(7, step, 0), kind).astype(np.float32)
        if step % 10 == 0:
            for sign, loss in zip((1, -1), record.losses, strict=True):
                for n, (t, _) in tensors.items():
                    probe = np.where(moving[n], theta[n] + np.float32(sign * 1e-2) * z[n], theta[n])
                    params[n].data = torch.from_numpy(probe).view(t.stored.shape)
                sums, counts = losses(plain, run.batches(step)[0])
                assert float(sums.sum() / counts.sum()) == pytest.approx(
                    loss, rel=1e-4 if kind == "gaussian" else 2e-6
                )
        (m,) = record.multipliers
        for n, (t, _) in tensors.items():
            s = np.where(moving[n], np.float32(m) * z[n], np.float32(0))
            if beta:
                s = buffers[n] = np.float32(beta) * buffers[n] + s
            a = (np.float32(record.decay) * theta[n] if t.decays else theta[n]) + s
            if t.stored.itemsize == 2:
                bits = twin.rounding_bits(np.arange(len(a)), t.id, twin.key(7, step, 0))
                a = twin.round_stochastic(a, bits, t.stored.dtype).astype(np.float32)
            theta[n] = np.where(moving[n], a, theta[n])
    crossed = 0
    for n, (t, start) in tensors.items():
        got = twin.numbers(t.stored)
        if kind == "rademacher":
            assert np.array_equal(got, theta[n]), n
        elif t.stored.itemsize == 2:
            assert (got == theta[n]).mean() > 0.99, n
        else:
            assert (np.abs(got - theta[n]) < 2e-6).mean() > 0.99, (
                n
            )  # what is near h may fall to either side of it
        crossed += int((moving[n] != first[n]).sum())
        assert (got[~first[n]] != start[~first[n]]).sum() == 0 or mask == "magnitude"
    # Members come and go by magnitude; at random they never do.
    assert (crossed > 20) == (mask == "magnitude"), crossed


@pytest.mark.parametrize(
    "policy, mask", [("probes", "magnitude"), ("probes", "random"), ("inplace", "random")]
)
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_resumed_and_replayed_runs_end_with_the_same_bits(tmp_path, policy, mask, storage):
    same = {"policy": policy, "mask": mask, "storage": storage, "compute": storage, "q": 2, "beta": 0.9}
    whole = build(tmp_path, tiny.llama(tie=True), name="whole", weight_decay=0.1, **same)
    whole.run()
    end = weights(whole.model)
    for stop in (0, 4, 10):
        part = build(tmp_path, tiny.llama(tie=True), name=f"stop{stop}", weight_decay=0.1, **same)
        part.run(until=stop)
        part.ledger.close()
        again = Ledger.open(tmp_path / f"stop{stop}")
        resumed = build(tmp_path, tiny.llama(tie=True), opened=again, weight_decay=0.1, **same)
        resumed.replay(list(again.records))
        resumed.run()
        again.close()
        assert same_bits(end, weights(resumed.model)), stop
        assert (tmp_path / f"stop{stop}").read_bytes() == (tmp_path / "whole").read_bytes()
    plain = build(tmp_path, tiny.llama(tie=True), name="plain", weight_decay=0.1, **{**same, "mask": "none"})
    plain.run()
    assert not same_bits(end, weights(plain.model))


def test_lr_0_leaves_every_bit_and_what_stays_is_never_written(tmp_path):
    for mask in ("magnitude", "random"):
        run = build(
            tmp_path,
            tiny.opt(),
            name=f"lr0-{mask}",
            storage="fp16",
            mask=mask,
            lr=0.0,
            weight_decay=0.1,
            steps=20,
        )
        with torch.no_grad():
            run.axis.trained[0].stored.view(-1)[:5] = -0.0
        before = weights(run.model)
        run.run()
        assert same_bits(before, weights(run.model))


def test_the_realised_direction_is_looked_at_where_it_moves():
    model = tiny.llama()
    trained = space.adopt(model, space.train_names(model, "all"))
    space.place_in_precision(model, trained, "fp16", "bf16")
    bare = precision.realised_cosines(trained, 1e-3, seed=0, kind="gaussian")
    for kind in ("magnitude", "random"):
        masks.mask_tensors(trained, kind, 0.75, 0)
        found = precision.realised_cosines(trained, 1e-3, seed=0, kind="gaussian")
        for t in trained:
            if (
                t.mask is not None and kind == "magnitude"
            ):  # small weights take a probe better than large ones
                assert found[t.name] > bare[t.name] and found[t.name] > 0.9
            elif t.mask is not None:
                assert abs(found[t.name] - bare[t.name]) < 0.2


@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_and_heads_that_make_rows_only_see_the_mask(tie, tmp_path):
    run = build(tmp_path, tiny.llama(tie=tie), mask="magnitude", train="embed_tokens|lm_head", eps=0.1)
    assert isinstance(run.axis, ProbeAxis)
    t = next(t for t in run.axis.trained if "embed" in t.name)
    rows = torch.arange(len(t.stored)).expand(2, -1)
    made = run.axis.gathered(t, rows, [(0, 0.1), (0, -0.1)], 0)
    for probe, scale in zip(made, (0.1, -0.1)):
        z = noise.direction(t.stored.shape, t.id, seed=7, step=0, direction=0, noise="gaussian")
        on = t.stored.abs() <= t.threshold
        assert torch.equal(probe, torch.where(on, t.stored + torch.tensor(scale) * z, t.stored))
        assert 0.2 < on.double().mean() < 0.3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    tiny.save(folder / "tiny")
    tiny.write_rows(folder / "data.jsonl")
    return folder


@pytest.mark.parametrize("keys, said", [
    ([], "mask=magnitude: 25.0% of the"), (["mask=random", "storage=bf16"], "mask=random: 25.0% of the"),
    (["storage=bf16"], "mask=magnitude: 2"),
    (["mask=random", "perturb=inplace"], "perturb=inplace"), (["mask=none"], ""),
])  # fmt: skip
def test_train_and_replay_from_the_command_line(place, keys, said, monkeypatch):
    monkeypatch.chdir(place)
    out = f"runs/{'-'.join(keys) or 'plain'}".replace("=", "")
    command = [
        "train",
        "recipe=sparse_mezo",
        "model=tiny",
        "task=local",
        "task.train=data.jsonl",
        "task.prompt={text}",
    ]
    command += [
        "task.label=label",
        "task.choices={a: no, b: yes}",
        "steps=6",
        "lr=0.01",
        "threads=1",
        f"output_dir={out}",
    ]
    done = CliRunner().invoke(app, [*command, *keys])
    assert done.exit_code == 0, done.output + done.stderr
    assert said in done.stderr
    done = CliRunner().invoke(app, ["replay", out, "--out", f"{out}-again"])
    assert done.exit_code == 0, done.output + done.stderr
    files = [(place / f / "model.safetensors").read_bytes() for f in (f"{out}/model", f"{out}-again")]
    assert files[0] == files[1] != (place / "tiny" / "model.safetensors").read_bytes()
    done = CliRunner().invoke(app, ["replay", out, "--out", f"{out}-denoised", "--denoise"])
    if "storage=bf16" in keys and "mask=random" in keys:
        assert done.exit_code == 0 and "6 steps" in done.output, done.output + done.stderr
    else:
        why = (
            "there is no rounding"
            if "storage=bf16" not in keys and keys
            else "what moves depends on the weights"
        )
        assert done.exit_code == 2 and why in done.stderr
