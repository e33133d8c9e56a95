"""Refuse lr=auto where its rule does not hold, and count the forwards that it takes; train.learning_rate measures."""

from __future__ import annotations

import math

from zoft.config.schema import NO_GRADIENT, Config
from zoft.errors import UserError
from zoft.method.estimators.named import estimator_of, examples_per_step, forwards_per_step, probes_per_step
from zoft.method.momentum import window_beta
from zoft.method.rules import rule_of, rule_words

BUDGET = 0.03  # of a run's forwards, at most
LINES = 16  # at most
TRIALS = 6  # learning rates along each line, at most


def check_auto_lr(config: Config) -> None:
    """Refuse lr=auto where the rule was not measured or a run is too short for it. Raises UserError."""
    if config.lr != "auto":
        return
    rule, used = rule_of(config), estimator_of(config)
    refused = (
        (rule is not None, rule_words(config), "a step has a size of its own"),
        (used.second is not None, f"update={config.update}", "a step chooses its size on its own batch"),
        (bool(config.momentum or window_beta(config)), f"momentum={config.momentum:g}", "one step does not show what many in one direction do"),
        (used.sized, f"meazo={config.meazo:g}" if config.meazo else f"estimator={used.name}", "lr is the size of a step"),
        (config.perturb == "inplace", "perturb=inplace", "its moves round the weights"),
        (config.train in ("prefix", "prompt"), f"train={config.train}", "losses along a step saturate, so its line shows no rate"),
        (config.perturb == "nodes", "recipe=node", "one step shows far larger rates than a run bears; lr=2e-3 is its default in configs"),
        (config.elastic, "elastic=true", "workers join after the start"),
        (config.objective in NO_GRADIENT, f"objective={config.objective}", "its loss moves by whole examples"),
    )  # fmt: skip
    for holds, what, why in refused:
        if holds:
            raise UserError(f"lr=auto: does not go with {what}: {why}; set lr to a number")
    if not lines_allowed(config):
        each = forwards_per_step(config)
        least = math.ceil(forwards_of(config, 1) / BUDGET / each)
        raise UserError(
            f"lr=auto: needs steps={least} or more, for its forwards to be {BUDGET:.0%} of the run's; set lr to a number"
        )


def forwards_of(config: Config, lines: int, trials: int = TRIALS) -> int:
    """Return the forwards (examples × probes, update passes included) that so many lines take."""
    each = probes_per_step(config) + 1 + trials * (1 + int(config.perturb == "nodes"))
    return lines * each * examples_per_step(config)


def lines_allowed(config: Config) -> int:
    """Return how many lines a run's budget pays for, at most LINES."""
    budget = int(BUDGET * config.steps * forwards_per_step(config))
    return min(LINES, budget // forwards_of(config, 1))
