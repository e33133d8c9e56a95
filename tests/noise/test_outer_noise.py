"""Directions of rank 1 and flipped ones on a CPU, against the slow twin, bit for bit."""

import noise_twin as twin
import numpy as np
import pytest
import torch

from zoft.noise import noise, spec
from zoft.noise.spec import GAUSSIAN_BOUND, Update

KINDS = ("rank1", "gaussian_flipped", "rademacher_flipped")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    (16, 16),
    (37, 129),
    (5, 2500),
    (300, 17),
)  # rows within, across and beyond the 2,048 elements worked on at once
SEED, STEP, TID = 0x1234_5678_9ABC, 7, 0xDEADBEEF


def drawn(shape, kind, width, direction=0, step=STEP):
    where = {"seed": SEED, "step": step, "direction": direction}
    return noise.direction(shape, TID, noise=kind, width=width, **where)


def twin_z(shape, kind, width, direction=0, step=STEP):
    index = np.arange(shape[0] * shape[1])
    keys = twin.key(SEED, step, direction), twin.key(SEED, step, 2**32 - 1)
    return twin.z(index, TID, keys[0], kind, width, keys[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrix", [True, False])
def test_directions_are_the_specification(shape, kind, matrix):
    width = shape[1] if matrix else 0
    got = drawn(shape, kind, width, direction=3).flatten().double().numpy()
    off = np.abs(got - twin_z(shape, kind, width, direction=3)).max()
    assert off < GAUSSIAN_BOUND if kind == "gaussian_flipped" else off == 0


def test_known_signs():
    """The values of this specification's version, written down once: they may never change."""
    a, b = noise.outer_signs(16, 20, tid=1, keys=[spec.key(1, 2, 3)])
    words = [twin.philox((0, 0, 1, purpose), twin.key(1, 2, 3))[0] for purpose in (4, 5)]
    for found, word in zip((a[0], b[0]), words):
        assert found.tolist() == [1.0 if int(word) >> i & 1 else -1.0 for i in range(len(found))]
    assert torch.equal(
        a[0][:, None] * b[0],
        noise.direction((16, 20), 1, seed=1, step=2, direction=3, noise="rank1", width=20),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_updates_are_the_twins_bit_for_bit(shape, dtype, kind):
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    updates = [Update(3, SEED, (1e-3, -2e-3, 3e-3), 0.99), Update(4, SEED, (5e-4, 1e-3, -1e-3))]

    def z_of(u, k):  # the backend's own bits, which the test above compares with the specification
        return drawn(shape, kind, shape[1], k, u.step).flatten().numpy()

    def rounding_of(u):
        return twin.rounding_bits(np.arange(theta.numel()), TID, twin.key(SEED, u.step, 0))

    expected, _ = twin.advance(theta, z_of, rounding_of, updates)
    noise.advance(theta, TID, updates, kind, width=shape[1])
    assert np.array_equal(theta.double().flatten().numpy(), expected.astype(np.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_over_directions_of_other_steps_sums_them(kind):
    shape = (37, 129)
    theta = torch.zeros(shape)
    noise.advance(theta, TID, [Update(9, SEED, (2.0, 0.5), steps=(3, 7), directions=(1, 4))], kind, width=129)
    expected = 2.0 * drawn(shape, kind, 129, 1, 3) + 0.5 * drawn(shape, kind, 129, 4, 7)
    assert torch.equal(theta, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_rows_and_parts_have_the_bits_of_the_whole(dtype, kind):
    shape = (64, 130)
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    where = {"seed": SEED, "step": STEP, "noise": kind, "width": 130}
    whole = torch.empty(2, *shape, dtype=torch.float32)
    noise.perturb(theta, TID, whole, [(0, 0.5), (1, -0.25)], **where)
    exact = theta.double() + 0.5 * drawn(shape, kind, 130).double()
    assert float((whole[0].double() - exact).abs().max()) < 1e-6 * (1 + float(exact.abs().max()))
    rows = torch.tensor([63, 0, 7, 7])
    some = torch.empty(4, 130)
    noise.gather(theta, TID, rows, some, 1, -0.25, **where)
    assert torch.equal(some, whole[1][rows])
    half = torch.empty(1, 64 * 130 - 128 * 20)
    noise.perturb(theta.flatten()[128 * 20 :], TID, half, [(0, 0.5)], start=128 * 20, **where)
    assert torch.equal(half[0], whole[0].flatten()[128 * 20 :])


def test_flipped_directions_share_one_draw():
    """|z| is the same for all of a step's directions, and their signs differ as rank 1 does."""
    one, two = (drawn((32, 48), "gaussian_flipped", 48, k) for k in (0, 1))
    assert torch.equal(one.abs(), two.abs()) and not torch.equal(one, two)
    flips = (one / two).round()
    assert torch.equal(flips, flips[:, :1] * flips[:1] * flips[0, 0])


def test_directions_are_uncorrelated():
    """⟨z_k, z_l⟩/n of two directions of a step has mean 0, and the variance of signs of rank 1: 1 over all, for rank1."""
    n, m = 64, 64
    zs = torch.stack([drawn((m, n), "gaussian_flipped", n, k).flatten() for k in range(200)]).double()
    gram = zs @ zs.T / (m * n)
    off = gram[~torch.eye(200, dtype=torch.bool)]
    assert abs(float(off.mean())) < 5 / (200 * (m * n) ** 0.5)
    assert float(off.std()) < 3 / (m * n) ** 0.5
