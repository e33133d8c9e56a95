"""Say how many tokens a model has weights for, without loading any."""

from __future__ import annotations

from pathlib import Path

from zoft.models.kind import quiet
from zoft.models.load import find_model, user_errors


def embedding_rows(model: str, trust_remote_code: bool = False) -> int | None:
    """Return the rows of a model's input embedding, None where its files do not say.

    model: the user's words. Raises UserError where the files cannot be read.
    """
    source = find_model(model)
    with quiet(), user_errors(source):
        if source.kind == "gguf":
            from zoft.models.gguf import read_gguf

            shape = read_gguf(Path(source.place)).tensors.get("token_embd.weight", ((),))[0]
            return shape[0] if shape else None
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.place, trust_remote_code=trust_remote_code)
        rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None
