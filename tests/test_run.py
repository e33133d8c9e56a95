"""What a run's folder keeps while it goes."""

import pytest
import tiny
from test_replay import configured, place  # noqa: F401
from test_trainer import Portions, build, examples

from zoft import estimate
from zoft import run as runs
from zoft.compose import load_run
from zoft.config import Config, Task
from zoft.errors import UserError
from zoft.objective import collate


def test_one_probe_a_forward_is_kept_for_the_resume(tmp_path, capsys):
    """A resumed run must not stack what the run before it did not: stacked losses differ in their last bits."""
    model = tiny.llama()
    model.model.layers[0].mlp = Portions(model.model.layers[0].mlp)
    short, long = ([e for e in examples(48) if (len(e.contexts[0]) > 7) is wide] for wide in (False, True))
    folder = tmp_path / "run"
    config = Config(
        model="m",
        task=Task(name="local"),
        steps=3,
        probes_per_forward=2,
        output_dir=str(folder),
        device="cpu",
    )
    with runs.session(config, {"seed": 7}, None) as s:
        trainer = build(tmp_path, model, data=short, opened=s.ledger, steps=3)
        trainer.batches = lambda step: [collate((long if step == 1 else short)[:4])]
        seen = []
        runs.fit(trainer, s, lambda: {"probes": seen.append(load_run(folder).probes_per_forward)})
    assert seen == [2, 1] and load_run(folder).steps == 3
    assert "one probe a forward" in capsys.readouterr().err


def test_a_budget_of_forwards_cuts_the_steps(place):  # noqa: F811
    """(2 probes × q 2) × batch 4 × accumulate 2 = 32 forwards a step: a budget of 100 buys three steps."""
    keys = ["q=2", "batch_size=4", "accumulate=2", "save_model=false"]
    result = runs.train(configured(place, "cut", *keys, "max_forwards=100"))
    assert result["steps"] == 3 and result["forwards"] == 96
    assert runs.train(configured(place, "whole", *keys, "max_forwards=1000"))["steps"] == 6
    with pytest.raises(UserError, match="a step takes 32"):
        runs.train(configured(place, "none", *keys, "max_forwards=31"))
    with pytest.raises(UserError, match="snapshot_every=4: more than the 3 steps"):
        runs.train(configured(place, "none", *keys, "max_forwards=100", "snapshot_every=4"))


def test_an_estimate_counts_what_denoising_draws_again(place):  # noqa: F811
    """Denoising every 2 of 6 steps draws 2 + 4 + 6 steps' directions again: twice the noise of the steps."""
    noisy = configured(place, "none", "storage=bf16", "denoise_every=2")
    found = estimate.estimate(noisy)
    noise = 12 * found["trained"] / found["rates"]["noise"]
    assert found["denoising_seconds"] == pytest.approx(noise)
    assert found["seconds"] == pytest.approx(6 * found["seconds_per_step"] + noise)
