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
    """Hold what the noise of a microbatch's tokens is drawn by, their places and their coefficients.

    drawn: int32 [6, N] (noise.nodes.cells_of). places: int64 [N], in the flattened rows. weights: fp32 [N], c_i of the token's
    example over the step's largest. What is beyond the tokens is 0 in all of them, and moves nothing.
    """

    drawn: Tensor
    places: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Cells:
        """Return the same on another device."""
        return Cells(self.drawn.to(device), self.places.to(device), self.weights.to(device))


def cells_of_step(
    change: Update, microbatches: Sequence[Tokens], counts: Sequence[int], seed: int
) -> list[Cells]:
    """Return the cells of each microbatch of a step, on the CPU. counts: N of each, its tokens at least."""
    each = shares(change, microbatches)
    peak = max((float(c.abs().max()) for c in each), default=0.0) or 1.0
    return [
        cells_at(tokens, count, seed, change.step, (c / peak).float()[tokens.owners])
        for tokens, count, c in zip(microbatches, counts, each, strict=True)
    ]


def cells_at(tokens: Tokens, count: int, seed: int, step: int, weights: Tensor | None = None) -> Cells:
    """Return a microbatch's cells at a step, on the CPU. weights: fp32, of its tokens; None: 0."""
    n = len(tokens.places)
    more = nn.functional.pad(torch.zeros(n) if weights is None else weights, (0, count - n))
    return Cells(cells_of(tokens, count, seed, step), nn.functional.pad(tokens.places, (0, count - n)), more)


class DeviceNodes(NodeAxis):
    """Run a NodeAxis whose steps run on a CUDA device without waiting for the CPU.

    cells: of the batch whose probes are run; without them they are made of `tokens`.
    lr, decay: fp32 [1]; keys: int32 [1, 2]; of the step whose update pass is run (`upload`).
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], *, seed: int) -> None:
        super().__init__(model, layers, seed=seed)
        self.device = layers[0].trained.stored.device
        self.cells: Cells | None = None
        self.lr, self.decay, self.one = (torch.ones(1, device=self.device) for _ in range(3))
        self.keys = torch.zeros(1, 2, dtype=torch.int32, device=self.device)
        self.scales: dict[tuple[float, ...], Tensor] = {}
        self.whitened: dict[int, tuple[Whitener | None, Tensor, Tensor]] = {}  # of each microbatch, the last

    def add(self, layer: Layer, out: Tensor, scales: Sequence[float]) -> Tensor:
        """Add scales[p]·σ·u to a layer's outputs [P·R, T, m] of probe p, in place."""
        y = out.view(len(scales), -1, layer.units)  # [P, R·T, m]
        if self.cells is not None:
            drawn = self.cells.drawn
        else:
            assert self.tokens is not None, "tokens are set before probes are run"
            tokens = self.tokens.to("cpu")
            drawn = cells_of(tokens, len(tokens.places), self.seed, self.step).to(self.device)
        wanted = tuple(scales)
        if wanted not in self.scales:
            self.scales[wanted] = torch.tensor(wanted, device=self.device)
        add_signs(y, drawn, self.scales[wanted], layer.sigma, layer.trained.id)
        return out

    def places(self) -> Tensor:
        """Return the places of the tokens of the batch whose probes are run, int64 [N]."""
        return super().places() if self.cells is None else self.cells.places

    def upload(self, change: Update) -> None:
        """Send what an update pass reads of its step to the device, without waiting."""
        self.lr.fill_(change.lr)
        self.decay.fill_(change.decay)
        words = np.array([key(change.seed, change.step, 0)], np.uint32).view(np.int32)
        self.keys.copy_(torch.from_numpy(words).pin_memory(), non_blocking=True)

    def update(self, change: Update, microbatches: Sequence[tuple[Mapping[str, Tensor], Tokens]]) -> None:
        """Run the update pass of a step, as NodeAxis does; its Ĝ has another factor."""
        tokens = [t.to("cpu") for _, t in microbatches]
        made = cells_of_step(change, tokens, [len(t.places) for t in tokens], self.seed)
        self.upload(change)
        self.move_over([inputs for inputs, _ in microbatches], [c.to(self.device) for c in made])
        self.moved(change)

    def move_over(self, microbatches: Sequence[Mapping[str, Tensor]], cells: Sequence[Cells]) -> None:
        """Run the update pass of the step that was uploaded over its microbatches' inputs, each with its cells."""
        try:
            self.pass_over(
                microbatches, lambda layer, xs: self.move(layer, xs, cells, [c.places for c in cells])
            )
        finally:
            self.whitened.clear()

    def move_kept(self, kept: Sequence[Mapping[str, Tensor]], cells: Sequence[Cells]) -> None:
        """Move all layers of the step that was uploaded by inputs [N, n] that were kept of its probes."""
        try:
            for layer in self.layers:
                self.move(layer, [k[layer.name] for k in kept], cells)
        finally:
            self.whitened.clear()

    def move(
        self,
        layer: Layer,
        xs: Sequence[Tensor],
        cells: Sequence[Cells],
        places: Sequence[Tensor] | None = None,
    ) -> None:
        """Move a layer's matrix, from its inputs [N, n] in each microbatch; with places, from [R·T, n] there."""
        t, g = layer.trained, None
        for i, (x, c) in enumerate(zip(xs, cells, strict=True)):
            x = self.input(i, layer, x, None if places is None else places[i])
            u = weighed_signs(c.drawn, c.weights, layer.units, t.id, x.dtype)  # [N, m]
            part = wide_product(x.T, u) if layer.turned else wide_product(u.T, x)
            g = part if g is None else g.add_(part)
        assert g is not None
        size = torch.linalg.vector_norm(g)
        factor = torch.where(size > 0, self.lr * g.numel() ** 0.5 / size, 0.0)
        move_matrix(t.stored, g, factor, self.decay if t.decays else self.one, self.keys, t.id)

    def input(self, microbatch: int, layer: Layer, x: Tensor, places: Tensor | None) -> Tensor:
        """Return P x of a layer's input [N, n], or of [R·T, n] at some places of it; made once for layers that share it one
        after the other."""
        w = layer.whitener
        last = self.whitened.get(microbatch)
        if last is not None and last[0] is w and last[1].data_ptr() == x.data_ptr():
            return last[2]
        made = x if places is None else x.index_select(0, places)
        if w is not None:
            made, found = torch.empty_like(made), made
            rows = max(1, PART // x.shape[1])
            for start in range(0, len(found), rows):
                made[start : start + rows] = w.apply(found[start : start + rows].to(w.mean.dtype))
        self.whitened[microbatch] = (w, x, made)
        return made


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, summed and kept in fp32 where the factors have 16 bits."""
    if a.itemsize > 2:
        return a @ b
    wide: Any = torch.mm
    return wide(a, b, out_dtype=torch.float32)
