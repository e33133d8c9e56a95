"""Check what a model's folder holds before anything of it is loaded: no pickle, no path out of it, whole files."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zoft.errors import UserError

HEADER_MAX = 100_000_000  # bytes of a safetensors header; the format's own limit
LAYERS_MAX = 1_000  # the deepest models have under 200; a class is made for each before a tensor is missed
LAYERS_UNSEEN = 100  # up to so many are made to name the tensor that is missing
DIMENSIONS_MAX = 64
RANK_MAX = 65_536  # of a LoRA pair
PATTERN_MAX = 10_000  # characters of an adapter's pattern
READ_WHOLE, WHOLE_MAX = (
    (".json", ".txt", ".model", ".jinja"),
    200_000_000,
)  # files of a tokenizer, and their bytes
CONFIG_MAX = 64_000_000  # bytes of a JSON file of a model
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of an adapter_config.json that may have a value, by the adapter's kind: of any other one, peft may compute something
# else, read another file or import a module.
ANY_ADAPTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
PROMPT = (
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "token_dim",
)
PLAIN: dict[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora", "fan_in_fan_out", "target_modules",
             "exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern", "alpha_pattern", "bias",
             "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
             "runtime_config"),
    "PREFIX_TUNING": (*PROMPT, "encoder_hidden_size"),
    "PROMPT_TUNING": (*PROMPT, "prompt_tuning_init"),
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
        "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip
WHOLE = {d for d in BITS if d[0] in "IUC" or d == "BOOL"}  # dtypes that are no floats


def check_folder(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Refuse a folder that cannot be loaded, or not safely; returns its headers' {tensor: entry}. Imports nothing heavy.

    name: the user's word for the model. Errors: UserError where config.json is no model's, a weight file is not
    whole, lies outside of the folder or is a pickle, or the folder is an adapter on another model.
    """
    config = read_object(name, folder / "config.json")
    check_config(name, config)
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"model={name}: adapter_config.json: it is an adapter on another model; give it as adapter={name}, "
            "or a model that it is merged into"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_WHOLE and path.is_file() and path.stat().st_size > WHOLE_MAX:
            raise UserError(
                f"model={name}: {path.name} has more than {WHOLE_MAX:,} bytes, which no such file has"
            )
    tensors: dict[str, dict[str, Any]] = {}
    for file in _weights(name, folder, config):
        tensors |= read_header(name, file)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > max(len(tensors), LAYERS_UNSEEN):  # each has a tensor at least
        raise UserError(
            f"model={name}: config.json: num_hidden_layers={layers}, and the checkpoint has {len(tensors)} tensors; "
            "fetch it again"
        )
    return tensors


def check_adapter(name: str, folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json of a folder with plain LoRA pairs, in safetensors. Imports nothing heavy.

    name: the user's word for it. Errors: UserError for any other adapter, and for files that are not whole.
    """
    key = "adapter"
    if not _is_file(folder / ADAPTER_CONFIG):
        what = "no adapter_config.json in this folder" if os.path.isdir(folder) else "no such folder"
        raise UserError(f"adapter={name}: {what}; give one that PEFT saved, like runs/NAME/adapter")
    found = read_object(name, folder / ADAPTER_CONFIG, key)
    kind = str(found.get("peft_type"))
    if kind != "LORA" or adapter_extra(found):
        what = f"LoRA with {adapter_extra(found)}" if kind == "LORA" else kind
        raise UserError(f"adapter={name}: it is {what[:200]}; plain LoRA pairs are what stays in place")
    check_adapter_values(name, found)
    if not _is_file(folder / ADAPTER_WEIGHTS):
        raise UserError(f"adapter={name}: no {ADAPTER_WEIGHTS} in this folder; zoft loads safetensors only")
    refuse_larger(name, found, read_header(name, folder / ADAPTER_WEIGHTS, key))
    return found


def check_saved(name: str, folder: Path) -> None:
    """Refuse a folder of a saved model or adapter whose files are not whole. Imports nothing heavy.

    name: the folder, as a message names it. Errors: UserError.
    """
    if _is_file(folder / ADAPTER_CONFIG):
        read_object(name, folder / ADAPTER_CONFIG, "adapter")
        if not _is_file(folder / ADAPTER_WEIGHTS):
            raise UserError(f"adapter={name}: {ADAPTER_WEIGHTS} is missing")
        read_header(name, folder / ADAPTER_WEIGHTS, "adapter")
    else:
        config = read_object(name, folder / "config.json")
        for file in _weights(name, folder, config):
            read_header(name, file)
    for file in folder.glob("*.json"):
        read_object(name, file)


def adapter_extra(found: Mapping[str, Any]) -> str:
    """Return the first key by which an adapter of a known kind is more than its pairs or its prompt; "" where none is."""
    plain = (*ANY_ADAPTER, *PLAIN[str(found["peft_type"])])
    odd = [k for k, value in found.items() if value and k not in plain]
    odd += ["bias"] * (found.get("bias", "none") != "none")
    odd += ["prompt_tuning_init"] * (found.get("prompt_tuning_init", "RANDOM") != "RANDOM")
    return odd[0] if odd else ""


def check_adapter_values(name: str, found: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json of a kind that zoft does not read, and values that no adapter can have.

    name: the user's word for the adapter. Errors: UserError that names the key and its value.
    """
    kind = str(found.get("peft_type"))
    if kind not in PLAIN or (extra := adapter_extra(found)):
        what = f"{kind} with {extra}" if kind in PLAIN else kind[:200]
        raise UserError(
            f"adapter={name}: {ADAPTER_CONFIG}: it is {what}; plain ones of {', '.join(PLAIN)} are read"
        )

    def whole(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)

    def positive(x: Any) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 1e9

    def names(x: Any) -> bool:
        return isinstance(x, str) or (isinstance(x, list) and all(isinstance(n, str) for n in x))

    def counts(x: Any, sound: Callable[[Any], bool]) -> bool:
        return isinstance(x, dict) and all(map(sound, x.values()))

    sound: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (lambda x: whole(x) and 0 < x <= RANK_MAX, f"a whole number from 1 to {RANK_MAX}"),
        "lora_alpha": (positive, "a number above 0"),
        "lora_dropout": (lambda x: not isinstance(x, bool) and isinstance(x, (int, float)) and 0 <= x <= 1, "0 to 1"),
        "init_lora_weights": (lambda x: isinstance(x, (bool, str)), "true, false or a name"),
        "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
        "fan_in_fan_out": (lambda x: isinstance(x, bool), "true or false"),
        "target_modules": (lambda x: x is None or names(x), "a list of names, or a pattern"),
        "exclude_modules": (lambda x: x is None or names(x), "a list of names, or a pattern"),
        "layers_pattern": (lambda x: x is None or names(x), "a name, or a list of names"),
        "layers_to_transform": (
            lambda x: x is None or whole(x) or (isinstance(x, list) and all(map(whole, x))), "whole numbers"),
        "rank_pattern": (
            lambda x: counts(x, lambda n: whole(n) and 0 < n <= RANK_MAX), f"names with ranks from 1 to {RANK_MAX}"),
        "alpha_pattern": (lambda x: counts(x, positive), "names with numbers above 0"),
        **{key: (lambda x: whole(x) and 0 < x < 1 << 31, "a whole number above 0") for key in PROMPT},
    }  # fmt: skip
    for key, (fits, right) in sound.items():
        if key in found and not fits(found[key]):
            value = json.dumps(found[key])[:60]
            raise UserError(f"adapter={name}: {ADAPTER_CONFIG}: {key}={value} is not {right}; fetch it again")
    for key, pattern in adapter_patterns(found):
        if fault := pattern_fault(pattern):
            raise UserError(f"adapter={name}: {ADAPTER_CONFIG}: {key}: {pattern[:60]!r} {fault}")


def refuse_larger(name: str, found: Mapping[str, Any], held: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a rank or a prompt of which an adapter holds no tensor: peft would make it before it misses it.

    held: the header of the adapter's file, from read_header. Errors: UserError.
    """
    if found["peft_type"] != "LORA":
        layers = 2 * found.get("num_layers", 1) if found["peft_type"] == "PREFIX_TUNING" else 1
        asked = found.get("num_virtual_tokens", 1) * layers * found.get("token_dim", 1)
        most = max((math.prod(entry["shape"]) for entry in held.values()), default=0)
        if asked > most:
            raise UserError(
                f"adapter={name}: {ADAPTER_CONFIG}: its prompt has {asked:,} numbers, and its largest tensor {most:,}; "
                "fetch it again"
            )
        return
    ranks = [
        entry["shape"][0] for key, entry in held.items() if "lora_" in key and "A" in key and entry["shape"]
    ]
    asked = max([found.get("r", 8), *(found.get("rank_pattern") or {}).values()])
    if ranks and asked > max(ranks):
        raise UserError(
            f"adapter={name}: {ADAPTER_CONFIG}: rank {asked}, and its tensors have rank {max(ranks)} at most; fetch it again"
        )


def adapter_patterns(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (key, pattern) of all that an adapter_config.json has matched with the names of modules."""
    made = [(key, x) for key in ("target_modules", "exclude_modules") if isinstance(x := found.get(key), str)]
    made += [(key, x) for key in ("rank_pattern", "alpha_pattern") for x in found.get(key) or {}]
    return made + [("layers_pattern", x) for x in _listed(found.get("layers_pattern"))]


def pattern_fault(pattern: str) -> str:
    """Return why a text is no pattern; "" where it is one. How long it takes to match is bounded where it is matched."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no pattern ({str(error)[:60]}); fetch it again"
    return f"has more than {PATTERN_MAX:,} characters" if len(pattern) > PATTERN_MAX else ""


def _listed(x: Any) -> list[str]:
    return [x] if isinstance(x, str) else list(x or ())


def check_config(name: str, config: dict[str, Any]) -> None:
    """Refuse what a config.json may not say: code or files from elsewhere, sizes that no model has."""
    for path, value in _leaves(config):
        key = path.rpartition(".")[2]
        if "attn_implementation" in path or "experts_implementation" in path:
            if isinstance(value, str) and re.search(r"[/:@]", value):
                raise UserError(
                    f"model={name}: config.json: {path.strip('.')}={value} is code from elsewhere; remove it"
                )
        if key.startswith(("num_", "n_")) and isinstance(value, (int, float)) and "layer" in key:
            if not 0 <= value <= LAYERS_MAX:
                raise UserError(f"model={name}: config.json: {key}={value} is no number of layers")
    weights = config.get("transformers_weights")
    if weights is not None and not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", str(weights)):
        raise UserError(
            f"model={name}: config.json: transformers_weights={weights} is no safetensors file in its folder"
        )


def _weights(name: str, folder: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The safetensors files that hold the model."""
    first = str(config.get("transformers_weights") or "model.safetensors")
    if not first.endswith(".json") and _is_file(folder / first):
        yield folder / first
        return
    index = folder / (first if first.endswith(".json") else "model.safetensors.index.json")
    if not _is_file(index):
        raise UserError(f"model={name}: {_no_weights(name, folder)}")
    table = read_object(name, index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"model={name}: {index.name} has no weight_map; fetch it again")
    for file in sorted({str(f) for f in table.values()}):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(
                f"model={name}: {index.name}: {file} is no safetensors file in the model's folder"
            )
        if not _is_file(folder / file):
            raise UserError(f"model={name}: {file} is missing; fetch it again")
        yield folder / file


def _no_weights(name: str, folder: Path) -> str:
    found = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES or ".bin" in p.name)
    if not found:
        return "no model.safetensors in this folder; give a folder that save_pretrained wrote"
    return f"{found[0]} {pickles(name)}"


def pickles(name: str) -> str:
    """Return the message about a model that comes as pickles only."""
    return (
        "is a pickle, which can run code; zoft loads safetensors only. Where you trust it: python -c 'from transformers "
        f'import AutoModelForCausalLM as M; M.from_pretrained("{name}").save_pretrained("converted")\', then copy '
        "the tokenizer's files there, and model=converted"
    )


def read_header(name: str, path: Path, key: str = "model") -> dict[str, dict[str, Any]]:
    """Return {tensor: {dtype, shape, data_offsets}} of a safetensors file whose header and length fit together.

    name, key: the user's word for what the file belongs to, and its key. Errors: UserError for a file that is not whole.
    """

    def bad(what: str) -> UserError:
        return UserError(f"{key}={name}: {path.name} is damaged: {what}; fetch it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_MAX):
                raise bad(f"it ends inside its header ({size} bytes)")
            header = _parsed(file.read(length))
    except OSError as error:
        raise UserError(f"{key}={name}: {path.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise bad(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise bad("its header is no JSON object")
    header.pop("__metadata__", None)
    spans = []
    for tensor, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = BITS[dtype]
            if not isinstance(shape, list) or len(shape) > DIMENSIONS_MAX or not 0 <= start <= end <= size:
                raise bad(f"tensor {tensor[:200]!r} is described wrongly")
            for n in shape:
                bits *= n
            sound = all(isinstance(x, int) and x >= 0 for x in (*shape, start, end)) and bits == 8 * (
                end - start
            )
        except (TypeError, ValueError, KeyError):
            sound = False
        if not sound:
            raise bad(f"tensor {tensor[:200]!r} is described wrongly")
        spans.append((start, end))
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise bad("its tensors overlap or leave gaps")
        at = end
    if 8 + length + at != size:
        raise bad(f"{size} bytes where its header tells of {8 + length + at}")
    return header


def read_object(name: str, path: Path, key: str = "model") -> dict[str, Any]:
    """Return a JSON file that must hold an object."""
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_MAX + 1)
        if len(data) > CONFIG_MAX:
            raise UserError(
                f"{key}={name}: {path.name} has more than {CONFIG_MAX:,} bytes, which no such file has"
            )
        found = _parsed(data)
    except OSError as error:
        raise UserError(f"{key}={name}: {path.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{key}={name}: {path.name} is damaged: {error}; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}={name}: {path.name} is damaged: no JSON object; fetch it again")
    return found


def _parsed(data: bytes) -> Any:
    """JSON without a name twice in one object. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a name is there twice")
        return made

    try:
        return json.loads(data, object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}")
    else:
        yield name, node


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)
