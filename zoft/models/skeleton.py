"""Build a model's shapes without its weights, quantised as loading would quantise them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.models import load
from zoft.models.kind import auto_class
from zoft.models.load import find_model, user_errors
from zoft.models.quant.linear import quantise_model
from zoft.models.quantised_files import quantisation_of


def skeleton(config: Config) -> Any:
    """Return the config's model on the meta device, in the dtype of its checkpoint: names, shapes and no memory."""
    from transformers import AutoConfig

    source = find_model(config.model)
    load.check_model(source)
    with user_errors(source):
        if source.kind == "gguf":
            from zoft.models import gguf
            from zoft.models.gguf import read_gguf

            settings = gguf._llama_settings(read_gguf(Path(source.place)))
            if settings is None:
                raise UserError(
                    f"model={config.model}: zoft cannot read this GGUF file's shapes; give a folder or a Hub id"
                )
            shape, dtype = AutoConfig.for_model("llama", **settings), torch.float32
        else:
            shape = AutoConfig.from_pretrained(source.place, trust_remote_code=config.trust_remote_code)
            dtype = getattr(shape, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = auto_class(source.name, shape).from_config(
                shape, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
    return model.eval().requires_grad_(False)


def quantised(config: Config, model: Any) -> None:
    """Quantise a skeleton as loading would: by the config's keys, or as the checkpoint says that it is."""
    if config.bits is not None:
        quantise_model(
            model,
            bits=config.bits,
            group=config.group,
            zero_points=config.zero_points,
            head=config.quantise_head,
        )
        return
    source = find_model(config.model)
    folder = Path(source.place) if source.kind == "folder" else None
    found = quantisation_of(source.name, model.config, folder)
    if found:
        quantise_model(model, bits=found.bits, group=found.group or 1 << 30, zero_points=True)
    elif theirs := getattr(model.config, "quantization_config", None):
        how = theirs if isinstance(theirs, dict) else theirs.to_dict()
        raise UserError(
            f"estimate: {source.name} was quantised by {how.get('quant_method', 'another library')}, and what that keeps shows "
            "only once it is loaded; run it with steps=1, which tells its peak memory"
        )
