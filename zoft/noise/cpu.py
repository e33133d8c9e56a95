"""The CPU backend of `zoft.noise`: plans, threads and the call into the compiled kernels."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from zoft.noise import kernels
from zoft.noise.kernels import run_rows
from zoft.noise.spec import KINDS, Mask, Update, key, keys_of
from zoft.noise.storage import BF16, FP16, FP32, FP64, ZERO

_CODES = {
    torch.float32: FP32,
    torch.bfloat16: BF16,
    torch.float16: FP16,
    torch.float64: FP64,
}
_PIECE = (
    128 * kernels.CHUNK
)  # elements that are worth a hand-over to another thread: some 0.1 ms of gaussian noise
_NONE = np.uint64(0)


def perturb(
    theta: Tensor,
    tid: int,
    out: Tensor | None,
    probes: tuple[tuple[int, float], ...],
    seed: int,
    step: int,
    noise: str,
    updates: tuple[Update, ...],
    momentum: Tensor | None,
    beta: float,
    first: int = 0,
    floor: float | None = None,
    mask: Mask | None = None,
    width: int = 0,
) -> None:
    """Run `zoft.noise.perturb` on a CPU tensor whose first element is number `first`. updates: without no-ops."""
    code, n = _CODES[theta.dtype], theta.numel()
    work = np.float64 if code == FP64 else np.float32
    plan = _plan(updates, probes, seed, step, work, noise)
    address, kind = _address(theta, first), KINDS[noise]
    buffer = _NONE if momentum is None else _address(momentum, first)
    target, out_code = (_NONE, 0) if out is None else (np.uint64(out.data_ptr()), _CODES[out.dtype])
    rules = _rules(beta, floor, mask)

    def piece(start: int, end: int) -> None:
        shape = (out_code, n, start)
        kernels.run(
            address, code, first + start, first + end, tid, kind, width, buffer, rules, plan, target, shape
        )

    _spread(piece, n, _PIECE)


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
    """Run `zoft.noise.gather` on a CPU tensor whose first element is number `start`."""
    code, out_code, size = _CODES[theta.dtype], _CODES[out.dtype], out.numel() // len(rows)
    index = rows.numpy()
    if index.min() < 0 or index.max() >= len(theta):
        raise IndexError(f"rows [{index.min()}, {index.max()}] of a tensor that has {len(theta)}")
    work = np.float64 if code == FP64 else np.float32
    plan, rules = _plan((), ((direction, scale),), seed, step, work, noise), _rules(0.0, None, mask)
    source, target, kind = _address(theta, start), np.uint64(out.data_ptr()), KINDS[noise]

    def piece(first: int, last: int) -> None:
        run_rows(
            source, code, index, first, last, size, start, tid, kind, width, rules, plan, target, out_code
        )

    _spread(piece, len(rows), -(-_PIECE // size))


def direction(
    out: Tensor, tid: int, seed: int, step: int, direction: int, noise: str, width: int = 0
) -> None:
    """Run `zoft.noise.direction` into a CPU tensor."""
    code, n, kind = _CODES[out.dtype], out.numel(), KINDS[noise]
    plan = _plan((), ((direction, 1.0),), seed, step, np.float32, noise)
    target = np.uint64(out.data_ptr())

    rules = _rules(0.0, None, None)

    def piece(start: int, end: int) -> None:
        shape = (code, n, start)
        kernels.run(_NONE, ZERO, start, end, tid, kind, width, _NONE, rules, plan, target, shape)

    _spread(piece, n, _PIECE)


def signs(out: Tensor, tid: int, purpose: int, keys: np.ndarray) -> None:
    """Write row or column signs of rank1 into out [D, n], for D keys uint32 [D, 2]."""
    kernels.signs(out.numpy(), tid, purpose, keys)


def _address(tensor: Tensor, first: int) -> np.uint64:
    """Return where element 0 would be if the tensor's first is number `first`."""
    return np.uint64((tensor.data_ptr() - first * tensor.element_size()) % 2**64)


@lru_cache(maxsize=4096)  # one for each tensor with a threshold of its own
def _rules(beta: float, floor: float | None, mask: Mask | None):
    """Return what `kernels.run` takes as its rules: fp64 [7], which holds them exactly."""
    kind, threshold, share, words = kernels.ALL, 0.0, 0, (0, 0)
    if mask is not None and mask.threshold is not None:
        kind, threshold = kernels.SMALL, mask.threshold
    elif mask is not None:
        kind, share, words = kernels.CHOSEN, mask.share, key(mask.seed, mask.period, 0)
    return np.array([beta, -np.inf if floor is None else floor, kind, threshold, share, *words])


@lru_cache(
    maxsize=64
)  # one step's plan serves all its tensors, and making it costs as much as a small tensor's noise
def _plan(
    updates: tuple[Update, ...], probes: tuple[tuple[int, float], ...], seed: int, step: int, work: type, noise: str
):  # fmt: skip
    """Return what `kernels.run` takes as its plan. Zeros lose their sign: equal plans must be the same plan."""
    keys, values, groups = [], [], []
    counts = [1 if u.is_nothing else len(u.multipliers) for u in updates]
    for u, count in zip(updates, counts):  # of NOTHING the last direction alone
        keys += [keys_of(u.seed, s, k, noise) for s, k in u.where()][-count:] if count else []
        values += [m + 0.0 for m in u.multipliers][-count:] if count else []
    for (which, silent), group in groupby(probes, lambda probe: (probe[0], probe[1] == 0)):
        scales = [scale + 0.0 for _, scale in group]
        keys.append(keys_of(seed, step, which, noise))
        values += scales
        groups.append(-len(scales) if silent else len(scales))
    return (
        np.array(counts, np.int64),
        np.array(keys, np.uint32).reshape(-1, len(keys_of(0, 0, 0, noise))),
        np.array(values, work),
        np.array([u.decay + 0.0 for u in updates], work),
        np.array([u.restore + 0.0 for u in updates], work),
        np.array([key(u.seed, u.step, 0) for u in updates], np.uint32).reshape(-1, 2),
        np.array(groups, np.int64),
    )


# ---- threads -------------------------------------------------------------------------------------------------------

_pool: tuple[int, ThreadPoolExecutor] | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # a forked child inherits the pool but none of its threads


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool[0] != count:
        _pool = count, ThreadPoolExecutor(count, "zoft-noise")
    return _pool[1]


def _spread(piece, n: int, grain: int) -> None:
    """piece(start, end) over [0, n), on as many threads as torch uses if n is large. All of it or nothing happens.

    grain: the least worth handing to a thread; pieces start at multiples of it.
    """
    count = torch.get_num_threads()
    if count == 1 or n < 2 * grain:
        piece(0, n)  # one call of compiled code: no signal handler runs inside
        return
    size = grain * max(1, n // (4 * count * grain))
    starts = deque(range(0, n, size))
    pool = _threads(count)

    def drain() -> None:
        while starts:
            try:
                start = starts.popleft()
            except IndexError:  # another thread took the last one
                return
            piece(start, min(n, start + size))

    def everything() -> None:
        helpers = [pool.submit(drain) for _ in range(count - 1)]
        drain()
        for helper in helpers:
            if not helper.cancel():  # one that has not begun has nothing left to do
                helper.result()

    _uninterrupted(pool, everything)


def _uninterrupted(pool: ThreadPoolExecutor, work) -> None:
    """Run work in a pool thread and wait. An interrupt while waiting leaves it not begun at all, or finished."""
    begun, finished = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def task() -> None:
        if begun.acquire(blocking=False):
            try:
                work()
            except BaseException as error:  # handed to the caller below
                errors.append(error)
            finally:
                finished.set()

    try:
        pool.submit(task)
        finished.wait()
    except BaseException:
        if not begun.acquire(blocking=False):
            while not finished.is_set():
                try:
                    finished.wait()
                except KeyboardInterrupt:  # the first one is on its way already
                    pass
        raise
    if errors:
        raise errors[0]
