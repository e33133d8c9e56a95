"""Tell what kind a model is, where its blocks are, and how long a row it can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zoft.errors import UserError


def auto_class(name: str, config: Any) -> Any:
    """transformers' Auto class for a checkpoint with this config: of masked language models, else of causal ones.

    name: the user's word for the model. config: a transformers config, or None for a GGUF file.
    Errors: UserError for an encoder-decoder model.
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
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if masked or any(k.endswith("ForMaskedLM") for k in kinds):
        return AutoModelForMaskedLM
    return AutoModelForCausalLM


def is_masked(model: Any) -> bool:
    """Whether it is a masked language model: the logits at a token are of the token itself, not of the next."""
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
    """No progress bars over a load that takes seconds, and no report of what is checked here."""
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
