"""Perturb, update and draw tensors under the specification (zoft.noise.spec), by the backend of their device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from zoft.noise.spec import COLUMNS, KINDS, NOTHING, OUTER_MIN, PART, RADEMACHER, ROWS, Mask, Probes, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def advance(
    theta: Tensor,
    tid: int,
    updates: Sequence[Update],
    noise: str,
    *,
    momentum: Tensor | None = None,
    beta: float = 0.0,
    start: int = 0,
    floor: float | None = None,
    mask: Mask | None = None,
    width: int = 0,
) -> None:
    """Apply updates to θ in place, in order, in one pass over memory.

    θ <- round(decay·θ + s), s = Σ_k m_k·z_k, or with momentum: buffer <- beta·buffer + s and s = buffer

    Args:
        theta: The weights, contiguous, fp32, bf16, fp16 or fp64.
        tid: The id of the tensor in the noise counter.
        updates: The updates. A skipped step must not be among them: with momentum even an empty update moves θ.
        noise: The kind of noise.
        momentum: A buffer of theta's shape, fp32 (fp64 for fp64), or None.
        beta: The decay of the buffer.
        start: The first element, a multiple of PART, if theta and momentum are a contiguous part of a tensor. The bits are
            those of the whole.
        floor: The smallest value that an update may leave; applied before rounding.
        mask: The mask of the tensor. A magnitude mask goes with no restore, because θ elsewhere says nothing about θ.
        width: The number of columns of the tensor as a matrix (`width_of`), which rank1 and flipped noise need; 0: none.
    """
    more: dict[str, Any] = {"momentum": momentum, "beta": beta, "start": start, "floor": floor, "mask": mask}
    more["width"] = width
    perturb(theta, tid, None, (), seed=0, step=0, noise=noise, updates=updates, **more)


def perturb(
    theta: Tensor,
    tid: int,
    out: Tensor | None,
    probes: Probes,
    *,
    seed: int,
    step: int,
    noise: str,
    updates: Sequence[Update] = (),
    momentum: Tensor | None = None,
    beta: float = 0.0,
    start: int = 0,
    floor: float | None = None,
    mask: Mask | None = None,
    width: int = 0,
) -> None:
    """Apply updates to θ as `advance` does, then write every probe of it, in one pass over memory.

    out[i] = cast(θ + scale_i·z_{direction_i})

    Args:
        theta: The weights, as in `advance`.
        tid: The id of the tensor in the noise counter.
        out: The probes, contiguous [len(probes), *theta.shape], fp32, bf16, fp16 or fp64. It may be theta itself
            (`theta[None]`, one probe), but must not overlap it partly. None writes no probes.
        probes: A pair (direction, scale) per probe. Neighbouring probes of one direction share one draw of it.
        seed: The run's seed.
        step: The step whose noise the probes have.
        noise: The kind of noise.
        updates: Updates to apply first; with them momentum, beta, start, floor, mask and width as in `advance`.
    """
    assert noise in KINDS, noise
    live = tuple(_live(updates, momentum is not None and beta != 0))
    assert theta.is_contiguous(), (theta.shape, theta.stride())
    assert start >= 0 and start % PART == 0, start
    if out is not None:
        assert out.is_contiguous() and out.shape == (len(probes), *theta.shape), (
            out.shape,
            len(probes),
            theta.shape,
        )
        assert out.device == theta.device, (out.device, theta.device)
    else:
        assert not probes, probes
    if momentum is not None:
        same = momentum.shape == theta.shape and momentum.device == theta.device and momentum.is_contiguous()
        assert same and momentum.element_size() == max(4, theta.element_size()), (
            momentum.shape,
            momentum.dtype,
        )
    if mask is not None and mask.threshold is not None:
        moved = out is not None and out.data_ptr() == theta.data_ptr()
        assert not moved and not any(u.restore for u in live), (
            "a mask by magnitude of θ that is moved in place"
        )
    if mask is not None and mask.every:
        of = mask.at
        for own, some in groupby(live, lambda u: of(u.step)):
            more: dict[str, Any] = {
                "momentum": momentum,
                "beta": beta,
                "start": start,
                "floor": floor,
                "width": width,
            }
            perturb(theta, tid, None, (), seed=0, step=0, noise=noise, updates=[*some], mask=own, **more)
        live, mask = (), mask.at(step)
    if theta.numel() and (live or probes):
        backend = _backend(theta.device.type)
        backend.perturb(
            theta, tid, out, tuple(probes), seed, step, noise, live, momentum, beta, start, floor, mask, width
        )


def _live(updates: Sequence[Update], coasts: bool) -> Iterator[Update]:
    """Updates that change something; where only the restore is left of one, it is marked as NOTHING else."""
    for u in updates:
        if not u.is_nothing and (coasts or u.decay != 1 or any(u.multipliers)):
            yield u
        elif u.restore:
            yield replace(u, decay=NOTHING)


def gather(
    theta: Tensor,
    tid: int,
    rows: Tensor,
    out: Tensor,
    direction: int,
    scale: float,
    *,
    seed: int,
    step: int,
    noise: str,
    start: int = 0,
    mask: Mask | None = None,
    width: int = 0,
) -> None:
    """Rows of one probe, with noise made for these rows only.

    out[n] = cast(θ[rows[n]] + scale·z[rows[n]])

    theta: contiguous [R, ...]; rows: int64 [N], each in [0, R); out: contiguous [N, ...]. IndexError for other rows on
    a CPU; a GPU does not look. start, mask, width: as in `advance`.
    """
    assert noise in KINDS, noise
    assert theta.is_contiguous() and out.is_contiguous() and rows.ndim == 1, (
        theta.stride(),
        out.stride(),
        rows.shape,
    )
    assert out.shape == (len(rows), *theta.shape[1:]), (out.shape, rows.shape, theta.shape)
    assert theta.device == rows.device == out.device, (theta.device, rows.device, out.device)
    assert start >= 0 and start % PART == 0, start
    mask = mask.at(step) if mask is not None else None
    if out.numel():
        _backend(theta.device.type).gather(
            theta, tid, rows.contiguous(), out, direction, scale, seed, step, noise, start, mask, width
        )


def direction(
    shape: Sequence[int],
    tid: int,
    *,
    seed: int,
    step: int,
    direction: int,
    noise: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    width: int = 0,
) -> Tensor:
    """Return z itself, as a new tensor.

    Args:
        shape: The shape of the tensor.
        tid: Its id in the noise counter.
        seed: The run's seed.
        step: The step, from 0.
        direction: The direction, from 0.
        noise: The kind of noise.
        device: The device of the result.
        dtype: The dtype of the result; None is fp32.
        width: As in `advance`.
    """
    import torch

    assert noise in KINDS, noise
    out = torch.empty(tuple(shape), dtype=dtype or torch.float32, device=device)
    if out.numel():
        _backend(out.device.type).direction(out, tid, seed, step, direction, noise, width)
    return out


def outer_signs(
    rows: int, columns: int, tid: int, keys: Sequence[tuple[int, int]], device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return a [D, rows] and b [D, columns], fp32: the signs of rank1 of each of D keys (spec.key) for one matrix."""
    import numpy as np
    import torch

    words = np.array(keys, np.uint32).reshape(-1, 2)
    a, b = (torch.empty(len(keys), n, device=device) for n in (rows, columns))
    backend = _backend(a.device.type)
    backend.signs(a, tid, ROWS, words)
    backend.signs(b, tid, COLUMNS, words)
    return a, b


def width_of(shape: Sequence[int]) -> int:
    """Return the width by which a tensor of this shape is a matrix for rank1 noise, or 0 if it is none.

    The last dimension, of a tensor with OUTER_MIN rows and columns at least. For a narrow matrix, signs per element cost
    nothing and have less variance.
    """
    import math

    if len(shape) < 2:
        return 0
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return columns if min(rows, columns) >= OUTER_MIN else 0


def moving(theta: Tensor, tid: int, mask: Mask | None, start: int = 0) -> Tensor:
    """Which elements the mask (of step 0, where it is drawn anew) lets move: bool, of theta's shape. start: as in `advance`."""
    import torch

    if mask is None:
        return torch.ones_like(theta, dtype=torch.bool)
    if mask.threshold is not None:
        size = theta.abs()  # a 16-bit tensor would be compared with the threshold rounded to 16 bits
        return (size.float() if size.itemsize < 4 else size) <= mask.threshold
    found = torch.zeros(theta.shape, dtype=torch.float32, device=theta.device)
    advance(found, tid, [Update(0, 0, (1.0,))], RADEMACHER, start=start, mask=mask)
    return found != 0


def _backend(device: str):
    """The module that makes noise on that kind of device; imported when first needed, as both compile code."""
    if device == "cpu":
        from zoft.noise import cpu

        return cpu
    assert device == "cuda", f"no noise backend for device {device!r}"
    from zoft.noise import triton

    return triton
