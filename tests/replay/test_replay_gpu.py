"""Replay, denoise and export of runs on a GPU: there the same bits, on a CPU what the noise promises."""

import pytest
import torch
from safetensors.torch import load_file
from test_replay import bits, place, train  # noqa: F401 (place is a fixture)

from zoft.cli import replay
from zoft.ledger import log
from zoft.method.configured import load_run
from zoft.run.start import train_run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("momentum", [0, 0.5])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_gpu_run_replayed_on_a_cpu(place, tmp_path, kind, momentum):  # noqa: F811
    """fp32 storage: signs bit for bit, a Gaussian within 1e-5 of each tensor's norm; on a GPU the run's bits."""
    keys = ("device=cuda", "storage=fp32", "compute=fp32", "steps=200", "lr=1e-4", "q=2", "weight_decay=0.1")
    run = train(
        place, f"{kind}-{momentum}", *keys, f"noise={kind}", f"momentum={momentum}", "save_dtype=fp32"
    )
    replay.replay_run_folder(run, tmp_path / "gpu")
    replay.replay_run_folder(run, tmp_path / "twice", device="cuda")
    assert bits(tmp_path / "gpu") == bits(tmp_path / "twice") == bits(run / "model")
    replay.replay_run_folder(run, tmp_path / "cpu", device="cpu")
    ours, theirs, base = (
        load_file(p / "model.safetensors") for p in (tmp_path / "cpu", run / "model", place / "half")
    )
    for name in theirs:
        if kind == "rademacher":
            assert torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)), name
        else:
            off = (ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()
            assert off < 1e-5, (name, float(off))
        assert not torch.equal(theirs[name], base[name].float()), name


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_denoised_on_a_gpu_resumed_and_replayed(place, tmp_path, kind, storage):  # noqa: F811
    keys = ("device=cuda", f"storage={storage}", "compute=bf16", f"noise={kind}", "eps=1e-2", "momentum=0.5")
    whole = train(place, f"whole-{kind}-{storage}", *keys, "steps=20", "denoise_every=8")
    assert [e.step for e in log.read_ledger(whole / "ledger").events] == [8, 16, 20]
    data = (whole / "ledger").read_bytes()
    for dropped in (15, 14, 1):  # before and after the event at 8, before the one at 20
        cut = place / f"cut-{kind}-{storage}-{dropped}"
        cut.mkdir()
        (cut / "config.yaml").write_text((whole / "config.yaml").read_text().replace(str(whole), str(cut)))
        (cut / "ledger").write_bytes(data[: -32 * dropped])
        train_run(load_run(cut), resume=cut)
        assert bits(cut / "model") == bits(whole / "model"), dropped
    replay.replay_run_folder(whole, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(whole / "model")
    if kind == "rademacher":
        replay.replay_run_folder(whole, tmp_path / "cpu", device="cpu")
        assert bits(tmp_path / "cpu") == bits(whole / "model")


def test_export_of_a_gpu_run(place, tmp_path):  # noqa: F811
    run = train(place, "exported-gpu", "device=cuda", "train=last-1", "eps=1e-2")
    line = replay.export_run(run, tmp_path / "out", merge=True, adapter=False)
    assert bits(tmp_path / "out") == bits(run / "model") and "gives the run's logits" in line
    line = replay.export_run(run, tmp_path / "cpu", merge=True, adapter=False, device="cpu", dtype="fp32")
    assert "gives the run's logits" in line
