"""Linear layers at directions of rank 1 and at flipped ones: one product with W itself for the rows of all probes.

    rank1:   y_p = x_p Wᵀ + s_p (x_p b_p) a_pᵀ               two skinny products besides, nothing of W's size is made
    flipped: y_p = x_p Wᵀ + s_p ((x_p ∘ b_p) Uᵀ) ∘ a_p        a second product, with the noise U that all probes share

a, b: the signs of a matrix's rows and columns (noise.outer_signs). W is read once, however many probes there are.
Sources: flipout (arXiv 1803.04386), EGGROLL's low-rank forward (arXiv 2511.16652).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zoft.method.blocks import seen_by
from zoft.noise.spec import FLIPPED, KINDS, RANK1

if TYPE_CHECKING:
    from zoft.method.space import Trained
    from zoft.probe.scratch import Scratch


def is_outer(t: Trained | None, kind: str) -> bool:
    """Say whether a tensor's directions have the form that the products here take apart."""
    plain = t is not None and t.width > 0 and t.stored.ndim == 2 and t.mask is None and t.floor is None
    return plain and (kind == RANK1 or bool(KINDS[kind] & FLIPPED))


def outer_product(
    axis: Scratch, weight: Trained, bias: Trained | None, plain_bias: Any, xs: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """Return y [P, n, out] of xs [P, n, in]: a linear layer at all probes of `axis`.

    bias: trained, or None and plain_bias is the module's own, or None. transposed: W is [out, in].
    """
    y = axis.plain_product(weight, xs.flatten(0, 1), transposed).unflatten(0, xs.shape[:2])  # [P, n, out]
    if any(p.scale for p in seen_by(weight, axis.probes, axis.seed, axis.step)):
        scales = axis.scales_of(axis.probes, y)  # [P]
        a, b = axis.signs_of(weight, axis.probes, y.dtype)  # [P, rows], [P, columns]
        a, b = (a, b) if transposed else (b, a)  # of what comes out, of what goes in
        if axis.kind == RANK1:
            h = torch.bmm(xs, b[:, :, None])  # [P, n, 1]
            y.baddbmm_(h * scales[:, None, None], a[:, None])
        else:
            u = axis.shared_noise(weight)  # as W lies
            moved = (xs * b[:, None]).flatten(0, 1) @ (u.T if transposed else u)
            y.addcmul_(moved.unflatten(0, xs.shape[:2]), (a * scales[:, None])[:, None])
    if bias is not None:
        made = axis.perturbed([bias], list(axis.probes), 0)[0]  # [P, out]
        return (y + made[:, None]).to(y.dtype)
    return y if plain_bias is None else y + plain_bias
