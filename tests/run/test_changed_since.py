"""What a run depends on is in its header; what is left of a kill is cleaned; what others change meanwhile is noticed."""

import json
import os
import re
import shutil
import time

import hostile
import pytest
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.ledger import log as ledgers
from zoft.ledger.format import encode_header
from zoft.ledger.log import Ledger, read_ledger

KEYS = "steps: 6\nbatch_size: 2\nmax_length: 32\neval_limit: 4\nsnapshot_every: 2\nkeep_last: 3\nthreads: 1\n"


def zoft(folder, *words):
    with hostile.working(folder):
        done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    tiny.place(folder, KEYS)
    (folder / "held.jsonl").write_text((folder / "data.jsonl").read_text())
    text = (folder / "mine.yaml").read_text()
    (folder / "mine.yaml").write_text(
        text.replace("train: data.jsonl", "train: data.jsonl, eval: held.jsonl")
    )
    done = zoft(folder, "train", "--config", "mine.yaml", "output_dir=run")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def place(finished, tmp_path):
    """A finished run, its paths put right."""
    shutil.copytree(finished, tmp_path / "p")
    for file in ("config.yaml", "result.json"):
        path = tmp_path / "p" / "run" / file
        path.write_text(path.read_text().replace(str(finished), str(tmp_path / "p")))
    return tmp_path / "p"


def stopped(place, steps=4):
    """Make it a run that was stopped after some steps."""
    (place / "run" / "result.json").unlink()
    shutil.rmtree(place / "run" / "model")
    path = place / "run" / "ledger"
    log = read_ledger(path)
    path.unlink()
    for file in (place / "run" / "snapshots").iterdir():
        if int(file.name[5:13]) >= steps:
            file.unlink()
    with Ledger.create(path, log.header) as made:
        for record in log.records[:steps]:
            for event in log.events:
                if event.step == record.step:
                    made.note(event)
            made.append(record)
    return log


def rewritten(place, change):
    """The ledger with another header, its chain put right."""
    path = place / "run" / "ledger"
    log = read_ledger(path)
    path.unlink()
    with Ledger.create(path, change(log.header)) as made:
        for record in log.records:
            made.append(record)


def model_bits(place):
    return (place / "run" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("key, value", [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "default", "rope_theta": 77.0}), ("hidden_act", "gelu"), ("attention_dropout", 0.5)])  # fmt: skip
@pytest.mark.parametrize("verb", ["resume", "replay"])
def test_a_changed_config_of_the_base_is_refused_with_both_values(place, key, value, verb):
    stopped(place)
    path = place / "tiny" / "config.json"
    found = json.loads(path.read_text())
    before = found[key]
    path.write_text(json.dumps(found | {key: value}))
    words = ["train", "--resume", "run"] if verb == "resume" else ["replay", "run", "--out", "again"]
    done = zoft(place, *words)
    said = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 2 and f"config.json has {key}=" in said, said
    if isinstance(value, (str, float)):
        assert f"{key}={before}, not {value}" in said


def test_what_computes_nothing_may_change(place):
    log = stopped(place)
    path = place / "tiny" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"use_cache": False, "id2label": {"0": "x", "1": "y"}})
    )
    assert zoft(place, "train", "--resume", "run").exit_code == 0
    assert read_ledger(place / "run" / "ledger").records == log.records


def test_changed_evaluation_rows_are_refused(place):
    stopped(place)
    path = place / "held.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[20:]))
    done = zoft(place, "train", "--resume", "run")
    assert (
        done.exit_code == 2
        and "other evaluation rows (blake2b:" in done.stderr
        and "task.eval" in done.stderr
    ), done.output


def test_evaluation_rows_that_are_asked_for_are_said(place):
    log = stopped(place)
    (place / "other.jsonl").write_text("\n".join((place / "held.jsonl").read_text().splitlines()[20:]))
    path = place / "run" / "config.yaml"
    path.write_text(path.read_text().replace("held.jsonl", "other.jsonl"))
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0, done.output
    assert "other evaluation rows than before" in done.stderr
    assert read_ledger(place / "run" / "ledger").records == log.records


def swapped(text, one, other):
    """Two words of a tokenizer's file with each other's ids."""
    first, second = (re.search(rf"{w}: (\d+)", text)[1] for w in (one, other))
    return text.replace(f"{one}: {first}", f"{one}: {second}").replace(
        f"{other}: {second}", f"{other}: {first}"
    )


def test_what_ends_a_text_or_spells_it_is_in_the_header(tmp_path):
    tiny.place(tmp_path, KEYS + "objective: exact_match\nmax_new_tokens: 4\n")
    assert zoft(tmp_path, "train", "--config", "mine.yaml", "output_dir=run").exit_code == 0
    for file in ("result.json", "metrics.jsonl"):
        (tmp_path / "run" / file).unlink()
    assert zoft(tmp_path, "train", "--resume", "run").exit_code == 0
    whole = (tmp_path / "tiny" / "tokenizer.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    for change in (
        lambda m: (m / "generation_config.json").write_text('{"eos_token_id": [2, 7]}'),
        lambda m: (m / "tokenizer.json").write_text(swapped(whole, '"y"', '":"')),
    ):
        with hostile.working(tmp_path):
            change(tmp_path / "tiny")
        done = zoft(tmp_path, "train", "--resume", "run")
        assert done.exit_code == 2 and "other ends of texts, or other words" in done.stderr, done.output
        (tmp_path / "tiny" / "generation_config.json").unlink(missing_ok=True)
        (tmp_path / "tiny" / "tokenizer.json").write_text(whole)
    assert zoft(tmp_path, "train", "--resume", "run").exit_code == 0


def test_other_versions_are_one_line(place):
    stopped(place)
    rewritten(
        place, lambda h: h | {"zoft": "0.0.1", "versions": h["versions"] | {"torch": "1.0", "numpy": "1.2"}}
    )
    done = zoft(place, "train", "--resume", "run")
    lines = [line for line in done.stderr.splitlines() if "was begun with" in line]
    assert done.exit_code == 0 and len(lines) == 1, done.output
    assert "zoft 0.0.1 (now " in lines[0] and "torch 1.0 (now " in lines[0] and "numpy 1.2 (now " in lines[0]
    assert "transformers" not in lines[0]


def test_an_older_header_goes_on(place):
    bits = model_bits(place)
    stopped(place)
    rewritten(place, lambda h: {k: v for k, v in h.items() if k not in ("model", "evaluation", "versions")})
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0 and "begun" not in done.stderr and model_bits(place) == bits


# ---- whole files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_finished_run_with_half_a_model_writes_it_again(place, keep):
    path = place / "run" / "model" / "model.safetensors"
    bits = path.read_bytes()
    path.write_bytes(bits[: keep if isinstance(keep, int) else int(keep * len(bits))])
    done = zoft(place, "train", "--resume", "run")
    assert (
        done.exit_code == 0
        and "model.safetensors is damaged" in done.stderr
        and "written again" in done.stderr
    )
    assert path.read_bytes() == bits and (place / "run" / "result.json").exists()


def test_a_finished_run_is_left_alone(place):
    before = hostile.digest(place)
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0 and "this run is finished; its result follows" in done.stderr
    assert hostile.digest(place) == before


def test_leftovers_of_a_kill_go_at_the_next_start(place):
    bits = model_bits(place)
    stopped(place)
    run = place / "run"
    (run / ".model-x1.draft").mkdir()
    (run / ".model-x1.draft" / "model.safetensors").write_bytes(b"half")
    (run / "snapshots" / ".step-00000004.safetensors.new").write_bytes(b"half")
    (run / ".modelling.draft").mkdir()  # another's
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0 and model_bits(place) == bits, done.output
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == [".modelling.draft"]
    assert not list((run / "snapshots").glob(".*"))


def test_a_model_that_was_being_replaced_comes_back(tmp_path):
    from zoft.models.saving import clean_leftovers

    (tmp_path / ".m-old-a.draft" / "model").mkdir(parents=True)
    (tmp_path / ".m-old-a.draft" / "model" / "x").write_text("whole")
    clean_leftovers(tmp_path / "m")
    assert (tmp_path / "m" / "x").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_being_written_is_no_leftover(tmp_path):
    from zoft.models.saving import whole_folder

    with whole_folder(tmp_path / "m") as first:
        (first / "x").write_text("1")
        with whole_folder(tmp_path / "m") as second:
            (second / "x").write_text("2")
        assert first.exists()
    assert (tmp_path / "m" / "x").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    from zoft.models import saving

    seen, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        saving.os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))
    )
    monkeypatch.setattr(saving.os, "rename", lambda a, b: (seen.append("rename"), rename(a, b)))
    with saving.whole_folder(tmp_path / "m") as folder:
        (folder / "in").mkdir()
        (folder / "in" / "x").write_text("1")
    at = seen.index("rename")
    assert {str(folder / "in" / "x"), str(folder / "in"), str(folder)} == set(seen[:at])
    assert seen[at + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize("size", [0, 2000, 20_000])
def test_a_full_disk_leaves_nothing(place, size):
    """A limit on the size of a file stands for a full disk: the write fails in the same place, and by an OSError."""
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        for verb in (["replay", "run", "--out", "again"], ["export", "run", "--merge", "--out", "again"]):
            with hostile.working(place):
                done = CliRunner().invoke(app, verb)
            assert done.exit_code == 2 and "cannot write" in done.stderr, (done.output, done.exception)
            assert not [p.name for p in place.iterdir() if "again" in p.name]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_one_snapshot_more_than_asked_for_goes_at_resume(place):
    bits = model_bits(place)
    stopped(place, steps=5)
    log = read_ledger(place / "run" / "ledger")
    assert [e.step for e in log.events] == [2, 4]
    path = place / "run" / "config.yaml"
    path.write_text(path.read_text().replace("keep_last: 3", "keep_last: 1"))
    for step in (2, 4):
        assert (place / "run" / "snapshots" / f"step-{step:08d}.safetensors").exists()
    path.write_text(path.read_text().replace("snapshot_every: 2", "snapshot_every: 4"))  # no other occasion
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0 and model_bits(place) == bits, done.output
    assert len(list((place / "run" / "snapshots").iterdir())) == 1


# ---- planted, cut, of another shape --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model", ".config.yaml.new", "ledger.new", "metrics.jsonl", "ledger", ".result.json.new"]
)
def test_a_planted_link_is_refused_before_training(place, name):
    (place / "new").mkdir()
    (place / "new" / name).symlink_to(place / "target")
    done = zoft(place, "train", "--config", "mine.yaml", "output_dir=new")
    assert done.exit_code == 2 and done.stderr.startswith("error: output_dir=new: "), done.output
    assert "loading" not in done.stderr and not (place / "target").exists()


@pytest.mark.parametrize("name", ["ledger", "metrics.jsonl", "snapshots"])
def test_a_stopped_run_is_not_written_through_a_link(place, name):
    stopped(place)
    shutil.copytree(place / "run", place / "other")
    path = place / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(place / "other" / name)
    before = hostile.digest(place)
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 2 and f"run: {name} is a link" in done.stderr, done.output
    assert hostile.digest(place) == before


def test_a_draft_is_never_written_through_a_link(tmp_path):
    from zoft.folder import write

    (tmp_path / "target").write_text("mine")
    (tmp_path / ".x.new").symlink_to(tmp_path / "target")
    write(tmp_path / "x", "text")
    assert (tmp_path / "target").read_text() == "mine" and (tmp_path / "x").read_text() == "text"
    assert not (tmp_path / ".x.new").is_symlink()


@pytest.mark.parametrize("change", [lambda d: d[:-40], lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_a_ledger_that_is_cut_meanwhile_is_noticed(place, change, monkeypatch):
    path, append, done = place / "new" / "ledger", ledgers.Ledger.append, []

    def cut(self, record):
        append(self, record)
        if record.step == 3 and not done:
            done.append(1)
            data = path.read_bytes()
            with path.open("r+b") as file:
                file.truncate(0)
                file.write(change(data))

    monkeypatch.setattr(ledgers.Ledger, "append", cut)
    said = zoft(place, "train", "--config", "mine.yaml", "output_dir=new")
    assert said.exit_code == 2 and "another program changed" in said.stderr, said.output
    assert not (place / "new" / "result.json").exists()


LINES = ['{"step": 0, "eval": 5}', '{"step": 0, "eval": [1]}', '{"step": 0, "eval": {"loss": "x"}}', '{"step": true, "loss": 1}',
         '{"step": -1, "loss": 1}', '{"step": 1, "loss": [1]}', '{"step": 1, "loss": 1, "seconds": "x"}', "[1]", "5",
         '{"step": 1, "seconds": null}', '{"step": 1e400}', '{"step": 0, "eval": {"loss": {"a": 1}}}', "[" * 5000]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda s: s[:30])
def test_a_line_of_another_shape_is_mended_from_the_ledger(place, line):
    path = place / "run" / "metrics.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    bits = model_bits(place)
    stopped(place)
    path.write_text("\n".join([line, *path.read_text().splitlines()[2:], line]))
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0, done.output
    again = [json.loads(x) for x in path.read_text().splitlines()]
    assert model_bits(place) == bits

    told = [r for r in again if "eval" not in r]
    records = read_ledger(place / "run" / "ledger").records
    assert [r["step"] for r in told] == list(range(len(records)))
    for row, record in zip(told, records, strict=True):  # lines of the ledger are rounded as it is
        assert row["loss"] == pytest.approx(sum(record.losses) / 2, rel=1e-6) and row["lr"] == pytest.approx(
            record.lr
        )
    assert {r["step"]: r["eval"] for r in again if "eval" in r} == {
        r["step"]: r["eval"] for r in rows if "eval" in r
    }


HEADS = {
    "floors, text": (lambda h: h | {"floors": "x"}, "floors is no mapping"),
    "a floor, text": (lambda h: h | {"floors": {next(iter(h["trained"])): "x"}}, "floors has"),
    "a floor of nothing": (lambda h: h | {"floors": {"x": 1.0}}, "floors has x"),
    "versions, a list": (lambda h: h | {"versions": [1]}, "versions is no mapping"),
    "a version, a number": (lambda h: h | {"versions": {"torch": 2}}, "versions are no texts"),
    "model, text": (lambda h: h | {"model": "x"}, "model is no mapping"),
    "evaluation, text": (lambda h: h | {"evaluation": 3}, "evaluation is no mapping"),
    "evaluation, empty": (lambda h: h | {"evaluation": {}}, "evaluation has no rows"),
    "fewer steps planned": (lambda h: h | {"plan": h["plan"] | {"steps": 3}}, "it has 6 steps, and its header planned 3"),
    "data, a number": (lambda h: h | {"data": 5}, "data is no text"),
    "config, numbers": (lambda h: h | {"config": {"lr": 5}}, "no hashes"),
    "a shape of -1": (lambda h: h | {"trained": {k: [v[0], [-1], v[2]] for k, v in h["trained"].items()}}, "name: [id"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_verify_says_of_a_header_what_resume_says(place, name):
    change, part = HEADS[name]
    rewritten(place, change)
    (place / "run" / "result.json").unlink()
    said = [zoft(place, *words) for words in (["ledger", "run", "--verify"], ["train", "--resume", "run"])]
    for done in said:
        assert done.exit_code == 2 and part in done.stderr, done.output
    assert encode_header({"a": 1})  # the header's own writer is what was used


@pytest.mark.parametrize("size", [3e38, -3e38, 1e31])
def test_a_vast_multiplier_is_refused(place, size):
    import dataclasses

    import numpy as np

    path = place / "run" / "ledger"
    log = read_ledger(path)
    path.unlink()
    vast = dataclasses.replace(log.records[-1], multipliers=(float(np.float32(size)),))
    with Ledger.create(path, log.header) as made:
        for record in [*log.records[:-1], vast]:
            made.append(record)
    (place / "run" / "result.json").unlink()
    for words in (
        ["ledger", "run", "--verify"],
        ["train", "--resume", "run"],
        ["replay", "run", "--out", "x"],
    ):
        done = zoft(place, *words)
        assert done.exit_code == 2 and "step 5 moves weights by" in done.stderr, done.output


def forged(place, change):
    """Snapshots with other content and their right digest in the ledger."""
    from safetensors.torch import load_file, save_file

    from zoft.ledger.log import Event
    from zoft.replay.snapshot import digest_of, file_of

    log = stopped(place)
    path = place / "run" / "ledger"
    log = read_ledger(path)
    path.unlink()
    with Ledger.create(path, log.header) as made:
        for record in log.records:
            for event in log.events:
                if event.step == record.step:
                    file = file_of(place / "run", event.step)
                    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
                    made.note(Event("snapshot", event.step, digest_of(file)))
            made.append(record)


def first(change):
    def changed(held):
        name = sorted(held)[0]
        return held | {name: change(held[name])}

    return changed


FORGED = {
    "nan": (first(lambda t: t * float("nan")), "holds NaN or infinity in"),
    "infinity": (first(lambda t: t / 0), "holds NaN or infinity in"),
    "another shape": (first(lambda t: t[:1]), "its header as"),
    "another dtype": (first(lambda t: t.half()), "its header as"),
    "a tensor less": (lambda h: {k: h[k] for k in sorted(h)[1:]}, "lacks"),
    "a tensor more": (lambda h: h | {"x": next(iter(h.values())).clone()}, "has x, which is not trained"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_snapshot_is_passed_over_and_verify_says_so(place, name):
    change, part = FORGED[name]
    bits = model_bits(place)
    forged(place, change)
    done = zoft(place, "ledger", "run", "--verify")
    assert done.exit_code == 2 and part in done.stderr, done.output
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0 and part in done.stderr and "is not used" in done.stderr, done.output
    assert model_bits(place) == bits


def test_terminal_sequences_of_a_header_are_written_out(place):
    rewritten(place, lambda h: h | {"zoft": "\x1b]0;owned\x07\x9b2J\u202e", "base": h["base"]})
    done = zoft(place, "ledger", "run")
    assert done.exit_code == 0 and "\\x1b]0;owned\\x07" in done.stdout
    assert not set("\x1b\x07\x9b\u202e") & set(done.stdout)


# ---- files that are none, or say that they are vast ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "snapshots"])
def test_a_pipe_in_a_runs_folder_holds_nothing_up(place, name):
    stopped(place)
    path = place / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.mkfifo(path)
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 2 and f"run: {name} is no " in done.stderr, done.output


@pytest.mark.parametrize(
    "name, part",
    [
        ("ledger", "its checksum does not match"), ("result.json", "more than 16,777,216 bytes"),
        ("snapshots/step-00000006.safetensors", "is damaged: it has 107,374,182,400 bytes"),
    ],
)  # fmt: skip
def test_a_sparse_file_of_100_gigabytes_is_refused_at_once(place, name, part):
    with (place / "run" / name).open("r+b") as file:
        file.truncate(100 << 30)
    words = ["train", "--resume", "run"] if name == "result.json" else ["ledger", "run", "--verify"]
    began = time.monotonic()
    done = zoft(place, *words)
    assert done.exit_code == 2 and part in done.stderr and time.monotonic() - began < 10, done.output


def test_a_sparse_metrics_file_is_mended_from_the_ledger(place):
    bits = model_bits(place)
    stopped(place)
    with (place / "run" / "metrics.jsonl").open("r+b") as file:
        file.truncate(100 << 30)
    done = zoft(place, "train", "--resume", "run")
    assert done.exit_code == 0 and model_bits(place) == bits, done.output
    assert (place / "run" / "metrics.jsonl").stat().st_size < 10_000
