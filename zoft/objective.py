"""What is minimised: cross-entropy over candidates, or the loss of target tokens; from forward passes only.

Every quantity is row-local, so that a batch repeated once a probe gives the losses of each probe by itself.
Only the positions that are scored reach the vocabulary, and log-probabilities are made in fp32 (fp64 for an
fp64 model) whatever the model computes in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft import model_calls
from zoft.encode import Example, encode
from zoft.show import show

__all__ = ["Batch", "Example", "collate", "encode", "losses", "mean", "project", "scores", "show"]

CHUNK = 1 << 25  # logits that are in fp32 at one time: 128 MiB


@dataclass
class Batch:
    """Rows of token ids and where they are scored.

    inputs: input_ids and attention_mask, each int64 [R, T], padded on the right.
    positions: int64 [N], flat indices row·T + t; the logits at t score token t + 1 (at a mask: what fills it). In the
        order of the rows.
    targets: int64 [N], the token scored at each position.
    slots: int64 [E, C, L], which of the N belong to candidate c of example e; -1 where there is none. An
        example with fewer than C candidates has no slot for the last ones.
    gold: int64 [E]. objective: "choice" | "lm" (then C = 1: the gold completion only).
    tokens: int64 [C] where each candidate is one token and R = N = E (position e scores them all), or None.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor
    slots: Tensor
    gold: Tensor
    objective: str
    tokens: Tensor | None = None

    @property
    def examples(self) -> int:
        return self.gold.shape[0]

    @property
    def rows(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def repeat(self, probes: int) -> Batch:
        """The batch once a probe, probe-major: rows [p·R : (p+1)·R] belong to probe p."""
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
        )

    def widened(self, columns: int) -> Batch:
        """With that many more columns of padding on the right."""
        width = self.inputs["input_ids"].shape[1]
        inputs = {k: F.pad(v, (0, columns)) for k, v in self.inputs.items()}
        return replace(self, inputs=inputs, positions=self.positions + self.positions // width * columns)

    def unmasked(self) -> Batch:
        """Without the attention mask: the same losses where no token sees what is to its right (padding is)."""
        return replace(self, inputs={k: v for k, v in self.inputs.items() if k != "attention_mask"})

    def to(self, device: torch.device | str) -> Batch:
        moved: Any = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, inputs={k: v.to(device) for k, v in self.inputs.items()}, **moved)


def collate(examples: Sequence[Example], pad: int = 0) -> Batch:
    """Put examples into one right-padded batch.

    One row an example where all candidates are single tokens after one context; else one row a candidate;
    with the "lm" objective one row an example, its gold completion, of which `scored` tokens count.
    examples: E of one objective. pad: the id written into padding, which the mask hides. Returns a Batch on
    the CPU.
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
            said = zip(range(len(context) - 1, len(context) + len(completion) - 1), completion)
            spans.append(list(said if e.scored is None else compress(said, e.scored)))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    positions: list[int] = []
    targets: list[int] = []
    starts: list[int] = []
    for r, (row, span) in enumerate(zip(rows, spans)):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = 1
        starts.append(len(positions))
        positions += [r * width + at for at, _ in span]
        targets += [token for _, token in span]
    deep = max(map(len, spans))
    slots = torch.full((len(examples), max(map(len, owners)), deep), -1)
    for i, owned in enumerate(owners):
        for c, r in enumerate(owned):
            n = len(spans[r])
            slots[i, c, :n] = torch.arange(starts[r], starts[r] + n)
    gold = torch.tensor([0 if objective == "lm" else e.gold for e in examples])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Batch(inputs, torch.tensor(positions), torch.tensor(targets), slots, gold, objective, tokens)


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss sums and counts of each example; the batch's loss is Σ sums / Σ counts.

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


def mean(totals: Tensor) -> Tensor:
    """[P] from totals [P, 2] over examples: the sum of what each has, over their number."""
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


def _per_slot(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(Σ log p over the slots, number of slots), each [E, C]; summed along slots, so always in one order."""
    logp = target_logprobs(project(model, batch.inputs, batch.positions), batch.targets)  # [N]
    padded = torch.cat([logp, logp.new_zeros(1)])  # slot -1 reads the zero
    return padded[batch.slots].sum(-1), (batch.slots >= 0).sum(-1).to(logp.dtype)


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] a row, in fp32, at most CHUNK logits in fp32 at once.

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


def project(
    model: nn.Module, inputs: dict[str, Tensor], positions: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Logits at some positions only: hidden states are gathered before they meet the vocabulary.

    The output embedding gets a hook for this call that turns hidden states [R, T, H] into [N, H]. A model
    without an output embedding, or one that does not call it, makes all its logits and they are gathered.
    With tokens, an nn.Linear head with its own forward multiplies by those C rows of its weight only; a
    replaced forward with `accepts_tokens = True` is given `tokens=`; any other makes V columns, C are kept.

    inputs: each [R, T]. positions: int64 [N], row·T + t, in the order of the rows. tokens: int64 [C] or None.
    Returns [N, V] or [N, C] in the dtype of the model's logits.
    """
    rows, width = inputs["input_ids"].shape
    if front := prompt_columns(model):
        positions = positions + (positions // width + 1) * front
        width += front
    head = head_of(model)
    narrow = tokens is not None and head is not None and _narrows(head)
    extra = {"use_cache": False} if model_calls.takes(model, "use_cache") else {}
    seen = [0]
    with ExitStack() as stack:
        stack.enter_context(uncached(model))
        if model_calls.puts_before(model):
            # peft makes the mask of a prefix on the default device, and a copy from the CPU cannot be captured.
            stack.enter_context(inputs["input_ids"].device)
        if head is not None:
            stack.enter_context(_gathering(head, seen, rows, width, positions))
        if narrow and tokens is not None:
            stack.enter_context(_narrowed(head, tokens))
        output = model(**inputs, **extra)
    logits = output.logits if hasattr(output, "logits") else output[0]
    if seen[0] == 0:  # nobody gathered
        assert logits.shape[:2] == (rows, width), f"logits {tuple(logits.shape)} for [{rows}, {width}] tokens"
        logits = logits.flatten(0, 1).index_select(0, positions)
    if tokens is not None and not narrow:
        logits = logits.index_select(1, tokens)
    columns = logits.shape[-1] if tokens is None else len(tokens)
    assert logits.shape == (len(positions), columns), (
        f"logits {tuple(logits.shape)}, not ({len(positions)}, {columns}); rows gathered: {seen[0]} of {rows}"
    )
    return logits


@contextmanager
def _gathering(head: nn.Module, seen: list[int], rows: int, width: int, positions: Tensor) -> Iterator[None]:
    """For the time of one forward the head sees [N, H]; seen[0] counts the rows that came by.

    A model that runs its rows in several equal goes (one probe at a time) calls its head once a go, and each
    go has its equal share of the positions.
    """

    def gather(module: nn.Module, args: tuple) -> tuple | None:
        flat = args[0].flatten(0, -2)  # [r·T, H]
        r = flat.shape[0] // width
        if flat.shape[0] != r * width or r == 0 or rows % r or len(positions) * r % rows:
            return None
        start, n = seen[0], len(positions) * r // rows
        seen[0] += r
        mine = positions if r == rows else positions[start * n // r :][:n] - start * width
        return (flat.index_select(0, mine), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _narrowed(head: Any, tokens: Tensor) -> Iterator[None]:
    """For the time of one forward the head makes the columns `tokens` only."""
    replaced = head.__dict__.get("forward")

    def few(x: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias[tokens]
        return F.linear(x, head.weight[tokens], bias)

    # Set in __dict__, as every instance's replaced forward is: nn.Module calls it after its hooks.
    head.__dict__["forward"] = few if replaced is None else functools.partial(replaced, tokens=tokens)
    try:
        yield
    finally:
        if replaced is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = replaced


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """For the time of one forward no config asks for a key-value cache: not every model's head takes `use_cache`."""
    configs = [m.__dict__["config"] for m in model.modules() if "config" in m.__dict__]
    parts = [
        part
        for c in {id(c): c for c in configs}.values()
        for part in (c, *getattr(c, "__dict__", {}).values())
    ]
    asking = [c for c in parts if getattr(c, "use_cache", None) is True]
    try:
        for c in asking:
            c.use_cache = False
        yield
    finally:
        for c in asking:
            c.use_cache = True


def _narrows(head: nn.Module) -> bool:
    replaced = head.__dict__.get("forward")
    if replaced is not None:
        return getattr(replaced, "accepts_tokens", False)
    return type(head) is nn.Linear


def head_of(model: Any) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def prompt_columns(model: Any) -> int:
    """Columns that the model itself puts in front of each row of hidden states: its prompt."""
    settings: Any = getattr(model, "active_peft_config", None)
    return settings.num_virtual_tokens if getattr(settings, "peft_type", "") == "PROMPT_TUNING" else 0
