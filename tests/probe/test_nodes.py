"""Node perturbation: against autograd, a slow NumPy twin, itself in microbatches, and any order, padding and grouping."""

import copy

import noise_twin
import numpy as np
import pytest
import tiny
import torch
import transformers as hf

from zoft.data.example import Example
from zoft.method import space
from zoft.method.estimators.estimator import Probe
from zoft.noise import nodes as signs
from zoft.noise.spec import NODE, Update
from zoft.objectives.losses import collate, losses
from zoft.probe import nodes, proof
from zoft.probe.nodes import NodeAxis, layers_of
from zoft.probe.whiten import Whitener, measure, whitener_of
from zoft.train.axis import calibration
from zoft.train.node_trainer import rows_with_tokens

SEED, STEP = 7, 3


def bert():
    config = hf.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return tiny.build(hf.BertForMaskedLM, config)


MODELS = {"llama": tiny.llama, "opt": tiny.opt, "gpt2": tiny.gpt2, "bert": bert}


def examples(n=6, candidates=1, masked=False, objective="choice", seed=0):
    """Rows of several lengths; with candidates > 1, several rows per example that share a prompt."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        context = tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 3 + i % 4))
        after = (2,) if masked else ()
        if candidates == 1:
            out.append(Example((context, context), ((5,), (9,)), int(rng.integers(2)), objective, objective == "choice",
                               masked=masked, after=after))  # fmt: skip
        else:
            some = tuple(
                (5 + c, *(int(t) for t in rng.integers(3, tiny.VOCAB, c + 1))) for c in range(candidates)
            )
            out.append(Example((context,) * candidates, some, i % candidates, objective))
    return out


def axis_of(model, train, data, eps=1e-2):
    names = space.train_names(model, train, True)
    trained = space.adopt(model, names)
    device = next(model.parameters()).device
    two = (b.to(device) for b in calibration(data))
    found = proof.find_sites(model, trained, lambda b: losses(model, b)[0], *two, eps)
    for t in trained:
        t.compute = t.stored.dtype
    return NodeAxis(model, layers_of(trained, found), seed=SEED)


def node_losses(axis, rows, probes):
    axis.tokens = rows.tokens
    with torch.no_grad(), axis.at(STEP, probes, rows.batch.rows):
        sums, _ = losses(axis.model, rows.batch.repeat(len(probes)))
    axis.tokens = None
    return sums.view(len(probes), -1)


def hadamard(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
@pytest.mark.parametrize("whitened", [False, True])
def test_the_mean_estimate_is_the_gradient(name, whitened, monkeypatch):
    """Over a full Hadamard set of u the mean of Ĝ is autograd's gradient (times P), up to eps²."""
    model = MODELS[name]().double()
    data = examples(2, masked=name == "bert")
    axis = axis_of(model, PATTERN[name], data)
    rows = rows_with_tokens(data, [0, 1], "cpu")
    batch, n = rows.batch, len(data)
    p = {}
    for i, layer in enumerate(axis.layers):
        width = layer.trained.stored.shape[1]
        a = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        layer.whitener = whitener_of(a @ a.T, 0.1, 4) if whitened else None
        p[layer.name] = (
            layer.whitener.apply(torch.eye(width, dtype=torch.float64))
            if whitened
            else torch.eye(width, dtype=torch.float64)
        )
        layer.sigma = 0.5 + i
    cells = [(layer.name, layer.units) for layer in axis.layers]
    count = len(rows.tokens.places)
    total = sum(m for _, m in cells) * count
    h = hadamard(1 << (total - 1).bit_length())
    offsets, at = {}, 0
    for layer in axis.layers:
        offsets[layer.trained.id] = at
        at += layer.units * count
    now = [0]
    monkeypatch.setattr(
        nodes, "node_signs",
        lambda tokens, m, tid, seed, step: h[now[0], offsets[tid] : offsets[tid] + m * len(tokens.places)].view(-1, m).clone(),
    )  # fmt: skip
    # One forward per u is slow; the inputs of the update pass do not depend on u.
    eps, mean = 3e-3, {layer.name: 0.0 for layer in axis.layers}
    xs = {}
    with (
        torch.no_grad(),
        axis._hooked(
            lambda layer, args, out: xs.__setitem__(layer.name, args[0].reshape(-1, args[0].shape[-1]))
        ),
    ):
        losses(model, batch)
    for r in range(len(h)):
        now[0] = r
        s = node_losses(axis, rows, [Probe(0, eps), Probe(0, -eps)])
        c = (s[0] - s[1]) / (2 * eps * n)
        for layer in axis.layers:
            mean[layer.name] = mean[layer.name] + axis.gradient(
                layer, xs[layer.name], rows.tokens, c, STEP
            ) / len(h)
    monkeypatch.undo()
    for layer in axis.layers:
        layer.module.weight.requires_grad_(True)
    (losses(model, batch)[0].sum() / n).backward()
    for layer in axis.layers:
        want = layer.module.weight.grad @ p[layer.name]
        off = float((mean[layer.name] - want).norm() / want.norm())
        assert off < 2e-3, (layer.name, off)  # norms of these models round to fp32


PATTERN = {
    "llama": r"layers\.1\.(mlp\.down|self_attn\.v)_proj",
    "opt": r"layers\.1\.(fc2|self_attn\.v_proj)\.weight",
    "bert": r"layer\.1\.(attention\.self\.value|output\.dense)\.weight",
}


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("objective", ["choice", "lm"])
def test_the_last_tokens_are_the_scored_ones_and_those_before(candidates, objective):
    """Against a row-by-row count; outputs at all other tokens are the clean model's."""
    data = examples(5, candidates, objective=objective)
    rows = rows_with_tokens(data, range(5), "cpu", before=2)
    width = rows.batch.inputs["input_ids"].shape[1]
    want = []
    for r, mask in enumerate(rows.batch.inputs["attention_mask"]):
        scored = [int(p) % width for p in rows.batch.positions if int(p) // width == r]
        want += [r * width + t for t in range(max(0, min(scored) - 1), max(scored) + 1) if mask[t]]
    assert rows.tokens.places.tolist() == want
    whole = rows_with_tokens(data, range(5), "cpu").tokens
    drawn = signs.node_signs(whole, 40, 7, 1, 2)[torch.isin(whole.places, rows.tokens.places)]
    assert torch.equal(drawn, signs.node_signs(rows.tokens, 40, 7, 1, 2))
    model = tiny.llama().double()
    axis = axis_of(model, PATTERN["llama"], data)
    layer, seen = axis.layers[0], []
    with (
        axis._hooked(lambda one, a, out: seen.append(out.clone()) if one is layer else None),
        torch.no_grad(),
    ):
        losses(model, rows.batch)
    axis.tokens = rows.tokens
    with torch.no_grad(), axis.at(STEP, [Probe(0, 1e-2)], rows.batch.rows):
        handle = layer.module.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        losses(model, rows.batch)
        handle.remove()
    moved = (seen[0] != seen[1]).any(-1).flatten().nonzero()[:, 0]
    assert set(want) >= set(moved.tolist()) and len(moved)


def test_signs_are_those_of_the_specification():
    tokens = signs.Tokens(
        *(torch.tensor(x) for x in ([0, 1, 5], [3, 3, 2**31 - 1], [0, 2, 0], [0, 7, 2**18 - 1], [0, 0, 1]))
    )
    tid = 2**32 - 9
    u = signs.node_signs(tokens, 300, tid, SEED, STEP)
    for t in range(3):
        row, part, position = (int(x[t]) for x in (tokens.rows, tokens.parts, tokens.positions))
        key = noise_twin.key(SEED, STEP, part)
        for i in (0, 31, 32, 127, 128, 299):
            c = row * 2**32 + position * 2**14 + i // 128
            word = noise_twin.philox((c % 2**32, c // 2**32, tid, NODE), key)[i % 128 // 32]
            assert u[t, i] == (1 if int(word) >> (i % 32) & 1 else -1)
    keys = torch.tensor([noise_twin.key(SEED, STEP, int(p)) for p in tokens.parts])
    assert torch.equal(u, signs._signs_by_torch(tokens.rows, tokens.positions, keys, 300, tid))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_pass_is_a_slow_twins(name):
    """One update pass of every layer against loops in NumPy over the inputs that a plain forward shows."""
    model = MODELS[name]().double()
    data = examples(5, masked=name == "bert")
    axis = axis_of(model, "upper", data)
    picks = [4, 9, 2, 11, 0]
    rows = rows_with_tokens(data, picks, "cpu")
    before, xs = copy.deepcopy(model), {}
    for layer in axis.layers:
        layer.sigma = 0.7
        c = torch.eye(
            len(layer.trained.stored.T if not layer.turned else layer.trained.stored), dtype=torch.float64
        )
        layer.whitener = whitener_of(c.cumsum(1) @ c.cumsum(1).T, 0.1, 3)
    # The layers move as they are passed: inputs of later ones are those of the old weights.
    with (
        torch.no_grad(),
        axis._hooked(
            lambda layer, args, out: xs.__setitem__(
                layer.name, args[0].reshape(-1, args[0].shape[-1]).numpy().copy()
            )
        ),
    ):
        losses(model, rows.batch)
    c = (0.3, -0.5, 0.25, 1.0, -0.125)
    change = Update(STEP, SEED, tuple(-x for x in c), decay=0.96875, lr=float(np.float32(1e-3)))
    axis.update(change, [(rows.batch.inputs, rows.tokens)])
    mask = rows.batch.inputs["attention_mask"].numpy()
    old = dict(before.named_parameters())
    for layer in axis.layers:
        x = xs[layer.name].reshape(*mask.shape, -1)
        u = signs.node_signs(rows.tokens, layer.units, layer.trained.id, SEED, STEP).numpy()
        w = layer.whitener
        p = (
            float(w.mean) * np.eye(x.shape[-1])
            + w.vectors.numpy() @ np.diag(w.gains.numpy()) @ w.vectors.numpy().T
        )
        g, at = np.zeros((layer.units, x.shape[-1])), 0
        for i in range(mask.shape[0]):
            for t in range(mask.shape[1]):
                if mask[i, t]:
                    g += c[i] / 0.7 * np.outer(u[at], p @ x[i, t])
                    at += 1
        assert at == len(u)
        step = change.lr * g / np.sqrt((g**2).mean())
        want = change.decay * old[layer.trained.name].numpy() - (step.T if layer.turned else step)
        np.testing.assert_allclose(layer.trained.stored.numpy(), want, rtol=1e-9, atol=1e-12)
    moved = {layer.trained.name for layer in axis.layers}
    assert all(torch.equal(p, old[n]) for n, p in model.named_parameters() if n not in moved)
    assert moved == set(space.linear_matrices(model)) & {n for n in old if ".1." in n}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_microbatches_move_as_all_rows_at_once(name, dtype):
    data = examples(6, masked=name == "bert")
    change = Update(STEP, SEED, (0.3, -0.5, 0.25, 1.0, -0.125, 0.7), lr=float(np.float32(1e-2)))
    ends = []
    for parts in ([range(6)], [range(2), range(2, 4), range(4, 6)]):
        model = MODELS[name]().to(dtype)
        axis = axis_of(model, "upper", data)
        some = [rows_with_tokens([data[i] for i in part], list(part), "cpu") for part in parts]
        axis.update(change, [(r.batch.inputs, r.tokens) for r in some])
        ends.append([layer.trained.stored.double() for layer in axis.layers])
    start = dict(MODELS[name]().to(dtype).named_parameters())
    for layer, a, b in zip(axis.layers, *ends, strict=True):
        moved = float((a - start[layer.trained.name].double()).norm())
        off = float((a - b).norm())
        assert moved > 0 and off <= (1e-9 if dtype == torch.float64 else 0.15) * moved, (off, moved)


def test_an_error_in_one_microbatch_ends_the_pass():
    data = examples(4)
    axis = axis_of(tiny.llama().double(), "upper", data)
    some = [rows_with_tokens(data[i : i + 2], [i, i + 1], "cpu") for i in (0, 2)]
    some[1].batch.inputs["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError):
        axis.update(Update(0, SEED, (1.0,) * 4, lr=0.1), [(r.batch.inputs, r.tokens) for r in some])


@pytest.mark.parametrize("candidates", [1, 3])
def test_padding_order_and_grouping_do_not_matter(candidates):
    model, data = tiny.llama().double(), examples(6, candidates)
    axis = axis_of(model, "upper", data)
    probes = [Probe(0, 0.05), Probe(0, -0.05)]
    whole = node_losses(axis, rows_with_tokens(data, range(6), "cpu"), probes)
    lone = torch.cat(
        [node_losses(axis, rows_with_tokens([e], [i], "cpu"), probes) for i, e in enumerate(data)], 1
    )
    torch.testing.assert_close(whole, lone, rtol=1e-10, atol=1e-12)  # no padding, any batch
    order = [3, 0, 5, 1, 4, 2]
    turned = node_losses(axis, rows_with_tokens([data[i] for i in order], order, "cpu"), probes)
    torch.testing.assert_close(whole[:, order], turned, rtol=1e-10, atol=1e-12)
    each = torch.cat([node_losses(axis, rows_with_tokens(data, range(6), "cpu"), [p]) for p in probes])
    torch.testing.assert_close(whole, each, rtol=1e-10, atol=1e-12)
    assert float((whole[0] - whole[1]).abs().min()) > 1e-4
    clean = losses(model, collate(data))[0]
    assert float((whole[0] - clean).abs().min()) > 1e-5


def test_padding_on_the_left_has_the_same_noise():
    data = examples(4)
    batch = collate(data)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    left = {
        k: torch.stack([r.roll(int((1 - m).sum())) for r, m in zip(v, mask)])
        for k, v in (("input_ids", ids), ("attention_mask", mask))
    }
    wide = [max(map(len, e.contexts)) + 1 for e in data]
    a, b = (
        nodes.tokens_of(x, range(4), range(4), [0] * 4, wide, batch.positions) for x in (batch.inputs, left)
    )
    assert torch.equal(signs.node_signs(a, 40, 5, 1, 2), signs.node_signs(b, 40, 5, 1, 2))
    assert not torch.equal(a.places, b.places)


def test_candidates_share_the_noise_of_their_prompt_alone():
    rows = rows_with_tokens(examples(2, 3), [8, 9], "cpu")
    t, u = rows.tokens, signs.node_signs(rows.tokens, 64, 5, 1, 2)
    by_row = rows.batch.inputs["attention_mask"].sum(1).tolist()
    first, second, third = u[: sum(by_row[:3])].split(by_row[:3])
    prompt = int((t.parts[: by_row[0]] == 0).sum())
    assert prompt == 3 and torch.equal(first[:prompt], second[:prompt])
    assert not torch.equal(first[prompt], second[prompt]) and not torch.equal(second[prompt], third[prompt])


def test_whiteners_invert_what_they_are_given():
    a = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = a @ a.T
    p = torch.linalg.inv(c + 0.1 * c.trace() / 20 * torch.eye(20, dtype=torch.float64))
    p *= 20 / (p @ c).trace()
    got = whitener_of(c, 0.1, 20).apply(torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(got, p, rtol=1e-9, atol=1e-12)
    few = whitener_of(c, 0.1, 5)
    whole = few.apply(torch.eye(20, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(c)
    values[:15] = values[:15].mean()
    d = vectors @ torch.diag(values) @ vectors.T
    q = torch.linalg.inv(d + 0.1 * c.trace() / 20 * torch.eye(20, dtype=torch.float64))
    q *= 20 / (q @ c).trace()
    torch.testing.assert_close(whole, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_layers_are_measured_on_valid_tokens(name, monkeypatch):
    model, data = MODELS[name]().double(), examples(6, masked=name == "bert")
    axis = axis_of(model, "upper", data)
    layers = [(layer.name, layer.module) for layer in axis.layers]
    batches = []
    for picks in ([0, 1, 2, 3], [4, 5]):
        rows = rows_with_tokens([data[i] for i in picks], picks, "cpu")
        batches.append((rows.batch, rows.tokens.places, len(picks)))
    found = measure(layers, batches, lambda b: losses(model, b), rho=0.1, rank=99, dtype=torch.float64)
    monkeypatch.setattr("zoft.probe.whiten.ROOM", 1)  # a covariance a sweep
    again = measure(layers, batches, lambda b: losses(model, b), rho=0.1, rank=99, dtype=torch.float64)
    assert found.forwards == 6 and again.forwards == 6 * len(found.whiteners)
    assert {**again.tensors(), "forwards": 0}.keys() == found.tensors().keys()
    names = {"llama": (4, 7), "gpt2": (4, 4), "bert": (4, 6)}[name]
    assert (len(found.whiteners), len(layers)) == names
    seen = {}
    for e in data:  # each row alone: no padding
        with (
            torch.no_grad(),
            axis._hooked(
                lambda layer, args, out: seen.setdefault(layer.name, []).append((args[0][0], out[0]))
            ),
        ):
            losses(model, collate([e]))
    for layer in axis.layers:
        x, y = (torch.cat([pair[k] for pair in seen[layer.name]]) for k in (0, 1))
        c = x.T @ x / len(x)
        n = len(c)
        p = torch.linalg.inv(c + 0.1 * c.trace() / n * torch.eye(n, dtype=torch.float64))
        p *= n / (p @ c).trace()
        for m in (found, again):
            got = m.whiteners[m.inputs[layer.name]].apply(torch.eye(n, dtype=torch.float64))
            torch.testing.assert_close(got, p, rtol=1e-6, atol=1e-9)
        if found.sinks == 0:
            assert found.sigmas[layer.name] == pytest.approx(float(y.square().mean().sqrt()), rel=1e-9)


def test_a_sink_is_left_out_of_the_scale_wherever_it_stands():
    linear = torch.nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
    x = torch.ones(1, 7, 4, dtype=torch.float64)
    x[0, 3] = 100.0
    found = measure([("a", linear)], [(x, torch.arange(7), 1)], linear, rho=0.1, rank=2, dtype=torch.float64)
    assert found.sigmas["a"] == 1.0 and found.sinks == pytest.approx(1 / 7)
    assert isinstance(found.whiteners[0], Whitener)


def test_clean_inputs_are_the_probes_mean_up_to_eps_squared():
    """What the update pass sees, against the mean of the two probes' inputs: 4 times nearer at half the eps."""
    model, data = tiny.llama().double(), examples(5)
    axis = axis_of(model, "upper", data)
    rows = rows_with_tokens(data, range(5), "cpu")
    seen = {}

    def inputs():
        return axis._hooked(lambda layer, args, out: seen.setdefault(layer.name, []).append(args[0]))

    def apart(eps):
        found = []
        for scale in (0.0, eps, -eps):
            seen.clear()
            axis.tokens = rows.tokens
            with torch.no_grad(), axis.at(STEP, [Probe(0, scale)], rows.batch.rows), inputs():
                losses(model, rows.batch)
            found.append(torch.cat([x[0].flatten() for x in seen.values()]))
        clean, plus, minus = found
        return float(((plus + minus) / 2 - clean).norm() / clean.norm())

    far, near = apart(1e-1), apart(5e-2)
    assert far / near == pytest.approx(4, rel=0.2) and far < 1e-2


@pytest.mark.gpu
def test_a_gpu_draws_the_same_signs():
    rows = rows_with_tokens(examples(4, 3), [3, 8, 2**20, 2**31 - 1], "cpu")
    for units in (40, 128, 1000):
        here = signs.node_signs(rows.tokens, units, 2**32 - 3, 1, 2)
        assert torch.equal(here, signs.node_signs(rows.tokens.to("cuda"), units, 2**32 - 3, 1, 2).cpu())
