"""Find the estimator that a config names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zoft.config.schema import GENERATED
from zoft.errors import UserError
from zoft.method.estimators.conservative import CONSERVATIVE
from zoft.method.estimators.estimator import Estimator, clipped, per_example
from zoft.method.estimators.meazo import meazo
from zoft.method.estimators.normalised import NORMALISED
from zoft.method.estimators.one_sided import ONE_SIDED
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.method.recipes import method_of
from zoft.method.rules import rule_of

ESTIMATORS = {e.name: e for e in (TWO_SIDED, ONE_SIDED, NORMALISED)}


def estimator_of(config: Any) -> Estimator:
    """Return the estimator of a Config (or of a trainer's Settings): `estimator`, under `directions`, `clip`, `meazo` and
    update=conservative."""
    base = base_estimator(config)
    if config.update == CONSERVATIVE.name:
        base = replace(base, second=CONSERVATIVE)
    if config.directions == "example":
        return clipped(per_example(base, examples_per_step(config)), config.clip)
    return meazo(base, config.meazo, config.clip) if config.meazo else clipped(base, config.clip)


def examples_per_step(config: Any) -> int:
    """Return how many examples a config's step sees."""
    return config.batch_size * config.accumulate


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
    if config.directions == "example":
        _check_per_example(config, base_estimator(config))
    used = estimator_of(config)
    if used.second is not None:
        _check_second(config, used)
    if used.name == NORMALISED.name:
        if config.q < 2:
            raise UserError(
                f"q={config.q}: estimator=normalised needs the spread of several losses; use q=2 or more"
            )
        if config.clip is not None:
            raise UserError(
                f"clip={config.clip:g}: estimator=normalised has no projected gradient to limit; leave it out"
            )


def _check_second(config: Any, used: Estimator) -> None:
    """Refuse what does not go with a second round of probes."""
    second = used.second
    assert second is not None
    what = f"update={second.name}" if second is CONSERVATIVE else f"estimator={used.name}"
    if second is CONSERVATIVE and config.q > 1:
        raise UserError(
            f"q={config.q}: {what} compares points along one direction, and a step of several goes along their sum, where no "
            "probe lies; use q=1"
        )
    ruled = rule_of(config) is not None
    refused = (
        ("update", ruled and not config.anchor, False, "it compares plain steps"),
        ("directions", config.directions == "example", False, "it compares points of a whole batch; use directions=shared"),
        ("weight_decay", config.weight_decay, 0, "it compares losses without the decay"),
        ("anchor", config.anchor, 0, "it compares losses without the pull"),
        ("momentum", config.momentum, 0, "it compares losses without the buffer"),
        ("perturb", config.perturb == "inplace", False, "its moves do not follow from the ledger; use perturb=probes"),
        ("elastic", config.elastic, False, "workers know the first round's probes only"),
        ("parallel", config.parallel in ("probes", "2d"), False, "its second round has other probes; use parallel=data"),
    )  # fmt: skip
    for name, value, idle, why in refused:
        if value != idle:
            shown = getattr(config, name)
            shown = f"{shown:g}" if isinstance(shown, float) else str(shown).lower()
            fix = "" if "use " in why else "; leave one of them out"
            raise UserError(f"{name}={shown}: does not go with {what}: {why}{fix}")


def _check_per_example(config: Any, base: Estimator) -> None:
    """Refuse what goes with no directions of each example's own."""
    fix = "use directions=shared"
    if base.name != TWO_SIDED.name:
        raise UserError(f"estimator={base.name}: directions=example has two_sided losses; {fix}")
    if config.meazo:
        raise UserError(f"meazo={config.meazo:g}: directions=example has no state of the kind; {fix}")
    if config.perturb == "inplace":
        raise UserError(f"perturb=inplace: one move of the weights serves all examples of a step; {fix}")
    if config.objective in ("macro_f1", *GENERATED):
        raise UserError(f"objective={config.objective}: it is no sum over examples scored together; {fix}")


def probes_per_step(config: Any) -> int:
    """Return how many probes each example of a config's step is scored at, a second round aside."""
    return base_estimator(config).count(config.q)


def second_probes(config: Any) -> int:
    """Return the number of probes of a config's second round; 0 without one."""
    second = estimator_of(config).second
    line = config.rank_line + 1 if config.rank_line else 0
    return (second.count(config.q) if second else 0) + line


def forwards_per_step(config: Any) -> int:
    """Return how many forwards (examples × probes) a config's step counts, a second round and an update pass included."""
    passes = int(config.perturb == "nodes" and config.node_inputs == "pass")  # the update pass
    return (probes_per_step(config) + second_probes(config) + passes) * examples_per_step(config)
