"""Node perturbation on a GPU: a step's probes and its update pass are two CUDA graphs, with the ledger between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoft.method.estimators.estimator import Probe
from zoft.noise.spec import Update
from zoft.objectives.losses import Batch
from zoft.probe.cuda.nodes import Cells, DeviceNodes, cells_at, cells_of_step
from zoft.train.batches import tensors_of
from zoft.train.node_trainer import NodeTrainer, Rows


@dataclass
class Fed:
    """Hold what graphs read of one microbatch, on the device. source: the rows that it holds. kept: the inputs of its probes."""

    batch: Batch
    cells: Cells
    source: Rows | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Rows, cells: Cells, batch: Batch) -> None:
        """Copy a microbatch of the same shapes into the graph's memory, without waiting for the device."""
        if self.source is not rows:
            for (_, mine), (_, new) in zip(tensors_of(self.batch), tensors_of(batch), strict=True):
                _copy(mine, new)
            self.source = rows
        _copy(self.cells.drawn, cells.drawn)
        _copy(self.cells.places, cells.places)
        _copy(self.cells.weights, cells.weights)


def _copy(mine: Tensor, new: Tensor) -> None:
    mine.copy_(new.pin_memory(), non_blocking=True)  # from pageable memory the copy would wait for the device


class DeviceNodeTrainer(NodeTrainer):
    """Train as NodeTrainer does, with forwards that are captured once for each shape of a batch.

    All shapes are captured, however many there are: some versions of transformers take another attention kernel while a graph
    is captured, and a resumed run, which meets shapes in another order, must have the bits of the first.
    A step waits for its losses, so that it is in the ledger before the weights move; the update pass then runs while the next
    batch is made. capture: "" captures, anything else says why not. masked: False where attention needs no mask for padding.
    """

    def __init__(self, *args: Any, keeps: bool, capture: str, masked: bool) -> None:
        super().__init__(*args, keeps=keeps)
        assert isinstance(self.nodes, DeviceNodes), type(self.nodes)
        self.device_nodes: DeviceNodes = self.nodes
        self.capture, self.masked = capture, masked
        self.fed: dict[tuple, Fed] = {}  # (place in the step, shapes) -> the memory that graphs read
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self.pool = torch.cuda.graph_pool_handle() if not capture else None
        self.side = torch.cuda.Stream()

    def own_sums_at(self, step: int, probes: Sequence[Sequence[Probe]], batch: Any) -> Tensor:
        """Return [P, E, 2]: loss sum and count of each example of a microbatch at ± its own signs, probes [P][E]."""
        each = [some[0] for some in probes]  # all examples of a probe have its scale
        nodes = self.device_nodes
        fed = self._fed(self.place(step, batch), batch, cells_at(batch.tokens, batch.cells, nodes.seed, step))
        self.kept_at = step

        def run() -> Tensor:
            nodes.cells = fed.cells
            if self.keeps:
                assert len(each) == len(self.probes) // self.estimator.per, "both probes share a forward"
                fed.kept = nodes.keeping = {}
            try:
                with nodes.at(step, each, fed.batch.rows):
                    sums, counts = self.forward(self.model, fed.batch.repeat(len(each)))  # [P·E] each
            finally:
                nodes.cells = nodes.keeping = None
            return torch.stack([sums, counts], -1).view(len(each), -1, 2).double()

        scales = tuple(p.scale for p in each)
        found = self._run(("probes", scales, id(fed)), run)
        assert found is not None
        self.forwards += batch.batch.examples * len(each)
        return found.cpu()

    def commit(self, change: Update) -> None:
        """Start the update pass of a step that is written down."""
        nodes, rows = self.device_nodes, list(self.whole(change.step))
        if self.keeps and self.kept_at != change.step:
            self.ask_again(change.step)
        cells = cells_of_step(change, [r.tokens for r in rows], [r.cells for r in rows], nodes.seed)
        fed = [self._fed(i, r, c) for i, (r, c) in enumerate(zip(rows, cells, strict=True))]

        def run() -> None:
            if self.keeps:
                nodes.move_kept([f.kept for f in fed], [f.cells for f in fed])
                return
            nodes.move_over([f.batch.inputs for f in fed], [f.cells for f in fed])

        what = ("update", *map(id, fed))
        if what not in self.graphs:  # a capture's trials must move nothing
            nodes.upload(Update(change.step, change.seed, (0.0,)))
            self._prepare(what, run)
        nodes.upload(change)
        self._run(what, run)
        nodes.moved(change)
        if not self.keeps:
            self.forwards += sum(r.batch.examples for r in rows)

    def _fed(self, place: int, rows: Rows, cells: Cells) -> Fed:
        """Return the device's memory for a microbatch at this place of its step, holding these rows."""
        batch = rows.batch if self.masked else rows.batch.unmasked()
        what = (place, len(cells.places), *((name, tuple(t.shape)) for name, t in tensors_of(batch)))
        fed = self.fed.get(what)
        if fed is None:
            device = self.device_nodes.device
            fed = Fed(batch.to(device), cells.to(device), rows)
            self.fed[what] = fed
        else:
            fed.take(rows, cells, batch)
        return fed

    @torch.no_grad()
    def _run(self, what: tuple, run: Callable[[], Tensor | None]) -> Tensor | None:
        """Run it: its graph, which is captured at the first time, or eagerly."""
        self._prepare(what, run)
        if what not in self.graphs:
            return run()
        graph, out = self.graphs[what]
        graph.replay()
        return out

    @torch.no_grad()
    def _prepare(self, what: tuple, run: Callable[[], Tensor | None]) -> None:
        """Capture what was not met before; where the model cannot be captured say why in one line, once."""
        if what in self.graphs or self.capture:
            return
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local" if self.world.size > 1 else "global"
        try:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):  # compiles kernels and finds workspaces
                run()
            torch.cuda.current_stream().wait_stream(self.side)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode=mode):
                out = run()
            self.graphs[what] = (graph, out)
        except (RuntimeError, AssertionError) as error:
            torch.cuda.synchronize()
            self.capture = (str(error).strip().splitlines() or ["?"])[0][:120]
            print(f"steps are not captured as CUDA graphs: {self.capture}", file=sys.stderr, flush=True)
        finally:
            torch.cuda.current_stream().wait_stream(self.side)
