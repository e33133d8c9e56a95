"""Models of known shapes with random weights, made on the device; nothing is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import nn

STD = 0.02


def _opt(width: int, layers: int, heads: int, ffn: int | None = None, vocab: int = 50272) -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=vocab, hidden_size=width, word_embed_proj_dim=width, ffn_dim=ffn or 4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2048, dropout=0.0,
    )  # fmt: skip


def _llama(
    width: int, layers: int, heads: int, kv: int, ffn: int, vocab: int = 128256, *, tie: bool
) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=2048, tie_word_embeddings=tie,
    )  # fmt: skip


MODELS = {
    "tiny": lambda: _llama(32, 2, 4, 2, 48, vocab=64, tie=True),
    "tiny-opt": lambda: _opt(32, 2, 4, vocab=64),
    "smollm2-135m": lambda: _llama(576, 30, 9, 3, 1536, vocab=49152, tie=True),
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "llama-1b": lambda: _llama(2048, 16, 32, 8, 8192, tie=True),  # Llama-3.2-1B
    "llama-8b": lambda: _llama(4096, 32, 32, 8, 14336, tie=False),  # Llama-3.1-8B
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "opt-13b": lambda: _opt(5120, 40, 40),
    "opt-30b": lambda: _opt(7168, 48, 56),
}


def build(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A model of that shape: matrices N(0, 0.02²), norms 1, biases 0, made on the device in dtype."""
    torch.manual_seed(0)
    with torch.device(device), _no_initialisation():
        model = hf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype)
    for key, p in model.named_parameters():
        if p.ndim > 1:
            p.data.normal_(0, STD)
        else:
            p.data.fill_(0.0 if key.endswith("bias") else 1.0)
    return model.eval().requires_grad_(False)


@contextmanager
def _no_initialisation() -> Iterator[None]:
    """Layers made in here leave their weights as memory has them: build fills them once."""
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    saved = [(k, k.reset_parameters) for k in kinds]
    initialise = hf.PreTrainedModel.initialize_weights
    try:
        for kind in kinds:
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]
        hf.PreTrainedModel.initialize_weights = lambda self, *a, **k: None
        yield
    finally:
        for kind, own in saved:
            kind.reset_parameters = own  # type: ignore[method-assign]
        hf.PreTrainedModel.initialize_weights = initialise


@contextmanager
def plain_causal(model: Any) -> Iterator[None]:
    """No mask tensor: attention takes its causal kernel also where a graph is captured (no token is padding)."""
    module = sys.modules[type(model).__module__]
    own = getattr(module, "create_causal_mask", None)
    if own is not None:
        module.create_causal_mask = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if own is not None:
            module.create_causal_mask = own  # type: ignore[attr-defined]
