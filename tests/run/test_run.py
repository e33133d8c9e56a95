"""What a run's folder keeps while it goes."""

import json

import pytest
import tiny
from test_replay import configured, place  # noqa: F401
from test_trainer import Portions, build, examples

from zoft.config.schema import Config, Task
from zoft.method.configured import load_run
from zoft.models import load
from zoft.objectives.losses import collate
from zoft.run import estimate
from zoft.run import loop as runs
from zoft.run.session import session


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
    with session(config, {"seed": 7}, None) as s:
        trainer = build(tmp_path, model, data=short, opened=s.ledger, steps=3)
        trainer.batches = lambda step: [collate((long if step == 1 else short)[:4])]
        seen = []
        runs.fit(trainer, s, lambda: {"probes": seen.append(load_run(folder).probes_per_forward)})
    assert seen == [2, 1] and load_run(folder).steps == 3
    assert "one probe per forward" in capsys.readouterr().err


def test_an_estimate_counts_what_denoising_draws_again(place):  # noqa: F811
    """Denoising every 2 of 6 steps draws 2 + 4 + 6 steps' directions again: twice the noise of the steps."""
    noisy = configured(place, "none", "storage=bf16", "denoise_every=2")
    found = estimate.estimate_run(noisy)
    noise = 12 * found["trained"] / found["rates"]["noise"]
    assert found["denoising_seconds"] == pytest.approx(noise)
    assert found["seconds"] == pytest.approx(6 * found["seconds_per_step"] + noise)


def test_blocks_are_counted_where_a_models_settings_say_them(tmp_path):
    for tree, found in (
        ({"num_hidden_layers": 30}, 30),
        ({"n_layer": 12}, 12),
        ({"text_config": {"num_hidden_layers": 4}}, None),
        ({"num_hidden_layers": "x"}, None),
        ([], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree))
        assert load.block_count(load.Source("folder", str(tmp_path), "m")) == found
    (tmp_path / "config.json").write_text("{")
    assert load.block_count(load.Source("folder", str(tmp_path), "m")) is None
