"""scripts/kill_runs.py: its own answers fast; a few real kills in the slow suite."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
SCRIPT = ROOT / "scripts" / "kill_runs.py"


def test_help_and_what_is_compared(tmp_path):
    import kill_runs

    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--kills" in done.stdout and "fp16-momentum-rademacher" in done.stdout
    files = ("ledger", "model/model.safetensors", "metrics.jsonl")
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text('{"step": 0}\n')
    assert kill_runs.differs(tmp_path / "a", tmp_path / "b") == ""
    for file in files:
        (tmp_path / "a" / file).write_text('{"step": 1}\n')
        assert kill_runs.differs(tmp_path / "a", tmp_path / "b") != ""
        (tmp_path / "a" / file).write_text('{"step": 0}\n')
    (tmp_path / "a" / "ledger").unlink()
    assert kill_runs.differs(tmp_path / "a", tmp_path / "b") == "no ledger"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fp32-plain-gaussian", "fp16-momentum-rademacher", "conservative", "blocks", "anchor"]
)
def test_killed_runs_end_with_the_same_bits(name):
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--variants", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: 4 of 4 the same" in done.stdout
