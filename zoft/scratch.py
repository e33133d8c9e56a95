"""Make probes θ + s·z of tensors in scratch memory that one forward's sites share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from zoft import quant
from zoft.noise.spec import PART
from zoft.sites import Site
from zoft.space import Trained

# Bytes of one probe of a linear layer's matrix that are made at one time. Matrices of the blocks of a 30B model fit;
# output matrices over a whole vocabulary are made in slabs.
SLAB = 1 << 29


def slab_rows(t: Trained) -> int:
    """Rows of a matrix whose probes are made at one time: SLAB bytes of one probe, from a multiple of PART on."""
    width = t.stored.shape[1]
    unit = PART // math.gcd(width, PART)
    return max(unit, SLAB // (width * t.compute.itemsize) // unit * unit)


def part(x: torch.Tensor, rows: slice) -> torch.Tensor:
    return x if rows == slice(None) else x[rows]


def start(x: torch.Tensor, rows: slice) -> int:
    """The index, in all of x, of the first element of these rows."""
    return (rows.start or 0) * math.prod(x.shape[1:])


def nbytes(t: Trained) -> int:
    """Scratch that one probe of a tensor takes."""
    return -(-t.stored.numel() * t.compute.itemsize // 64) * 64  # each tensor starts on a cache line


def dense_bytes(sites: Sequence[Site], dtype: torch.dtype) -> int:
    """Bytes that two probes of any quantised site take: its trained tensors, and its matrix written out in dtype."""
    return max(
        (
            2
            * (
                sum(nbytes(t) for t in s.trained)
                + s.module.in_features * s.module.out_features * dtype.itemsize
            )
            for s in sites
            if isinstance(s.module, quant.QuantLinear)
        ),
        default=0,
    )


def in_slabs(t: Trained) -> bool:
    """Whether a linear layer makes this tensor's probes some rows at a time."""
    return t.stored.ndim == 2 and nbytes(t) > SLAB
