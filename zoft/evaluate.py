"""How good a model is at a task, beside what it would score without knowing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from zoft.encode import Example
from zoft.metrics import auc, macro_f1
from zoft.objective import collate, losses, scores

TOKENS = 8192  # a batch's rows × width at most
CALIBRATION = 128  # training inputs that the label bias is measured on


def evaluate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    train: Sequence[Example],
    *,
    context: Callable[[int], AbstractContextManager] | None = None,
) -> dict[str, float]:
    """Score a model on held-out examples.

    choice: {accuracy, macro_f1, auc (two labels), calibrated_accuracy, majority, loss, n}. The prediction is the
    candidate of highest score. auc ranks by the difference of the two scores, so that no threshold or label bias
    enters it. calibrated_accuracy first takes each label's bias off: the mean of log softmax(scores) over 128
    fixed training inputs, whose labels are not looked at. majority is the accuracy of always answering the
    training set's commonest label. Where examples have different numbers of candidates, only accuracy, loss, n.
    lm: {loss (a token), perplexity, tokens, n}.

    examples, train: as encode() gives them. context(rows): entered around each forward. Evaluation is
    deterministic: batches are made by length, and no random number is drawn.
    Source of the calibration: Zhao et al., Calibrate Before Use (arXiv 2102.09690), with training inputs for
    content-free ones.
    """
    assert examples, "nothing to evaluate"
    if examples[0].objective == "lm":
        sums, counts = _run(model, examples, losses, context)
        loss = sum(sums) / sum(counts)
        tokens = int(sum(counts))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens, "n": len(examples)}
    gold = np.array([e.gold for e in examples])  # [n]
    found = _scores(model, examples, context)  # [n, C]
    predicted = found.argmax(1)
    logp = _log_softmax(found)
    result: dict[str, Any] = {"accuracy": float((predicted == gold).mean())}
    if len({len(e.completions) for e in [*examples, *train]}) == 1:
        result["macro_f1"] = macro_f1(gold, predicted)
        if found.shape[1] == 2 and len(set(gold.tolist())) == 2:
            result["auc"] = auc(gold == 1, logp[:, 1] - logp[:, 0])
        bias = _log_softmax(_scores(model, spread(train, CALIBRATION), context)).mean(0)  # [C]
        result["calibrated_accuracy"] = float(((logp - bias).argmax(1) == gold).mean())
        commonest = np.bincount([e.gold for e in train]).argmax()
        result["majority"] = float((gold == commonest).mean())
    result["loss"] = float(-logp[np.arange(len(gold)), gold].mean())
    result["n"] = len(examples)
    return result


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """n examples (or all) at even distances: always the same ones."""
    if n >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


def _scores(model: torch.nn.Module, examples: Sequence[Example], context: Any) -> np.ndarray:
    """[n, C] fp64, -inf where an example has no such candidate or its score is NaN."""
    most = max(len(e.completions) for e in examples)

    def padded(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor]:
        s = scores(model, batch).double()
        return (torch.nn.functional.pad(s, (0, most - s.shape[1]), value=-math.inf),)

    found = np.array(_run(model, examples, padded, context)[0])
    return np.nan_to_num(found, nan=-np.inf, posinf=np.inf, neginf=-np.inf)


@torch.no_grad()
def _run(model: torch.nn.Module, examples: Sequence[Example], forward: Callable, context: Any) -> list[list]:
    """The outputs of forward(model, batch), [E, …] each, of all examples in their own order."""
    device = next(model.parameters()).device
    order: list[int] = []
    parts: list[tuple] = []
    for chosen in _batches(examples):
        batch = collate([examples[i] for i in chosen]).to(device)
        with context(batch.rows) if context else nullcontext():
            parts.append(tuple(out.cpu() for out in forward(model, batch)))
        order += chosen
    back = torch.tensor(order).argsort()
    return [torch.cat(column)[back].tolist() for column in zip(*parts)]


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Indices by length, the longest first (memory runs out at once or never), at most TOKENS a batch."""
    rows = [1 if e.single or e.objective == "lm" else len(e.completions) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].length, i))
    while order:
        width, take, total = examples[order[0]].length, 0, 0
        while take < len(order) and (take == 0 or (total + rows[order[take]]) * width <= TOKENS):
            total += rows[order[take]]
            take += 1
        yield order[:take]
        order = order[take:]


def _log_softmax(found: np.ndarray) -> np.ndarray:
    """[n, C] log-probabilities over candidates; a row of -inf throughout stays one."""
    top = found.max(1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return found - top - np.log(np.exp(found - top).sum(1, keepdims=True))
