"""The proof at set-up: a probe axis is used on a model only after it has given right answers on it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoft.errors import UserError
from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.noise.spec import RADEMACHER
from zoft.probe import sites
from zoft.probe.axis import ProbeAxis
from zoft.probe.rows import LIFT, leaves
from zoft.probe.sites import Found, promote, rerouted

# Probes of the proof, in eps: far apart, so that a row handed to the wrong probe cannot hide in rounding. Where
# their losses are still too close, all are moved further out.
_PROBES = ((0, 16.0), (0, -8.0), (1, 4.0), (1, -12.0))
_FURTHER = (1.0, 8.0, 64.0, 512.0)
# Products over the rows of all probes round otherwise than over those of one, and a model that is thrown far off its weights
# makes much of that: these begin nearer.
_NEARER = (1 / 64, 1 / 8)
# Largest difference of a loss, stacked against alone, that may be called rounding: of what other row counts do.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# What a forward that cannot be stacked may throw.
_BREAKS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, AttributeError, KeyError)


def find_sites(
    model: nn.Module,
    trained: Sequence[Trained],
    run: Callable[[Any], torch.Tensor],
    small: Any,
    double: Any,
    eps: float,
    kind: str = RADEMACHER,
) -> Found:
    """Return the sites that have passed the proof on this model, in the precision it was loaded in.

    run(batch) -> losses [examples] of one forward over batch.rows rows; batch.repeat(P) is probe-major.
    small, double: n examples, and those and n others under the same mask. Falls back, with a note that
    names the module, to row-free sites working through their callers, then to one probe per forward.
    Raises UserError if a trained tensor is read where no site can serve it.
    """
    with torch.no_grad():
        first, second = run(double), run(double)
    noisy = _off(first, second) > _cap(model, trained)
    why = (
        f"losses of one batch differ by {_off(first, second):.2g} from one forward to the next"
        if noisy
        else ""
    )

    found = sites.find(model, trained, run, small, double, lift=True)
    if found.stacked and not why:
        for candidate in _candidates(model, trained, found, run, small, double):
            failure = prove(model, trained, candidate, run, double, eps, kind)
            if not failure:
                return candidate
            why = why or failure
    if found.stacked or why:
        found = Found(found.sites, False, f"one probe per forward: {why}", found.unread)
    failure = prove(model, trained, found, run, double, eps, kind)
    if failure:
        raise UserError(f"perturb=probes: {failure}; use perturb=inplace")
    return found


def _candidates(
    model: nn.Module, trained: Sequence[Trained], found: Found, run: Callable, small: Any, double: Any
) -> Iterator[Found]:
    """Ways to stack, the one with the smallest sites first."""
    yield found
    if any(d == LIFT for s in found.sites for c in s.calls for d in c.outputs):
        found = sites.find(model, trained, run, small, double)
        if not found.stacked:
            return
        yield found
    if any(c.row_free for s in found.sites for c in s.calls):
        promoted = promote(model, trained, found, run, small, double)
        if promoted.stacked:
            yield promoted


def live(trained: Sequence[Trained], found: Found) -> list[Trained]:
    """Return the trained tensors that some forward reads."""
    unread = {t.id for t in found.unread}
    return [t for t in trained if t.id not in unread]


@torch.no_grad()
def prove(
    model: nn.Module,
    trained: Sequence[Trained],
    found: Found,
    run: Callable[[Any], torch.Tensor],
    batch: Any,
    eps: float,
    kind: str = RADEMACHER,
) -> str:
    """Check the sites; returns "" or what is wrong.

    One probe at a time, no operation may touch the memory of a trained tensor and, with NaN in every trained
    tensor's own place, the losses must be finite. Stacked losses must equal these up to what stacking equal
    probes rounds differently, a difference that is small against those between the probes.
    """
    axis = _Guarded(live(trained, found), found.sites, seed=0, kind=kind)
    axis.scratch_bytes = (
        0  # as much as this batch's forward takes: of an output matrix, perhaps, a few rows only
    )
    try:
        return _prove(axis, model, trained, found, run, batch, eps)
    finally:
        axis.release()


def _prove(
    axis: _Guarded,
    model: nn.Module,
    trained: Sequence[Trained],
    found: Found,
    run: Callable[[Any], torch.Tensor],
    batch: Any,
    eps: float,
) -> str:
    cap = _cap(model, trained)
    alone = stacked = equal = torch.zeros(0)
    outer = axis.kind != RADEMACHER
    for further in (*_NEARER, *_FURTHER) if outer else _FURTHER:
        probes = [Probe(d, s * eps * further) for d, s in _PROBES]
        try:
            alone = torch.stack([_losses(axis, found, run, batch, [p]) for p in probes])  # [P, E]
        except _BREAKS as error:
            return f"a forward breaks where a trained tensor's own place holds NaN ({_first_line(error)})"
        leak = (
            _watched_leak(model, axis, found, run, batch)
            if further == (_NEARER if outer else _FURTHER)[0]
            else ""
        )
        if leak:
            return leak
        if not torch.isfinite(alone).all():
            break  # too far out
        if not found.stacked:
            return ""
        try:
            stacked = _losses(axis, found, run, batch, probes).view_as(alone)
            equal = _losses(axis, found, run, batch, probes[:1] * len(probes)).view_as(alone)
        except _BREAKS as error:
            return f"stacked rows do not run ({_first_line(error)})"
        rounding = _off(equal, alone[:1].expand_as(equal))
        if rounding > cap:
            return f"a loss differs by {rounding:.2g} when other rows go along"
        # A NaN in the stacked losses is a leak of the stacking itself (a number that mixed probes).
        allowed, worst = min(cap, 8 * rounding + cap / 4), _off(stacked, alone)
        if worst > allowed:
            return f"stacked losses differ from single ones by {worst:.2g}"
        if min(_off(a, b) for a, b in combinations(alone, 2)) > 4 * allowed:
            return ""
    return "the losses of far apart probes do not differ enough to tell stacked rows from mixed ones"


def _losses(axis: ProbeAxis, found: Found, run: Callable, batch: Any, probes: list[Probe]) -> torch.Tensor:
    """Losses [P·E] at the probes, NaN in the place of the tensors that are not to be read."""
    try:
        for t in found.unread:
            t.param.data = torch.full(
                (), float("nan"), dtype=t.stored.dtype, device=t.stored.device
            ).expand_as(t.stored)
        with axis.at(0, probes, batch.rows):
            return run(batch.repeat(len(probes)) if len(probes) > 1 else batch)
    finally:
        for t in found.unread:
            t.param.data = t.stored


def _off(x: torch.Tensor, y: torch.Tensor) -> float:
    """max |x - y| / (1 + |y|); inf where one of them is no number."""
    return float(((x - y).abs() / (1 + y.abs())).nan_to_num(nan=float("inf")).max())


def _cap(model: nn.Module, trained: Sequence[Trained]) -> float:
    dtypes = {p.dtype for p in model.parameters()} | {t.compute for t in trained}
    return max(_TOLERANCE[d] for d in dtypes if d in _TOLERANCE)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


class _Guarded(ProbeAxis):
    """A probe axis that tells its own reads of θ from anyone else's."""

    making = False

    def _fill(self, *args: Any) -> None:
        with self._making():
            super()._fill(*args)

    def gathered(self, *args: Any) -> torch.Tensor:
        with self._making():
            return super().gathered(*args)

    def plain_product(self, *args: Any) -> torch.Tensor:
        with self._making():
            return super().plain_product(*args)

    @contextmanager
    def _making(self) -> Iterator[None]:
        self.making = True
        try:
            yield
        finally:
            self.making = False


def _watched_leak(model: nn.Module, axis: _Guarded, found: Found, run: Callable, batch: Any) -> str:
    """ "" or who reads a trained tensor behind the sites' back: through a kept alias, or as NaN."""
    names = {m: n or "the model" for n, m in model.named_modules()}
    stack: list[str] = []
    nan: list[str] = []
    kept: list[str] = []
    memory = sorted(
        (t.stored.data_ptr(), t.stored.data_ptr() + t.stored.nbytes, t.name)
        for t in [*axis.trained, *found.unread]
    )
    starts = [start for start, _, _ in memory]

    class Memory(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
            if not axis.making and not kept:
                for x in leaves((args, kwargs or {})):
                    if isinstance(x, torch.Tensor) and x.numel() and x.device.type != "meta":
                        i = bisect_right(starts, x.data_ptr()) - 1
                        if i >= 0 and x.data_ptr() < memory[i][1]:
                            kept.append(
                                f"{stack[-1] if stack else 'the model'} reads {memory[i][2]} through a tensor it has kept"
                            )
            return func(*args, **(kwargs or {}))

    def enter(module: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        stack.append(names.get(module, type(module).__name__))
        try:
            out = inner(*args, **kwargs)
            bad = any(
                isinstance(x, torch.Tensor) and x.is_floating_point() and x.isnan().any() for x in leaves(out)
            )
            if bad and not nan:
                nan.append(stack[-1])
            return out
        finally:
            stack.pop()

    def guarded(b: Any) -> torch.Tensor:
        with rerouted(list(model.modules()), enter), Memory():
            return run(b)

    losses = _losses(axis, found, guarded, batch, [Probe(0, 0.0)])
    if kept:
        return kept[0]
    if not torch.isfinite(losses).all():
        return f"a trained tensor is read outside every site (first seen in {nan[0] if nan else 'the loss'})"
    return ""
