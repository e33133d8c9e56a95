"""LoRA pairs beside quantised layers, and a saved adapter that stays in place while other tensors are trained.

What peft is given in place of a quantised layer is a plain one of its shape, so that nothing of peft has to know of
quantised layers, and what it saves says nothing of them: q_proj gets lora_A [r, in] and lora_B [out, r], as ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zoft.errors import UserError
from zoft.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from zoft.models.fingerprint import raw_bytes
from zoft.models.load import PACKAGED
from zoft.models.quant import linear
from zoft.models.quant.linear import QuantLinear, quantised_layers
from zoft.models.quant.other_libraries import other_layers

if TYPE_CHECKING:
    from zoft.config.schema import Config

INNER = "adapter"  # folder within a saved model's, of pairs that could not be merged into its codes
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


@contextmanager
def plain_shapes(model: nn.Module) -> Iterator[None]:
    """Put nn.Linear and Conv1D, of no memory, where the model's quantised layers are, for the time of a call of peft."""
    held = quantised_layers(model)
    for name, layer in held.items():
        shape = (layer.out_features, layer.in_features)[:: -1 if layer.transposed else 1]
        put(model, name, linear.plain(layer, torch.zeros((), device=layer.codes.device).expand(shape)))
    try:
        yield
    finally:
        for name, layer in held.items():
            now: Any = model.get_submodule(name)
            if hasattr(now, "base_layer"):
                now.base_layer = layer
            else:
                put(model, name, layer)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


# ---- a saved adapter -----------------------------------------------------------------------------------------------


def adapter_folder(config: Config) -> Path | None:
    """Return where the adapter is that the model has in place: the one that is asked for, or the saved model's own.

    Raises UserError for what is no plain LoRA adapter, for two of them, and where the model's own would be trained.
    """
    own = Path(config.model).expanduser() / INNER
    if config.model in PACKAGED or not (own / FILES[0]).is_file():
        if not config.adapter:
            return None
        check_adapter(config.adapter, place := Path(config.adapter).expanduser())
        return place
    if config.adapter or config.train in ("lora", "prefix", "prompt"):
        key = f"adapter={config.adapter}" if config.adapter else f"train={config.train}"
        raise UserError(
            f"{key}: model={config.model} has an adapter in place already; `zoft export --merge` its run and take that"
        )
    return own


def folder_fingerprint(folder: Path) -> str:
    """Hash of what a saved adapter adds to a model: its tensors, and how often they count."""
    settings = check_adapter(str(folder), folder)
    h = hashlib.blake2b(digest_size=16)
    counts = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    h.update(json.dumps({k: settings.get(k) for k in counts}, sort_keys=True).encode())
    for name, t in sorted(tensors((folder / FILES[1]).read_bytes()).items()):
        h.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        h.update(memoryview(raw_bytes(t.flatten())))
    return f"adapter:{h.hexdigest()}"


def tensors(data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{FILES[1]} of the adapter is damaged: {' '.join(str(error).split())[:120]}"
        ) from None


def adapter_files(folder: Path) -> dict[str, bytes]:
    """Return the adapter as it is written beside the codes that a run saves; its base is then the model that it lies in."""
    settings = check_adapter(str(folder), folder) | {"base_model_name_or_path": None}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    return {FILES[0]: text.encode(), FILES[1]: (folder / FILES[1]).read_bytes()}


def complete(made: Any, folder: Path) -> None:
    """Raise UserError where an adapter has a tensor that the model has no place for, or the other way round."""
    from peft import get_peft_model_state_dict

    if made.active_peft_config.is_prompt_learning:
        return
    there = set(tensors((folder / FILES[1]).read_bytes()))
    here = set(get_peft_model_state_dict(made, save_embedding_layers=False))
    if variants := [n for n, m in lora_pairs(made).items() if getattr(m, "lora_variant", None)]:
        raise UserError(f"adapter={folder}: {variants[0]} has more than a plain LoRA pair")
    if odd := sorted(there ^ here):
        what = (
            "is not in it, but the model has such a layer" if odd[0] in here else "fits no layer of the model"
        )
        raise UserError(f"adapter={folder}: it belongs to another model: {odd[0]} {what}")


# ---- what is saved -------------------------------------------------------------------------------------------------


def lora_pairs(model: nn.Module) -> dict[str, Any]:
    """Return peft's layers around a base model's own, by the name that the layer has in the base model."""
    base = getattr(model, "get_base_model", lambda: model)()
    return {n: m for n, m in base.named_modules() if hasattr(m, "base_layer")}


@contextmanager
def without(model: Any) -> Iterator[Any]:
    """Provide the base model as it was before pairs were put in place; they are back afterwards."""
    found = lora_pairs(model)
    base = model.get_base_model() if found else model
    try:
        for name, layer in found.items():
            put(base, name, layer.base_layer)
        yield base
    finally:
        for name, layer in found.items():
            put(base, name, layer)


def changes(model: Any, dequantise: bool) -> dict[str, Tensor] | None:
    """Return (alpha / rank)·B A for each matrix with a pair, by the matrix's name, in fp32, of the adapter as it was loaded.

    None: the pairs cannot be added to the matrices as they are saved: codes, a tied matrix, no plain linear layer.
    """
    found = lora_pairs(model)
    if not found:
        return {}
    codes = other_layers(model) or (quantised_layers(model) and not dequantise)
    readers: dict[int, int] = {}
    for m in model.modules():
        for p in m.parameters(recurse=False):
            readers[id(p)] = readers.get(id(p), 0) + 1

    def whole(base: Any) -> bool:
        return type(base) is QuantLinear or (
            type(base) in (nn.Linear, Conv1D) and readers[id(base.weight)] == 1
        )

    if codes or not all(whole(layer.base_layer) for layer in found.values()):
        return None
    held = {
        n.removeprefix("base_model.model."): t.float() for n, t in tensors(model.beside[FILES[1]]).items()
    }
    made = {}
    for name, layer in found.items():
        delta = layer.scaling["default"] * (held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"])
        made[f"{name}.weight"] = delta.mT if layer.fan_in_fan_out else delta
    return made


def write(model: Any, folder: Path) -> None:
    """Write the adapter that a model has in place, into a folder within its own."""
    (folder / INNER).mkdir()
    for name, data in model.beside.items():
        (folder / INNER / name).write_bytes(data)
