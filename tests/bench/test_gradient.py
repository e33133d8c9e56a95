"""`zoft bench --gradient` against a twin by hand in fp64, and against the closed form for Gaussian directions."""

import csv
import json
import math

import noise_twin as slow
import numpy as np
import pytest
import tiny
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from zoft.bench.gradient import measure_gradient, refuse_ungraded
from zoft.cli.main import app
from zoft.data import tasks
from zoft.data.encode import encode
from zoft.errors import UserError
from zoft.method.configured import compose
from zoft.noise.spec import tensor_id
from zoft.train.batches import picked

SETTINGS = "max_length: 32\nbatch_size: 4\nthreads: 1\nstorage: fp64\ncompute: fp64\neps: 1e-4\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.place(tmp_path, SETTINGS))
    (tmp_path / "out").mkdir()
    return tmp_path


class ByHand:
    """The first batch's loss as a function of the trained numbers θ [d], fp64, from transformers and autograd alone."""

    def __init__(self, config, names):
        self.model, tokenizer = tiny.llama().double(), tiny.tokenizer()
        data = tasks.load_task(config.task)
        rows = encode(data.train, tokenizer, data, config.max_length)
        (chosen,) = picked(config, len(rows), 0)
        self.rows, self.names = [rows[i] for i in chosen], names
        own = dict(self.model.named_parameters())
        self.shapes = [own[n].shape for n in names]
        self.theta = torch.cat([own[n].detach().flatten() for n in names])

    def loss(self, theta):
        parts = theta.split([math.prod(s) for s in self.shapes])
        tensors = {n: x.view(s) for n, x, s in zip(self.names, parts, self.shapes)}
        total = 0.0
        for e in self.rows:
            scores = []
            for context, completion in zip(e.contexts, e.completions):
                ids = torch.tensor([context + completion])
                out = torch.func.functional_call(self.model, tensors, (ids,), {"use_cache": False})
                logp = out.logits[0, len(context) - 1 : -1].log_softmax(-1)
                scores.append(logp.gather(1, torch.tensor(completion)[:, None]).mean())
            total = total - torch.stack(scores).log_softmax(0)[e.gold]
        return total / len(self.rows)

    def gradient(self):
        return torch.func.grad(self.loss)(self.theta)

    def direction(self, config, step, k):
        z = [
            slow.z(np.arange(math.prod(s)), tensor_id(n), slow.key(config.seed, step, k), config.noise)
            for n, s in zip(self.names, self.shapes)
        ]
        return torch.from_numpy(np.concatenate(z))

    def curvature(self, v):
        with sdpa_kernel(SDPBackend.MATH):
            _, hv = torch.autograd.functional.hvp(self.loss, self.theta, v)
        return float(v @ hv)


@pytest.mark.parametrize("words", [[], ["estimator=one_sided", "q=2"], ["estimator=normalised", "q=3"]])
def test_figures_are_those_of_a_twin_by_hand(place, words):
    config = compose("mine.yaml", ["noise=rademacher", "seed=3", *words])
    found = measure_gradient(config, place / "out", 3)
    twin = ByHand(config, [n for n, _ in tiny.llama().named_parameters()])
    g, eps = twin.gradient(), config.eps
    slopes, curvatures, steps = [], [], []
    for step in (1, 2, 3):  # step 0 says how long steps are
        z = [twin.direction(config, step, k) for k in range(config.q)]
        with torch.no_grad():
            plus = torch.stack([twin.loss(twin.theta + eps * x) for x in z])
            if not words:
                c = (plus - torch.stack([twin.loss(twin.theta - eps * x) for x in z])) / (2 * eps)
            else:
                c = (plus - twin.loss(twin.theta)) / eps
            c = c / (plus.std(correction=0) / eps if config.estimator == "normalised" else 1.0) / config.q
        steps.append(sum(a * x for a, x in zip(c, z)))
        slopes.append(float(g @ steps[-1]))
        curvatures.append(twin.curvature(steps[-1]))
    mean = sum(steps) / 3
    want = {
        "cosine": float(g @ mean / g.norm() / mean.norm()),
        "step_cosine": np.mean([float(g @ s / g.norm() / s.norm()) for s in steps]),
        "slope": np.mean(slopes),
        "slope_error": np.std(slopes, ddof=1) / 3**0.5,
        "curvature": np.mean(curvatures),
        "curvature_error": np.std(curvatures, ddof=1) / 3**0.5,
        "gradient_norm": float(g.norm()),
        "loss": float(twin.loss(twin.theta)),
    }
    assert {k: found[k] for k in want} == pytest.approx(want, rel=1e-5)
    if want["curvature"] > 0:
        assert found["efficiency"] == pytest.approx(want["slope"] ** 2 / want["curvature"], rel=1e-5)
    else:
        assert found["efficiency"] is None
    assert json.loads((place / "out" / "result.json").read_text()) == found


def test_gaussian_directions_have_the_closed_form(place):
    """E gᵀĝ = ‖g‖², E ĝᵀHĝ = 2 gᵀHg + ‖g‖² tr H, within four standard errors of 400 draws."""
    config = compose("mine.yaml", ["train=norms", "noise=gaussian", "eps=1e-5"])
    found = measure_gradient(config, place / "out", 400)
    names = [n for n, p in tiny.llama().named_parameters() if p.ndim == 1]
    twin = ByHand(config, names)
    g = twin.gradient()
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(twin.loss, twin.theta)  # [d, d]
    slope, curvature = float(g @ g), float(2 * g @ hessian @ g + (g @ g) * hessian.trace())
    assert found["slope"] == pytest.approx(slope, abs=4 * found["slope_error"])
    assert found["curvature"] == pytest.approx(curvature, abs=4 * found["curvature_error"])
    assert found["slope_error"] < slope / 10
    assert 0.8 < found["cosine"] <= 1  # of 400 draws of 80 numbers: √(K / (K + d + 1))


def test_fp32_agrees_with_fp64_and_weights_stay(place):
    words = ["noise=rademacher", "seed=3", "eps=1e-3"]
    wide = measure_gradient(compose("mine.yaml", words), place / "out", 4)
    config = compose("mine.yaml", [*words, "storage=fp32", "compute=fp32"])
    narrow = measure_gradient(config, place / "out", 4)
    for key in ("cosine", "slope", "curvature", "gradient_norm"):
        assert narrow[key] == pytest.approx(wide[key], rel=2e-2), key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["momentum=0.9"], "momentum=0.9"),
        (["update=adam"], "update=adam"),
        (["meazo=0.9"], "meazo=0.9"),
        (["perturb=inplace"], "perturb=inplace"),
        (["objective=accuracy"], "objective=accuracy"),
        (["recipe=qzo", "bits=8", "train=scales"], "train=scales"),
    ],
)
def test_rows_without_such_a_step_are_refused(place, words, said):
    with pytest.raises(UserError, match=said):
        refuse_ungraded(compose("mine.yaml", words))


def test_the_bench_shows_it_beside_the_runs(place):
    rows = {"mezo": {"lr": 1e-3}, "lora": {"recipe": "lora_zo", "train": "lora"}, "adam": {"update": "adam"}}
    file = {
        "base": {"config": "mine.yaml"},
        "tasks": {"words": {}},
        "forwards": 32,
        "seeds": [1],
        "rows": rows,
    }
    (place / "ranks.yaml").write_text(yaml.safe_dump(file | {"draws": 3}))
    done = CliRunner().invoke(app, ["bench", "--config", "ranks.yaml", "--gradient", "output_dir=ranked"])
    assert done.exit_code == 0, (done.output, done.stderr)
    with (place / "ranked" / "table.csv").open() as table:
        found = {r["row"]: r for r in csv.DictReader(table)}
    for row in ("mezo", "lora"):
        (path,) = place.glob(f"ranked/*row={row},part=gradient*/result.json")
        result = json.loads(path.read_text())
        assert float(found[row]["cosine"]) == result["cosine"] and result["draws"] == 3
        assert found[row]["failures"] == found[row]["gradient_fault"] == ""
    assert "update=adam" in found["adam"]["gradient_fault"] and found["adam"]["failures"] == ""
    assert "No gradient was measured of" in done.stdout and "cosine" in done.stdout


@pytest.mark.parametrize(
    "words", [["noise=rank1"], ["noise=rank1", "directions=example"], ["directions=example"]]
)
def test_other_directions_are_measured_without_a_line_of_their_own(place, words):
    """They are unbiased: the mean of gᵀĝ is ‖g‖² within four standard errors."""
    found = measure_gradient(compose("mine.yaml", words), place / "out", 100)
    assert found["slope"] == pytest.approx(found["gradient_norm"] ** 2, abs=4 * found["slope_error"])
    assert found["slope_error"] < found["slope"] / 3
