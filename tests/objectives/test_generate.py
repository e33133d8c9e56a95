"""Generation: against a greedy loop of whole forwards, one row at a time, without cache or padding."""

from contextlib import nullcontext

import pytest
import tiny
import torch
import transformers as hf
from test_adapters import attach, moved

from zoft.errors import UserError
from zoft.models import head
from zoft.models.quant import linear
from zoft.objectives import text as generation
from zoft.objectives.text import generate

CONTEXTS = [
    tiny.ids("<bos>", *words) for words in ("abab", "no", "dots e", "a", "nost", "toda", "b", "yes no")
]


@torch.no_grad()
def slow(model, tokenizer, context, *, max_new_tokens, stop=None):
    """One whole forward a token."""
    device, row = next(model.parameters()).device, []
    while len(row) < max_new_tokens:
        ids = torch.tensor([[*context, *row]], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        row.append(int(head.project(model, inputs, torch.tensor([ids.shape[1] - 1], device=device)).argmax()))
        if row[-1] == tokenizer.eos_token_id:
            row.pop()
            break
        text = tokenizer.decode(row, skip_special_tokens=True)
        if stop is not None and stop in text:
            return text[: text.index(stop)].strip()
    return tokenizer.decode(row, skip_special_tokens=True).strip()


def bloom():
    config = hf.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    return tiny.build(hf.BloomForCausalLM, config)


def mamba():
    config = hf.MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    return tiny.build(hf.MambaForCausalLM, config)


@pytest.mark.parametrize("make", [tiny.llama, tiny.opt, tiny.gpt2, tiny.gemma2, bloom, mamba])
@pytest.mark.parametrize("stop", [None, "s", "no"])
def test_batched_generation_is_the_slow_loop(make, stop, monkeypatch):
    monkeypatch.setattr(generation, "TOKENS", 60)  # several batches
    model, tokenizer = make(), tiny.tokenizer()
    got = generate(model, tokenizer, CONTEXTS, max_new_tokens=12, stop=stop)
    want = [slow(model, tokenizer, c, max_new_tokens=12, stop=stop) for c in CONTEXTS]
    assert got == want
    assert len(set(want)) > 3 and (stop is None or any(len(t) > 0 for t in want))


@pytest.mark.parametrize("train", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.opt, tiny.gpt2])
def test_adapters_generate_as_the_slow_loop(make, train):
    plain = [slow(make(), tiny.tokenizer(), c, max_new_tokens=8) for c in CONTEXTS]
    model, tokenizer = moved(attach(make(), train), scale=1.0), tiny.tokenizer()
    got = generate(model, tokenizer, CONTEXTS, max_new_tokens=8)
    assert got == [slow(model, tokenizer, c, max_new_tokens=8) for c in CONTEXTS]
    assert got != plain
    assert len(generate(model, tokenizer, CONTEXTS[:1], max_new_tokens=3)) == 1


def test_quantised_models_generate_as_the_slow_loop():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    linear.quantise_model(model, bits=8, group=32)
    got = generate(model, tokenizer, CONTEXTS, max_new_tokens=8)
    assert got == [slow(model, tokenizer, c, max_new_tokens=8) for c in CONTEXTS]


def test_what_a_checkpoint_asks_for_is_left_out_and_put_back():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    want = generate(model, tokenizer, CONTEXTS, max_new_tokens=8)
    asked = hf.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=8, max_length=3, num_beams=2,
        suppress_tokens=list(range(20)),
    )  # fmt: skip
    model.generation_config = asked
    state = torch.random.get_rng_state()
    assert generate(model, tokenizer, CONTEXTS, max_new_tokens=8) == want
    assert model.generation_config is asked
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_end_token_ends_a_text_and_is_left_out():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    long = generate(model, tokenizer, CONTEXTS, max_new_tokens=10)
    end = tiny.WORDS.index(long[1][2])  # a letter that is made third in some text
    model.generation_config.eos_token_id = [2, end]
    got = generate(model, tokenizer, CONTEXTS, max_new_tokens=10)
    assert got == [t.partition(long[1][2])[0].strip() for t in long] and got != long


class Shifted(hf.LlamaForCausalLM):
    """Counts padding as positions: wrong on padded rows, as some models are."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(past, past + input_ids.shape[1])[None].expand(len(input_ids), -1) ** 2
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, **kwargs,
        )  # fmt: skip


def test_a_model_that_padding_disturbs_gets_rows_of_one_length():
    model, tokenizer = tiny.build(Shifted, tiny.llama().config), tiny.tokenizer()
    sizes = []

    def count(rows):
        sizes.append(rows)
        return nullcontext()

    got = generate(model, tokenizer, CONTEXTS, max_new_tokens=8, context=count)
    alone = [generate(model, tokenizer, [c], max_new_tokens=8)[0] for c in CONTEXTS]
    assert got == alone
    lengths = sorted({len(c) for c in CONTEXTS}, reverse=True)
    assert sizes[2:] == [sum(len(c) == n for c in CONTEXTS) for n in lengths]


def test_a_nan_is_noted_and_not_taken_for_a_token():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    how = {"max_new_tokens": 4, "stop": None, "context": None, "progress": lambda done: None}
    assert all(made.sound for made in generation.texts(model, tokenizer, CONTEXTS, **how))
    model.model.norm.weight.data[3] = float("nan")
    assert not any(made.sound for made in generation.texts(model, tokenizer, CONTEXTS, **how))


def test_a_model_without_a_head_is_refused_in_one_line():
    model = tiny.build(hf.LlamaModel, tiny.llama().config)
    with pytest.raises(UserError, match="LlamaModel: .*cannot generate") as error:
        generate(model, tiny.tokenizer(), CONTEXTS, max_new_tokens=4)
    assert "\n" not in str(error.value)
