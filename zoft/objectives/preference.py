"""Learn from pairs of answers, one of them preferred, against the model that the run starts from.

    margin = beta · [(log π(y⁺|x) - log π₀(y⁺|x)) - (log π(y⁻|x) - log π₀(y⁻|x))]
    loss   = -log σ(margin)

log π is the sum over an answer's tokens, in fp32 whatever the model computes in. π₀, the reference, is the run's base (its adapter as
it starts, if it trains one): its sums are computed once, before training, and kept with each pair, so that no second model is held.
Source: Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290). No deviations: no smoothing, no length
normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.data.encode import encode
from zoft.data.example import Example
from zoft.data.tasks import TaskData
from zoft.objectives.losses import Batch, collate, log_sums

Context = Callable[[int], AbstractContextManager]
TOKENS = 8192  # of a batch of pairs that are only scored, at most


def margins(model: nn.Module, batch: Batch, beta: float) -> Tensor:
    """Return the margin of each pair [E], fp32 (fp64 for an fp64 model)."""
    assert batch.reference is not None, "pairs without their reference"
    sums = log_sums(model, batch)  # [E, 2]: chosen, rejected
    gained = sums - batch.reference.to(sums.dtype)
    return beta * (gained[:, 0] - gained[:, 1])


def preference_losses(model: nn.Module, batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """Return (-log σ(margin) [E], ones)."""
    found = -F.logsigmoid(margins(model, batch, beta))
    return found, torch.ones_like(found)


@dataclass
class Pairs:
    """Hold the pairs of a run: their references, and how the weights judge held-out ones.

    references: (log π₀ of the chosen, of the rejected answer) of each pair that was met.
    """

    beta: float
    data: TaskData
    tokenizer: Any
    max_length: int
    device: str
    references: dict[Example, tuple[float, float]] = field(default_factory=dict)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the columns that a trainer adds up."""
        return preference_losses(model, batch, self.beta)

    @torch.no_grad()
    def meet(self, model: nn.Module, examples: Sequence[Example], context: Context) -> int:
        """Keep the references of examples, at the weights as they are; returns how many were computed."""
        new = list(dict.fromkeys(e for e in examples if e not in self.references))
        for part in _batches(new):
            batch = collate(part).to(self.device)
            with context(batch.rows):
                sums = log_sums(model, batch).double().cpu()
            for e, (chosen, rejected) in zip(part, sums.tolist(), strict=True):
                self.references[e] = chosen, rejected
        return len(new)

    def with_reference(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples with what the reference says of them, where it was asked."""
        return [replace(e, reference=self.references.get(e, ())) for e in examples]

    @torch.no_grad()
    def evaluate(self, model: Any, context: Context, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return {preference_loss, preference_accuracy: share of margins above 0, preference_margin: their mean}."""
        examples = self.with_reference(
            encode([dict(row) for row in rows], self.tokenizer, self.data, self.max_length)
        )
        found = []
        for part in _batches(examples):
            batch = collate(part).to(self.device)
            with context(batch.rows):
                found.append(margins(model, batch, self.beta).double().cpu())
        m = torch.cat(found)
        return {
            "preference_loss": float(-F.logsigmoid(m).mean()),
            "preference_accuracy": float((m > 0).double().mean()),
            "preference_margin": float(m.mean()),
        }


def _batches(examples: Sequence[Example]) -> list[list[Example]]:
    """Return examples by length, at most TOKENS a batch."""
    found: list[list[Example]] = []
    for e in sorted(examples, key=lambda e: -e.length):
        if not found or (len(found[-1]) + 1) * 2 * found[-1][0].length > TOKENS:
            found.append([])
        found[-1].append(e)
    return found
