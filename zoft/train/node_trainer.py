"""Steps of node perturbation: losses of each example at ± its own signs, then an update pass over the step's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.ledger.log import Ledger
from zoft.method.estimators.estimator import Probe
from zoft.noise.nodes import Tokens
from zoft.noise.spec import Update
from zoft.objectives.losses import Batch, collate
from zoft.parallel.world import this_world
from zoft.probe.nodes import NodeAxis, tokens_of
from zoft.train.batches import bucket, picked
from zoft.train.trainer import Settings, Trainer


@dataclass(frozen=True)
class Rows:
    """Hold one microbatch: its rows, and what the noise of each of their tokens is drawn by."""

    batch: Batch
    tokens: Tokens


def rows_with_tokens(
    examples: Sequence[Example], picks: Sequence[int], device: str, few_shapes: bool = False
) -> Rows:
    """Return a microbatch of examples, whose places in the training set are `picks`.

    few_shapes: padded to one of a few shapes, as steps that are captured want it.
    """
    batch = collate(examples)
    lone = batch.rows == len(examples)
    owners: list[int] = []  # of each row
    candidates: list[int] = []
    shared: list[int] = []
    for i, e in enumerate(examples):
        rows = [a + b for a, b in zip(e.contexts, e.completions, strict=True)]
        count = 1 if lone else len(rows)
        owners += [i] * count
        candidates += range(count)
        shared += [common_tokens(rows) if count > 1 else max(map(len, rows)) + len(e.after)] * count
    assert len(owners) == batch.rows, (len(owners), batch.rows)
    batch = bucket(batch) if few_shapes else batch
    tokens = tokens_of(batch.inputs, owners, [picks[i] for i in owners], candidates, shared)
    return Rows(batch.to(device), tokens.to(device))


def common_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows)) if len({*column}) > 1), min(map(len, rows)))


def node_rows_of(
    config: Config, train: Sequence[Example], mine: bool, device: str, few_shapes: bool = False
) -> Callable[[int], list[Rows]]:
    """Return step -> its microbatches on a device; mine: this process's examples alone. The last step's are kept."""
    share = this_world().examples if mine else lambda picks: picks
    last: dict[int, list[Rows]] = {}

    def at(step: int) -> list[Rows]:
        if step not in last:
            found = [list(share(picks)) for picks in picked(config, len(train), step)]
            last.clear()
            last[step] = [rows_with_tokens([train[i] for i in p], p, device, few_shapes) for p in found]
        return last[step]

    return at


class NodeTrainer(Trainer):
    """Train by node perturbation; see probe.nodes for what a step is.

    The ledger has a coefficient for each example and the learning rate apart, since Ĝ / rms(Ĝ) has no scale. The weights
    follow from these and the data: an update is repeated by repeating its update pass. Of several processes each evaluates
    its share of the probes, and each runs the update pass over all rows of the step: only losses travel.
    whole(step) -> the microbatches of all processes.
    """

    lr_apart = True

    def __init__(
        self, model: nn.Module, axis: NodeAxis, batches: Callable[[int], Sequence[Any]], ledger: Ledger | None,
        settings: Settings, forward: Callable[[nn.Module, Batch], tuple[torch.Tensor, ...]],
        whole: Callable[[int], Sequence[Rows]],
    ) -> None:  # fmt: skip
        super().__init__(model, axis, batches, ledger, settings, forward)  # type: ignore[arg-type]
        self.nodes, self.whole = axis, whole

    def own_sums_at(self, step: int, probes: Sequence[Sequence[Probe]], batch: Any) -> torch.Tensor:
        """Return [P, E, 2]: loss sum and count of each example of a microbatch at ± its own signs, probes [P][E]."""
        each = [some[0] for some in probes]  # all examples of a probe have its scale
        self.nodes.tokens = batch.tokens
        try:
            with self.nodes.at(step, each, batch.batch.rows):
                sums, counts = self.forward(self.model, batch.batch.repeat(len(each)))  # [P·E] each
        finally:
            self.nodes.tokens = None
        self.forwards += batch.batch.examples * len(each)
        return torch.stack([sums, counts], -1).view(len(each), -1, 2).double().cpu()

    def commit(self, change: Update) -> None:
        """Run the update pass of a step that is written down."""
        rows = self.whole(change.step)
        self.nodes.update(change, [(r.batch.inputs, r.tokens) for r in rows])
        self.forwards += sum(r.batch.examples for r in rows)
