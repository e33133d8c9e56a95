"""The wheel: everything under zoft's own name, usable from any folder; and what is needed to build it."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel built from this tree and installed alone into an empty folder."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-isolation"] if _has("hatchling") else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not isolation and "hatchling" in done.stdout + done.stderr:
        pytest.skip("hatchling is neither installed nor to be had")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = out.glob("zoft-*.whl")
    target = out / "target"
    with zipfile.ZipFile(wheel) as archive:  # what an installer without dependencies does for a pure wheel
        archive.extractall(target)
    return target


def _has(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_nothing_stands_beside_zoft(installed):
    names = {p.name for p in installed.iterdir()}
    (info,) = [n for n in names if n.endswith(".dist-info")]
    assert names == {"zoft", info}
    assert "zoft = zoft.cli:main" in (installed / info / "entry_points.txt").read_text()
    assert (installed / info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_every_source_config_and_recipe_is_inside(installed):
    for folder, pattern in (("zoft", "*.py"), ("recipes", "*.py"), ("configs", "*.yaml")):
        for path in (ROOT / folder).rglob(pattern):
            inside = installed / ("" if folder == "zoft" else "zoft") / path.relative_to(ROOT)
            assert inside.read_bytes() == path.read_bytes(), inside


def test_the_installed_zoft_works_from_any_folder(installed, tmp_path):
    def run(*args):
        env = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, "-m", "zoft", *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    assert "mezo/reviews" in run("ls").stdout
    assert run("cp", "mezo/reviews", "mine.yaml").returncode == 0
    assert "name: reviews" in run("validate", "--config", "mine.yaml").stdout
    code = "import sys, zoft, zoft.method.recipes as r; r.method_of('mezo'); m = sys.modules['zoft.recipes.mezo']; print(zoft.__file__, m.__file__, m.__name__)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    found = done.stdout.split()
    assert found[1:] == [str(installed / "zoft" / "recipes" / "mezo.py"), "zoft.recipes.mezo"], done.stderr


@pytest.mark.slow
def test_an_installed_wheel_trains_and_gives_its_weights_back(installed, tmp_path):
    """With the versions at hand, outside the source tree; `make test-newest` does so with the newest."""
    fresh.check(tmp_path, {**os.environ, "PYTHONPATH": str(installed)})


def test_light_files_import_nothing_heavy_at_the_top():
    heavy = {
        "torch",
        "transformers",
        "numba",
        "numpy",
        "hydra",
        "omegaconf",
        "yaml",
        "rich",
        "wandb",
        "datasets",
        "peft",
    }
    for name in (
        "__init__", "__main__", "console", "env", "errors", "cli/main", "cli/app", "config/schema", "config/compose",
        "method/method", "method/recipes", "method/configured", "method/estimators/named", "method/rules", "models/load",
        "train/resolve", "run/start", "run/loop", "run/preflight", "run/session", "run/tracker",
    ):  # fmt: skip
        tree = ast.parse((ROOT / "zoft" / f"{name}.py").read_text())
        for node in tree.body:  # imports inside functions and under TYPE_CHECKING are not at the top
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not heavy & {n.split(".")[0] for n in names}, (name, names)


def test_optional_packages_are_imported_only_where_used():
    """A machine with torch and transformers alone must train: these may be missing on it."""
    optional = {"datasets", "wandb", "pyarrow", "pandas", "gguf", "matplotlib", "sklearn"}
    for path in [*(ROOT / "zoft").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not optional & {n.split(".")[0] for n in names}, (path, names)


def test_every_install_that_resolves_is_constrained():
    """One unconstrained install would take gigabytes of CUDA on a machine without a GPU."""
    text = (ROOT / "Makefile").read_text()
    assert len(re.findall(r"pip install", text)) == 2  # both in PIP, which INSTALL constrains
    assert len(re.findall(r"^  INSTALL = \$\(PIP\).*\$\(CPU\)$", text, re.M)) == 2
    for line in text.splitlines():
        assert "$(PIP)" not in line or "$(CPU)" in line or "--no-deps" in line, line
    assert "LOCKED = $(PIP) --no-deps --require-hashes" in text
    assert "torch==" in (ROOT / "constraints" / "cpu.txt").read_text()


def test_ci_is_executable_and_needs_only_the_checkout():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test-lowest" in script.read_text() and "make test-newest\n" not in script.read_text()
    assert "make lint" in script.read_text() and "make test" in script.read_text()
