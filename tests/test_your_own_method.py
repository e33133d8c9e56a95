"""The page of docs/your_own_method.md, exactly as it stands there: trained, resumed, replayed, refused where it must be."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors import safe_open
from typer.main import get_command
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.method import recipes

ROOT = Path(__file__).resolve().parent.parent
DOC = (ROOT / "docs" / "your_own_method.md").read_text(encoding="utf-8")
(PAGE,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
(COMMANDS,) = re.findall(r"```bash\n(.*?)```", DOC, re.S)
SMALL = ["--config", "mine.yaml", "--recipe", "./moving.py"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def place(tmp_path):
    tiny.place(
        tmp_path, "steps: 12\nbatch_size: 4\nmax_length: 32\nthreads: 1\neval_limit: 8\nsnapshot_every: 5\n"
    )
    (tmp_path / "moving.py").write_text(PAGE, encoding="utf-8")
    return tmp_path


def zoft(place, *words, code=0):
    """Run a verb in this process, as a new one that has read no page yet; returns all that it says."""
    recipes._own.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, (words, done.output, done.stderr, done.exception)
    return done.output + done.stderr


def weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}


def same(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_the_page_trains_is_replayed_and_is_asked_for_again(place):
    zoft(place, "train", *SMALL, "output_dir=whole")
    result = json.loads((place / "whole" / "result.json").read_text())
    assert (
        result["forwards"] == 12 * 4 * 4
    )  # steps × q of the page's defaults × batch: one probe per direction
    zoft(place, "replay", "whole", "--recipe", "./moving.py", "--out", "replayed")
    assert same(weights(place / "whole" / "model"), weights(place / "replayed"))
    assert "name it again, --recipe" in zoft(place, "replay", "whole", "--out", "other", code=2)
    assert "accuracy" in zoft(place, "eval", "whole")  # judges weights, runs no page
    (place / "moving.py").write_text(PAGE.replace("0.9", "0.8"), encoding="utf-8")
    assert "another text of its recipe" in zoft(
        place, "replay", "whole", "--recipe", "./moving.py", "--out", "other", code=2
    )


def test_a_killed_run_goes_on_with_the_same_bits(place):
    zoft(place, "train", *SMALL, "steps=60", "output_dir=whole")
    words = [sys.executable, "-m", "zoft", "train", *SMALL, "steps=60", "output_dir=cut", "sync=step"]
    process = subprocess.Popen(
        words, cwd=place, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ledger = place / "cut" / "ledger"
    while not ledger.exists() or ledger.stat().st_size < 5000:  # some steps are written
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "name it again, --recipe" in zoft(place, "train", "--resume", "cut", code=2)
    zoft(place, "train", "--resume", "cut", "--recipe", "./moving.py")
    assert same(weights(place / "whole" / "model"), weights(place / "cut" / "model"))
    assert (place / "whole" / "ledger").read_bytes()[-320:] == (place / "cut" / "ledger").read_bytes()[-320:]


def test_the_rule_of_the_page_on_updates_trains_resumes_and_is_replayed(place):
    text = (ROOT / "docs" / "updates.md").read_text(encoding="utf-8")
    (place / "lion.py").write_text(re.findall(r"```python\n(.*?)```", text, re.S)[0], encoding="utf-8")
    words = ["--config", "mine.yaml", "--recipe", "lion.py", "storage=bf16", "lr=1e-3"]
    zoft(place, "train", *words, "output_dir=whole")
    zoft(place, "replay", "whole", "--recipe", "lion.py", "--out", "replayed")
    assert same(weights(place / "whole" / "model"), weights(place / "replayed"))
    cut = (
        place / "cut"
    )  # as a kill after seven steps leaves it: the snapshot at step 5 is there, the one at 10 is not known
    shutil.copytree(place / "whole", cut, ignore=shutil.ignore_patterns("model", "result.json", "replayed"))
    data = (cut / "ledger").read_bytes()
    start = 20 + int.from_bytes(data[12:16], "little")
    (cut / "ledger").write_bytes(data[: start + 32 * (7 + 1)])  # seven steps and the snapshot's event
    zoft(place, "train", "--resume", "cut", "--recipe", "lion.py")
    assert same(weights(place / "whole" / "model"), weights(cut / "model"))
    assert (cut / "ledger").read_bytes() == data


def test_other_verbs_and_refusals(place):
    assert "q: 4" in zoft(place, "validate", *SMALL)
    assert "q: 2" in zoft(place, "validate", *SMALL, "q=2")  # what the command line sets wins over the page
    assert "peak memory" in zoft(place, "estimate", *SMALL)
    (place / "asks.yaml").write_text((place / "mine.yaml").read_text() + "recipe: ./moving.py\n")
    assert "not from a file" in zoft(place, "validate", "--config", "asks.yaml", code=2)
    for text, says in (
        ("x = 1\n", "has no METHOD"),
        ("METHOD = 3\n", "a METHOD that is a int"),
        ("1 / 0\n", "ZeroDivisionError"),
    ):
        (place / "moving.py").write_text(text)
        assert says in zoft(place, "validate", *SMALL, code=2)
    assert "no_such.py" in zoft(place, "validate", "--config", "mine.yaml", "--recipe", "no_such.py", code=2)


def test_the_commands_of_the_page_are_those_of_zoft():
    verbs = get_command(app).commands
    for line in COMMANDS.strip().splitlines():
        name, verb, *words = line.split()
        known = {o for p in verbs[verb].params for o in p.opts}
        assert name == "zoft" and {w for w in words if w.startswith("--")} <= known, line
