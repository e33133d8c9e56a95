"""Text to learn as a whole: each token scored once, packed or not, and the loss that of a slow twin."""

import chatty
import pytest
import tiny
import torch
from test_chat import masks, slow

from zoft.data import texts as pieces
from zoft.data.encode import encode, rows_of
from zoft.errors import UserError
from zoft.objectives import losses

TEXTS = ["ab no yes", "c", "the end: a note on nets, no date", "d e", "yes no " * 9]


def rows(texts):
    return [
        {"prompt": "", "candidates": [t], "gold": 0, "where": f"f:{i}", "pieces": True}
        for i, t in enumerate(texts)
    ]


def scored(examples):
    """The tokens that are scored, in order."""
    return [t for e in examples for t, m in zip(*masks(e)) if m]


@pytest.mark.parametrize("bos, eos", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("max_length", [2, 5, 16, 200])
def test_each_token_is_scored_once(bos, eos, max_length):
    tokenizer = tiny.tokenizer(bos=bos)
    tokenizer.eos_token = "<eos>" if eos else None
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] + [2] * eos for t in TEXTS]
    apart = pieces.encode(rows(TEXTS), tokenizer, max_length)
    assert scored(apart) == [t for ids in texts for t in (ids if bos else ids[1:])]
    assert max(e.length for e in apart) <= max_length
    assert all(not e.contexts[0][0] == 2 for e in apart if len(e.contexts[0]) > 1)
    if eos:
        packed = pieces.encode(rows(TEXTS), tokenizer, max_length, pack=True)
        stream = [t for ids in texts for t in ids]
        assert scored(packed) == (stream if bos else stream[1:])
        assert max(e.length for e in packed) <= max_length and len(packed) <= len(apart) + (
            max_length == 2
        ) * len(TEXTS)
        assert all((e.scored or (True,))[-1] for e in packed)


def test_the_loss_of_pieces_is_that_of_a_slow_twin():
    """A text that fits costs what the whole of it does; packed texts, what their stream does in windows."""
    tokenizer, model = tiny.tokenizer(), tiny.llama().double()
    with torch.no_grad():
        (whole,) = pieces.encode(rows(TEXTS[:1]), tokenizer, 64)
        ids = [1, *tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"], 2]
        logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        wanted = -sum(float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1))
        sums, counts = losses.losses(model, losses.collate([whole]))
        assert abs(float(sums) - wanted) < 1e-9 and int(counts) == len(ids) - 1

        stream = [
            t for text in TEXTS for t in [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        ]
        total, n = 0.0, 0
        for start in range(0, len(stream) - 1, 11):  # windows of 12, which share one token
            window = stream[start : start + 12]
            logp = model(torch.tensor([window])).logits.log_softmax(-1)[0]
            for i in range(len(window) - 1):
                if window[i + 1] != 1:  # a beginning is never predicted
                    total, n = total - float(logp[i, window[i + 1]]), n + 1
        packed = pieces.encode(rows(TEXTS), tokenizer, 12, pack=True)
        sums, counts = losses.losses(model, losses.collate(packed))
        assert abs(float(sums.sum()) - total) < 1e-8 and int(counts.sum()) == n
        assert abs(sum(slow(model, e)[0] for e in packed) - total) < 1e-8


def test_the_row_of_each_piece():
    made = rows(TEXTS)
    examples = pieces.encode(made, tiny.tokenizer(), 9)
    texts = {r["where"]: "" for r in made}
    for r, e in zip(rows_of(made, examples), examples):
        texts[r["where"]] += "".join(tiny.WORDS[t] for t, m in zip(*masks(e)) if m)
    assert [t.removesuffix("<eos>") for t in texts.values()] == [
        "".join(c for c in t if c in tiny.WORDS) for t in TEXTS
    ]


def test_texts_that_cannot_be_learned():
    tokenizer = chatty.tokenizer(eos=None)
    with pytest.raises(UserError, match="f:0: its text has no token to learn"):
        encode(rows(["a"]), tokenizer, None, 16)
    with pytest.raises(UserError, match="task.pack=true: this tokenizer has no end-of-text token"):
        encode(rows(["ab"]), tokenizer, None, 16, pack=True)
    assert len(encode(rows(["ab"]), tokenizer, None, 16)) == 1
