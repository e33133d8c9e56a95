"""Which tokens of a conversation are scored: against other ways to find out, for templates of every kind."""

import random

import chatty
import pytest
import tiny
import torch
from chatty import runs, whole
from test_formats import real

from zoft.data import chat
from zoft.data.encode import encode, how, prompts
from zoft.errors import UserError
from zoft.objectives import losses as objective

END = "<|im_end|>"
WORDS = [
    "yes",
    "no",
    "a longer  answer",
    "1234 5678",
    "é🐟",
    "two\nlines\n",
    "  indented",
    "tail \n\n",
    "\n\nlate",
    "'s",
    "<b>",
]


class Data:
    """As much of a task as encode() reads."""

    objective = "lm"

    def __init__(self, chat="auto", joint=""):
        self.chat, self.joint = chat, joint


def row(*turns, where="f:1"):
    """system: …, user: …, assistant: …, by the first letter; A is an assistant's turn that is not learned."""
    roles = {"s": "system", "u": "user", "a": "assistant", "A": "assistant", "t": "tool"}
    made = [{"role": roles[t[0]], "content": t[2:], "scored": t[0] == "a"} for t in turns]
    return {"messages": made, "where": where}


def conversations(n, system=True, seed=0):
    rng = random.Random(seed)
    made = []
    for i in range(n):
        turns = ["s:" + rng.choice(WORDS)] if system and rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 4)):
            turns += ["u:" + rng.choice(WORDS), rng.choice("aaA") + ":" + rng.choice(WORDS)]
        if not any(t[0] == "a" for t in turns):
            turns[-1] = "a" + turns[-1][1:]
        made.append(row(*turns, *(["u:bye"] if rng.random() < 0.3 else []), where=f"f:{i}"))
    return made


def one(tokenizer, *turns, kind="auto", max_length=512):
    (e,) = encode([row(*turns)], tokenizer, Data(kind), max_length)
    return e


def refused(tokenizer, *turns, kind="auto", max_length=512):
    with pytest.raises(UserError) as caught:
        one(tokenizer, *turns, kind=kind, max_length=max_length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_asked(row, tokenizer):
    """The twin: the tokens of each answer are those after the prompt that asks for it, up to the end of its turn.

    Turn by turn, without offsets: what the template writes before an answer is tokenised alone, as it is when a
    model is asked, and then what it writes more when the answer is there.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    ids, marks, text = [], [], ""

    def add(until, scored):
        nonlocal text
        assert until.startswith(text)
        new = tokenizer(until[len(text) :], add_special_tokens=False)["input_ids"]
        ids.extend(new)
        marks.extend([scored] * len(new))
        text = until

    for i, message in enumerate(row["messages"]):
        if message["scored"]:
            add(tokenizer.apply_chat_template(plain[:i], tokenize=False, add_generation_prompt=True), False)
            done = tokenizer.apply_chat_template(plain[: i + 1], tokenize=False)
            add(done[: done.rindex(END) + len(END)], True)
    return ids, marks


def masks(e):
    marks = e.scored or (True,) * len(e.completions[0])
    return [*e.contexts[0], *e.completions[0]], [*[False] * len(e.contexts[0]), *marks]


@pytest.mark.parametrize("kind", ["bytes", "merging", "smollm2"])
def test_random_conversations_token_by_token(kind):
    merges = [("Ċ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "Ġ"), ("e", "s"), ("ĊĊ", "l")]
    tokenizer = real() if kind == "smollm2" else chatty.tokenizer(merges=merges if kind == "merging" else ())
    rows = conversations(150)
    for made, e in zip(rows, encode(rows, tokenizer, Data(), 4096)):
        ids, marks = masks(e)
        assert (ids, marks) == as_asked(made, tokenizer), made
        assert runs(e, tokenizer) == [m["content"] + END for m in made["messages"] if m["scored"]]


def test_the_template_author_s_own_marks_say_the_same():
    tokenizer = chatty.tokenizer(chatty.GENERATION)
    rows = [
        r
        for r in conversations(60, seed=1)
        if all(m["scored"] for m in r["messages"] if m["role"] == "assistant")
    ]
    assert len(rows) > 10
    for made, e in zip(rows, encode(rows, tokenizer, Data(), 4096)):
        found = tokenizer.apply_chat_template(
            made["messages"], return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        last = max(i for i, m in enumerate(found["assistant_masks"]) if m) + 1
        ids, marks = masks(e)
        assert ids == found["input_ids"][:last] and marks == [
            bool(m) for m in found["assistant_masks"][:last]
        ]


# template -> the text of (system?, question, answer, question, answer), and what is scored of it
KINDS = {
    "brackets": (chatty.BRACKETS, "</s>", ["s:be", "u: q ", "a: r ", "u:s", "a:t"],
                 "<s>[Q] <<be>>\nq [/Q] r </s>[Q] s [/Q] t </s>", ["r </s>", "t </s>"]),
    "trimmed": (chatty.TRIMMED, "<s>", ["u: q ", "a: r\n", "u:s", "a:t"],
                "<s><turn>user\nq<end>\n<turn>model\nr<end>\n<turn>user\ns<end>\n<turn>model\nt<end>", ["r<end>", "t<end>"]),
    "late, one answer": (chatty.LATE, "</s>", ["s:be", "u:q", "a:r"], "[Q]be\nq[/Q]r</s>", ["r</s>"]),
    "thinking": (chatty.THINKING, END, ["u:q", "a:r", "u:s", "a:t"],
                 "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n<|im_start|>user\ns<|im_end|>\n"
                 "<|im_start|>assistant\n<think>\n\n</think>\n\nt<|im_end|>", ["r<|im_end|>", "t<|im_end|>"]),
    "dated": (chatty.DATED, END, ["u:q", "a:r"],
              "Today is 26 Jul 2024.\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>", ["r<|im_end|>"]),
    "endless": (chatty.ENDLESS, END, ["u:q", "a:r", "u:s", "a:t"],
                "user: q\nassistant: r\nuser: s\nassistant: t", ["r", "t"]),
    "an answer first": (chatty.CHATML, END, ["a:r", "u:s", "a:t"],
                        "<|im_start|>assistant\nr<|im_end|>\n<|im_start|>user\ns<|im_end|>\n<|im_start|>assistant\nt<|im_end|>",
                        ["r<|im_end|>", "t<|im_end|>"]),
    "tools": (chatty.CHATML, END, ["u:q", "a:call", "t:7", "a:r"],
              "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\ncall<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n"
              "<|im_start|>assistant\nr<|im_end|>", ["call<|im_end|>", "r<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_templates_of_every_kind(name):
    template, eos, turns, text, scored = KINDS[name]
    tokenizer = chatty.tokenizer(template, eos)
    e = one(tokenizer, *turns)
    assert whole(e, tokenizer) == text and runs(e, tokenizer) == scored


# template -> turns that it cannot be trusted with, and what is said
TRAPS = {
    "turns out of turn": (chatty.BRACKETS, ["u:q", "u:r", "a:s"], "refuses this conversation: turns must take turns"),
    "no system turns": (chatty.TRIMMED, ["s:be", "u:q", "a:r"], "refuses this conversation: no system turns here"),
    "a system turn is dropped": (chatty.DEAF, ["s:be", "u:q", "a:r"], "leaves out turn 1 (system)"),
    "other letters": (chatty.SHOUTING, ["u:q", "a:r"], "leaves out turn 1 (user)"),
    "the system turn moves on": (chatty.LATE, ["s:be", "u:q", "a:r", "u:s", "a:t"], "repeats or moves turn 2 (user)"),
    "a last question is another": (chatty.HASTY, ["u:q", "a:r", "u:s", "a:t"], "turn 2: the chat template writes what stands"),
    "a thought is taken out": (chatty.THINKING, ["u:q", "a:hm</think>r", "u:s", "a:t"], "changes the text of turn 2"),
    "a turn in a turn": (chatty.CHATML, ["u:q<|im_end|>", "a:r"], "turn 1 holds <|im_end|>"),
    "an end in an answer": (chatty.CHATML, ["u:q", "a:r</s>"], "turn 2 holds </s>"),
    "no template": (None, ["u:q", "a:r"], "has no chat template to write turns with; task.chat=plain writes"),
    "a template that is none": ("{{ messages[7].content }}{% for", ["u:q", "a:r"], "refuses this conversation"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_what_cannot_be_verified_is_refused(name):
    template, turns, said = TRAPS[name]
    message = refused(chatty.tokenizer(template), *turns)
    assert said in message and (message.startswith("f:1: ") or template is None), message


def test_turns_as_plain_text():
    tokenizer = chatty.tokenizer(None)
    e = one(tokenizer, "s:be", "u:q", "a:r", "u:s", "a:t", kind="plain")
    assert (
        whole(e, tokenizer) == "System: be\nUser: q\nAssistant: r<|im_end|>\nUser: s\nAssistant: t<|im_end|>"
    )
    assert runs(e, tokenizer) == ["r<|im_end|>", "t<|im_end|>"]
    data = Data("plain")
    data.train = [row("u:q", "a:r")]
    assert "'User: …', 'Assistant: …'" in how(tokenizer, data) and "the token that ends each" in how(
        tokenizer, data
    )
    bare = chatty.tokenizer(None, eos=None, bos=True)  # puts BOS in front of a text
    e = one(bare, "u:no", "a:yes", kind="plain")
    assert whole(e, bare) == "<s>User: no\nAssistant: yes" and runs(e, bare) == ["yes"]


def test_the_line_on_the_screen_says_how():
    for template, said in ((chatty.CHATML, "words and the token that ends each"), (chatty.ENDLESS, "alone (no token ends"),
                           (chatty.DATED, "under a date that stays the same")):  # fmt: skip
        data = Data()
        data.train = [row("u:q", "a:r")]
        assert said in how(chatty.tokenizer(template), data)


def test_tokenizers_that_do_not_say_where_their_tokens_stand(monkeypatch):
    tokenizer = chatty.tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert "no fast tokenizer" in refused(tokenizer, "u:q", "a:r")


@pytest.mark.parametrize("by", [-1, 1, 2])
def test_wrong_offsets_are_found_out(monkeypatch, by):
    """A tokenizer that is mistaken on where its tokens stand: never a mask beside the answer."""
    tokenizer = chatty.tokenizer()
    honest = type(tokenizer).__call__

    def shifted(self, text, **kwargs):
        made = honest(self, text, **kwargs)
        if "offset_mapping" in made:
            made["offset_mapping"] = [[(a + by, b + by) for a, b in o] for o in made["offset_mapping"]]
        return made

    monkeypatch.setattr(type(tokenizer), "__call__", shifted)
    assert "is to be said" in refused(tokenizer, "u:q", "a:r")


def test_tokenizers_that_change_letters_or_begin_texts_with_a_blank():
    lower = chatty.tokenizer(lower=True)
    assert runs(one(lower, "u:Q", "a:A Long  One", "u:S", "a:T"), lower) == ["a long  one" + END, "t" + END]
    spaced = chatty.spaced(chatty.BRACKETS)
    e = one(spaced, "u:q", "a:r s", "u:t", "a:v")
    assert [text.strip() for text in runs(e, spaced)] == ["r s </s>", "v </s>"]
    asked = spaced.apply_chat_template(
        [{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True
    )
    assert list(e.contexts[0]) == spaced(asked, add_special_tokens=False)["input_ids"]  # as it will be asked


# --- what does not fit ------------------------------------------------------------------------------------


def test_the_oldest_exchanges_go_first():
    tokenizer = chatty.tokenizer()
    turns = ["s:be", "u:first", "a:one", "u:second", "a:two", "u:third", "a:three", "u:more"]
    full = one(tokenizer, *turns)
    assert not full.cut and runs(full, tokenizer) == ["one" + END, "two" + END, "three" + END]
    less = one(tokenizer, *turns, max_length=full.length - 1)
    assert whole(less, tokenizer) == whole(one(tokenizer, "s:be", *turns[3:]), tokenizer) and less.cut > 0
    least = one(tokenizer, *turns, max_length=less.length - 1)
    assert whole(least, tokenizer) == whole(one(tokenizer, "s:be", *turns[5:]), tokenizer)
    assert runs(least, tokenizer) == ["three" + END]
    shortened = one(tokenizer, *turns, max_length=least.length - 3)  # then the question loses its beginning
    assert shortened.length == least.length - 3 and runs(shortened, tokenizer) == ["three" + END]
    assert whole(shortened, tokenizer) == whole(least, tokenizer).replace("third", "rd")
    assert "raise max_length" in refused(tokenizer, *turns, max_length=least.length - 5)
    assert "raise max_length" in refused(tokenizer, "u:q", "a:" + "long " * 20, max_length=64)


def test_prompts_and_completions_are_cut_as_ever():
    tokenizer = chatty.tokenizer(None)
    pair = {"prompt": "a question", "candidates": [" so"], "gold": 0, "where": "f:1", "joins": True}
    pair |= row("u:a question", "a: so")
    (e,) = encode([pair], tokenizer, Data(), 8)
    assert whole(e, tokenizer) == "tion so" + END and e.cut == len("a question so") + 1 - 8


def test_what_a_model_is_asked_is_what_it_learned_to_answer():
    """Prompts to write after: those of the examples, cut alike; a row of several answers has none."""
    tokenizer = chatty.tokenizer()
    rows = [row("s:be", "u:question", "a:r"), row("u:q", "A:r", "u:s", "a:t")]
    found = prompts(rows, tokenizer, 1 << 20, Data())
    for made, ids in zip(rows, found):
        turns = [{"role": m["role"], "content": m["content"]} for m in made["messages"][:-1]]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(list(ids)) == asked
    (short,) = prompts(rows[:1], tokenizer, len(found[0]) - 3, Data())
    assert tokenizer.decode(list(short)) == tokenizer.decode(list(found[0])).replace("question", "stion")
    with pytest.raises(UserError, match="f:1: texts are written after a question"):
        prompts([row("u:q", "a:r", "u:s", "a:t")], tokenizer, 99, Data())


# --- the loss ---------------------------------------------------------------------------------------------


def slow(model, e):
    """Σ −log p of the scored tokens and their number, one row at a time, all logits in fp64."""
    ids = [*e.contexts[0], *e.completions[0]]
    logp = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    marks = masks(e)[1]
    parts = [-logp[i - 1, token] for i, (token, m) in enumerate(zip(ids, marks)) if m]
    return float(sum(parts)), len(parts)


def test_the_loss_of_a_mask_is_that_of_a_slow_twin():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}:{% endfor %}"
    model = tiny.llama().double()
    rows = [
        row("u:ab no", "a:yes", "u:cd", "A:no", "u:e", "a:no yes"),
        row("u:d", "a:ab"),
        row("u:no", "a:s e:", "u:t", "a:d"),
    ]
    examples = encode(rows, tokenizer, Data(), 64)
    assert [e.scored is None for e in examples] == [False, True, False]
    batch = objective.collate(examples)
    with torch.no_grad():
        sums, counts = objective.losses(model, batch)
        twice = objective.losses(model, batch.repeat(2))[0]
        wanted = [slow(model, e) for e in examples]
    assert counts.tolist() == [n for _, n in wanted]
    assert torch.allclose(sums, torch.tensor([s for s, _ in wanted], dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(twice, sums.repeat(2), rtol=1e-12)
    with torch.no_grad():
        alone = torch.cat([objective.losses(model, objective.collate([e]))[0] for e in examples])
    assert torch.allclose(alone, sums, rtol=1e-12)


def test_a_mask_is_part_of_the_data():
    from dataclasses import replace

    from zoft.train.header import data_digest

    (e,) = encode([row("u:q", "a:r", "u:s", "a:t")], chatty.tokenizer(), Data(), 512)
    other = replace(e, scored=(True,) * len(e.scored))
    assert data_digest([e]) != data_digest([other]) == data_digest([other])
    assert data_digest([replace(e, cut=3)]) == data_digest([e])


def test_one_skeleton_serves_all_rows_of_its_roles(monkeypatch):
    tokenizer = chatty.tokenizer()
    made = chat.of(tokenizer, "auto")
    chat.encode(conversations(200), made, 4096)
    assert len(made.skeletons) < 120
    rendered = []
    render = chat._render
    monkeypatch.setattr(chat, "_render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    chat.encode(conversations(200), made, 4096)
    assert len(rendered) == 200
