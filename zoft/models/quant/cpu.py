"""Codes to weights on a CPU: one compiled pass that reads the codes once and writes the matrix of every probe."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from zoft.noise import cpu

_PIECE = 1 << 17  # codes that are worth a hand-over to another thread
_NONE = np.zeros((0, 0), np.int16)


def dequantise(layer: Any, scales: Tensor, out: Tensor) -> None:
    """Run `zoft.models.quant.linear.dequantise` of fp32 scales [P, out, G] on a CPU; layer: a `zoft.models.quant.linear.QuantLinear`."""
    made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    zeros = _NONE if layer.zeros is None else layer.zeros.numpy()
    arrays = layer.codes.numpy(), scales.numpy(), zeros, made.numpy()

    def piece(first: int, last: int) -> None:
        _rows(*arrays, layer.bits, layer.group, first, last)

    cpu._spread(piece, layer.out_features, max(1, _PIECE // layer.in_features))
    if made is not out:
        out.copy_(made)


def _entry(function):
    """Compiled when first called, and kept on disk where a folder is writable."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_entry
def _rows(codes, scales, zeros, out, bits, group, first, last):
    """Rows [first, last) of out [P, out, in]."""
    probes, _, groups = scales.shape
    width = out.shape[2]
    held = (group + group % 2) * bits // 8  # bytes of a group
    for r in range(first, last):
        for g in range(groups):
            zero = np.float32(1 << (bits - 1))
            if zeros.shape[0] > 0:
                zero = np.float32(zeros[r, g]) / np.float32(128)  # quant.UNIT
            c = codes[r, g * held : (g + 1) * held]
            start = g * group
            n = min(group, width - start)
            low = min(n, held)
            for p in range(probes):
                s = scales[p, r, g]
                w = out[p, r, start : start + n]
                if bits == 8:
                    for j in range(n):
                        w[j] = s * (np.float32(c[j]) - zero)
                else:
                    for j in range(low):
                        w[j] = s * (np.float32(c[j] & 15) - zero)
                    for j in range(n - low):
                        w[low + j] = s * (np.float32(c[j] >> 4) - zero)
