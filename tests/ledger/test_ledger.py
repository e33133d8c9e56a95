import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from zoft.errors import UserError
from zoft.ledger.log import Event, Ledger, Record, read_ledger, updates_of

HEADER = {"seed": 2**63 + 11, "q": 2, "config": {"lr": 1e-6, "task": "größe"}}


def fp32(x: float) -> float:
    return float(np.float32(x))


def step(i: int, q: int = 2, **change) -> Record:
    losses = tuple(fp32(0.5 + 0.01 * k + 0.001 * i) for k in range(2 * q))
    record = {
        "multipliers": tuple(fp32(-1e-6 * (i + 1) * (k + 1)) for k in range(q)),
        "decay": fp32(1 - 1e-4),
        "losses": losses,
        "lr": fp32(1e-6),
    }
    return Record(step=i, **{**record, **change})


def write(path, count: int = 5, q: int = 2, header: dict = HEADER) -> bytes:
    with Ledger.create(path, header) as ledger:
        for i in range(count):
            ledger.append(step(i, q))
    return path.read_bytes()


def twin(data: bytes) -> tuple[dict, list[tuple]]:
    """The layout read with struct alone: the header, and each record's fields without its crc."""
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"zoft\r\n\x1a\n", 2)
    header = json.loads(data[16 : 16 + length])
    end = 16 + length
    (crc,) = struct.unpack_from("<I", data, end)
    assert crc == zlib.crc32(data[:end])
    seen, rows = data[:end], []
    for at in range(end + 4, len(data), 32):
        *fields, crc = struct.unpack_from("<IBBHfffffI", data, at)
        seen += data[at : at + 28]
        assert crc == zlib.crc32(seen)  # chained: of everything before, without the other records' crcs
        rows.append(tuple(fields))
    return header, rows


def bits(values) -> list[int]:
    return np.asarray(values, np.float32).view(np.uint32).tolist()


def test_written_bytes_follow_the_layout(tmp_path):
    header, rows = twin(write(tmp_path / "ledger", count=3))
    assert header == {**HEADER, "format": 2}
    expected = []
    for i in range(3):
        s = step(i)
        for k in range(2):
            losses = s.losses[2 * k : 2 * k + 2]
            expected.append((i, 1, k == 1, k, s.multipliers[k], s.decay, *losses, s.lr))
    assert rows == expected


def test_golden_bytes(tmp_path):
    """The example of docs/ledger.md: these bytes may never change while the format is 2."""
    with Ledger.create(tmp_path / "ledger", {"seed": 7}) as ledger:
        ledger.append(Record(0, (-0.5,), 1.0, (1.25, 1.0), lr=0.25))
        ledger.note(Event("snapshot", 1, bytes(range(20))))
    golden = (
        "7a6f66740d0a1a0a 02000000 15000000 7b22666f726d6174223a322c2273656564223a377d ac270d6d"
        "00000000 01 01 0000 000000bf 0000803f 0000a03f 0000803f 0000803e e767c88b"
        "01000000 04 01 0000 000102030405060708090a0b0c0d0e0f10111213 932eea79"
    ).replace(" ", "")
    assert (tmp_path / "ledger").read_bytes().hex() == golden


@pytest.mark.parametrize("q", [1, 3])
def test_read_gives_back_what_was_appended(tmp_path, q):
    write(tmp_path / "ledger", 4, q)
    header, records, _ = read_ledger(tmp_path / "ledger")
    assert header == {**HEADER, "format": 2}
    assert records == [step(i, q) for i in range(4)]
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert (ledger.header, ledger.records, ledger.last_step) == (header, records, 3)


def test_a_reopened_ledger_goes_on_as_if_never_closed(tmp_path):
    whole = write(tmp_path / "whole", 4)
    write(tmp_path / "parts", 0)
    for i in range(4):
        with Ledger.open(tmp_path / "parts") as ledger:
            assert ledger.last_step == i - 1
            ledger.append(step(i))
    assert (tmp_path / "parts").read_bytes() == whole


def test_skipped_steps_keep_the_bits_of_what_was_seen(tmp_path):
    odd_nan = struct.unpack("<f", struct.pack("<I", 0xFFC12345))[0]
    seen = (math.inf, -math.inf, odd_nan, 0.25)
    skipped = step(0, multipliers=(math.nan, -math.inf), losses=seen, skipped=True)
    with Ledger.create(tmp_path / "ledger", HEADER) as ledger:
        ledger.append(skipped)
        ledger.append(step(1, multipliers=(-0.0, 0.0)))
    first, second = read_ledger(tmp_path / "ledger").records
    assert first.skipped and not second.skipped
    assert bits(first.losses) == bits(seen) and bits(first.losses)[2] == 0xFFC12345
    assert bits(first.multipliers) == bits(skipped.multipliers)
    assert bits(second.multipliers) == [0x80000000, 0]


def test_losses_and_lr_are_rounded_to_fp32_and_values_in_use_must_be_fp32(tmp_path):
    with Ledger.create(tmp_path / "ledger", HEADER) as ledger:
        ledger.append(step(0, losses=(0.1, 0.2, 1e300, 0.4), lr=0.1))
        with pytest.raises(AssertionError, match="are no fp32 values"):
            ledger.append(step(1, multipliers=(0.1, 0.0)))
        with pytest.raises(AssertionError, match="not skipped"):
            ledger.append(step(1, multipliers=(math.nan, 0.0)))
        with pytest.raises(AssertionError, match="step 5 after step 0"):
            ledger.append(step(5))
        assert ledger.records[0].losses == (fp32(0.1), fp32(0.2), math.inf, fp32(0.4))
        assert ledger.records == read_ledger(tmp_path / "ledger").records
        assert ledger.records[0].lr == fp32(0.1)


@pytest.mark.parametrize("q", [1, 2])
def test_cut_at_any_byte_of_the_last_records_leaves_the_whole_steps(tmp_path, q):
    data = write(tmp_path / "whole", 5, q)
    cut = tmp_path / "cut"
    for length in range(len(data) - 3 * 32, len(data) + 1):
        cut.write_bytes(data[:length])
        kept = 5 - math.ceil((len(data) - length) / (32 * q))
        assert read_ledger(cut).records == [step(i, q) for i in range(kept)]
        assert cut.stat().st_size == length  # read leaves the file as it is
        with Ledger.open(cut) as ledger:
            assert ledger.last_step == kept - 1
            assert cut.stat().st_size == len(data) - (5 - kept) * 32 * q
            for i in range(kept, 5):
                ledger.append(step(i, q))
        assert cut.read_bytes() == data


def test_every_flipped_bit_is_refused_and_records_name_their_byte(tmp_path):
    data = write(tmp_path / "ledger", 2)
    start = len(data) - 4 * 32
    bad = tmp_path / "bad"
    for at in range(len(data)):
        for bit in range(8):
            bad.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with pytest.raises(UserError) as error:
                read_ledger(bad)
            if at >= start:
                record = (at - start) // 32
                assert f"at byte {start + 32 * record}:" in str(error.value)
                assert f"the {record // 2} steps before" in str(error.value)
    with pytest.raises(UserError, match="at byte"):
        Ledger.open(bad)
    assert bad.stat().st_size == len(data)  # damage is never cut off


DONE = [
    Event("denoise", 0),
    Event("denoise", 2),
    Event("snapshot", 2, bytes(range(20))),
    Event("snapshot", 3),
]


def write_with_events(path, q: int = 2) -> bytes:
    with Ledger.create(path, HEADER) as ledger:
        for i in range(4):
            for event in DONE:
                if event.step == i:
                    ledger.note(event)
            if i < 3:
                ledger.append(step(i, q))
    return path.read_bytes()


@pytest.mark.parametrize("q", [1, 2])
def test_events_stand_between_steps_and_come_back(tmp_path, q):
    data = write_with_events(tmp_path / "ledger", q)
    _, rows = twin(data)  # checks the chain, too
    kinds = [3] + [1] * 2 * q + [3, 4] + [1] * q + [4]
    assert [row[1] for row in rows] == kinds and all(row[2:4] == (1, 0) for row in rows if row[1] > 2)
    log = read_ledger(tmp_path / "ledger")
    assert log.events == DONE and log.records == [step(i, q) for i in range(3)]
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert (ledger.header, ledger.records, ledger.events) == log
        for late in (Event("snapshot", 2), Event("snapshot", 3), Event("denoise", 3), Event("denoise", 4)):
            with pytest.raises(AssertionError):
                ledger.note(late)
    assert (tmp_path / "ledger").read_bytes() == data


def test_a_cut_between_events_leaves_what_was_before_it(tmp_path):
    data, cut = write_with_events(tmp_path / "ledger"), tmp_path / "cut"
    for length in range(len(data) - 6 * 32, len(data) + 1):
        cut.write_bytes(data[:length])
        lost = math.ceil((len(data) - length) / 32)  # records: snapshot, two of step 2, snapshot, denoise, …
        assert len(read_ledger(cut).events) == 4 - (lost > 0) - (lost > 3) - (lost > 4), lost
        assert len(read_ledger(cut).records) == 3 - (lost > 1) - (lost > 5), lost
        with Ledger.open(cut) as ledger:
            for i in range(len(ledger.records), 4):
                for event in DONE:
                    if event.step == i and event not in ledger.events:
                        ledger.note(event)
                if i < 3:
                    ledger.append(step(i))
        assert cut.read_bytes() == data


def test_a_flipped_bit_of_an_event_is_refused(tmp_path):
    data, bad = write_with_events(tmp_path / "ledger"), tmp_path / "bad"
    start = len(data) - 10 * 32
    for at in [*range(start, start + 32), *range(len(data) - 32, len(data))]:
        for bit in range(8):
            bad.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with pytest.raises(UserError, match=f"at byte {start + (at - start) // 32 * 32}: its checksum"):
                read_ledger(bad)


def chained(head: bytes, rows: list[bytes]) -> bytes:
    """A ledger of these bodies after a header's bytes, with the checksums that they need."""
    crc = struct.unpack("<I", head[-4:])[0]
    for body in rows:
        crc = zlib.crc32(body, crc)
        head += body + struct.pack("<I", crc)
    return head


@pytest.mark.parametrize(
    ("at", "change", "what"),
    [
        (0, {0: 1}, "step is out of order"),
        (0, {5: 0}, "flags are unknown"),
        (0, {6: 1}, "direction is out of order"),
        (0, {4: 7}, "kind is unknown"),
        (1, {4: 3}, "flags are unknown"),  # an update's first record turned into an event
        (2, {4: 3}, "inside a step"),
        (5, {4: 4}, "out of order"),  # a second snapshot instead of the denoise before it
        (6, {4: 3}, "out of order"),
    ],
)
def test_misplaced_events_with_right_checksums_are_refused(tmp_path, at, change, what):
    data = write_with_events(tmp_path / "ledger")
    start = len(data) - 10 * 32
    bodies = [bytearray(data[i : i + 28]) for i in range(start, len(data), 32)]
    assert chained(data[:start], bodies) == data
    for byte, value in change.items():
        bodies[at][byte] = value
    (tmp_path / "ledger").write_bytes(chained(data[:start], bodies))
    first = 6 if what == "out of order" else at  # of two events it is the later one that is out of order
    with pytest.raises(UserError, match=f"at byte {start + 32 * first}: .*{what}"):
        read_ledger(tmp_path / "ledger")


@pytest.mark.parametrize("order", [[0, 2, 3], [1, 0, 2, 3], [0, 1, 1, 2, 3], [1, 2, 3]])
def test_lost_moved_and_doubled_records_are_refused(tmp_path, order):
    data = write(tmp_path / "ledger", 4, q=1)
    start = len(data) - 4 * 32
    parts = [data[at : at + 32] for at in range(start, len(data), 32)]
    (tmp_path / "ledger").write_bytes(data[:start] + b"".join(parts[i] for i in order))
    with pytest.raises(UserError, match=r"at byte \d+: its checksum"):
        read_ledger(tmp_path / "ledger")


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        (0, 9, "step is out of order"),
        (1, 5, "kind is unknown"),
        (1, 3, "inside a step"),
        (2, 3, "flags are unknown"),
        (3, 5, "direction is out of order"),
        (4, math.nan, "not finite"),
        (5, 0.5, "disagrees"),
        (8, 0.5, "disagrees"),
    ],
)
def test_wrong_records_with_right_checksums_are_refused(tmp_path, field, value, what):
    data = write(tmp_path / "ledger", 3)
    _, rows = twin(data)
    start = len(data) - 6 * 32
    crc, out = struct.unpack_from("<I", data, start - 4)[0], data[:start]
    for i, row in enumerate(rows):
        fields = list(row)
        if i == 3:
            fields[field] = value
        body = struct.pack("<IBBHfffff", *fields)
        crc = zlib.crc32(body, crc)
        out += body + struct.pack("<I", crc)
    (tmp_path / "ledger").write_bytes(out)
    with pytest.raises(UserError, match=f"at byte {start + 3 * 32}: .*{what}.* 1 steps"):
        read_ledger(tmp_path / "ledger")


def test_a_damaged_or_foreign_header_is_refused(tmp_path):
    data, path = write(tmp_path / "ledger", 1), tmp_path / "bad"
    for length in range(len(data) - 64):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=f"at byte {length}: it ends inside its header"):
            Ledger.open(path)
    path.write_bytes(b"seed,projected_grad\n" * 9)
    with pytest.raises(UserError, match="is no ledger"):
        read_ledger(path)
    path.write_bytes(data[:8] + struct.pack("<I", 3) + data[12:])
    with pytest.raises(UserError, match="has format 3.* reads 2: update zoft"):
        read_ledger(path)
    path.write_bytes(data[:8] + struct.pack("<I", 1) + data[12:])
    with pytest.raises(UserError, match="has format 1.* reads 2: use the zoft that wrote it"):
        read_ledger(path)


@pytest.mark.parametrize("text", [b"[1]", b"7", b"{", b"\xff\xfe", b""])
def test_a_header_that_is_no_json_object_is_refused_whatever_its_checksum(tmp_path, text):
    head = b"zoft\r\n\x1a\n" + struct.pack("<II", 2, len(text)) + text
    (tmp_path / "ledger").write_bytes(head + struct.pack("<I", zlib.crc32(head)))
    for call in (read_ledger, Ledger.open):
        with pytest.raises(UserError, match="no JSON object"):
            call(tmp_path / "ledger")


def test_a_missing_file_a_folder_and_an_existing_run_are_refused(tmp_path):
    for call in (read_ledger, Ledger.open):
        with pytest.raises(UserError, match="No such file"):
            call(tmp_path / "none")
        with pytest.raises(UserError, match="directory"):
            call(tmp_path)
    write(tmp_path / "ledger")
    before = (tmp_path / "ledger").read_bytes()
    with pytest.raises(UserError, match="exists: resume"):
        Ledger.create(tmp_path / "ledger", HEADER)
    assert (tmp_path / "ledger").read_bytes() == before and os.listdir(tmp_path) == ["ledger"]
    with pytest.raises(UserError, match="JSON"):
        Ledger.create(tmp_path / "other", {"lr": math.nan})
    assert not (tmp_path / "other").exists()


def test_one_writer_at_a_time_and_readers_any_time(tmp_path):
    path = tmp_path / "ledger"
    with Ledger.create(path, HEADER) as ledger:
        ledger.append(step(0))
        assert len(read_ledger(path).records) == 1
        with pytest.raises(UserError, match="another process is writing this run"):
            Ledger.open(path)
        code = f"from zoft.ledger.log import Ledger; Ledger.open({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing this run" in other.stderr
        ledger.append(step(1))
    with Ledger.open(path) as ledger:
        assert ledger.last_step == 1
    ledger.close()  # again: nothing
    with pytest.raises(AssertionError, match="closed"):
        ledger.append(step(2))


def test_a_killed_writer_loses_nothing_it_had_appended(tmp_path):
    """kill -9 while it writes, its own count of the steps done on stdout: the file has at least those."""
    code = (
        "import sys; from zoft.ledger.log import Ledger, Record\n"
        "ledger = Ledger.create(sys.argv[1], {'seed': 1})\n"
        "for i in range(10**9):\n"
        "    ledger.append(Record(i, (0.5, -0.5), 1.0, (1.0, 2.0, 3.0, 4.0)))\n"
        "    print(i, flush=True)\n"
    )
    path = tmp_path / "ledger"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    for _ in range(200):
        done = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    done = max([done, *map(int, writer.stdout.read().split())])
    writer.wait()
    with Ledger.open(path) as ledger:
        assert ledger.last_step >= done
        ledger.append(Record(ledger.last_step + 1, (0.5, -0.5), 1.0, (1.0, 2.0, 3.0, 4.0)))


def test_a_full_disk_is_one_line_and_leaves_whole_steps(tmp_path):
    """A real limit on the file's size: the write comes back short, then fails."""
    path = tmp_path / "ledger"
    ledger = Ledger.create(path, HEADER)
    ledger.append(step(0))
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
    try:
        with pytest.raises(UserError, match="ledger: cannot write step 1"):
            ledger.append(step(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size and ledger.last_step == 0
    ledger.append(step(1))  # room again
    ledger.close()
    assert read_ledger(path).records == [step(0), step(1)]


def test_a_header_that_does_not_fit_leaves_no_run(tmp_path):
    path, limits = tmp_path / "ledger", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            Ledger.create(path, HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()
    write(path, 1)
    assert os.listdir(tmp_path) == ["ledger"]


def test_twenty_thousand_steps_fit_in_700_kB(tmp_path):
    with Ledger.create(tmp_path / "ledger", {**HEADER, "notes": "x" * 40_000}) as ledger:
        for i in range(20_000):
            ledger.append(step(i, q=1))
    assert (tmp_path / "ledger").stat().st_size <= 700_000
    assert len(read_ledger(tmp_path / "ledger").records) == 20_000


def test_so_do_they_with_the_header_of_a_large_model(tmp_path):
    """All tensors of a 13 B model named: the header, 32 bytes a step, and nothing else."""
    import torch
    import transformers as hf

    from zoft.config.schema import Config, Task
    from zoft.method import space
    from zoft.train import header as headers

    shape = {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480, "num_hidden_layers": 40}
    with torch.device("meta"):
        model = hf.OPTForCausalLM(hf.OPTConfig(num_attention_heads=40, **shape))
    trained = space.adopt(model, space.train_names(model, "all"))
    config = Config(model="m", task=Task(name="local"), storage="fp16", compute="bf16")
    header = headers.header_of(config, "blake2b-sampled:" + "0" * 32, trained)
    with Ledger.create(tmp_path / "ledger", header) as ledger:
        ledger.append(step(0, q=1))
    assert len(trained) > 600
    assert (tmp_path / "ledger").stat().st_size + 19_999 * 32 <= 700_000


def test_updates_are_the_steps_that_were_not_skipped(tmp_path):
    with Ledger.create(tmp_path / "ledger", HEADER) as ledger:
        for i in range(3):
            ledger.append(step(i, skipped=i == 1))
    header, records, _ = read_ledger(tmp_path / "ledger")
    got = [(u.step, u.seed, u.multipliers, u.decay) for u in updates_of(header, records)]
    assert got == [(i, HEADER["seed"], step(i).multipliers, step(i).decay) for i in (0, 2)]
    with pytest.raises(UserError, match="seed=None"):
        updates_of({}, records)
