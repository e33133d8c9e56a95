"""What a run's folder keeps while it goes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_replay import configured, place  # noqa: F401
from test_trainer import Portions, build, examples

from zoft import estimate, models
from zoft import run as runs
from zoft.compose import load_run, to_yaml
from zoft.config import Config, Task
from zoft.errors import UserError
from zoft.folder import alone
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


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them fails
from typer.testing import CliRunner
from zoft.cli import app
said = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps([[done.exit_code, done.stderr] for done in said]))
"""


def test_mistakes_show_before_anything_heavy_loads(place):  # noqa: F811
    """In an interpreter that has no torch to load: folders, locks, rewards, blocks and devices are looked at first."""
    (place / "score.py").write_text("def score(rows, texts):\n    return [0] * len(rows)\n")
    (place / "busy").mkdir()
    (place / "busy" / "config.yaml").write_text(to_yaml(configured(place, "busy")))
    begin = ["train", "--config", f"{place}/mine.yaml", f"model={place}/full", f"output_dir={place}/early"]
    blocks = tiny.llama().config.num_hidden_layers
    cases = [
        ([*begin[:-1], "output_dir=/proc/early"], "output_dir=/proc/early: cannot be made"),
        (["train", "--resume", f"{place}/busy"], f"{place}/busy: another process is writing this run"),
        ([*begin[:-1], f"output_dir={place}/taken"], f"output_dir={place}/taken: another process is writing"),
        (
            [*begin, "max_new_tokens=8", "--reward", f"{place}/score.py:scores"],
            "no function scores in it; did you mean score?",
        ),
        ([*begin, "train=last-99"], f"the model has {blocks} blocks; use last-1 to last-{blocks}"),
    ]
    if not any(Path("/dev", name).exists() for name in runs.DRIVERS):
        cases.append(([*begin, "device=cuda:1"], "device=cuda:1: no CUDA devices here; use device=cpu"))
    with alone(place / "busy", False), alone(place / "taken", True):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, json.dumps([words for words, _ in cases])],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (code, said), (words, part) in zip(json.loads(done.stdout), cases, strict=True):
        assert code == 2 and part in said and said.count("\n") == 1, (words, said)
    assert not (place / "early").exists()


def test_blocks_are_counted_where_a_models_settings_say_them(tmp_path):
    for tree, found in (
        ({"num_hidden_layers": 30}, 30),
        ({"n_layer": 12}, 12),
        ({"text_config": {"num_hidden_layers": 4}}, None),
        ({"num_hidden_layers": "x"}, None),
        ([], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree))
        assert models.blocks(models.Source("folder", str(tmp_path), "m")) == found
    (tmp_path / "config.json").write_text("{")
    assert models.blocks(models.Source("folder", str(tmp_path), "m")) is None
