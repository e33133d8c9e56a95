"""Many members in one generation, against weights really set to θ + s·z that transformers' own `generate` writes with."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as hf
from test_adapters import attach, moved

from zoft.data.example import Example
from zoft.method import space
from zoft.method.estimators.estimator import Probe
from zoft.noise import noise
from zoft.objectives import text
from zoft.objectives.decode import CHECK, dice
from zoft.objectives.losses import collate, losses
from zoft.probe import proof
from zoft.probe.axis import ProbeAxis
from zoft.probe.members import Members, why_alone

SEED, STEP, EPS = 3, 5, 0.05
PROBES = [Probe(k, s) for k in range(3) for s in (EPS, -EPS)]  # P = 6
CONTEXTS = [tiny.ids("<bos>", *w) for w in ("abab", "no", "dots e", "a", "nost")]


def gemma3():
    config = hf.Gemma3TextConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return tiny.build(hf.Gemma3ForCausalLM, config)


def tied():
    return tiny.llama(tie=True)


MODELS = {"gpt2": tiny.gpt2, "opt": tiny.opt, "llama": tiny.llama, "tied": tied, "gemma3": gemma3}


def made(model, train="all", kind="rank1", eps=EPS):
    """An axis and its members, as a run has them."""
    trained = space.adopt(model, space.train_names(model, train))
    space.place_in_precision(model, trained, "fp32", "fp32")
    if kind == "rank1":
        for t in trained:
            t.width = noise.width_of(t.stored.shape)
    rows = [Example((c,), (tiny.ids("a"),), 0, "lm") for c in CONTEXTS[:2]]
    small = collate(rows)
    double = small.repeat(2)
    double.inputs["input_ids"][2:] = small.inputs["input_ids"].flip(1)
    run = lambda b: losses(model, b)[0]  # noqa: E731
    found = proof.find_sites(model, trained, run, small, double, eps, kind)
    assert found.stacked, found.note
    axis = ProbeAxis(proof.live(trained, found), found.sites, seed=SEED, kind=kind)
    assert why_alone(axis, sum(p.numel() for p in model.parameters())) == ""
    return SimpleNamespace(axis=axis, members=Members(axis), trained=axis.trained)


def by_hand(model, trained, probe, kind):
    """The model with θ + s·z written into its own weights."""
    twin = copy.deepcopy(model)
    for t in trained:
        z = noise.direction(
            t.stored.shape, t.id, seed=SEED, step=STEP, direction=probe.direction, noise=kind, width=t.width,
            dtype=torch.float32,
        )  # fmt: skip
        twin.get_parameter(t.name).data = t.stored + probe.scale * z
    return twin


def together(model, members, probes=PROBES, n=14, stop=None, mixed=True, **more):
    with members.at(STEP, probes):
        found = text.texts_of_members(
            model,
            tiny.tokenizer(),
            CONTEXTS,
            members,
            len(probes),
            mixed=mixed,
            max_new_tokens=n,
            stop=stop,
            **more,
        )
    return [[w.text for w in found[p * len(CONTEXTS) :][: len(CONTEXTS)]] for p in range(len(probes))]


@pytest.mark.parametrize("stop", [None, "s"])
@pytest.mark.parametrize("name", MODELS)
def test_members_write_what_each_writes_alone(name, stop):
    model = MODELS[name]()
    m = made(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    got = together(model, m.members, stop=stop)
    for p, probe in enumerate(PROBES):
        twin = by_hand(model, m.trained, probe, "rank1")
        want = text.generate(twin, tiny.tokenizer(), CONTEXTS, max_new_tokens=14, stop=stop)
        assert got[p] == want, probe
    assert len({tuple(g) for g in got}) > 2  # the probes say different things
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("train", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3"])
def test_adapters_of_many_members_write_what_each_writes_alone(name, train):
    model = moved(attach(MODELS[name](), train), scale=0.5)
    m = made(model, train, "gaussian", eps=0.3)
    probes = [Probe(k, s) for k in range(3) for s in (0.3, -0.3)]
    # Padding stands between a prefix and its row, and so takes places of a sliding window.
    got = together(model, m.members, probes, mixed=name != "gemma3")
    for p, probe in enumerate(probes):
        twin = by_hand(model, m.trained, probe, "gaussian")
        assert got[p] == text.generate(twin, tiny.tokenizer(), CONTEXTS, max_new_tokens=14, stop=None), probe
    assert len({tuple(g) for g in got}) > 2


@pytest.mark.parametrize("name, train", [*((n, "all") for n in MODELS), ("llama", "lora"), ("opt", "prefix")])
def test_points_of_a_line_write_what_weights_set_there_write(name, train):
    """θ + f·Σ_k c_k z_k of three directions, at four factors."""
    kind = "rank1" if train == "all" else "gaussian"
    model = MODELS[name]() if train == "all" else moved(attach(MODELS[name](), train), scale=0.5)
    m = made(model, train, kind)
    line, factors = [0.04, -0.03, 0.05], [2.0, 1.0, 0.5, 0.0]
    with m.members.at(STEP, [Probe(0, f) for f in factors], line):
        found = text.texts_of_members(
            model, tiny.tokenizer(), CONTEXTS, m.members, 4, mixed=True, max_new_tokens=14, stop=None
        )
    got = [[w.text for w in found[p * len(CONTEXTS) :][: len(CONTEXTS)]] for p in range(4)]
    for p, f in enumerate(factors):
        twin = copy.deepcopy(model)
        for t in m.trained:
            where = {"seed": SEED, "step": STEP, "noise": kind, "width": t.width, "dtype": torch.float32}
            z = sum(
                c * noise.direction(t.stored.shape, t.id, direction=k, **where) for k, c in enumerate(line)
            )
            twin.get_parameter(t.name).data = t.stored + f * z
        assert got[p] == text.generate(twin, tiny.tokenizer(), CONTEXTS, max_new_tokens=14, stop=None), f
    assert got[0] != got[3]


def drawn(model, context, u, n, temperature):
    """A row by a plain loop of whole forwards: the first token whose cumulative probability exceeds u."""
    row = []
    for t in range(n):
        logits = model(torch.tensor([[*context, *row]])).logits[0, -1].double()
        p = (logits / temperature).softmax(0)
        row.append(int(torch.searchsorted(p.cumsum(0), u[t] * p.sum(), right=False)))
        if row[-1] == 2:
            row.pop()
            break
    return tiny.tokenizer().decode(row, skip_special_tokens=True).strip()


@torch.no_grad()
def test_sampling_rolls_the_same_dice_for_all_members():
    model = tiny.llama()
    m = made(model)
    u = dice(9, STEP, [4, 5, 6, 7, 8], 14)
    still = [Probe(k, 1e-9) for k in range(4)]
    got = together(model, m.members, still, temperature=1.5, u=u)
    assert all(g == got[0] for g in got[1:])  # the same weights and dice, the same texts
    assert got[0] == [drawn(model, c, u[r], 14, 1.5) for r, c in enumerate(CONTEXTS)]
    moved_ones = together(model, m.members, temperature=1.5, u=u)
    for p, probe in enumerate(PROBES):
        twin = by_hand(model, m.trained, probe, "rank1")
        assert moved_ones[p] == [drawn(twin, c, u[r], 14, 1.5) for r, c in enumerate(CONTEXTS)]


def test_dice_depend_on_seed_step_row_and_token_alone():
    u = dice(1, 2, [5, 9], 40)
    assert torch.equal(dice(1, 2, [9], 12)[0], u[1, :12])
    others = [dice(2, 2, [5], 40)[0], dice(1, 3, [5], 40)[0], u[1]]
    assert all(not torch.equal(u[0], x) for x in others)
    many = dice(1, 2, range(50), 200).flatten()
    assert 0 < float(many.min()) and float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.01 and abs(float(many.var()) - 1 / 12) < 0.003


def test_finished_rows_leave_the_batch():
    """Rows of the head's calls shrink as texts end; what is written stays the same."""
    model = tiny.llama()
    m, sizes = made(model), []
    head = model.lm_head
    want = together(model, m.members, n=40, stop="y")
    inner = m.members._linear

    def counted(x, *rest):
        if rest[1] is head.weight:
            sizes.append(x.shape[0])
        return inner(x, *rest)

    m.members._linear = counted
    assert together(model, m.members, n=40, stop="y") == want
    assert sizes[0] == len(PROBES) * len(CONTEXTS) and sizes[-1] < sizes[0] / 2, sizes
    assert len(sizes) <= 40 and CHECK < len(sizes)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_exception_puts_everything_back(name):
    model = MODELS[name]()
    m = made(model)
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), m.members.at(STEP, PROBES):
        raise RuntimeError("stop")
    assert not any("forward" in x.__dict__ for x in model.modules())
    assert all(
        p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters()
    )


def test_dense_directions_stay_alone():
    model = tiny.llama()
    trained = space.adopt(model, space.train_names(model, "all"))
    space.place_in_precision(model, trained, "fp32", "fp32")
    axis = ProbeAxis(trained, [], seed=SEED, kind="gaussian")
    numbers = sum(p.numel() for p in model.parameters())
    assert why_alone(axis, numbers) == "noise=gaussian makes whole weights for each member"
