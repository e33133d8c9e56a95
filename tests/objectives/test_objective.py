"""Encoding against ids written by hand, losses against a slow twin: one unpadded fp64 row at a time, NumPy."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from zoft.cli.data import show
from zoft.data import encode as encoding
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.models import calls
from zoft.models.head import project
from zoft.objectives import losses

CHOICE = SimpleNamespace(objective="choice")
LM = SimpleNamespace(objective="lm")


def row(prompt, candidates, gold=0):
    return {"prompt": prompt, "candidates": list(candidates), "gold": gold, "where": "data.jsonl:7"}


def encode(rows, task=CHOICE, max_length=64, **kinds):
    return encoding.encode(rows, tiny.tokenizer(**kinds), task, max_length)


# --- encoding ---------------------------------------------------------------------------------------------


def test_the_candidate_begins_where_the_prompt_ends():
    (e,) = encode([row("cab:", ["yes", "no 1"], gold=1)])
    context = tiny.ids("<bos>", "c", "ab", ":")
    assert e.contexts == (context, context)
    assert e.completions == (tiny.ids("yes"), tiny.ids("no", " ", "1"))
    assert (e.gold, e.single, e.length) == (1, False, 7)


def test_a_token_merged_over_the_boundary_is_the_candidates():
    # "ca" + "b" reads "c", "ab": the prompt's "a" is gone, so the boundary moves before the merged token.
    (e,) = encode([row("ca", ["b", "d"])])
    assert e.contexts == (tiny.ids("<bos>", "c"), tiny.ids("<bos>", "c", "a"))
    assert e.completions == (tiny.ids("ab"), tiny.ids("d"))
    assert not e.single  # the contexts differ, so one row cannot score both


def test_a_trailing_space_of_the_prompt_joins_the_candidate():
    (e,) = encode([row("c: ", ["no", "d"])])
    assert e.contexts == (tiny.ids("<bos>", "c", ":"), tiny.ids("<bos>", "c", ":", " "))
    assert e.completions[0] == tiny.ids(" no")


@pytest.mark.parametrize("eos", [False, True])
def test_bos_is_kept_if_the_tokenizer_adds_it_and_eos_is_not_scored(eos):
    (e,) = encode([row("c:", ["yes", "no"])], bos=False, eos=eos)
    assert e.contexts == (tiny.ids("c", ":"),) * 2 and e.completions == (tiny.ids("yes"), tiny.ids("no"))
    (e,) = encode([row("c:", ["yes", "no"])], bos=True, eos=eos)
    assert e.contexts == (tiny.ids("<bos>", "c", ":"),) * 2 and e.single


def test_single_needs_one_distinct_token_for_every_example():
    assert all(e.single for e in encode([row("c:", ["yes", "no"]), row("d:", ["yes", "no"])]))
    assert not any(e.single for e in encode([row("c:", ["yes", "no"]), row("c:", ["yes", "no1"])]))
    assert not any(e.single for e in encode([row("c:", ["yes", "no"]), row("d:", ["no", "yes"])]))
    assert not any(e.single for e in encode([row("c:", ["no", "no"])]))


def test_a_long_row_loses_the_left_of_its_prompt_and_never_its_candidate():
    (e,) = encode([row("abcde:", ["no 1", "yes"])], max_length=6)
    assert e.contexts == (tiny.ids("<bos>", "e", ":"),) * 2  # one cut for both
    assert e.completions == (tiny.ids("no", " ", "1"), tiny.ids("yes"))
    assert e.length == 6
    (e,) = encode([row("abcde:", ["no 1", "yes"])], max_length=4)
    assert e.contexts == (tiny.ids("<bos>"),) * 2
    (e,) = encode([row("abcde:", ["no 1", "yes"])], max_length=4, bos=False)
    assert e.contexts == (tiny.ids(":"),) * 2


@pytest.mark.parametrize(
    "item, max_length, bos, said",
    [
        (row("abc", ["no 1", "yes"]), 3, True, "max_length=3"),
        (row("abc", ["no 1", "yes"]), 3, False, "max_length=3"),
        (row("abc", ["", "yes"]), 64, True, "''"),
        (row("", ["no", "yes"]), 64, False, "task.prompt"),
        (row("a", ["b", "yes"]), 64, False, "task.prompt"),  # the merge leaves nothing before it
    ],
)
def test_impossible_rows_are_refused_by_name(item, max_length, bos, said):
    with pytest.raises(UserError) as caught:
        encode([item], max_length=max_length, bos=bos)
    assert "data.jsonl:7" in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_show_marks_what_is_scored():
    token = tiny.tokenizer()
    (e,) = encode([row("cab:", ["no 1", "yes"], gold=1)])
    lines = show(e, token).splitlines()
    assert lines == ["<bos>cab:", "  ⟦no⟧⟦ ⟧⟦1⟧", "* ⟦yes⟧"]
    (e,) = encode([row("ca", ["b", "d"])])
    assert show(e, token).splitlines() == ["* <bos>c⟦ab⟧", "  <bos>ca⟦d⟧"]


# --- batches ----------------------------------------------------------------------------------------------


def test_positions_of_a_batch_by_hand():
    examples = encode([row("c:", ["no 1", "yes"], gold=1), row("dd:", ["no 1", "yes"])])
    batch = losses.collate(examples)
    pad, bos, c, d, colon, no, space, one, yes = tiny.ids(
        "<pad>", "<bos>", "c", "d", ":", "no", " ", "1", "yes"
    )
    assert batch.inputs["input_ids"].tolist() == [
        [bos, c, colon, no, space, pad],
        [bos, c, colon, pad, pad, pad],
        [bos, d, d, colon, no, space],
        [bos, d, d, colon, pad, pad],
    ]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 3, 6, 4]
    assert batch.positions.tolist() == [2, 3, 4, 6 + 2, 12 + 3, 12 + 4, 12 + 5, 18 + 3]
    assert batch.targets.tolist() == [no, space, one, yes, no, space, one, yes]
    assert batch.slots.tolist() == [[[0, 1, 2], [3, -1, -1]], [[4, 5, 6], [7, -1, -1]]]
    assert batch.gold.tolist() == [1, 0] and batch.tokens is None and batch.examples == 2


def test_single_tokens_need_one_row_an_example():
    batch = losses.collate(encode([row("c:", ["yes", "no"], gold=1), row("dd:", ["yes", "no"])]))
    assert batch.rows == batch.examples == 2
    assert batch.tokens.tolist() == list(tiny.ids("yes", "no"))
    assert batch.positions.tolist() == [2, 4 + 3]


def test_repeat_is_probe_major():
    batch = losses.collate(encode([row("c:", ["no 1", "yes"], gold=1), row("dd:", ["no 1", "yes", "a"])]))
    twice = batch.repeat(2)
    assert twice.examples == 4 and twice.rows == 10
    ids = batch.inputs["input_ids"]
    assert twice.inputs["input_ids"].equal(torch.cat([ids, ids]))
    assert twice.positions.equal(torch.cat([batch.positions, batch.positions + ids.numel()]))
    assert twice.slots[2:][batch.slots < 0].unique().tolist() == [-1]
    assert (twice.slots[2:] - batch.slots)[batch.slots >= 0].unique().tolist() == [len(batch.positions)]
    assert batch.repeat(1) is batch


# --- losses against the slow twin -------------------------------------------------------------------------


def log_probs(model, ids):
    """[T, V] log-probabilities of the next token, the row alone, all positions, NumPy in fp64."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def slow_scores(model, e):
    out = []
    for context, completion in zip(e.contexts, e.completions, strict=True):
        table = log_probs(model, context + completion)
        out.append([table[len(context) - 1 + i, t] for i, t in enumerate(completion)])
    return out


def slow_choice(model, e):
    means = np.array([np.mean(s) for s in slow_scores(model, e)])
    return np.log(np.exp(means).sum()) - means[e.gold]


MULTI = [
    row("cab: 12", [" no 1", " yes", "a"], 2),
    row("d", [" no 1", " yes", "a"], 0),
    row("e:", ["b", "dd"], 1),
]
SINGLE = [
    row("cab: 12:", ["yes", "no", "d"], 2),
    row("d:", ["yes", "no", "d"], 0),
    row("ee:", ["yes", "no", "d"], 1),
]


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("rows", [MULTI, SINGLE], ids=["multi", "single"])
def test_choice_losses_equal_full_logits_in_fp64(name, rows):
    model = tiny.MODELS[name]().double()
    examples = encode(rows)
    assert examples[0].single == (rows is SINGLE)
    batch = losses.collate(examples, pad=0)
    sums, counts = losses.losses(model, batch)
    want = np.array([slow_choice(model, e) for e in examples])
    np.testing.assert_allclose(sums.numpy(), want, rtol=1e-9)
    assert counts.tolist() == [1.0, 1.0, 1.0]
    # In fp32 the same within its rounding, and as fp32.
    sums32, _ = losses.losses(model.float(), batch)
    assert sums32.dtype == torch.float32
    np.testing.assert_allclose(sums32.numpy(), want, atol=3e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_scores_are_mean_log_probs(name):
    model = tiny.MODELS[name]().double()
    examples = encode(MULTI)
    got = losses.scores(model, losses.collate(examples)).numpy()
    for e, line in zip(examples, got, strict=True):
        want = [np.mean(s) for s in slow_scores(model, e)]
        np.testing.assert_allclose(line[: len(want)], want, rtol=1e-9)
        assert np.all(np.isneginf(line[len(want) :]))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_lm_losses_equal_full_logits_in_fp64(name):
    model = tiny.MODELS[name]().double()
    examples = encode(MULTI, LM)
    sums, counts = losses.losses(model, losses.collate(examples))
    np.testing.assert_allclose(
        sums.numpy(), [-sum(slow_scores(model, e)[e.gold]) for e in examples], rtol=1e-9
    )
    assert counts.tolist() == [len(e.completions[e.gold]) for e in examples]


@pytest.mark.parametrize("rows", [MULTI, SINGLE], ids=["multi", "single"])
@pytest.mark.parametrize("task", [CHOICE, LM], ids=["choice", "lm"])
def test_a_repeated_batch_gives_each_probe_its_losses(rows, task):
    model = tiny.llama().double()
    batch = losses.collate(encode(rows, task))
    once, counts = losses.losses(model, batch)
    thrice, counts3 = losses.losses(model, batch.repeat(3))
    torch.testing.assert_close(thrice, once.repeat(3), rtol=1e-12, atol=0)
    assert counts3.equal(counts.repeat(3))


def test_padding_and_order_do_not_matter():
    model = tiny.opt().double()
    examples = encode(MULTI)
    together, _ = losses.losses(model, losses.collate(examples, pad=0))
    for i, e in enumerate(examples):
        alone, _ = losses.losses(model, losses.collate([e]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=0)
    turned, _ = losses.losses(model, losses.collate(examples[::-1], pad=5))
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-12, atol=0)


def test_chunks_do_not_change_log_probs(monkeypatch):
    logits, targets = torch.randn(7, 11), torch.arange(7)
    whole = losses.target_logprobs(logits, targets)
    monkeypatch.setattr(losses, "CHUNK", 25)  # two rows at a time
    assert losses.target_logprobs(logits, targets).equal(whole)
    want = torch.log_softmax(logits.double(), -1)[targets, targets]
    torch.testing.assert_close(whole.double(), want, rtol=0, atol=1e-6)


def test_bf16_logits_are_reduced_in_fp32():
    logits = (torch.randn(5, 1000) * 4).bfloat16()
    got = losses.target_logprobs(logits, torch.arange(5))
    want = torch.log_softmax(logits.double(), -1)[torch.arange(5), torch.arange(5)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)  # bf16 reduction misses by 1e-2


# --- projection -------------------------------------------------------------------------------------------


class Counted(nn.Linear):
    """A linear head that remembers what reached it: not exactly nn.Linear, so it is never narrowed."""

    def forward(self, x):
        self.shape = tuple(x.shape)
        return super().forward(x)


def full(model, batch):
    logits = model(**batch.inputs).logits
    return logits.flatten(0, 1)[batch.positions]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_project_equals_full_logits(name):
    model = tiny.MODELS[name]().double()
    for rows in (MULTI, SINGLE):
        batch = losses.collate(encode(rows))
        want = full(model, batch)
        got = project(model, batch.inputs, batch.positions)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        few = torch.tensor([5, 3])
        got = project(model, batch.inputs, batch.positions, few)
        torch.testing.assert_close(got, want[:, few], rtol=1e-12, atol=1e-12)
    head = model.get_output_embeddings()
    assert "forward" not in head.__dict__ and not head._forward_pre_hooks  # nothing stays behind


def test_only_scored_positions_reach_the_head():
    model = tiny.llama()
    model.lm_head.__class__ = Counted
    batch = losses.collate(encode(MULTI))
    losses.losses(model, batch)
    assert model.lm_head.shape == (len(batch.positions), 16)
    narrow = losses.collate(encode(SINGLE))
    got = losses.scores(model, narrow)  # a subclass: all columns, then C of them
    torch.testing.assert_close(got, full(model, narrow)[:, narrow.tokens])


def test_a_linear_head_makes_the_candidates_columns_only():
    model = tiny.llama(tie=True)
    shapes = []
    model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    losses.losses(model, losses.collate(encode(SINGLE)))
    assert shapes == [(3, 3)]


def test_a_head_that_takes_tokens_is_given_them():
    model, given = tiny.llama(), []
    weight = model.lm_head.weight

    def forward(x, tokens=None):
        given.append(tokens)
        return nn.functional.linear(x, weight if tokens is None else weight[tokens])

    forward.accepts_tokens = True
    model.lm_head.forward = forward
    narrow, multi = losses.collate(encode(SINGLE)), losses.collate(encode(MULTI))
    torch.testing.assert_close(losses.scores(model, narrow), full(tiny.llama(), narrow)[:, narrow.tokens])
    assert given[0].equal(narrow.tokens)
    losses.losses(model, multi)
    assert given[1] is None and model.lm_head.forward is forward


def test_a_replaced_head_that_takes_no_tokens_is_left_alone():
    model = tiny.llama()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) + 1.0
    narrow = losses.collate(encode(SINGLE))
    got = losses.scores(model, narrow)
    torch.testing.assert_close(got, full(tiny.llama(), narrow)[:, narrow.tokens] + 1.0)


class Headless(nn.Module):
    """Makes its logits by itself, all of them, as a tuple."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask):
        return (self.inner(input_ids=input_ids, attention_mask=attention_mask).logits,)


def test_a_model_without_an_output_embedding_is_gathered_after():
    model = tiny.llama()
    for rows in (MULTI, SINGLE):
        batch = losses.collate(encode(rows))
        torch.testing.assert_close(losses.scores(Headless(model), batch), losses.scores(model, batch))


def test_a_model_that_runs_one_probe_at_a_time_gets_each_probes_positions():
    model = tiny.llama()
    for rows in (MULTI, SINGLE):
        batch = losses.collate(encode(rows)).repeat(3)
        want, _ = losses.losses(model, batch)
        plain = model.forward

        def in_turn(input_ids, attention_mask, plain=plain, **kwargs):
            goes = zip(input_ids.chunk(3), attention_mask.chunk(3), strict=True)
            outputs = [plain(input_ids=i, attention_mask=m, **kwargs).logits for i, m in goes]
            return (torch.cat(outputs),)

        model.forward = in_turn
        got, _ = losses.losses(model, batch)
        del model.forward
        torch.testing.assert_close(got, want)


def test_an_exception_in_the_forward_leaves_the_head_as_it_was():
    model = tiny.llama()

    def broken(*args):
        raise RuntimeError("out of memory")

    handle = model.lm_head.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        losses.losses(model, losses.collate(encode(SINGLE)))
    handle.remove()
    assert "forward" not in model.lm_head.__dict__ and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("name", ["granitemoe_swa", "granitemoehybrid", "llama", "gemma3"])
def test_no_forward_makes_a_cache_and_the_config_stays(name, monkeypatch, tmp_path):
    """The first two do not name `use_cache` in their head's signature; gemma3 has a config within its config."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import shrink

    model = shrink.model("causal", name).requires_grad_(False)
    model.config.get_text_config().use_cache = True  # as every real checkpoint says
    batch, caches = losses.collate(encode(SINGLE)), []
    handle = model.register_forward_hook(lambda m, a, out: caches.append(calls.cache_of(out)))
    model(**batch.inputs)
    losses.losses(model, batch)
    handle.remove()
    assert caches[0] is not None and caches[1] is None
    model.save_pretrained(tmp_path)
    saved = type(model.config).from_pretrained(tmp_path)
    assert saved.get_text_config().use_cache is model.config.get_text_config().use_cache is True

    def broken(module, args):
        raise RuntimeError("broken")

    model.get_output_embeddings().register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        losses.losses(model, batch)
    assert model.config.get_text_config().use_cache is True


def test_lora_models_are_scored_as_they_run():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.llama(), config).double().eval()
    batch = losses.collate(encode(SINGLE))
    got, _ = losses.losses(model, batch)
    want = [slow_choice(model.requires_grad_(False), e) for e in encode(SINGLE)]
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_losses_on_a_gpu():
    model, batch = tiny.llama(), losses.collate(encode(MULTI))
    want, _ = losses.losses(model, batch)
    got, _ = losses.losses(model.cuda(), batch.to("cuda"))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_project_equals_full_logits_on_every_causal_architecture(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import shrink

    contexts = [tuple(5 + (7 * i + j * j) % 80 for j in range(3 + i)) for i in range(4)]
    single = [Example((c, c), ((7,), (9,)), 0, "choice", True) for c in contexts]
    multi = [Example((c, c), ((7, 8), (9,)), 1) for c in contexts]
    seen, wrong = 0, []
    for name in shrink.KINDS["causal"]:
        try:
            model = shrink.model("causal", name).requires_grad_(False)
            model(**losses.collate(single, pad=4).inputs)
        except Exception:
            continue  # the installed transformers cannot build it this small, or it reads more than tokens
        seen += 1
        for examples in (single, multi):
            batch = losses.collate(examples, pad=4)
            out = model(**batch.inputs)
            want = (out.logits if hasattr(out, "logits") else out[0]).flatten(0, 1)[batch.positions]
            want = want if batch.tokens is None else want[:, batch.tokens]
            got = project(model, batch.inputs, batch.positions, batch.tokens)
            if not torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()):
                wrong.append(name)
    assert seen > 180 and not wrong
