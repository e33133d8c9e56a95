"""Find recipes: pages of a method, packaged or a user's own file, each with a METHOD."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

from zoft.config.compose import packaged
from zoft.config.schema import fields
from zoft.errors import UserError, nearest
from zoft.method.method import Method


def names() -> list[str]:
    """Return the packaged recipes, recipes/experimental/ among them."""
    root = packaged("recipes")
    return sorted(p.stem for p in [*root.glob("[!_]*.py"), *root.glob("experimental/[!_]*.py")])


def is_page(recipe: str) -> bool:
    """Say whether a recipe is named by the path of a page, which runs code, and not by a packaged name."""
    return recipe.endswith(".py")


def method_of(recipe: str) -> Method:
    """Return the METHOD of a packaged recipe's page, or of a user's own page by its path.

    A page is read once a process. Raises UserError for a name or file that is not there, a page that fails, or has no METHOD.
    """
    if is_page(recipe):
        return _own(str(Path(recipe).expanduser().resolve()))
    if recipe not in (known := names()):
        near = nearest(recipe, known)
        hint = f"; did you mean {near}?" if near else "; a page of your own is named by --recipe FILE.py"
        raise UserError(f"recipe={recipe}: use {', '.join(known)}{hint}")
    return _packaged(recipe)


@cache
def owners() -> dict[str, str]:
    """Return key -> the packaged recipe whose own key it is."""
    return {key: name for name in names() for key in _packaged(name).keys}


@cache
def _packaged(name: str) -> Method:
    root = packaged("recipes")
    path = next(p for p in (root / f"{name}.py", root / "experimental" / f"{name}.py") if p.is_file())
    made = _loaded(f"zoft.recipes.{name}", path).METHOD
    assert isinstance(made, Method), (name, type(made))
    return replace(made, name=name)


@cache
def _own(place: str) -> Method:
    path = Path(place)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--recipe {place}: {error.strerror}; name a .py file with a METHOD") from None
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        page = _loaded(f"zoft_recipe_{digest}", path)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--recipe {place}: running it fails: {type(error).__name__}: {said}") from None
    made = getattr(page, "METHOD", None)
    if not isinstance(made, Method):
        what = "no METHOD" if made is None else f"a METHOD that is a {type(made).__name__}, not a Method"
        raise UserError(f"--recipe {place}: has {what}; write METHOD = Method(...)")
    if unknown := next((k for k in (*made.defaults, *made.keys) if k not in fields()), None):
        near = nearest(unknown, fields())
        raise UserError(
            f"--recipe {place}: METHOD names {unknown}, which is no key{f'; did you mean {near}?' if near else ''}"
        )
    for what in ("estimator", "update"):
        word, known = getattr(made, what), fields()[what].metadata["one_of"]
        if isinstance(word, str) and word not in known:
            raise UserError(
                f"--recipe {place}: METHOD has {what}={word!r}; use {', '.join(known[1:])}, or a value of your own"
            )
        if not isinstance(word, str) and word.name in known:
            raise UserError(
                f"--recipe {place}: its {what} is named {word.name} as a packaged one is; give it another name"
            )
    return replace(made, name=path.stem, digest=f"blake2b:{digest}")


def _loaded(full: str, path: Path) -> ModuleType:
    """Return a page's module: recipes/ is zoft/recipes once installed, top-level in a source tree."""
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec and spec.loader, full
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full]
            raise
    return sys.modules[full]
