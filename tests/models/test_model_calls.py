"""What a model is asked about its own forward, under whichever version of the libraries is installed."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_adapters import attach, moved

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.models import calls
from zoft.models.adapters import attach as adapters
from zoft.objectives import text as generation

ROOT = Path(__file__).resolve().parents[1]


class Old:
    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        pass


class New:
    def forward(self, input_ids, attention_mask=None, cache=None, **kwargs):
        pass


class Neither:
    def forward(self, input_ids, **kwargs):
        pass


def test_the_cache_has_the_name_that_the_forward_gives_it():
    assert [calls.cache_name(m()) for m in (Old, New, Neither)] == ["past_key_values", "cache", None]
    assert calls.takes(Old(), "use_cache") and not calls.takes(New(), "use_cache")
    around = SimpleNamespace(get_base_model=Old)  # an adapter's forward takes anything
    assert calls.cache_name(around) == "past_key_values"


@pytest.mark.parametrize("make", [tiny.llama, tiny.opt, tiny.gpt2, tiny.gemma2])
def test_a_cache_goes_in_and_comes_out_under_that_name(make):
    model, ids = make(), torch.tensor([tiny.ids("a", "b", "no", "e")])
    whole = model(input_ids=ids, use_cache=True)
    cache = calls.new_cache(model)
    model(input_ids=ids[:, :3], use_cache=True, **{calls.cache_name(model): cache})
    out = model(
        input_ids=ids[:, 3:], attention_mask=torch.ones_like(ids), use_cache=True, position_ids=torch.tensor([[3]]),
        **{calls.cache_name(model): cache},
    )  # fmt: skip
    assert torch.allclose(out.logits[:, -1], whole.logits[:, -1], atol=1e-5)
    assert calls.cache_of(out) is cache
    for mine, theirs in zip(calls.keys_values(cache), calls.keys_values(calls.cache_of(whole))):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs))
    held = [t for pair in calls.keys_values(cache) for t in pair]
    assert calls.cache_bytes(cache) >= sum(t.nbytes for t in held) > 0
    assert calls.cache_of(model(input_ids=ids, use_cache=False)) is None


def test_states_that_are_no_tokens_have_bytes_and_no_length():
    class States:
        layers = [SimpleNamespace(states={0: torch.zeros(3), 1: None}, other=torch.zeros(2))]

        def get_seq_length(self):
            raise ValueError("no attention layers")

    assert calls.cache_bytes(States()) == 20
    assert calls.cache_length(States()) is None


def test_one_entry_under_either_name():
    for own in calls.CACHE_NAMES:
        for asked in calls.CACHE_NAMES:
            d = calls._OneCache({own: None, "input_ids": 1})
            assert asked in d and d.get(asked, 2) is None and d["input_ids"] == 1
            d[asked] = 3
            assert dict(**d) == {own: 3, "input_ids": 1} and d[asked] == 3
            assert d.pop(asked) == 3 and d.pop(asked, 4) == 4 and asked not in d
            assert d.get("other") is None and "other" not in d


@pytest.mark.parametrize("train", ["prefix", "prompt"])
def test_generation_that_leaves_a_prompt_out_is_refused_in_one_line(train, monkeypatch):
    model = moved(attach(tiny.llama(), train), scale=1.0)
    contexts = [tiny.ids("a", "b"), tiny.ids("no")]
    before = model.base_model.__dict__.get("prepare_inputs_for_generation")
    generation.generate(model, tiny.tokenizer(), contexts, max_new_tokens=3)
    left = model.base_model.__dict__.get("prepare_inputs_for_generation")
    assert left in (before, model.base_model_prepare_inputs_for_generation)
    assert "one_cache" not in repr(left)

    def nothing(self, *args, **kwargs):
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", nothing)
    model = moved(attach(tiny.llama(), train), scale=1.0)
    with pytest.raises(
        UserError, match=f"train={train}: peft .* with transformers .*use train=lora"
    ) as error:
        generation.generate(model, tiny.tokenizer(), contexts, max_new_tokens=3)
    assert "\n" not in str(error.value)


def test_a_peft_that_mixes_layers_up_is_refused_in_one_line(monkeypatch, tmp_path):
    """As peft 0.19.0 does for Gemma, by an index too many."""
    model = attach(tiny.llama(), "prefix")
    assert calls.misread_prefix(model) == ""
    adapters.save_adapter(model, tmp_path / "saved")
    inner = type(model).get_prompt

    def mixed(self, *args, **kwargs):
        cache = inner(self, *args, **kwargs)
        cache.layers.reverse()
        return cache

    monkeypatch.setattr(type(model), "get_prompt", mixed)
    with pytest.raises(UserError, match="train=prefix: LlamaForCausalLM: peft .*; use a newer peft") as error:
        adapters.attach_adapter(tiny.llama(), Config(train="prefix", virtual_tokens=3))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="saved: peft .*; use a newer peft"):
        adapters.load_adapter(tiny.llama(), tmp_path / "saved")


def test_it_is_asked_in_one_place():
    """A forward's signature and a cache's names are looked at in model_calls.py only, which imports nothing of zoft."""
    for path in (ROOT / "zoft").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "model_calls.py":
            tree = ast.parse(text)
            assert not any(
                isinstance(n, ast.ImportFrom) and n.module.startswith("zoft") for n in ast.walk(tree)
            )
            continue
        assert not re.search(r"inspect\.signature|past_key_values|DynamicCache", text), path
