"""Describe a method: what a recipe's page states, and what every run of that recipe must satisfy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoft.config.schema import ADAPTERS, Config, fields
from zoft.errors import UserError

Refusal = Callable[[Config], str]  # "" or one line: key, value, fix


@dataclass(frozen=True)
class Space:
    """Say which tensors a recipe trains.

    Args:
        train: The default of the key `train`.
        only: The values that `train` may have, as regular expressions; empty allows every value that is not in `never`.
        never: The values that `train` may not have.
        quantised: Whether the model must have quantised layers, whose scales are trained.
    """

    train: str = "all"
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    quantised: bool = False


@dataclass(frozen=True)
class Method:
    """State a zeroth-order method: a point in the product of space, directions, mask, estimator, update and policy.

    Args:
        space: The trained tensors.
        directions: The kinds of noise that the key `noise` may name.
        mask: The mask that mask=auto means: "none", "magnitude" or "random".
        estimator: The estimator that estimator=auto means: an `Estimator`, or the name of a packaged one.
        update: The rule that update=auto means: a `Rule`, or the name of a packaged one ("sgd" is the fused passes).
        policies: The values that the key `perturb` may have.
        defaults: Values of keys that a config does not set.
        keys: Keys that belong to this recipe; other recipes refuse them.
        refuses: Functions of the config that return "" or the one line of a refusal.
        name: Set by whoever loads the page.
        digest: Set by whoever loads the page; "" for a packaged recipe.
    """

    space: Space = Space()
    directions: tuple[str, ...] = ("gaussian", "rademacher", "rank1")
    mask: str = "none"
    estimator: Any = "two_sided"
    update: Any = "sgd"
    policies: tuple[str, ...] = ("probes", "inplace")
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    refuses: tuple[Refusal, ...] = ()
    name: str = ""
    digest: str = ""

    @property
    def filled(self) -> dict[str, Any]:
        """Return the defaults of this recipe's keys, the trained space among them."""
        return {"train": self.space.train, **self.defaults}


def is_set(config: Config, key: str) -> bool:
    """Say whether a key has another value than the schema's default."""
    return getattr(config, key) != fields()[key].default


def settle(config: Config, method: Method, owners: Mapping[str, str]) -> Config:
    """Resolve what only the method knows (mask=auto), and refuse what it does not allow.

    owners: key -> the packaged recipe that it belongs to. Returns config. Raises UserError, one line.
    """
    if config.mask == "auto":
        config.mask = method.mask
    if config.estimator == "auto" and isinstance(method.estimator, str):
        config.estimator = method.estimator
    if config.update == "auto" and isinstance(method.update, str):
        config.update = method.update
    for key, owner in owners.items():
        value = getattr(config, key)
        if key not in method.keys and value not in ("none", method.defaults.get(key), fields()[key].default):
            raise UserError(
                f"{key}={value} needs recipe={owner} (yours is {method.name}): leave it out or change the recipe"
            )
    _check_space(config, method)
    for key, allowed in (("noise", method.directions), ("perturb", ("auto", *method.policies))):
        if (value := getattr(config, key)) not in allowed:
            raise UserError(f"{key}={value}: recipe={method.name} has {', '.join(allowed)}; use one of them")
    if config.mask == "magnitude" and config.denoise_every:
        raise UserError(
            f"denoise_every={config.denoise_every}: with mask=magnitude the rounded weights decide what moves, so that "
            "there is no sum without rounding; leave it out"
        )
    if config.mask == "magnitude" and config.perturb == "inplace":
        raise UserError(
            "mask=magnitude: perturb=inplace moves the weights whose size says which of them move; "
            "use perturb=probes, or mask=random"
        )
    for refusal in method.refuses:
        if line := refusal(config):
            raise UserError(line)
    return config


def _check_space(config: Config, method: Method) -> None:
    """Refuse a trained space that the method does not have."""
    space, train = method.space, config.train
    if space.only and not any(re.fullmatch(pattern, train) for pattern in space.only):
        fix = f"recipe={'lora_zo' if train in ADAPTERS else 'mezo'}"
        if method.digest and space.train in space.only:
            fix = f"train={space.train}"
        raise UserError(f"train={train}: recipe={method.name} trains {_either(space.only)}; use {fix}")
    if train in space.never:
        what = "a model's own tensors" if space.train == "all" else space.train
        raise UserError(f"train={train}: recipe={method.name} trains {what}; use recipe=lora_zo")


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
