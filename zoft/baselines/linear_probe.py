"""Linear probe: logistic regression on the hidden state that the output matrix reads at a prompt's last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoft.baselines.ask import adjusted
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.evaluation import evaluate
from zoft.evaluation.evaluate import Judged, room_of
from zoft.models.head import head_of, project
from zoft.models.kind import refuse_longer_rows
from zoft.objectives.losses import collate

GRID = tuple(10.0**k for k in range(-4, 3))  # of C
HELD = 0.2  # share of the training rows that C is chosen on


def features(model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
    """Return [n, H] fp64: what the output matrix is given at the last token of each prompt (at the mask of a masked model)."""
    refuse_longer_rows(model, max(e.length for e in examples))
    head = head_of(model)
    if head is None:
        raise UserError("--method linear-probe: this model has no output matrix to read features before")
    device, seen = next(model.parameters()).device, []
    handle = head.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )  # before project's own hook

    @torch.no_grad()
    def outputs(some: Sequence[Example]) -> tuple[Tensor]:
        batch = collate(some).to(device)
        project(model, batch.inputs, batch.positions, batch.tokens)
        return (seen.pop().flatten(0, -2).index_select(0, batch.positions),)

    from dataclasses import replace

    rows = [
        replace(
            e, objective="choice", contexts=e.contexts[:1], completions=e.completions[:1], gold=0, single=True
        )
        for e in examples
    ]
    rows = [replace(e, completions=((0,),)) for e in rows]  # one position a row, whatever the candidates are
    try:
        return evaluate._in_batches(rows, outputs, room_of(next(model.parameters()).device))[0].numpy()
    finally:
        handle.remove()


def fit_linear_probe(
    model: nn.Module, train: Sequence[Example], held_out: Sequence[Example], classes: int, seed: int
) -> dict[str, Any]:
    """Return {C, forwards, after}: standardised features, L2 penalty, C by the log loss of a fifth of the training rows.

    After C is chosen all training rows are fitted. The evaluation rows are looked at once, at the end.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = features(model, train), np.array([e.gold for e in train])
    if len(set(y.tolist())) < 2:
        raise UserError("--method linear-probe: all training rows have one label")

    def fitted(c: float, at: Any) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x[at], y[at])

    stratify = y if np.unique(y, return_counts=True)[1].min() > 1 and HELD * len(y) >= classes else None
    inner, chosen = train_test_split(np.arange(len(y)), test_size=HELD, random_state=seed, stratify=stratify)
    if len(set(y[inner].tolist())) < 2:
        raise UserError(
            f"--method linear-probe: {len(y)} training rows are too few to choose C on a fifth of them"
        )
    losses = {c: log_loss(log_probabilities(fitted(c, inner), x[chosen], classes), y[chosen]) for c in GRID}
    best = min(GRID, key=lambda c: losses[c])
    logp = log_probabilities(fitted(best, np.arange(len(y))), features(model, held_out), classes)
    gold = np.array([e.gold for e in held_out])
    judged = Judged(
        gold,
        [(int(g),) for g in gold],
        scores=logp,
        bias=np.zeros(classes),
        majority=int(np.bincount(y).argmax()),
    )
    return {"C": best, "forwards": len(train), "after": adjusted(judged)}


def log_probabilities(model: Any, x: np.ndarray, classes: int) -> np.ndarray:
    """Return [n, classes]; a class that no training row has gets e^-30."""
    out = np.full((len(x), classes), -30.0)
    out[:, model.classes_] = np.maximum(model.predict_log_proba(x), -30.0)
    return out


def log_loss(logp: np.ndarray, gold: np.ndarray) -> float:
    return float(-logp[np.arange(len(gold)), gold].mean())
