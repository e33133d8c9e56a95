"""Define what an estimator is: the points at which a step asks for the loss, and what their losses are turned into.

Everything that depends on the estimator (forwards, ledger rows, the captured step, several processes, replay) asks the
value below. A new estimator is one file:

    from zoft.method.estimators.estimator import Estimator, Probe

    def probes(q, eps):
        return [Probe(0, 0.0)] + [Probe(k, eps) for k in range(q)]

    def coefficients(losses, q, eps):
        return (losses[1:] - losses[0]) / (eps * q)

    MINE = Estimator("mine", probes, coefficients, lambda q: q + 1)

Nothing here imports torch: tensor methods are all that an estimator needs, and light commands stay light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from zoft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Probe(NamedTuple):
    """Name one evaluation point, θ + scale·z_direction.

    Args:
        direction: The number of the direction, from 0.
        scale: The distance from θ along it; 0 is θ itself.
    """

    direction: int
    scale: float


@dataclass(frozen=True)
class SecondRound:
    """Ask for losses again once a step has its multipliers, and choose the multipliers that it takes.

    It runs on the CPU, in plain Python: on a GPU a step with a second round is not captured.

    Args:
        name: The name that messages show.
        probes: probes(multipliers) returns the R evaluation points of the round, from the step's multipliers [q] (fp32
            values that contain lr).
        choose: choose(losses, multipliers) returns the multipliers [q] that the step takes. losses [R] are in the order of
            the points, on the same batch, and may be NaN or infinite. The ledger keeps the result, rounded to fp32.
        count: count(q) returns R without building the points.
    """

    name: str
    probes: Callable[[Sequence[float]], list[Probe]]
    choose: Callable[[Sequence[float], Sequence[float]], Sequence[float]]
    count: Callable[[int], int]


@dataclass(frozen=True)
class Estimator:
    """Turn the losses of a step's probes into one coefficient per direction: Σ_k c_k·z_k estimates the gradient.

    losses is fp64 [P], eps fp64 [], the state fp64 [S]: tensors on one device, CPU or GPU. On a GPU the call of
    `coefficients` is captured in a CUDA graph: use no `.item()`, no branch on a value, and no tensor made from Python numbers
    (`new_full` and its like may be used). A step whose losses are not finite is skipped, and its new state is dropped. On a
    GPU torch divides by a *Python* number by multiplying with its reciprocal, which may differ from the CPU's division in
    the last bit: divide by tensors (eps is one) where both should agree.

    The state is not in the ledger. A resume rebuilds it by running `coefficients` over the ledger's losses, which are
    fp32. Therefore `run` rounds the losses to fp32 before it calls an estimator that has a state.

    Args:
        name: The name that messages and ledger headers show.
        probes: probes(q, eps) returns the step's P evaluation points, in order. A direction has one or two points of nonzero
            scale. One point of scale 0 may be shared by all directions. Neighbouring points of one direction share a draw of z.
        coefficients: coefficients(losses, q, eps) returns c [q], which contains the factor 1/q. With a state,
            coefficients(losses, q, eps, state) returns (c [q], the new state [S]).
        count: count(q) returns P without building the probes.
        state: The numbers that the state begins with; () is no state.
        sized: Whether the loss's scale cancels in c, so that lr is the size of a step.
        second: A second round of probes, made from the first round's result; None has none.
        per: The number of examples of a step that have directions of their own (`per_example`); 1 means that all share
            theirs. With N there are q·N directions, P counts the probes of all examples, and losses[p·N + e] belongs to
            example e at probe p.
    """

    name: str
    probes: Callable[[int, float], list[Probe]]
    coefficients: Callable[..., Any]
    count: Callable[[int], int]
    state: tuple[float, ...] = ()
    sized: bool = False
    second: SecondRound | None = None
    per: int = 1

    def directions(self, q: int) -> int:
        """Return the number of directions of a step: what its update has a multiplier for."""
        return q * self.per

    def run(self, losses: Tensor, q: int, eps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return (coefficients [q·per], the new state [S]) from losses fp64 [P], eps fp64 [] and the state fp64 [S]."""
        assert len(losses) == self.count(q), f"{len(losses)} losses for {self.count(q)} probes"
        if self.state:
            c, state = self.coefficients(losses.float().double(), q, eps, state)
        else:
            c = self.coefficients(losses, q, eps)
        wanted = self.directions(q)
        if len(c) != wanted or len(state) != len(self.state):
            raise UserError(
                f"estimator={self.name}: {len(c)} coefficients and {len(state)} numbers of state came of {wanted} directions and "
                f"{len(self.state)}; return one coefficient per direction, and as many numbers as the state begins with"
            )
        return c, state


def clipped(estimator: Estimator, clip: float | None) -> Estimator:
    """Return the estimator with each coefficient limited to ±clip/q; clip None: the estimator as it is.

    The estimate is biased where the limit bites. Source: QZO, arXiv 2505.13430.
    """
    if clip is None:
        return estimator

    def coefficients(losses: Tensor, q: int, eps: Tensor, *state: Tensor) -> Any:
        found = estimator.coefficients(losses, q, eps, *state)
        c, *new = found if state else (found,)
        c = c.clamp(-clip / q, clip / q)
        return (c, *new) if state else c

    return replace(estimator, coefficients=coefficients)


def per_example(base: Estimator, examples: int) -> Estimator:
    """Return `base` with directions of each example's own: direction k·N + e is example e's k-th, N = examples.

        c_{k,e} = base's coefficients of the losses of example e / N

    Example e is asked about its own directions alone, so a step of N examples costs what one shared direction costs, and
    its losses say N things instead of one. The loss of a step is the mean of its examples' losses.
    Source: flipout (arXiv 1803.04386) for examples with perturbations of their own; GRZO.
    """
    n = examples

    def probes(q: int, eps: float) -> list[Probe]:
        return [Probe(p.direction * n + e, p.scale) for p in base.probes(q, eps) for e in range(n)]

    def coefficients(losses: Tensor, q: int, eps: Tensor) -> Tensor:
        own = base.coefficients(losses.view(base.count(q), n), q, eps)  # [q, N]
        return own.flatten() / losses.new_full((), float(n))

    return replace(base, probes=probes, coefficients=coefficients, count=lambda q: base.count(q) * n, per=n)


def total(x: Tensor) -> Tensor:
    """Return the sum [] of x [n] in an order that CPU and GPU share: halves are added until one number is left."""
    while (n := len(x)) > 1:
        half = (n + 1) // 2
        folded = x[:half].clone()
        folded[: n - half].add_(x[half:])
        x = folded
    return x[0]


# ---- ledger rows -----------------------------------------------------------------------------------------------------


def row_places(probes: Sequence[Probe]) -> list[int]:
    """Return which probe's loss stands at each place of a step's ledger rows [2q]: plus and minus of each direction.

    plus is the first probe of the direction with a nonzero scale. minus is the other one, else the shared probe of scale
    0, else the first one again.
    """
    own: dict[int, list[int]] = {}
    shared = None
    for i, (direction, scale) in enumerate(probes):
        if scale:
            own.setdefault(direction, []).append(i)
        elif shared is None:
            shared = i
    places = []
    for k in range(len(own)):
        plus, *rest = own[k]
        places += [plus, rest[0] if rest else plus if shared is None else shared]
    assert {*places} == {*range(len(probes))}, (
        f"{len(probes)} probes do not fit {len(own)} rows of two losses"
    )
    return places


def rows_of(losses: Sequence[float], probes: Sequence[Probe]) -> tuple[float, ...]:
    """Return the losses [P] of a step's probes as its ledger rows have them [2q]."""
    return tuple(losses[i] for i in row_places(probes))


def losses_of(rows: Sequence[float], probes: Sequence[Probe]) -> list[float]:
    """Return the losses [P] of a step's probes from its ledger rows [2q]; fp32 values."""
    found = [math.nan] * len(probes)
    for i, loss in zip(row_places(probes), rows, strict=True):
        found[i] = loss
    return found


def projected_gradient(record: Any, probes: Sequence[Probe]) -> float:
    """Return the mean slope over the directions of a ledger's record, as its losses have it.

    A direction's slope is the difference of its two losses over the distance of their probes. Where a direction has one
    loss only, the slope is what the update used: -multiplier/lr.
    """
    places, q = row_places(probes), len(record.multipliers)
    slopes = []
    for k, (plus, minus) in enumerate(zip(places[0::2], places[1::2])):
        if plus != minus:
            apart = (probes[plus].scale - probes[minus].scale) * q
            slopes.append((record.losses[2 * k] - record.losses[2 * k + 1]) / apart)
        else:
            slopes.append(
                -record.multipliers[k] / record.lr if record.lr and not record.skipped else math.nan
            )
    return sum(slopes)


def finite(values: Sequence[float]) -> bool:
    """Return whether no value is NaN or infinite: to be asked of a step's losses, and of its multipliers."""
    return all(math.isfinite(value) for value in values)
