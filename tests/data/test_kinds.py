"""Kinds of data that were once read wrongly, or without bounds: the right value, by another reader where there is one."""

import json
import os
import subprocess
import sys
import time

import hostile
import pytest
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.schema import Limits, Task
from zoft.data import tasks
from zoft.data.tasks import local
from zoft.errors import UserError

ROWS = [{"text": f"bad no {i}", "label": "ab"[i % 2]} for i in range(60)]


def loaded(tmp_path, rows, choices, label="label", **more):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = Task(
        name="local", train=str(path), eval=str(path), prompt="{text}", label=label, choices=choices, **more
    )
    return tasks.load_task(task)


@pytest.mark.parametrize(
    "values,choices",
    [
        ([0.0, 1.0], {"0.0": "x", "1.0": "y"}),
        ([0, 1], {"0.0": "x", "1.0": "y"}),
        (["0.0", "1.0"], {"0": "x", "1": "y"}),
        ([0.5, 2], {"0.50": "x", "2.0": "y"}),
        (["cafe\u0301", "the"], {"caf\xe9": "x", "the": "y"}),
        (["caf\xe9", "the"], {"cafe\u0301": "x", "the": "y"}),
        (["1", "1.0"], {"1": "x", "1.0": "y"}),
    ],
)
def test_labels_are_matched_as_numbers_and_as_characters(tmp_path, values, choices):
    data = loaded(tmp_path, [{"text": str(i), "label": values[i % 2]} for i in range(8)], choices)
    assert [r["gold"] for r in data.train] == [0, 1] * 4


@pytest.mark.parametrize(
    "value,choices,hint",
    [
        (0.0, ["1.0", "2.0"], None),
        ("unhelpful", ["helpful", "other"], None),
        ("not_entailment", ["entailment", "neutral"], None),
        ("microeconomic", ["macroeconomic", "other"], None),
        ("class_1", ["class_2", "class_3"], None),
        ("Helpful", ["helpful", "other"], "helpful"),
        ("postive", ["positive", "negative"], "positive"),
        ("not entailment", ["not_entailment", "entailment"], "not_entailment"),
    ],
)
def test_no_hint_names_another_class(tmp_path, value, choices, hint):
    with pytest.raises(UserError, match="is none of task.choices") as error:
        loaded(tmp_path, [{"text": "a", "label": value}] * 3, {c: f" {i}" for i, c in enumerate(choices)})
    assert str(error.value).endswith(f"did you mean {hint}?" if hint else f"({', '.join(choices)})")


def test_a_column_in_other_code_points_is_said_in_code_points(tmp_path):
    with pytest.raises(UserError, match=r"'cafe\\u0301' is, in other code points than 'caf\\xe9'"):
        loaded(tmp_path, [{"text": "a", "cafe\u0301": "a"}] * 3, {"a": "a", "b": "b"}, label="caf\xe9")


def test_folders_of_save_to_disk_and_clones_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made.select(range(5))).save_to_disk(tmp_path / "both")
    made.shuffle(seed=0).with_format("numpy").save_to_disk(tmp_path / "mixed")
    read = lambda name, **which: [row for _, row in local.read("task.train", str(tmp_path / name), **which)]  # noqa: E731
    assert read("one") == read("both") == ROWS and read("both", held_out=True) == ROWS[:5]
    assert read("one", held_out=True) == []
    assert read("mixed") == datasets.load_from_disk(str(tmp_path / "mixed")).with_format(None).to_list()
    with pytest.raises(UserError, match="no validation or test split.*train"):
        datasets.DatasetDict(train=made).save_to_disk(tmp_path / "alone")
        local.read("task.eval", str(tmp_path / "alone"), held_out=True)
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / "dataset_infos.json").write_text("{}")
    (clone / "README.md").write_text("---")
    made.to_parquet(clone / "data" / "train-00000-of-00001.parquet")
    made.select(range(7)).to_parquet(clone / "data" / "test-00000-of-00001.parquet")
    assert read("clone") == ROWS and read("clone", held_out=True) == ROWS[:7]
    for name in ("cola", "rte"):
        (tmp_path / "glue" / name).mkdir(parents=True)
        made.to_parquet(tmp_path / "glue" / name / "train.parquet")
    with pytest.raises(UserError, match="several data sets .cola, rte.; name one"):
        read("glue")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="not a whole folder of save_to_disk"):
        read("one")


def test_columns_without_a_name_are_left_out_with_a_word(tmp_path):
    path = tmp_path / "spam.csv"
    path.write_text("v1,v2,,,\nham,a,,,\nspam,b,more,,\n")
    task = Task(
        name="local",
        train=str(path),
        eval=str(path),
        prompt="{v2}",
        label="v1",
        choices={"ham": "x", "spam": "y"},
    )
    data = tasks.load_task(task)
    assert [r["columns"] for r in data.train] == [{"v1": "ham", "v2": "a"}, {"v1": "spam", "v2": "b"}]
    assert data.left_out == [
        f"{path}: 3 columns without a name left out, though 1 rows have something there (the first: {path}:3)"
    ]


@pytest.mark.parametrize(
    "place,said",
    [
        (
            "hf://datasets/stanfordnlp/sst2/data/x.parquet",
            "named without hf://, as in task.train=stanfordnlp/sst2",
        ),
        ("s3://bucket/d.jsonl", "nothing is fetched from s3://"),
        ("*.jsonl", "give a folder, whose data files are all read: task.train=."),
        ("data/*/x.csv", "task.train=data"),
    ],
)
def test_places_of_other_tools_are_told_what_to_write(place, said):
    with pytest.raises(UserError) as error:
        local.look("task.train", place)
    assert said in str(error.value)


def test_a_slice_of_a_split_is_read_as_the_datasets_package_reads_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "train.parquet")
    take = datasets.load_dataset
    fetched = lambda name, subset, split: take(  # noqa: E731
        "parquet",
        data_files={"train": str(tmp_path / "train.parquet")},
        split=split,
        cache_dir=str(tmp_path / "cache"),
    )
    monkeypatch.setattr(datasets, "load_dataset", fetched)  # only the fetch is replaced
    local.look("task.train", "imdb:train[:7]")
    assert [row for _, row in local.read("task.train", "imdb:train[:7]")] == ROWS[:7]
    assert [row for _, row in local.read("task.train", "imdb:train[10%:20%]")] == ROWS[6:12]


# ---- bounds --------------------------------------------------------------------------------------------------------

BOUNDED = """
import sys, time
from zoft.console import peak_memory_gb
from zoft.data.tasks import local
from zoft.errors import UserError
began = time.monotonic()
try: local.read("task.train", sys.argv[1])
except UserError as error: print(error)
seconds, peak = time.monotonic() - began, peak_memory_gb()
assert seconds < 10 and peak < 1, (seconds, peak)
"""


def bombs(folder):
    """Write files that are far smaller, or claim to be, than what reading them would take: {name: what is said}."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write = parquet.write_table
    write(pyarrow.table({"text": pyarrow.array(["a"]).take(pyarrow.array([0] * 3_000_000))}), folder / "rows.parquet", compression="zstd")  # fmt: skip
    write(pyarrow.table({"text": ["x" * 300_000_000]}), folder / "cell.parquet", compression="zstd")
    many = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 600, pyarrow.int32()), ["x" * 1_000_000])
    write(
        pyarrow.table({"text": many, "n": [f"{i * 7919}" for i in range(600)]}),
        folder / "repeated.parquet",
        compression="zstd",
    )
    (folder / "columns.csv").write_text(",".join(f"c{i}" for i in range(60_000)) + "\n")
    (folder / "names.jsonl").write_text("{" + ",".join(f'"n{i}": 1' for i in [*range(60_000), 7]) + "}\n")
    (folder / "union.jsonl").write_text("".join(f'{{"n{i}": 1}}\n' for i in range(60_000)))
    (folder / "rows.jsonl").write_text("{}\n" * 3_000_000)
    for name in ("hole.jsonl", "hole.csv", "hole.parquet"):
        with (folder / name).open("wb") as file:
            file.truncate(6_000_000_000)
    with (folder / "huge.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    return {
        "rows.parquet": "rows", "cell.parquet": "unpack", "repeated.parquet": "unpack", "columns.csv": "60,000 columns",
        "names.jsonl": "'n7' is there twice", "union.jsonl": "more than 10,000 columns", "rows.jsonl": "limits.rows",
        "hole.jsonl": "limits.cell", "hole.csv": "limits.cell", "hole.parquet": "parquet", "huge.jsonl": "limits.bytes",
    }  # fmt: skip


def test_small_files_that_would_be_large_are_refused_in_seconds_and_megabytes(tmp_path):
    for name, part in bombs(tmp_path).items():
        done = subprocess.run(
            [sys.executable, "-c", BOUNDED, str(tmp_path / name)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 and part in done.stdout and done.stdout.count("\n") == 1, (
            name,
            done.stdout[-300:],
            done.stderr[-600:],
        )


def test_keys_raise_the_limits(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    for limits, key in (
        (Limits(rows=59), "limits.rows"),
        (Limits(bytes=100), "limits.bytes"),
        (Limits(cell=10), "limits.cell"),
    ):
        with pytest.raises(UserError, match=key):
            local.read("task.train", str(path), None, limits)
    exact = Limits(rows=60, bytes=path.stat().st_size, cell=40)
    assert [row for _, row in local.read("task.train", str(path), None, exact)] == ROWS


# ---- tokens, templates, terminals ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return hostile.copy(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("kinds"))


def zoft(place, *words):
    with hostile.working(place):
        return CliRunner().invoke(app, [str(w) for w in words])


def test_tokens_without_a_row_in_the_embedding_are_refused_by_row(place):
    made = tiny.tokenizer()
    made.add_tokens(["<sep>"])
    assert made.convert_tokens_to_ids("<sep>") == tiny.VOCAB
    made.save_pretrained(place / "tiny")
    words = ["--config", "mine.yaml"]
    assert zoft(place, "data", *words).exit_code == 0  # unused, it is harmless
    tiny.write_rows(
        place / "sep.jsonl", [*tiny.ROWS[:30], {"text": "a<sep>b", "label": "a"}, *tiny.ROWS[31:]]
    )
    for verb in (["data"], ["train", "output_dir=never"], ["eval"]):
        said = hostile.refused(
            place, [*verb, *words, "task.train=sep.jsonl"], "sep.jsonl:31", "'<sep>'", "resize"
        )
        assert f"{tiny.VOCAB} rows" in said
    made.eos_token = "<sep>"
    made.save_pretrained(place / "tiny")
    (place / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i}", "completion": "no"}) for i in range(60))
    )
    own = {"model": "tiny", "task": {"name": "local", "train": "pairs.jsonl"}, "threads": 1, "device": "cpu"}
    (place / "own.yaml").write_text(json.dumps(own))
    hostile.refused(place, ["data", "--config", "own.yaml"], "which ends each text")
    tiny.tokenizer().save_pretrained(place / "tiny")


@pytest.mark.parametrize(
    "template,said",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
            "takes more than",
        ),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ 'x'|center(10**11) }}", "memory"),
    ],
)
def test_a_chat_template_is_bounded(place, template, said, monkeypatch):
    from zoft.data import chat

    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.5)
    made = tiny.tokenizer()
    made.chat_template = template
    row = {"messages": [{"role": "user", "content": "a", "scored": False}, {"role": "assistant", "content": "b", "scored": True}], "where": "d:1"}  # fmt: skip
    began = time.monotonic()
    with pytest.raises(UserError, match=f"d:1.*{said}"):
        chat.encode([row], chat.of(made, "template"), 64)
    assert time.monotonic() - began < 8


def test_no_escape_of_a_row_reaches_the_terminal(place):
    rows = [{"prompt": f"{i}\x1b[2J\x9b31m", "completion": "no\x1b]0;t\x07\u202e"} for i in range(60)]
    (place / "esc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"model": "tiny", "task": {"name": "local", "train": "esc.jsonl"}, "threads": 1, "device": "cpu"}
    (place / "own.yaml").write_text(json.dumps(own))
    for more in ([], ["--json"]):
        done = zoft(place, "data", "--config", "own.yaml", *more)
        assert done.exit_code == 0 and all(c.isprintable() or c == "\n" for c in done.output), done.output


def test_a_path_that_exists_is_a_path(place):
    folder = place / "sw" / "lr=0.001-48f02353"
    folder.parent.mkdir()
    os.symlink(place / "run", folder)
    done = zoft(place, "eval", "sw/lr=0.001-48f02353", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout), done.output
    hostile.refused(place, ["validate", "sw/lr=0.001-48f02353"], "is a path")


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_nothing(place):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-c", "from zoft.cli.main import main; main()"]
    for words in (
        ["data", "--config", "mine.yaml", "-n", "40"],
        ["train", "--config", "mine.yaml", "output_dir=piped"],
    ):
        done = subprocess.Popen(
            [*start, *words], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        done.stdout.close()
        if words[0] == "train":
            done.stderr.close()
        error = b"" if done.stderr.closed else done.stderr.read()
        assert done.wait(120) == 0 and b"Error" not in error and b"ignored" not in error, error
    assert json.loads((place / "piped" / "result.json").read_text())
    with open("/dev/full", "w") as full:
        done = subprocess.run([*start, "keys"], env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: standard output: No space left on device\n", (
        done.stderr
    )


@pytest.mark.slow
def test_odd_streams_and_a_folder_that_is_gone_are_one_line(place, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-c", "from zoft.cli.main import main; main()"]
    with open("/dev/full", "w") as full:  # a result that is less than a page fails at the very end
        done = subprocess.run([*start, "env"], env=env, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and done.stderr == "error: standard output: No space left on device\n"
        done = subprocess.run([*start, "validate", "--config", "no.yaml"], env=env, stderr=full, cwd=place)
        assert done.returncode == 2
    latin = {**env, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [*start, "data", "--config", "mine.yaml"], env=latin, cwd=place, capture_output=True
    )
    assert done.returncode == 0 and b"\\u27e6" in done.stdout, done.stderr
    (tmp_path / "gone").mkdir()
    script = 'cd gone; rmdir ../gone; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "-", *start, "ls"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the folder that you are in: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_packed_text_is_said_to_be_evaluated_text_by_text(place):
    (place / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"bad no {i}"}) for i in range(60)))
    own = {
        "model": "tiny",
        "task": {"name": "local", "train": "texts.jsonl", "pack": True},
        "threads": 1,
        "device": "cpu",
    }
    (place / "own.yaml").write_text(json.dumps(own))
    done = zoft(place, "eval", "--config", "own.yaml")
    assert done.exit_code == 0 and "to evaluate, each text has rows of its own" in done.stderr, done.output
