"""Which probes survive rounding, against the same in numpy and fp64."""

import numpy as np
import pytest
import torch

from zoft.method import precision
from zoft.method.space import Trained
from zoft.noise import noise


def tensor(size, scale, compute):
    theta = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.1 * scale + scale
    return Trained("w", torch.nn.Parameter(theta, False), theta, compute, 7, True)


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_is_that_of_the_rounded_probe(compute, scale):
    t = tensor(5000, scale, compute)
    z = noise.direction((5000,), 7, seed=3, step=0, direction=0, noise="gaussian").double().numpy()
    theta = t.stored.double().numpy()
    moved = torch.from_numpy(theta + 1e-3 * z).to(compute).double().numpy() - theta
    want = moved @ z / np.sqrt((moved @ moved) * (z @ z))
    assert precision.realised_cosines([t], 1e-3, seed=3, kind="gaussian")["w"] == pytest.approx(
        want, abs=2e-3
    )


def test_weak_names_the_tensor_and_an_eps_that_would_do():
    fine, lost = tensor(5000, 0.02, torch.bfloat16), tensor(5000, 4.0, torch.bfloat16)
    fine.name = "fine"
    (line,) = precision.weak_directions([fine, lost], 1e-3, seed=0, kind="rademacher")
    assert " w " in line and "compute=fp32" in line
    enough = float(line.split("; eps=")[1].split(" ")[0])
    assert precision.realised_cosines([lost], enough, seed=0, kind="rademacher")["w"] >= precision.COSINE_MIN
    assert precision.realised_cosines([lost], 1e-3, seed=0, kind="rademacher")["w"] < precision.COSINE_MIN
    lost.compute = torch.float32
    assert precision.weak_directions([fine, lost], 1e-3, seed=0, kind="rademacher") == []
