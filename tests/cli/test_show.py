"""What `zoft data` shows: every token with its mask, long stretches folded, counts of all."""

import chatty
import tiny
from test_chat import Data, row

from zoft.cli import data
from zoft.data.encode import encode
from zoft.data.example import Example

TURNS = ("u:q", "a:r\ns", "u:t", "a:é")


def example(tokenizer, *turns):
    return encode([row(*turns)], tokenizer, Data(), 4096)[0]


def test_a_conversation_with_its_mask():
    tokenizer = chatty.tokenizer()
    text = data.show(example(tokenizer, *TURNS), tokenizer)
    assert text == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦r⟧⟦↵⟧\n⟦s⟧⟦<|im_end|>⟧"
        "\n<|im_start|>user\nt<|im_end|>\n<|im_start|>assistant\n⟦é⟧⟦<|im_end|>⟧"
    )
    coloured = data.show(example(tokenizer, *TURNS), tokenizer, colour=True)
    for code in (data.SCORED, data.DIM, data.OFF):
        assert code in coloured
        coloured = coloured.replace(code, "")
    assert coloured == text


def test_long_contexts_are_folded():
    tokenizer = chatty.tokenizer()
    e = example(tokenizer, "u:" + "x" * 500, "a:" + "y" * 300)
    text = data.show(e, tokenizer, fold=True)
    hidden = len(e.contexts[0]) - data.FOLD
    assert f"x … {hidden} tokens … x" in text and text.count("⟦y⟧") == 300
    assert "…" not in data.show(e, tokenizer) and data.show(e, tokenizer).count("x") == 500


def test_counts_and_a_tree():
    tokenizer = chatty.tokenizer()
    e = example(tokenizer, *TURNS)
    choice = Example(((1, 2), (1, 2)), ((3,), (4, 5)), 1, "choice", cut=2)
    found = data.counts([e, choice])
    assert found["scored"] == 4 + 3 + 2 and found["examples"] == 2 and found["cut"] == 1
    assert found["tokens"] == e.length + 4 and found["longest"] == e.length
    line = data.counted(found)
    assert "2 training examples" in line and "9 scored" in line and "1 (50.0%) are cut" in line
    tree = data.as_tree(e, tokenizer)
    assert len(tree["rows"]) == 1 and tree["gold"] == 0
    assert sum(t["scored"] for t in tree["rows"][0]) == 7 and len(tree["rows"][0]) == e.length
    tree = data.as_tree(choice, tiny.tokenizer())
    assert [[t["scored"] for t in r] for r in tree["rows"]] == [
        [False, False, True],
        [False, False, True, True],
    ]
