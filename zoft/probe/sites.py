"""Finding the sites: the modules that must work per probe because they read trained tensors.

Nothing is guessed from a module's type or a tensor's shape. Reads are watched in one plain forward; which
dimension of every input and output carries rows is read off two forwards, of n and 2n rows. A module whose
rows cannot be told apart hands its duty to its caller; a model where that reaches the root runs one probe
a forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoft.method.space import Trained
from zoft.probe.rows import Call, Seen, compare, look

# Questions about a tensor that never look at its values.
METADATA = {
    "__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size", "nelement",
    "ndimension", "is_contiguous", "__hash__", "__repr__", "data_ptr", "storage_offset", "get_device", "__len__",
}  # fmt: skip
_VALUE_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "grad"}


@dataclass(eq=False)
class Site:
    """Describe one module that runs per probe, with the trained tensors that it reads itself.

    An outer site splits the rows; sites within it run once for each of its probes and need no calibration.
    """

    name: str
    module: nn.Module
    trained: list[Trained]
    outer: bool = True
    calls: list[Call] = field(default_factory=list)  # empty: never calibrated, usable with one probe only


@dataclass
class Reads:
    """Hold what one watched forward told: for every trained tensor, the stacks of running modules at its reads."""

    stacks: list[tuple[int, tuple[nn.Module, ...]]]  # (index into trained, modules outermost first)


@dataclass
class Found:
    """Hold the sites of a model, whether probes may be stacked as rows, and why not."""

    sites: list[Site]
    stacked: bool
    note: str  # "" or one line: what was promoted, or why one probe per forward
    unread: list[Trained]  # no forward reads these: training them would be noise


def find(
    model: nn.Module,
    trained: Sequence[Trained],
    run: Callable[[Any], Any],
    small: Any,
    double: Any,
    lift: bool = False,
) -> Found:
    """Return the sites of `model` for the trained tensors, watched and calibrated on two batches.

    run(batch) is one plain forward. small has n rows; double has 2n: those of small, then n others with the
    same mask. lift: see rows.compare. Returns Found; promotion is repeated until every site's calls are understood.
    """
    with torch.no_grad():
        run(
            double
        )  # what a module makes once and keeps is kept by now, so that its reads are not taken for real ones
    reads = watch(model, trained, lambda: run(double))
    read = {i for i, _ in reads.stacks}
    modules = {stack[-1] for _, stack in reads.stacks}
    notes: list[str] = []
    names = {m: n for n, m in model.named_modules()}
    first = _assign(model, trained, reads, modules)

    def unread(sites: list[Site]) -> list[Trained]:
        covered = {t.id for s in sites for t in s.trained}
        return [t for i, t in enumerate(trained) if i not in read and t.id not in covered]

    def unstacked(why: str) -> Found:
        return Found(first, False, why, unread(first))

    while True:
        sites = _assign(model, trained, reads, modules)
        if any(s.module is model and s.outer for s in sites):
            return unstacked(
                f"one probe per forward: {notes[-1] if notes else 'the model itself reads trained tensors'}"
            )
        bad = calibrate(sites, run, small, double, lift)
        if not bad:
            return Found(sites, True, "; ".join(notes), unread(sites))
        for site, why in bad:
            up = {stack[stack.index(site.module) - 1] if stack.index(site.module) else model
                  for _, stack in reads.stacks if site.module in stack}  # fmt: skip
            notes.append(
                f"{site.name} {why}: {', '.join(sorted(names.get(m, '?') or 'the model' for m in up))} works per probe"
            )
            modules = (modules - {site.module}) | up


def promote(
    model: nn.Module, trained: Sequence[Trained], found: Found, run: Callable, small: Any, double: Any
) -> Found:
    """Try again with every row-free site handed to its caller (the proof has shown that one of them leaks)."""
    reads = watch(model, trained, lambda: run(double))
    modules = {s.module for s in found.sites if s.outer}
    for site in found.sites:
        if any(c.row_free for c in site.calls):
            modules.discard(site.module)
            modules |= {st[max(st.index(site.module) - 1, 0)] for _, st in reads.stacks if site.module in st}
    sites = _assign(model, trained, reads, modules)
    if any(s.module is model and s.outer for s in sites) or calibrate(sites, run, small, double):
        return Found(found.sites, False, "one probe per forward: rows could not be told apart", found.unread)
    served = {t.id for s in sites for t in s.trained}
    unread = [t for t in found.unread if t.id not in served]
    gone = sorted({s.name for s in found.sites if s.outer} - {s.name for s in sites if s.outer})
    return Found(
        sites, True, f"{', '.join(gone)} give what no rows tell apart: their callers work per probe", unread
    )


def watch(model: nn.Module, trained: Sequence[Trained], forward: Callable[[], Any]) -> Reads:
    """Run one plain forward and note, for every read of a trained tensor, which modules were running."""
    index = {id(t.param): i for i, t in enumerate(trained)}
    paired = {m for m in model.modules() if has_pair(m, index)}
    stack: list[nn.Module] = []
    seen: dict[tuple[int, tuple[int, ...]], tuple[nn.Module, ...]] = {}

    def enter(module: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        stack.append(module)
        try:
            return inner(*args, **kwargs)
        finally:
            stack.pop()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
            if not _is_metadata(func):
                for leaf in _tensors((args, kwargs)):
                    i = index.get(id(leaf))
                    if i is not None:
                        seen[i, tuple(map(id, stack))] = tuple(stack)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), rerouted(list(model.modules()), enter), Watch():
        forward()
    found: dict[tuple[int, tuple[nn.Module, ...]], None] = {}
    for (i, _), modules in seen.items():
        whole = next((k for k, m in enumerate(modules) if m in paired), len(modules))
        found[i, modules[: whole + 1] or (model,)] = None
    return Reads(list(found))


def calibrate(
    sites: list[Site], run: Callable, small: Any, double: Any, lift: bool = False
) -> list[tuple[Site, str]]:
    """Fill every site's calls with row layouts; returns the sites that cannot be read, each with the reason."""
    a = _record(sites, run, small, {})
    b = _record(sites, run, double, a)
    bad = []
    for site in sites:
        site.calls = []
        calls_a, calls_b = a.get(site, []), b.get(site, [])
        if len(calls_a) != len(calls_b):
            bad.append((site, f"is called {len(calls_a)} times for n rows and {len(calls_b)} for 2n"))
            continue
        for x, y in zip(calls_a, calls_b, strict=True):
            call = compare(x, y, lift)
            if isinstance(call, str):
                bad.append((site, call))
                break
            site.calls.append(call)
    return bad


def _record(
    sites: list[Site], run: Callable, batch: Any, like: dict[Site, list[Seen]]
) -> dict[Site, list[Seen]]:
    """Return what every outermost site call takes and gives, in order, in one plain forward."""
    by_module = {s.module: s for s in sites}
    calls: dict[Site, list[Seen]] = {}
    inside = False

    def enter(module: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        nonlocal inside
        if inside:
            return inner(*args, **kwargs)
        inside = True
        try:
            site = by_module[module]
            mine = calls.setdefault(site, [])
            twins = like.get(site, [])
            out, seen = look(inner, args, kwargs, twins[len(mine)] if len(mine) < len(twins) else None)
            mine.append(seen)
            return out
        finally:
            inside = False

    with torch.no_grad(), rerouted([s.module for s in sites], enter):
        run(batch)
    return calls


def _assign(
    model: nn.Module, trained: Sequence[Trained], reads: Reads, modules: set[nn.Module]
) -> list[Site]:
    """Sites for the given modules, which split the rows, and for the readers that run within them.

    An outer site also owns the trained tensors of its subtree that this forward happened not to read (an
    expert that no token chose), unless another site owns them.
    """
    owned: dict[nn.Module, set[int]] = {}
    outer: dict[nn.Module, None] = {}
    for i, stack in reads.stacks:
        module = next((m for m in stack if m in modules), None)
        assert module is not None, (trained[i].name, [type(m).__name__ for m in stack])
        outer[module] = None
        owned.setdefault(module, set())
        owned.setdefault(stack[-1], set()).add(i)
    taken = set().union(*owned.values()) if owned else set()
    index = {id(t.param): i for i, t in enumerate(trained)}
    for site in outer:
        owned[site] |= {
            j for p in site.parameters() if (j := index.get(id(p))) is not None and j not in taken
        }
    names = {m: n for n, m in model.named_modules()}
    return [
        Site(names.get(m, type(m).__name__) or "the model", m, [trained[i] for i in sorted(s)], m in outer)
        for m, s in owned.items()
    ]


@contextmanager
def rerouted(
    modules: list[nn.Module], enter: Callable[[nn.Module, Callable, tuple, dict], Any]
) -> Iterator[None]:
    """Send every forward of the modules through enter(module, original forward, args, kwargs); undone on exit."""
    saved = []
    for module in dict.fromkeys(modules):
        if isinstance(module, torch.jit.ScriptModule):
            continue  # cannot be rerouted: what it reads counts as its caller's
        inner = module.forward
        saved.append((module, module.__dict__.get("forward")))

        def forward(*args, _module=module, _inner=inner, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
            return enter(_module, _inner, args, kwargs)

        # The signature survives: models look at it to decide what they may pass.
        module.forward = functools.wraps(inner)(forward)
    try:
        yield
    finally:
        for module, own in saved:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _is_metadata(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUE_PROPERTIES
    return name in METADATA


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for x in tree:
            yield from _tensors(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from _tensors(x)


def is_layer(module: nn.Module) -> bool:
    """Say whether it is peft's LoRA layer around a linear one: one site, though the modules within it read the tensors."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # loaded by whoever has made such a layer
    return peft is not None and type(module) is peft.Linear


def has_pair(module: nn.Module, trained: Container[int]) -> bool:
    """Say whether it is such a layer, and something of its pairs is trained; trained: ids of parameters."""
    added = (n for n, p in module.named_parameters() if id(p) in trained) if is_layer(module) else ()
    return any(n.startswith("lora_") for n in added)
