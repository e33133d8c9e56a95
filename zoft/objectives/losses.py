"""Compute what is minimised: cross-entropy over candidates, or the loss of target tokens; from forward passes only.

Every quantity is row-local, so that a batch repeated once a probe gives the losses of each probe by itself.
Only the positions that are scored reach the vocabulary, and log-probabilities are made in fp32 (fp64 for an
fp64 model) whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.data.example import Example
from zoft.models.head import project

CHUNK = 1 << 25  # logits that are in fp32 at one time: 128 MiB


@dataclass
class Batch:
    """Hold rows of token ids and where they are scored.

    inputs: input_ids and attention_mask, each int64 [R, T], padded on the right.
    positions: int64 [N], flat indices row·T + t; the logits at t score token t + 1 (at a mask: what fills it). In the
        order of the rows.
    targets: int64 [N], the token scored at each position.
    slots: int64 [E, C, L], which of the N belong to candidate c of example e; -1 where there is none. An
        example with fewer than C candidates has no slot for the last ones.
    gold: int64 [E]. objective: "choice" | "lm" (then C = 1: the gold completion only).
    reference: fp64 [E, 2], what a reference model says of both answers of a pair (objectives.preference), or None.
    tokens: int64 [C] where each candidate is one token and R = N = E (position e scores them all), or None.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor
    slots: Tensor
    gold: Tensor
    objective: str
    tokens: Tensor | None = None
    reference: Tensor | None = None

    @property
    def examples(self) -> int:
        return self.gold.shape[0]

    @property
    def rows(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def repeat(self, probes: int) -> Batch:
        """Return the batch once per probe, probe-major: rows [p·R : (p+1)·R] belong to probe p."""
        if probes == 1:
            return self
        cells, scored = self.inputs["input_ids"].numel(), self.positions.numel()
        probe = torch.arange(probes, device=self.positions.device)
        positions = (self.positions + probe[:, None] * cells).flatten()  # [P·N]
        slots = self.slots + (probe * scored)[:, None, None, None]  # [P, E, C, L]
        slots = torch.where(self.slots < 0, -1, slots).flatten(0, 1)
        inputs = {k: v.repeat(probes, *[1] * (v.dim() - 1)) for k, v in self.inputs.items()}
        return replace(
            self,
            inputs=inputs,
            positions=positions,
            targets=self.targets.repeat(probes),
            slots=slots,
            gold=self.gold.repeat(probes),
            reference=None if self.reference is None else self.reference.repeat(probes, 1),
        )

    def widened(self, columns: int) -> Batch:
        """Return the batch with that many more columns of padding on the right."""
        width = self.inputs["input_ids"].shape[1]
        inputs = {k: F.pad(v, (0, columns)) for k, v in self.inputs.items()}
        return replace(self, inputs=inputs, positions=self.positions + self.positions // width * columns)

    def unmasked(self) -> Batch:
        """Return the batch without its attention mask: the same losses where no token sees what is to its right (padding is)."""
        return replace(self, inputs={k: v for k, v in self.inputs.items() if k != "attention_mask"})

    def to(self, device: torch.device | str) -> Batch:
        moved: Any = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, inputs={k: v.to(device) for k, v in self.inputs.items()}, **moved)


def collate(examples: Sequence[Example], pad: int = 0, even: bool = False) -> Batch:
    """Put examples into one right-padded batch.

    One row an example where all candidates are single tokens after one context; else one row a candidate;
    with the "lm" objective one row an example, its gold completion, of which `scored` tokens count.
    examples: E of one objective. pad: the id written into padding, which the mask hides. even: all examples have as many
    rows and scored positions: those of a shorter one are repeated, and count for nothing. Returns a Batch on the CPU.
    """
    objective = examples[0].objective
    assert all(e.objective == objective for e in examples), "a batch has one objective"
    first = examples[0].completions
    narrow = objective == "choice" and all(e.single and e.completions == first for e in examples)
    tokens = torch.tensor([c[0] for c in first]) if narrow else None
    rows: list[tuple[int, ...]] = []
    spans: list[list[tuple[int, int]]] = []  # (position, the token scored there) of each row
    owners: list[list[int]] = []  # spans of each example, one a candidate
    for e in examples:
        chosen = [e.gold] if narrow or objective == "lm" else range(len(e.completions))
        owners.append([])
        for c in chosen:
            context, completion = e.contexts[c], e.completions[c]
            owners[-1].append(len(rows))
            # The last scored token itself need not be read.
            rows.append(context + completion[:-1] + e.after)
            scored_at = zip(range(len(context) - 1, len(context) + len(completion) - 1), completion)
            spans.append(list(scored_at if e.scored is None else compress(scored_at, e.scored)))
    extra: list[int] = [0] * len(rows)  # scored once more at the end of each row, for nothing
    if even:
        rows, spans, owners, extra = _evened(rows, spans, owners)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    positions: list[int] = []
    targets: list[int] = []
    starts: list[int] = []
    for r, (row, span, more) in enumerate(zip(rows, spans, extra, strict=True)):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = 1
        starts.append(len(positions))
        positions += [r * width + at for at, _ in span] + [r * width] * more
        targets += [token for _, token in span] + [0] * more
    deep = max(map(len, spans))
    slots = torch.full((len(examples), max(map(len, owners)), deep), -1)
    for i, owned in enumerate(owners):
        for c, r in enumerate(owned):
            n = len(spans[r])
            slots[i, c, :n] = torch.arange(starts[r], starts[r] + n)
    gold = torch.tensor([0 if objective == "lm" else e.gold for e in examples])
    inputs = {"input_ids": ids, "attention_mask": mask}
    said = [e.reference for e in examples]
    reference = torch.tensor(said, dtype=torch.float64) if all(said) else None
    return Batch(
        inputs, torch.tensor(positions), torch.tensor(targets), slots, gold, objective, tokens, reference
    )


def _evened(rows: list, spans: list, owners: list[list[int]]) -> tuple[list, list, list, list]:
    """Return (rows, spans, owners, extra) in which every example has as many rows and scored positions.

    A short example's last row is repeated with no span, and `extra` positions of its last row have no slot.
    """
    most = max(map(len, owners))
    scored = [sum(len(spans[r]) for r in owned) for owned in owners]
    all_rows: list = []
    all_spans: list = []
    all_owners: list[list[int]] = []
    extra: list[int] = []
    for owned, n in zip(owners, scored):
        start, idle = len(all_rows), most - len(owned)
        all_owners.append(list(range(start, start + len(owned))))
        all_rows += [rows[r] for r in owned] + [rows[owned[-1]]] * idle
        all_spans += [spans[r] for r in owned] + [[]] * idle
        extra += [0] * (most - 1) + [max(scored) - n]
    return all_rows, all_spans, all_owners, extra


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss sums and counts of each example; the batch's loss is Σ sums / Σ counts.

    choice: s_c = mean_i log p(token i of candidate c), sum = -log softmax(s)[gold], count = 1.
    lm: sum = -Σ_i log p(target i), count = number of target tokens.
    batch: E examples, on the model's device. Returns (sums [E], counts [E]), fp32 (fp64 for an fp64 model).
    Source: MeZO (arXiv 2305.17333), its option loss and its language-model loss on option tokens.
    """
    if batch.objective == "choice":
        sums = F.cross_entropy(scores(model, batch), batch.gold, reduction="none")  # [E]
        return sums, torch.ones_like(sums)
    total, count = _per_slot(model, batch)
    return -total[:, 0], count[:, 0]


def mean_loss(totals: Tensor) -> Tensor:
    """Return [P] from totals [P, 2] over examples: the sum of what each has, over their number."""
    return totals[:, 0] / totals[:, 1]


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """Score of each candidate: mean_i log p(token i | what stands before it).

    Single-token candidates are scored by their logits: this leaves out the log of the normaliser, which all
    candidates of an example share, so softmax, argmax and differences over candidates are unchanged.
    batch: E examples of the "choice" objective. Returns [E, C] fp32 (fp64 for an fp64 model), -inf where an
    example has no such candidate.
    """
    if batch.tokens is not None:
        return _wide(project(model, batch.inputs, batch.positions, batch.tokens))
    total, count = _per_slot(model, batch)
    return (total / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


def log_sums(model: nn.Module, batch: Batch) -> Tensor:
    """Return Σ_i log p(token i of candidate c) [E, C], fp32 (fp64 for an fp64 model)."""
    return _per_slot(model, batch)[0]


def _per_slot(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(Σ log p over the slots, number of slots), each [E, C]; summed along slots, so always in one order."""
    logp = target_logprobs(project(model, batch.inputs, batch.positions), batch.targets)  # [N]
    padded = torch.cat([logp, logp.new_zeros(1)])  # slot -1 reads the zero
    return padded[batch.slots].sum(-1), (batch.slots >= 0).sum(-1).to(logp.dtype)


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target] per row, in fp32, at most CHUNK logits in fp32 at once.

    logits: [N, V], any float. targets: int64 [N]. Returns [N] fp32 (fp64 for fp64 logits).
    """
    step = max(1, CHUNK // logits.shape[1])
    parts = []
    for part, target in zip(logits.split(step), targets.split(step)):
        part = _wide(part)
        parts.append(part.gather(1, target[:, None])[:, 0] - part.logsumexp(1))
    return torch.cat(parts)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
