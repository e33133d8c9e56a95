"""Shape the rewards of a step's members before they become coefficients.

    zscore: (s - mean) / sd over members, sd that of the population
    ranks:  rank / (P - 1) - 1/2, rank from 0, ties at their mean rank

Over `all`, a member's mean reward is shaped; per `prompt`, each prompt's rewards are shaped over its members and a member has the
mean over prompts. A prompt whose members all have one reward says nothing and counts 0. Shaped numbers have no unit, so the
coefficient of a direction is the estimator's at eps = 1, and lr is the size of a step: of two probes ±,

    c_k = -(F₊ - F₋) / (2q)

Sources: ES at scale (z-scores over members), EGGROLL (groups of one prompt), centred ranks as in Salimans et al. 2017
(arXiv 1703.03864). Deviations: antithetic pairs where the estimator has them, so that the mean drops out; where nothing spreads
the step is skipped instead of divided by a small number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def shape_rewards(rewards: Tensor, shaping: str, group: str) -> Tensor | None:
    """Return the fitness F fp64 [P] of each member, the larger the better; None where nothing spreads.

    rewards: fp64 [P, N], of each member after each prompt. shaping: zscore or ranks. group: all or prompt.
    """
    if group == "all":
        rewards = rewards.mean(1, keepdim=True)
    spreads = rewards.amax(0) > rewards.amin(0)  # [N]
    if not bool(spreads.any()):
        return None
    made = {"zscore": zscores, "ranks": centred_ranks}[shaping](rewards)
    return made.where(spreads, made.new_zeros(())).mean(1)


def zscores(x: Tensor) -> Tensor:
    """Return (x - mean) / sd of each column of x [P, N]."""
    centred = x - x.mean(0)
    return centred / (centred * centred).mean(0).sqrt()


def centred_ranks(x: Tensor) -> Tensor:
    """Return the rank of each number in its column of x [P, N], from -1/2 to 1/2, ties at their mean."""
    lower = (x[None] < x[:, None]).sum(1)  # [P, N]
    equal = (x[None] == x[:, None]).sum(1) - 1
    return (lower + equal / 2.0).to(x.dtype) / (len(x) - 1) - 0.5


def check_shaping(config: Any) -> None:
    """Refuse what shaping does not go with. Raises UserError."""
    ranks = config.objective == "rank"
    if ranks and config.shaping != "none":
        raise UserError(
            f"shaping={config.shaping}: objective=rank has ranks and no rewards to shape; leave it out"
        )
    if config.shaping == "none" and not ranks:
        if config.shaping_group != "all":
            raise UserError(
                f"shaping_group={config.shaping_group}: does nothing with shaping=none; set shaping, too"
            )
        return
    what = "objective=rank" if ranks else f"shaping={config.shaping}"
    if ranks and config.shaping_group != "all":
        raise UserError(
            f"shaping_group={config.shaping_group}: objective=rank ranks after each prompt; leave it out"
        )
    for name in ("momentum", "weight_decay", "anchor") if config.rank_line else ():
        if getattr(config, name):
            raise UserError(
                f"{name}={getattr(config, name):g}: rank_line={config.rank_line} ranks plain steps; leave one of them out"
            )
    if config.rank_line and config.update not in ("auto", "sgd"):
        raise UserError(
            f"update={config.update}: rank_line={config.rank_line} ranks plain steps; leave one of them out"
        )
    if ranks and config.clip is not None:
        raise UserError(
            f"clip={config.clip:g}: objective=rank has no projected gradient to limit; leave it out"
        )
    for name, idle, why in (
        ("elastic", False, "workers of an elastic run send sums of rewards"),
        ("meazo", 0, "the size of a loss is in none of its steps"),
    ):
        if getattr(config, name) != idle:
            value = getattr(config, name)
            shown = str(value).lower() if isinstance(value, bool) else f"{value:g}"
            raise UserError(f"{name}={shown}: does not go with {what}: {why}; leave one of them out")
    if config.estimator == "normalised":
        raise UserError(
            f"estimator=normalised: divides by the spread of the losses, as {what} does; leave one out"
        )
    if config.update == "conservative":
        raise UserError(
            f"update=conservative: compares losses of one step, and {what} makes them relative; leave one out"
        )
