"""A run as a model that others load: written, loaded again, and compared with the base and with the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoft.config.schema import ADAPTERS, Config
from zoft.errors import UserError
from zoft.method import space
from zoft.method.space import adopt, float_buffers
from zoft.models import kind
from zoft.models.adapters.attach import adapter_fingerprint, load_adapter, merge_adapter, save_adapter
from zoft.models.adapters.kept_in_place import adapter_folder
from zoft.models.kind import auto_class, is_masked
from zoft.models.quant.linear import dequantise_layers, quantised_layers
from zoft.models.quant.other_libraries import dequantise_other_layers, other_layers
from zoft.models.saving import save_model, whole_folder
from zoft.replay import tensors
from zoft.replay.base_weights import Base, base_of, find_base
from zoft.replay.live import live
from zoft.replay.saved_model import model_card_of
from zoft.replay.tensors import requested, result_and_facts
from zoft.train.header import dtype_name
from zoft.train.parts import load_run_model, resolve_device, said_before

TOLERANCE = 1e-3  # between the same logits of two loads in fp32, of the largest


def export_merged(config: Config, folder: Path, out: Path, dtype: str = "auto") -> str:
    """Write the model of the run in `folder` to `out`, as transformers loads it; returns a line about the checks.

    LoRA pairs are added to the base's matrices in fp32. dtype: of the weights on disk, rounded to once; "auto" is the
    run's save_dtype. The folder gets its name when what it holds has been loaded again, differs from the base, and gives
    the logits of the run's own model, rounded to dtype.
    Raises UserError where dtype holds none of the run's changes, or not its values, and for a prefix or a prompt.
    """
    if config.train in ("prefix", "prompt"):
        raise UserError(f"train={config.train}: it cannot be merged into weights; use --adapter")
    config, log = requested(resolve_device(config), folder, tensors.Ask())
    beside = config.train in ADAPTERS or adapter_folder(config) is not None
    if beside:  # the base as it was loaded, whatever the run computed in
        config = replace(config, compute="fp32")
    model, tokenizer, config = live(config, folder, log)
    if beside and other_layers(model):
        raise UserError(
            f"{folder}: its pairs stand beside layers that another library has quantised, and are not merged into those; "
            + ("use --adapter" if config.train in ADAPTERS else f"{folder}/model has both")
        )
    if beside:
        own = logits(widened(model, None))
        dequantise_layers(model)
        model = merge_adapter(model)
        agree(logits(model), own, out)
    dequantise_other_layers(model)
    plain = logits(widened(model, None))
    result, facts = result_and_facts(config, folder, log, tensors.Ask())
    word = config.save_dtype if dtype == "auto" else dtype
    kept = model.checkpoint_dtype if word == "auto" else space.DTYPES[word]
    with whole_folder(out) as draft:
        save_model(model, tokenizer, draft, dtype=kept, card=model_card_of(config, result, **facts))
        rounded = logits(widened(model, kept))
        del model
        again = reloaded(draft, config)
        agree(logits(again), rounded, out)
        with said_before():
            base = find_base(config, log.header["base"], str(folder))
        if quantised_layers(base.model) or other_layers(base.model):
            dequantise_other_layers(base.model)
            base = base_of(base.model, base.tokenizer)
        changed, total = differing(again, base, kept)
        if not changed:
            raise UserError(
                f"{folder}: in {dtype_name(kept)} its model is the base: {len(log.records)} steps are too few, or "
                "too small for that dtype; use --dtype fp32"
            )
    apart = float((rounded - plain).norm() / plain.norm())
    return (
        f"{out}: {changed:,} of {total:,} numbers differ from the base; loaded again, it gives the run's logits "
        f"(rounding to {dtype_name(kept)} moves them by {apart:.2g} of their size)"
    )


def export_adapter(config: Config, folder: Path, out: Path) -> str:
    """Write the adapter of the run in `folder` to `out`, as peft loads it; returns a line about the check.

    The folder gets its name when what it holds, loaded again beside the base, gives the run's logits.
    Raises UserError where the adapter is as it started.
    """
    config, log = requested(resolve_device(config), folder, tensors.Ask())
    config = replace(config, compute="fp32")  # so that the two differ by nothing but the adapter
    model, tokenizer, config = live(config, folder, log)
    result, facts = result_and_facts(config, folder, log, tensors.Ask())
    trained = adopt(model, list(log.header["trained"]))
    if adapter_fingerprint(trained) == log.header["adapter"]:
        raise UserError(f"{folder}: its adapter is as it started: {len(log.records)} steps have not moved it")
    with whole_folder(out) as draft:
        save_adapter(model, draft, tokenizer=tokenizer, card=model_card_of(config, result, **facts))
        own = logits(model)
        del model, trained
        with said_before():
            base, _, _ = load_run_model(replace(without_adapter(config), adapter=None))
        agree(logits(load_adapter(widened(base, None), draft)), own, out)
    return f"{out}: loaded again beside the base, it gives the run's logits"


def widened(model: Any, dtype: torch.dtype | None) -> Any:
    """Return the model with its weights in fp32, through dtype if one is given; it computes without mixing dtypes."""
    for t in model.state_dict(keep_vars=True).values():
        if t.is_floating_point():
            t.data = (t.data if dtype is None else t.data.to(dtype)).float()
    for _, _, buffer in float_buffers(model):
        buffer.data = buffer.data.float()
    return model


def reloaded(folder: Path, config: Config) -> Any:
    """Load what was written, through transformers alone, in fp32."""
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    with kind.quiet():
        model = auto_class(str(folder), own).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
    return model.eval().to(config.device)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return [2, 8, V] of two short rows of tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(16, device=device).view(2, 8) * 7 % model.get_input_embeddings().weight.shape[0]
    extra = {} if is_masked(model) else {"use_cache": False}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits.float().cpu()


def agree(again: Tensor, own: Tensor, out: Path) -> None:
    """Refuse what was written unless it computes what the run's model computes."""
    off = float((again - own).abs().max() / own.abs().max())
    assert off < TOLERANCE, f"logits of {out} are {off:.2g} from the run's"


def differing(model: Any, base: Base, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many numbers of a model in fp32 differ from the base's, rounded alike, and how many it has."""
    state, changed = model.state_dict(), 0
    for name in base.tensors:
        theirs = base.read(name).to(state[name].device)
        if theirs.is_floating_point():
            theirs = theirs.to(dtype).float()
        changed += int((state[name] != theirs).sum())
    return changed, sum(t.numel() for t in base.tensors.values())


def without_adapter(config: Config) -> Config:
    """Return the config of the base alone, without the adapter that it would train (but with one that it starts from)."""
    return replace(config, train="all") if config.train in ADAPTERS else config
