"""A run whose folder fills up, loses its permissions, moves or vanishes: one line, and no step is lost."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import tiny
from test_trainer import build, same_bits, weights

from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.folder import alone, refuse_unwritable
from zoft.ledger.log import Ledger, Record, read_ledger
from zoft.run import loop as runs
from zoft.run.session import Presence, session
from zoft.signals import Stopped
from zoft.train.trainer import Trainer

STEPS = 60  # lines of more than a page


def config(folder, **changes):
    changes = {
        "model": "m",
        "task": Task(name="local"),
        "steps": STEPS,
        "lr": 1e-2,
        "device": "cpu",
        **changes,
    }
    return Config(output_dir=str(folder), **changes)


def rows(folder, what="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in lines if what in row]


def train(folder, resume=False, prepare=lambda trainer, s: None, kind=Trainer, evaluate=lambda: {"n": 1}):
    """A real run of a tiny model in `folder`; returns the weights at its end."""
    with session(config(folder), {"seed": 7}, folder if resume else None) as s:
        made = build(folder, tiny.llama(), opened=s.ledger, steps=STEPS)
        made.__class__ = kind
        prepare(made, s)
        runs.fit(made, s, evaluate)
        return weights(made.model)


def at(step, act):
    """Something that happens after a step."""

    def prepare(trainer, s):
        plain = trainer.write_down

        def write_down(record):
            metrics = plain(record)
            if record.step == step:
                act(s)
            return metrics

        trainer.write_down = write_down

    return prepare


class Behind(Trainer):
    """Steps reach the ledger two steps late, and the last ones when the loop is left, as on a GPU."""

    def write_down(self, record):
        self.__dict__.setdefault("late", []).append(record)
        return super().write_down(self.late.pop(0)) if len(self.late) > 2 else None

    def run(self, on_step=lambda metrics: None, until=None):
        until = self.settings.steps if until is None else until
        try:
            while self.next < until:
                if (metrics := self.step()) is not None:
                    on_step(metrics)
            while self.late:
                on_step(Trainer.write_down(self, self.late.pop(0)))
        finally:
            while self.late:
                Trainer.write_down(self, self.late.pop(0))
            self.axis.flush()


@pytest.fixture(scope="module")
def end(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("kind", [Trainer, Behind])
def test_steps_under_way_when_a_run_is_stopped_have_their_lines(tmp_path, kind, end):
    folder = tmp_path / "run"
    stop = at(5, lambda s: setattr(s.stop, "number", 15))
    if kind is Behind:

        def stop(trainer, s):
            plain = s.stop.check

            def check():
                s.stop.number = 15 if s.ledger.last_step >= 5 else 0
                plain()

            s.stop.check = check

    with pytest.raises(Stopped):
        train(folder, prepare=stop, kind=kind)
    done = len(read_ledger(folder / "ledger")[1])
    assert done == (6 if kind is Trainer else 8) and rows(folder) == list(range(done))
    assert same_bits(end, train(folder, resume=True, kind=kind)) and rows(folder) == list(range(STEPS))


def test_lines_that_are_missing_or_damaged_are_filled_in_from_the_ledger(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        train(folder, prepare=at(8, lambda s: setattr(s.stop, "number", 15)))
    path = folder / "metrics.jsonl"
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    lines = path.read_bytes().splitlines()
    lines[3], lines[5] = b'{"step": 2, "lo', b"\xff\xfe[[[[ 1"
    path.write_bytes(b"\n".join([*lines[:8], b"[1]", b'{"loss": 1}', b'{"step": "x"}', lines[8][:20]]))
    train(folder, resume=True)
    mended = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows(folder) == list(range(STEPS)) and rows(folder, "eval") == [0, STEPS]
    for a, b in zip(whole[1:], mended[1:]):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["projected_gradient"] == pytest.approx(b["projected_gradient"], rel=1e-3)


@contextlib.contextmanager
def small_disk(tmp_path, size):
    """A folder on a file system of `size` bytes, all of it; where mounting is not allowed, a limit on files."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place):
    """Leave no byte of the disk; returns the file that holds them."""
    held = place / "held"
    with held.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    return held


def test_a_full_disk_stops_the_run_and_loses_no_step(tmp_path, end):
    with small_disk(tmp_path, 1 << 20) as place:
        folder = place / "run"
        with pytest.raises(UserError, match="No space left on device") as error:
            train(folder, prepare=at(5, lambda s: fill(place)))
        said = str(error.value)
        kept = len(read_ledger(folder / "ledger")[1])
        # What the file system had set aside for the files still took some steps, or none.
        assert 6 <= kept <= STEPS and f"the {kept} steps so far are kept" in said and "\n" not in said
        assert f"zoft train --resume {folder}" in said
        (place / "held").unlink()
        assert same_bits(end, train(folder, resume=True)) and rows(folder) == list(range(STEPS))


def test_a_limit_on_files_stops_the_run_and_loses_no_step(tmp_path, end):
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(s):
        size = (folder / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))

    try:
        with pytest.raises(
            UserError, match="cannot write .*metrics.jsonl: File too large; the . steps so far"
        ):
            train(folder, prepare=at(5, limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read_ledger(folder / "ledger")[1]) >= 6
    assert same_bits(end, train(folder, resume=True)) and rows(folder) == list(range(STEPS))


def test_a_disk_that_is_full_at_the_end_keeps_the_run_whole(tmp_path):
    """The model does not fit any more: no half of it is left, and the same command saves it later."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    model.checkpoint_dtype = next(model.parameters()).dtype
    model.save_pretrained(tmp_path / "tiny")
    with small_disk(tmp_path, 1 << 20) as place:
        folder = place / "run"
        with session(config(folder, model=str(tmp_path / "tiny")), {"seed": 7}, None) as s:
            s.ledger.append(Record(0, (0.5,), 1.0, (1.0, 2.0)))
            fill(place)
            with pytest.raises(UserError, match="cannot write .*model: .*[Nn]o space left on device"):
                runs.finish(s, model, tokenizer, {"before": {}, "after": {}})
            assert not (folder / "model").exists() and not (folder / "result.json").exists()
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
            (place / "held").unlink()
            runs.finish(s, model, tokenizer, {"before": {}, "after": {}})
        assert (folder / "model" / "model.safetensors").exists() and (folder / "result.json").exists()


def test_a_read_only_place_is_refused_before_anything_is_written(tmp_path):
    with small_disk(tmp_path, 1 << 16) as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(UserError, match=f"output_dir={place}/a/b: {place} cannot be written in"):
            refuse_unwritable("output_dir", place / "a" / "b")
        with pytest.raises(UserError, match="cannot be written in; choose another place"):
            train(place / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        refuse_unwritable("output_dir", tmp_path / "file" / "x")
    refuse_unwritable("output_dir", tmp_path / "new" / "x")


def test_a_folder_is_one_processs_at_a_time_and_goes_again_while_empty(tmp_path):
    place = tmp_path / "runs" / "x"
    for new, fix in ((True, "choose another name with output_dir=…"), (False, "or stop it")):
        with (
            alone(place, True),
            pytest.raises(UserError, match=f"another process is writing this run: .*{fix}"),
        ):
            with alone(place, new):
                pytest.fail("two at a time")
        assert not (tmp_path / "runs").exists()
    with pytest.raises(ZeroDivisionError), alone(place, True):
        (place / "ledger").touch()
        1 / 0  # noqa: B018
    with alone(place, False), contextlib.suppress(UserError):
        pass
    assert (place / "ledger").exists()
    with (
        pytest.raises(UserError, match="output_dir=/proc/zoft/x: cannot be made"),
        alone(Path("/proc/zoft/x"), True),
    ):
        pytest.fail("made")


def test_a_deleted_folder_is_put_back_with_its_steps(tmp_path, end):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="was deleted while the run went on; its 6 steps are put back"):
        train(folder, prepare=at(5, lambda s: (shutil.rmtree(folder), look_now(s))))
    assert same_bits(end, train(folder, resume=True)) and rows(folder) == list(range(STEPS))


def look_now(s):
    Presence(s.ledger, {"config.yaml": "steps: 1\n"}).look(now=True)


def test_a_folder_that_moved_says_where_its_steps_are(tmp_path, end):
    folder, there = tmp_path / "run", tmp_path / "there"
    with pytest.raises(UserError, match="was moved while the run went on; its 6 steps went with it"):
        train(folder, prepare=at(5, lambda s: (folder.rename(there), look_now(s))))
    assert not folder.exists() and len(read_ledger(there / "ledger")[1]) == 6
    assert same_bits(end, train(there, resume=True))


def test_a_vanished_parent_leaves_the_ledger_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "a" / "run"
    folder.mkdir(parents=True)
    with Ledger.create(folder / "ledger", {"seed": 1}) as ledger:
        ledger.append(Record(0, (0.5,), 1.0, (1.0, 2.0)))
        Presence(ledger, {}).look(now=True)
        before = (folder / "ledger").read_bytes()
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").touch()  # no folder can be made there again
        with pytest.raises(UserError, match="its 1 steps are put back") as error:
            Presence(ledger, {"config.yaml": "x: 1\n"}).look(now=True)
    place = str(error.value).rpartition("--resume ")[2].rstrip("`")
    assert (tmp_path / os.path.basename(place) / "ledger").read_bytes() == before
    assert (tmp_path / os.path.basename(place) / "config.yaml").read_text() == "x: 1\n"


def test_a_terminal_that_is_gone_does_not_stop_a_run(tmp_path):
    from zoft.run.tracker import Tracker

    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with Tracker(tmp_path, 2, stream=Gone()) as t:
        t.note("x")
        t.step(0, loss=1.0)
        t.step(1, loss=1.0)
    assert rows(tmp_path) == [0, 1]


def test_a_file_that_is_asked_for_is_whole_or_as_it_was(tmp_path):
    """A full disk (a limit on the size of files) leaves the older picture, table and list of answers; a device is written to."""
    import signal

    from zoft.folder import write
    from zoft.pictures import pyplot, write_picture

    figure = pyplot("--plot").figure()
    for make in (lambda p: write(p, "x" * 5000), lambda p: write_picture(figure, p)):
        path = tmp_path / "out.png"
        path.write_text("older")
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(UserError, match="cannot write .*out.png: File too large"):
                make(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert path.read_text() == "older" and [p.name for p in tmp_path.iterdir()] == ["out.png"]
        make(path)
        assert path.stat().st_size > 1000
    write(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()
