"""Drawn run folders: ledgers, snapshots, logs and job files are read as they were written, or refused in one line."""

import json
import os
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoft.cli.ledger import ledger_summary, ledger_text, verify_ledger
from zoft.config.schema import Config, Task
from zoft.console import logged
from zoft.errors import UserError
from zoft.ledger.check import refuse_unsound
from zoft.ledger.log import Event, Ledger, Record, read_ledger
from zoft.noise.spec import tensor_id
from zoft.replay.snapshot import digest_of, fault_of, file_of, newest_snapshot
from zoft.sweep.job import KINDS, job_record, job_state, progress, result
from zoft.sweep.view import status_text

CASES = int(os.environ.get("FUZZ_CASES", "600"))
drawn = settings(
    max_examples=CASES, derandomize=True, deadline=10_000, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
pytestmark = pytest.mark.slow

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
numbers = st.integers(-3, 9) | st.sampled_from([1 << 31, 1 << 63, -(1 << 63), 10**30]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
    max_leaves=6,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6,
)  # fmt: skip


def attempt(act):
    """(what act gives, "") or (None, the line that refuses); nothing else may come of it, and not later than in 10 s."""
    began = time.monotonic()
    try:
        return act(), ""
    except UserError as error:
        assert "\n" not in str(error), error
        return None, str(error)
    finally:
        assert time.monotonic() - began < 10


def header():
    return {
        "zoft": "1", "seed": 3, "noise": "gaussian", "noise_version": 1, "base": "blake2b:1", "config": {"lr": "ab"}, "momentum": 0.0,
        "eps": 1e-3, "q": 1, "storage": "fp32", "compute": "fp32", "perturb": "probes", "mask": "none", "sparsity": 0.0,
        "trained": {"w": [tensor_id("w"), [2, 3], "fp32"]}, "plan": {"steps": 9, "recipe": "mezo"}, "versions": {"torch": "2"},
        "evaluation": {"rows": "x", "asked": "y"}, "model": {"rms_norm_eps": 1e-6},
    }  # fmt: skip


def record(step, multiplier=-0.5):
    return Record(step, (float(np.float32(multiplier)),), 1.0, (1.25, 1.0), lr=0.25)


def written(folder, head, steps=3, events=()):
    path = folder / "ledger"
    path.unlink(missing_ok=True)
    with Ledger.create(path, head) as made:
        for step in range(steps):
            for event in events:
                if event.step == step:
                    made.note(event)
            made.append(record(step))
    return path


def looked_at(folder):
    """All that looks at a ledger without a model."""
    log, said = attempt(lambda: refuse_unsound(folder, read_ledger(folder / "ledger")))
    shown, _ = attempt(lambda: ledger_text(ledger_summary(folder)))
    if shown is not None:
        assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    checked, told = attempt(lambda: verify_ledger(folder))
    assert (checked is None) >= (log is None), (said, told)  # what resume refuses, --verify does
    return log, said


# Keys of a sound header, changed or gone.
@drawn
@given(st.dictionaries(st.sampled_from([*header(), "floors", "turns", "examples", "update", "data", "blocks", "rho", "node_rank", "mask_every", "x"]), plain, max_size=2),
       st.sets(st.sampled_from(list(header())), max_size=1))  # fmt: skip
def test_headers(tmp_path, changes, gone):
    head = {k: v for k, v in (header() | changes).items() if k not in gone}
    made, _ = attempt(lambda: written(tmp_path, head))
    if made is None:
        return
    log, said = looked_at(tmp_path)
    if log is not None:
        assert {k: v for k, v in log.header.items() if k != "format"} == head and len(log.records) == 3
        assert log.records == [record(s) for s in range(3)]
    else:
        assert said


@drawn
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, 80),
    st.booleans(),
)
def test_bytes(tmp_path, changes, cut, mend):
    """Flipped bytes are refused; with all checksums put right, what is read is what stands there."""
    path = written(tmp_path, header())
    whole = path.read_bytes()
    data = bytearray(whole[: len(whole) - cut])
    for at, byte in changes:
        data[at % len(data)] = byte
    head = 16 + int.from_bytes(data[12:16], "little")
    if mend and head + 4 <= len(data):
        crc = zlib.crc32(data[:head])
        data[head : head + 4] = crc.to_bytes(4, "little")
        for i in range(head + 4, len(data) - 31, 32):
            crc = zlib.crc32(data[i : i + 28], crc)
            data[i + 28 : i + 32] = crc.to_bytes(4, "little")
    path.write_bytes(data)
    log, said = looked_at(tmp_path)
    assert path.read_bytes() == data
    if log is None:
        assert said
    elif not mend:
        steps = (len(data) - head - 4) // 32
        assert log.records == [record(s) for s in range(3)][:steps]
    else:
        for i, found in enumerate(log.records):
            at = head + 4 + 32 * i
            assert np.frombuffer(data[at + 8 : at + 12], "<f4")[0] == found.multipliers[0] or found.skipped


tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I32"]),
        "shape": st.sampled_from([[2, 3], [3, 2], [6], [2, 3, 1]]),
    }
)


@drawn
@given(st.dictionaries(st.sampled_from(["w", "w@momentum", "w@v", "x", "@"]), tensors, max_size=3), st.integers(0, 2**32 - 1),
       st.integers(-1, 300), st.booleans())  # fmt: skip
def test_snapshots(tmp_path, held, word, flip, forged):
    (tmp_path / "snapshots").mkdir(exist_ok=True)
    file = file_of(tmp_path, 2)
    entries, at, data = {}, 0, b""
    for name, entry in held.items():
        size = int(np.prod(entry["shape"])) * (2 if entry["dtype"] == "F16" else 4)
        entries[name] = entry | {"data_offsets": [at, at + size]}
        at += size
        data += (np.uint32(word).tobytes() * 6)[:size].ljust(size, b"\0")
    text = json.dumps(entries).encode()
    whole = bytearray(len(text).to_bytes(8, "little") + text + data)
    file.write_bytes(whole)
    event = Event("snapshot", 2, digest_of(file))
    if 0 <= flip < len(whole):
        whole[flip] ^= 1
        file.write_bytes(whole)
        if forged:
            event = Event("snapshot", 2, digest_of(file))
    written(tmp_path, header(), events=[event])
    log, _ = looked_at(tmp_path)
    fault = fault_of(file, log.header, event)
    lines = []
    found = newest_snapshot(tmp_path, log.header, [event], say=lines.append)
    assert (found is None) == bool(fault) == bool(lines) and all("\n" not in line for line in lines)
    if not fault:
        from safetensors.numpy import load_file

        own = load_file(file)
        assert own["w"].shape == (2, 3) and own["w"].dtype == np.float32 and np.isfinite(own["w"]).all()
        assert set(own) <= {"w", "w@momentum", "w@v"}


line = st.dictionaries(
    st.sampled_from(["step", "loss", "eval", "seconds", "lr", "x"]), values, max_size=4
).map(json.dumps)
good = st.fixed_dictionaries({"step": st.integers(0, 9), "loss": st.floats(-5, 5)}).map(json.dumps)
ugly = st.sampled_from(["[" * 3000, "{", "", "\ud7ff", '{"step": 1e999}', '{"step": NaN}', "null"])


@drawn
@given(st.lists(line | good | ugly, max_size=6))
def test_logs(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    rows = logged(path)
    for row in rows:
        assert type(row["step"]) is int and 0 <= row["step"] < 1 << 32
        assert all(type(v) in (int, float, bool, type(None)) for v in row.get("eval", {}).values())
        assert isinstance(row.get("seconds", 0), int | float)
    whole = [
        json.loads(x)
        for x in lines
        if x.startswith('{"loss"') or x.startswith('{"step"') and "e999" not in x and "NaN" not in x
    ]
    sound = [
        r
        for r in whole
        if set(r) == {"step", "loss"}
        and type(r["step"]) is int
        and 0 <= r["step"] < 10
        and type(r["loss"]) is float
    ]
    assert all(r in rows for r in sound if abs(r["loss"]) < 1e300)  # what a run writes is never lost


@drawn
@given(
    st.dictionaries(st.sampled_from([*KINDS, "slurm", "x"]), values, max_size=5),
    values,
    st.lists(line, max_size=2),
)
def test_jobs(tmp_path, facts, end, lines):
    job = tmp_path / "a"
    job.mkdir(exist_ok=True)
    (tmp_path / "sweep.json").write_text(json.dumps({"swept": ["lr"], "jobs": {"a": {"lr": "1"}}}))
    (job / "job.json").write_text(json.dumps(facts))
    (job / "metrics.jsonl").write_text("\n".join(lines))
    (job / "result.json").unlink(missing_ok=True)
    if isinstance(end, dict):
        (job / "result.json").write_text(json.dumps({"after": end}))
    found = job_record(job)
    for key, value in found.items():
        assert key not in KINDS or type(value) in KINDS[key]
        assert not isinstance(value, str) or "\n" not in value
    for key, kinds in KINDS.items():
        if type(facts.get(key)) is int and int in kinds and abs(facts[key]) < 1 << 53:
            assert found[key] == facts[key]
    job_state(job), result(job), progress(job)
    shown, said = attempt(lambda: status_text(tmp_path))
    assert shown is not None, said
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)


def test_the_sound_header_is_sound(tmp_path):
    from zoft.noise import spec

    assert header()["noise_version"] == spec.VERSION
    written(tmp_path, header())
    assert refuse_unsound(tmp_path, read_ledger(tmp_path / "ledger")).records == [record(s) for s in range(3)]
    assert Config(model="m", task=Task(name="local")).q == 1
