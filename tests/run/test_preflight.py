"""What is refused, and settled, before a run loads anything heavy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_replay import configured, place  # noqa: F401
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.compose import to_yaml
from zoft.errors import UserError
from zoft.folder import alone
from zoft.run.preflight import DRIVERS
from zoft.run.start import train_run


def test_a_budget_of_forwards_cuts_the_steps(place):  # noqa: F811
    """(2 probes × q 2) × batch 4 × accumulate 2 = 32 forwards a step: a budget of 100 buys three steps."""
    keys = ["q=2", "batch_size=4", "accumulate=2", "save_model=false"]
    result = train_run(configured(place, "cut", *keys, "max_forwards=100"))
    assert result["steps"] == 3 and result["forwards"] == 96
    assert train_run(configured(place, "whole", *keys, "max_forwards=1000"))["steps"] == 6
    with pytest.raises(UserError, match="a step takes 32"):
        train_run(configured(place, "none", *keys, "max_forwards=31"))
    with pytest.raises(UserError, match="snapshot_every=4: more than the 3 steps"):
        train_run(configured(place, "none", *keys, "max_forwards=100", "snapshot_every=4"))


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them fails
from typer.testing import CliRunner
from zoft.cli.main import app
said = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps([[done.exit_code, done.stderr] for done in said]))
"""


def test_mistakes_show_before_anything_heavy_loads(place):  # noqa: F811
    """In an interpreter that has no torch to load: folders, locks, rewards, blocks and devices are looked at first."""
    (place / "score.py").write_text("def score(rows, texts):\n    return [0] * len(rows)\n")
    (place / "busy").mkdir()
    (place / "busy" / "config.yaml").write_text(to_yaml(configured(place, "busy")))
    begin = ["train", "--config", f"{place}/mine.yaml", f"model={place}/full", f"output_dir={place}/early"]
    blocks = tiny.llama().config.num_hidden_layers
    cases = [
        ([*begin[:-1], "output_dir=/proc/early"], "output_dir=/proc/early: cannot be made"),
        (["train", "--resume", f"{place}/busy"], f"{place}/busy: another process is writing this run"),
        ([*begin[:-1], f"output_dir={place}/taken"], f"output_dir={place}/taken: another process is writing"),
        (
            [*begin, "max_new_tokens=8", "--reward", f"{place}/score.py:scores"],
            "no function scores in it; did you mean score?",
        ),
        ([*begin, "train=last-99"], f"the model has {blocks} blocks; use last-1 to last-{blocks}"),
    ]
    if not any(Path("/dev", name).exists() for name in DRIVERS):
        cases.append(([*begin, "device=cuda:1"], "device=cuda:1: no CUDA devices here; use device=cpu"))
    with alone(place / "busy", False), alone(place / "taken", True):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, json.dumps([words for words, _ in cases])],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (code, said), (words, part) in zip(json.loads(done.stdout), cases, strict=True):
        assert code == 2 and part in said and said.count("\n") == 1, (words, said)
    assert not (place / "early").exists()


def test_a_pattern_that_fits_nothing_shows_before_weights_load(tmp_path, monkeypatch):
    """The weights are no numbers, which a load says first."""
    monkeypatch.chdir(tiny.place(tmp_path, "steps: 2\nlr: 1e-3\nmax_length: 32\n"))
    held = load_file("tiny/model.safetensors")
    save_file(
        {n: torch.full_like(t, torch.nan) for n, t in held.items()},
        "tiny/model.safetensors",
        {"format": "pt"},
    )
    for train, said in (("q_porj", "train='q_porj' selects no tensor"), ("q_proj", "NaN")):
        done = CliRunner().invoke(app, ["train", "--config", "mine.yaml", f"train={train}", "output_dir=out"])
        assert done.exit_code == 2 and said in done.stderr, (train, done.stderr)
