"""Refuse NaN and infinity in tensors that are read or written, by the tensor's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from zoft.errors import UserError

if TYPE_CHECKING:
    import torch


def is_finite(t: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; whole numbers always do."""
    import torch

    if not t.is_floating_point() or not t.numel() or t.is_meta:
        return True
    if t.element_size() == 1:  # float8 has no minimum of its own
        t = t.float()
    # The extremes carry any NaN or infinity with them, without a mask of the tensor's size.
    return bool(torch.stack(torch.aminmax(t.detach())).isfinite().all())


def refuse_non_finite(where: str, tensors: Mapping[str, torch.Tensor], why: str) -> None:
    """Raise UserError that names the first tensor [any shape] with a NaN or an infinity.

    where: what holds the tensors, as the message begins. why: how the message ends.
    """
    for name, t in tensors.items():
        if not is_finite(t):
            raise UserError(f"{where}: tensor {name} holds NaN or infinity; {why}")
