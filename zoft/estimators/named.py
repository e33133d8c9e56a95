"""Find the estimator that a config names."""

from __future__ import annotations

from typing import Any

from zoft.estimators.estimator import Estimator, clipped
from zoft.estimators.meazo import meazo
from zoft.estimators.one_sided import ONE_SIDED
from zoft.estimators.two_sided import TWO_SIDED

ESTIMATORS = {e.name: e for e in (TWO_SIDED, ONE_SIDED)}


def estimator_of(config: Any) -> Estimator:
    """Return the estimator of a Config (or of a trainer's Settings): `estimator`, under `clip` and `meazo`.

    config.estimator: a key of ESTIMATORS, `auto` (two_sided), or an Estimator of the user's own.
    """
    asked = config.estimator
    base = asked if isinstance(asked, Estimator) else TWO_SIDED if asked == "auto" else ESTIMATORS[asked]
    return meazo(base, config.meazo, config.clip) if config.meazo else clipped(base, config.clip)


def probes_per_step(config: Any) -> int:
    """Return the number of probes of a config's step."""
    return estimator_of(config).count(config.q)


def forwards_per_step(config: Any) -> int:
    """Return how many forwards (examples × probes) a config's step counts."""
    return probes_per_step(config) * config.batch_size * config.accumulate
