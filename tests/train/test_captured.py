"""Steps that run ahead of the ledger, without a GPU: how several processes stop at one step, whatever stops one of them.

The queue of steps under way is the real one; in the place of a device each step is computed as it is sent.
"""

import errno
from collections import deque

import pytest
import ranks
import torch

from zoft.ledger.log import Ledger, read_ledger
from zoft.method import updates
from zoft.method.estimators.estimator import rows_of
from zoft.noise.spec import Update
from zoft.train import build
from zoft.train.trainer import Trainer

pytest.importorskip("triton")
from zoft.train.cuda_graphs import BEHIND, CapturedTrainer  # noqa: E402


class Done:
    def synchronize(self):
        pass


class Ahead(CapturedTrainer):
    """Rank 1 lands all steps under way before every seventh one, as a process does that meets a new shape of batch."""

    bend = staticmethod(lambda step, values: values)

    def __init__(self, *args):
        Trainer.__init__(self, *args)
        self.flight, self.landed = deque(), []
        self.halt_at = self.alone_at = self.failure = None
        self.shapes = {}

    def exchange(self, totals, alone):
        totals, self.flags = self.plain(totals, alone)
        return totals, torch.zeros((), dtype=torch.int64)

    def step(self):
        s, t = self.settings, self.next
        if self.world.size > 1 and "plain" not in vars(self):
            self.plain, self.world.exchange = self.world.exchange, self.exchange
        if self.alone_at is not None and t >= self.alone_at:
            self._alone(t, "so does another process of this run")
        if self.world.rank == 1 and t % 7 == 0:
            self._land_all()
        self.flags = 0
        values = self.bend(t, self.losses_at(t, self.probes, self.batches(t)))
        change = updates.make_update(t, s.seed, self.estimate(values)[0], lr=s.lr)
        good = all(map(torch.isfinite, map(torch.tensor, values)))
        if good:
            self.axis.commit(Update(t, s.seed, change.multipliers, 1.0))
        rows = rows_of(values, self.probes)
        record = torch.tensor([*rows, *change.multipliers, good, int(self.flags)], dtype=torch.float64)
        self.flight.append((t, s.lr, record, Done()))
        self.next = t + 1
        return self._land() if len(self.flight) > BEHIND else None

    def flush_pending(self):
        self.axis.flush()

    def run(self, on_step, until=None):
        super().run(on_step, until)


def ahead(bend):
    def hook(rank):
        Ahead.bend = staticmethod(bend)
        build.Trainer = Ahead

    return hook


def no_number(rank):
    ahead(lambda step, values: [float("nan")] * len(values) if step >= 12 else values)(rank)


def rising(rank):
    ahead(lambda step, values: [v + 10 for v in values] if step >= 20 else values)(rank)


def full_disk(rank):
    """Rank 0's ledger takes no step from the 13th on; only rank 0 knows."""
    ahead(lambda step, values: values)(rank)
    plain = Ledger._extend

    def extend(self, data, crc, what):
        if rank == 0 and self.last_step == 11:
            from zoft.ledger import log

            real, log._write = log._write, refuse
            try:
                return plain(self, data, crc, what)
            finally:
                log._write = real
        return plain(self, data, crc, what)

    Ledger._extend = extend


def refuse(fd, data, at):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return ranks.make_place(tmp_path_factory.mktemp("work"), save_model="false", eval_limit=4)


def said(place, rank=0):
    return (place / f"said-{rank}").read_text().splitlines()


STOPS = [
    (
        no_number,
        "max_skipped=5",
        "lr=0.001, eps=0.001: the loss was not finite for max_skipped=5 steps in a row",
    ),
    (rising, "on_divergence=stop", "on_divergence=stop: the loss has been above its start for 5 steps"),
]


@pytest.mark.parametrize("hook,key,text", STOPS)
def test_all_processes_stop_at_one_step_and_say_what_one_says(place, hook, key, text):
    name = key.partition("=")[0]
    keys = [key, "steps=50", "eval_every=25"]
    assert ranks.zoft(place, f"output_dir=two-{name}", "parallel=data", *keys, size=2, hook=hook) == [2, 2]
    assert said(place)[-1].startswith(f"error: {text}") and said(place, 1)[-1].startswith(
        f"error: rank 1: {text}"
    )
    two = [(r.step, r.skipped) for r in read_ledger(place / f"two-{name}" / "ledger").records]
    assert ranks.zoft(place, f"output_dir=one-{name}", *keys, hook=hook) == [2]
    assert said(place)[-1].startswith(f"error: {text}")
    one = [(r.step, r.skipped) for r in read_ledger(place / f"one-{name}" / "ledger").records]
    assert two[: len(one)] == one and len(one) < len(two) <= len(one) + 2 * BEHIND + 2


def test_an_error_of_one_process_stops_the_others_at_its_step(place):
    codes = ranks.zoft(place, "output_dir=full", "parallel=data", size=2, hook=full_disk)
    assert codes == [2, 75], (said(place), said(place, 1))
    assert "cannot write step 12" in said(place)[-1] and "the 12 steps so far are kept" in said(place)[-1]
    assert said(place, 1)[-1] == "stopped; continue with `zoft train --resume full`"
    assert len(read_ledger(place / "full" / "ledger").records) == 12


def cannot_stack_at_7(rank):
    """Rank 1 meets a batch at step 7 that cannot be stacked."""
    ahead(lambda step, values: values)(rank)
    if rank == 1:
        from zoft.probe.rows import Unfit

        plain = Ahead.sums_at

        def sums_at(self, step, probes, batch):
            if step == 7 and len(probes) == 2 == self.settings.probes_per_forward:
                self._alone(step, Unfit("as asked"))
            return plain(self, step, probes, batch)

        Ahead.sums_at = sums_at


def test_a_fall_of_one_process_is_that_of_all_from_one_step_on(place):
    keys = ["q=2", "steps=20", "probes_per_forward=2"]
    assert ranks.zoft(place, "output_dir=fallen", *keys, size=2, hook=cannot_stack_at_7) == [0, 0]
    line = f"step {7 + BEHIND + 1}: one probe per forward from here on: so does another process of this run"
    assert line in said(place)
    assert "probes_per_forward: 1" in (place / "fallen" / "config.yaml").read_text().splitlines()
    assert len(read_ledger(place / "fallen" / "ledger").records) == 20
