"""Measure how an estimator's steps lie to the true gradient, and what they gain against the curvature they meet.

On one batch, at the base's weights θ, from K steps ĝ = (θ - θ') / lr that the trainer itself takes, each from θ again:

    cosine      = gᵀm / (‖g‖‖m‖),  m the mean of the K steps        step_cosine = the mean of gᵀĝ / (‖g‖‖ĝ‖)
    slope       = the mean of gᵀĝ                                    curvature   = the mean of ĝᵀHĝ
    efficiency  = slope² / curvature

g is autograd's gradient of the batch's loss, Hĝ its second backward pass. Half the efficiency is the most that the loss
can fall in a step, with the best lr, as far as the loss is quadratic; for an unbiased ĝ it is ‖g‖⁴ / E[ĝᵀHĝ]. A constant
factor on ĝ leaves cosine and efficiency as they are. Weights are kept in fp32 (fp64 where storage says so) and computed
with in it. Training never does any of this: it is a yardstick.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from zoft.config.schema import NO_GRADIENT, Config
from zoft.errors import UserError
from zoft.folder import write
from zoft.method.rules import rule_of

if TYPE_CHECKING:
    from torch import Tensor

    from zoft.objectives.objectives import Goal


def measure_gradient(config: Config, folder: Path, draws: int) -> dict[str, Any]:
    """Write result.json with cosine, step_cosine, slope, curvature, their standard errors, efficiency and draws; return it.

    draws: K, 2 or more. efficiency is None where the mean curvature is not above 0. Raises UserError for a config whose
    steps are not those of one estimate, or whose loss has no gradient.
    """
    import torch

    from zoft.config.compose import to_yaml
    from zoft.console import peak_memory_gb
    from zoft.ledger.log import Ledger
    from zoft.method.estimators.named import forwards_per_step
    from zoft.probe.nodes import NodeAxis
    from zoft.train.assemble import assemble
    from zoft.train.batches import batches_of
    from zoft.train.parts import trainer_settings
    from zoft.train.trainer import Trainer

    refuse_ungraded(config)
    wide = "fp64" if "fp64" in (config.storage, config.compute) else "fp32"
    config = replace(
        config,
        storage=wide,
        compute=wide,
        cache_frozen=False,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
    )
    parts = assemble(config)
    config, trained = parts.config, parts.trained
    write(folder / "config.yaml", to_yaml(config))
    batches = batches_of(config, parts.scored)(0)
    began = time.monotonic()
    tensors = [t.param.requires_grad_(True) for t in trained]
    loss, grads = gradient(parts.model, tensors, batches, parts.objective)
    g = [x.detach() for x in grads]
    start = [t.stored.clone() for t in trained]
    length = math.sqrt(_dot(g, g))

    settings = replace(trainer_settings(config), lr=1.0, steps=draws + 1)
    slopes, curvatures, cosines = [], [], []
    mean = [torch.zeros_like(s) for s in start]
    with (
        tempfile.TemporaryDirectory() as place,
        Ledger.create(Path(place) / "ledger", parts.header) as ledger,
    ):
        goal = parts.objective
        assert not isinstance(parts.axis, NodeAxis), parts.axis
        trainer = Trainer(
            parts.model, parts.axis, lambda step: batches, ledger, settings, goal.forward, goal.value
        )

        @torch.no_grad()
        def moved() -> list[Tensor]:
            """Return θ - θ' of the trainer's next step [one per tensor]; θ is as it was."""
            trainer.step()
            trainer.axis.flush()
            found = [s - t.stored for s, t in zip(start, trained)]
            for s, t in zip(start, trained):
                t.stored.copy_(s)
            return found

        # One step says how long they are: an lr that moves a number by about 1 leaves nothing to fp32's rounding.
        first = moved()
        if root := math.sqrt(_dot(first, first) / sum(s.numel() for s in start)):
            trainer.settings = replace(settings, lr=1.0 / root)
        for _ in range(draws):
            step = [x / trainer.settings.lr for x in moved()]
            along = torch.autograd.grad(grads, tensors, step, retain_graph=True, materialize_grads=True)
            slopes.append(_dot(g, step))
            curvatures.append(_dot(step, along))
            size = math.sqrt(_dot(step, step))
            cosines.append(slopes[-1] / (length * size) if size else math.nan)
            for m, x in zip(mean, step):
                m += x / draws
    again, _ = gradient(parts.model, tensors, batches, parts.objective)
    assert again.item() == loss.item(), (
        f"the weights moved: loss {loss.item()} before, {again.item()} after {draws} steps"
    )
    slope, curvature = fmean(slopes), fmean(curvatures)
    result: dict[str, Any] = {
        "cosine": _dot(g, mean) / (length * math.sqrt(_dot(mean, mean))), "step_cosine": fmean(cosines),
        "slope": slope, "slope_error": stdev(slopes) / math.sqrt(draws),
        "curvature": curvature, "curvature_error": stdev(curvatures) / math.sqrt(draws),
        "efficiency": slope**2 / curvature if curvature > 0 else None, "gradient_norm": length, "loss": loss.item(),
        "draws": draws, "forwards": draws * forwards_per_step(config), "before": {}, "after": {},
        "train_seconds": round(time.monotonic() - began, 3),
        "peak_memory_gb": round(peak_memory_gb(config.device), 2), "output_dir": str(folder),
    }  # fmt: skip
    write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def refuse_ungraded(config: Config) -> None:
    """Raise UserError for a config whose step cannot be laid beside a gradient, with the reason."""
    rule = rule_of(config)
    if config.objective in NO_GRADIENT:
        raise UserError(f"objective={config.objective}: it has no gradient to compare with")
    if config.bits is not None or config.train == "scales":
        raise UserError(f"train={config.train}: gradients do not pass quantised layers")
    if config.momentum or (rule and rule.state) or config.meazo:
        said = f"momentum={config.momentum:g}" if config.momentum else f"update={config.update}"
        said = f"meazo={config.meazo:g}" if config.meazo else said
        raise UserError(f"{said}: a step depends on those before it, so one batch does not say where it goes")
    if config.perturb == "nodes":
        raise UserError(
            "perturb=nodes: its steps are normalised, so that they are no estimate; use another recipe"
        )
    if config.perturb == "inplace":
        raise UserError("perturb=inplace: its rounding moves the weights; use perturb=probes")


def gradient(
    model: Any, tensors: Sequence[Tensor], batches: Sequence[Any], goal: Goal
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return (the loss [], its gradient for each tensor) of a step's batches, with a graph for second derivatives.

    tensors: parameters of the model that require gradients.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        columns = [torch.stack(goal.forward(model, batch), -1).double().sum(0) for batch in batches]
        loss = goal.value(torch.stack(columns).sum(0)[None])[0]
        return loss, torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b))
