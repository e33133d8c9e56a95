"""Make a checked Config of `--config NAME|FILE` and `key=value`, with the defaults and refusals of its recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoft.config import compose as files
from zoft.config.check import check_config
from zoft.config.compose import assign, group_tree, parsed, typed
from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.method.auto_lr import check_auto_lr
from zoft.method.estimators.named import check_estimator
from zoft.method.method import settle
from zoft.method.momentum import check_momentum
from zoft.method.recipes import is_page, method_of, owners
from zoft.method.rules import check_update
from zoft.method.shaping import check_shaping
from zoft.yaml_files import yaml_tree


def compose(config: str | None, overrides: Sequence[str] = ()) -> Config:
    """Return the Config of a packaged name (mezo/reviews) or a YAML file, with `key=value` on top, checked.

    Raises UserError, one line with the fix, for everything that is wrong with names, files, keys or values.
    """
    assigned = parsed(overrides)  # before Hydra loads: a typo answers at once
    tree, folder = files.read(config) if config is not None else ({}, None)
    if isinstance(tree.get("task"), str):  # `task: reviews` in a file, without Hydra's defaults list
        tree["task"] = group_tree("task", tree["task"], folder)["task"]
    if tree.get("trust_remote_code"):
        raise UserError("trust_remote_code: not from a file; put trust_remote_code=true on the command line")
    if tree.get("reward"):
        raise UserError(
            f"reward: not from a file, for it runs code; put --reward {tree['reward']} on the command line"
        )
    if is_page(page := str(tree.get("recipe", ""))):
        raise UserError(f"recipe: not from a file, for it runs code; put --recipe {page} on the command line")
    assign(tree, assigned, folder)
    made = strict(tree, Path(str(config)).stem if files.is_file(config) else (config or "run"))
    if tree.get("output_dir") is not None and "output_dir" not in dict(assigned):
        _below(str(tree["output_dir"]), str(made.output_dir))
    return made


def strict(
    tree: dict[str, Any], default_output: str = "run", keys_of: Mapping[str, str] | None = None
) -> Config:
    """Return a plain tree of keys as a Config: its recipe's defaults filled in, unknown keys, types and ranges checked.

    keys_of: key -> the recipe that it belongs to, for others to refuse it; None: as the packaged recipes say.
    """
    files.known(tree)
    page = method_of(str(tree.get("recipe") or "mezo"))
    made = settle(check_config(typed(tree, page.filled)), page, owners() if keys_of is None else keys_of)
    check_estimator(made)
    check_update(made)
    check_shaping(made)
    check_momentum(made)
    check_auto_lr(made)
    if made.output_dir is not None:
        made.output_dir = str(Path(made.output_dir).expanduser())
    else:
        made.output_dir = f"runs/{default_output.replace('/', '-')}-seed{made.seed}"
    return made


def load_run(run: str | Path, overrides: Sequence[str] = (), *, trains: bool = True) -> Config:
    """Return the resolved Config that a run's folder holds, with `key=value` on top.

    trains: its updates are made or repeated, so that a page of the user's own has to be named again (`--recipe`); without
    that, a run is looked at under the recipe mezo.
    """
    assigned = parsed(overrides)
    path = Path(run) / "config.yaml"
    if not os.path.isfile(path):
        raise UserError(f"{run}: not a run's folder (it has no config.yaml)")
    tree = yaml_tree(path)
    if tree.pop("trust_remote_code", False) and ("trust_remote_code", True) not in assigned:
        raise UserError(f"{run}: its model brings code; put trust_remote_code=true on the command line again")
    tree.pop("reward", None)  # it runs code; who trains on names it again (`again`)
    page, named = str(tree.get("recipe", "")), dict(assigned).get("recipe")
    mine: dict[str, str] | None = None
    if is_page(page) and named is None:
        if trains:
            raise UserError(f"{run}: its recipe runs code; name it again, --recipe {page}")
        tree["recipe"], mine = "mezo", {}
    elif named is not None and not is_page(page):
        raise UserError(f"--recipe {named}: {run} is a run of recipe={page}, which is packaged; leave it out")
    assign(tree, assigned, None)
    return strict(tree, keys_of=mine)


def reward_named(run: str | Path) -> Any:
    """Return the reward of the user's own that a run's config.yaml names, or None."""
    return yaml_tree(Path(run) / "config.yaml").get("reward")


def again(run: str | Path) -> UserError:
    """Return what a run says whose reward was not named on the command line."""
    named = reward_named(run)
    return UserError(f"{run}: its reward runs code; name it again, --reward {named}")


def _below(said: str, place: str) -> None:
    """Refuse an output_dir of a file that leads out of the folder the user is in: files come from others, too."""
    path = Path(place)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"output_dir: {said} leads out of this folder, which a file may not; "
            f"say it on the command line: output_dir={said}"
        )
