"""A LoRA layer at several probes: its base runs once over all rows, its pairs as batched products, a probe a batch entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zoft.method.space import Trained
from zoft.models.quant.linear import QuantLinear
from zoft.probe.scratch import Scratch
from zoft.probe.sites import Site, is_layer


def pair(site: Site) -> tuple[Trained, Trained] | None:
    """Return (A [r, in], B [out, r]) of a layer with one plain pair, both of them trained and nothing else; else None."""
    m: Any = site.module
    if not is_layer(m) or m.merged or m.disable_adapters or len(m.active_adapters) != 1:
        return None
    (name,) = m.active_adapters
    if name not in m.lora_A or name in m.lora_variant or m.lora_bias[name] or m.lora_A[name].bias is not None:
        return None
    if not isinstance(m.lora_dropout[name], nn.Identity) and m.training:
        return None
    by_id = {id(t.param): t for t in site.trained}
    a, b = (by_id.get(id(x[name].weight)) for x in (m.lora_A, m.lora_B))
    return None if a is None or b is None or len(by_id) != 2 else (a, b)


def lora(axis: Scratch, site: Site, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute y_p = base(x)_p + scaling·(x_p A_pᵀ) B_pᵀ, in the dtype of the pair, for all probes in two products."""
    m: Any = site.module
    found = pair(site)
    assert found is not None, site.name
    (name,) = m.active_adapters
    y = m.base_layer(x, *args, **kwargs)
    a, b = axis.perturbed(list(found), list(axis.probes), 0)  # [P, r, in], [P, out, r]
    xs = x.reshape(len(a), -1, x.shape[-1])  # [P, n, in]
    ys = y.view(len(a), -1, y.shape[-1])  # [P, n, out]
    h = torch.bmm(xs.to(a.dtype), a.mT)  # [P, n, r]
    if a.dtype != y.dtype:
        ys = (ys + m.scaling[name] * torch.bmm(h, b.mT)).to(y.dtype)
    elif type(m.base_layer) in (nn.Linear, Conv1D, QuantLinear) and not m.base_layer._forward_hooks:
        ys.baddbmm_(h, b.mT, alpha=m.scaling[name])  # what it returns is new, and nobody else has seen it
    else:
        ys = torch.baddbmm(ys, h, b.mT, alpha=m.scaling[name])
    return ys.view(y.shape)
