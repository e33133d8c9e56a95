"""Find which numbers of each matrix move: the small ones, or as many drawn at random (Sparse-MeZO and its control)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoft.method.space import Trained
from zoft.noise.spec import Mask

CHUNK = 1 << 24  # numbers looked at at a time
TOLERANCE = 0.01  # between the share asked for and a tensor's own


def mask_tensors(
    trained: Sequence[Trained], kind: str, sparsity: float, seed: int, every: int = 0
) -> list[str]:
    """Give every matrix its mask; returns lines for the reader.

    magnitude: |θ| <= h moves, h the k-th smallest |θ| of the tensor, k = (1 - sparsity)·n: a quantile of the base,
    as it is stored (after the cast to its storage dtype), exact, the same for all of the run. random: (1 - sparsity)·n
    of them, give or take what chance does, the same for all of the run, or drawn anew every `every` steps. none, or sparsity 0: everything moves.
    1-D tensors (norms, biases) move whole.

    trained: in their storage dtype, at the base. Source: Liu et al. 2024, Sparse MeZO, arXiv 2402.15751, section 3;
    there θ <= h is written in the algorithm and magnitude in the text: it is magnitude here.
    """
    shares = {t.name: (mask_tensor(t, kind, sparsity, seed, every), t.stored.numel()) for t in trained}
    masked = {t.name: shares[t.name] for t in trained if t.mask is not None}
    if not masked:
        idle = kind in ("magnitude", "random") and sparsity > 0
        return [f"mask={kind}: no matrix is trained, and 1-D tensors move whole"] if idle else []
    moves, numbers = (sum(both) for both in zip(*masked.values()))
    redrawn = f"; drawn anew every {every} steps" if every > 1 else "; drawn anew each step" if every else ""
    lines = [
        f"mask={kind}: {moves / numbers:.1%} of the {numbers:,.0f} numbers in {len(masked)} matrices move, "
        f"1-D tensors whole{redrawn}"
    ]
    uneven = [
        f"{name} ({found / n:.1%})"
        for name, (found, n) in masked.items()
        if found / n > 1 - sparsity + TOLERANCE
    ]
    if uneven:
        more = f" and {len(uneven) - 1} more" if len(uneven) > 1 else ""
        lines.append(f"more than {1 - sparsity:.1%} move where many numbers have one size: {uneven[0]}{more}")
    return lines


def mask_tensor(t: Trained, kind: str, sparsity: float, seed: int, every: int = 0) -> float:
    """Give one tensor its mask; returns how many of its numbers move."""
    n, t.mask = t.stored.numel(), None
    if kind not in ("magnitude", "random") or sparsity == 0 or t.stored.ndim < 2 or not n:
        return n
    if kind == "random":
        t.mask = Mask(seed=seed, share=round((1 - sparsity) * 2**16), every=every)
        return n * t.mask.share / 2**16
    h, found = kth_smallest(t.stored, max(1, round((1 - sparsity) * n)))
    t.mask = Mask(threshold=h)
    return found


def kth_smallest(theta: Tensor, k: int) -> tuple[float, int]:
    """Return (h, how many |θ| <= h): h the k-th smallest |θ|, exact for dtypes that fp32 holds; of fp64 the next fp32 value above.

    By counting the bits of fp32, which order sizes as numbers do: the upper 16, then the lower 16 of those that
    share them with h. Two passes, memory for a chunk, no sorting; the same on every device. theta: finite.
    """
    assert 1 <= k <= theta.numel(), (k, theta.numel())

    upper = _counts(theta, lambda bits: bits >> 16, 2**15).cumsum(0)
    high = int(torch.searchsorted(upper, k))
    below = int(upper[high - 1]) if high else 0
    lower = _counts(theta, lambda bits: bits[bits >> 16 == high] & 0xFFFF, 2**16).cumsum(0)
    low = int(torch.searchsorted(lower, k - below))
    h = torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32)
    return float(h), below + int(lower[low])


def _counts(theta: Tensor, digits: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return how often each of `size` values occurs among the digits of the fp32 bits of |θ|."""
    found = torch.zeros(size, dtype=torch.int64, device=theta.device)
    for part in theta.detach().flatten().split(CHUNK):
        exact = part.abs()
        sizes = exact.float()
        if part.dtype == torch.float64:  # up, so that |θ| <= h holds of θ itself where it is counted
            sizes = torch.where(sizes < exact, sizes.nextafter(torch.full_like(sizes, torch.inf)), sizes)
        found += torch.bincount(digits(sizes.view(torch.int32)), minlength=size)
    return found
