"""What a run's folder keeps while it goes."""

import tiny
from test_trainer import Portions, build, examples

from zoft import run as runs
from zoft.compose import load_run
from zoft.config import Config, Task
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
