"""Node perturbation on a CUDA device: signs and moves by kernels, and buffers for all that changes from step to step.

Ĝ is formed up to a positive factor, which Ĝ / rms(Ĝ) does not see: coefficients are divided by the step's largest, so that
16 bits hold them, and σ is left out. It is summed in fp32 from factors in the layer's compute dtype, and the products that
whiten the inputs are fp32 (the leading eigenvectors carry nearly all of an input, and P takes nearly all of that away).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoft.noise.nodes import Tokens, cells_of
from zoft.noise.spec import Update, key
from zoft.noise.triton_nodes import add_signs, move_matrix, weighed_signs
from zoft.probe.nodes import Layer, NodeAxis, shares
from zoft.probe.whiten import Whitener

PART = 1 << 23  # numbers of a layer's input that are whitened at one time: 32 MiB in fp32


@dataclass
class Cells:
    """Hold what a microbatch's noise is drawn by, and each place's coefficient.

    drawn: int32 [5, R·T] (noise.nodes.cells_of). weights: fp32 [R·T], c_i of the place's example over the step's largest,
    0 at padding.
    """

    drawn: Tensor
    weights: Tensor


def cells_of_step(
    change: Update, microbatches: Sequence[Tokens], places: Sequence[int], seed: int
) -> list[Cells]:
    """Return the cells of each microbatch of a step, on the CPU. places: R·T of each."""
    each = shares(change, microbatches)
    peak = max((float(c.abs().max()) for c in each), default=0.0) or 1.0
    found = []
    for tokens, count, c in zip(microbatches, places, each, strict=True):
        weights = torch.zeros(count)
        weights[tokens.places] = (c / peak).float()[tokens.owners]
        found.append(Cells(cells_of(tokens, count, seed, change.step), weights))
    return found


class DeviceNodes(NodeAxis):
    """Run a NodeAxis whose steps run on a CUDA device without waiting for the CPU.

    cells: int32 [5, R·T] of the batch whose probes are run; without them they are made of `tokens`.
    lr, decay: fp32 [1]; keys: int32 [1, 2]; of the step whose update pass is run (`upload`).
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], *, seed: int) -> None:
        super().__init__(model, layers, seed=seed)
        self.device = layers[0].trained.stored.device
        self.cells: Tensor | None = None
        self.lr, self.decay, self.one = (torch.ones(1, device=self.device) for _ in range(3))
        self.keys = torch.zeros(1, 2, dtype=torch.int32, device=self.device)
        self.scales: dict[tuple[float, ...], Tensor] = {}
        self.whitened: dict[int, tuple[Whitener, Tensor, Tensor]] = {}  # of each microbatch, the last

    def add(self, layer: Layer, out: Tensor, scales: Sequence[float]) -> Tensor:
        """Add scales[p]·σ·u to a layer's outputs [P·R, T, m] of probe p, in place."""
        y = out.view(len(scales), -1, layer.units)  # [P, R·T, m]
        cells = self.cells
        if cells is None:
            assert self.tokens is not None, "tokens are set before probes are run"
            cells = cells_of(self.tokens.to("cpu"), y.shape[1], self.seed, self.step).to(self.device)
        wanted = tuple(scales)
        if wanted not in self.scales:
            self.scales[wanted] = torch.tensor(wanted, device=self.device)
        add_signs(y, cells, self.scales[wanted], layer.sigma, layer.trained.id)
        return out

    def upload(self, change: Update) -> None:
        """Send what an update pass reads of its step to the device, without waiting."""
        self.lr.fill_(change.lr)
        self.decay.fill_(change.decay)
        words = np.array([key(change.seed, change.step, 0)], np.uint32).view(np.int32)
        self.keys.copy_(torch.from_numpy(words).pin_memory(), non_blocking=True)

    def update(self, change: Update, microbatches: Sequence[tuple[Mapping[str, Tensor], Tokens]]) -> None:
        """Run the update pass of a step, as NodeAxis does; its Ĝ has another factor."""
        tokens = [t.to("cpu") for _, t in microbatches]
        places = [inputs["input_ids"].numel() for inputs, _ in microbatches]
        made = cells_of_step(change, tokens, places, self.seed)
        self.upload(change)
        cells = [Cells(c.drawn.to(self.device), c.weights.to(self.device)) for c in made]
        self.move_over([inputs for inputs, _ in microbatches], cells)
        self.moved(change)

    def move_over(self, microbatches: Sequence[Mapping[str, Tensor]], cells: Sequence[Cells]) -> None:
        """Run the update pass of the step that was uploaded over its microbatches' inputs, each with its cells."""
        try:
            self.pass_over(microbatches, lambda layer, xs: self.move(layer, xs, cells))
        finally:
            self.whitened.clear()

    def move(self, layer: Layer, xs: Sequence[Tensor], cells: Sequence[Cells]) -> None:
        """Move a layer's matrix, from its inputs [R·T, n] in each microbatch."""
        t, g = layer.trained, None
        for i, (x, c) in enumerate(zip(xs, cells, strict=True)):
            x = self.input(i, layer, x)
            u = weighed_signs(c.drawn, c.weights, layer.units, t.id, x.dtype)  # [R·T, m]
            part = wide_product(x.T, u) if layer.turned else wide_product(u.T, x)
            g = part if g is None else g.add_(part)
        assert g is not None
        size = torch.linalg.vector_norm(g)
        factor = torch.where(size > 0, self.lr * g.numel() ** 0.5 / size, 0.0)
        move_matrix(t.stored, g, factor, self.decay if t.decays else self.one, self.keys, t.id)

    def input(self, microbatch: int, layer: Layer, x: Tensor) -> Tensor:
        """Return P x of a layer's input [R·T, n], made once for layers that share it one after the other."""
        w = layer.whitener
        if w is None:
            return x
        last = self.whitened.get(microbatch)
        if last is not None and last[0] is w and last[1].data_ptr() == x.data_ptr():
            return last[2]
        made = torch.empty_like(x)
        rows = max(1, PART // x.shape[1])
        for start in range(0, len(x), rows):
            made[start : start + rows] = w.apply(x[start : start + rows].to(w.mean.dtype))
        self.whitened[microbatch] = (w, x, made)
        return made


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, summed and kept in fp32 where the factors have 16 bits."""
    if a.itemsize > 2:
        return a @ b
    wide: Any = torch.mm
    return wide(a, b, out_dtype=torch.float32)
