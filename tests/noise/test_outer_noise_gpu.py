"""Directions of rank 1 and flipped ones on a GPU: the bits of the CPU, but for a gaussian's last ones."""

import pytest
import torch

from zoft.noise import noise, spec
from zoft.noise.spec import GAUSSIAN_BOUND_GPU, Update

pytestmark = pytest.mark.gpu
KINDS = ("rank1", "rademacher_flipped", "gaussian_flipped")
SEED, STEP, TID = 0x1234_5678_9ABC, 7, 0xDEADBEEF


def both(shape, kind, dtype, work):
    """What `work(theta, device)` leaves and gives on each device, from the same θ."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        theta = start.clone().to(device)
        out = work(theta, device)
        found.append((theta.cpu(), None if out is None else out.cpu()))
    (a, x), (b, y) = found
    return (a, b), (x, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape, matrix", [((37, 129), True), ((300, 17), True), ((5, 2500), True), ((40, 40), False)]
)
@pytest.mark.parametrize("count", [1, 3, 70])
def test_updates_and_probes_of_both_devices(shape, matrix, dtype, kind, count):
    width = shape[1] if matrix else 0
    multipliers = tuple(float(torch.tensor((-1) ** k * 1e-3 / (k + 1))) for k in range(count))
    updates = [Update(3, SEED, multipliers, 0.99), Update(4, SEED, multipliers)]

    def work(theta, device):
        out = torch.empty(3, *shape, device=device)
        probes = [(0, 0.5), (1, 0.0), (2, -0.25)]
        noise.perturb(theta, TID, out, probes, seed=SEED, step=STEP, noise=kind, updates=updates, width=width)
        return out

    (a, b), (x, y) = both(shape, kind, dtype, work)
    if kind == "gaussian_flipped":
        bound = 3 * GAUSSIAN_BOUND_GPU + (0.01 if dtype.itemsize == 2 else 0.0)  # of the grid's own steps
        assert float((a.double() - b.double()).abs().max()) < bound
        assert float((x.double() - y.double()).abs().max()) < bound
    else:
        assert torch.equal(a, b) and torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_rows_directions_and_signs_of_both_devices(kind):
    shape = (500, 130)
    rows = torch.tensor([499, 0, 7, 7, 131])
    found = []
    for device in ("cpu", "cuda"):
        theta, out = torch.ones(shape, device=device), torch.empty(5, 130, device=device)
        noise.gather(theta, TID, rows.to(device), out, 5, 0.25, seed=SEED, step=STEP, noise=kind, width=130)
        z = noise.direction(
            shape, TID, seed=SEED, step=STEP, direction=5, noise=kind, device=device, width=130
        )
        a, b = noise.outer_signs(500, 130, TID, [spec.key(SEED, STEP, k) for k in range(40)], device)
        found.append([t.cpu() for t in (out, z, a, b)])
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_an_update_over_directions_of_other_steps():
    u = Update(9, SEED, (2.0, 0.5), steps=(3, 7), directions=(1, 4))
    (a, b), _ = both(
        (37, 129),
        "rank1",
        torch.float16,
        lambda theta, device: noise.advance(theta, TID, [u], "rank1", width=129),
    )
    assert torch.equal(a, b)
