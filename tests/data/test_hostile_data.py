"""Data files from anybody: refused in one line that names the line, before a model loads."""

import json
import os
import pickle

import hostile
import pytest

GOOD = [{"text": f"bad no {i}", "label": "ab"[i % 2]} for i in range(60)]
LINES = [json.dumps(row) for row in GOOD]
CSV = "text,label\n" + "".join(f"bad no {i},{'ab'[i % 2]}\n" for i in range(60))


def with_line(line, at=20):
    lines = [x.encode() for x in LINES]
    lines[at] = line if isinstance(line, bytes) else line.encode()
    return b"\n".join(lines)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


# name -> (file name, bytes, what the answer must name)
FILES = {
    "empty": ("d.jsonl", b"", "no rows"),
    "blank lines": ("d.jsonl", b"\n \n\n", "no rows"),
    "one row": ("d.jsonl", LINES[0].encode(), "too few"),
    "cut": ("d.jsonl", "\n".join(LINES).encode()[:-5], "d.jsonl:60"),
    "a line cut": ("d.jsonl", with_line(LINES[20][:-3]), "d.jsonl:21"),
    "two objects a line": ("d.jsonl", with_line(LINES[1] + LINES[2]), "d.jsonl:21"),
    "a trailing comma": ("d.jsonl", with_line('{"text": "a", "label": "a",}'), "d.jsonl:21"),
    "single quotes": ("d.jsonl", with_line("{'text': 'a'}"), "d.jsonl:21"),
    "a list": ("d.jsonl", with_line('["a", "b"]'), "d.jsonl:21"),
    "a number": ("d.jsonl", with_line("3"), "d.jsonl:21"),
    "null": ("d.jsonl", with_line("null"), "d.jsonl:21"),
    "a column twice": ("d.jsonl", with_line('{"text": "a", "text": "b", "label": "a"}'), "'text' is there twice"),
    "a column missing": ("d.jsonl", with_line('{"label": "a"}'), "column text is empty"),
    "a label missing": ("d.jsonl", with_line('{"text": "a"}'), "column label is empty"),
    "null in a column": ("d.jsonl", with_line('{"text": null, "label": "a"}'), "column text is empty"),
    "nan in a column": ("d.jsonl", with_line('{"text": NaN, "label": "a"}'), "column text is empty"),
    "a list in a column": ("d.jsonl", with_line('{"text": ["a"], "label": "a"}'), "holds a list"),
    "an object in a column": ("d.jsonl", with_line('{"text": {"a": 1}, "label": "a"}'), "holds a dict"),
    "an unknown label": ("d.jsonl", with_line('{"text": "a", "label": "c"}'), "label=c"),
    "a list as label": ("d.jsonl", with_line('{"text": "a", "label": ["a"]}'), "holds a list"),
    "a huge number as label": ("d.jsonl", with_line(f'{{"text": "a", "label": {"9" * 300}}}'), "none of task.choices"),
    "a number of 5,000 digits": ("d.jsonl", with_line(f'{{"text": {"9" * 5000}, "label": "a"}}'), "d.jsonl:21: bad JSON: a number of more than 4,300 digits"),
    "half of a character": ("d.jsonl", with_line('{"text": "a\\ud800b", "label": "a"}'), "d.jsonl:21: column text"),
    "half of a character in a label": ("d.jsonl", with_line('{"text": "a", "label": "\\udfff"}'), "d.jsonl:21"),
    "a zero byte": ("d.jsonl", with_line('{"text": "a\\u0000b", "label": "a"}'), "zero byte"),
    "a raw zero byte": ("d.jsonl", with_line(b'{"text": "a\0b", "label": "a"}'), "d.jsonl:21"),
    "latin-1": ("d.jsonl", with_line(b'{"text": "caf\xe9", "label": "a"}'), "d.jsonl:21: not UTF-8"),
    "an overlong encoding": ("d.jsonl", with_line(b'{"text": "\xc0\xaf", "label": "a"}'), "d.jsonl:21: not UTF-8"),
    "cut in a character": ("d.jsonl", "\n".join([*LINES, '{"text": "é']).encode()[:-1], "not UTF-8"),
    "utf-16": ("d.jsonl", "\n".join(LINES).encode("utf-16"), "not UTF-8"),
    "utf-32": ("d.jsonl", "\n".join(LINES).encode("utf-32"), "d.jsonl:1: not UTF-8 (byte 0xff); convert it: iconv -f utf-32"),
    "zero bytes": ("d.jsonl", b"\0" * 4096, "d.jsonl:1"),
    "20,000 deep": ("d.jsonl", with_line('{"text": ' + "[" * 20000), "d.jsonl:21"),
    "20,000 deep, closed": ("d.jsonl", with_line('{"text": ' + "[" * 20000 + "]" * 20000 + "}"), "d.jsonl:21"),
    "a line of 11 MB": ("d.jsonl", with_line(f'{{"text": "{"x" * 11_000_000}", "label": "a"}}'), "one line"),
    "a name of 5,000 letters": ("d.jsonl", with_line(json.dumps({"x" * 5000: "a"})), "column text is empty"),
    "an escape sequence": ("d.jsonl", with_line('{"text": "a", "label": "\\u001b[31mred"}'), "\\x1b"),
    "html": ("d.jsonl", b"<!DOCTYPE html><html><body>404</body></html>", "d.jsonl:1"),
    "git lfs": ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "d.jsonl:1"),
    "other columns": ("d.jsonl", b'{"Text": "a", "Label": "b"}\n' * 60, "{text} is no column"),
    "no label column": ("d.jsonl", b'{"text": "a"}\n' * 60, "label"),
    "one text only": ("d.jsonl", b'{"text": "a", "label": "a"}\n' * 60, "too few"),
    "json, empty": ("d.json", b"", "no rows"),
    "json, an empty list": ("d.json", b"[]", "no rows"),
    "json, cut": ("d.json", json.dumps(GOOD).encode()[:-9], "d.json:1"),
    "json, numbers": ("d.json", b"[1, 2]", "item 1"),
    "json, lists": ("d.json", b"[[1], [2]]", "item 1"),
    "json, a column twice": ("d.json", b'[{"text": "a", "text": "b", "label": "a"}]', "twice"),
    "json, deep": ("d.json", b"[" * 20000, "d.json"),
    "json, deep, closed": ("d.json", b"[" * 20000 + b"]" * 20000, "d.json"),
    "json, a number of 5,000 digits": ("d.json", b'[{"text": ' + b"9" * 5000 + b"}]", "d.json"),
    "json, an object over lines": ("d.json", b'{\n "text": "a"\n}', "label is no column of task.train (text)"),
    "csv, empty": ("d.csv", b"", "no rows"),
    "csv, header only": ("d.csv", b"text,label\n", "no rows"),
    "csv, no header": ("d.csv", CSV.split("\n", 1)[1].encode(), "is no column"),
    "csv, a column twice": ("d.csv", CSV.replace("text,label", "text,text").encode(), "'text'"),
    "csv, too many cells": ("d.csv", f"{CSV}a,b,c\n".encode(), "3 cells"),
    "csv, too few cells": ("d.csv", f"{CSV}a\n".encode(), "1 cells"),
    "csv, an open quote": ("d.csv", f'{CSV}"a,b\n'.encode(), "bad CSV"),
    "csv, a quote in the middle": ("d.csv", f'{CSV}"a"x,b\n'.encode(), "bad CSV"),
    "csv, an empty cell": ("d.csv", f"{CSV},a\n".encode(), "column text is empty"),
    "csv, a zero byte": ("d.csv", f"{CSV}a\0b,a\n".encode(), "d.csv"),
    "csv, a cell of 11 MB": ("d.csv", f"{CSV}{'x' * 11_000_000},a\n".encode(), "bad CSV"),
    "csv, semicolons": ("d.csv", CSV.replace(",", ";").encode(), "d.csv:1: its header is one column"),
    "csv, latin-1": ("d.csv", CSV.encode() + b"caf\xe9,a\n", "not UTF-8"),
    "csv, an unknown label": ("d.csv", f"{CSV}x,c\n".encode(), "label=c"),
    "tsv, commas": ("d.tsv", CSV.encode(), "d.tsv:1: its header is one column"),
    "tsv, ragged": ("d.tsv", b"text\tlabel\na\tb\tc\n", "3 cells"),
    "parquet, empty": ("d.parquet", b"", "parquet"),
    "parquet, text": ("d.parquet", CSV.encode(), "parquet"),
    "parquet, magic only": ("d.parquet", b"PAR1PAR1", "parquet"),
    "parquet, a long footer": ("d.parquet", b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1", "parquet"),
    "parquet, a negative footer": ("d.parquet", b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\xffPAR1", "parquet"),
    "a pickle": ("d.pkl", pickle.dumps(Evil()), "unknown format"),
    "a pickle in disguise": ("d.jsonl", pickle.dumps(Evil()), "d.jsonl"),
    "a pickle as csv": ("d.csv", pickle.dumps(Evil()), "d.csv"),
    "a pickle as parquet": ("d.parquet", pickle.dumps(Evil()), "parquet"),
    "a pickle as numpy": ("d.npy", b"\x93NUMPY" + pickle.dumps(Evil()), "unknown format"),
    "a pickle as torch": ("d.pt", pickle.dumps(Evil()), "unknown format"),
    "a script": ("d.py", b"raise SystemExit('ran')", "unknown format"),
    "a text": ("d.txt", b"hello", "unknown format"),
    "no suffix": ("data", b"hello", "unknown format"),
    "gzip": ("d.jsonl.gz", b"\x1f\x8b", "unknown format"),
    "xlsx": ("d.xlsx", b"PK\x03\x04", "unknown format"),
    "arrow": ("d.arrow", b"ARROW1", "unknown format"),
}  # fmt: skip

# The settings of the task that do not fit the data, or lead elsewhere.
SETTINGS = {
    "no such file": (["task.train=no.jsonl"], "no such file"),
    "no such file, misspelt": (["task.train=dota.jsonl"], "did you mean data.jsonl?"),
    "no such folder": (["task.train=no/data.jsonl"], "no folder"),
    "a folder": (["task.train=tiny"], "is a folder"),
    "a folder of devices": (["task.train=/dev"], "is a folder"),
    "a device": (["task.train=/dev/zero"], "no such file"),
    "a device, numbers": (["task.train=/dev/urandom"], "no such file"),
    "passwords": (["task.train=/etc/passwd"], "unknown format"),
    "a process": (["task.train=/proc/self/environ"], "unknown format"),
    "a zero byte": (["task.train=a\0b.jsonl"], "zero byte"),
    "a name too long": (["task.train=" + "x" * 5000 + ".jsonl"], "no such file"),
    "a url": (["task.train=https://x.org/d.jsonl"], "no such file"),
    "a url of a file": (["task.train=file:///etc/passwd"], "no such file"),
    "a path out of here": (["task.train=../../../no.jsonl"], "no such file"),
    "evaluation, no such file": (["task.eval=no.jsonl"], "task.eval=no.jsonl: no such file"),
    "evaluation, a folder": (["task.eval=tiny"], "is a folder"),
    "a subset of a file": (["task.subset=x"], "task.subset"),
    "a Hub data set that is not there": (["task.train=no/such-data"], "no such file, nor a data set"),
    "a reader of pickles": (["task.train=pandas"], "is a reader"),
    "attribute in the prompt": (["task.prompt={text.__class__}"], "more than a column's name"),
    "index in the prompt": (["task.prompt={text[0]}"], "more than a column's name"),
    "conversion in the prompt": (["task.prompt={text!r}"], "more than a column's name"),
    "format in the prompt": (["task.prompt={text:>1000000000}"], "more than a column's name"),
    "format in a format": (["task.prompt={text:{text}}"], "more than a column's name"),
    "empty braces": (["task.prompt={} x"], "empty braces"),
    "an open brace": (["task.prompt={text"], "task.prompt"),
    "a closing brace": (["task.prompt=text}"], "task.prompt"),
    "no such column": (["task.prompt={txt}"], "did you mean text?"),
    "no such label column": (["task.label=lable"], "did you mean label?"),
    "no label": (["task.label=null"], "task.label and task.choices"),
    "label and target": (["task.target={label}"], "task.target"),
    "target alone, unknown": (["task.target={answer}", "task.label=null", "task.choices={}"], "{answer}"),
    "one choice": (["task.choices={a: a}"], "at least 2"),
    "an empty choice": (["task.choices={a: a, b: ''}"], "give it some text"),
    "two choices alike": (["task.choices={a: x, b: x}"], "both"),
    "choices of other labels": (["task.choices={c: x, d: y}"], "none of task.choices"),
    "no row short enough": (["task.max_words=0"], "task.max_words"),
    "a layout beside templates": (["task.format=completion"], "leave one of both out"),
    "an unknown layout": (["task.format=chatml"], "use auto, text, completion"),
    "columns beside templates": (["task.columns={prompt: text}"], "task.columns"),
    "packed labels": (["task.pack=true"], "task.pack"),
    "turns of a prompt": (["task.chat=template"], "task.chat"),
    "a layout of a named task": (["task=reviews", "task.format=text"], "task.format"),
    "limits of nothing": (["task.train_limit=0"], "task.train_limit"),
    "a named task's own data": (["task=reviews", "task.train=data.jsonl"], "task.train"),
    "an unknown named task": (["task.name=nothing"], "no such task"),
    "a task out of here": (["task.name=../../etc"], "no such task"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return hostile.copy(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file(place, name):
    file, content, part = FILES[name]
    path = place / file
    path.write_bytes(content)
    try:
        hostile.refused(place, [*hostile.TRAIN, f"task.train={file}"], part)
        assert not (place / "pwned").exists()
    finally:
        path.unlink()


@pytest.mark.parametrize("name", SETTINGS)
def test_hostile_settings(place, name):
    settings, part = SETTINGS[name]
    hostile.refused(place, [*hostile.TRAIN, *settings], part)


def test_a_parquet_file_with_flipped_bits_is_read_or_refused(place):
    """A flipped bit may be one of the text; never is it a crash, nor more than a line."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from typer.testing import CliRunner

    from zoft.cli.main import app

    path = place / "d.parquet"
    parquet.write_table(pyarrow.table({k: [r[k] for r in GOOD] for k in GOOD[0]}), path)
    whole = path.read_bytes()
    refusals = 0
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with hostile.working(place):
            done = CliRunner().invoke(app, ["data", "--config", "mine.yaml", "task.train=d.parquet"])
        assert done.exit_code in (0, 2), (at, done.exception)
        refusals += done.exit_code == 2
    assert refusals > 20
    for length in range(0, len(whole), max(1, len(whole) // 10)):
        path.write_bytes(whole[:length])
        hostile.refused(place, [*hostile.TRAIN, "task.train=d.parquet"], "not a whole parquet file")
    path.unlink()


def test_links_pipes_and_permissions(place):
    (place / "loop.jsonl").symlink_to("loop.jsonl")
    (place / "gone.jsonl").symlink_to("not/there.jsonl")
    (place / "zeros.jsonl").symlink_to("/dev/zero")
    os.mkfifo(place / "pipe.jsonl")
    for name in ("loop", "gone", "zeros", "pipe"):
        hostile.refused(place, [*hostile.TRAIN, f"task.train={name}.jsonl"], "no such file: a pipe, a device")
    (place / "closed").mkdir()
    (place / "closed" / "data.jsonl").write_text("\n".join(LINES))
    (place / "shut.jsonl").write_text("\n".join(LINES))
    (place / "shut.jsonl").chmod(0)
    (place / "closed").chmod(0)
    try:
        for name, part in (("shut.jsonl", "Permission denied"), ("closed/data.jsonl", "no such file")):
            with hostile.no_privileges(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(hostile, "digest", lambda folder: None)
                hostile.refused(place, [*hostile.TRAIN, f"task.train={name}"], part)
    finally:
        (place / "closed").chmod(0o755)
        for name in ("pipe.jsonl", "shut.jsonl", "loop.jsonl", "gone.jsonl", "zeros.jsonl"):
            (place / name).unlink()


def test_a_missing_file_is_refused_before_anything_heavy_loads(place):
    """Time depends on the machine, imports do not."""
    import subprocess
    import sys

    code = (
        "import sys; from zoft.cli.main import main\n"
        "try: main()\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'numba', 'datasets'} & set(sys.modules)))"
    )
    for verb in (["train"], ["data"], ["eval"]):
        args = [*verb, "--config", "mine.yaml", "task.train=no.jsonl"]
        command = [sys.executable, "-c", code, *args]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=env)
        assert done.returncode == 2 and done.stderr.startswith("error: task.train=no.jsonl: no such file"), (
            done.stderr
        )
        assert done.stdout == "HEAVY []\n", done.stdout


def test_a_message_names_some_of_many_choices(place):
    config = dict(hostile.CONFIG)
    config["task"] = {**config["task"], "choices": {f"c{i}": f"a{i}" for i in range(3000)}}
    (place / "mine.yaml").write_text(json.dumps(config))
    said = hostile.refused(place, hostile.TRAIN, "none of task.choices (c0, c1, ", "c19, …)")
    assert len(said) < 500
