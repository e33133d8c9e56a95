"""What hostile input is met with: one line, exit code 2, no traceback, and not a byte of the folder changed."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import tiny
from typer.testing import CliRunner

from zoft.cli.main import app

CONFIG = {
    "model": "tiny",
    "task": {
        "name": "local",
        "train": "data.jsonl",
        "prompt": "{text} ",
        "label": "label",
        "choices": {"a": "a", "b": "b"},
    },
    "steps": 6,
    "batch_size": 4,
    "lr": 0.01,
    "max_length": 32,
    "threads": 1,
    "device": "cpu",
}
TRAIN = ("train", "--config", "mine.yaml", "output_dir=out")
# Said while a run starts; neither mistakes nor answers.
PROGRESS = ("loading ", "step 0: ", "replaying ", "starting from ")


@functools.cache
def template(root: Path) -> Path:
    """A folder with a model, a config, data, and a finished run `run`."""
    place = root / "template"
    place.mkdir()
    tiny.save(place / "tiny")
    tiny.write_rows(place / "data.jsonl")
    (place / "mine.yaml").write_text(json.dumps(CONFIG))
    with working(place):
        done = CliRunner().invoke(app, ["train", "--config", "mine.yaml", "output_dir=run"])
        assert done.exit_code == 0, (done.output, done.exception)
    config = place / "run" / "config.yaml"  # paths of this very folder would lead back to it
    config.write_text(config.read_text().replace(f"{place}/", ""))
    return place


@contextlib.contextmanager
def working(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def digest(folder):
    """Name, kind, mode and content of everything in a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        mode = path.lstat().st_mode
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            with everything_allowed(path):
                content = hashlib.blake2b(path.read_bytes()).hexdigest()
        else:
            content = ""
        found[str(path.relative_to(folder))] = (mode, content)
    return found


@contextlib.contextmanager
def everything_allowed(path):
    mode = path.stat().st_mode
    if not mode & 0o400:
        path.chmod(mode | 0o400)
    try:
        yield
    finally:
        if not mode & 0o400:
            path.chmod(mode)


def refused(folder, args, *parts):
    """Run a verb in `folder`; it must end with one line on stderr and exit code 2, and leave the folder as it was."""
    before = digest(folder)
    with working(folder):
        done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    lines = [line for line in done.stderr.splitlines() if not line.startswith(PROGRESS)]
    said = "\n".join(lines)
    assert done.exit_code == 2, (done.exit_code, done.output)
    assert len(lines) == 1 and said.startswith("error: ") and said.isprintable(), said
    assert len(said) > len("error: ") + 10 and "Traceback" not in done.output, said
    assert not any(part not in said for part in parts), said
    assert digest(folder) == before, "files have changed"
    return said


def copy(root, folder):
    """A copy of the template for one case to spoil."""
    shutil.copytree(template(root), folder, symlinks=True, dirs_exist_ok=True)
    return folder


@contextlib.contextmanager
def no_privileges():
    """Permissions hold in here for root, too: its capabilities to pass over them are put aside."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    fields = list(struct.unpack("6I", data.raw))
    less = list(fields)
    less[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, struct.pack("6I", *less)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, struct.pack("6I", *fields)) == 0
