"""The trainer on a GPU: each step is captured once as a CUDA graph and replayed, its record read a few steps later."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoft.errors import UserError
from zoft.ledger.log import Ledger, Record
from zoft.method.updates import lr_at, make_update
from zoft.noise.spec import Update
from zoft.objectives.losses import Batch, losses
from zoft.parallel.world import ALONE, STOP
from zoft.probe.cuda.axis import DeviceAxis
from zoft.probe.cuda.inplace import DeviceInPlace
from zoft.probe.rows import Unfit
from zoft.train.batches import bucket, tensors_of
from zoft.train.trainer import Settings, Trainer

BEHIND = 4  # steps that the device may be ahead of the ledger
GRAPHS_MAX = 24  # shapes that are kept captured; further ones run eagerly


@dataclass
class Shape:
    """Hold one captured shape: the batches it reads and the graph, or None where it runs eagerly."""

    batches: list[Batch]
    graph: torch.cuda.CUDAGraph | None


class CapturedTrainer(Trainer):
    """Train with steps that run without waiting for the CPU; same arithmetic, same bits, same ledger.

    Batches are padded to a few shapes (`bucket`), so that few graphs serve all steps. The ledger gets a step's
    record when the device is at most BEHIND steps further: a crash loses those steps, and they are run again.
    capture: "" captures; anything else says why not, and steps run eagerly.
    """

    def __init__(
        self, model: nn.Module, axis: DeviceAxis | DeviceInPlace, batches: Callable[[int], Sequence[Batch]], ledger: Ledger | None,
        settings: Settings, forward: Callable[[nn.Module, Batch], tuple[Tensor, ...]] = losses, capture: str = "",
    ) -> None:  # fmt: skip
        super().__init__(model, axis, batches, ledger, settings, forward)
        self.axis: DeviceAxis | DeviceInPlace = axis
        assert axis.control.probes == self.probes, (
            f"an axis made for other probes than {self.estimator.name}'s"
        )
        axis.control.configure(self.estimator)
        self.eps, self.state = (
            axis.control.eps,
            axis.control.state,
        )  # on the device, where a resume rebuilds it, too
        self.capture = capture
        self.shapes: dict[tuple, Shape] = {}
        self.pool = torch.cuda.graph_pool_handle() if not capture else None
        self.side = torch.cuda.Stream()  # one for all captures: each stream has workspaces of its own
        self.flight: deque[tuple[int, float, Tensor, torch.cuda.Event]] = deque()
        self.pinned = [
            torch.zeros_like(axis.control.record, device="cpu").pin_memory() for _ in range(BEHIND + 1)
        ]
        self.pending: Update | None = None  # the last landed update, which the weights still lack
        self.under_way = False  # the device has begun a step since the weights were last brought up to date
        self.scratch: list[Any] = []  # graphs point into it, however much the axis may need later
        self.halt_at: int | None = None  # the step that no process of the run takes any more
        self.alone_at: int | None = None  # the step from which all of them run one probe per forward
        # What stops the run, told where all of its processes are at one step.
        self.failure: UserError | None = None

    def step(self) -> dict[str, Any] | None:
        """Send a step to the device; returns the metrics of the step that has landed meanwhile, if one had to."""
        t = self.next
        if self.alone_at is not None and t >= self.alone_at:
            self._alone(t, "so does another process of this run")
        s = self.settings
        lr = lr_at(t, lr=s.lr, steps=s.steps, schedule=s.schedule, warmup=s.warmup)
        decay = make_update(t, s.seed, (), lr=lr, weight_decay=s.weight_decay).decay
        batches = [bucket(b, self.estimator.per > 1) for b in self.batches(t)]
        try:
            self._send(batches, t, lr, decay)
        except Unfit as error:
            if s.probes_per_forward == 1:
                raise
            self._alone(t, error)
            self._send(batches, t, lr, decay)
        record, done = self.pinned[t % len(self.pinned)], torch.cuda.Event()
        record.copy_(self.axis.control.record, non_blocking=True)
        done.record()
        self.flight.append((t, lr, record, done))
        self.next = t + 1
        self.forwards += len(self.probes) // self.estimator.per * sum(b.examples for b in batches)
        return self._land() if len(self.flight) > BEHIND else None

    def _alone(self, step: int, why: Unfit | str) -> None:
        """One probe a forward from here on."""
        self.alone_at = None
        if self.settings.probes_per_forward > 1:
            self._land_all()
            self.alone(step, why)
            self.shapes.clear()  # graphs of several probes a forward

    def _send(self, batches: list[Batch], step: int, lr: float, decay: float) -> None:
        """Start a step over these batches on the device."""
        shape = self._shape(batches)
        self.axis.control.upload(step, lr, decay)
        try:
            if shape.graph is not None:
                shape.graph.replay()
            else:
                self._forward(shape.batches)
            self._exchange()
        except BaseException:
            self.under_way = self.under_way or self.axis.ahead
            raise
        self.under_way = True

    @torch.no_grad()
    def _forward(self, batches: Sequence[Batch]) -> None:
        """Run what is captured: the step's losses at this process's probes; then, alone, its multipliers."""
        control, group, per = self.axis.control, self.settings.probes_per_forward, self.estimator.per
        mine = self.world.probes(len(control.probes) // per)
        with self.axis.stepping():
            control.totals.zero_()
            for i in range(mine.start, mine.stop, group):
                count = min(group, mine.stop - i)
                for j, batch in enumerate(batches):
                    if per > 1:
                        self._own(i, count, j, batch)
                        continue
                    with self.axis.at(0, control.probes[i : i + count], batch.rows):
                        sums, counts = self.forward(self.model, batch.repeat(count))  # [P·E], [P·E]
                    both = torch.stack([sums, counts], -1).view(count, -1, 2)
                    control.totals[i : i + count] += both.double().sum(1)
        if self.world.size == 1:
            control.close()

    def _own(self, first: int, count: int, j: int, batch: Batch) -> None:
        """The losses of microbatch j's examples, each at its own `count` probes (`Trainer.own_sums_at`), into the totals."""
        control, n, each = self.axis.control, self.estimator.per, self.settings.batch_size
        places = self.world.examples(range(j * each, (j + 1) * each))  # a range: they stand side by side
        probes = [control.probes[p * n + e] for p in range(first, first + count) for e in places]
        with self.axis.at(0, probes, batch.rows // batch.examples):
            sums, counts = self.forward(self.model, batch.repeat(count))  # [P·E], [P·E]
        both = torch.stack([sums, counts], -1).view(count, -1, 2).double()
        totals = control.totals.view(-1, n, 2)
        totals[first : first + count, places[0] : places[-1] + 1] = both

    @torch.no_grad()
    def _exchange(self) -> None:
        """With other processes: all losses, then the step's multipliers. Outside of the graph: each process captures its
        own shapes when it meets them, and a collective has to be met by all at once."""
        if self.world.size > 1:
            control, n = self.axis.control, self.estimator.per
            count = len(control.probes) // n
            mine = control.totals.view(count, n, 2)[self.world.probes(count)]
            if n > 1:
                mine = torch.cat([mine.flatten(1), mine[..., 1].sum(1, keepdim=True)], 1)  # [m, 2N + 1]
            else:
                mine = mine[:, 0]
            totals, flags = self.world.exchange(mine, self.settings.probes_per_forward == 1)
            control.totals.copy_(totals[:, : 2 * n].reshape(-1, 2))
            control.record[-1].copy_(flags)
            control.close()

    def _land(self) -> dict[str, Any] | None:
        """Wait for the oldest step under way and write it down: from here on it is a fact. None where that stops the run."""
        t, lr, record, done = self.flight.popleft()
        done.synchronize()
        s, q = self.settings, self.axis.control.q
        values, good = tuple(record[: 2 * q].tolist()), bool(record[3 * q])
        flags = int(record[3 * q + 1])
        # Others land this step earlier or later; all have sent this many when the last one knows.
        if flags & STOP and self.halt_at is None:
            self.halt_at = t + BEHIND + 1
        if flags & ALONE and self.alone_at is None and s.probes_per_forward > 1:
            self.alone_at = t + BEHIND + 1
        multipliers = tuple(record[2 * q : 3 * q].tolist()) if good else (0.0,) * q
        decay = make_update(t, s.seed, (), lr=lr, weight_decay=s.weight_decay).decay if good else 1.0
        self.pending = Update(t, s.seed, multipliers, decay) if good else None
        assert self.ledger is not None
        if self.failure is not None and self.ledger.last_step != t - 1:
            return None  # the ledger could not take a step before this one
        try:
            return self.write_down(Record(t, multipliers, decay, values, not good, lr))
        except UserError as error:
            self._fail(error)
            return None

    def _fail(self, error: UserError) -> None:
        """Stop for this error: alone at once, with others at the step that all of them stop at, as after a signal. Who
        left now would let them wait for losses that never come."""
        self.failure = self.failure or error
        self.world.failed = self.world.size > 1
        self.halted = self.halted or self.world.size == 1

    def _tell(
        self, on_step: Callable[[dict[str, Any]], None], landed: Sequence[dict[str, Any] | None]
    ) -> None:
        for metrics in landed:
            if metrics is not None and self.failure is None:
                try:
                    on_step(metrics)
                except UserError as error:
                    self._fail(error)

    def _shape(self, batches: list[Batch]) -> Shape:
        """The captured shape of these batches, holding them."""
        what = tuple((k, tuple(v.shape)) for b in batches for k, v in tensors_of(b))
        shape = self.shapes.get(what)
        if shape is None:
            shape = Shape([b.to(self.axis.flat_device) for b in batches], None)
            if not self.capture and len(self.shapes) < GRAPHS_MAX:
                shape.graph = self._captured(shape.batches)
                self.shapes[what] = shape
            return shape
        for mine, new in zip(shape.batches, batches):
            for (_, a), (_, b) in zip(tensors_of(mine), tensors_of(new)):
                # From pageable memory the copy would wait for the device.
                a.copy_(b if b.is_cuda else b.pin_memory(), non_blocking=True)
        return shape

    def _captured(self, batches: list[Batch]) -> torch.cuda.CUDAGraph | None:
        """The step over these batches as a graph; None, with one line why, where the model cannot be captured."""
        self._land_all()  # warming up moves θ to where it is going anyway, but its losses are nobody's
        graph = torch.cuda.CUDAGraph()
        control = self.axis.control
        state, master = control.state.clone(), control.still()
        try:
            control.upload(self.next, 0.0, 1.0)
            self.side.wait_stream(torch.cuda.current_stream())
            # Compiles kernels and finds workspaces; nothing is pending, so θ stands still.
            with torch.cuda.stream(self.side):
                for _ in range(2):
                    self._forward(batches)
                    control.forget()
            torch.cuda.current_stream().wait_stream(self.side)
            # NCCL's watchdog asks after its events meanwhile, from another thread.
            mode = "thread_local" if self.world.size > 1 else "global"
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode=mode):
                self._forward(batches)
            self.scratch.append(self.axis.scratch())
            return graph
        except Unfit:
            raise
        except (RuntimeError, AssertionError) as error:
            torch.cuda.synchronize()
            self.capture = (str(error).strip().splitlines() or ["?"])[0][:120]
            print(f"steps are not captured as CUDA graphs: {self.capture}", file=sys.stderr, flush=True)
            return None
        finally:
            torch.cuda.current_stream().wait_stream(self.side)
            control.state.copy_(state)
            control.master.copy_(master)
            control.forget()

    def _land_all(self) -> None:
        """Write down every step under way, and bring the weights to the last one."""
        while self.flight:
            self.landed.append(self._land())
        self.flush_pending()

    def flush_pending(self) -> None:
        """Bring the weights to the last landed step."""
        if self.under_way:
            self.axis.land(self.next - 1, self.pending)
        self.under_way, self.pending = False, None
        self.axis.flush()
        self.axis.control.forget()

    def run(
        self, on_step: Callable[[dict[str, Any]], None] = lambda metrics: None, until: int | None = None
    ) -> None:
        """Run steps until `until`; on return and on exceptions every step is written down and the weights are up to date."""
        self.landed: list[dict[str, Any] | None] = []
        try:
            while self.next < (self.settings.steps if until is None else until) and not self.halted:
                metrics = self.step()
                self._tell(on_step, [*self.landed, metrics])
                self.landed.clear()
                self.halted = self.halted or (self.halt_at is not None and self.next >= self.halt_at)
            while self.flight:
                self._tell(on_step, [self._land()])
        finally:
            while self.flight:
                self._land()
            self.flush_pending()
        if self.failure is not None:
            raise self.failure

    landed: list[dict[str, Any] | None] = []
