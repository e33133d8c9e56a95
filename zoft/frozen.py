"""Frozen first blocks: their outputs never change in training, so each row's are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoft.layout import leaves
from zoft.space import Trained, blocks_of

GROUP = 8  # rows computed together; fixed groups, so that a row's bits do not depend on when it is needed


class _Reached(Exception):
    """The hidden states in front of the first trained block are there: the rest of this forward is not needed."""


class FrozenPrefix:
    """Serves the hidden states [T, H] in front of block `first` of every row from memory.

    While installed, model(input_ids=…, attention_mask=…) skips the blocks before `first`; everything else
    (masks, positions, the blocks after) runs as ever. rows: token ids of the training rows, which are computed
    in fixed groups of GROUP; other rows are computed in the batch they come in. budget: bytes kept at most;
    rows beyond it are computed again each time.
    """

    def __init__(self, model: nn.Module, first: int, rows: Iterable[tuple[int, ...]], budget: int) -> None:
        self.model, self.budget, self.used = model, budget, 0
        self.blocks = list(blocks_of(model)[1])
        self.first = first
        ordered = sorted(set(rows), key=lambda r: (len(r), r))
        self.group_of = {
            r: tuple(ordered[i - i % GROUP : i - i % GROUP + GROUP]) for i, r in enumerate(ordered)
        }
        self.kept: dict[tuple[int, ...], Tensor] = {}
        self.serving: Tensor | None = None  # [R, T, H] for the forward under way
        self._undo: list[Callable[[], Any]] = []

    def install(self) -> None:
        for block in self.blocks[: self.first]:
            inner = block.forward
            block.forward = self._skip(inner)
            self._undo.append(partial(block.__dict__.pop, "forward"))
        self._undo.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._undo.append(
            self.blocks[self.first].register_forward_pre_hook(self._replace, with_kwargs=True).remove
        )

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.kept.clear()
        self.used = 0

    def _skip(self, inner: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.serving is None:
                return inner(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.tuples else hidden

        return forward

    tuples = False  # whether a block returns a tuple; seen in the trial

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._capturing:
            return
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        lengths = mask.sum(1).tolist()
        rows = [tuple(r[:n]) for r, n in zip(ids.tolist(), lengths, strict=True)]
        hidden = self._hidden(rows)
        out = hidden[rows[0]].new_zeros(*ids.shape, hidden[rows[0]].shape[-1])  # [R, T, H]
        for i, row in enumerate(rows):
            out[i, : len(row)] = hidden[row]
        self.serving = out

    def _replace(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._capturing:
            self._captured = hidden
            raise _Reached
        served, self.serving = self.serving, None
        assert served is not None and served.shape == hidden.shape, (served is not None, hidden.shape)
        return ((served, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": served})

    def _hidden(self, rows: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Hidden states of the rows: kept ones, or computed with their whole group."""
        found = {r: self.kept[r] for r in rows if r in self.kept}
        missing = list(dict.fromkeys(r for r in rows if r not in found))
        strangers = [r for r in missing if r not in self.group_of]
        for group in dict.fromkeys(
            [self.group_of[r] for r in missing if r in self.group_of] + [tuple(strangers)]
        ):
            if not group:
                continue
            made = self._compute(group)  # [G, T, H]
            for row, states in zip(group, made, strict=True):
                states = states[: len(row)]
                size = states.numel() * states.element_size()
                if self.used + size <= self.budget:
                    self.kept[row] = states = states.clone()
                    self.used += size
                found[row] = states
        return found

    _capturing = False
    _captured: Tensor

    def _compute(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """One forward of the rows up to block `first`: [len(rows), T, H]."""
        width = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        self._capturing, self.serving = True, None
        try:
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Reached:
            return self._captured
        finally:
            self._capturing = False
        raise AssertionError("the model never ran its first trained block")


def prefix_of(
    model: nn.Module, trained: Sequence[Trained], rows: Sequence[tuple[int, ...]], budget: int,
    losses: Callable[[], Tensor],
) -> tuple[FrozenPrefix | None, str]:  # fmt: skip
    """The installed cache and a line about it, or (None, why not).

    losses() -> [examples] of a clean forward: the cache must not change it (beyond rounding), and what it
    keeps must not depend on a trained tensor, which is tried with NaN in the place of each.
    """
    try:
        name, blocks = blocks_of(model)
    except Exception:
        return None, "no stack of blocks"
    ours = {id(t.param) for t in trained}
    first = next((i for i, b in enumerate(blocks) if any(id(p) in ours for p in b.parameters())), len(blocks))
    if first == 0 or first == len(blocks):
        return None, "the first block is trained" if first == 0 else "no block is trained"
    prefix = FrozenPrefix(model, first, rows, budget)
    types: list[Any] = []
    handle = blocks[0].register_forward_hook(lambda m, a, out: types.append(out))
    try:
        with torch.no_grad():
            want = losses()
            prefix.tuples = isinstance(types[0], tuple)
            if sum(isinstance(x, Tensor) for x in leaves(types[0])) != 1:
                return None, f"blocks of {name} return more than hidden states"
            handle.remove()
            prefix.install()
            for t in trained:
                t.param.data = torch.full_like(t.stored, float("nan"))
            try:
                states = prefix._compute(list(rows[:2]))
            finally:
                for t in trained:
                    t.param.data = t.stored
            got = losses()
    except (KeyError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        prefix.remove()
        return None, f"this model does not allow it ({type(error).__name__}: {str(error)[:80]})"
    finally:
        handle.remove()
    if not bool(torch.isfinite(states).all()):
        prefix.remove()
        return None, "what comes before the first trained block reads trained tensors"
    worst = float(((got - want).abs() / (1 + want.abs())).max())
    tolerance = 1e-4 if want.dtype == torch.float32 and states.dtype == torch.float32 else 0.05
    if not worst <= tolerance:
        prefix.remove()
        return None, f"it changes losses by {worst:.2g}"
    return prefix, f"outputs of the first {first} of {len(blocks)} blocks are computed once a row and kept"
