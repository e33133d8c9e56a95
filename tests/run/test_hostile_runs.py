"""Run folders from anybody: damaged ledgers, snapshots, configs and logs, each refused in one line, none written over."""

import json
import pickle
import random
import shutil
import struct
import zlib

import hostile
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_trainer import build, same_bits, weights
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.errors import UserError
from zoft.ledger.log import Ledger, Record, read_ledger

RESUME = ("train", "--resume", "run")
REPLAY = ("replay", "run", "--out", "again")
LOOK = ("replay", "run")
VERIFY = ("ledger", "run", "--verify")
EXPORT = ("export", "run", "--merge", "--out", "again")
STEPS = 6


def ledger(change):
    """The ledger's bytes changed; the run is unfinished, so that it can be resumed."""

    def spoil(place):
        path = place / "run" / "ledger"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def start(data):
    """The byte where records begin."""
    return 20 + int.from_bytes(data[12:16], "little")


def headed(change):
    """The header changed, with a right checksum: what no accident does. The chain of records is put right, too."""

    def spoiled(data):
        at = start(data)
        found = change(json.loads(data[16 : at - 4]))
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        out = data[:12] + len(text).to_bytes(4, "little") + text
        crc = zlib.crc32(out)
        out += crc.to_bytes(4, "little")
        for i in range(at, len(data) - 31, 32):
            crc = zlib.crc32(data[i : i + 28], crc)
            out += data[i : i + 28] + crc.to_bytes(4, "little")
        return out

    return ledger(spoiled)


def recorded(at, code, value, record=3):
    """A field of a record changed, all checksums right."""

    def spoiled(data):
        first = start(data)
        crc, out = int.from_bytes(data[first - 4 : first], "little"), data[:first]
        for n, i in enumerate(range(first, len(data), 32)):
            body = bytearray(data[i : i + 28])
            if n == record:
                struct.pack_into(code, body, at, value)
            crc = zlib.crc32(body, crc)
            out += bytes(body) + crc.to_bytes(4, "little")
        return out

    return ledger(spoiled)


def moved(*order):
    def spoiled(data):
        first = start(data)
        parts = [data[i : i + 32] for i in range(first, len(data), 32)]
        return data[:first] + b"".join(parts[i] for i in order)

    return ledger(spoiled)


def config(change):
    def spoil(place):
        path = place / "run" / "config.yaml"
        path.write_text(change(path.read_text()))

    return spoil


def model(change):
    """Another base than the run's."""

    def spoil(place):
        path = place / "tiny" / "model.safetensors"
        state = {n: change(t.clone(), n) for n, t in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})

    return spoil


def nudge(t, name):
    if name == "model.norm.weight":
        t[0] = torch.nextafter(t[0], torch.tensor(9.0))
    return t


def file(name, content):
    return lambda place: (place / "run" / name).write_bytes(content)


def gone(name):
    return lambda place: (place / "run" / name).unlink()


def link(name, target):
    def spoil(place):
        (place / "run" / name).unlink()
        (place / "run" / name).symlink_to(target)

    return spoil


def with_header(**changes):
    return headed(lambda h: {k: v for k, v in {**h, **changes}.items() if v is not None})


ANY = (RESUME, REPLAY, LOOK, VERIFY, EXPORT)
# name -> (what is done, what the answer must name, the verbs that must refuse it)
CASES = {
    "empty": (ledger(lambda d: b""), "ledger", ANY),
    "one byte": (ledger(lambda d: d[:1]), "ends inside its header", ANY),
    "magic only": (ledger(lambda d: d[:8]), "ends inside its header", ANY),
    "half a header": (ledger(lambda d: d[:60]), "ends inside its header", ANY),
    "a header without its checksum": (ledger(lambda d: d[: start(d) - 2]), "ends inside its header", ANY),
    "zero bytes": (ledger(lambda d: b"\0" * len(d)), "is no ledger", ANY),
    "text": (ledger(lambda d: b"step,loss\n1,0.5\n"), "is no ledger", ANY),
    "a pickle": (ledger(lambda d: pickle.dumps({"a": 1})), "is no ledger", ANY),
    "json": (ledger(lambda d: b'{"seed": 1}'), "is no ledger", ANY),
    "gone through a text mode": (ledger(lambda d: d.replace(b"\r\n", b"\n")), "is no ledger", ANY),
    "format 1": (ledger(lambda d: d[:8] + b"\x01\0\0\0" + d[12:]), "has format 1", ANY),
    "format 99": (ledger(lambda d: d[:8] + b"\x63\0\0\0" + d[12:]), "has format 99", ANY),
    "format 2^32-1": (ledger(lambda d: d[:8] + b"\xff" * 4 + d[12:]), "has format 4294967295", ANY),
    "a header of 4 GB": (ledger(lambda d: d[:12] + b"\xff" * 4 + d[16:]), "ends inside its header", ANY),
    "a header of no byte": (ledger(lambda d: d[:12] + b"\0" * 4 + d[16:]), "damaged before byte", ANY),
    "a letter of the header": (ledger(lambda d: d[:30] + b"~" + d[31:]), "damaged before byte", ANY),
    "the header's checksum": (ledger(lambda d: d[: start(d) - 1] + bytes([d[start(d) - 1] ^ 1]) + d[start(d) :]), "damaged before byte", ANY),
    "a bit of the first record": (ledger(lambda d: d[: start(d) + 9] + bytes([d[start(d) + 9] ^ 4]) + d[start(d) + 10 :]), "the 0 steps before it", ANY),
    "a bit of the last record": (ledger(lambda d: d[:-20] + bytes([d[-20] ^ 1]) + d[-19:]), "the 5 steps before it", ANY),
    "a bit of a checksum": (ledger(lambda d: d[:-33] + bytes([d[-33] ^ 128]) + d[-32:]), "the 4 steps before it", ANY),
    "a record lost": (moved(0, 1, 3, 4, 5), "checksum", ANY),
    "the first record lost": (moved(1, 2, 3, 4, 5), "checksum", ANY),
    "a record twice": (moved(0, 1, 1, 2, 3, 4, 5), "checksum", ANY),
    "records swapped": (moved(0, 2, 1, 3, 4, 5), "checksum", ANY),
    "zeros at the end": (ledger(lambda d: d + b"\0" * 64), "damaged at byte", ANY),
    "rubbish at the end": (ledger(lambda d: d + b"x" * 32), "damaged at byte", ANY),
    "a step too high": (recorded(0, "<I", 9), "step is out of order", ANY),
    "an unknown kind": (recorded(4, "<B", 77), "kind is unknown", ANY),
    "unknown flags": (recorded(5, "<B", 129), "flags are unknown", ANY),
    "a direction too high": (recorded(6, "<H", 5), "direction is out of order", ANY),
    "nan as multiplier": (recorded(8, "<f", float("nan")), "not finite", ANY),
    "infinity as decay": (recorded(12, "<f", float("inf")), "not finite", ANY),
    "a step of two directions": (recorded(5, "<B", 0), "", ANY),
    "header, a list": (headed(lambda h: [h]), "header", ANY),
    "header, a number": (headed(lambda h: 3), "header", ANY),
    "header, no JSON": (headed(lambda h: b"{x}"), "header", ANY),
    "header, not UTF-8": (headed(lambda h: b'{"\xff": 1}'), "header", ANY),
    "header, deep": (headed(lambda h: b"[" * 30000), "header", ANY),
    "header, empty": (headed(lambda h: {}), "header", ANY),
    "header, no seed": (with_header(seed=None), "seed", ANY),
    "header, a word as seed": (with_header(seed="x"), "seed", ANY),
    "header, a seed below 0": (with_header(seed=-1), "seed", ANY),
    "header, another seed": (with_header(seed=77), "seed", (RESUME,)),
    "header, no base": (with_header(base=None), "base", ANY),
    "header, a number as base": (with_header(base=3), "", (RESUME, REPLAY, LOOK, EXPORT)),
    "header, another base": (with_header(base="blake2b:00"), "other weights", (RESUME, REPLAY, LOOK, EXPORT)),
    "header, no tensors": (with_header(trained=None), "trained", ANY),
    "header, an empty list of tensors": (with_header(trained={}), "trained", ANY),
    "header, a word as tensors": (with_header(trained="all"), "trained", ANY),
    "header, a number as a tensor": (headed(lambda h: h | {"trained": dict.fromkeys(h["trained"], 3)}), "trained", ANY),
    "header, a tensor that is none": (headed(lambda h: h | {"trained": {"no.such": [1, [2], "fp32"]}}), "no.such", (RESUME, REPLAY, LOOK, EXPORT)),
    "header, an attribute as tensor": (headed(lambda h: h | {"trained": {"__class__": [1, [2], "fp32"]}}), "__class__", (RESUME, REPLAY, LOOK, EXPORT)),
    "header, another shape": (headed(lambda h: h | {"trained": {n: [i, [7, 7], d] for n, (i, s, d) in h["trained"].items()}}), "", (RESUME,)),
    "header, another id": (headed(lambda h: h | {"trained": {n: [i ^ 1, s, d] for n, (i, s, d) in h["trained"].items()}}), "", (RESUME, REPLAY, EXPORT)),
    "header, a dtype that is none": (headed(lambda h: h | {"trained": {n: [i, s, "fp7"] for n, (i, s, d) in h["trained"].items()}}), "", ANY),
    "header, a storage that is none": (with_header(storage="int4"), "storage", ANY),
    "header, a path as storage": (with_header(storage="../x"), "storage", ANY),
    "header, a noise that is none": (with_header(noise="cauchy"), "noise", ANY),
    "header, a newer noise": (with_header(noise_version=99), "noise", (RESUME,)),
    "header, a policy that is none": (with_header(perturb="x"), "perturb", ANY),
    "header, no directions": (with_header(q=0), "q", ANY),
    "header, other directions": (with_header(q=3), "q", ANY),
    "header, a word as q": (with_header(q="two"), "q", ANY),
    "header, an eps of 0": (with_header(eps=0), "eps", ANY),
    "header, momentum of 7": (with_header(momentum=7), "momentum", ANY),
    "no ledger": (gone("ledger"), "ledger", (REPLAY, LOOK, VERIFY, EXPORT)),
    "a folder as ledger": (lambda p: ((p / "run" / "ledger").unlink(), (p / "run" / "ledger").mkdir()), "ledger", ANY),
    "a ledger that is itself": (link("ledger", "ledger"), "ledger", (REPLAY, LOOK, VERIFY, EXPORT)),
    "a ledger of zeros without end": (link("ledger", "/dev/zero"), "ledger", ANY),
    "no config": (gone("config.yaml"), "config.yaml", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, empty": (config(lambda t: ""), "", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, a list": (config(lambda t: "- a\n"), "config.yaml", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, cut": (config(lambda t: t[:100] + "\n: ["), "config.yaml", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, a key twice": (config(lambda t: t + "lr: 0.5\n"), "twice", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, an unknown key": (config(lambda t: t + "lrr: 0.5\n"), "lrr", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, another lr": (config(lambda t: t.replace("lr: 0.01", "lr: 0.02")), "lr", (RESUME,)),
    "config, another batch": (config(lambda t: t.replace("batch_size: 4", "batch_size: 5")), "batch_size", (RESUME,)),
    "config, python": (config(lambda t: t + "x: !!python/name:os.system\n"), "YAML", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, code of a model": (config(lambda t: t.replace("trust_remote_code: false", "trust_remote_code: true")), "brings code", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, a recipe that is none": (config(lambda t: t.replace("recipe: mezo", "recipe: ../../x")), "recipe", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, a model that is none": (config(lambda t: t.replace("model: tiny", "model: no/where/at/all")), "model=", (RESUME, REPLAY, LOOK, EXPORT)),
    "config, data that are none": (config(lambda t: t.replace("train: data.jsonl", "train: no.jsonl")), "no.jsonl", (RESUME,)),
    "another base, by one bit": (model(nudge), "other weights", (RESUME, REPLAY, LOOK, EXPORT)),
    "another base, of another dtype": (model(lambda t, n: t.bfloat16()), "", (REPLAY, LOOK, EXPORT)),
    "other data": (lambda p: (p / "data.jsonl").write_text((p / "data.jsonl").read_text().replace("bad", "add")), "data", (RESUME,)),
    "a base with nan": (model(lambda t, n: t * float("nan") if n == "model.norm.weight" else t), "", (RESUME, REPLAY, EXPORT)),
}  # fmt: skip


@pytest.fixture
def place(tmp_path_factory, tmp_path):
    place = hostile.copy(tmp_path_factory.getbasetemp(), tmp_path / "place")
    (place / "run" / "result.json").unlink()  # as if killed before its end
    return place


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_run(place, name):
    spoil, part, verbs = CASES[name]
    spoil(place)
    for verb in verbs:
        said = hostile.refused(place, verb)
        assert part in said, (verb, said)


SNAPSHOTS = {
    "empty": lambda d: b"",
    "cut": lambda d: d[:-1],
    "cut in its header": lambda d: d[:40],
    "one bit": lambda d: d[:-700] + bytes([d[-700] ^ 1]) + d[-699:],
    "one bit of its header": lambda d: d[:50] + bytes([d[50] ^ 1]) + d[51:],
    "a byte more": lambda d: d + b"x",
    "zero bytes": lambda d: b"\0" * len(d),
    "a huge header": lambda d: struct.pack("<Q", 1 << 60) + d[8:],
    "a pickle": lambda d: pickle.dumps({"x": 1}),
    "text": lambda d: b"hello",
}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A run with snapshots at steps 2 and 4, stopped after the fifth."""
    place = hostile.copy(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("snapshots"))
    shutil.rmtree(place / "run")
    with hostile.working(place):
        args = [
            "train",
            "--config",
            "mine.yaml",
            "output_dir=run",
            "snapshot_every=2",
            "momentum=0.5",
            "keep_last=3",
        ]
        assert CliRunner().invoke(app, args).exit_code == 0
    shutil.copytree(place / "run" / "model", place / "end")
    shutil.rmtree(place / "run" / "model")
    (place / "run" / "result.json").unlink()
    path = place / "run" / "ledger"
    path.write_bytes(path.read_bytes()[:-32])
    assert [(e.kind, e.step) for e in read_ledger(path).events] == [("snapshot", 2), ("snapshot", 4)]
    return place


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_hostile_snapshot_is_passed_over_and_said(snapshots, tmp_path, name):
    """The run goes on from the one before, and ends with the bits of the run that was never touched."""
    place = shutil.copytree(snapshots, tmp_path / "place")
    path = place / "run" / "snapshots" / "step-00000004.safetensors"
    path.write_bytes(SNAPSHOTS[name](path.read_bytes()))
    with hostile.working(place):
        done = CliRunner().invoke(app, ["ledger", "run", "--verify"])
        assert done.exit_code == 2 and "Traceback" not in done.output, done.output
        assert len([x for x in done.stderr.splitlines() if x.startswith("error: ")]) == 1, done.stderr
        done = CliRunner().invoke(app, ["train", "--resume", "run"])
    assert done.exit_code == 0, done.output
    (line,) = [x for x in done.stderr.splitlines() if "is not used" in x]
    assert "step-00000004" in line and "starting from the snapshot at step 2" in done.stderr
    for file in ("model.safetensors", "config.json"):
        assert (place / "run" / "model" / file).read_bytes() == (place / "end" / file).read_bytes()


def test_logs_are_not_the_run(place):
    """What is damaged but follows from the ledger is mended, not refused."""
    (place / "run" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00[[[\n{}\n" * 100)
    (place / "run" / "env.json").write_bytes(b"\xff")
    shutil.rmtree(place / "run" / "model")
    with hostile.working(place):
        done = CliRunner().invoke(app, RESUME)
    assert done.exit_code == 0, done.output
    lines = [json.loads(x) for x in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(STEPS))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"before": 3}', b"\xff", b"[" * 20000])
def test_a_damaged_result(place, content):
    (place / "run" / "result.json").write_bytes(content)
    assert "result.json" in hostile.refused(place, RESUME)


def test_permissions(place):
    for name in ("config.yaml", "ledger"):
        path = place / "run" / name
        path.chmod(0)
        for verb in (RESUME, REPLAY):
            with hostile.no_privileges(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(hostile, "digest", lambda folder: None)
                assert name in hostile.refused(place, verb)
        path.chmod(0o644)


# ---- one flipped bit, and every cut ---------------------------------------------------------------------


def test_one_flipped_bit_anywhere_is_detected(tmp_path):
    """1,000 random places of a ledger of 300 steps, header and checksums included."""
    path, bad = tmp_path / "ledger", tmp_path / "bad"
    rng = random.Random(0)
    with Ledger.create(path, {"seed": 7, "q": 2, "trained": {"a": [1, [2], "fp32"]}}) as ledger:
        for i in range(300):
            values = [float(np.float32(rng.gauss(0, 1))) for _ in range(6)]
            ledger.append(Record(i, tuple(values[:2]), 1.0, tuple(values[2:]), lr=0.5))
    data = path.read_bytes()
    assert len(read_ledger(path).records) == 300
    for _ in range(1000):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        bad.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        with pytest.raises(UserError, match="ledger: "):
            read_ledger(bad)


@pytest.mark.parametrize(
    ("storage", "beta", "kind"), [("fp32", 0.0, "gaussian"), ("fp16", 0.9, "rademacher")]
)
def test_a_ledger_cut_at_every_byte_of_its_last_three_records_ends_with_the_same_bits(
    tmp_path, storage, beta, kind
):
    """In process: the ledger is cut, opened, replayed and run to its end, 97 times."""
    steps, same = 5, {"storage": storage, "compute": storage, "beta": beta, "kind": kind, "steps": 5}
    whole = build(tmp_path, tiny.llama(), name="whole", **same)
    base = weights(whole.model)
    whole.run()
    whole.ledger.close()
    end, data = weights(whole.model), (tmp_path / "whole").read_bytes()
    assert not same_bits(base, end)
    trainer = build(tmp_path, tiny.llama(), name="other", **same)
    cut = tmp_path / "cut"
    for length in range(len(data) - 3 * 32, len(data) + 1):
        cut.write_bytes(data[:length])
        for t in trainer.axis.trained:  # as a new process begins
            t.stored.copy_(base[t.name])
            t.step, t.momentum = 0, None
        trainer.next = trainer.skipped_in_a_row = 0
        with Ledger.open(cut) as trainer.ledger:
            assert len(trainer.ledger.records) == steps - -(-(len(data) - length) // 32)
            trainer.replay(list(trainer.ledger.records))
            trainer.run()
        assert same_bits(end, weights(trainer.model)), length
        assert cut.read_bytes() == data
