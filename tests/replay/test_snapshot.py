"""Snapshots: real runs that go on from them, files that were harmed, and which ones are kept."""

import dataclasses
import json
import random
import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainer import build, same_bits, weights

from zoft.config.check import check_config
from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.ledger.log import Event, Ledger, read_ledger
from zoft.replay import snapshot
from zoft.run import loop as runs
from zoft.run import session as sessions
from zoft.run.stops import due_at, next_stop
from zoft.train import header as headers

HEADER = {"seed": 7, "base": "blake2b:1"}


def names(folder):
    return sorted(p.name for p in (folder / "snapshots").iterdir())


class Crash(Exception):
    pass


def fit(trainer, s, evaluate, stop):
    """What run.fit returns; None where a crash after `stop` steps ends it."""
    step = trainer.step

    def crashing():
        if trainer.next == stop:
            raise Crash
        return step()

    trainer.step = crashing
    try:
        return runs.fit(trainer, s, evaluate)
    except Crash:
        return None


def session(folder, trainer_options, steps=10, evals=None, stop=None, **keys):
    """A run in `folder`, new or resumed, until its end or a crash after `stop` steps; (result, weights)."""
    config = Config(model="m", task=Task(name="local"), steps=steps, output_dir=str(folder), device="cpu",
                    probes_per_forward=1 if trainer_options.get("policy") == "inplace" else 2, **keys)  # fmt: skip
    check_config(config)
    asked = []

    def evaluate():
        asked.append(trainer.next)
        return {"loss": float((evals or {}).get(trainer.next, 1.0)), "accuracy": 0.5}

    with sessions.session(config, HEADER, folder if (folder / "ledger").exists() else None) as s:
        trainer = build(None, tiny.llama(tie=True), opened=s.ledger, steps=steps, **trainer_options)
        result = fit(trainer, s, evaluate, stop)
    return result, weights(trainer.model), asked


@pytest.mark.parametrize("policy", ["probes", "inplace"])
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_run_that_goes_on_from_a_snapshot_ends_with_the_same_bits(tmp_path, capsys, policy, storage, beta):
    # With momentum, the size of a step too depends on the steps before it.
    options = {
        "storage": storage,
        "compute": storage,
        "policy": policy,
        "beta": beta,
        "weight_decay": 0.01,
        "meazo": beta,
    }
    plain, end, _ = session(tmp_path / "plain", options)
    whole, same, _ = session(tmp_path / "whole", options, snapshot_every=3)
    assert same_bits(end, same) and [plain[k] for k in ("skipped", "after")] == [
        whole[k] for k in ("skipped", "after")
    ]
    assert names(tmp_path / "whole") == ["step-00000006.safetensors", "step-00000009.safetensors"]
    for stop in (2, 3, 8):
        part = tmp_path / f"stop{stop}"
        session(part, options, snapshot_every=3, stop=stop)
        capsys.readouterr()
        _, again, _ = session(part, options, snapshot_every=3)
        said = capsys.readouterr().err
        assert ("starting from the snapshot at step" in said) == (stop >= 3)
        assert f"replaying {stop % 3} of 10 steps" in said or stop == 3
        assert same_bits(end, again), stop
        for file in ("ledger", "snapshots/step-00000009.safetensors"):
            assert (part / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (stop, file)


def test_a_snapshot_holds_what_others_can_read(tmp_path):
    _, end, _ = session(tmp_path / "run", {"storage": "bf16", "beta": 0.9}, snapshot_every=10)
    path = tmp_path / "run" / "snapshots" / "step-00000010.safetensors"
    held = load_file(path)
    model = tiny.llama(tie=True)
    params = dict(model.named_parameters())
    for name, value in end.items():
        if name in params:
            assert torch.equal(held[name], value), name
            assert (
                held[f"{name}@momentum"].dtype == torch.float32 and held[f"{name}@momentum"].abs().max() > 0
            )
    assert len(held) == 2 * len(params)
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "10" and file.metadata()["base"] == "blake2b:1"
    log = read_ledger(tmp_path / "run" / "ledger")
    assert log.events == [Event("snapshot", 10, snapshot.digest_of(path))]


def test_any_size_shape_and_dtype_is_written_as_safetensors_reads_it(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "odd": torch.randn(3, 5).to(torch.float16), "none": torch.empty(0, 4), "scalar": torch.tensor(2.5),
        "wide": torch.randn(7, dtype=torch.float64), "bytes": torch.arange(5, dtype=torch.uint8),
        "big": torch.randn(1 << 21).to(torch.bfloat16), "turned": torch.randn(4, 6).T,
    }  # fmt: skip
    tensors["big"] = torch.cat([tensors["big"]] * 9)  # beyond one piece
    digest = snapshot.write_tensors(tmp_path / "x.safetensors", tensors, {"a": "b"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert digest == snapshot.digest_of(tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_flipped_bit_is_seen_and_the_older_snapshot_used(tmp_path):
    session(tmp_path / "run", {"storage": "fp16"}, snapshot_every=4)
    path = tmp_path / "run" / "snapshots" / "step-00000008.safetensors"
    data = path.read_bytes()
    log = read_ledger(tmp_path / "run" / "ledger")
    rng = random.Random(0)
    header_bits = range(0, 8 * 600, 7)
    for bit in [*header_bits, *(rng.randrange(8 * len(data)) for _ in range(400))]:
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        said = []
        found = snapshot.newest_snapshot(tmp_path / "run", log.header, log.events, say=said.append)
        assert found == (4, tmp_path / "run" / "snapshots" / "step-00000004.safetensors"), bit
        assert len(said) == 1 and "snapshot at step 8 is not used" in said[0] and "\n" not in said[0]
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert snapshot.newest_snapshot(tmp_path / "run", log.header, log.events)[0] == 4
    path.write_bytes(data)
    assert snapshot.newest_snapshot(tmp_path / "run", log.header, log.events)[0] == 8
    assert snapshot.newest_snapshot(tmp_path / "run", log.header, log.events, last=7)[0] == 4
    assert snapshot.newest_snapshot(tmp_path / "run", log.header, log.events, last=3) is None


def test_a_run_with_harmed_snapshots_goes_on_from_an_older_one_or_the_base(tmp_path, capsys):
    options = {"storage": "fp16", "beta": 0.9}
    _, end, _ = session(tmp_path / "whole", options, snapshot_every=3)
    session(tmp_path / "part", options, snapshot_every=3, stop=8)
    for harmed, start in ((["6"], "starting from the snapshot at step 3"), (["6", "3"], "replaying 8 of 10")):
        copy = tmp_path / "-".join(harmed)
        shutil.copytree(tmp_path / "part", copy)
        for step in harmed:
            path = copy / "snapshots" / f"step-0000000{step}.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        capsys.readouterr()
        _, again, _ = session(copy, options, snapshot_every=3)
        said = capsys.readouterr().err
        assert start in said and said.count("is damaged: its checksum does not match") == len(harmed)
        assert same_bits(end, again)
        assert (copy / "ledger").read_bytes() == (tmp_path / "whole" / "ledger").read_bytes()


def test_a_snapshot_of_another_run_base_or_step_is_not_used(tmp_path):
    session(tmp_path / "run", {}, snapshot_every=4)
    run, log = tmp_path / "run", read_ledger(tmp_path / "run" / "ledger")
    path = snapshot.file_of(run, 8)
    for header, step, what in (
        ({**log.header, "base": "blake2b:2"}, 8, "of a run from another base"),
        ({**log.header, "lr": 3}, 8, "of another run"),
        (log.header, 4, "of another step"),
    ):
        snapshot.write_tensors(path, {"w": torch.zeros(2)}, snapshot._facts(header, step))
        said = []
        assert snapshot.newest_snapshot(run, log.header, log.events, say=said.append)[0] == 4
        assert what in said[0]
    # Ahead of its ledger: a ledger that was cut knows nothing of it.
    cut = [e for e in log.events if e.step < 8]
    assert snapshot.newest_snapshot(run, log.header, cut)[0] == 4


def test_a_run_cut_between_the_file_and_its_event_takes_it_again(tmp_path):
    _, end, asked = session(tmp_path / "whole", {}, snapshot_every=4, eval_every=2)
    assert asked == [0, 2, 4, 6, 8, 10]
    run = tmp_path / "cut"
    session(run, {}, snapshot_every=4, eval_every=2, stop=8)
    data = (run / "ledger").read_bytes()
    assert read_ledger(run / "ledger").events[-1].step == 8
    (run / "ledger").write_bytes(data[:-32])  # the event at step 8
    (run / "snapshots" / ".step-00000008.safetensors.new").write_bytes(b"half")
    rows = (run / "metrics.jsonl").read_text().splitlines(True)
    assert json.loads(rows[-1]) == {"step": 8, "eval": {"loss": 1.0, "accuracy": 0.5}}
    (run / "metrics.jsonl").write_text("".join(rows[:-1]))  # nor was it evaluated
    _, again, asked = session(run, {}, snapshot_every=4, eval_every=2)
    assert asked == [8, 10] and same_bits(end, again)
    assert names(run) == names(tmp_path / "whole")
    assert (run / "ledger").read_bytes() == (tmp_path / "whole" / "ledger").read_bytes()


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {2: 0.9, 4: 0.2, 6: 0.3, 8: float("nan"), 10: 0.5, 12: 0.4, 14: 0.2}
    keys = {"snapshot_every": 2, "eval_every": 1, "keep_last": 1, "keep_best": 2}
    session(tmp_path / "run", {}, steps=14, evals=losses, **keys)
    assert names(tmp_path / "run") == [
        f"step-{s:08d}.safetensors" for s in (4, 14)
    ]  # a tie: the earlier is first
    session(tmp_path / "part", {}, steps=14, evals=losses, stop=11, **keys)
    assert names(tmp_path / "part") == [f"step-{s:08d}.safetensors" for s in (4, 6, 10)]
    session(tmp_path / "part", {}, steps=14, evals=losses, **keys)
    assert names(tmp_path / "part") == names(tmp_path / "run")
    session(tmp_path / "acc", {}, steps=6, **{**keys, "best_by": "accuracy", "keep_best": 1})
    assert names(tmp_path / "acc") == [f"step-{s:08d}.safetensors" for s in (2, 6)]
    with pytest.raises(UserError, match="best_by=auc: .*; use loss, accuracy"):
        session(tmp_path / "auc", {}, **{**keys, "best_by": "auc"})


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path):
    """A real limit on the size of files, above the ledger's and below the snapshot's."""
    import resource

    _, end, _ = session(tmp_path / "whole", {}, snapshot_every=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(UserError, match="snapshot: cannot write .*File too large"):
            session(tmp_path / "run", {}, snapshot_every=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run" / "snapshots").iterdir()) == []
    assert len(read_ledger(tmp_path / "run" / "ledger").records) == 4
    _, again, _ = session(tmp_path / "run", {}, snapshot_every=4)
    assert same_bits(end, again)


def test_the_ledger_is_synced_before_a_snapshot_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = Ledger.sync, snapshot.os.replace
    monkeypatch.setattr(Ledger, "sync", lambda self: (order.append("sync"), sync(self))[1])
    monkeypatch.setattr(snapshot.os, "replace", lambda a, b: (order.append(str(b)[-19:]), replace(a, b))[1])
    session(tmp_path / "run", {}, snapshot_every=10)
    at = order.index("00000010.safetensors"[-19:])
    assert order[at - 1] == "sync"


def test_the_stops_of_a_run():
    config = Config(steps=10, eval_every=4, snapshot_every=3)
    stops, step = [], 0
    while step < 10:
        step = next_stop(config, step)
        stops.append((step, due_at(config, step)))
    assert stops == [
        (3, ["snapshot"]), (4, ["eval"]), (6, ["snapshot"]), (8, ["eval"]), (9, ["snapshot"]), (10, ["eval"]),
    ]  # fmt: skip
    assert due_at(config, 0) == [] and due_at(Config(steps=12, eval_every=4, snapshot_every=3), 12) == [
        "eval",
        "snapshot",
    ]
    assert next_stop(Config(steps=10), 0) == 10


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"keep_last": 3}, "keep_last=3: does nothing without snapshot_every"),
        ({"keep_best": 1}, "keep_best=1: does nothing without snapshot_every"),
        ({"best_by": "auc", "snapshot_every": 5}, "best_by=auc: does nothing without keep_best"),
        ({"snapshot_every": 2000}, "snapshot_every=2000: must not exceed steps=1000"),
        ({"snapshot_every": 50, "keep_best": 1}, "keep_best=1: each snapshot needs an evaluation"),
        ({"snapshot_every": 50, "keep_best": 1, "eval_every": 20}, "set eval_every=50, or to a divisor"),
        ({"keep_last": 0, "snapshot_every": 5}, "keep_last=0: must be"),
        ({"sync": "never"}, "sync=never: use end, step or a whole number from 1"),
        ({"sync": 0}, "sync=0: must be"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, line):
    with pytest.raises(UserError, match=line):
        check_config(dataclasses.replace(Config(model="m", task=Task(name="local")), **keys))


def test_the_header_tells_other_keys_data_and_noise_apart(tmp_path):
    from test_trainer import examples

    trained = build(tmp_path, tiny.llama()).axis.trained
    config = Config(model="m", task=Task(name="local"), storage="fp32", compute="fp32")
    made = headers.header_of(config, "b", trained, examples())
    first = trained[0]
    assert made["trained"][first.name] == [first.id, list(first.stored.shape), "fp32"]
    free = dataclasses.replace(
        config, output_dir="x", model="y", threads=2, device="cpu", sync="step", keep_last=9
    )
    headers.agree(made, headers.header_of(free, "b", trained, examples()), tmp_path)
    other = dataclasses.replace(config, lr=2e-6)
    # A ledger of a zoft that did not have some keys.
    elder = {**made, "config": {k: v for k, v in made["config"].items() if k not in ("clip", "meazo")}}
    headers.agree(elder, made, tmp_path)
    for wanted, line in (
        (headers.header_of(other, "b", trained, examples()), "another lr than config.yaml has"),
        (headers.header_of(config, "c", trained, examples()), "starts from other weights"),
        (headers.header_of(config, "b", trained, examples(seed=1)), "other training data"),
        (headers.header_of(config, "b", trained[:-1], examples()), f"other tensors .*{trained[-1].name}"),
        ({**made, "noise_version": 9}, "noise of version 1, this zoft makes version 9"),
        ({**made, "eps": 9}, "written with eps=0.001, not 9"),
    ):
        with pytest.raises(UserError, match=line):
            headers.agree(made, wanted, tmp_path)
