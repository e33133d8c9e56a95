"""Adapters: where they start, what they do at a probe, against autograd and slow twins, and what others load."""

import copy
import json
import shutil

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers as hf
from test_trainer import build, examples
from typer.testing import CliRunner
from zoo import PROBES, SEED, STEP, ZOO, apart, batch, make, off, twin, zoo

from zoft.cli.main import app
from zoft.config.schema import BY_TRAIN, Config
from zoft.errors import UserError
from zoft.method import space
from zoft.method.configured import compose
from zoft.method.estimators.estimator import Probe
from zoft.models.adapters import attach as adapters
from zoft.models.adapters import start as adapter_start
from zoft.noise import noise
from zoft.objectives.losses import collate, losses
from zoft.probe import lora_forward, site_forwards
from zoft.probe.axis import ProbeAxis
from zoft.train import parts

TRAINS = ("lora", "prefix", "prompt")
N = 3  # virtual tokens


def attach(model, train, **keys):
    keys = {"virtual_tokens": None if train == "lora" else N, "seed": 5} | keys
    try:
        return adapters.attach_adapter(model, Config(train=train, **keys))
    except UserError as error:
        if "each other's keys" in str(error):  # peft 0.19 and Gemma
            pytest.skip(str(error))
        raise


def moved(model, scale=0.3):
    """The model with its adapter away from its start, where LoRA's B hides A."""
    generator = torch.Generator().manual_seed(1)
    for name, p in adapters.named(model):
        if "lora_A" not in name:
            p.data = p.data + scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def qwen3():
    return hf.Qwen3ForCausalLM(ZOO["qwen3"]().config).eval().requires_grad_(False)


def narrow_opt():
    """Embeddings of another width than the model, as OPT-350M has them."""
    config = copy.deepcopy(tiny.opt().config)
    config.word_embed_proj_dim = 8
    return tiny.build(hf.OPTForCausalLM, config)


# ---- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
def test_lora_starts_as_the_base_with_uniform_a(name):
    base = tiny.MODELS[name]()
    ids = torch.randint(3, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    want, state = base(ids).logits, torch.random.get_rng_state()
    model = attach(base, "lora", lora_rank=64, lora_alpha=32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model(ids).logits, want)
    for key, p in adapters.named(model):
        assert p.dtype == torch.float32 and not p.requires_grad or "lora" in key
        if "lora_B" in key:
            assert not p.any()
        else:
            bound = p.shape[1] ** -0.5
            p = p.detach()
            assert 0.98 * bound < p.abs().max() < bound and abs(float(p.mean())) < 0.05 * bound
            assert float(p.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    again = dict(adapters.named(attach(tiny.MODELS[name](), "lora", lora_rank=64)))
    other = dict(adapters.named(attach(tiny.MODELS[name](), "lora", lora_rank=64, seed=6)))
    for key, p in adapters.named(model):
        assert torch.equal(p, again[key]) and (("lora_B" in key) or not torch.equal(p, other[key]))
    starts = [p.flatten()[:64] for key, p in adapters.named(model) if "lora_A" in key]
    assert len({tuple(x.tolist()) for x in starts}) == len(starts)  # none like another


@pytest.mark.parametrize("train", ["prefix", "prompt"])
@pytest.mark.parametrize("make_base", [*tiny.MODELS.values(), qwen3, narrow_opt])
def test_a_prefix_or_prompt_starts_as_those_tokens_in_front(make_base, train):
    """So keys, values, positions and mask are what the model itself makes of them."""
    base = make_base()
    tokens = adapter_start.tokens_of(base, N, seed=5)
    assert len(set(tokens.tolist())) > 1
    ids = torch.randint(3, tiny.VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    front = torch.cat([tokens.expand(3, -1), ids], 1)
    want = base(front, attention_mask=torch.cat([mask.new_ones(3, N), mask], 1)).logits[:, N:]
    plain = base(ids, attention_mask=mask).logits
    model = attach(base, train)
    for inputs in ({"attention_mask": mask}, {}):  # padding on the right does not show where there is none
        got = model(input_ids=ids, use_cache=False, **inputs).logits[:, -8:]
        real = mask.bool()
        torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)
    assert (want - plain)[real].abs().max() > 0.1


class Reader(hf.LlamaForCausalLM):
    """Takes token ids and nothing else."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids=input_ids)


def test_models_without_a_place_for_it_are_refused_in_one_line():
    with pytest.raises(UserError, match="train=prefix: MambaForCausalLM keeps no keys and values"):
        attach(ZOO["mamba"]().eval(), "prefix")
    with pytest.raises(UserError, match="train=prompt: Reader does not run with one"):
        attach(Reader(tiny.llama().config), "prompt")
    with pytest.raises(UserError, match="linear layers here are .*q_proj"):
        attach(tiny.llama(), "lora", lora_targets="query")
    with pytest.raises(UserError, match="lora_targets=.*: no module of those blocks"):
        attach(tiny.llama(), "lora", lora_layers="last-1", lora_targets=".*query.*")
    with pytest.raises(UserError, match="lora_layers=last-3: the model has 2 blocks"):
        attach(tiny.llama(), "lora", lora_layers="last-3")


def test_targets_are_names_a_pattern_or_all():
    def on(**keys):
        model = attach(tiny.llama(), "lora", **keys)
        return {
            k.split(".lora_")[0].removeprefix("base_model.model.model.") for k, _ in adapters.named(model)
        }

    both = {f"layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"}
    assert on() == both
    assert on(lora_layers="last-1") == {x for x in both if "layers.1" in x}
    assert on(lora_targets="o_proj up_proj", lora_layers="last-1") == {
        "layers.1.self_attn.o_proj",
        "layers.1.mlp.up_proj",
    }
    assert on(lora_targets=r".*\.1\..*(k|v)_proj") == {
        "layers.1.self_attn.k_proj",
        "layers.1.self_attn.v_proj",
    }
    assert len(on(lora_targets="all-linear")) == 2 * 7
    assert on(lora_targets="all-linear", lora_layers="last-1") == {
        x for x in on(lora_targets="all-linear") if "layers.1" in x
    }
    assert on(lora_targets=r".*[kv]_proj", lora_layers="last-1") == {
        f"layers.1.self_attn.{x}_proj" for x in "kv"
    }
    neo = hf.SmolLM3ForCausalLM(hf.SmolLM3Config(
        vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    ))  # fmt: skip
    assert "smollm3" not in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {k.split(".lora_")[0].rpartition(".")[2] for k, _ in adapters.named(attach(neo, "lora"))} == {
        "q_proj",
        "v_proj",
    }


# ---- at a probe ----------------------------------------------------------------------------------------------------


def rows_losses(model, b):
    """[rows]: a number a row; the model's own rows of a prompt left out."""
    ids = b.inputs["input_ids"]
    logits = model(**b.inputs, use_cache=False).logits[:, -ids.shape[1] :]
    picked = (
        logits.to(torch.promote_types(logits.dtype, torch.float32))
        .log_softmax(-1)
        .gather(-1, ids[..., None])[..., 0]
    )
    return -(picked * b.inputs["attention_mask"]).mean(-1)


CASES = [(name, t) for name in ("llama-tied", "opt", "gpt2", "qwen3", "gemma3", "mixtral") for t in TRAINS] + [("mamba", "lora")]  # fmt: skip


@pytest.mark.parametrize("name, train", CASES)
def test_stacked_losses_are_those_of_moved_tensors(name, train):
    keys = {"lora_targets": "x_proj in_proj"} if name == "mamba" else {}
    run = mamba_losses if name == "mamba" else rows_losses
    b = batch("right")
    made = make(moved(attach(zoo(name), train, **keys)), b, train, run=run)
    assert made.found.stacked and not made.found.note, made.found.note
    ways = {site_forwards.fast(s) for s in made.found.sites}
    assert ways == {lora_forward.lora if train == "lora" else site_forwards.embedding}
    expected = twin(made.untouched, made.trained, b, PROBES, run=run)  # [P, rows]
    assert apart(expected) > 1e-5, apart(expected)
    tolerance = min(1e-5, apart(expected) / 20)
    for group in (1, 2, len(PROBES)):
        assert off(made.losses(b, PROBES, group), expected) < tolerance, group
    other = batch("left", rows=3, length=12, seed=1)
    assert off(made.losses(other, PROBES), twin(made.untouched, made.trained, other, PROBES, run=run)) < 1e-5


def mamba_losses(model, b):
    logits = model(**b.inputs, use_cache=False).logits
    return -logits.log_softmax(-1).gather(-1, b.inputs["input_ids"][..., None])[..., 0].mean(-1)


@pytest.mark.parametrize("train", TRAINS)
def test_the_difference_of_two_probes_is_the_directional_derivative(train):
    """In fp64, throughout as OPT has it: (L(θ + eps·z) − L(θ − eps·z)) / 2 eps = ∇L·z, the gradient from autograd."""
    b = batch("right")
    made = make(moved(attach(zoo("opt").double(), train)), b, train, run=rows_losses)
    eps = 1e-5
    assert all(t.stored.dtype == torch.float64 for t in made.trained)
    got = made.losses(b, [Probe(0, eps), Probe(0, -eps)]).sum(1)
    params = {t.name: t for t in made.trained}
    leaves = {n: p.requires_grad_() for n, p in made.untouched.named_parameters() if n in params}
    grads = torch.autograd.grad(rows_losses(made.untouched, b).sum(), list(leaves.values()))
    slope = sum(
        float(
            (
                g
                * noise.direction(
                    g.shape, params[n].id, seed=SEED, step=STEP, direction=0, noise="gaussian"
                ).double()
            ).sum()
        )
        for n, g in zip(leaves, grads)
    )
    assert float(got[0] - got[1]) / (2 * eps) == pytest.approx(slope, rel=1e-7)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("train", TRAINS)
def test_a_16_bit_base_with_an_adapter_in_fp32(train):
    b = batch("right")
    made = make(moved(attach(zoo("llama").bfloat16(), train)), b, train, run=rows_losses)
    space.place_in_precision(made.model, made.trained, "fp32", "bf16")
    adapters.place_adapter(made.trained, torch.bfloat16)
    assert all(t.stored.dtype == t.compute == torch.float32 for t in made.trained)
    made.axis = ProbeAxis(made.trained, made.found.sites, seed=SEED, kind="gaussian")
    probes = [Probe(0, 0.2), Probe(0, -0.2), Probe(1, 0.2)]
    expected = twin(made.untouched.float(), made.trained, b, probes, run=rows_losses)
    assert off(made.losses(b, probes), expected) < 0.02
    assert off(made.losses(b, probes), made.losses(b, probes, 1)) < 0.02


def test_a_base_layer_trained_as_well_goes_the_general_way():
    b = batch("right")
    model = moved(attach(zoo("llama"), "lora"))
    names = [n for n, _ in model.named_parameters() if "layers.0.self_attn.q_proj" in n]
    made = make(model, b, names, run=rows_losses)
    (site,) = made.found.sites
    assert len(site.trained) == 3 and site_forwards.fast(site) is None
    assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES, run=rows_losses)) < 1e-5


def test_pairs_on_embeddings_and_the_head():
    b = batch("right")
    made = make(
        moved(attach(zoo("llama"), "lora", lora_targets="embed_tokens lm_head")), b, "lora", run=rows_losses
    )
    assert made.found.stacked and len(made.trained) == 4
    expected = twin(made.untouched, made.trained, b, PROBES, run=rows_losses)
    assert apart(expected) > 1e-5 and off(made.losses(b, PROBES), expected) < 1e-5


@pytest.mark.parametrize("kind", ["single", "multi", "lm"])
@pytest.mark.parametrize("train", TRAINS)
def test_losses_of_every_objective(train, kind):
    """Hidden states are gathered before the vocabulary, also behind a prompt's columns: as from all logits."""
    from test_frozen import data

    rows = data(kind, n=5)
    model = moved(attach(tiny.llama(), train))
    sums, counts = losses(model, collate(rows))
    for i, e in enumerate(rows):
        logp = []
        for context, completion in zip(e.contexts, e.completions):
            ids = torch.tensor([*context, *completion])
            every = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :].log_softmax(-1)
            at = range(len(context), len(ids))
            logp.append(torch.stack([every[t - 1, ids[t]] for t in at]))
        if kind == "lm":
            want, count = -logp[0].sum(), len(logp[0])
        else:
            want, count = -torch.stack([x.mean() for x in logp]).log_softmax(0)[e.gold], 1
        assert float(sums[i]) == pytest.approx(float(want), rel=1e-4, abs=1e-5) and int(counts[i]) == count


# ---- training ------------------------------------------------------------------------------------------------------


def twin_step(model, theta, ids, step, batch_, *, seed, q, eps, lr, decay, inplace):
    """MeZO's step by its formula, each example by itself; theta: name -> fp32 tensor, changed."""
    params = {n: p for n, p in model.named_parameters() if n in theta}

    def loss():
        total = 0.0
        for e in batch_:
            logits = model(input_ids=torch.tensor([e.contexts[0]]), use_cache=False).logits[0, -1]
            pair = logits[[c[0] for c in e.completions]].double()
            total += float(-pair.log_softmax(0)[e.gold]) / len(batch_)
        return total

    def put(shift):
        for n, p in params.items():
            p.data = theta[n] + np.float32(shift) * z[n] if shift else theta[n].clone()

    change = {n: torch.zeros_like(t) for n, t in theta.items()}
    slopes = []
    for k in range(q):
        z = {
            n: noise.direction(t.shape, ids[n], seed=seed, step=step, direction=k, noise="gaussian")
            for n, t in theta.items()
        }
        found = []
        if inplace:
            for shift in (eps, -2 * eps, eps):
                for n in theta:
                    theta[n] = theta[n] + np.float32(shift) * z[n]
                put(0.0)
                found.append(loss())
        else:
            for shift in (eps, -eps):
                put(shift)
                found.append(loss())
        slopes.append((found[0] - found[1]) / (2 * eps))
    for k in range(q):
        m = np.float32(-lr * slopes[k] / q)
        for n in theta:
            change[n] += m * noise.direction(
                theta[n].shape, ids[n], seed=seed, step=step, direction=k, noise="gaussian"
            )
    for n in theta:
        theta[n] = (np.float32(decay) * theta[n] if n in decays(theta) else theta[n]) + change[n]


def decays(theta):
    return {n for n, t in theta.items() if t.ndim > 1}


@pytest.mark.parametrize(
    "train, keys", [("lora", {"q": 2, "probes_per_forward": 4}), ("lora", {"policy": "inplace"}), ("prefix", {}), ("prompt", {})]
)  # fmt: skip
def test_fifty_steps_are_those_of_a_slow_twin(tmp_path, train, keys):
    from zoft.train.batches import batch_indices

    data, lr, eps = examples(), {"lora": 3e-3, "prefix": 2e-2, "prompt": 2e-2}[train], 1e-2
    model = attach(tiny.llama(), train)
    other = copy.deepcopy(model)
    trainer = build(tmp_path, model, train=train, steps=50, lr=lr, eps=eps, weight_decay=0.1, **keys)
    ids = {t.name: t.id for t in trainer.axis.trained}
    theta = {n: p.detach().clone() for n, p in other.named_parameters() if n in ids}
    start = {n: t.clone() for n, t in theta.items()}
    trainer.run()
    decay = np.float32(1 - lr * 0.1)
    with torch.no_grad():
        for step in range(50):
            (picks,) = batch_indices(step, n=len(data), batch_size=4, accumulate=1, seed=7)
            twin_step(
                other, theta, ids, step, [data[i] for i in picks],
                seed=7, q=keys.get("q", 1), eps=eps, lr=lr, decay=decay, inplace="policy" in keys,
            )  # fmt: skip
    for t in trainer.axis.trained:
        assert t.decays
        torch.testing.assert_close(t.stored, theta[t.name], rtol=2e-4, atol=1e-4)
        assert (t.stored - start[t.name]).abs().max() > 100 * 1e-4


def test_only_the_adapter_moves(tmp_path):
    for train in TRAINS:
        model = attach(tiny.llama(), train)
        before = {n: p.clone() for n, p in model.named_parameters()}
        build(tmp_path, model, name=train, train=train, steps=3, lr=0.1).run()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n, _ in adapters.named(model)}


# ---- what others load ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_adapter_loads_in_plain_peft_with_equal_logits(tmp_path, name, train):
    base = tiny.MODELS[name]()
    base.save_pretrained(tmp_path / "base")
    model = moved(attach(base, train, **({"lora_rank": 4, "lora_alpha": 6} if train == "lora" else {})))
    b = batch("right")
    ids = b.inputs["input_ids"] % tiny.VOCAB
    want = model(input_ids=ids, attention_mask=b.inputs["attention_mask"]).logits
    adapters.save_adapter(model, tmp_path / "adapter", card="a card")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        got = loaded(input_ids=ids, attention_mask=b.inputs["attention_mask"]).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["task_type"] == "CAUSAL_LM"
    if train == "lora":
        assert (said["r"], said["lora_alpha"], said["lora_dropout"], said["bias"]) == (4, 6, 0.0, "none")
        assert set(said["target_modules"]) == ({"c_attn"} if name == "gpt2" else {"q_proj", "v_proj"})
    else:
        assert said["num_virtual_tokens"] == N
    assert (tmp_path / "adapter" / "README.md").read_text().startswith("a card\n\n## Load it")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == {
        p.name for p in (tmp_path / "adapter").iterdir()
    }


@pytest.mark.parametrize("name", tiny.MODELS)
def test_merged_is_unmerged(name):
    model = moved(attach(tiny.MODELS[name](), "lora", lora_targets="all-linear" if name != "gpt2" else None))
    ids = torch.randint(3, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    plain = tiny.MODELS[name]()(ids).logits
    want = model(input_ids=ids).logits
    merged = adapters.merge_adapter(model)
    assert type(merged) is type(tiny.MODELS[name]()) and not adapters.named(merged)
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert (plain - want).abs().max() > 0.1
    with pytest.raises(UserError, match="prefix_tuning: it cannot be merged"):
        adapters.merge_adapter(attach(tiny.llama(), "prefix"))


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_what_is_trained_says_the_defaults():
    def at(*keys):
        return compose(None, ["model=a/b", "task=reviews", *keys])

    for train, defaults in BY_TRAIN.items():
        config = at(f"train={train}")
        assert {k: getattr(config, k) for k in defaults} == defaults
    config = at("recipe=lora_zo")
    assert (config.train, config.lr, config.eps, config.lora_rank) == ("lora", 1e-4, 1e-2, 8)
    config = at("recipe=qzo", "bits=4")
    assert (config.train, config.lr, config.eps) == ("scales", 1e-7, 1e-3)
    assert at("recipe=qzo", "bits=4", "train=all").lr == 1e-6
    config = at("recipe=lora_zo", "train=prefix", "lr=0.5")
    assert (config.lr, config.eps, config.virtual_tokens, config.lora_rank) == (0.5, 0.1, 5, None)
    config = at()
    assert (config.train, config.lr, config.eps, config.lora_rank, config.virtual_tokens) == (
        "all",
        1e-6,
        1e-3,
        None,
        None,
    )


@pytest.mark.parametrize(
    "keys, part",
    [
        (["train=prefix", "lora_rank=4"], "lora_rank=4: is for train=lora, not prefix"),
        (["train=all", "lora_targets=q_proj"], "lora_targets=q_proj: is for train=lora, not all"),
        (["train=lora", "virtual_tokens=5"], "virtual_tokens=5: is for train=prefix or prompt, not lora"),
        (["train=lora", "lora_rank=0"], "lora_rank=0: must be ≥ 1"),
        (["train=lora", "lora_layers=6"], "lora_layers=6: use last-1"),
        (["train=lora", "lora_targets=("], r"lora_targets=\(: use ends of names"),
        (["train=lora", "save_dtype=bf16"], "save_dtype=bf16: an adapter is saved as it is kept"),
        (["train=loar", "lora_rank=4"], "not loar; did you mean train=lora?"),
        (
            ["train=norms", "lora_rank=4", "lora_layers=last-1"],
            "leave it out, or set lora_rank=null lora_layers=null",
        ),
        (
            ["adapter=pairs", "train=lora", "lora_rank=4", "lora_alpha=8"],
            "the adapter has its own; leave it out, or set lora_rank=null lora_alpha=null",
        ),
        (["recipe=qzo", "bits=4", "train=lora"], "train=lora: recipe=qzo trains scales; use recipe=lora_zo"),
        (["recipe=lora_zo", "train=norms"], "train=norms: recipe=lora_zo trains lora, prefix or prompt"),
    ],
)
def test_keys_that_do_not_apply_are_refused(keys, part):
    with pytest.raises(UserError, match=part):
        compose(None, ["model=a/b", "task=reviews", *keys])


# ---- a run's folder ------------------------------------------------------------------------------------------------


def zoft(*args):
    done = CliRunner().invoke(app, list(map(str, args)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = "steps: 9\nbatch_size: 4\nlr: 1e-2\nmax_length: 32\nthreads: 1\neval_every: 3\n"
    return tiny.place(tmp_path, f"recipe: lora_zo\n{settings}", choices="{a: a b, b: 'no'}")


@pytest.mark.parametrize(
    "train, keys",
    [("lora", ["momentum=0.5"]), ("lora", ["perturb=inplace"]), ("prefix", ["q=2"]), ("prompt", [])],
)
def test_resume_and_replay_are_the_run_bit_for_bit(place, train, keys):
    done = zoft("train", "--config", "mine.yaml", f"train={train}", "output_dir=whole", *keys)
    assert done.exit_code == 0, done.stderr
    names = {"config.yaml", "env.json", "ledger", "metrics.jsonl", "result.json", "adapter"}
    assert {p.name for p in (place / "whole").iterdir()} == names | (
        {"start.safetensors"} if train == "prefix" else set()
    )
    saved = (place / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/adapter")
    (place / "cut" / "result.json").unlink()
    ledger = (place / "whole" / "ledger").read_bytes()
    (place / "cut" / "ledger").write_bytes(ledger[: -5 * 32])
    assert zoft("eval", "cut").exit_code == 2
    assert zoft("train", "--resume", "cut").exit_code == 0
    assert (place / "cut" / "ledger").read_bytes() == ledger
    assert (place / "cut" / "adapter" / "adapter_model.safetensors").read_bytes() == saved
    assert zoft("replay", "whole", "--out", "again").exit_code == 0
    assert (place / "again" / "adapter_model.safetensors").read_bytes() == saved
    after = json.loads((place / "whole" / "result.json").read_text())["after"]
    assert json.loads(zoft("eval", "whole", "--json", "--resamples", "0").stdout) == pytest.approx(after)
    mine = (place / "mine.yaml").read_text()
    (place / "it.yaml").write_text(mine + f"train: {train}\n")
    (place / "all.yaml").write_text(mine.replace("lora_zo", "mezo") + "train: all\n")
    base, plain = (
        json.loads(zoft("eval", "--config", name, "--json", "--resamples", "0").stdout)
        for name in ("it.yaml", "all.yaml")
    )
    assert base == plain != pytest.approx(after)
    # An adapter says what its base is: the model of the config does not take its place.
    (place / "other.yaml").write_text(mine.replace("model: tiny", "model: none"))
    found = zoft("eval", "whole/adapter", "--config", "other.yaml", "--json", "--resamples", "0")
    assert json.loads(found.stdout) == pytest.approx(after), found.stderr
    done = zoft("eval", "whole/adapter", "--config", "mine.yaml", "adapter=whole/adapter")
    assert done.exit_code == 2 and "is an adapter already" in done.stderr
    said = json.loads((place / "whole" / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(place / "tiny")


def test_another_base_than_the_adapters_own_is_said(place):
    assert zoft("train", "--config", "mine.yaml", "train=lora", "output_dir=run").exit_code == 0
    other = tiny.llama()
    other.model.norm.weight.data.mul_(1.5)
    other.save_pretrained("tuned")
    tiny.tokenizer().save_pretrained("tuned")
    shutil.copytree("tiny", "moved")
    shutil.copytree("run/adapter", "alone/adapter")  # without its run, names alone can tell
    for words, said in (
        (["run/adapter"], ""), (["run/adapter", "model=moved"], ""), (["run"], ""), (["alone/adapter"], ""),
        (["run/adapter", "model=tuned"], "model=tuned: other weights than those that run/adapter was trained on"),
        (["run", "model=tuned"], "other weights"), (["alone/adapter", "model=./tiny"], ""),
        (["alone/adapter", "model=tuned"], f"says that it was trained on {place}/tiny"),
    ):  # fmt: skip
        config = [] if words[0] == "run" else ["--config", "mine.yaml"]
        done = zoft("eval", *words, *config, "--json", "--resamples", "0")
        lines = [line for line in done.stderr.splitlines() if "trained on" in line]
        assert done.exit_code == 0 and len(lines) == bool(said) and said in "".join(lines), (
            words,
            done.stderr,
        )


def test_a_kept_start_is_taken_and_another_one_refused(place):
    from safetensors.torch import load_file, save_file

    assert zoft("train", "--config", "mine.yaml", "train=prefix", "output_dir=run").exit_code == 0
    start = load_file("run/start.safetensors")
    ((name, table),) = start.items()
    model, _, _ = parts.load_run_model(parts.resolve_device(compose("mine.yaml", ["train=prefix"])))
    assert torch.equal(dict(adapters.named(model))[name], table)
    save_file({name: table.nextafter(table + 1)}, "run/start.safetensors")
    done = zoft("replay", "run", "--out", "out")
    assert done.exit_code == 2 and "put back start.safetensors" in done.stderr
    (place / "run" / "start.safetensors").unlink()
    assert zoft("replay", "run", "--out", "out").exit_code == 0  # made anew, on this machine to the same bits
    files = (
        place / "out" / "adapter_model.safetensors",
        place / "run" / "adapter" / "adapter_model.safetensors",
    )
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("train", TRAINS)
def test_export(place, train):
    assert zoft("train", "--config", "mine.yaml", f"train={train}", "output_dir=run").exit_code == 0
    done = zoft("export", "run", "--adapter", "--out", "adapter")
    assert done.exit_code == 0 and "gives the run's logits" in done.stdout, done.stderr
    saved = [(place / x / "adapter_model.safetensors").read_bytes() for x in ("adapter", "run/adapter")]
    assert saved[0] == saved[1]
    done = zoft("export", "run", "--merge", "--out", "merged")
    if train != "lora":
        assert done.exit_code == 2 and "it cannot be merged into weights" in done.stderr
        return
    assert done.exit_code == 0 and "numbers differ from the base" in done.stdout, done.stderr
    whole = hf.AutoModelForCausalLM.from_pretrained("merged")
    beside = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained("tiny"), "adapter")
    ids = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, beside(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    metrics = [
        json.loads(zoft("eval", *x, "--json", "--resamples", "0").stdout)
        for x in (["run"], ["--config", "mine.yaml", "model=merged"])
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)


def test_the_other_recipe_trains_adapters_too(place):
    assert zoft("train", "--config", "mine.yaml", "recipe=mezo", "train=lora", "output_dir=a").exit_code == 0
    assert zoft("train", "--config", "mine.yaml", "output_dir=b").exit_code == 0
    a, b = ((place / x / "adapter" / "adapter_model.safetensors").read_bytes() for x in "ab")
    assert a == b
    card = (place / "b" / "adapter" / "README.md").read_text()
    assert "lora_zo" in card and "| train | lora |" in card


def test_pairs_in_the_last_blocks_use_the_cache_of_frozen_ones(place):
    done = zoft("train", "--config", "mine.yaml", "lora_layers=last-1", "output_dir=a")
    assert "cache_frozen: outputs of the first 1 of 2 blocks are computed once" in done.stderr
    assert "cache_frozen: true" in (place / "a" / "config.yaml").read_text()
    plain = zoft("train", "--config", "mine.yaml", "lora_layers=last-1", "cache_frozen=false", "output_dir=b")
    assert plain.exit_code == 0
    results = [json.loads((place / x / "result.json").read_text())["after"]["loss"] for x in "ab"]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    for train in ("prefix", "prompt"):
        done = zoft("train", "--config", "mine.yaml", f"train={train}", f"output_dir={train}", "steps=3")
        assert "cache_frozen" not in done.stderr


def test_estimate_counts_the_adapter(place, monkeypatch):
    from zoft.run import estimate

    monkeypatch.setattr(estimate, "MEASURED", 0.0)
    for train, numbers in (
        ("lora", 2 * 8 * (16 + 16 + 16 + 8)),
        ("prefix", 5 * 2 * 2 * 8),
        ("prompt", 10 * 16),
    ):
        done = zoft("estimate", "--config", "mine.yaml", f"train={train}", "--json")
        found = json.loads(done.stdout)
        assert (found["trained"], found["notes"]) == (numbers, []), train
        assert found["scratch_bytes"] == 2 * 4 * numbers
