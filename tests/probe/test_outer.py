"""Directions of rank 1 and flipped ones on the probe axis, against weights really set to θ + s·z, in fp64."""

import math

import pytest
import torch
from zoo import EPS, PROBES, SEED, STEP, ZOO, Batch, apart, batch, losses, make, off, twin, zoo

from zoft.method.estimators.estimator import Probe
from zoft.noise import noise, spec

KINDS = ["rank1", "gaussian_flipped", "rademacher_flipped"]
MODELS = [n for n in ZOO if n != "t5"]


def wide(name):
    model = zoo(name).double()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product knows no fp64
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_are_those_of_weights_set_to_the_probe(name, side, kind):
    b = batch(side)
    made = make(wide(name), b, kind=kind)
    if name != "mamba":  # its cache keeps it from being stacked, whatever the noise
        assert made.found.stacked, made.found.note
    expected = twin(made.untouched, made.trained, b, PROBES, kind=kind)
    assert apart(expected) > 1e-5
    assert off(made.losses(b, PROBES), expected) < 1e-10
    assert off(made.losses(b, PROBES[:2], group=1), expected[:2]) < 1e-10


@pytest.mark.parametrize("kind", [*KINDS, "rademacher"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama-tied", "gemma3", "mixtral", "bert", "lora"])
def test_each_example_has_its_own_directions(name, kind):
    """To the axis each row is a batch of its own: row e of probe p sees direction e alone, and so its loss is the twin's."""
    b = batch()
    made = make(wide(name), b, kind=kind)
    assert made.found.stacked, made.found.note
    own = [Probe(e, s) for s in (EPS, -EPS) for e in range(b.rows)]
    with torch.no_grad(), made.axis.at(STEP, own, 1):
        got = losses(made.model, b.repeat(2)).view(2, b.rows)
    for e in range(b.rows):
        one = Batch({k: v[e : e + 1] for k, v in b.inputs.items()})
        expected = twin(made.untouched, made.trained, one, [Probe(e, EPS), Probe(e, -EPS)], kind=kind)
        assert off(got[:, e : e + 1], expected) < 1e-10
    assert float((got[0] - got[1]).abs().min()) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, eps", [("opt", 1e-6), ("gpt2", 1e-6), ("llama-tied", 2e-4)]
)  # Llama's norms are fp32
def test_the_slope_of_a_probe_is_the_gradient_along_its_direction(name, eps, kind):
    b = batch()
    made = make(wide(name), b, kind=kind)
    with torch.no_grad(), made.axis.at(STEP, [Probe(3, eps), Probe(3, -eps)], b.rows):
        plus, minus = losses(made.model, b.repeat(2)).view(2, -1).mean(1)
    model = made.untouched.requires_grad_(True)
    losses(model, b).mean().backward()
    slope = 0.0
    for t in made.trained:
        where = {"seed": SEED, "step": STEP, "direction": 3, "dtype": torch.float64}
        z = noise.direction(t.stored.shape, t.id, noise=kind, width=t.width, **where)
        slope += float((model.get_parameter(t.name).grad * z).sum())
    assert abs((plus - minus) / (2 * eps) - slope) < 1e-4 * abs(slope)


def test_a_tied_head_and_its_embedding_have_one_direction():
    made = make(wide("llama-tied"), batch(), kind="rank1")
    assert [t.name for t in made.trained].count("model.embed_tokens.weight") == 1
    assert not any("lm_head" in t.name for t in made.trained)


def test_signs_of_rank_1_are_unbiased():
    """E[(gᵀz)z] = g, and its squared length (m + 2)(n + 2)|g|² up to the kurtosis of signs: measured over many directions."""
    m, n, count = 16, 20, 4000
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = [spec.key(1, 2, k) for k in range(count)]
    a, b = (x.double() for x in noise.outer_signs(m, n, 7, keys))
    slopes = torch.einsum("km,mn,kn->k", a, g, b)  # gᵀz_k
    mean = torch.einsum("k,km,kn->mn", slopes, a, b) / count
    # Each entry of the mean has a standard error of |g|/√count at most about √(its own kurtosis).
    assert float((mean - g).norm() / g.norm()) < 1.5 * math.sqrt(m * n / count)
    assert abs(float((slopes**2).mean() / g.square().sum()) - 1) < 0.1


@pytest.mark.parametrize(
    "shape, width", [((16, 16), 16), ((15, 400), 0), ((400, 15), 0), ((64,), 0), ((2, 8, 32), 32)]
)
def test_which_tensors_are_matrices(shape, width):
    assert noise.width_of(shape) == width
