"""Measure whether a probe survives rounding: the realised direction of every trained tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoft.method.space import Trained
from zoft.noise import noise
from zoft.noise.noise import moving

COSINE_MIN = 0.95
SAMPLE = 1 << 20  # elements of a tensor that are looked at


def realised_cosines(trained: Sequence[Trained], eps: float, *, seed: int, kind: str) -> dict[str, float]:
    """Return the cosine, tensor by tensor, between z and what a forward at θ + eps·z is really given, where a mask lets it move.

    cos(fl(θ + eps·z) − θ, z), fl to the tensor's compute dtype; the first SAMPLE elements of each tensor.
    1 is exact; near 0 the probe rounds away and the loss says nothing about that tensor.
    """
    return {t.name: cosine(t, eps, seed, kind, t.compute) for t in trained if t.stored.numel()}


def cosine(t: Trained, eps: float, seed: int, kind: str, dtype: torch.dtype) -> float:
    """Return cos(fl(θ + eps·z) − θ, z) of one tensor, fl to dtype; over the elements that its mask lets move."""
    theta = t.stored.flatten()[:SAMPLE]
    out = torch.empty(1, *theta.shape, dtype=dtype, device=theta.device)
    noise.perturb(theta, t.id, out, [(0, eps)], seed=seed, step=0, noise=kind, width=t.width)
    z = noise.direction(
        theta.shape, t.id, seed=seed, step=0, direction=0, noise=kind, device=theta.device, width=t.width
    ).double()
    moved = out[0].double() - theta.double()
    if t.mask is not None:
        on = moving(theta, t.id, t.mask)
        if not on.any():
            return 1.0
        moved, z = moved[on], z[on]
    return float((moved @ z) / (moved.norm() * z.norm()).clamp(min=1e-300))


def weak_directions(trained: Sequence[Trained], eps: float, *, seed: int, kind: str) -> list[str]:
    """Return one line for every tensor whose realised direction is below COSINE_MIN: its name, and what would do."""
    lines = []
    for name, found in realised_cosines(trained, eps, seed=seed, kind=kind).items():
        if found >= COSINE_MIN:
            continue
        t = next(t for t in trained if t.name == name)
        enough = next(
            (eps * 2**k for k in range(1, 20) if cosine(t, eps * 2**k, seed, kind, t.compute) >= COSINE_MIN),
            None,
        )
        larger = f"eps={enough:.2g} or " if enough else ""
        lines.append(
            f"eps={eps:g}: probes of {name} round away (cosine {found:.2f} with z); {larger}compute=fp32 would do"
        )
    return lines
