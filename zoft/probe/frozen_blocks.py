"""Frozen first blocks: their outputs never change in training, so each row's are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from zoft.errors import UserError
from zoft.method.space import Trained
from zoft.models.head import uncached
from zoft.models.kind import after, blocks_of
from zoft.probe.rows import leaves

FROZEN_BYTES = 1 << 30  # kept outputs of frozen blocks; rows beyond it are computed again each time
Row = tuple[int, ...]  # token ids, no padding


def rows_of(inputs: Mapping[str, Tensor]) -> list[Row]:
    """Return the rows of a model's inputs, padded on the right."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == mask.shape and bool(mask[:, 0].all()), (ids.shape, mask.shape)
    return [tuple(r[:n]) for r, n in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]


class _Reached(Exception):
    """The hidden states in front of the first trained block are there: the rest of this forward is not needed."""


class FrozenPrefix:
    """Serve the hidden states [T, H] in front of block `first` of every row from memory.

    While installed, model(input_ids=…, attention_mask=…) skips the blocks before `first`; everything else
    (masks, positions, the blocks after) runs as ever. batches: rows that training meets together; a row is computed
    with those that are first met in the same batch, whenever that is, so that its bits are always the same. Other
    rows (of an evaluation, or beyond the budget) are computed with those of the batch they come in. budget: bytes
    kept at most, for training rows first.
    """

    def __init__(self, model: nn.Module, first: int, batches: Iterable[Sequence[Row]], budget: int) -> None:
        self.model, self.budget = model, budget
        self.blocks = list(blocks_of(model)[1])
        self.first = first
        self.group_of: dict[Row, tuple[Row, ...]] = {}
        for rows in batches:
            group = tuple(dict.fromkeys(r for r in rows if r not in self.group_of))
            self.group_of.update(dict.fromkeys(group, group))
        self.tokens = sum(map(len, self.group_of))
        self.kept: dict[tuple[Row, ...], list[Tensor]] = {}
        self.ready: dict[Row, Tensor] = {}  # of the groups kept: hashing whole groups in every step is slow
        self.spare = budget  # bytes that rows outside the groups may take
        self.serving: Tensor | None = None  # [R, T, H] for the forward under way
        self._undo: list[Callable[[], Any]] = []

    def install(self) -> None:
        self.model.__dict__["keeps_rows"] = self  # a forward needs whole rows: see prefix_cache.py, text.py
        for block in self.blocks[: self.first]:
            own = {k: v for k, v in block.__dict__.items() if k == "forward"}
            self._undo += [partial(block.__dict__.update, own), partial(block.__dict__.pop, "forward")]
            block.forward = self._skip(block.forward)
        self._undo.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._undo.append(
            self.blocks[self.first].register_forward_pre_hook(self._replace, with_kwargs=True).remove
        )

    def remove(self) -> None:
        """Restore the model as it was; nothing is kept."""
        self.model.__dict__.pop("keeps_rows", None)
        while self._undo:
            self._undo.pop()()
        self.kept.clear()
        self.ready.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run all blocks meanwhile: rows of a text that grows are parts of rows, padded on the left."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    _aside = False

    def _skip(self, inner: Callable) -> Callable:
        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.serving is None:
                return inner(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.tuples else hidden

        return forward

    tuples = False  # whether a block returns a tuple; seen in the trial

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._capturing or self._aside:
            return
        ids, rows = kwargs["input_ids"], rows_of(kwargs)
        hidden = self._hidden(rows)
        out = pad_sequence([hidden[row] for row in rows], batch_first=True)  # [R, longest, H]
        self.serving = pad(out, (0, 0, 0, ids.shape[1] - out.shape[1]))  # [R, T, H]

    def _replace(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._aside:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._capturing:
            self._captured = hidden
            raise _Reached
        served, self.serving = self.serving, None
        assert served is not None and served.shape == hidden.shape, (served is not None, hidden.shape)
        return ((served, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": served})

    def _hidden(self, rows: Sequence[Row]) -> dict[Row, Tensor]:
        """Hidden states of the rows, each kept or computed with its whole group: a row's bits do not depend on
        what else was asked for before."""
        found = {r: self.ready[r] for r in rows if r in self.ready}
        others = tuple(dict.fromkeys(r for r in rows if r not in self.group_of))
        for group in dict.fromkeys(self.group_of.get(r, others) for r in rows if r not in found):
            states = dict(zip(group, self._states(group), strict=True))
            found |= states
            if group is not others:
                self.ready |= states
        return found

    def _states(self, group: tuple[Row, ...]) -> list[Tensor]:
        """[T, H] of each row of a group, kept if there is room."""
        if group in self.kept:
            return self.kept[group]
        made = self._compute(group)  # [G, T, H]
        states = [x[: len(row)] for row, x in zip(group, made, strict=True)]
        if group[0] not in self.group_of:
            size = sum(x.nbytes for x in states)
            if size > self.spare:
                return states
            self.spare -= size
        self.kept[group] = [x.clone() for x in states]
        return self.kept[group]

    def share_out(self, token: int) -> None:
        """Give the budget to the groups in their order, at `token` bytes a token, and what is left to other rows."""
        for group in dict.fromkeys(self.group_of.values()):
            size = token * sum(map(len, group))
            if size <= self.spare:
                self.spare -= size
            else:
                for row in group:
                    del self.group_of[row]

    _capturing = False
    _captured: Tensor

    def _compute(self, rows: Sequence[Row]) -> Tensor:
        """One forward of the rows up to block `first`: [len(rows), T, H]."""
        width = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        self._capturing, self.serving = True, None
        try:
            with uncached(self.model):
                self.model(input_ids=ids, attention_mask=mask)
        except _Reached:
            return self._captured
        finally:
            self._capturing = False
        raise AssertionError("the model never ran its first trained block")


def frozen_blocks(model: nn.Module, trained: set[int]) -> tuple[int, int]:
    """Return (blocks before the first one that holds a trained tensor, blocks in all); trained: ids of parameters.

    Where only what follows the blocks is trained (a head of its own, the final norm) it is all blocks but the last one.
    """
    try:
        name, blocks = blocks_of(model)
    except UserError:
        return 0, 0
    for i, block in enumerate(blocks):
        if any(id(p) in trained for p in block.parameters()):
            return i, len(blocks)
    head, table = (getattr(model, f"get_{w}_embeddings", lambda: None)() for w in ("output", "input"))
    later = {id(p) for n, p in model.named_parameters() if n in after(model, name)}
    later |= {id(p) for p in head.parameters()} if head is not None else set()
    later -= {id(p) for p in table.parameters()} if table is not None else set()
    return len(blocks) - (trained <= later), len(blocks)


def prefix_of(
    model: nn.Module, trained: Sequence[Trained], batches: Iterable[Sequence[Row]], budget: int,
    losses: Callable[[], Tensor], auto: bool = False,
) -> tuple[FrozenPrefix | None, str]:  # fmt: skip
    """Return the installed cache and a line about it, or (None, why not).

    losses() -> [examples] of a clean forward: the cache must not change it (beyond rounding), and what it
    keeps must not depend on a trained tensor, which is tried with NaN in the place of each. auto: only where it
    pays, at least half of the blocks being frozen and all rows within the budget; "" where few or none are.
    """
    first, count = frozen_blocks(model, {id(t.param) for t in trained})
    if auto and (first in (0, count) or 2 * first < count):
        return None, ""
    if first in (0, count):
        return (
            None,
            "the first block is trained" if first < count else "what comes before the blocks is trained",
        )
    prefix = FrozenPrefix(model, first, batches, budget)
    try:
        with torch.no_grad():
            why = _trial(prefix, trained, losses, auto)
    except (KeyError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        why = f"this model does not allow it ({type(error).__name__}: {str(error)[:80]})"
    if why:
        prefix.remove()
        return None, why
    return prefix, f"outputs of the first {first} of {count} blocks are computed once per row and kept"


def _trial(
    prefix: FrozenPrefix, trained: Sequence[Trained], losses: Callable[[], Tensor], auto: bool
) -> str:  # fmt: skip
    """ "" with the cache installed, or why it does not do."""
    given: list[Any] = []
    handle = prefix.blocks[0].register_forward_hook(lambda module, args, out: given.append(out))
    try:
        want = losses()
    finally:
        handle.remove()
    prefix.tuples = isinstance(given[0], tuple)
    if sum(isinstance(x, Tensor) for x in leaves(given[0])) != 1:
        return "its blocks return more than hidden states"
    prefix.install()
    for t in trained:
        t.param.data = torch.full_like(t.stored, float("nan"))
    try:
        states = prefix._compute(list(prefix.group_of)[:2])  # [2, T, H]
    finally:
        for t in trained:
            t.param.data = t.stored
    if not bool(torch.isfinite(states).all()):
        return "what comes before the first trained block reads trained tensors"
    need = prefix.tokens * states[0, 0].nbytes
    if auto and need > prefix.budget:
        return f"all rows would take {need / 1e9:.2g} GB, more than {prefix.budget / 1e9:.2g}; cache_frozen=true keeps some"
    prefix.share_out(states[0, 0].nbytes)
    got = losses()
    worst = float(((got - want).abs() / (1 + want.abs())).max())
    tolerance = 1e-4 if want.dtype == torch.float32 and states.dtype == torch.float32 else 0.05
    return "" if worst <= tolerance else f"it changes losses by {worst:.2g}"
