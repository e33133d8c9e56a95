"""The probe axis on every architecture of the installed transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sweep(tmp_path, *options):
    out = tmp_path / "sweep.json"
    command = [sys.executable, ROOT / "scripts" / "sweep_architectures.py", "--json", out, *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert out.exists(), done.stderr[-2000:]
    return done, json.loads(out.read_text())


def test_one_architecture(tmp_path):
    done, found = sweep(tmp_path, "--kind", "causal", "--only", "qwen3")
    assert done.returncode == 0
    assert found["totals"] == {
        "causal": {"exact": 1, "of": 1, "one probe per forward": 0, "wrong": 0, "not built": 0}
    }
    (qwen,) = found["results"]
    assert qwen["worst"] < 1e-5 < qwen["apart"] / 20
    assert "exact 1 of 1, one probe per forward 0, wrong 0, not built 0" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("train, exact", [("lora", 146), ("prefix", 125), ("prompt", 120)])
def test_adapters_on_all_architectures(tmp_path, train, exact):
    """Where peft can make one, its stacked losses are those of moved tensors."""
    done, found = sweep(tmp_path, "--kind", "causal", "--side", "right", "--train", train)
    wrong = [r for r in found["results"] if r["outcome"] == "WRONG"]
    assert not wrong and done.returncode == 0, wrong
    assert found["totals"]["causal"]["exact"] >= exact, found["totals"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, exact", [("causal", 183), ("masked", 50), ("seq2seq", 35)])
def test_all_architectures(tmp_path, kind, exact):
    done, found = sweep(tmp_path, "--kind", kind)
    wrong = [r for r in found["results"] if r["outcome"] == "WRONG"]
    assert not wrong and done.returncode == 0, wrong
    assert found["totals"][kind]["exact"] >= exact, found["totals"]
    assert all(r["worst"] < 1e-5 < r["apart"] / 10 for r in found["results"] if r["outcome"] != "not built")
