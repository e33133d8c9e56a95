"""The CUDA backend of `zoft.noise`: one kernel a tensor reads θ, applies updates and writes every probe.

Keys, multipliers, decays, scales and beta are read from device memory (a `Plan`), so that a captured graph can
be fed new ones. Every operation is rounded as the specification says (fusion of products and sums is off, and
fused where it is spelled out), so rademacher gives the bits of the CPU backend; a gaussian uses the hardware's
own lg2, sin and cos, and stays within GAUSSIAN_BOUND_GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from zoft.noise.spec import FLIPPED, KINDS, PART, SHARED, Mask, Probes, Update, key
from zoft.noise.triton_kernels import ALL, CHOSEN, SMALL, _pass, _pass_small, _rows, _sign_vectors, _signs

PROBES_MAX = 16  # probes that one launch unrolls
_LANES = 128  # of 8 elements each: what one program of 2 warps works on
_SMALL = 64  # lanes of a program of one warp, where tensors are small
_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
_OPTIONS_SMALL = {"num_warps": 1, "enable_fp_fusion": False}


# ---- plans ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Hold what a launch reads from the device, and what of it is fixed in the compiled kernel.

    keys: int32 [U·Q + U + P, 2], of the updates' directions, their rounding, the probes; [U + 1] more of what the directions of
    each update, and those of the probes, share under a flipped kind.
    values: work dtype [U·Q + U + P + 1], multipliers, decays, scales, beta; [U] more where there are restores.
    fresh, silent: bit p says that probe p draws anew, or has scale 0.
    """

    keys: Tensor
    values: Tensor
    updates: int  # U
    directions: int  # Q
    probes: int  # P
    fresh: int
    silent: int
    restores: bool = False  # of the updates, along their last directions


def shape_of(probes: Probes) -> tuple[int, int]:
    """Return (fresh, silent) of a plan's probes."""
    fresh = silent = 0
    drawn = None
    for p, (direction, scale) in enumerate(probes):
        if scale == 0:
            silent |= 1 << p
        elif direction != drawn:
            fresh, drawn = fresh | 1 << p, direction
    return fresh, silent


@lru_cache(maxsize=64)  # one upload a step serves all its tensors
def plan_of(
    updates: tuple[Update, ...], probes: tuple[tuple[int, float], ...], seed: int, step: int, beta: float, wide: bool,
    device: torch.device, flipped: bool = False,
) -> Plan:  # fmt: skip
    """Return the plan of these updates (all of one number of directions, moves aside) and probes, uploaded."""
    directions = max((1 if u.is_nothing else len(u.multipliers) for u in updates), default=0)
    keys: list[tuple[int, int]] = []
    values: list[float] = []
    restores = any(u.restore for u in updates)
    for u in updates:
        own = u.keys()
        keys += [own[-1]] * directions if u.is_nothing else own
        values += [0.0] * directions if u.is_nothing else u.multipliers
    keys += [key(u.seed, u.step, 0) for u in updates]
    keys += [key(seed, step, direction) for direction, _ in probes]
    if flipped:
        assert not any(u.steps for u in updates), "flipped directions of several steps in one update"
        keys += [key(u.seed, u.step, SHARED) for u in updates] + [key(seed, step, SHARED)]
    values += [u.decay for u in updates] + [scale for _, scale in probes] + [beta]
    values += [u.restore for u in updates] if restores else []
    keys_host = torch.from_numpy(np.array(keys or [(0, 0)], np.uint32).view(np.int32))
    values_host = (
        torch.tensor(values, dtype=torch.float64 if wide else torch.float32, device="cpu") + 0.0
    )  # -0 is 0: equal plans
    return Plan(
        _upload(keys_host, device),
        _upload(values_host, device),
        len(updates),
        directions,
        len(probes),
        *shape_of(probes),
        restores,
    )


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the CPU does not wait for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# ---- launches ------------------------------------------------------------------------------------------------------


def launch(
    theta: Tensor | None, tid: int, out: Tensor | None, plan: Plan, noise: str, momentum: Tensor | None = None,
    start: int = 0, floor: float | None = None, mask: Mask | None = None, width: int = 0,
) -> None:  # fmt: skip
    """Send θ (None: zeros) through a plan: updates in place, then its probes into out [P, *theta.shape].

    start: θ (and momentum) is a contiguous part of the tensor, from this element on, a multiple of PART. floor, mask, width:
    the tensor's.
    """
    assert start % PART == 0, start
    some = theta if theta is not None else out
    assert some is not None
    n = some.numel() if theta is not None else some.numel() // plan.probes
    in_place = theta is not None and out is not None and out.data_ptr() == theta.data_ptr()
    width = width if KINDS[noise] > 1 else 0
    with _on(some):
        signs, groups = sign_words(plan, tid, -(-(start + n) // width), width) if width else (plan.keys, 1)
        _pass[(triton.cdiv(n, 8 * _LANES),)](
            some, momentum if momentum is not None else some, out if out is not None else some,
            plan.keys, plan.values, signs, signs.shape[-1], n, start, _signed(tid), plan.updates, plan.directions,
            **_mask(mask), PARTIAL=start != 0, WORK=tl.float64 if some.dtype == torch.float64 and theta is not None else tl.float32,
            HAS_THETA=theta is not None, HAS_UPDATES=plan.updates > 0, ONE=_one(plan), RESTORE=plan.restores, HAS_MOMENTUM=momentum is not None,
            WRITE_THETA=not in_place, STOCHASTIC=some.dtype in (torch.float16, torch.bfloat16),
            BF16=some.dtype == torch.bfloat16, PROBES=plan.probes, FRESH=plan.fresh, SILENT=plan.silent,
            NARROW=out is not None and out.itemsize == 2, KIND=KINDS[noise], WIDTH=width, GROUPS=groups, LANES=_LANES, FLOOR=floor, **_OPTIONS,
        )  # fmt: skip


def sign_words(plan: Plan, tid: int, rows: int, columns: int) -> tuple[Tensor, int]:
    """Return (the signs of a matrix for all directions of a plan, int32 [J, rows + columns], words an update takes)."""
    groups = max(1, -(-plan.directions // 32))
    words = plan.updates * groups + -(-plan.probes // 32)
    signs = torch.empty(words, rows + columns, dtype=torch.int32, device=plan.keys.device)
    _signs[(triton.cdiv(rows, 128) + triton.cdiv(columns, 128), words)](
        signs, plan.keys, rows, columns, _signed(tid), plan.updates, plan.directions, GROUPS=groups, PROBES=plan.probes,
        num_warps=1,
    )  # fmt: skip
    return signs, groups


def signs(out: Tensor, tid: int, purpose: int, keys: np.ndarray | Tensor) -> None:
    """Write row or column signs of rank1 into out [D, n], of any float dtype, for D keys: uint32 [D, 2], or int32 on the device."""
    if isinstance(keys, np.ndarray):
        keys = _upload(torch.from_numpy(keys.view(np.int32)), out.device)
    with _on(out):
        _sign_vectors[(triton.cdiv(out.shape[1], 128), len(out))](
            out, keys, out.shape[1], _signed(tid), PURPOSE=purpose, num_warps=1
        )  # fmt: skip


def table_of(sizes: list[int], tids: list[int], device: torch.device) -> Tensor:
    """Return the table by which `launch_small` finds its tensors, which lie end to end in the given order."""
    rows, start = [], 0
    for size, tid in zip(sizes, tids):
        for at in range(0, size, 8 * _SMALL):
            rows.append((start + at, at, min(8 * _SMALL, size - at), _signed(tid)))
        start += size
    return torch.tensor(rows, dtype=torch.int64).to(device)


def launch_small(
    theta: Tensor,
    table: Tensor,
    out: Tensor | None,
    plan: Plan,
    noise: str,
    momentum: Tensor | None = None,
    narrow: Tensor | None = None,
) -> None:
    """Send many small fp32 tensors, end to end in theta [total], through a plan in one launch.

    out: fp32 [P, total]; narrow: the same in 16 bits.
    """
    with _on(theta):
        _pass_small[(len(table),)](
            theta, momentum if momentum is not None else theta, out if out is not None else theta,
            narrow if narrow is not None else theta, table,
            plan.keys, plan.values, theta.numel(), plan.updates, plan.directions,
            NARROW=narrow is not None, HAS_UPDATES=plan.updates > 0, ONE=_one(plan), RESTORE=plan.restores, HAS_MOMENTUM=momentum is not None, PROBES=plan.probes,
            FRESH=plan.fresh, SILENT=plan.silent, KIND=KINDS[noise], LANES=_SMALL, **_OPTIONS_SMALL,
        )  # fmt: skip


def launch_rows(
    theta: Tensor, tid: int, rows: Tensor, out: Tensor, plan: Plan, noise: str, start: int = 0,
    mask: Mask | None = None, width: int = 0,
) -> None:  # fmt: skip
    """Write out[n] = cast(θ[rows[n]] + scale·z[rows[n]]), rows [P·N] probe-major; rows are not checked. plan: no updates."""
    size = out.numel() // len(rows)
    lanes = min(_LANES, max(16, triton.next_power_of_2(triton.cdiv(size + 127, 8))))
    width = width if KINDS[noise] > 1 else 0
    assert plan.updates == 0 and len(rows) % plan.probes == 0, (plan.updates, len(rows), plan.probes)
    with _on(theta):
        signs = sign_words(plan, tid, -(-(start + theta.numel()) // width), width)[0] if width else plan.keys
        _rows[(len(rows), triton.cdiv(size + 127, 8 * lanes))](
            theta, rows, out, plan.keys, plan.values, signs, signs.shape[-1], size, start, len(rows) // plan.probes,
            plan.probes, _signed(tid), **_mask(mask),
            WORK=tl.float64 if theta.dtype == torch.float64 else tl.float32,
            SILENT=plan.silent == (1 << plan.probes) - 1, NARROW=out.itemsize == 2, KIND=KINDS[noise], WIDTH=width, LANES=lanes,
            **(_OPTIONS if lanes == _LANES else _OPTIONS_SMALL),
        )  # fmt: skip


def perturb(
    theta: Tensor, tid: int, out: Tensor | None, probes: tuple[tuple[int, float], ...], seed: int, step: int, noise: str,
    updates: tuple[Update, ...], momentum: Tensor | None, beta: float, start: int = 0, floor: float | None = None,
    mask: Mask | None = None, width: int = 0,
) -> None:  # fmt: skip
    """Run `zoft.noise.perturb` on a CUDA tensor. More than PROBES_MAX probes take more launches."""
    wide, flipped = theta.dtype == torch.float64, bool(KINDS[noise] & FLIPPED)
    runs, where = _alike(updates), (start, floor, mask, width)
    for early in runs[:-1]:
        plan = plan_of(early, (), seed, step, beta, wide, theta.device, flipped)
        launch(theta, tid, None, plan, noise, momentum, *where)
    last = runs[-1] if runs else ()
    rows = None if out is None else out.view(len(probes), theta.numel())
    for first in range(0, max(1, len(probes)), PROBES_MAX):
        some = probes[first : first + PROBES_MAX]
        plan = plan_of(() if first else last, some, seed, step, beta, wide, theta.device, flipped)
        part = None if rows is None else rows[first : first + len(some)]
        launch(theta, tid, part, plan, noise, momentum, *where)


def _alike(updates: tuple[Update, ...]) -> list[tuple[Update, ...]]:
    """Cut where the number of directions changes, which a launch has one of; moves go with any but none."""
    runs: list[tuple[Update, ...]] = []
    size = None  # of the last run; None: moves so far
    for u in updates:
        own = None if u.is_nothing else len(u.multipliers)
        if runs and (own == size or (own is None and size) or (size is None and own)):
            runs[-1] += (u,)
            size = size or own
        else:
            runs.append((u,))
            size = own
    return runs


def direction(
    out: Tensor, tid: int, seed: int, step: int, direction: int, noise: str, width: int = 0
) -> None:
    """Run `zoft.noise.direction` into a CUDA tensor."""
    flipped = bool(KINDS[noise] & FLIPPED)
    plan = plan_of((), ((direction, 1.0),), seed, step, 0.0, False, out.device, flipped)
    launch(None, tid, out.view(1, -1), plan, noise, width=width)


def gather(
    theta: Tensor,
    tid: int,
    rows: Tensor,
    out: Tensor,
    direction: int,
    scale: float,
    seed: int,
    step: int,
    noise: str,
    start: int = 0,
    mask: Mask | None = None,
    width: int = 0,
) -> None:
    """Run `zoft.noise.gather` on a CUDA tensor; rows are not checked."""
    wide, flipped = theta.dtype == torch.float64, bool(KINDS[noise] & FLIPPED)
    plan = plan_of((), ((direction, scale),), seed, step, 0.0, wide, theta.device, flipped)
    launch_rows(theta, tid, rows, out, plan, noise, start, mask, width)


def _one(plan: Plan) -> int:
    """The directions of a plan's only update, where they are few enough to be unrolled; else 0."""
    return plan.directions if plan.updates == 1 and plan.directions <= 4 else 0


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _mask(mask: Mask | None) -> dict[str, Any]:
    """Return what a launch is told of a mask."""
    share, k0, k1 = 0, 0, 0
    if mask is not None and mask.threshold is None:
        share, (k0, k1) = mask.share, key(mask.seed, mask.period, 0)
    kind = ALL if mask is None else CHOSEN if mask.threshold is None else SMALL
    threshold = mask.threshold if mask is not None and mask.threshold is not None else 0.0
    return {"threshold": threshold, "share": share, "mask0": _signed(k0), "mask1": _signed(k1), "MASK": kind}


def _on(tensor: Tensor):
    return (
        torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    )  # a CPU: Triton's interpreter
