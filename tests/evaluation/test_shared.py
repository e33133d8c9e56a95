"""Shared prefixes against rows one at a time, each candidate in a forward of its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers as hf

from zoft.data.encode import encode
from zoft.data.example import Example
from zoft.evaluation import evaluate, prefix_cache
from zoft.models import calls

CHOICE = SimpleNamespace(objective="choice")
MANY = ["no 1", "yes a b", "d"]


def make(n, candidates, front="", seed=0, single=None):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt = front + "".join(rng.choice(list("abcde. "), 1 + int(rng.integers(12)))) + ":"
        own = candidates[: 2 + i % 2] if single is None else candidates
        rows.append({"prompt": prompt, "candidates": own, "gold": 0, "where": f"row {i}"})
    return encode(rows, tiny.tokenizer(), CHOICE, 64)


def slow(model, e, c):
    """(Σ log p, tokens) of one candidate, its row alone, nothing padded."""
    context, completion = e.contexts[c], e.completions[c]
    table = model(torch.tensor([context + completion]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(table[len(context) - 1 + i, t].item() for i, t in enumerate(completion)), len(completion)


FRONT = "ab no.de c b a.no 12 b c " * 2  # more than COMMON tokens


@pytest.mark.parametrize("front", ["", FRONT], ids=["prompts", "demonstrations"])
@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_every_candidate_scores_as_in_a_row_of_its_own(name, front):
    model = tiny.MODELS[name]()
    examples = make(9, MANY, front)  # two and three candidates, of one to three tokens; merges at the border
    length = prefix_cache.common(examples)
    assert (length >= prefix_cache.COMMON) == bool(front) and prefix_cache.pays(examples, length)
    made = prefix_cache.prepare(model, examples, length)
    total, count = prefix_cache.totals(model, examples, made)
    for i, e in enumerate(examples):
        for c in range(3):
            want = slow(model, e, c) if c < len(e.completions) else (0.0, 0)
            assert (total[i, c].item(), count[i, c].item()) == pytest.approx(want, rel=2e-5, abs=1e-5), (i, c)


def test_single_tokens_after_shared_demonstrations():
    model, examples = tiny.llama(), make(7, ["yes", "no"], FRONT, single=True)
    assert all(e.single for e in examples)
    length = prefix_cache.common(examples)
    total, _ = prefix_cache.totals(model, examples, prefix_cache.prepare(model, examples, length))
    want = torch.tensor([[slow(model, e, c)[0] for c in range(2)] for e in examples])
    assert torch.allclose(total.diff(dim=1), want.diff(dim=1).to(total.dtype), atol=1e-5)
    assert not prefix_cache.pays(
        make(7, ["yes", "no"], single=True), 0
    )  # one row each: nothing left to share


def test_evaluation_takes_the_shared_way_and_gets_the_plain_scores(monkeypatch):
    model, examples = tiny.llama(), make(30, MANY)
    tokens = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    got, few = evaluate.scores(model, examples), sum(tokens)
    monkeypatch.setattr(prefix_cache, "pays", lambda *a: False)
    tokens.clear()
    want = evaluate.scores(model, examples)
    assert np.isfinite(got).tolist() == np.isfinite(want).tolist()
    assert np.nan_to_num(got, neginf=0) == pytest.approx(np.nan_to_num(want, neginf=0), rel=1e-5)
    assert few < sum(tokens)


def test_small_batches_give_the_same_scores(monkeypatch):
    model, examples = tiny.llama(), make(20, MANY, FRONT)
    whole = evaluate.scores(model, examples)
    monkeypatch.setattr(prefix_cache, "CACHE_BYTES", 20000)
    assert prefix_cache.cached_tokens(model, examples[0]) == 20000 // (
        2 * 2 * 8 * 4
    )  # layers, k and v, dim, fp32
    assert np.nan_to_num(evaluate.scores(model, examples), neginf=0) == pytest.approx(
        np.nan_to_num(whole, neginf=0), rel=1e-5
    )


@pytest.mark.parametrize("how", ["ignores", "raises"])
def test_a_model_whose_cache_does_not_do_is_scored_in_plain_rows_and_it_is_said(how, capfd):
    model, examples = tiny.llama(), make(12, MANY)
    want = np.array(
        [[slow(model, e, c) if c < len(e.completions) else (-np.inf, 1) for c in range(3)] for e in examples]
    )
    inner, name = model.model.layers[0].self_attn.forward, calls.cache_name(model)

    def forward(*args, **kwargs):
        if kwargs.get(name) is not None and how == "raises":
            raise KeyError("no cache here")
        return inner(*args, **{**kwargs, name: None})

    model.model.layers[0].self_attn.forward = forward
    evaluate._say.cache_clear()
    got = evaluate.scores(model, examples)
    assert "prefixes are not shared" in capfd.readouterr().err
    want = want[..., 0] / want[..., 1]
    assert np.nan_to_num(got, neginf=0) == pytest.approx(np.nan_to_num(want, neginf=0), rel=1e-5)


def test_where_rows_part():
    ids = tiny.ids
    two = Example((ids("a", "b", "c"),) * 2, (ids("d", "e"), ids("d", "d")), 0)
    assert prefix_cache.cut(two) == prefix_cache.Cut(ids("a", "b"), (ids("c", "d"), ids("c", "d")), (0, 0))
    merged = Example((ids("a", "b"), ids("a", "b", "c")), (ids("no", "e"), ids("d")), 0)
    assert prefix_cache.cut(merged) == prefix_cache.Cut(ids("a"), (ids("b", "no"), ids("b", "c")), (0, 1))


def test_frozen_blocks_and_prompts_keep_rows_of_their_own():
    model = tiny.llama()
    model.keeps_rows = True
    with pytest.raises(prefix_cache.Unusable, match="frozen"):
        prefix_cache._new(model)


def others():
    small = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = {**small, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return {
        "window": hf.MistralConfig(**wide, sliding_window=7),
        "alibi": hf.BloomConfig(**{k: v for k, v in small.items() if k != "num_hidden_layers"}, n_layer=2),
        "state space": hf.MambaConfig(
            vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4
        ),
        "neox": hf.GPTNeoXConfig(**small, intermediate_size=24),
    }


@pytest.mark.parametrize("name", ["window", "alibi", "state space", "neox"])
@pytest.mark.parametrize("front", ["", FRONT], ids=["prompts", "demonstrations"])
def test_whatever_the_cache_is_like_the_scores_are_those_of_rows_of_their_own(name, front):
    """Shared where it works; where padding or windows make it differ, the trial finds out."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(others()[name]).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(5)  # scores that differ
    examples = make(11, MANY, front)
    got = evaluate.scores(model, examples)
    for i, e in enumerate(examples):
        for c, _ in enumerate(e.completions):
            total, count = slow(model, e, c)
            assert got[i, c] == pytest.approx(total / count, rel=1e-3), (i, c)
