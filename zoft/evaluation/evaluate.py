"""Evaluate a model on a task, beside what it would score without knowing anything."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoft.data.example import Example
from zoft.evaluation import prefix_cache
from zoft.evaluation.prefix_cache import Unusable, cached_tokens, common, fault, prepare
from zoft.models.kind import refuse_longer_rows
from zoft.objectives import losses as objective
from zoft.objectives.losses import Batch, collate, losses
from zoft.objectives.metrics import auc, exact_match, macro_f1, token_f1

TOKENS = 8192  # a batch's rows × width at most
CPU_TOKENS = 1024  # there: what lies between two layers of a small model then stays in the caches
CALIBRATION = 128  # training inputs that the label bias is measured on
RESAMPLES = 1000  # of the bootstrap

Context = Callable[[int], AbstractContextManager] | None
# (contexts) -> the texts that a model writes after them.
Write = Callable[[Sequence[tuple[int, ...]]], list[str]]


@dataclass
class Judged:
    """Hold what a model made of n examples; figures() sums it up.

    gold: int [n]. golds[i]: all right candidates of example i. scores: fp64 [n, C] for choice, -inf where there is no
    such candidate. bias: [C] of each label, or None where candidates differ in number. majority: the training set's
    commonest label. sums, counts: [n] loss and target tokens of text. texts, exact, f1: of generated text, or None.
    scored: {metric: [n]}, numbers of the texts whose means are metrics of their own (an objective's: zoft.objectives.objectives).
    """

    gold: np.ndarray
    golds: list[tuple[int, ...]]
    scores: np.ndarray | None = None
    bias: np.ndarray | None = None
    majority: int | None = None
    sums: np.ndarray | None = None
    counts: np.ndarray | None = None
    texts: list[str] | None = None
    exact: np.ndarray | None = None
    f1: np.ndarray | None = None
    scored: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def predicted(self) -> np.ndarray:
        """Return int [n]: the candidate of highest score."""
        assert self.scores is not None
        return self.scores.argmax(1)

    @property
    def right(self) -> np.ndarray:
        """Return bool [n]: the prediction is one of the right candidates; of generated text, an exact match."""
        if self.scores is None:
            return (np.zeros(len(self.gold)) if self.exact is None else self.exact) > 0
        return hits(self.predicted, self.golds)


def evaluate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    train: Sequence[Example],
    *,
    context: Context = None,
    write: Write | None = None,
) -> dict[str, Any]:
    """Score a model on held-out examples.

    choice: {accuracy, macro_f1, auc (two labels), calibrated_accuracy, majority, loss, n}. The prediction is the
    candidate of highest score; with several right candidates any of them is a hit. auc ranks by the difference of the
    two scores, so that no threshold or label bias enters it. calibrated_accuracy first takes each label's bias off: the
    mean of log softmax(scores) over 128 fixed training inputs, whose labels are not looked at. majority is the accuracy
    of always answering the training set's commonest label. Where examples have different numbers of candidates, or
    several right ones, only accuracy, loss, n.
    lm: {loss (a token), perplexity, tokens, n}; with answers and `write`, {exact_match, f1} of what it writes, first;
    where examples have several candidates, accuracy of the one of highest score, first.

    examples, train: as encode() gives them. context(rows): entered around each forward. Evaluation is
    deterministic: batches are made by length, and no random number is drawn.
    Source of the calibration: Zhao et al., Calibrate Before Use (arXiv 2102.09690), with training inputs for
    content-free ones.
    """
    return figures(judge_model(model, examples, train, context=context, write=write))


def judge_model(
    model: torch.nn.Module,
    examples: Sequence[Example],
    train: Sequence[Example],
    *,
    context: Context = None,
    write: Write | None = None,
) -> Judged:
    """Collect what evaluate() sums up: scores of each example, or its loss and what is written after its prompt."""
    assert examples, "nothing to evaluate"
    refuse_longer_rows(model, max(e.length for e in (*examples, *train)))
    gold = np.array([e.gold for e in examples])  # [n]
    golds = [e.golds or (e.gold,) for e in examples]
    if examples[0].objective == "lm":
        # Learned as text, judged by candidates: one pass for both. A row may have but one (ReCoRD's of one entity).
        if max(len(e.completions) for e in examples) > 1:
            total, count = totals(model, [replace(e, objective="choice") for e in examples], context)
            own = np.arange(len(gold)), gold
            means = np.where(count > 0, total / count.clip(1), -np.inf)
            found = Judged(gold, golds, scores=means, sums=-total[own], counts=count[own])
        else:
            sums, counts = _run(model, examples, losses, context)
            found = Judged(gold, golds, sums=sums.numpy(), counts=counts.numpy())
        if write is not None and all(e.answers for e in examples):
            found.texts = write([e.contexts[0] for e in examples])
            answers = [e.answers for e in examples]
            found.exact = np.array([exact_match(t, a) for t, a in zip(found.texts, answers)])
            found.f1 = np.array([token_f1(t, a) for t, a in zip(found.texts, answers)])
        return found
    found = Judged(gold, golds, scores=scores(model, examples, context))
    same = len({len(e.completions) for e in [*examples, *train]}) == 1
    if same and all(len(g) == 1 for g in golds) and not examples[0].paired:
        found.bias = label_bias(model, train, context)
        found.majority = int(np.bincount([e.gold for e in train]).argmax())
    return found


def figures(j: Judged, pick: np.ndarray | None = None) -> dict[str, Any]:
    """Return the metrics of evaluate(); pick: int [m], the examples they are of (all)."""
    at = np.arange(len(j.gold)) if pick is None else pick
    result: dict[str, Any] = {}
    own = {name: float(values[at].mean()) for name, values in j.scored.items()}
    if j.sums is not None:
        assert j.counts is not None
        if j.scores is not None:
            result["accuracy"] = float(np.mean(hits(j.scores[at].argmax(1), [j.golds[i] for i in at])))
        if j.exact is not None and j.f1 is not None:
            result |= {"exact_match": float(j.exact[at].mean()), "f1": float(j.f1[at].mean())}
        tokens = int(j.counts[at].sum())
        loss = float(j.sums[at].sum()) / tokens
        perplexity = math.exp(min(loss, 700.0))
        result |= {"loss": loss, "perplexity": perplexity, "tokens": tokens, "n": len(at)}
        return result | own
    assert j.scores is not None
    gold, logp = j.gold[at], log_softmax(j.scores[at])
    predicted = j.scores[at].argmax(1)
    result["accuracy"] = float(np.mean(hits(predicted, [j.golds[i] for i in at])))
    if j.bias is not None:
        result["macro_f1"] = macro_f1(gold, predicted)
        if logp.shape[1] == 2 and len(set(gold.tolist())) == 2:
            result["auc"] = auc(gold == 1, logp[:, 1] - logp[:, 0])
        result["calibrated_accuracy"] = float(((logp - j.bias).argmax(1) == gold).mean())
        result["majority"] = float((gold == j.majority).mean())
    result["loss"] = float(-logp[np.arange(len(gold)), gold].mean())
    result["n"] = len(at)
    return result | own


def bootstrap(
    j: Judged, *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> dict[str, list[float]]:
    """Return {metric: [low, high]}: the middle `level` of each metric over resamples of the examples, with replacement.

    The model, its label bias and the training set's commonest label are as they are: what varies is which examples were
    drawn. A resample in which a metric has no value (auc, of one label) is left out.
    Source: Efron's percentile interval.
    """
    rng, n = np.random.default_rng(seed), len(j.gold)
    drawn = [figures(j, rng.integers(0, n, n)) for _ in range(resamples)]
    names = [m for m in figures(j) if m not in ("n", "tokens", "majority")]
    ends = [50 * (1 - level), 50 * (1 + level)]
    return {m: np.percentile([d[m] for d in drawn if m in d], ends).tolist() for m in names}


def hits(predicted: np.ndarray, golds: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return bool [n]: which predictions are among the right candidates."""
    return np.array([p in g for p, g in zip(predicted.tolist(), golds)], dtype=bool)


def label_bias(model: torch.nn.Module, train: Sequence[Example], context: Context = None) -> np.ndarray:
    """Return [C]: mean log softmax(scores) of each label over 128 fixed training inputs."""
    return log_softmax(scores(model, spread(train, CALIBRATION), context)).mean(0)


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """Return n examples (or all) at even distances: always the same ones."""
    if n >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


def scores(model: torch.nn.Module, examples: Sequence[Example], context: Context = None) -> np.ndarray:
    """Return [n, C] fp64: mean log p of each candidate's tokens; -inf where there is no such candidate, or a NaN."""
    total, count = totals(model, examples, context)
    return total / count.clip(1)


def totals(
    model: torch.nn.Module, examples: Sequence[Example], context: Context = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (Σ log p over each candidate's tokens, their number): [n, C] fp64 each, -inf and 0 where there is no candidate.

    Single-token candidates have logits for log p: a constant an example apart. What rows share is computed once, where
    that pays and the model's cache gives the same scores as rows of their own (prefix_cache.py); a line says where it does not.
    """
    most = max(len(e.completions) for e in examples)

    def padded(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        total, count = (torch.nn.functional.pad(t.double(), (0, most - t.shape[1])) for t in pair)
        return total.masked_fill(count == 0, -math.inf), count

    def plain(some: Sequence[Example]) -> tuple[Tensor, Tensor]:
        batch = collate(some).to(next(model.parameters()).device)
        with context(batch.rows) if context else nullcontext():
            return _totals(model, batch)

    forward: Callable = lambda model, batch: padded(_totals(model, batch))  # noqa: E731
    front = common(examples)
    if prefix_cache.pays(examples, front):
        try:
            made = prepare(model, examples, front, context)
            why = fault(model, examples, plain, made, context)
            room = room_of(next(model.parameters()).device)
            room = room if why else min(room, cached_tokens(model, examples[0], context))
        except Unusable as error:
            why = str(error)
        if not why:
            found = _in_batches(
                examples, lambda some: padded(prefix_cache.totals(model, some, made, context)), room
            )
            return _filled(*found)
        _say(f"candidates are scored in rows of their own, prefixes are not shared: {why}")
    return _filled(*_run(model, examples, forward, context))


def _totals(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.tokens is not None:
        found = objective.scores(model, batch)
        return found, torch.ones_like(found)
    return objective._per_slot(model, batch)


def _filled(total: Tensor, count: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return np.nan_to_num(total.numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf), count.numpy()


@functools.cache
def _say(line: str) -> None:
    """A line for the reader, once a process."""
    print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def _run(
    model: torch.nn.Module, examples: Sequence[Example], forward: Callable, context: Context
) -> list[Tensor]:
    """The outputs of forward(model, batch), [E, …] each, of all examples in their own order."""
    device = next(model.parameters()).device

    def outputs(some: Sequence[Example]) -> tuple[Tensor, ...]:
        batch = collate(some).to(device)
        with context(batch.rows) if context else nullcontext():
            return tuple(forward(model, batch))

    return _in_batches(examples, outputs, room_of(device))


def room_of(device: torch.device | str) -> int:
    """Return the tokens of a batch there; no score depends on it but by rounding."""
    return min(TOKENS, CPU_TOKENS) if str(device).startswith("cpu") else TOKENS


def _in_batches(
    examples: Sequence[Example], outputs: Callable[[Sequence[Example]], tuple[Tensor, ...]], room: int
) -> list[Tensor]:
    """outputs(some examples), [E, …] each, of all examples in their own order, fp64 on the CPU."""
    order: list[int] = []
    parts: list[tuple] = []
    for chosen in _batches(examples, room):
        parts.append(tuple(out.double().cpu() for out in outputs([examples[i] for i in chosen])))
        order += chosen
    back = torch.tensor(order).argsort()
    return [torch.cat(column)[back] for column in zip(*parts)]


def _batches(examples: Sequence[Example], room: int) -> Iterator[list[int]]:
    """Indices by length, the longest first (memory runs out at once or never), at most `room` tokens a batch."""
    rows = [1 if e.single or e.objective == "lm" else len(e.completions) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].length, i))
    while order:
        width, take, total = examples[order[0]].length, 0, 0
        while take < len(order) and (take == 0 or (total + rows[order[take]]) * width <= room):
            total += rows[order[take]]
            take += 1
        yield order[:take]
        order = order[take:]


def log_softmax(found: np.ndarray) -> np.ndarray:
    """Return [n, C] log-probabilities over candidates; a row of -inf throughout stays one."""
    top = found.max(1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return found - top - np.log(np.exp(found - top).sum(1, keepdims=True))
