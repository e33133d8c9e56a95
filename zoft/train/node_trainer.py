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
    """Hold one microbatch: its rows, and what the noise of each of their tokens is drawn by.

    cells: how many tokens there is room for where shapes are few.
    """

    batch: Batch
    tokens: Tokens
    cells: int = 0


def rows_with_tokens(
    examples: Sequence[Example],
    picks: Sequence[int],
    device: str,
    few_shapes: bool = False,
    before: int | str = "all",
) -> Rows:
    """Return a microbatch of examples, whose places in the training set are `picks`.

    before: which tokens have noise, as in `tokens_of`.
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
    places = [picks[i] for i in owners]
    tokens = tokens_of(batch.inputs, owners, places, candidates, shared, batch.positions, before)
    return Rows(batch.to(device), tokens.to(device), _cells(batch, len(tokens.places), before))


def _cells(batch: Batch, tokens: int, before: int | str) -> int:
    """Return how many tokens to make room for, so that few different numbers come up."""
    width = batch.inputs["input_ids"].shape[1]
    each = -(-tokens // batch.rows)  # of a row, on average
    if before == "all":
        each = width
    else:
        each = int(before) if each <= int(before) else -(-each // 8) * 8
    return batch.rows * min(each, width)


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
            last[step] = [
                rows_with_tokens([train[i] for i in p], p, device, few_shapes, config.node_tokens)
                for p in found
            ]
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
        whole: Callable[[int], Sequence[Rows]], *, keeps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, axis, batches, ledger, settings, forward)  # type: ignore[arg-type]
        self.nodes, self.whole = axis, whole
        self.keeps = keeps
        self.kept: dict[
            int, dict[str, torch.Tensor]
        ] = {}  # of each microbatch of the step whose probes were run last
        self.kept_at = -1

    def own_sums_at(self, step: int, probes: Sequence[Sequence[Probe]], batch: Any) -> torch.Tensor:
        """Return [P, E, 2]: loss sum and count of each example of a microbatch at ± its own signs, probes [P][E]."""
        each = [some[0] for some in probes]  # all examples of a probe have its scale
        self.nodes.tokens = batch.tokens
        if self.keeps:
            if self.kept_at != step:
                self.kept, self.kept_at = {}, step
            self.nodes.keeping = self.kept.setdefault(self.place(step, batch), {})
        try:
            with self.nodes.at(step, each, batch.batch.rows):
                sums, counts = self.forward(self.model, batch.batch.repeat(len(each)))  # [P·E] each
        finally:
            self.nodes.tokens = self.nodes.keeping = None
        self.forwards += batch.batch.examples * len(each)
        return torch.stack([sums, counts], -1).view(len(each), -1, 2).double().cpu()

    def place(self, step: int, batch: Any) -> int:
        """Return which of its step's microbatches this one is."""
        return [rows is batch for rows in self.batches(step)].index(True)

    def ask_again(self, step: int) -> None:
        """Run a step's probes for what they leave: the inputs that are kept. A repeated step has its losses in the ledger."""
        counted = self.forwards
        self.own_losses_at(step, self.probes, self.batches(step))
        self.forwards = counted

    def commit(self, change: Update) -> None:
        """Run the update pass of a step that is written down, or move by what its probes have left."""
        rows = self.whole(change.step)
        if self.keeps:
            if self.kept_at != change.step:
                self.ask_again(change.step)
            self.nodes.update_kept(change, [(self.kept[i], r.tokens) for i, r in enumerate(rows)])
            self.kept = {}
            return
        self.nodes.update(change, [(r.batch.inputs, r.tokens) for r in rows])
        self.forwards += sum(r.batch.examples for r in rows)
