"""Block-wise steps: each step probes and moves the tensors of one block of the model, and leaves all others as they are.

    θ_b ← θ_b - lr·ĝ_b,  b the step's block,  ĝ_b from losses at θ + s·z with z on the tensors of b only

A model's blocks are those of its stack that have trained tensors, in order; trained tensors outside of the stack (embeddings, the
last norm, the head) are one more block, after them. Whose turn it is follows from the seed and the step alone:
cyclic: b = step mod n. random: b = ⌊w·n / 2³²⌋, w the first word of Philox4x32-10 for the counter (step mod 2³², step // 2³², 0,
0x626c6f63) and the key (seed mod 2³², seed // 2³²).
A tensor whose turn it is not is probed as it is, without noise, and has no part of the step: no decay, no fading of its momentum,
no rounding, no count of an update rule.
Source: the block-wise variant of ZO-Bench (Zhang et al. 2024, arXiv 2402.11592). Deviations: there a step goes through all blocks,
2 forwards each, with one seed for all of them, so that tensors of one shape get the same z; here a step has one block, and each
tensor has noise of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from zoft.errors import UserError
from zoft.noise.spec import Update, philox

if TYPE_CHECKING:
    from torch import nn

    from zoft.method.estimators.estimator import Probe
    from zoft.method.space import Trained

TAG = 0x626C6F63  # separates these words from those of the noise
WORD = 1 << 32


class Turn(NamedTuple):
    """Say at which steps a tensor moves: those of block `mine` of so many blocks, in this order (random or cyclic)."""

    order: str
    blocks: int
    mine: int

    def comes_at(self, seed: int, step: int) -> bool:
        """Say whether the tensor moves at a step."""
        return block_at(self.order, self.blocks, seed, step) == self.mine


def block_at(order: str, count: int, seed: int, step: int) -> int:
    """Return the block of a step, in [0, count)."""
    if order == "cyclic":
        return step % count
    word = philox((step % WORD, step // WORD % WORD, 0, TAG), (seed % WORD, seed // WORD % WORD))[0]
    return word * count // WORD


def give_turns(model: nn.Module, trained: Sequence[Trained], order: str) -> list[str]:
    """Give every tensor its turn, in place (`order` all: none has one); returns a line for the reader.

    Raises UserError where all that is trained lies in one block.
    """
    if order == "all":
        return []
    places, outside = places_of(model, [t.name for t in trained], order)
    count = 1 + max(places.values())
    for t in trained:
        t.turn = Turn(order, count, places[t.name])
    note = ", what lies outside of the stack being the last" if outside else ""
    return [f"blocks={order}: each step moves one of {count} blocks{note}"]


def places_of(model: nn.Module, names: Sequence[str], order: str) -> tuple[dict[str, int], bool]:
    """Return (the block of each tensor, counted from 0, and whether the last one lies outside of the stack).

    Raises UserError as `give_turns` does.
    """
    from zoft.models.kind import blocks_of

    try:
        prefix, blocks = blocks_of(model)
    except UserError:
        raise UserError(f"blocks={order}: this model has no stack of blocks; use blocks=all") from None
    lies = {name: _index(name, prefix, len(blocks)) for name in names}
    found = sorted({*lies.values()})
    if len(found) < 2:
        raise UserError(
            f"blocks={order}: all that is trained lies in one block; use blocks=all, or train more"
        )
    return {name: found.index(i) for name, i in lies.items()}, len(blocks) in found


def _index(name: str, prefix: str, count: int) -> int:
    """Return the place of a tensor's block in the model's stack; `count` outside of it."""
    inside, _, rest = name.partition(f"{prefix}.")
    return int(rest.partition(".")[0]) if rest and not inside else count


def their_turn(t: Trained, updates: Sequence[Update]) -> list[Update]:
    """Return the updates (and moves in place) of the steps at which a tensor moves."""
    if t.turn is None:
        return [*updates]
    return [u for u in updates if t.turn.comes_at(u.seed, u.step)]


def seen_by(t: Trained, probes: Sequence[Probe], seed: int, step: int) -> list[Probe]:
    """Return a step's probes as a tensor has them: all at scale 0 where it is not its turn."""
    if t.turn is None or t.turn.comes_at(seed, step):
        return [*probes]
    return [p._replace(scale=0.0) for p in probes]
