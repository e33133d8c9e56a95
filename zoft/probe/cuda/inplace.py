"""The in-place policy on a GPU, fed from device memory, so that a step can be captured once and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from zoft.method.estimators.estimator import Probe
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.method.space import Trained
from zoft.noise.spec import Update
from zoft.noise.triton import launch
from zoft.probe.cuda.buffers import Control
from zoft.probe.inplace import InPlace


class DeviceInPlace(InPlace):
    """Run InPlace with moves that, inside `stepping`, take everything that changes from device memory; the same bits.

    It knows the cycle of two-sided steps only; others run on InPlace.

    A step's first move goes by way of the update of the step before, whose multipliers never leave the device. Outside
    `stepping` it is an ordinary in-place policy: `land` tells it where the device has left θ.
    """

    def __init__(
        self, trained: Sequence[Trained], *, seed: int, kind: str, q: int, eps: float, beta: float = 0.0
    ) -> None:
        super().__init__(trained, seed=seed, kind=kind, beta=beta)
        self.flat_device = self.trained[0].stored.device
        self.control = Control(TWO_SIDED.probes(q, eps), q, eps, beta, seed, self.flat_device)
        self.live = False
        self.ahead = False  # a step broke off after the update before it

    def scratch(self) -> list[Tensor]:
        return []

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run a step's forwards; θ ends at the last probe, the update of the step is pending."""
        self.live, self.ahead, self.at_probe = True, False, None
        self.control.refresh()
        try:
            yield
        except BaseException:
            self.ahead = self.at_probe is not None
            raise
        finally:
            self.live = False

    at_probe: Probe | None = None  # where this step has moved θ, while it is under way

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        if not self.live:
            with super().at(step, probes, rows):
                yield
            return
        (probe,) = probes
        for t in self.trained if probe != self.at_probe else ():
            plan = self.control.move(probe.direction, probe.scale, t.decays)
            launch(
                t.stored, t.id, t.stored[None], plan, self.kind, t.momentum, floor=t.floor, mask=t.mask, width=t.width
            )  # fmt: skip
        self.at_probe = probe
        yield

    def land(self, step: int, pending: Update | None) -> None:
        """Bring θ to what the ledger has after `step`, the last one that was sent; pending: its update, None if it was skipped."""
        control, broken = self.control, self.ahead
        last = self.at_probe if broken else control.probes[-1]
        assert last is not None
        # A step that broke off has the update in it; the way back is then its own.
        self.step, self.here = (step + 1 if broken else step), last
        if pending is not None and not broken:
            self.commit(pending)
        self.flush()
        self.ahead, self.at_probe = False, None
