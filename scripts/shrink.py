"""Tiny random models of any architecture that transformers knows: its configuration shrunk by the names of its fields."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
VOCAB, TOKENS = 99, 9
MAX_PARAMETERS = 3_000_000

# Field name -> largest value; the first match counts, and None leaves the field alone.
SIZES: list[tuple[str, int | None]] = [
    (r"type_vocab_size|n_langs", None),
    (r".*vocab_size(_per_layer_input|_base)?", VOCAB),
    (r"(head|position|rotary).*_(bias|base|theta)|.*_(id|index|token|tokens)$", None),
    (r"(attention_)?head_(dim|size)|d_head|dim_head|d_kv|kv_channels|.*_head_dim", 8),
    (r".*lora_rank|rank|.*_rank|hc_lowrank", 16),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r".*experts_per_tok|moe_topk|moe_k|topk|top_k", 2),
    (r"(zero_expert_num|.*num_(local_)?experts|n_routed_experts|num_routed_experts)$", 4),
    (r"n_group|topk_group", 1),
    (r"num_(key_value|kv)_heads|n_kv_heads|.*num_key_value_heads", 2),
    (r".*(num|n|encoder|decoder)_(\w+_)?heads?|.*attention_heads|n_head", 4),
    (r"num_(hidden_)?layers|n_layers?|.*_layers|num_hidden_groups|num_blocks|num_self_attends_per_block", 2),
    (r".*ffn_dim|.*intermediate_size\w*|d_ff|dff|dim_ff|d_inner|.*ffn_hidden_size|n_inner|feed_forward_size|hidden_dim", 48),
    (r"max_.*positions?.*|n_positions|.*position_embeddings|max_seq_len|n_ctx|context_length", 64),
    (r"prediction_head_size|feature_projection_input_dim", 32),
    (r".*hidden_size\w*|d_model|n_embd|dim|emb.*_dim|.*_emb\w*_size|.*embedding_size|.*embed_dim|d_latents|embedding_dim", 32),
    (r"state_size|.*d_state|ssm_state_size", 4),
    (r"(mamba_)?(chunk_size)|block_size|.*_chunk_length|attn_chunk\w*|index_block_size", 8),
    (r"num_latents|num_landmarks|segment_means_seq_len", 8),
    (r"sliding_window(_size)?|window_size|attention_window(_size)?|local_attention|keep_window_size", 16),
    (r"rotary_dim|dim_model_base|query_pre_attn_scalar", 8),
    (r"index_topk", 4),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"prompt_length|num_mem_blocks|num_global_tokens", 4),
]  # fmt: skip

# What names do not tell: products that must agree, patterns that need more layers.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SSM = {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16}
EXTRA: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {"text_config": {"per_layer_config": None}},
    "dots3_note_text": {"per_layer_config": None},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1},
    "esmc": {"vocab_size": VOCAB},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemo_speechlm": {"text_config": _SSM},
    "nemotron_h": _SSM,
    "neomme": {"head_dim": 16},
    "perceiver": {"max_position_embeddings": TOKENS},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8), "hash_seed": 1, "num_buckets": 2},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}  # fmt: skip


def config(name: str, more: dict[str, Any]) -> Any:
    """The shrunk configuration of a model type."""
    return _shrunk(getattr(hf, CONFIG_MAPPING_NAMES[name]), {**EXTRA.get(name, {}), **more})


def _shrunk(kind: type, extra: dict[str, Any]) -> Any:
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    chosen: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if size is not None and value > size:
            chosen[name] = size
        if name.endswith("token_id") and value >= VOCAB:
            chosen[name] = 3
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        chosen["num_key_value_heads"] = 4  # compressed attention keeps as many as there are queries
    for key, sub in (getattr(kind, "sub_configs", None) or {}).items():
        if key not in fields:
            continue
        if not dataclasses.is_dataclass(sub) or sub.__name__ == "AutoConfig":
            value = getattr(kind(), key, None)
            if value is None:
                continue
            sub = type(value)
        chosen[key] = _shrunk(sub, extra[key] if isinstance(extra.get(key), dict) else {})
    return kind(
        **{**chosen, **{k: v for k, v in extra.items() if not isinstance(chosen.get(k), hf.PreTrainedConfig)}}
    )


# Tried in turn: as it is; sizes that default to None given; the text part alone of a configuration of several.
ATTEMPTS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"head_dim": 8, "num_key_value_heads": 4}, False),
    ({}, True),
]


def model(kind: str, name: str) -> Any:
    """A tiny model in fp32 whose parameters are all random, so that each of them shows in the loss."""
    classes = KINDS[kind][name]
    built = getattr(hf, classes if isinstance(classes, str) else classes[0])
    failures = []
    for more, text_only in ATTEMPTS:
        try:
            cfg = config(name, more)
            cfg = cfg.get_text_config() if text_only else cfg
            return _randomised(built, cfg, kind)
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _randomised(built: Any, cfg: Any, kind: str) -> Any:
    for c in (cfg, *(getattr(cfg, key, None) for key in getattr(cfg, "sub_configs", None) or {})):
        if kind == "causal" and getattr(c, "is_decoder", None) is False:
            c.is_decoder = True
        if getattr(c, "use_cache", None):
            c.use_cache = False  # not every forward takes it as an argument
    with torch.device("meta"):
        size = sum(p.numel() for p in built(copy.deepcopy(cfg)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"still has {size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    out = built(cfg)
    generator = torch.Generator().manual_seed(1)
    for p in out.parameters():
        if p.is_floating_point():
            noise = torch.randn(p.shape, generator=generator) * (0.1 if p.ndim > 1 else 0.05)
            p.data = torch.where(p.data.isfinite(), p.data, 0.0).float() + noise
    return out.eval()
