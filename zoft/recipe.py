"""A recipe's module, by its name."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from zoft import compose


def recipe(name: str) -> ModuleType:
    """The module of a recipe, by its file: recipes/ is zoft/recipes once installed, top-level in a source tree."""
    full = f"zoft.recipes.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, compose.packaged("recipes") / f"{name}.py")
        assert spec and spec.loader, full
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full]
            raise
    return sys.modules[full]
