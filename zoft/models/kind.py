"""Tell what kind a model is, where its blocks are, and how long a row it can read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError

if TYPE_CHECKING:
    from torch import nn


# Ends of the names of classes whose head writes no tokens.
NO_LANGUAGE = ("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel", "SentencePrediction")


def auto_class(name: str, config: Any) -> Any:
    """Return transformers' Auto class for a checkpoint with this config: of masked language models, else of causal ones.

    name: the user's word for the model. config: a transformers config, or None for a GGUF file.
    Errors: UserError for an encoder-decoder model, and for one whose head is no language model's.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model={name}: it is an encoder-decoder model; zoft trains decoders and masked models"
        )
    kinds = getattr(config, "architectures", None) or []
    kind = getattr(config, "model_type", "")
    odd = [k for k in kinds if isinstance(k, str) and k.endswith(NO_LANGUAGE)]
    if odd and len(odd) == len(kinds):
        raise UserError(
            f"model={name}: config.json: architectures={odd[0]}: it has a head that is no language model's, which would be "
            "dropped; give the language model that it was made from, and its classes as task.choices"
        )
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if masked or any(k.endswith("ForMaskedLM") for k in kinds):
        return AutoModelForMaskedLM
    return AutoModelForCausalLM


def is_masked(model: Any) -> bool:
    """Say whether it is a masked language model: the logits at a token are of the token itself, not of the next."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__.endswith(
        "ForMaskedLM"
    )


def refuse_other_kind(name: str, model: Any, masked: bool) -> None:
    """Raise UserError where a model cannot score prompts with a mask (masked), or none without one."""
    if is_masked(model) and not masked:
        raise UserError(
            f"model={name}: a masked language model fills a [MASK]: put one into task.prompt, or take task=sst2-mlm or another "
            "of the -mlm tasks"
        )
    if masked and not is_masked(model):
        raise UserError(
            f"task.prompt: [MASK] is for masked language models (RoBERTa, BERT), and {name} is none"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars over a load that takes seconds, and the report of what is checked here."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


ADDED = re.compile(r"\.lora_|^prompt_encoder\.")  # names of the tensors that peft has added to a model


def own_name(name: str) -> str:
    """Return the name that a tensor has in the model without an adapter in place."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return (name, list) of the model's stack of blocks: its longest ModuleList of one type, by parameter count."""
    from torch import nn

    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) <= 2:
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise UserError("train=last-…: this model has no stack of blocks; name tensors by a pattern instead")
    return best[1], best[2]


def after(model: nn.Module, prefix: str) -> set[str]:
    """Return the names of the parameters of the modules that follow the stack inside its parent (the final norm)."""
    parent_name, _, own = prefix.rpartition(".")
    parent = model.get_submodule(parent_name) if parent_name else model
    embeddings = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        embeddings |= {id(p) for p in module.parameters()} if module is not None else set()
    names, seen = set(), False
    for child, module in parent.named_children():
        if seen:
            path = f"{parent_name}.{child}" if parent_name else child
            names |= {f"{path}.{n}" for n, p in module.named_parameters() if id(p) not in embeddings}
        seen = seen or child == own
    return names


def trained_positions(model: Any) -> int | None:
    """Return the positions that the model's config names; None where it names none."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None


def longest_row(model: Any) -> int | None:
    """Return the tokens that fit a model that looks its positions up in a table, virtual ones taken off; None where positions are
    computed, and any number goes."""
    from torch import nn

    size, tokens = trained_positions(model), model.get_input_embeddings()
    if size is None:
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT's table has two rows more; those of RoBERTa's line begin after the row of padding.
    fits = [m.num_embeddings - (-1 if m.padding_idx is None else m.padding_idx) - 1 for m in tables
            if size <= m.num_embeddings <= size + 2]  # fmt: skip
    fits += [len(b) for n, b in model.named_buffers() if n.endswith("embed_positions") and len(b) == size]
    if not fits:
        return None
    beside: Any = getattr(model, "active_peft_config", None)
    virtual = beside.num_virtual_tokens if getattr(beside, "is_prompt_learning", False) else 0
    return min(size, *fits) - virtual


def refuse_longer_rows(model: Any, longest: int, written: int = 0) -> None:
    """Raise UserError for rows of more tokens than the model has positions for; written: tokens of them that it writes."""
    if (most := longest_row(model)) is None or longest + written <= most:
        return
    if not written:
        raise UserError(
            f"max_length: rows of {longest} tokens, and this model has {most} positions; set max_length={most} or less"
        )
    raise UserError(
        f"max_new_tokens={written}: after prompts of {longest} tokens this model's {most} positions end; "
        f"set max_length={most} or less, which cuts prompts, or fewer new tokens"
    )
