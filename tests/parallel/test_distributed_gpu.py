"""Two GPUs: captured steps whose losses meet on the device, the same run as one GPU's and as eager steps'."""

import json

import numpy as np
import pytest
import ranks
import torch
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.ledger.log import read_ledger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
KEYS = ["device=cuda", "storage=fp16", "compute=bf16", "batch_size=8", "threads=2", "check_every=10"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = ranks.make_place(tmp_path_factory.mktemp("work"))
    assert ranks.zoft(folder, "output_dir=one", *KEYS, timeout=300) == [0], said(folder)
    return folder


def said(place):
    return [p.read_text()[-3000:] for p in sorted(place.glob("said-*"))]


def losses(folder):
    return np.array([r.losses for r in read_ledger(folder / "ledger").records])


def same(place, name, other="one"):
    return all(
        (place / name / f).read_bytes() == (place / other / f).read_bytes()
        for f in ("ledger", "model/model.safetensors")
    )


def test_probes_over_two_gpus_are_the_run_of_one_to_the_bit(place):
    assert ranks.zoft(place, "output_dir=probes", *KEYS, size=2, timeout=300) == [0, 0], said(place)
    assert "not captured" not in "".join(said(place))
    assert same(place, "probes")
    assert json.loads((place / "probes" / "result.json").read_text())["wire_bytes"] == 50 * 16


def test_examples_over_two_gpus(place):
    keys = [*KEYS, "lr=0", "save_model=false"]
    assert ranks.zoft(place, "output_dir=still", *keys, timeout=300) == [0], said(place)
    assert ranks.zoft(place, "output_dir=data", "parallel=data", *keys, size=2, timeout=300) == [0, 0], said(
        place
    )
    np.testing.assert_allclose(losses(place / "data"), losses(place / "still"), rtol=0.03)
    assert ranks.zoft(place, "output_dir=moves", "parallel=data", *KEYS, size=2, timeout=300) == [0, 0], said(
        place
    )


def eager(rank):
    """Rank 1 cannot capture."""
    from zoft.train.cuda_graphs import CapturedTrainer

    plain = CapturedTrainer.__init__

    def init(self, *args, **more):
        plain(self, *args, **{**more, "capture": "as asked" if rank == 1 else ""})

    CapturedTrainer.__init__ = init


def test_a_process_that_cannot_capture_steps_beside_one_that_can(place):
    assert ranks.zoft(place, "output_dir=mixed", *KEYS, size=2, hook=eager, timeout=300) == [0, 0], said(
        place
    )
    assert same(place, "mixed")


def stop_one(rank):
    import os
    import signal

    from zoft.train.cuda_graphs import CapturedTrainer

    plain = CapturedTrainer.step

    def step(self):
        if rank == 1 and self.next == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    CapturedTrainer.step = step


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_goes_on(place):
    keys = [k for k in KEYS if not k.startswith("check_every")] + ["check_every=0"]
    assert ranks.zoft(place, "output_dir=stopped", *keys, size=2, hook=stop_one, timeout=300) == [75, 75], (
        said(place)
    )
    assert (
        len(read_ledger(place / "stopped" / "ledger").records) == 17 + 5
    )  # BEHIND + 1 steps were on their way
    assert ranks.zoft(place, "--resume", "stopped", timeout=300) == [0], said(place)
    assert same(place, "stopped")


def no_number_at_12(rank):
    """Weights that are no numbers, on both, before step 12; rank 1 runs eagerly, so that they land steps at other times."""
    from zoft.train.cuda_graphs import CapturedTrainer

    eager(rank)
    plain = CapturedTrainer.step

    def step(self):
        if rank == 1 and self.next % 7 == 0:
            self._land_all()
        if self.next == 12:
            self.axis.trained[0].stored.fill_(float("nan"))
        return plain(self)

    CapturedTrainer.step = step


def test_steps_that_are_skipped_too_often_stop_both_at_once(place):
    keys = [*KEYS, "parallel=data", "max_skipped=5", "output_dir=skipped"]
    assert ranks.zoft(place, *keys, size=2, hook=no_number_at_12, timeout=120) == [2, 2], said(place)
    assert all("max_skipped=5 steps in a row" in text for text in said(place)[:2])
    skipped = [r.skipped for r in read_ledger(place / "skipped" / "ledger").records]
    assert skipped.index(True) == 12 and all(skipped[12:])


def test_gradients_are_taken_on_the_device_that_is_asked_for(place, monkeypatch):
    """transformers' Trainer takes the first GPU wherever the model is."""
    monkeypatch.chdir(place)
    torch.cuda.reset_peak_memory_stats(0)
    had = torch.cuda.max_memory_allocated(0)
    words = ["--config", "mine.yaml", "--method", "first-order", "steps=2", "batch_size=4", "device=cuda:1"]
    try:
        done = CliRunner().invoke(app, ["baseline", *words, "output_dir=gradients"])
    finally:
        torch.cuda.set_device(0)
    assert done.exit_code == 0, done.stderr
    assert torch.cuda.max_memory_allocated(0) == had and torch.cuda.max_memory_allocated(1) > 0
    found = json.loads((place / "gradients" / "result.json").read_text())
    assert found["after"]["loss"] != found["before"]["loss"]
