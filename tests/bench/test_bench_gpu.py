"""`zoft bench` on a GPU: captured runs after one another, processes that share it, gradients, the checkpointed baseline."""

import csv
import json
import os
import subprocess

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from zoft.bench.gradient import measure_gradient
from zoft.cli.main import app
from zoft.method.configured import compose
from zoft.packages import zoft_command

pytestmark = pytest.mark.gpu
FILE = {
    "base": {"config": "mine.yaml", "device": "cuda"},
    "tasks": {"words": {}},
    "frame": {
        "untrained": {"method": "zero-shot"},
        "AdamW": {"method": "first-order", "steps": 4, "lr": "1e-2"},
        "checkpointed LoRA": {"method": "checkpointed-lora", "steps": 20, "lr": "1e-2"},
    },
    "rows": {
        "mezo": {"lr": "1e-3"},
        "normalised": {"estimator": "normalised", "q": 4, "lr": "1e-3"},
        "adam": {"update": "adam", "lr": "1e-3"},
        "lora": {"recipe": "lora_zo", "train": "lora", "lr": "1e-2"},
    },
    "forwards": 320,
    "lr_factors": [1, 2],
    "seeds": [1, 2],
    "draws": 3,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.place(tmp_path, "max_length: 32\nbatch_size: 8\n"))
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    return tmp_path


def ledgers(root):
    return {p.parent.name: p.read_bytes() for p in root.glob("*/ledger")}


def test_runs_after_one_another_have_the_bits_of_processes_that_share_the_gpu(place):
    done = CliRunner().invoke(app, ["bench", "--config", "ranks.yaml", "--gradient", "output_dir=one"])
    assert done.exit_code == 0 and "Failures" not in done.stdout, (done.output, done.stderr)
    command = zoft_command("bench", "--config", "ranks.yaml", "--jobs", "2", "output_dir=two")
    shared = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert shared.returncode == 0, shared.stderr
    assert len(ledgers(place / "one")) == 16 and ledgers(place / "one") == ledgers(place / "two")
    with (place / "one" / "table.csv").open() as file:
        rows = {r["row"]: r for r in csv.DictReader(file)}
    assert all(0 < float(r["peak_memory_gb"]) < 2 for r in rows.values() if r["row"] != "untrained")
    assert rows["mezo"]["cosine"] and "update=adam" in rows["adam"]["gradient_fault"]


@pytest.mark.parametrize("words", [[], ["estimator=one_sided", "q=2"], ["train=lora", "recipe=lora_zo"]])
def test_gradients_are_those_of_a_cpu(place, words):
    found = []
    for device in ("cpu", "cuda"):
        (place / device).mkdir()
        config = compose("mine.yaml", ["noise=rademacher", "seed=3", f"device={device}", *words])
        found.append(measure_gradient(config, place / device, 4))
    for key in ("cosine", "slope", "curvature", "gradient_norm"):
        assert found[1][key] == pytest.approx(found[0][key], rel=3e-2), key


def test_checkpointed_pairs_train_beside_a_base_in_bf16(place):
    words = [
        "baseline",
        "-m",
        "checkpointed-lora",
        "--config",
        "mine.yaml",
        "steps=25",
        "lr=1e-2",
        "output_dir=out",
    ]
    done = CliRunner().invoke(app, [*words, "device=cuda"])
    assert done.exit_code == 0, (done.output, done.stderr)
    found = json.loads((place / "out" / "result.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    assert yaml.safe_load((place / "out" / "config.yaml").read_text())["compute"] == "bf16"
