"""Verifiable tasks: rows against Python's own arithmetic, scorers against hostile answers, files of GSM8K's layout."""

import json
import random
import time
from fractions import Fraction

import pytest
import tiny

from zoft.config.schema import Limits, Task
from zoft.data.encode import encode, prompts
from zoft.data.tasks import load_task
from zoft.data.tasks.expression import last_number, value_of
from zoft.errors import UserError
from zoft.objectives.verify import answer_in, arithmetic, countdown, gsm8k

HOSTILE = [
    "44**19**35", "9**9**9**9", "(" * 5000 + "1" + ")" * 5000, "1" * 100000, "+".join(["1"] * 50000), "__import__('os').system('x')",
    "1/0", "1//2", "2^9", "1e9", "0x10", "1_000", "a", "", " ", "()", "1+", "*1", "1 2", "-1+2", "+1", "(1", "1)", "1..2", "\u0661+1",
    "\0", "💥" * 10000, "lambda: 1", "1,2", "1;2", "exit()", "9" * 7, "<answer>" * 20000, "<answer>1</answer>" * 20000,
]  # fmt: skip


def by_python(text):
    """An expression's value by Python itself, numbers made fractions; only for texts made here."""
    made = "".join(f"Fraction({c})" if c.isdigit() else c for c in text.replace(" ", " ").split())
    return eval(made, {"Fraction": Fraction})


def tree(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randint(0, 99))
    left, right, op = tree(rng, depth - 1), tree(rng, depth - 1), rng.choice("+-*/")
    text = f"{left} {op} {right}"
    return f"( {text} )" if rng.random() < 0.6 else text


def test_the_grammar_is_pythons_on_random_expressions():
    rng, seen = random.Random(0), 0
    for _ in range(2000):
        text = tree(rng, 4)
        if len(text) > 200:
            continue
        try:
            want = by_python(text)
        except ZeroDivisionError:
            want = None
        assert value_of(text) == want, text
        seen += want is not None
    assert seen > 1000
    assert value_of("3 × 4 − 6 ÷ 2") == 9


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:12]))
def test_hostile_answers_score_nothing_in_no_time(text):
    began = time.perf_counter()
    row = {"numbers": [44, 19, 35], "target": 60, "answer": "60"}
    found = [countdown(row, text), arithmetic(row, text), value_of(text)]
    gsm8k({"answer": "so #### 60"}, text)
    assert time.perf_counter() - began < 0.05
    assert found[0] == 0 and found[1] in (0, 0.1) and (found[2] is None or text.isdigit())


@pytest.mark.parametrize(
    "text, want",
    [
        ("44 + 35 - 19", 1.0), ("(44+35)-19", 1.0), ("Answer: 44 + 35 - 19 = 60", 1.0), ("44 + 35 − 19", 1.0),
        ("<answer> 44 + 35 - 19 </answer>", 1.0), ("1 + 1\n44 + 35 - 19", 0.0), ("44 + 19 + 35", 0.1), ("44 + 35", 0.0),
        ("44 + 35 - 19 + 0", 0.0), ("44 + 35 - 19 and more", 0.0), ("44 + 35 - 19 = sixty", 0.0), ("60", 0.0),
        ("44 / (35 - 35) - 19", 0.0), ("<think>x</think><answer>44 + 35 - 19</answer> so", 1.0), ("4435 - 19", 0.0),
    ],
)  # fmt: skip
def test_countdown_scores(text, want):
    assert countdown({"numbers": [44, 19, 35], "target": 60}, text) == want


@pytest.mark.parametrize(
    "text, want",
    [("60", 1.0), (" 60.", 1.0), ("-60", 0.1), ("61", 0.1), ("060", 1.0), ("60 apples", 0.0), ("sixty", 0.0), ("Answer: 60", 1.0),
     ("60\n61", 1.0), ("<answer>60</answer>", 1.0), ("6 0", 0.0), ("60.5", 0.0)],
)  # fmt: skip
def test_arithmetic_scores(text, want):
    assert arithmetic({"answer": "60"}, text) == want


@pytest.mark.parametrize(
    "text, want",
    [("6 * 203 = 1218\n#### 1,218", 1.0), ("#### $1218.00", 1.0), ("it is 1218", 1.0), ("#### 12", 0.1), ("12", 0.0), ("none", 0.0),
     ("#### 12 and 1218", 0.0), ("1218 #### none", 0.0)],
)  # fmt: skip
def test_gsm8k_scores(text, want):
    if text == "#### 12 and 1218":  # the last number of the marked line
        want = 1.0
    assert gsm8k({"answer": "He has 6 * 203 = 1218\n#### 1,218"}, text) == want


def test_the_last_number():
    assert [last_number(t) for t in ("1 2.5", "x 1,234,567.25 y", "-3", "none", "12,34")] == [
        pytest.approx(2.5), pytest.approx(1234567.25), -3, None, 34,
    ]  # fmt: skip


def test_an_answer_is_the_tagged_part_or_the_first_line():
    assert answer_in("\n\n  12 \n13") == "12"
    assert answer_in("<answer>1</answer> <answer> 2 </answer>") == "2"
    assert answer_in("<answer>1") == "<answer>1"


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["countdown", "arithmetic"])
def test_a_generators_rows_are_right_distinct_and_split_by_hash(name, level):
    data = load_task(Task(name=name, level=level, rows=300))
    rows = [*data.train, *data.eval]
    assert len({r["prompt"] for r in rows}) == len(rows) and len(rows) > 60
    assert not {r["prompt"] for r in data.train} & {r["prompt"] for r in data.eval}
    scorer = {"countdown": countdown, "arithmetic": arithmetic}[name]
    for r in rows:
        assert scorer(r["columns"], r["answers"][0]) == 1.0, r["prompt"]
        assert scorer(r["columns"], "zzz") == 0.0
        if name == "arithmetic":
            assert int(r["answers"][0]) == by_python(r["columns"]["exercise"])
        else:
            assert by_python(r["answers"][0].replace("(", "( ").replace(")", " )")) == r["columns"]["target"]
    again = load_task(Task(name=name, level=level, rows=300))
    assert again.train == data.train
    some = load_task(Task(name=name, level=level, rows=100))  # held-out rows stay held out
    assert {r["prompt"] for r in some.eval} <= {r["prompt"] for r in data.eval}
    other = load_task(Task(name=name, level=level, rows=300, data_seed=1))
    assert [r["prompt"] for r in other.train] != [r["prompt"] for r in data.train]


def test_a_level_with_few_rows_says_so():
    data = load_task(Task(name="arithmetic", level=1))
    assert len(data.train) + len(data.eval) == 100
    assert "100 rows of level 1, by seed 0, all that level 1 has" in data.notes[0]


def test_prompts_are_text_or_the_chat_template():
    data = load_task(Task(name="arithmetic", level=1, rows=40))
    plain = tiny.tokenizer()
    asked = prompts(data.train, plain, 200, data)
    assert plain.decode(asked[0]).endswith("ns e:") or plain.decode(asked[0]).endswith(":")
    (example,) = encode(data.train[:1], plain, data, 300)
    assert example.contexts[0] == asked[0] and example.objective == "lm"
    chatty = tiny.tokenizer()
    chatty.chat_template = "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>{% endif %}"
    said = chatty.decode(prompts(data.train, chatty, 200, data)[0])
    assert said.count("<bos>") == 2 and said.endswith("<bos>")


def test_gsm8k_is_read_from_files(tmp_path):
    lines = [
        {"question": f"How many are {i} and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}
        for i in range(30)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_task(Task(name="gsm8k", train=str(tmp_path / "a.jsonl")), Limits())
    assert len(data.train) + len(data.eval) == 30 and data.eval
    assert all(gsm8k(r["columns"], r["answers"][0]) == 1.0 for r in data.train)
    whole = load_task(
        Task(name="gsm8k", train=str(tmp_path / "a.jsonl"), eval=str(tmp_path / "a.jsonl")), Limits()
    )
    assert len(whole.train) == len(whole.eval) == 30
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "answer": "none"}) + "\n")
    with pytest.raises(UserError, match=r"b.jsonl:1: column answer ends in no '#### number'"):
        load_task(Task(name="gsm8k", train=str(tmp_path / "b.jsonl")), Limits())


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"name": "countdown", "train": "x.jsonl"}, "task.train: task=countdown makes its rows"),
        ({"name": "countdown", "prompt": "{x}"}, "task.prompt: task=countdown brings its own prompts"),
        ({"name": "gsm8k", "rows": 3}, "task.rows=3: is for task=countdown and task=arithmetic"),
        ({"name": "reviews", "level": 3}, "task.level=3: is for task=countdown and task=arithmetic"),
        ({"name": "countdwn"}, "no such task.*did you mean countdown"),
    ],
)  # fmt: skip
def test_keys_that_do_nothing_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        load_task(Task(**keys))
