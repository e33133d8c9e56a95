"""GGUF files, read directly: transformers takes 28 s over a file that this opens in two.

The header is parsed in one pass here (the gguf package's reader makes an array of every string); its
dequantisation is NumPy and is used as it is. Llama models and byte-level tokenizers whose every key is known
are built from the header; for anything else `load` returns None and the caller takes transformers' road.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.packages import install

# struct codes of GGUF's scalar types; 8 is a string, 9 an array.
SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ITEMS_MAX = 5_000_000  # values in a header, the words and merges of its tokenizer included
DEPTH_MAX = 4  # arrays within each other
DIMENSIONS_MAX = 8
ALIGNMENT_MAX = 1 << 20  # bytes
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types

LLAMA_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
LLAMA_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@dataclass
class File:
    """Hold a GGUF file. fields: the header's key -> value. tensors: name -> (shape outermost first, GGML type, first byte)."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    data: mmap.mmap


def read_gguf(path: Path) -> File:
    """Return the header of a GGUF file (versions 2 and 3, little-endian); tensors stay on disk, mapped.

    Errors: UserError where the file is not GGUF or ends early.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, n_tensors, n_fields = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF" or version not in (2, 3):
            raise UserError(f"model={path}: not a GGUF file of version 2 or 3")
        at, left = 24, [ITEMS_MAX]
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key, at = _value(data, at, STRING, left)
            if key in fields:
                raise ValueError(f"{key[:200]} is there twice")
            (kind,) = struct.unpack_from("<I", data, at)
            fields[key], at = _value(data, at + 4, kind, left)
        tensors = {}
        for _ in range(n_tensors):
            name, at = _value(data, at, STRING, left)
            if name in tensors:
                raise ValueError(f"tensor {name[:200]} is there twice")
            (dims,) = struct.unpack_from("<I", data, at)
            if dims > DIMENSIONS_MAX:
                raise ValueError(f"tensor {name[:200]} has {dims} dimensions, more than {DIMENSIONS_MAX}")
            *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", data, at + 4)
            at += 4 + 8 * dims + 12
            tensors[name] = (tuple(reversed(shape)), kind, offset)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"model={path}: not a whole GGUF file ({error}); fetch it again") from None
    align = fields.get("general.alignment", 32)
    if isinstance(align, bool) or not isinstance(align, int) or not 0 < align <= ALIGNMENT_MAX:
        raise UserError(
            f"model={path}: not a whole GGUF file (general.alignment={str(align)[:40]!r} is no number of bytes from 1 to "
            f"{ALIGNMENT_MAX}); fetch it again"
        )
    for key, blocks in fields.items():
        if key.endswith(".block_count") and (not isinstance(blocks, int) or not 0 <= blocks <= len(tensors)):
            raise UserError(
                f"model={path}: not a whole GGUF file ({key}={str(blocks)[:40]}, and it has {len(tensors)} tensors); fetch it again"
            )
    start = -(-at // align) * align
    placed = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}
    return File(path, fields, placed, data)


def _value(data: mmap.mmap, at: int, kind: int, left: list[int], depth: int = 0) -> tuple[Any, int]:
    """Return a value of a type at a byte, and the byte behind it. left: how many values the header may still hold.

    Raises ValueError and struct.error where it does not fit into the file or into the limits.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"its header holds more than {ITEMS_MAX:,} values")
    if kind == STRING:
        (n,) = struct.unpack_from("<Q", data, at)
        if at + 8 + n > len(data):
            raise ValueError("it ends inside a string")
        return str(data[at + 8 : at + 8 + n], "utf-8"), at + 8 + n
    if kind != ARRAY:
        code = "<" + SCALARS[kind]
        return struct.unpack_from(code, data, at)[0], at + struct.calcsize(code)
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if depth == DEPTH_MAX:
        raise ValueError(f"arrays are nested more than {DEPTH_MAX} deep")
    if count > left[0]:
        raise ValueError(f"an array of {count:,} values, where a header may hold {ITEMS_MAX:,}")
    if inner in SCALARS:
        left[0] -= count
        code = f"<{count}{SCALARS[inner]}"
        return list(struct.unpack_from(code, data, at)), at + struct.calcsize(code)
    items = []
    for _ in range(count):
        item, at = _value(data, at, inner, left, depth + 1)
        items.append(item)
    return items, at


def tensor(file: File, name: str) -> Any:
    """Return one tensor, dequantised: a float32 NumPy array in its outermost-first shape."""
    import numpy as np

    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UserError(
            f"model={file.path}: reading GGUF needs the gguf package: {install('gguf')}"
        ) from None
    shape, kind, start = file.tensors[name]
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        n = math.prod(shape) // block * size  # Python's numbers: NumPy's would wrap at 2^63
        raw = np.frombuffer(file.data, np.uint8, n, start).reshape(*shape[:-1], shape[-1] // block * size)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"model={file.path}: tensor {name} is damaged ({error}); fetch the file again"
        ) from None
    values = dequantize(raw, GGMLQuantizationType(kind))
    return np.array(values) if not values.flags.writeable else values  # F32 is a view of the mapped file


def gguf_model(file: File, dtype: Any) -> Any | None:
    """Return a LlamaForCausalLM with the file's weights, or None where something in the file is not known here.

    dtype: torch.dtype the weights are cast to after dequantisation to fp32. The weights are transformers' own
    conversion, bit for bit.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings, names = _llama_settings(file), llama_names(file)
    if settings is None or names is None:
        return None
    config = LlamaConfig(**settings, dtype=dtype)
    _refuse_other_shapes(file, config, names)
    state = {target: weight(file, name, target, config).to(dtype) for target, name in names.items()}
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _refuse_other_shapes(file: File, config: Any, names: dict[str, str]) -> None:
    """Refuse a header whose numbers and tensors are not of one model: what lacks a tensor would get a random one."""
    import torch
    from transformers import LlamaForCausalLM

    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if config.num_hidden_layers != len(layers):
        raise UserError(
            f"model={file.path}: its header tells of {config.num_hidden_layers} layers and {len(layers)} are in it; "
            "fetch the file again"
        )
    with torch.device("meta"):
        wanted = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    held = {target: file.tensors[name][0] for target, name in names.items()}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            raise UserError(
                f"model={file.path}: tensor {name} has shape {held.get(name)} where its header tells of {wanted.get(name)}; "
                "fetch the file again"
            )


def llama_names(file: File) -> dict[str, str] | None:
    """Return {transformers' name: the file's}, or None where a tensor is not known here."""
    names = {_llama_name(name): name for name in file.tensors}
    return None if "" in names else names


def weight(file: File, name: str, target: str, config: Any) -> Any:
    """Return one tensor as a Llama of transformers has it under the name `target`: fp32, memory of its own."""
    import torch

    values = tensor(file, name)
    if target.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in target else config.num_key_value_heads
        # GGUF interleaves the two halves of each head's rotary dimensions.
        values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return torch.from_numpy(values)


def _llama_settings(file: File) -> dict[str, Any] | None:
    fields, tokens = file.fields, file.fields.get("tokenizer.ggml.tokens", [])
    mine = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    required = set(LLAMA_KEYS) - {
        "vocab_size",
        "rope.freq_base",
        "attention.head_count_kv",
        "rope.dimension_count",
    }
    if fields.get("general.architecture") != "llama" or not required <= set(mine) <= set(LLAMA_KEYS):
        return None
    settings = {LLAMA_KEYS[k]: v for k, v in mine.items()}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta", 10000.0)}
    settings.setdefault("vocab_size", len(tokens))
    settings["tie_word_embeddings"] = "output.weight" not in file.tensors
    for key in ("bos", "eos", "padding", "unknown"):
        name = {"padding": "pad", "unknown": "unk"}.get(key, key)
        settings[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{key}_token_id")
    return settings


def _llama_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{LLAMA_TENSORS[rest]}" if rest in LLAMA_TENSORS else ""
    return LLAMA_TENSORS.get(name, "")


def gguf_tokenizer(file: File) -> Any | None:
    """Return the file's byte-level BPE tokenizer, or None where it has another kind.

    The header names the pre-tokenizer without describing it: "smollm" splits every digit off, then splits as
    GPT-2. transformers' own conversion leaves the digits out, so that blanks before a number come out as
    tokens that the model has not seen there.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def get(key: str, default: Any = None) -> Any:
        return file.fields.get(f"tokenizer.ggml.{key}", default)

    digits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    split = {"gpt-2": [], "smollm": digits}.get(get("pre"))
    words, types, merges = get("tokens", []), get("token_type", []), get("merges")
    if get("model") != "gpt2" or split is None or merges is None or len(types) != len(words):
        return None
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=pairs))
    blank = bool(get("add_space_prefix", False))
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=blank))
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [AddedToken(w, special=special, normalized=False) for w, t in zip(words, types) if t == kind]
        core.add_special_tokens(added) if special else core.add_tokens(added)
    named = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (i := get(f"{key}_token_id")) is not None and i < len(words):
            named[f"{name}_token"] = words[i]
    if get("add_bos_token", False) and "bos_token" in named:
        bos = (named["bos_token"], get("bos_token_id"))
        core.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    template = file.fields.get("tokenizer.chat_template")
    longest = next((v for k, v in file.fields.items() if k.endswith(".context_length")), None)
    extra = {"model_max_length": longest} if longest else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **named, **extra)
