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
PAGE, HALVING = re.findall(r"```python\n(.*?)```", DOC, re.S)
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


def test_the_page_with_a_second_round_trains_resumes_and_is_replayed(place):
    (place / "halving.py").write_text(HALVING, encoding="utf-8")
    words = ["--config", "mine.yaml", "--recipe", "halving.py", "lr=0.1"]
    zoft(place, "train", *words, "output_dir=whole")
    assert json.loads((place / "whole" / "result.json").read_text())["forwards"] == 12 * 4 * (2 + 3)
    zoft(place, "replay", "whole", "--recipe", "halving.py", "--out", "replayed")
    assert same(weights(place / "whole" / "model"), weights(place / "replayed"))
    cut = place / "cut"
    shutil.copytree(place / "whole", cut, ignore=shutil.ignore_patterns("model", "result.json", "replayed"))
    data = (cut / "ledger").read_bytes()
    start = 20 + int.from_bytes(data[12:16], "little")
    (cut / "ledger").write_bytes(data[: start + 32 * (7 + 1)])
    zoft(place, "train", "--resume", "cut", "--recipe", "halving.py")
    assert same(weights(place / "whole" / "model"), weights(cut / "model"))
    for key in ("weight_decay=0.1", "update=adam", "perturb=inplace"):
        assert f"{key}: does not go with estimator=halving" in zoft(place, "validate", *words, key, code=2)
    for old, new, says in (
        ("count=lambda q: 3", "count=lambda q: 2", "its second round has 3 points and count says 2"),
        ("Probe(0, m)", "Probe(1, m)", "its second round has directions beyond 0 to 0"),
        ("else 0.0]", "else 0.0] * 2", "its second round chooses 2 multipliers, not 1"),
    ):
        (place / "halving.py").write_text(HALVING.replace(old, new), encoding="utf-8")
        said = zoft(place, "train", *words, "output_dir=wrong", code=2)
        assert says in said and "mend the page" in said


def test_the_commands_of_the_page_on_updates(place):
    text = (ROOT / "docs" / "updates.md").read_text(encoding="utf-8")
    commands = re.findall(r"^zoft (train .*)$", "".join(re.findall(r"```bash\n(.*?)```", text, re.S)), re.M)
    assert len(commands) == 5
    small = [
        "model=tiny",
        "steps=4",
        "batch_size=2",
        "eval_every=0",
        "eval_limit=8",
        "max_length=64",
        "threads=1",
    ]
    for line in commands:
        zoft(place, *line.split(), *small)
        run = line.rpartition("output_dir=")[2]
        assert json.loads((place / run / "result.json").read_text())["steps"] == 4
        zoft(place, "replay", run, "--out", f"{run}-again")
        assert same(weights(place / run / "model"), weights(place / f"{run}-again"))


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


WRONG = {  # what is put in place of a part of the page -> what its refusal says
    "raises": ("mean = losses.mean()", "raise ValueError('boom')", "ValueError: boom; mend the page"),
    "no state": ("/ (eps * q), new", "/ (eps * q)", "its estimator fails on made-up numbers: ValueError"),
    "a number": ("return (losses - baseline) / (eps * q), new", "return 1.0, new", "TypeError"),
    "too few": ("/ (eps * q), new", "[:1] / (eps * q), new", "1 coefficients"),
    "count": ("count=lambda q: q", "count=lambda q: q + 1", "probes gives 4 points and count says 5"),
    "directions": ("Probe(k, eps)", "Probe(k + 1, eps)", "directions [1, 2, 3, 4], not 0 to 3"),
    "name": ('Estimator("moving"', 'Estimator("two_sided"', "is named two_sided as a packaged one is"),
    "unknown": ("estimator=MOVING", 'estimator="movin"', "METHOD has estimator='movin'; use two_sided"),
    "key": ('"lr": 1e-4', '"lrr": 1e-4', "METHOD names lrr, which is no key; did you mean lr?"),
    "field": ("estimator=MOVING", "estimater=MOVING", "unexpected keyword argument 'estimater'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_in_a_page_is_one_line_before_anything_is_written(place, case):
    part, instead, says = WRONG[case]
    assert part in PAGE
    (place / "moving.py").write_text(PAGE.replace(part, instead), encoding="utf-8")
    said = zoft(place, "train", *SMALL, "output_dir=none", code=2)
    assert says in said and "moving.py" in said and said.strip().splitlines()[-1].startswith("error: "), said
    assert not (place / "none").exists()


def test_a_page_moved_elsewhere_goes_on_and_verifies(place):
    zoft(place, "train", *SMALL, "steps=3", "snapshot_every=0", "output_dir=run")
    assert "config: config.yaml is what the run was begun with" in zoft(place, "ledger", "run", "--verify")
    assert "estimator moving" in zoft(place, "ledger", "run")
    (place / "elsewhere").mkdir()
    (place / "moving.py").rename(place / "elsewhere" / "other.py")
    (place / "run" / "result.json").unlink()
    zoft(place, "train", "--resume", "run", "--recipe", "elsewhere/other.py")


def test_the_best_config_of_a_sweep_is_used_with_the_page(place):
    words = ["steps=2", "snapshot_every=0", "lr=1e-4,1e-5", "output_dir=s", "--jobs", "1"]
    zoft(place, "sweep", *SMALL, *words)
    assert "lr:" in zoft(place, "validate", "--config", "s/best.yaml", "--recipe", "moving.py")


def test_the_commands_of_the_page_are_those_of_zoft():
    verbs = get_command(app).commands
    for line in COMMANDS.strip().splitlines():
        name, verb, *words = line.split()
        known = {o for p in verbs[verb].params for o in p.opts}
        assert name == "zoft" and {w for w in words if w.startswith("--")} <= known, line
