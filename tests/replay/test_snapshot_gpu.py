"""Snapshots of a captured run on a GPU: weights that were flushed, and a resume to the same bits."""

import pytest
import tiny
from test_device_gpu import build
from test_snapshot import fit
from test_trainer import examples, same_bits, weights

from zoft.config.schema import Config, Task
from zoft.ledger.log import read_ledger
from zoft.run import session as sessions

pytestmark = pytest.mark.gpu


def session(folder, stop=None, *, storage, compute, beta, every):
    """A captured run of 20 steps in `folder`, new or resumed, until its end or a crash after `stop`; its weights."""
    config = Config(
        model="m", task=Task(name="local"), steps=20, output_dir=str(folder), device="cuda", probes_per_forward=2,
        snapshot_every=every,
    )  # fmt: skip
    resume = folder if (folder / "ledger").exists() else None
    with sessions.session(config, {"seed": 7, "base": "b"}, resume) as s:
        spare = folder.parent / f"{folder.name}-{len(s.ledger.records)}-unused"
        trainer = build(
            spare,
            tiny.opt,
            "captured",
            data=examples(),
            storage=storage,
            compute=compute,
            beta=beta,
            steps=20,
        )
        trainer.ledger.close()
        trainer.ledger = s.ledger
        fit(trainer, s, lambda: {"loss": 1.0}, stop)
        assert not trainer.capture
        return weights(trainer.model)


@pytest.mark.parametrize("storage,compute", [("fp32", "fp32"), ("fp16", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_captured_run_that_goes_on_from_a_snapshot_ends_with_the_same_bits(
    tmp_path, capsys, storage, compute, beta
):
    how = {"storage": storage, "compute": compute, "beta": beta}
    plain = session(tmp_path / "plain", every=0, **how)
    whole = session(tmp_path / "whole", every=7, **how)
    assert same_bits(plain, whole)
    for stop in (3, 7, 17):
        folder = tmp_path / f"stop{stop}"
        session(folder, stop, every=7, **how)
        steps = len(read_ledger(folder / "ledger").records)
        assert steps == stop  # what was on its way has landed
        capsys.readouterr()
        again = session(folder, every=7, **how)
        assert (f"starting from the snapshot at step {stop // 7 * 7}" in capsys.readouterr().err) == (
            stop >= 7
        )
        assert same_bits(plain, again), stop
        for file in ("ledger", "snapshots/step-00000014.safetensors"):
            assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (stop, file)
