"""Start an adapter from functions of the run's seed, the tensor's name and the base model, on any machine.

But for keys and values, which a forward pass makes: those round as it rounds, so a run keeps them (headers.keep).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoft.errors import UserError
from zoft.models import calls
from zoft.models.calls import cache_of
from zoft.noise import noise
from zoft.noise.spec import GAUSSIAN, tensor_id


def keys_values(model: Any, tokens: Tensor) -> Tensor:
    """Return the keys and values [n, layers, 2, heads, dim] that the frozen model makes of one row of n tokens."""
    try:
        past = cache_of(model(input_ids=tokens[None], use_cache=True))
        pairs = [torch.stack([k[0], v[0]]) for k, v in calls.keys_values(past)]  # [2, heads, n, dim]
        return torch.stack(pairs).permute(3, 0, 1, 2, 4).contiguous()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"train=prefix: {type(model).__name__} keeps no keys and values of one shape in every layer "
            f"({' '.join(str(error).split())[:80]}); use train=lora"
        ) from None


def _raw(count: int, seed: int, name: str) -> np.ndarray:
    """uint64 [count], a function of (seed, name): NumPy's Philox stream, which its policy keeps as it is."""
    return np.random.Philox(key=[seed & (2**64 - 1), tensor_id(name)]).random_raw(count)


def uniform(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Return numbers that are uniform on an even grid in (-1, 1), fp32."""
    words = _raw(int(np.prod(shape)), seed, name) >> np.uint64(40)  # 24 bits
    return torch.from_numpy(((words.astype(np.float64) + 0.5) * 2.0**-23 - 1.0).astype(np.float32)).view(
        *shape
    )


def normal(shape: Sequence[int], seed: int, name: str) -> Tensor:
    key = int(_raw(1, seed, name)[0])
    return noise.direction(shape, tensor_id(name), seed=key, step=0, direction=0, noise=GAUSSIAN)


def tokens_of(model: Any, n: int, seed: int) -> Tensor:
    """Return n random token ids of the vocabulary."""
    table = model.get_input_embeddings().weight
    size = min(table.shape[0], getattr(model.config.get_text_config(), "vocab_size", table.shape[0]))
    ids = _raw(n, seed, "virtual tokens") % np.uint64(size)
    return torch.from_numpy(ids.astype(np.int64)).to(table.device)
