"""Find where a call keeps its rows: read off one forward of n rows and one of 2n, never guessed from a shape.

Only shapes and a few thousand samples of each tensor are kept, so that looking costs no memory to speak of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

# How a leaf of a call's inputs or outputs relates to rows: a dimension (>= 0), or one of these.
NO_ROWS = -1  # a tensor that all rows share
ONE = -2  # one whose dim 0 is 1 (learned positions, a shared mask): it may be expanded to rows
PLAIN = -3  # no tensor
COUNT = -4  # a whole number that doubles with the rows
LIFT = -5  # a result that all rows share, given to each row apart by one more dimension in front
SAMPLES = 4096


class Unfit(RuntimeError):
    """Signal that a forward does what calibration has not seen: this batch cannot be stacked, one probe per forward can."""


@dataclass
class Call:
    """Hold the layout of one call: how each leaf of the arguments and of the result relates to rows."""

    inputs: list[int]
    outputs: list[int]
    spec: TreeSpec | None = None  # how the arguments nest
    ranks: list[int] = field(default_factory=list)  # dimensions of each input, -1 for what is no tensor

    @property
    def row_free(self) -> bool:
        return all(d < 0 for d in self.inputs)


@dataclass
class Leaf:
    """Hold what is kept of one leaf of a call."""

    shape: tuple[int, ...] | None = None  # None: no tensor
    sample: torch.Tensor | None = None  # values at `places`
    places: tuple[torch.Tensor, ...] = ()
    floats: bool = False
    value: Any = None  # of a number or a string
    kind: str = ""  # type name of any other object
    within: list[tuple] = field(default_factory=list)  # (shape, identity, version) of the tensors inside it


@dataclass
class Seen:
    """Hold one call of a site in one forward."""

    inputs: list[Leaf]
    outputs: list[Leaf]
    spec: TreeSpec
    changes: (
        str  # what the call did to its arguments that rows apart from each other could not: "" or a reason
    )


def leaves(tree: Any) -> list:
    """Return the leaves of nested tuples, lists, dicts and model outputs, in order."""
    return tree_flatten(tree)[0]


def look(inner: Any, args: tuple, kwargs: dict, like: Seen | None) -> tuple[Any, Seen]:
    """Run a call and note its layout; `like` is the same call of the forward of n rows, sampled alike."""
    flat, spec = tree_flatten((args, kwargs))
    before = [leaf(x, like.inputs[i] if like and i < len(like.inputs) else None) for i, x in enumerate(flat)]
    versions = [_version(x) for x in flat]
    result = inner(*args, **kwargs)
    out = leaves(result)
    after = [leaf(x, like.outputs[i] if like and i < len(like.outputs) else None) for i, x in enumerate(out)]
    changes = ""
    for x, leaf_, version in zip(flat, before, versions, strict=True):
        if leaf_.kind and _within(x) != leaf_.within:
            changes = f"changes a {leaf_.kind} that it is given (a cache?)"
        elif leaf_.shape is not None and _version(x) != version:
            leaf_.kind = "changed"  # harmless where rows are apart: each probe writes to its own
    passed = {id(x) for x in flat}
    for x, leaf_ in zip(out, after, strict=True):
        if leaf_.kind and leaf_.within and id(x) not in passed:
            changes = f"returns tensors inside a {leaf_.kind}"
    return result, Seen(before, after, spec, changes)


def compare(small: Seen, double: Seen, lift: bool = False) -> Call | str:
    """Return the layout of a call seen with n and with 2n rows, or the reason why there is none to be told.

    lift: a call that no rows go into may return a tensor without rows; the proof has to show that its caller
    takes one that has them, too.
    """
    for seen in (small, double):
        if seen.changes:
            return seen.changes
    if small.spec != double.spec:
        return "is called with other arguments for 2n rows"
    inputs, outputs = dims(small.inputs, double.inputs), dims(small.outputs, double.outputs)
    if isinstance(inputs, str):
        return inputs
    if isinstance(outputs, str):
        return outputs
    for d, x, y in zip(inputs, small.inputs, double.inputs, strict=True):
        if d in (NO_ROWS, ONE):
            if x.kind == "changed":
                return "changes a tensor that all rows share"
            # A number for the whole batch may vary (a running auxiliary loss): whoever uses it will see NaN.
            if (x.shape or not x.floats) and not _same(x.sample, y.sample):
                return "takes a tensor without rows that depends on the batch"
    call = Call(inputs, outputs, small.spec, [-1 if x.shape is None else len(x.shape) for x in small.inputs])
    for i, x in enumerate(small.outputs):
        if outputs[i] == NO_ROWS and (x.shape or not x.floats) and 0 not in (x.shape or ()):
            if not (lift and call.row_free and x.shape):
                return "returns a tensor without rows"
            outputs[i] = LIFT
    return call


def dims(small: list[Leaf], double: list[Leaf]) -> list[int] | str:
    """Return the row dimension of every leaf, or the reason why there is none to be told."""
    if len(small) != len(double):
        return "takes or returns another number of values for 2n rows"
    layout = []
    for x, y in zip(small, double, strict=True):
        if (x.shape is None) != (y.shape is None):
            return "takes or returns a tensor for one number of rows only"
        if x.shape is None or y.shape is None:
            whole = isinstance(x.value, int) and not isinstance(x.value, bool) and isinstance(y.value, int)
            if whole and x.value and y.value == 2 * x.value:
                layout.append(COUNT)
                continue
            if x.value != y.value:
                return "depends on the number of rows through a plain value"
            if [w[0] for w in x.within] != [w[0] for w in y.within]:
                return f"has rows inside a {x.kind}"
            layout.append(PLAIN)
            continue
        if len(x.shape) != len(y.shape):
            return "changes rank with the number of rows"
        grown = [d for d in range(len(x.shape)) if x.shape[d] != y.shape[d]]
        if not grown:
            layout.append(ONE if x.shape and x.shape[0] == 1 else NO_ROWS)
        elif len(grown) > 1 or y.shape[grown[0]] != 2 * x.shape[grown[0]]:
            return "has ragged rows"
        elif not _same(x.sample, y.sample):
            return "does not keep rows in order"
        else:
            layout.append(grown[0])
    return layout


def leaf(x: Any, like: Leaf | None = None) -> Leaf:
    """Return what to keep of x, sampled where `like` was if it has room for that."""
    if isinstance(x, torch.Tensor):
        shape = tuple(x.shape)
        places: tuple[torch.Tensor, ...] = ()
        model = like.shape if like is not None else None
        if like and model and len(model) == len(shape) and all(a <= b for a, b in zip(model, shape)):
            places = like.places
        elif x.numel() and shape:
            # On the CPU whatever the default device is, so that the places are the same ones everywhere.
            picked = torch.arange(x.numel(), device="cpu")
            if x.numel() > SAMPLES:
                chosen = torch.Generator().manual_seed(0)
                picked = torch.randint(x.numel(), (SAMPLES,), generator=chosen, device="cpu")
            places = torch.unravel_index(picked.to(x.device), shape)
        sample = x.detach()[places].clone() if places else x.detach().reshape(-1)[:1].clone()
        return Leaf(shape, sample, places, x.is_floating_point())
    if x is None or isinstance(x, bool | int | float | complex | str | torch.dtype | torch.device):
        return Leaf(value=x)
    return Leaf(kind=type(x).__name__, within=_within(x))


def _within(x: Any, depth: int = 5) -> list[tuple]:
    """(shape, identity, version) of every tensor inside an object that pytrees do not open."""
    if isinstance(x, torch.Tensor):
        return [(tuple(x.shape), id(x), _version(x))]
    if depth == 0 or isinstance(x, nn.Module | type) or callable(x):
        return []
    if isinstance(x, dict):
        parts = list(x.values())
    elif isinstance(x, list | tuple | set):
        parts = list(x)
    else:
        slots = [getattr(x, s, None) for s in getattr(type(x), "__slots__", ())]
        parts = [*getattr(x, "__dict__", {}).values(), *slots]
    return [found for part in parts for found in _within(part, depth - 1)]


def _version(x: Any) -> int:
    """Number of in-place changes so far; 0 for what is no tensor or does not count them."""
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else 0


def _same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    """Equal up to what kernels for other row counts round differently (a few flipped choices in 16 bits)."""
    if x is None or y is None or x.shape != y.shape:
        return False
    if not x.is_floating_point() and not x.is_complex():
        return x.numel() == 0 or float((x != y).double().mean()) <= (0.02 if x.numel() > 100 else 0.0)
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    x, y = (torch.nan_to_num(v.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-1e30, 1e30) for v in (x, y))
    return float((x - y).norm()) <= 0.05 * float(x.norm() + y.norm()) + 1e-12
