"""The identity of a base: a hash of its tensors, which a ledger's header names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

FULL_HASH_BYTES = 1 << 30  # models up to this size are fingerprinted whole
SAMPLE = 1 << 14  # elements of each tensor that stand for a larger one


class Stored(Protocol):
    """Name a trained tensor, its stored θ and the dtype of its probes: what models and processes need of `space.Trained`."""

    name: str
    stored: torch.Tensor
    compute: torch.dtype


def of_model(model: nn.Module) -> str:
    """Return the identity of a base: a hash over names, shapes, dtypes and bytes of all its tensors.

    Ties count once, under their first name. Models over 1 GiB are sampled: 16,384 evenly spaced elements of
    each larger tensor stand for it, and the result says "sampled". The same on every device.
    """
    tensors = distinct(model)
    return of_tensors(tensors.items(), sum(t.nbytes for t in tensors.values()))


def of_tensors(tensors: Iterable[tuple[str, torch.Tensor]], size: int) -> str:
    """Return the fingerprint of tensors that come one by one; size: bytes of all of them."""
    whole = size <= FULL_HASH_BYTES
    h = hashlib.blake2b(digest_size=16)
    for name, t in tensors:
        h.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        flat = t.detach().reshape(-1)
        if not whole and flat.numel() > SAMPLE:
            flat = flat[:: flat.numel() // SAMPLE]
        h.update(memoryview(raw_bytes(flat)))
    return f"blake2b{'' if whole else '-sampled'}:{h.hexdigest()}"


def distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    first: dict[tuple, str] = {}
    state = model.state_dict()
    return {n: t for n, t in state.items() if t.numel() == 0 or first.setdefault(memory_of(t), n) == n}


def memory_of(t: torch.Tensor) -> tuple:
    """Return a key that is equal for tensors that are one memory: ties."""
    return t.device, t.data_ptr(), t.shape, t.stride()


def raw_bytes(flat: torch.Tensor) -> Any:
    import torch

    return flat.cpu().contiguous().view(torch.uint8).numpy()
