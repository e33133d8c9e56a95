"""How fast this machine is at what a step is made of, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from zoft.noise import noise
from zoft.noise.spec import Update

MEASURED = 0.2  # seconds that a rate is measured for
ROWS_MAX = 1 << 14  # of the product


def rates(device: str, dtype: torch.dtype, tokens: int, width: int, kind: str) -> dict[str, float]:
    """{flops: of [tokens, width] × [width, 4·width] a second, noise: numbers a second updated and probed twice}."""
    # No more rows than a rate wants: whoever asks may be short of memory.
    x = torch.randn(min(max(tokens, 1), ROWS_MAX), width, device=device).to(dtype)
    w = torch.randn(width, 4 * width, device=device).to(dtype)
    product = 2.0 * x.shape[0] * w.numel()
    n = 1 << 26 if device.startswith("cuda") else 1 << 18
    theta = torch.randn(n, device=device).to(dtype)
    out = torch.empty(2, n, device=device, dtype=dtype)
    change = [Update(0, 0, (1e-6,))]

    def probe() -> None:
        noise.perturb(theta, 1, out, [(0, 1e-3), (0, -1e-3)], seed=0, step=1, noise=kind, updates=change)

    return {"flops": product / _seconds(lambda: x @ w, device), "noise": n / _seconds(probe, device)}


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call, the mean over MEASURED seconds, after one that compiles."""
    cuda = device.startswith("cuda")
    call()
    if cuda:
        torch.cuda.synchronize()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < MEASURED or not calls:
        call()
        calls += 1
        if cuda and calls % 8 == 0:
            torch.cuda.synchronize()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls
