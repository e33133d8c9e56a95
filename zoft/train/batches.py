"""Choose the examples that a step sees: a pure function of (step, sizes, seed), so resuming needs no saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.objectives.losses import Batch, collate
from zoft.parallel.world import this_world

PURPOSE = 0x64617461  # the last counter word; noise uses others


def batches_of(config: Config, train: Sequence[Example]) -> Callable[[int], list[Batch]]:
    """Return a function from a step to its batches, a pure function of the step; of several processes, this one's examples of each."""
    mine, even = this_world().examples, config.directions == "example"

    def at(step: int) -> list[Batch]:
        return [
            collate([train[i] for i in mine(picks)], even=even).to(config.device)
            for picks in picked(config, len(train), step)
        ]

    return at


def picked(config: Config, n: int, step: int) -> list[list[int]]:
    """Return which of n examples each batch of a step holds."""
    return batch_indices(
        step, n=n, batch_size=config.batch_size, accumulate=config.accumulate, seed=config.seed
    )


def batch_indices(step: int, *, n: int, batch_size: int, accumulate: int, seed: int) -> list[list[int]]:
    """Return the examples of each of the `accumulate` batches of a step: [accumulate][batch_size] indices in [0, n).

    Epochs are shuffled, each holds every example once, and they follow each other without a gap: a batch may
    span two epochs and is never short. A batch holds no example twice, nor does a whole step, as far as n
    allows it: n < batch_size·accumulate repeats examples in a step, n < batch_size also in a batch. While
    n ≥ batch_size·accumulate a step's examples do not depend on how they are split into batches.

    step: from 0. n: examples in the training set. seed: the run's.
    """
    assert step >= 0 and n > 0 and batch_size > 0 and accumulate > 0, (step, n, batch_size, accumulate)
    total = batch_size * accumulate
    distinct = next(size for size in (total, batch_size, 1) if size <= n)
    position, end = step * total, (step + 1) * total
    taken: list[int] = []
    while position < end:
        epoch, offset = divmod(position, n)
        part = _epoch(epoch, n, distinct, seed)[offset : offset + end - position].tolist()
        taken += part
        position += len(part)
    return [taken[at : at + batch_size] for at in range(0, total, batch_size)]


@lru_cache(maxsize=4)
def _epoch(epoch: int, n: int, distinct: int, seed: int) -> np.ndarray:
    """The order of an epoch [n] in which no run of `distinct` from the common grid meets an example twice.

    Where the last r examples of the epoch before share a run with this epoch's head, those of them that the
    shuffle put into the head come right after it instead. This moves nothing beyond the first `distinct`
    places, so the tail of an epoch is the plain shuffle's if n ≥ 2·distinct; in a smaller set the orders
    depend on each other back to the last epoch that began with a run, at most `distinct` epochs ago.
    """
    start = max(epoch - 1, 0)
    if n < 2 * distinct:
        start = epoch - epoch % (distinct // math.gcd(n, distinct))
    order = _shuffle(start, n, seed)
    for later in range(start + 1, epoch + 1):
        shared = later * n % distinct  # the run that spans the boundary has this many of the epoch before
        tail, order = order[n - shared :], _shuffle(later, n, seed)
        if shared:
            fresh = ~np.isin(order[:distinct], tail)
            fresh &= np.cumsum(fresh) <= distinct - shared
            order = np.concatenate([order[:distinct][fresh], order[:distinct][~fresh], order[distinct:]])
    return order


@lru_cache(maxsize=4)
def _shuffle(epoch: int, n: int, seed: int) -> np.ndarray:
    """A permutation of range(n): i sorted by 64 bits of Philox4x32-10, counter (i, epoch, PURPOSE)."""
    i = np.arange(n, dtype=np.uint64)
    words = [i & 0xFFFFFFFF, i >> 32, np.full_like(i, epoch & 0xFFFFFFFF), np.full_like(i, PURPOSE)]
    first, second = _philox(words, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[:2]
    return np.argsort(second << 32 | first, kind="stable")


def _philox(c: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011) of counters c: four arrays of 32-bit words, held in uint64."""
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def bucket(batch: Batch, even: bool = False) -> Batch:
    """Return the batch padded to a width and a number of scored positions that other batches have too; same losses.

    even: each example has as many positions as any other, and keeps to that.
    """
    rows, width = batch.inputs["input_ids"].shape
    wide = rounded(width, 8 if width <= 128 else 32)
    if wide != width:
        inputs = {k: nn.functional.pad(v, (0, wide - width)) for k, v in batch.inputs.items()}
        batch = replace(
            batch, inputs=inputs, positions=batch.positions // width * wide + batch.positions % width
        )
    if batch.tokens is None:
        parts, deep = batch.examples if even else 1, batch.slots.shape[2]
        positions, targets = batch.positions.view(parts, -1), batch.targets.view(parts, -1)
        scored = positions.shape[1]
        n = rounded(scored, 8 if even else max(rows, 8))
        slots = torch.where(batch.slots < 0, -1, batch.slots // scored * n + batch.slots % scored)
        batch = replace(
            batch,
            # Positions nobody's slot reads: the last one again, so that they stay in the order of the rows.
            positions=torch.cat([positions, positions[:, -1:].expand(-1, n - scored)], 1).flatten(),
            targets=torch.cat([targets, targets[:, -1:].expand(-1, n - scored)], 1).flatten(),
            slots=nn.functional.pad(slots, (0, rounded(deep, 4) - deep), value=-1),
        )
    return batch


def rounded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tensors_of(batch: Batch) -> list[tuple[str, Tensor]]:
    named = {**batch.inputs, **{k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}}
    return sorted(named.items())
