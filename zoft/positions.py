"""How long a row a model can read."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoft.errors import UserError


def trained(model: Any) -> int | None:
    """Positions that the model's config names; None where it names none."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None


def room(model: Any) -> int | None:
    """Tokens that fit a model that looks its positions up in a table, virtual ones taken off; None where positions are
    computed, and any number goes."""
    size, tokens = trained(model), model.get_input_embeddings()
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


def refuse(model: Any, longest: int, written: int = 0) -> None:
    """Raise UserError for rows of more tokens than the model has positions for; written: tokens of them that it writes."""
    if (most := room(model)) is None or longest + written <= most:
        return
    if not written:
        raise UserError(
            f"max_length: rows of {longest} tokens, and this model has {most} positions; set max_length={most} or less"
        )
    raise UserError(
        f"max_new_tokens={written}: after prompts of {longest} tokens this model's {most} positions end; "
        f"set max_length={most} or less, which cuts prompts, or fewer new tokens"
    )
