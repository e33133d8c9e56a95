"""lr=auto: its line against losses made by hand, weights put back, forwards counted, resume, replay, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from zoft.cli.lr import draw_line, line_text, measure_lr
from zoft.cli.replay import replay_run_folder
from zoft.errors import UserError
from zoft.ledger.log import read_ledger
from zoft.method.auto_lr import BUDGET, forwards_of, lines_allowed
from zoft.method.configured import compose, load_run
from zoft.method.estimators.named import forwards_per_step
from zoft.noise import noise
from zoft.objectives.losses import losses
from zoft.run.estimate import estimate_run
from zoft.run.start import train_run
from zoft.train.assemble import assemble
from zoft.train.batches import batches_of
from zoft.train.learning_rate import crossing, measured_line

SETTINGS = "lr: auto\nsteps: 200\nbatch_size: 4\nthreads: 1\ndevice: cpu\neval_limit: 6\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.place(tmp_path, SETTINGS))
    return tmp_path


def test_the_crossing_of_a_parabola_is_exact():
    """L(θ) = θᵀHθ/2 along a step -ηcz: Δ = -ηc² + η²c²zᵀHz/2, which is 0 at 2/zᵀHz, whatever the two points are."""
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64, generator=gen)
    h, z, theta = a @ a.T, *torch.randn(2, 6, dtype=torch.float64, generator=gen)
    c = theta @ h @ z
    zero = float(2 / (z @ h @ z))

    def rise(lr):
        moved = theta - lr * c * z
        return float(moved @ h @ moved - theta @ h @ theta) / 2

    for low, high in ((0.1, 1.5), (0.9, 1.01), (0.3, 3.9)):
        found = crossing((low * zero, rise(low * zero)), (high * zero, rise(high * zero)))
        assert found == pytest.approx(zero, rel=1e-9)
    assert crossing((0.5, -1.0), (2.0, float("inf"))) == 0.5


@torch.no_grad()
def test_the_line_is_that_of_steps_made_by_hand(folder):
    """In fp64, from z of the specification, added to the weights of a model that no axis runs."""
    config = compose("mine.yaml", ["storage=fp64", "compute=fp64", "noise=rademacher"])
    parts = assemble(config)
    line, config = parts.line, parts.config
    plain = assemble(replace(config, lr=0.0)).model.double()
    named, at = dict(plain.named_parameters()), batches_of(config, parts.scored)

    def loss(k):
        found = [losses(plain, b) for b in at(k)]
        return float(sum(s.double().sum() for s, _ in found) / sum(n.sum() for _, n in found))

    def moved(k, scale):
        for t in parts.trained:
            z = noise.direction(
                t.stored.shape,
                t.id,
                seed=config.seed,
                step=k,
                direction=0,
                noise="rademacher",
                device=torch.device("cpu"),
            )
            named[t.name].data += scale * z.double()

    rises = [[] for _ in line.points]
    for k in range(line.lines):
        start, eps = loss(k), config.eps
        moved(k, eps)
        up = loss(k)
        moved(k, -2 * eps)
        c = (up - loss(k)) / (2 * eps)
        moved(k, eps)
        for (lr, _, _), some in zip(line.points, rises):
            moved(k, -lr * c)
            some.append(loss(k) - start)
            moved(k, lr * c)
    for (_, rise, _), some in zip(line.points, rises):
        assert rise == pytest.approx(sum(some) / len(some), rel=1e-3, abs=1e-7)
    below = max(lr for lr, rise, _ in line.points if rise < 0)
    assert below <= line.zero <= 4.01 * below and line.lr < line.zero


@pytest.mark.parametrize(
    "words",
    [
        ["train=lora", "recipe=lora_zo"],
        ["recipe=sparse_mezo"],
        ["recipe=qzo", "bits=4", "group=32"],
        ["noise=rank1"],
        ["directions=example"],
        ["directions=example", "noise=rank1"],
        ["blocks=random"],
        ["q=2"],
        ["estimator=one_sided"],
        ["storage=fp16", "compute=fp32"],
    ],
)
def test_every_recipe_has_a_line_and_its_weights_back(folder, words):
    config = compose("mine.yaml", words)
    parts = assemble(config)
    again = measured_line(
        replace(parts.config, lr="auto"), parts.model, parts.axis, parts.scored, parts.objective
    )
    assert repr(again) == repr(parts.line)  # from the same weights: all is put back
    first = assemble(replace(parts.config, lr=0.0))
    for a, b in zip(parts.trained, first.trained, strict=True):
        assert torch.equal(a.stored.view(torch.uint8), b.stored.view(torch.uint8)) and a.step == b.step
    spent = parts.line.forwards
    assert 0 < spent <= BUDGET * config.steps * forwards_per_step(config)
    assert spent == forwards_of(config, lines_allowed(config), len(parts.line.points))


def test_a_run_takes_it_once_and_counts_it(folder):
    result = train_run(compose("mine.yaml", ["output_dir=a"]))
    header = read_ledger("a/ledger").header
    found, lr = header["lr_auto"], yaml.safe_load(Path("a/config.yaml").read_text())["lr"]
    assert result["forwards"] == 200 * 8 + found["forwards"] and header["plan"]["lr"] == lr > 0
    model = Path("a/model/model.safetensors").read_bytes()
    fixed = train_run(compose("mine.yaml", ["output_dir=b", f"lr={lr}"]))
    assert Path("b/model/model.safetensors").read_bytes() == model and fixed["forwards"] == 1600
    replay_run_folder("a", "c")
    assert Path("c/model.safetensors").read_bytes() == model
    shutil.copytree("a", "d", ignore=shutil.ignore_patterns("result.json", "model"))
    data = Path("d/ledger").read_bytes()
    Path("d/ledger").write_bytes(data[: len(data) // 2])
    resumed = train_run(load_run("d"), resume="d")
    assert resumed["forwards"] == result["forwards"]
    assert Path("d/model/model.safetensors").read_bytes() == model


def test_estimate_counts_it_and_the_verb_shows_it(folder):
    config = compose("mine.yaml", [])
    found = estimate_run(config)
    assert found["lr_forwards"] == forwards_of(config, lines_allowed(config)) <= BUDGET * 1600
    assert any(note.startswith("lr=auto: at most") for note in found["notes"])
    line = measure_lr(compose("mine.yaml", ["lr=0.5"]))
    text = line_text(line, 0.5)
    assert f"takes lr={line.lr:g}" in text and "the config has lr=0.5" in text and not Path("runs").exists()
    draw_line(line, "line.png")
    assert Path("line.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(line.header())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steps=20"], "needs steps="),
        (["update=adam"], "update=adam"),
        (["momentum=0.9"], "momentum=0.9"),
        (["update=conservative"], "update=conservative"),
        (["estimator=normalised", "q=2"], "estimator=normalised"),
        (["meazo=0.99"], "meazo=0.99"),
        (["perturb=inplace"], "perturb=inplace"),
        (["train=prefix", "recipe=lora_zo"], "train=prefix"),
        (["train=prompt", "recipe=lora_zo"], "train=prompt"),
        (["recipe=node", "eps=1e-2"], "recipe=node"),
        (["anchor=0.1"], "anchor=0.1"),
        (["objective=accuracy"], "objective=accuracy"),
        (["elastic=true"], "elastic=true"),
        (["lr=atuo"], "lr=atuo"),
    ],
)
def test_what_it_does_not_go_with_is_refused(folder, words, says):
    with pytest.raises(UserError, match=says) as error:
        compose("mine.yaml", words)
    assert "\n" not in str(error.value)
