"""Count what a forward of a model costs, on the meta device: shapes alone, no weight and no arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """Hold the cost of one call. activations: bytes alive at once at most, beyond weights and inputs. flops: multiply and add count two."""

    activations: int
    flops: int


class Live(TorchDispatchMode):
    """Count the bytes of the tensors that operations make, from their making until nobody holds them; and their flops.

    Works on any device, meta included. What stands in `known` is not counted. count: flops too.
    """

    def __init__(self, known: Iterable[Tensor], count: bool = True) -> None:
        super().__init__()
        self.count = count
        self.now = self.most = self.flops = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket) if self.count else None
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self._hold(t.untyped_storage())
        return out

    def _hold(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:  # a view, or written in place
            return
        self._seen.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


class _Yes(TorchDispatchMode):
    """Answers questions about values, which the meta device has none of: is it all ones, is it one sequence? Yes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    """Attention as fused kernels do it: no matrix of scores. `touched` gets what its backward would want."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.touched: list[Tensor] = []
        self.keep = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
        q, k, v = named["query"], named["key"], named["value"]  # [B, h, T, d]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.flops += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        if self.keep:
            self.touched += [q, k, v, out]
        return out


def cost(model: nn.Module, call: Callable[[], Any], inputs: Iterable[Tensor] = ()) -> Cost:
    """Return the cost of call(), which runs the model (on the meta device) without gradient; its result counts while it runs."""
    live, fused = Live([*model.parameters(), *model.buffers(), *inputs]), _Fused()
    with torch.no_grad(), fused, _Yes(), live:
        call()
    return Cost(live.most, live.flops + fused.flops)


def kept(model: nn.Module, call: Callable[[], Any]) -> int:
    """Return the bytes that a backward of call() would need: tensors saved on the way, each storage once, weights aside."""
    ours = {p.untyped_storage()._cdata for p in model.parameters()}
    held: list[Tensor] = []  # alive to the end, so that no place is used twice
    fused = _Fused()
    fused.keep = True

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        return t

    with torch.enable_grad(), fused, _Yes(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    sizes = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in [*held, *fused.touched])}
    del out
    return sum(size for place, size in sizes.items() if place not in ours)
