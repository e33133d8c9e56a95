"""docs/sweeps.md: what it has of other tools, run with those tools."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from zoft.sweep import slurm

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
BLOCKS = {m[1]: m[2] for m in re.finditer(r"```\w+\n# ([\w.]+)(.*?)```", DOC, re.S)}
SMALL = "steps=2 eval_limit=4 threads=1 save_model=false"


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny model, a config, and `zoft` on the path."""
    tiny.place(tmp_path, "max_length: 32\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "zoft").write_text(f'#!/bin/sh\nexec {sys.executable} -m zoft "$@"\n')
    (tmp_path / "bin" / "zoft").chmod(0o755)
    return tmp_path


def env(place, **more):
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **more}


def test_slurm_options(tmp_path):
    (tmp_path / "slurm.yaml").write_text("#" + BLOCKS["slurm.yaml"])
    found = slurm.options(str(tmp_path / "slurm.yaml"), [])
    assert (found.time, found.parallel, found.mem, found.setup) == ("4:00:00", 8, "32G", ["module load cuda"])
    assert set(slurm.Slurm.__dataclass_fields__) - {"qos"} == set(
        re.findall(r"^(\w+):", BLOCKS["slurm.yaml"], re.M)
    )


def test_train_takes_what_a_wandb_agent_passes(place):
    """The agent's own code makes the command, offline; `zoft train --dry-run` reads it."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load("#" + BLOCKS["wandb.yaml"])
    drawn = {"lr": 0.00031, "noise": "rademacher", "seed": 3}
    given = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in drawn.items()}})
    command = utils.create_sweep_command(sweep["command"])
    words = [w for c in command for w in (given[c[2:-1]] if c in ("${args_no_hyphens}",) else [c])]
    small = f"zoft train --dry-run --config mine.yaml {SMALL}"
    assert "zoft train --config mezo/reviews" in words[2]
    words[2] = words[2].replace("zoft train --config mezo/reviews", small)
    done = subprocess.run(
        words, cwd=place, env=env(place, WANDB_RUN_ID="ab12"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout[: done.stdout.index("\n\n")])
    assert {k: found[k] for k in drawn} == drawn
    assert (found["track"], found["output_dir"]) == ("wandb", "runs/wandb/ab12")


@pytest.mark.slow
def test_hydras_launchers(place):
    """The script, with the launcher that Hydra brings along."""
    script = "#" + BLOCKS["hydra_sweep.py"].replace('"mezo/reviews"', '"mine.yaml"')
    (place / "hydra_sweep.py").write_text(script.replace("[*keys,", f"[*keys, *{SMALL.split()},"))
    command = [
        sys.executable,
        "hydra_sweep.py",
        "-m",
        "+lr=1e-4,5e-4",
        "+seed=range(0,2)",
        "hydra.sweep.dir=out",
    ]
    done = subprocess.run(command, cwd=place, env=env(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [
        yaml.safe_load((p.parent / "config.yaml").read_text()) for p in place.glob("out/*/run/result.json")
    ]
    assert sorted((r["lr"], r["seed"]) for r in runs) == [(1e-4, 0), (1e-4, 1), (5e-4, 0), (5e-4, 1)]
