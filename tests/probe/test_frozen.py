"""The cache of frozen blocks: the losses without it, bits that no order changes, and no when it must be no."""

import contextlib
import copy
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from test_generate import CONTEXTS
from test_trainer import bert
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.evaluation import evaluate
from zoft.ledger.log import read_ledger
from zoft.method import space
from zoft.method.estimators.estimator import Probe
from zoft.models import saving
from zoft.models.adapters import attach
from zoft.models.kind import blocks_of
from zoft.objectives.losses import collate, losses
from zoft.objectives.text import generate
from zoft.probe import frozen_blocks, proof
from zoft.probe.axis import ProbeAxis
from zoft.train import axis, parts
from zoft.train import batches as data_order

MODELS = {"llama": tiny.llama, "opt": tiny.opt, "gpt2": tiny.gpt2, "bert": bert}
PROBES = [Probe(0, 1e-2), Probe(0, -1e-2), Probe(1, 1e-2), Probe(1, -1e-2)]
PLENTY = 1 << 30


def data(kind="single", n=20, seed=0):
    """Prompts of 4 to 8 tokens; two candidates of one token, two of one and two tokens, or one text to learn."""
    rng = np.random.default_rng(seed)
    ends = {"single": ((5,), (9,)), "multi": ((5, 7), (9,)), "lm": ((5, 9, 4),)}[kind]
    out = []
    for i in range(n):
        context = tuple(int(t) for t in rng.integers(3, tiny.VOCAB, 4 + i % 5))
        objective = "lm" if kind == "lm" else "choice"
        out.append(
            Example((context,) * len(ends), ends, int(rng.integers(len(ends))), objective, kind == "single")
        )
    return out


def batches_of(examples, size=8):
    return [
        frozen_blocks.rows_of(collate(examples[i : i + size]).inputs) for i in range(0, len(examples), size)
    ]


def bytes_of(examples):
    """Of the hidden states of all rows: 16 fp32 numbers a token."""
    return 64 * sum(map(len, {row for batch in batches_of(examples) for row in batch}))


class Made:
    """A model with a probe axis, and the cache over it if that is wanted."""

    def __init__(self, model, examples, train="last-1", cache=True, budget=PLENTY, auto=False, batches=None):
        self.model = model
        trained = space.adopt(model, space.train_names(model, train))
        small, double = axis.calibration(examples)

        def run(batch):
            return losses(model, batch)[0]

        found = proof.find_sites(model, trained, run, small, double, 1e-2)
        assert found.stacked, found.note
        self.axis = ProbeAxis(trained, found.sites, seed=3, kind="gaussian")
        self.prefix, self.note = None, ""
        if cache:
            self.prefix, self.note = frozen_blocks.prefix_of(
                model,
                trained,
                batches or batches_of(examples),
                budget,
                lambda: self.at([Probe(0, 0.0)], small)[0],
                auto,
            )

    @torch.no_grad()
    def at(self, probes, batch):
        """[P, E] loss sums."""
        with self.axis.at(0, probes, batch.rows):
            return losses(self.model, batch.repeat(len(probes)))[0].view(len(probes), -1)

    @property
    def kept(self):
        return sum(x.nbytes for states in self.prefix.kept.values() for x in states)


@contextlib.contextmanager
def calls_of(module):
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def inside(model):
    """A module within the first, frozen block."""
    return next(
        m for m in blocks_of(model)[1][0].modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear)
    )


@pytest.mark.parametrize("kind", ["single", "multi", "lm"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_without_the_cache(name, kind):
    examples = data(kind)
    plain = Made(MODELS[name](), examples, cache=False)
    cached = Made(MODELS[name](), examples)
    assert cached.prefix is not None, cached.note
    assert "first 1 of 2 blocks" in cached.note
    for picks in ([0, 6, 13], [3], [19, 2, 7, 11]):
        batch = collate([examples[i] for i in picks])
        for group in (1, 2, 4):
            want = torch.cat([plain.at(PROBES[i : i + group], batch) for i in range(0, 4, group)])
            got = torch.cat([cached.at(PROBES[i : i + group], batch) for i in range(0, 4, group)])
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
            assert (want[0] - want[1]).abs().max() > 1e-3  # or the probes would not show
    with calls_of(inside(cached.model)) as calls:
        cached.at(PROBES, batch)
    assert not calls  # its rows are kept: the frozen block does not run


@pytest.mark.parametrize(
    "train, kept", [(r"layers\.1\..*norm", 1), (r"layers\.1\..*proj|^model\.norm", 1), ("norms", 0), ("head", 1), (r"^lm_head|^model\.norm", 1), ("lora", 1)]
)  # fmt: skip
def test_other_trained_sets(train, kept):
    """What is trained in or after the last block only has the cache; the losses are the same with it or without."""

    def model():
        if train != "lora":
            return tiny.llama()
        made = attach.attach_adapter(tiny.llama(), Config(train="lora", lora_layers="last-1"))
        for i, (_, p) in enumerate(attach.named(made)):
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        return made

    examples = data("multi")
    plain, cached = Made(model(), examples, train, cache=False), Made(model(), examples, train)
    assert (cached.prefix is not None) == kept, cached.note
    batch = collate([examples[i] for i in (0, 6, 13)])
    want, got = plain.at(PROBES, batch), cached.at(PROBES, batch)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert (want[0] - want[1]).abs().max() > 1e-5
    with calls_of(inside(cached.model)) as calls:
        cached.at(PROBES, batch)
    assert bool(calls) != kept


@pytest.mark.parametrize("budget", [0, 6000, PLENTY])
def test_bits_do_not_depend_on_the_order_of_asking(budget):
    examples, strangers = data(n=40), data(n=6, seed=9)
    a, b = Made(tiny.llama(), examples, budget=budget), Made(tiny.llama(), examples, budget=budget)
    asked = [collate(examples[i : i + 3]) for i in range(0, 39, 3)] + [collate(strangers)]
    first = [a.at(PROBES, x) for x in asked]
    backwards = [b.at(PROBES, x) for x in asked[::-1]][::-1]
    again = [b.at(PROBES, x) for x in asked]
    for x, y, z in zip(first, backwards, again):
        assert torch.equal(x, y) and torch.equal(x, z)
    assert len(b.prefix.kept) == {0: 0, 6000: 2, PLENTY: 40 / 8 + 1}[budget]


@pytest.mark.parametrize("kind,ahead", [("lm", 0), ("choice", 40)])
def test_rows_are_computed_once_and_not_before_they_are_needed(kind, ahead):
    """Each with the rest of the batch it is first met in; an evaluation's label bias may meet it first."""
    plan = Config(batch_size=4, accumulate=2, steps=7, seed=5, device="cpu")
    examples, model, sizes = data(kind if kind == "lm" else "single", n=40), tiny.llama(), []
    made = Made(model, examples, batches=list(axis.first_met(plan, examples)))
    tried = sum(map(len, made.prefix.kept))  # the trial's two rows and their companions
    assert 2 <= tried <= 8
    handle = inside(model).register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    evaluate.evaluate(
        model, data(kind if kind == "lm" else "single", n=1, seed=9), examples, context=made.axis.clean
    )
    strangers = 1
    assert sum(sizes) == max(0, ahead - tried) + strangers
    at, met = data_order.batches_of(plan, examples), []
    for step in range(7):  # 56 rows of 40: the last two steps meet old ones
        for batch in at(step):
            met += frozen_blocks.rows_of(batch.inputs)
            made.at(PROBES, batch)
        assert sum(sizes) - strangers <= max(ahead, len(set(met)))
    assert sum(sizes) + tried == 40 + strangers and max(sizes) <= 4
    handle.remove()


@pytest.mark.parametrize("budget", [0, 6000, 19000, PLENTY])
def test_the_budget_is_kept_and_training_rows_go_first(budget):
    examples, strangers = data(n=40), data(n=30, seed=9)
    made = Made(tiny.llama(), examples, budget=budget)
    need = bytes_of(examples)
    for i in range(0, 30, 5):  # an evaluation before training takes nothing from it
        made.at(PROBES[:1], collate(strangers[i : i + 5]))
    others = [g for g in made.prefix.kept if g[0] not in made.prefix.group_of]
    assert sum(map(len, sum(others, ()))) * 16 * 4 <= max(0, budget - need) and bool(others) == (
        budget > need
    )
    for _ in range(2):
        for i in range(0, 40, 4):
            made.at(PROBES, collate(examples[i : i + 4]))
        assert made.kept <= budget
    ours = [r for g in made.prefix.kept for r in g if r in made.prefix.group_of]
    assert len(ours) == 40 if budget > need else 0 < len(ours) < 40 if budget else not ours
    with calls_of(inside(made.model)) as calls:
        made.at(PROBES, collate(strangers[:5]))
        made.at(PROBES, collate(strangers[25:]))
    assert bool(calls) == (budget < PLENTY)


class Chatty(torch.nn.Module):
    """A block that returns something beside the hidden states."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.attention_type = "full_attention"

    def forward(self, hidden_states, **kwargs):
        return self.block(hidden_states, **kwargs), hidden_states.mean(-1)


class Unpacking(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.attention_type = "full_attention"

    def forward(self, hidden_states, **kwargs):
        return self.block(hidden_states[0], **kwargs)


def chatty():
    model = tiny.llama()
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([Chatty(layers[0]), Unpacking(layers[1])])
    return model


@pytest.mark.parametrize(
    "make,train,why",
    [
        (tiny.llama, r"embed_tokens|layers\.1\.", "reads trained tensors"),
        (tiny.opt, r"embed_positions|layers\.1\.", "reads trained tensors"),
        (lambda: tiny.llama(tie=True), r"embed_tokens|layers\.1\.", "reads trained tensors"),
        (chatty, r"layers\.1\.", "more than hidden states"),
        (tiny.llama, "all", "first block is trained"),
        (lambda: tiny.llama(tie=True), "head", "what comes before the blocks is trained"),
        (tiny.llama, "embed_tokens", "what comes before the blocks is trained"),
    ],
)
def test_refused_with_the_reason_and_the_model_as_it_was(make, train, why):
    examples = data()
    plain, made = Made(make(), examples, train, cache=False), Made(make(), examples, train)
    assert made.prefix is None and why in made.note, made.note
    assert untouched(made.model)
    batch = collate(examples[:4])
    assert torch.equal(made.at(PROBES, batch), plain.at(PROBES, batch))
    assert all(torch.equal(t.param, t.stored) and t.param.isfinite().all() for t in made.axis.trained)


def untouched(model):
    return not any(
        "forward" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in model.modules()
    )


def deep():
    config = hf.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.LlamaForCausalLM, config)


def test_auto_is_on_where_it_pays():
    examples = data(n=20)
    assert Made(deep(), examples, "last-2", auto=True).prefix is not None
    assert Made(deep(), examples, "head", auto=True).prefix.first == 4  # all but the last block
    for train in ("last-3", "all", "embed_tokens"):
        made = Made(deep(), examples, train, auto=True)
        assert made.prefix is None and made.note == "", train
    need = bytes_of(examples)
    assert Made(deep(), examples, "last-2", auto=True, budget=need).prefix is not None
    short = Made(deep(), examples, "last-2", auto=True, budget=need - 1)
    assert short.prefix is None and "more than" in short.note and untouched(short.model)
    assert Made(deep(), examples, "last-2", budget=need - 1).prefix is not None


def test_the_key(capsys):
    """auto, true and false through setup; what is resolved is what a resumed run will do."""
    examples = data(n=20)
    cases = [
        ({}, "last-2", True), ({}, "last-3", False), ({"cache_frozen": True}, "last-3", True), ({"cache_frozen": False}, "last-2", False),
        ({"cache_frozen": True}, "all", False), ({"perturb": "inplace"}, "last-2", False),
    ]  # fmt: skip
    for keys, train, on in cases:
        model = deep()
        plan = parts.resolve_precision(
            parts.resolve_device(Config(device="cpu", threads=1, train=train, **keys)),
            model,
            space.train_names(model, train),
        )
        plan, _, _ = axis.make_axis(
            plan, model, space.adopt(model, space.train_names(model, train)), examples
        )
        said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("cache_frozen")]
        assert plan.cache_frozen is on, (keys, train)
        assert len(said) == (on or keys.get("cache_frozen") is True), said
    assert Config().cache_frozen == "auto"


def test_auto_is_off_on_a_gpu():
    """Steps are captured as graphs there, which a look-up on the CPU would prevent."""
    plan = Config(device="cuda", train="last-2")
    found = axis.cached(plan, torch.nn.Module(), [], data(), lambda: torch.zeros(0))
    assert found.cache_frozen is False


def test_evaluation_rows():
    examples, held_out = data("multi"), data("multi", n=30, seed=5)
    plain, made = Made(tiny.llama(), examples, cache=False), Made(tiny.llama(), examples)
    want = evaluate.evaluate(plain.model, held_out, examples, context=plain.axis.clean)
    for _ in range(2):
        got = evaluate.evaluate(made.model, held_out, examples, context=made.axis.clean)
        assert got == pytest.approx(want, rel=1e-4)
    with calls_of(inside(made.model)) as calls:
        evaluate.evaluate(made.model, held_out, examples, context=made.axis.clean)
    assert not calls


def test_removal_restores_the_model_and_saving_does_not_need_it(tmp_path):
    examples, model = data(), tiny.llama()
    block = model.model.layers[0]
    plain = block.forward
    block.forward = own = lambda *args, **kwargs: plain(*args, **kwargs)  # as accelerate's hooks do
    before = copy.deepcopy(model.state_dict())
    made = Made(model, examples)
    made.at(PROBES, collate(examples))
    assert made.prefix.kept and block.forward is not own
    tokenizer = tiny.tokenizer()
    saving.save_model(model, tokenizer, tmp_path / "with")
    made.prefix.remove()
    saving.save_model(model, tokenizer, tmp_path / "without")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("with", "without")]
    assert weights[0] == weights[1]
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())
    assert block.__dict__.pop("forward") is own and untouched(model) and not made.prefix.kept


def zoft(*args):
    done = CliRunner().invoke(app, list(map(str, args)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = "train: last-1\nsteps: 9\nbatch_size: 4\nlr: 1e-2\nmax_length: 32\nthreads: 1\neval_every: 3\n"
    tiny.place(tmp_path, settings, choices="{a: a b, b: 'no'}")
    done = zoft("train", "--config", "mine.yaml", "output_dir=whole")
    assert "cache_frozen: outputs of the first 1 of 2 blocks" in done.stderr
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/model")
    (tmp_path / "cut" / "result.json").unlink()
    ledger = (tmp_path / "whole" / "ledger").read_bytes()
    (tmp_path / "cut" / "ledger").write_bytes(ledger[: -5 * 32])
    assert len(read_ledger("cut/ledger").records) == 4
    assert "cache_frozen: outputs" in zoft("train", "--resume", "cut").stderr
    for file in ("ledger", "model/model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    results = [json.loads((tmp_path / x / "result.json").read_text()) for x in ("cut", "whole")]
    assert results[0]["after"] == results[1]["after"]


@pytest.mark.parametrize("train", ["last-1", "lora"])
def test_text_is_written_by_all_blocks(train):
    """Its rows grow, and are padded on the left: nothing that is kept fits them."""
    model = tiny.llama()
    model = (
        attach.attach_adapter(model, Config(train="lora", lora_layers="last-1")) if train == "lora" else model
    )
    want = generate(model, tiny.tokenizer(), CONTEXTS, max_new_tokens=6)
    made = Made(model, data("lm"), train)
    assert made.prefix is not None, made.note
    assert generate(model, tiny.tokenizer(), CONTEXTS, max_new_tokens=6) == want
    batch, before = collate(data("lm")[:4]), len(made.prefix.ready)
    with calls_of(inside(model)) as seen:  # and what is kept is used again afterwards
        made.at(PROBES, batch)
    assert not seen or len(made.prefix.ready) > before
