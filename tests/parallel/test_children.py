"""Processes that zoft starts import nothing from the folder they work in: files there may be a stranger's."""

import os
import subprocess

import pytest
import tiny

from zoft.packages import zoft_command

PLANTED = ("typer", "datasets", "peft", "json", "recipes", "site", "numba")


@pytest.fixture
def place(tmp_path):
    """Return a folder to train in with modules that leave a trace when they are imported."""
    tiny.place(tmp_path, "steps: 2\nbatch_size: 2\nmax_length: 32\nthreads: 1\neval_limit: 4\nq: 2\n")
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open('{tmp_path}/ran-{name}', 'w').close()\nraise ImportError('planted')\n")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", "mine.yaml", "--nproc", "2"],
        ["train", "--config", "mine.yaml", "--nproc", "2", "elastic=true"],
        ["sweep", "--config", "mine.yaml", "lr=1e-4,1e-5", "output_dir=s", "--jobs", "1"],
    ],
)
def test_what_lies_in_the_folder_is_never_imported(place, words):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(zoft_command(*words), cwd=place, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(place.glob("ran-*"))
