"""Set node perturbation up for a run: its layers proved and measured, and the measurements kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.folder import write
from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.objectives.losses import losses
from zoft.parallel.world import this_world
from zoft.probe.nodes import Layer, NodeAxis, layers_of
from zoft.probe.sites import Found
from zoft.probe.whiten import Measured, measure, measured_from
from zoft.train.node_trainer import Rows, rows_with_tokens

FILE = "nodes.safetensors"
# Largest relative difference of a loss, stacked against alone, that may be called rounding.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def make_nodes(
    config: Config, loaded: nn.Module, trained: Sequence[Trained], found: Found, train: Sequence[Example]
) -> NodeAxis:
    """Return the axis of proved sites, after its own proof: stacked probes must give the losses of single ones.

    Raises UserError for a layer that is not linear, runs more than once or does not see every token, or a failed proof.
    """
    axis = axis_of_layers(config, loaded, layers_of(trained, found))
    if config.node_inputs == "kept" and this_world().size > 1:
        raise UserError(
            "node_inputs=kept: a process keeps the inputs of its own rows alone; use node_inputs=pass or one process"
        )
    if config.node_inputs == "kept" and config.probes_per_forward == 1 and config.device.startswith("cuda"):
        raise UserError(
            "node_inputs=kept: on a GPU both probes share a forward; leave probes_per_forward out, or use node_inputs=pass"
        )
    picks = list(dict.fromkeys([0, max(range(len(train)), key=lambda i: train[i].length)]))
    rows = rows_with_tokens([train[i] for i in picks], picks, config.device, before=config.node_tokens)
    refuse_other_tokens(axis, loaded, rows)
    probes = [Probe(0, 16 * config.eps), Probe(0, -8 * config.eps)]
    axis.tokens = rows.tokens
    try:
        with torch.no_grad():
            alone = torch.stack([_losses(axis, loaded, rows, [p]) for p in probes])  # [P, E]
            stacked = _losses(axis, loaded, rows, probes).view_as(alone)
    finally:
        axis.tokens = None
    off = float(((stacked - alone).abs() / (1 + alone.abs())).max())
    cap = max(TOLERANCE.get(t.compute, 0.1) for t in trained)
    if not off <= cap:
        raise UserError(
            f"perturb=nodes: stacked losses differ from single ones by {off:.2g}; use recipe=mezo"
        )
    return axis


def axis_of_layers(config: Config, loaded: nn.Module, layers: list[Layer]) -> NodeAxis:
    """Return the axis of these layers for the run's device."""
    if not config.device.startswith("cuda"):
        return NodeAxis(loaded, layers, seed=config.seed)
    from zoft.probe.cuda.nodes import DeviceNodes

    return DeviceNodes(loaded, layers, seed=config.seed)


def _losses(axis: NodeAxis, model: nn.Module, rows: Rows, probes: list[Probe]) -> torch.Tensor:
    with axis.at(0, probes, rows.batch.rows):
        return losses(model, rows.batch.repeat(len(probes)))[0]


def refuse_other_tokens(axis: NodeAxis, model: nn.Module, rows: Rows) -> None:
    """Raise UserError for a layer whose input is not one vector per token of the batch."""
    cells, seen = rows.batch.inputs["input_ids"].numel(), {}

    def look(layer: Layer, args: tuple, out: torch.Tensor) -> None:
        seen[layer.name] = out.numel() // layer.units

    with torch.no_grad(), axis._hooked(look):
        losses(model, rows.batch)
    for layer in axis.layers:
        if seen.get(layer.name) != cells:
            raise UserError(
                f"perturb=nodes: {layer.trained.name} sees {seen.get(layer.name, 0)} vectors of {cells} tokens; leave it out of `train`"
            )


def calibrated(
    config: Config, loaded: nn.Module, axis: NodeAxis, train: Sequence[Example], folder: str | Path | None
) -> Measured:
    """Return what the layers were measured to be: from the folder of a run that goes on, else by clean forwards."""
    from safetensors.torch import load_file

    path = Path(folder or "") / FILE
    if folder and path.exists():
        return measured_from(load_file(path), config.device)
    n, count = len(train), min(len(train), config.calibration_rows)
    chosen = sorted(
        (i * n // count for i in range(count)), key=lambda i: (train[i].length, i)
    )  # at even distances
    batches = []
    for start in range(0, len(chosen), config.batch_size):
        picks = chosen[start : start + config.batch_size]
        rows = rows_with_tokens([train[i] for i in picks], picks, config.device, before=config.node_tokens)
        batches.append((rows.batch, rows.tokens.places, len(picks)))
    stored = axis.trained[0].stored.dtype
    return measure(
        [(layer.name, layer.module) for layer in axis.layers], batches, lambda b: losses(loaded, b),
        rho=config.rho, rank=config.node_rank, dtype=torch.promote_types(stored, torch.float32),
    )  # fmt: skip


def keep_calibration(axis: Any, folder: Path) -> None:
    """Write the measurements of a run's layers beside its ledger, which has their digest."""
    from safetensors.torch import save

    path = folder / FILE
    if isinstance(axis, NodeAxis) and this_world().rank == 0 and not path.exists():
        write(path, save(axis.measured.tensors()))
