"""Draw the signs that node perturbation adds to a layer's outputs: a pure function of example, token and unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoft.noise.spec import NODE, NODE_BITS, key

_LOW = 0xFFFFFFFF
LONGEST = 1 << (32 - NODE_BITS)  # tokens of a row at most
WIDEST = 128 << NODE_BITS  # units of a layer at most


@dataclass(frozen=True)
class Tokens:
    """Say which tokens of a batch are real, and what each one's noise is drawn by.

    places: int64 [N], flat indices row·T + t of the tokens that are no padding. rows, parts, positions: int64 [N], as
    the specification has them (noise.spec, node). owners: int64 [N], the place in the batch of each token's example.
    """

    places: Tensor
    rows: Tensor
    parts: Tensor
    positions: Tensor
    owners: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        """Return the same on another device; `parts`, which keys are made of, stay on the CPU."""
        return Tokens(**{k: v if k == "parts" else v.to(device) for k, v in vars(self).items()})


def cells_of(tokens: Tokens, count: int, seed: int, step: int) -> Tensor:
    """Return what kernels draw the signs of a step's tokens by: int32 [6, count], on the CPU; what is beyond the N tokens is 0.

    The rows of it are the example's place in the training set, the position, the two words of the key (as int32), 1 where
    there is a token, and its place in the flattened rows.
    """
    n = len(tokens.places)
    assert n <= count, f"{n} tokens in {count} cells"
    out = np.zeros((6, count), np.uint32)
    out[0, :n] = tokens.rows.numpy()
    out[1, :n] = tokens.positions.numpy()
    out[2:4, :n] = _keys(tokens, seed, step).T
    out[4, :n] = 1
    out[5, :n] = tokens.places.numpy()
    return torch.from_numpy(out.view(np.int32))


def _keys(tokens: Tokens, seed: int, step: int) -> np.ndarray:
    """Return the key of each token at a step, uint32 [N, 2]."""
    used, which = np.unique(tokens.parts.numpy(), return_inverse=True)
    return np.array([key(seed, step, int(part)) for part in used], np.uint32).reshape(-1, 2)[which]


def node_signs(tokens: Tokens, units: int, tid: int, seed: int, step: int) -> Tensor:
    """Return the signs u of a layer's outputs: fp32 [N, units], ±1, on the device of `tokens`.

    tid: of the layer's matrix. seed, step: the run's. The bits are the same on every device.
    """
    assert units <= WIDEST, f"{units} units of a layer, at most {WIDEST}"
    keys = _keys(tokens, seed, step)
    if tokens.rows.device.type == "cpu":
        from zoft.noise import kernels

        out = torch.empty(len(keys), units)
        kernels.node_signs(out.numpy(), tid, tokens.rows.numpy(), tokens.positions.numpy(), keys)
        return out
    wide = torch.from_numpy(keys.astype(np.int64)).to(tokens.rows.device)
    return _signs_by_torch(tokens.rows, tokens.positions, wide, units, tid)


def _signs_by_torch(rows: Tensor, positions: Tensor, keys: Tensor, units: int, tid: int) -> Tensor:
    """Return `node_signs` by plain torch operations on any device; keys: int64 [N, 2]."""
    blocks = torch.arange(-(-units // 128), device=rows.device)
    a = (positions[:, None] << NODE_BITS) + blocks  # [N, blocks]
    b = (rows[:, None] & _LOW).expand_as(a)
    c, d = torch.full_like(a, tid), torch.full_like(a, NODE)
    p, q = keys[:, :1], keys[:, 1:]
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2⁶⁴: all their bits, the sign's place included
        a, b, c, d = (y >> 32 & _LOW) ^ b ^ p, y & _LOW, (x >> 32 & _LOW) ^ d ^ q, x & _LOW
        p, q = (p + 0x9E3779B9) & _LOW, (q + 0xBB67AE85) & _LOW
    words = torch.stack((a, b, c, d), -1)[..., None]  # [N, blocks, 4, 1]
    bits = words >> torch.arange(32, device=rows.device) & 1  # [N, blocks, 4, 32]
    return bits.flatten(1)[:, :units].float() * 2 - 1
