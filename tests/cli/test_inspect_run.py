"""`zoft ledger`: what it says of a real run, finished or under way, and what it finds wrong."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_trainer import build
from typer.testing import CliRunner

from zoft.cli import ledger as inspect_run
from zoft.cli.main import app
from zoft.config import compose
from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.folder import write
from zoft.ledger import check
from zoft.ledger.log import Ledger, Record, read_ledger
from zoft.method import configured
from zoft.replay import snapshot
from zoft.run import loop as runs
from zoft.run.session import session
from zoft.train import header as headers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        model="m", task=Task(name="local"), steps=10, lr=1e-2, seed=7, storage="fp32", compute="fp32", perturb="probes",
        probes_per_forward=2, device="cpu", threads=1, eval_every=2, snapshot_every=4, output_dir=str(folder),
    )  # fmt: skip
    config = configured.strict(dataclasses.asdict(config))
    trained = build(folder.parent, tiny.llama()).axis.trained
    with session(config, headers.header_of(config, "blake2b:1", trained), None) as s:
        trainer = build(None, tiny.llama(), opened=s.ledger, steps=10)
        result = runs.fit(trainer, s, lambda: {"loss": 1.0})
        write(folder / "result.json", json.dumps(result))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def zoft(*words):
    done = CliRunner().invoke(app, ["ledger", *map(str, words)])
    return done.exit_code, done.output


def test_the_summary_is_that_of_the_records(run):
    code, said = zoft(run, "--json")
    found, log = json.loads(said), read_ledger(run / "ledger")
    assert code == 0
    losses = [(r.losses[0] + r.losses[1]) / 2 for r in log.records]
    multipliers = [r.multipliers[0] for r in log.records]
    assert (found["steps"], found["planned"], found["skipped"], found["finished"]) == (10, 10, 0, True)
    assert found["bytes"] == (run / "ledger").stat().st_size
    assert found["loss"] == {"first": losses[0], "last": losses[-1], "steps_each": 1}
    assert math.isclose(found["multiplier"]["rms"], np.sqrt(np.mean(np.square(multipliers))))
    assert found["multiplier"]["largest"] == np.abs(multipliers).max()
    params = dict(tiny.llama().named_parameters())
    assert (found["tensors"], found["numbers"]) == (len(params), sum(p.numel() for p in params.values()))
    assert [(e["kind"], e["step"]) for e in found["events"]] == [("snapshot", 4), ("snapshot", 8)]
    assert found["events"][1]["digest"] == snapshot.digest_of(Path(found["events"][1]["file"])).hex()
    assert found["header"]["plan"]["device"] == "cpu" and found["header"]["base"] == "blake2b:1"

    code, said = zoft(run)
    for part in (
        "10 of 10, 0 skipped; finished",
        "blake2b:1",
        "seed 7",
        "2, after 4, 8 steps",
        f"{found['loss']['first']:.4g}",
    ):
        assert part in said, part
    assert len(re.findall(f"[{inspect_run.BARS}]{{10}}\n", said)) == 2


def test_skipped_steps_are_counted_and_shown_and_move_nothing(tmp_path):
    with Ledger.create(tmp_path / "ledger", {"seed": 1}) as ledger:
        for i in range(5):
            bad = i in (0, 3)
            loss = math.nan if bad else 1.0 + i
            ledger.append(Record(i, (math.inf if bad else -0.5,), 1.0, (loss, loss), bad))
    found = inspect_run.ledger_summary(tmp_path / "ledger")  # the file alone will do
    assert found["skipped"] == 2 and found["multiplier"] == {"rms": math.sqrt(0.15), "largest": 0.5}
    assert found["curves"]["loss"] == " ▁▃ █" and not found["finished"]
    code, said = zoft(tmp_path / "ledger", "--json")
    assert code == 0 and json.loads(said)["loss"]["first"] is None
    assert "5, 2 skipped" in zoft(tmp_path)[1]


def test_a_ledger_without_steps(tmp_path):
    Ledger.create(tmp_path / "ledger", {"seed": 1}).close()
    code, said = zoft(tmp_path)
    assert code == 0 and "0, 0 skipped" in said
    assert json.loads(zoft(tmp_path, "--json")[1])["steps"] == 0
    code, said = zoft(tmp_path, "--plot", tmp_path / "x.png")
    assert code == 2 and "no steps yet" in said


def test_bars_go_from_the_lowest_to_the_highest():
    assert inspect_run.squeezed([0, 1, 2, 3, 4, 5, 6, 7]) == inspect_run.BARS
    assert inspect_run.squeezed([2.0, 2.0]) == "▁▁" and inspect_run.squeezed([]) == ""
    assert inspect_run.squeezed([0.0] * 60 + [7.0] * 60) == "▁" * 30 + "█" * 30


def test_verify_passes_a_sound_run_also_after_it_was_moved(run):
    code, said = zoft(run, "--verify")
    assert (
        code == 0 and said.count("is what the run wrote") == 2 and "config.yaml is what the run was" in said
    )
    assert "10 steps and 2 events whole" in said
    (run / "snapshots" / "step-00000004.safetensors").unlink()  # pruned
    (run / "snapshots" / "step-00000099.safetensors").write_bytes(b"")
    code, said = zoft(run, "--verify", "--json")
    assert code == 0 and "unknown to the ledger" in " ".join(json.loads(said)["verified"])


@pytest.mark.parametrize("what", ["config", "snapshot", "result", "ledger", "cut"])
def test_verify_names_what_is_wrong(run, what):
    if what == "config":
        config = configured.load_run(run)
        (run / "config.yaml").write_text(compose.to_yaml(dataclasses.replace(config, lr=0.02)))
        line = "config.yaml has another lr than the run was begun with"
    elif what == "snapshot":
        path = run / "snapshots" / "step-00000008.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        line = "step-00000008.safetensors is damaged: its checksum does not match"
    elif what == "result":
        data = (run / "ledger").read_bytes()
        (run / "ledger").write_bytes(data[:-32])
        line = "the ledger has 9 steps"
    elif what == "ledger":
        data = bytearray((run / "ledger").read_bytes())
        data[-40] ^= 4
        (run / "ledger").write_bytes(data)
        line = f"damaged at byte {len(data) - 64}"
    else:
        (run / "result.json").unlink()
        (run / "ledger").write_bytes((run / "ledger").read_bytes()[:-5])
        assert "27 bytes of a step" in zoft(run, "--verify")[1]
        return
    code, said = zoft(run, "--verify")
    assert code == 2 and line in said and said.splitlines()[-1].startswith("error: ")


def test_a_header_that_lacks_what_replay_needs_or_mixes_up_noise_is_named(finished):
    header = read_ledger(finished / "ledger").header
    assert check.header_faults(header) == []
    name = next(iter(header["trained"]))
    tensor, *rest = header["trained"][name]
    wrong = {**header, "trained": {name: [tensor ^ 1, *rest]}, "noise_version": 9}
    del wrong["base"]
    said = check.header_faults(wrong)
    assert len(said) == 3 and "no base" in said[0] and "version 9" in said[1] and name in said[2]


@pytest.mark.parametrize("trained", [3, ["w"], {"w": 1}, {"w": [1, 2, 3]}, {"w": [1, ["a"], "fp32"]}, None])
def test_a_header_made_by_hand_is_no_traceback(tmp_path, trained):
    Ledger.create(tmp_path / "ledger", {"seed": 1, "trained": trained, "plan": 7}).close()
    code, said = zoft(tmp_path, "--verify")
    assert code == 2 and "name: [id, shape, dtype]" in said
    assert zoft(tmp_path)[0] == 0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_of_a_run_with_skipped_steps(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    with Ledger.create(tmp_path / "ledger", {"seed": 1}) as ledger:
        for i in range(50):
            loss = math.nan if i == 7 else 1.0
            ledger.append(Record(i, (0.0 if i == 7 else 0.5, 0.25), 1.0, (loss, 1.0, 1.0, 1.0), i == 7))
    out = tmp_path / f"curve{suffix}"
    assert zoft(tmp_path, "--plot", out)[0] == 0
    assert out.stat().st_size > 5000 and out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize(("name", "line"), [("ledger", "must end in .png"), ("none/x.png", "no such folder")])
def test_a_plot_writes_over_nothing_and_makes_no_folder(run, name, line):
    before = (run / "ledger").read_bytes()
    code, said = zoft(run, "--plot", run / name)
    assert code == 2 and line in said and (run / "ledger").read_bytes() == before


def test_without_matplotlib_it_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        inspect_run.plot_ledger(run, run / "x.png")


def test_no_run_is_one_line(tmp_path):
    for where in (tmp_path, tmp_path / "none"):
        code, said = zoft(where)
        assert code == 2 and "not a run's folder" in said and said.count("\n") == 1


def test_a_run_in_use_by_another_process_is_read(tmp_path):
    code = (
        "import sys, time; from zoft.ledger.log import Ledger, Record\n"
        "ledger = Ledger.create(sys.argv[1], {'seed': 1})\n"
        "for i in range(10**9):\n"
        "    ledger.append(Record(i, (0.5,), 1.0, (1.0, 2.0)))\n"
        "    print(i, flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "ledger")], stdout=subprocess.PIPE, env=env, text=True
    )
    try:
        for _ in range(50):
            line = writer.stdout.readline()
        seen = []
        for _ in range(5):
            seen.append(inspect_run.ledger_summary(tmp_path)["steps"])
            inspect_run.open_run(tmp_path)
            time.sleep(0.01)
        assert seen[0] > int(line) and seen == sorted(seen) and writer.poll() is None
        with pytest.raises(UserError, match="another process is writing"):
            Ledger.open(tmp_path / "ledger")
    finally:
        writer.kill()
        writer.communicate()
