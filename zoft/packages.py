"""Packages that may be missing, and data that comes in pip packages: found without importing them."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from zoft.errors import UserError


def zoft_command(*arguments: str) -> list[str]:
    """Return the command that runs `zoft` with these arguments, in this Python and from this source tree.

    It imports nothing from the folder that it is started in, where `python -m zoft` would: files there may be a stranger's.
    """
    code = "import sys; sys.path[0] = sys.argv.pop(1); from zoft.cli import main; main()"
    return [sys.executable, "-c", code, str(Path(__file__).resolve().parents[1]), *arguments]


def install(requirement: str) -> str:
    """Return the command that installs a requirement for the Python that runs; one without pip, as uv makes it, is told to uv."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install {requirement} --python {python}"
    return f"{python} -m pip install {requirement}"


def missing(key: str, package: str, requirement: str = "") -> str:
    """Return the message where an optional package is not installed. key: the setting that asks for it."""
    return f"{key}: {package} is not installed; {install(requirement or package)}"


def packaged_file(key: str, requirement: str, module: str, *parts: str) -> Path:
    """Return the path of a data file in an installed package.

    key: the setting that asked for it, for the message ("task=reviews"). requirement: what to install.
    module: top-level module of the package; it is not imported. parts: path inside it.
    Errors: UserError with the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *parts)
        if path.is_file():
            return path
    raise UserError(
        f"{key}: it comes with a pip package that is missing: {install(f'--no-deps {requirement}')}"
    )
