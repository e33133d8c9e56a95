"""Train by forward gradients: the exact slope of the loss along a random direction, in place of a difference of two losses.

    v ~ N(0, I);  d = ∇L(θ)·v;  θ ← θ - lr·(d·v + weight_decay·θ)

It is MeZO's step without eps: what is left of its error when the loss's slope along z is known to the last bit. d is a Jacobian-vector
product (torch.func.jvp): one pass that carries a tangent beside every activation, so it counts as 2 forwards, and v is kept
for all trained numbers. v is the noise that a MeZO run of the same seed has (zoft.noise, gaussian), and batches come in the same order.
For the bench only: weights stay in fp32, nothing is in a ledger. Attention runs by plain matrix products, as fused kernels carry no tangents.
Source: Baydin et al. 2022, Gradients without Backpropagation (arXiv 2202.08587), as Forward-Grad in ZO-Bench (Zhang et al. 2024, arXiv
2402.11592). Deviations: the model is in evaluation mode (their forward path leaves dropout on); no decay of biases and norms.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.evaluation import evaluate
from zoft.method.space import Trained, adopt, train_names
from zoft.method.updates import lr_at
from zoft.models.quant.linear import quantised_layers
from zoft.noise import noise
from zoft.noise.spec import GAUSSIAN
from zoft.objectives.losses import Batch, losses
from zoft.train.batches import batches_of

FORWARDS = 2  # that a Jacobian-vector product counts as


class _Sums(nn.Module):
    """The loss sum and the count of a batch, as one module that parameters can be swapped in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums, counts = losses(self.model, batch)
        return sums.sum(), counts.sum()


def directional_derivative(
    model: nn.Module, trained: Sequence[Trained], v: Sequence[Tensor], batches: Sequence[Batch]
) -> tuple[float, float]:
    """Return (the loss of a step's batches, its derivative along v), both exact up to the rounding of the forward pass.

    v: a direction's part of each trained tensor. The loss is Σ sums / Σ counts over all batches.
    """
    whole = _Sums(model)
    params = {f"model.{t.name}": t.param.data for t in trained}
    tangents = {f"model.{t.name}": part for t, part in zip(trained, v, strict=True)}
    total = slope = count = 0.0
    for batch in batches:

        def sums(p: dict[str, Tensor], batch: Batch = batch) -> tuple[Tensor, Tensor]:
            return functional_call(whole, p, (batch,))

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            out: Any = jvp(sums, (params,), (tangents,))
        (found, n), (moved, _) = out
        total, slope, count = total + float(found), slope + float(moved), count + float(n)
    return total / count, slope / count


def train_forward_gradient(
    config: Config,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    write: Any,
) -> dict[str, Any]:
    """Train by forward gradients and return {steps, forwards, train_seconds, trained_numbers, before, after, between}.

    model: in fp32 from here on. between: the evaluations of eval_every, {step, seconds, eval}. Raises UserError for quantised layers,
    and where the loss is no longer finite.
    """
    if quantised_layers(model):
        raise UserError("--method forward-gradient: tangents do not pass quantised layers; leave bits out")
    before = evaluate.evaluate(model, held_out, examples, write=write)
    model = model.float().eval()
    trained = adopt(model, train_names(model, config.train))
    at, between, paused = batches_of(config, examples), list[dict[str, Any]](), 0.0
    began = time.monotonic()
    for step in range(config.steps):
        v = [noise.direction(t.stored.shape, t.id, seed=config.seed, step=step, direction=0, noise=GAUSSIAN,
                             device=t.stored.device) for t in trained]  # fmt: skip
        loss, slope = directional_derivative(model, trained, v, at(step))
        if not abs(loss) + abs(slope) < float("inf"):
            raise UserError(
                f"lr={config.lr:g}: the loss is {loss} at step {step}, its slope {slope}; start again with a lower lr"
            )
        lr = lr_at(
            step, lr=float(config.lr), steps=config.steps, schedule=config.schedule, warmup=config.warmup
        )
        for t, part in zip(trained, v, strict=True):
            if t.decays:
                t.param.data.mul_(1.0 - lr * config.weight_decay)
            t.param.data.sub_(part * (lr * slope))
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            now = time.monotonic()
            found = evaluate.evaluate(model, held_out, examples, write=write)
            between.append({"step": step + 1, "seconds": round(now - began - paused, 3), "eval": found})
            paused += time.monotonic() - now
    seconds = time.monotonic() - began - paused
    seen = config.steps * config.batch_size * config.accumulate
    return {
        "steps": config.steps, "forwards": FORWARDS * seen, "train_seconds": round(seconds, 3),
        "trained_numbers": sum(t.stored.numel() for t in trained), "before": before, "between": between,
        "after": evaluate.evaluate(model, held_out, examples, write=write),
    }  # fmt: skip
