"""docs/ledger.md says what the files are: its reader, its example and its commands are run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_ledger import DONE, HEADER, step, write_with_events

from zoft.config.schema import fields
from zoft.ledger.log import Event, Ledger, Record, read_ledger, updates_of

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
READER, WITH_ZOFT = re.findall(r"```python\n(.*?)```", DOC, re.S)


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_example_is_what_is_written(tmp_path):
    block = re.search(r"```\n(7a6f.*?)```", DOC, re.S)[1]
    spelled = "".join(
        re.match(r"(?:[0-9a-f]+ )*[0-9a-f]+", line)[0].replace(" ", "") for line in block.splitlines()
    )
    with Ledger.create(tmp_path / "ledger", {"seed": 7}) as ledger:
        ledger.append(Record(0, (-0.5,), 1.0, (1.25, 1.0), lr=0.25))
        ledger.note(Event("snapshot", 1, bytes(range(20))))
    assert (tmp_path / "ledger").read_bytes().hex() == spelled


def test_the_reader_is_ten_lines_of_plain_python_and_reads_every_record(tmp_path):
    lines = [line for line in READER.splitlines() if line]
    assert len(lines) <= 11 and lines[0] == "import json, struct, zlib" and READER.count("import") == 1
    data = write_with_events(tmp_path / "ledger", q=2)
    done = run(READER, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = []
    for i in range(4):
        for event in DONE:
            if event.step == i:
                expected.append(f"{i} {3 if event.kind == 'denoise' else 4} 0 {event.digest.hex()}")
        for k in range(2) if i < 3 else ():
            record = step(i)
            expected.append(
                f"{i} 1 {k} {record.multipliers[k]} {record.losses[2 * k]} {record.losses[2 * k + 1]}"
            )
    assert done.stdout.splitlines() == expected
    assert "header" in READER and run(READER + "\nprint(header['seed'])", tmp_path).stdout.endswith(
        f"{HEADER['seed']}\n"
    )
    (tmp_path / "ledger").write_bytes(data[:-3])  # a last record that is not whole
    assert run(READER, tmp_path).stdout.splitlines() == expected[:-1]


@pytest.mark.parametrize("at", [9, 30, -20, -100])
def test_the_reader_sees_a_flipped_bit(tmp_path, at):
    data = bytearray(write_with_events(tmp_path / "ledger"))
    data[at] ^= 1
    (tmp_path / "ledger").write_bytes(data)
    done = run(READER, tmp_path)
    assert done.returncode == 1 and "damaged" in done.stderr.splitlines()[-1]
    if at < 0:
        start = len(data) - 10 * 32
        assert f"at byte {start + (len(data) + at - start) // 32 * 32}" in done.stderr


def test_reading_with_zoft(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_with_events(tmp_path / "runs" / "mine" / "ledger")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(WITH_ZOFT, found)
    log = read_ledger("runs/mine/ledger")
    assert (found["header"], found["records"], found["events"]) == log and len(log.events) == 4
    assert found["updates"] == updates_of(log.header, log.records)


def test_every_key_and_header_key_that_is_named_exists(tmp_path):
    import tiny
    from test_trainer import build, examples

    from zoft.config.schema import Config, Task
    from zoft.train import header as headers

    for name in re.findall(r"`([a-z_]+)=", DOC):
        assert name in fields(), name
    config = Config(model="m", task=Task(name="local"), storage="fp32", compute="fp32", update="sign")
    trainer, rows = build(tmp_path, tiny.llama()), examples()
    header = headers.header_of(config, "b", trainer.axis.trained, rows, model=trainer.model, held_out=rows)
    table = DOC[DOC.index("| key of the JSON") : DOC.index("Readers keep unknown keys")]
    named = {
        name
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert named == {"format", "writing", *header}  # writing: in runs that write texts
