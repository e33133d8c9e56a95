"""What a missing package's message says, tried on a Python with pip and one without."""

import importlib.util
import shlex
import subprocess
import sys
import venv

import pytest

from zoft import packages


def test_with_pip_the_command_is_of_the_python_that_runs():
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    words = shlex.split(packages.install("optuna"))
    assert words == [sys.executable, "-m", "pip", "install", "optuna"]
    done = subprocess.run([*words[:3], "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pip ")


def test_without_pip_it_is_told_to_uv_for_that_python(tmp_path):
    venv.create(tmp_path / "bare one", with_pip=False, symlinks=True)
    python = tmp_path / "bare one" / "bin" / "python"
    code = "import sys, types; sys.path.append(sys.argv[1]); import zoft.packages as p; print(p.missing('--trials', 'optuna'))"
    root = packages.__file__.rpartition("/zoft/")[0]
    done = subprocess.run([python, "-I", "-c", code, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, _, command = done.stdout.strip().partition("; ")
    assert said == "--trials: optuna is not installed"
    assert shlex.split(command) == ["uv", "pip", "install", "optuna", "--python", str(python)]
