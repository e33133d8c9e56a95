"""Data files in the layouts of other tools: each recognised, with exactly these words scored, or refused with a reason."""

import json
from pathlib import Path

import chatty
import pytest

from zoft.config.compose import parse
from zoft.config.schema import Task
from zoft.data import tasks
from zoft.data.encode import encode, how
from zoft.data.tasks import formats
from zoft.errors import UserError

FILES = Path(__file__).parents[1] / "data" / "formats"
END = "<|im_end|>"  # of a turn and of a text, in both tokenizers

# file -> (settings, how its reading begins, for each row the texts that are scored, in order)
READ = {
    "trl_messages.jsonl": ({}, "format messages: learns the assistant's turns of {messages}", [
        ["The Rhine." + END],
        ["The Nile." + END, "Yes: some 6,650 km.\n\nOnly the Amazon is as long." + END],
    ]),
    "trl_prompt_completion.jsonl": ({}, "format completion: learns {completion} after {prompt}", [
        [" green." + END], [" black." + END],
    ]),
    "trl_conversational_pair.jsonl": ({}, "format messages: learns the assistant's turns of {completion}, after {prompt}", [
        ["Copper." + END], ["Neon." + END],
    ]),
    "trl_text.jsonl": ({}, "format text: learns all of {text}; not read: id", [
        ["Bread is baked from flour, water and salt." + END], ["It rises overnight." + END],
    ]),
    "openai_chat_weight.jsonl": ({}, "format messages", [
        ["About 384,400." + END], ["Goethe, over sixty years." + END],
    ]),
    "openai_parts.json": ({}, "format messages", [["12" + END]]),
    "openai_legacy.jsonl": ({"chat": "plain"}, "format completion", [[" positive" + END], [" negative" + END]]),
    "alpaca.json": ({}, "format instruction: learns {output} after {instruction} and {input}", [
        ["Does it rain?" + END], ["Jupiter" + END],
    ]),
    "alpaca_with_text.json": ({"format": "instruction"}, "format instruction: learns {output} after {instruction} and "
        "{input}; not read: text", [["Mercury" + END]]),
    "llamafactory_system.json": ({}, "format instruction: learns {output} after {instruction} and {input}, system turn "
        "{system}; not read: history", [["Ahoy!" + END]]),
    "axolotl_sharegpt.jsonl": ({}, "format sharegpt: learns the assistant's turns of {conversations}", [
        ["White" + END, "Black" + END], ["Yellow" + END],
    ]),
    "mlx_folder": ({}, "format completion", [["Nairobi" + END], ["Accra" + END]]),
    "question_answer.parquet": ({}, "format completion: learns {answer} after {question}", [
        ["3 + 4 = 7\n#### 7" + END], ["18 / 2 = 9\n#### 9" + END],
    ]),
    "messages.parquet": ({}, "format messages: learns the assistant's turns of {messages}; not read: source", [
        ["Pong." + END], ["Who's there?" + END],
    ]),
    "dolly.jsonl": ({}, "format instruction: learns {response} after {instruction} and {context}; not read: category", [
        ["Kim" + END], ["Trout" + END],
    ]),
    "input_output.tsv": ({}, "format completion: learns {output} after {input}", [["dog" + END], ["cat " + END]]),
    "bom.csv": ({}, "format completion: learns {completion} after {prompt}", [["hi\nhi" + END], ["é🐟" + END]]),
    "crlf.jsonl": ({}, "format messages", [["  Both — 两 👩‍🚀 \t" + END]]),
    "own_columns.jsonl": ({"columns": {"prompt": "frage", "completion": "antwort"}}, "format completion: learns "
        "{antwort} after {frage}", [["Zoe" + END], ["Aus Ulm" + END]]),
    "own_turns.jsonl": ({"columns": {"messages": "dialog", "role": "speaker", "content": "text"}}, "format messages: "
        "learns the assistant's turns of {dialog}", [["Pong!" + END]]),
    "texts": ({}, "format text", [["The first page.\nIt has two lines.\n" + END], ["The second page." + END]]),
    "trl_preference.jsonl": ({"columns": {"prompt": "prompt", "completion": "chosen"}}, "format completion: learns {chosen} "
        "after {prompt}; not read: rejected", [[" green." + END]]),
    "question_context.jsonl": ({"columns": {"instruction": "question", "input": "context", "output": "answer"}},
        "format instruction: learns {answer} after {question} and {context}", [["Kim" + END]]),
}  # fmt: skip

# file -> (settings, what the refusal says)
REFUSED = {
    "trl_preference.jsonl": ({}, "pairs to prefer one of (prompt, chosen, rejected) are no format here"),
    "trl_unpaired.jsonl": ({}, "(prompt, completion, label) fit format completion but for label; say task.format=completion"),
    "openai_tools.jsonl": ({}, "fit format messages but for tools"),
    "openai_image.json": ({}, "item 1: turn 1 has a part of type image_url; only text is learned from"),
    "alpaca_with_text.json": ({}, "(instruction, input, output, text) can be read as instruction or text; say task.format=instruction or"),
    "llamafactory_history.json": ({}, "fit format instruction but for history"),
    "llamafactory_sharegpt_tools.json": ({}, "fit format sharegpt but for tools"),
    "axolotl_segments.jsonl": ({}, "no known format has the columns segments; say which is which"),
    "label.csv": ({}, "(text, label) fit format text but for label; say task.format=text to leave that unread, or task.prompt"),
    "empty_assistant.jsonl": ({}, "empty_assistant.jsonl:2: turn 2 (assistant) is empty"),
    "unknown_role.jsonl": ({}, "unknown_role.jsonl:1: turn 2 has role=asistant, which is none of system"),
    "mixed.jsonl": ({}, "(messages, prompt, completion) can be read as messages or completion; say task.format=messages or"),
    "missing_column.jsonl": ({}, "no known format has the columns prompt; say which is which"),
    "missing_cell.jsonl": ({}, "missing_cell.jsonl:2: column completion is empty"),
    "no_assistant.jsonl": ({}, "no_assistant.jsonl:2: no turn of the assistant is there to learn"),
    "weights_zero.jsonl": ({}, "weights_zero.jsonl:1: no turn of the assistant is there to learn"),
    "turns_as_text.jsonl": ({}, "column messages holds text (JSON in it, perhaps), not a list of turns"),
    "special_token.jsonl": ({}, "special_token.jsonl:1: turn 1 holds <|im_end|>, a special token"),
    "squad_nested.json": ({}, "no known format has the columns id, title, context, question, answers"),
    "question_context.jsonl": ({}, "fit format completion but for context"),
}  # fmt: skip
# What a key makes of some of them.
REFUSED_BY_KEY = [
    ("openai_tools.jsonl", {"format": "messages"}, "openai_tools.jsonl:1: turn 2 has tool_calls, which is not learned from here"),
    ("llamafactory_sharegpt_tools.json", {"format": "sharegpt"}, "turn 2 has from=function_call: tool calls are not learned from here; from=gpt"),
    ("mixed.jsonl", {"format": "messages"}, "mixed.jsonl:2: column messages is empty"),
    ("mixed.jsonl", {"format": "completion"}, "mixed.jsonl:1: column prompt is empty"),
    ("missing_column.jsonl", {"format": "completion"}, "task.format=completion: task.train lacks columns prompt and completion"),
    ("trl_messages.jsonl", {"format": "sharegpt"}, "lacks a column conversations of {from, value}"),
    ("label.csv", {"format": "label"}, "task.prompt is not set"),
    ("own_columns.jsonl", {"columns": {"promt": "frage"}}, "promt is none of text, prompt, completion"),
    ("own_columns.jsonl", {"columns": {"prompt": "Frage"}}, "Frage is no column of task.train (frage, antwort); did you mean frage?"),
    ("alpaca.json", {"pack": True}, "task.pack: is for format text, not instruction"),
    ("alpaca.json", {"prompt": "{instruction}", "target": "{output}", "pack": True}, "task.pack: templates (task.prompt, …)"),
    ("alpaca.json", {"prompt": "{instruction}", "target": "{output}", "format": "instruction"}, "leave one of both out"),
    ("own_turns.jsonl", {"columns": {"messages": "dialog"}}, "turn 1 has no role (speaker, text)"),
]  # fmt: skip


def real():
    from zoft.models import load

    try:
        return load.load_tokenizer("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def tokenizer(request):
    return chatty.tokenizer() if request.param == "bytes" else real()


def settings(name, **keys):
    place = str(FILES / name)
    keys = {"eval": None if name == "mlx_folder" else place, **keys}
    return Task(name="local", train=place, **keys)


def test_there_is_a_word_on_every_file():
    assert {p.name for p in FILES.iterdir()} == {*READ, *REFUSED}


@pytest.mark.parametrize("name", READ)
def test_exactly_these_words_are_scored(tokenizer, name):
    keys, line, wanted = READ[name]
    task = settings(name, **keys)
    tasks.check_task(task)
    data = tasks.load_task(task)
    assert data.reading.startswith(line) and data.reading in data.notes, data.reading
    examples = encode(data.train, tokenizer, data, 512)
    found = [chatty.runs(e, tokenizer) for e in examples]
    if "pieces" in data.train[0]:  # with nothing before a text its first token cannot be scored
        first = [tokenizer.decode(list(e.contexts[0])) for e in examples]
        found = [[f + text for text in texts] for f, texts in zip(first, found)]
    assert found == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_sure_is_refused(name):
    keys, said = REFUSED[name]
    refused(name, keys, said)


@pytest.mark.parametrize("name, keys, said", REFUSED_BY_KEY)
def test_keys_decide_and_do_not_hide_anything(name, keys, said):
    refused(name, keys, said)


def refused(name, keys, said):
    with pytest.raises(UserError) as caught:
        data = tasks.load_task(settings(name, **keys))
        encode(data.train, chatty.tokenizer(), data, 512)
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_labels_with_their_choices_are_read_as_ever():
    choices = {"positive": " good", "negative": " bad"}
    task = settings("label.csv", format="label", prompt="{text}", label="label", choices=choices)
    data = tasks.load_task(task)
    assert data.objective == "choice" and not data.reading and [r["gold"] for r in data.train] == [0, 1]


def test_prompts_and_completions_as_text():
    """What stands between the two, and what the line on the screen says of it."""
    bare = chatty.tokenizer(template=None)
    for name, joint, first in (("question_answer.parquet", "a line break", "many?\n3 + 4 = 7\n#### 7" + END),
                               ("trl_prompt_completion.jsonl", "as they stand", "Grass is green." + END),
                               ("alpaca.json", "a line break", "question.\n\nIt rains.\nDoes it rain?" + END),
                               ("llamafactory_system.json", "a line break", "a sailor.\n\nSay hello.\nAhoy!" + END)):  # fmt: skip
        data = tasks.load_task(settings(name))
        assert joint in how(bare, data), name
        (e, *_) = encode(data.train, bare, data, 512)
        assert chatty.whole(e, bare).endswith(first) and e.scored is None
        assert "chat template" in how(chatty.tokenizer(), data)


def test_a_folder_gives_its_own_splits(tmp_path):
    data = tasks.load_task(settings("mlx_folder"))
    assert [r["candidates"] for r in data.eval] == [["N'Djamena"]]
    assert "2 rows" in data.notes[0] and "1 rows for evaluation" in data.notes[1]
    (tmp_path / "test.jsonl").write_text((FILES / "mlx_folder" / "test.jsonl").read_text())
    only = tasks.load_task(settings("mlx_folder", eval=str(tmp_path)))
    assert [r["candidates"] for r in only.eval] == [["Bamako"]]
    (tmp_path / "test.txt").write_text("a")
    with pytest.raises(UserError, match="is a folder of both test.txt and test.jsonl"):
        tasks.check_task(settings("mlx_folder", eval=str(tmp_path)))


def test_texts_in_a_folder_know_their_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="b.txt: column text is empty"):
        tasks.load_task(Task(name="local", train=str(tmp_path), eval=str(tmp_path)))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="b.txt:1: not UTF-8"):
        tasks.load_task(Task(name="local", train=str(tmp_path), eval=str(tmp_path)))


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "tree, said",
    [
        ({"data": [{"prompt": "q", "completion": "a"}] * 3}, "a.json is one object, whose data is a list of 3; if those are the rows, save"),
        ({"messages": json.dumps(TURNS)}, "column messages holds text (JSON in it, perhaps), not a list of turns"),
        ({"conversation": {"turns": TURNS}}, "column conversation holds dict, not a list of turns"),
    ],
)  # fmt: skip
def test_what_hides_the_rows_is_named(tmp_path, tree, said, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree, indent=indent), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        tasks.load_task(Task(name="local", train=str(path), eval=str(path)))
    assert str(caught.value).startswith("task.train: ") and said in str(caught.value)


ASK, GOOD, BAD = [[turn] for turn in (*TURNS, {"role": "assistant", "content": "b"})]


@pytest.mark.parametrize(
    "row, hint, learned",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "{prompt: prompt, completion: chosen}", "a"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "{prompt: question, completion: chosen}", "a"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, "{prompt: prompt, completion: chosen}", "a"),
        ({"prompt": "q", "chosen": ASK + GOOD, "rejected": ASK + BAD}, "{messages: chosen}", "a"),
        ({"chosen": ASK + GOOD, "rejected": ASK + BAD}, "{messages: chosen}", "a"),
        ({"chosen": "q a", "rejected": "q b"}, "{text: chosen}", "q a"),
    ],
)
def test_the_hint_for_pairs_is_what_reads_them(tmp_path, row, hint, learned):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError) as caught:
        tasks.load_task(Task(name="local", train=str(path), eval=str(path)))
    assert f"task.columns={hint} learns the chosen ones" in str(caught.value)
    columns = parse(f"task.columns={hint}")[1]
    (made,) = tasks.load_task(Task(name="local", train=str(path), eval=str(path), columns=columns)).train
    assert made["candidates"] == [learned]


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize("columns", [("question", "answer"), ("instruction", "output")])
def test_answers_that_count_choices_are_not_learned_without_them(tmp_path, name, columns):
    path = tmp_path / "mc.jsonl"
    rows = [{columns[0]: f"q{i}", name: ["a", "b", "c"], columns[1]: i % 3} for i in range(30)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    with pytest.raises(UserError, match=f"but for {name}; .* task.label={columns[1]} and task.choices="):
        tasks.load_task(Task(name="local", train=str(path)))
    kind = "completion" if columns[0] == "question" else "instruction"
    assert f"not read: {name}" in tasks.load_task(Task(name="local", train=str(path), format=kind)).reading
    path.write_text("\n".join(json.dumps(r | {name: []}) for r in rows))  # nothing is lost
    assert tasks.load_task(Task(name="local", train=str(path))).train


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_is_one_row(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": TURNS}, indent=indent), encoding="utf-8")
    (row,) = tasks.load_task(Task(name="local", train=str(path), eval=str(path))).train
    assert [(t["content"], t["scored"]) for t in row["messages"]] == [("q", False), ("a", True)]


def test_letters_that_look_like_line_ends_part_no_rows(tmp_path):
    """U+2028, U+2029, U+0085 and a lone CR are letters of a cell; a BOM and CRLF are none of it; blank lines are no rows."""
    answer = "a\u2028b\u2029c\x85d\x0b\x0ce"
    lines = [json.dumps({"prompt": f"q{i}", "completion": answer}, ensure_ascii=False) for i in range(2)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join([*lines, ""]).encode())
    cells = f'"q0","{answer}\r\n"\r\n\r\n"q1","{answer}\r\n"\r\n'
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbf" + f",prompt,completion\r\n0,{cells}".replace('\n"q1', '\n1,"q1').encode()
    )
    for name, wanted in (("a.jsonl", answer), ("a.csv", answer + "\r\n")):
        data = tasks.load_task(Task(name="local", train=str(tmp_path / name), eval=str(tmp_path / name)))
        assert [r["candidates"] for r in data.train] == [[wanted], [wanted]]
        assert any("a column without a name left out" in line for line in data.left_out) == (name == "a.csv")
        for e in encode(data.train, chatty.tokenizer(), data, 512):
            assert chatty.runs(e, chatty.tokenizer()) == [wanted + END]


def test_the_split_is_by_what_comes_before_the_first_answer():
    where = "a"
    reading = formats.Reading("messages", {"messages": "messages"})

    def key(*turns):
        roles = ("user", "assistant") * 3
        rows = [{"role": r, "content": c} for r, c in zip(roles, turns)]
        return formats.make(where, {"messages": rows}, reading)["key"]

    assert key("q", "a") == key("q", "b", "c", "d") != key("r", "a")


def test_a_hidden_cell_is_not_read_as_text(tmp_path):
    for value, said in (({"a": 1}, "holds a dict"), ("a\0b", "zero byte"), ("\ud800", "half of a character")):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"messages": [{"role": "user", "content": value}]}))
        with pytest.raises(UserError, match=said):
            tasks.load_task(Task(name="local", train=str(path), eval=str(path)))


def test_a_column_of_few_short_values_is_named_as_a_label(tmp_path):
    def said(sentiments):
        lines = [f"film {i} was long,{s}" for i, s in enumerate(sentiments)]
        (tmp_path / "my.csv").write_text("\n".join(["sentence,sentiment", *lines]))
        with pytest.raises(UserError, match="no known format has the columns sentence, sentiment") as error:
            tasks.load_task(Task(name="local", train=str(tmp_path / "my.csv")))
        return str(error.value)

    wanted = 'task.label=sentiment, task.choices=\'{neg: " …", pos: " …"}\''
    assert said(["pos", "neg"] * 5).endswith(wanted)
    assert "label" not in said([f"mood {i}" for i in range(10)])
    assert "label" not in said(["pos"] * 10)
