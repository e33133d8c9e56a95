"""Find the estimator that a config names."""

from __future__ import annotations

from typing import Any

from zoft.errors import UserError
from zoft.method.estimators.estimator import Estimator, clipped
from zoft.method.estimators.meazo import meazo
from zoft.method.estimators.normalised import NORMALISED
from zoft.method.estimators.one_sided import ONE_SIDED
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.method.recipes import method_of

ESTIMATORS = {e.name: e for e in (TWO_SIDED, ONE_SIDED, NORMALISED)}


def estimator_of(config: Any) -> Estimator:
    """Return the estimator of a Config (or of a trainer's Settings): `estimator`, under `clip` and `meazo`."""
    base = base_estimator(config)
    return meazo(base, config.meazo, config.clip) if config.meazo else clipped(base, config.clip)


def base_estimator(config: Any) -> Estimator:
    """Return the estimator that a Config (or Settings) names, without `clip` and `meazo`.

    config.estimator: an Estimator, a key of ESTIMATORS, or `auto`: the one on the page of the config's recipe.
    """
    asked = config.estimator
    if asked == "auto":
        asked = method_of(config.recipe).estimator
    return asked if isinstance(asked, Estimator) else ESTIMATORS[asked]


def check_estimator(config: Any) -> None:
    """Refuse what a config's estimator does not go with. Raises UserError."""
    used = estimator_of(config)
    if used.name == NORMALISED.name:
        if config.q < 2:
            raise UserError(
                f"q={config.q}: estimator=normalised needs the spread of several losses; use q=2 or more"
            )
        if config.clip is not None:
            raise UserError(
                f"clip={config.clip:g}: estimator=normalised has no projected gradient to limit; leave it out"
            )


def probes_per_step(config: Any) -> int:
    """Return the number of probes of a config's step."""
    return estimator_of(config).count(config.q)


def forwards_per_step(config: Any) -> int:
    """Return how many forwards (examples × probes) a config's step counts."""
    return probes_per_step(config) * config.batch_size * config.accumulate
