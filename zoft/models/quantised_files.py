"""Quantised checkpoints: zoft's own and GPTQ's, read into quantised layers one by one; what is saved of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zoft.errors import UserError
from zoft.models.quant import linear as quant
from zoft.models.quant.linear import QuantLinear, pack, quantised_layers
from zoft.models.quant.other_libraries import other_layers

OURS, GPTQ = "zoft", "gptq"
CODES = {OURS: "codes", GPTQ: "qweight"}  # the tensor by which a quantised layer is known


@dataclass(frozen=True)
class Settings:
    """Say how a checkpoint is quantised. group: 0 is the whole row. first_zero: what a stored zero point of 0 means (GPTQ)."""

    method: str
    bits: int
    group: int
    first_zero: int = 0


def quantisation_of(name: str, config: Any, folder: Path | None) -> Settings | None:
    """Return what a model's config (or GPTQ's old quantize_config.json beside it) says, None where zoft does not read it.

    name: the user's word for the model. Errors: UserError for what GPTQ has and zoft has not.
    """
    found = getattr(config, "quantization_config", None)
    if found is None and folder is not None and (folder / "quantize_config.json").is_file():
        text = (folder / "quantize_config.json").read_text(encoding="utf-8")
        found = {"quant_method": GPTQ, **json.loads(text)}
    if found is None:
        return None
    found = found if isinstance(found, Mapping) else found.to_dict()
    method, bits = found.get("quant_method"), found.get("bits")
    if method not in CODES:
        _refuse_unknown(name, method)
        return None
    form = found.get("checkpoint_format", "gptq")
    if bits not in quant.BITS or (method == GPTQ and form not in ("gptq", "gptq_v2")):
        raise UserError(
            f"model={name}: quantised by {method} to {bits} bits as {form!r}; zoft reads 4 and 8 bits, gptq and gptq_v2"
        )
    if found.get("dynamic"):
        raise UserError(f"model={name}: its layers are quantised in several ways ('dynamic'); zoft reads one")
    group = max(0, int(found.get("group_size", -1)))
    return Settings(method, bits, group, int(method == GPTQ and form == "gptq"))


def _refuse_unknown(name: str, method: Any) -> None:
    """Raise UserError for a method that transformers would pass over with a warning, taking the tensors as they are."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if not isinstance(method, str) or not any(
        f"{known}_".startswith(f"{method}_") for known in AUTO_QUANTIZATION_CONFIG_MAPPING
    ):
        raise UserError(
            f"model={name}: config.json: quantization_config: quant_method={method!r} is none that is read"
        )


def load_quantised(
    name: str, folder: Path, config: Any, found: Settings, dtype: torch.dtype | None, trust: bool
) -> Any:
    """Return the model of a quantised folder: its quantised layers as QuantLinear, everything else as transformers reads it.

    dtype: of the rest; None: the config's, else that of the first tensor that has one.
    Errors: UserError where tensors and config do not fit.
    """
    from zoft.models.kind import auto_class

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = auto_class(name, config).from_config(config, trust_remote_code=trust)
    linears = {n: m for n, m in skeleton.named_modules() if type(m) in (nn.Linear, Conv1D)}
    where = _shards(name, folder)
    mark = f".{CODES[found.method]}"
    names = {n.removesuffix(mark) for n in where if n.endswith(mark)}
    if not names or not names <= set(linears):
        odd = sorted(names - set(linears))[:1] or [f"no {mark[1:]}"]
        raise UserError(
            f"model={name}: quantised by {found.method}, but {odd[0]} is no linear layer of its model"
        )
    rest: dict[str, Tensor] = {}
    made: dict[str, dict[str, Tensor]] = {n: {} for n in names}
    layers: dict[str, QuantLinear] = {}
    for key, tensor in _tensors(where):
        owner, _, own = key.rpartition(".")
        if owner not in made:
            rest[key] = tensor
            continue
        made[owner][own] = tensor
        if len(made[owner]) == sum(k.rpartition(".")[0] == owner for k in where):
            try:
                layers[owner] = _layer(linears[owner], made.pop(owner), found)
            except (KeyError, RuntimeError, ValueError) as error:
                said = " ".join(str(error).split())
                raise UserError(
                    f"model={name}: the tensors of {owner} do not fit its shape ({said[:160]})"
                ) from None
    floating = next((t.dtype for t in rest.values() if t.is_floating_point()), torch.float32)
    dtype = dtype or getattr(config, "dtype", None) or floating
    kind: Any = type(skeleton)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        for n in layers:  # nothing is to be made for these
            _put(self, n, hole := nn.Identity())
            hole.weight = hole.bias = torch.empty(0)  # some models fill them by name

    hollow: Any = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
    model = hollow.from_pretrained(None, config=config, state_dict=rest, dtype=dtype)
    model.__class__ = kind
    for n, layer in layers.items():
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
        _put(model, n, layer)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _shards(name: str, folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, a layer's tensors side by side."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {n: folder / listed[n] for n in sorted(listed)}
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    if not where:
        raise UserError(f"model={name}: a quantised model without .safetensors files; convert it first")
    return {n: where[n] for n in sorted(where)}


def _tensors(where: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        files = {p: stack.enter_context(safe_open(p, "pt")) for p in dict.fromkeys(where.values())}
        for name, path in where.items():
            yield name, files[path].get_tensor(name)


def _layer(linear: Any, tensors: dict[str, Tensor], found: Settings) -> QuantLinear:
    transposed = type(linear) is Conv1D
    shape = (linear.weight.shape[1], linear.weight.shape[0]) if transposed else tuple(linear.weight.shape)
    group = min(found.group or shape[1], shape[1])
    parts = dict(tensors) if found.method == OURS else _from_gptq(tensors, shape, group, found)
    layer = QuantLinear(
        (shape[0], shape[1]), found.bits, group, zeros=parts.get("zeros") is not None, ordered=parts.get("order") is not None,
        bias=parts.get("bias"), transposed=transposed,
    )  # fmt: skip
    parts["scales"] = parts["scales"].float()
    layer.load_state_dict({k: v for k, v in parts.items() if v is not None})
    return layer.eval()


def _from_gptq(tensors: dict[str, Tensor], shape: tuple, group: int, found: Settings) -> dict[str, Any]:
    """GPTQ's tensors as ours: qweight int32 [in·bits/32, out] and qzeros int32 [G, out·bits/32], lowest bits first,
    scales [G, out], g_idx [in]: the group of each column, in any order (act-order)."""
    bits, top = found.bits, 2**found.bits - 1
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (tensors["qweight"][:, None] >> shifts[:, None]) & top  # [in·bits/32, 32/bits, out]
    codes = codes.flatten(0, 1).to(torch.uint8).mT  # [out, in]
    zeros = ((tensors["qzeros"][..., None] >> shifts) & top).flatten(1)  # [G, out]
    zeros = ((zeros + found.first_zero) & top).to(torch.int16).mT.contiguous()  # [out, G]
    if tuple(codes.shape) != tuple(shape):
        raise ValueError(f"qweight holds {tuple(codes.shape)}, the layer has {tuple(shape)}")
    order = None
    index = tensors.get("g_idx")
    plain = torch.arange(shape[1], dtype=torch.int32) // group
    if index is not None and not torch.equal(index.to(torch.int32), plain):
        order = torch.argsort(index, stable=True)
        if not torch.equal(index[order].to(torch.int32), plain):
            raise ValueError(f"g_idx has groups that are not of {group} columns")
        codes = codes[:, order]
        order = order.to(torch.int32)
    half = 2 ** (bits - 1)
    whole = -shape[1] % group, group % 2  # what is missing in the last group, and in each
    codes = nn.functional.pad(codes, (0, whole[0]), value=half).unflatten(1, (-1, group))
    codes = nn.functional.pad(codes, (0, whole[1]), value=half)
    return {
        "codes": pack(codes, bits),
        "scales": tensors["scales"].mT.contiguous(),
        "zeros": None if bool((zeros == half).all()) else zeros * quant.UNIT,
        "order": order,
        "bias": tensors.get("bias"),
    }


def state(model: nn.Module, dequantise: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Return (a model's tensors as they are saved, names of those that keep their dtype): scales as they are, never as
    logarithms; with dequantise plain weights on the CPU in place of codes and scales."""
    tensors, kept = dict(model.state_dict()), set()
    for name in other_layers(model):
        kept |= {key for key in tensors if key.startswith(f"{name}.")}
    for name, layer in quantised_layers(model).items():
        if dequantise:
            for own in ("codes", "scales", "zeros", "order"):
                tensors.pop(f"{name}.{own}", None)
            tensors[f"{name}.weight"] = layer.weight.cpu()
        else:
            kept.add(f"{name}.scales")
            if layer.scales.logged:
                tensors[f"{name}.scales"] = layer.scales.detach().exp()
    return tensors, kept


def mark(folder: Path, model: nn.Module) -> None:
    """Say in a saved config.json that, and how, the model beside it is quantised."""
    layers = list(quantised_layers(model).values())
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    sizes = {"bits": layers[0].bits, "group_size": max(layer.group for layer in layers)}
    config["quantization_config"] = {"quant_method": OURS, **sizes}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
