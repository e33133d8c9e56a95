"""Adapters: LoRA pairs, prefixes and prompts beside a frozen model, made, saved and loaded through peft.

Where they start is a function of the run's seed and of the base model alone, as everything else in a run is.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zoft.config.schema import Config
from zoft.errors import UserError, is_memory
from zoft.limits import PATTERN_SECONDS, at_most_seconds
from zoft.models.adapters import start as adapter_start
from zoft.models.adapters.kept_in_place import adapter_folder, complete, lora_pairs, plain_shapes
from zoft.models.adapters.start import normal, tokens_of, uniform
from zoft.models.calls import misread_prefix
from zoft.models.card import write_card
from zoft.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_patterns,
    check_adapter_values,
    pattern_fault,
    read_header,
    read_object,
    refuse_larger,
)
from zoft.models.fingerprint import Stored, raw_bytes
from zoft.models.finite import refuse_non_finite
from zoft.models.kind import ADDED, blocks_of, is_masked, quiet
from zoft.models.saving import NOT_WRITTEN, save_tokenizer, whole_folder

if TYPE_CHECKING:
    from collections.abc import Iterator


START = "start.safetensors"  # in a run's folder: what a prefix started from, which a forward pass has made
# Where peft has no mapping for a model's type: the first of these that its linear layers go by.
_PAIRS = (
    ("q_proj", "v_proj"), ("query", "value"), ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",), ("q", "v"),
    ("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj"),
)  # fmt: skip


def attach_adapter(model: nn.Module, config: Config, start: Path | None = None) -> Any:
    """Return the model with the adapter that config.train asks for, untrained, as a peft model on the model's device.

    LoRA: y = W x + (alpha / rank)·B A x, A uniform in ±1/sqrt(in) (Kaiming, a = √5), B = 0; no dropout, no bias.
    prefix: keys and values of virtual_tokens random tokens as the frozen model makes them, in every layer, without
    re-parameterisation. prompt: the embeddings of virtual_tokens random tokens.
    New tensors are fp32 (fp64 in an fp64 model). On the meta device they have shapes only. With config.adapter the pairs
    are that adapter's, to be trained on.

    start: a file that keep() wrote, whose values are taken. Raises UserError where the model has no such place.
    Sources: LoRA (arXiv 2106.09685), prefix tuning (2101.00190), prompt tuning (2104.08691); starts as in MeZO
    (2305.17333), which draws the prefix's tokens too.
    """
    make = {"lora": _lora, "prefix": _prefix, "prompt": _prompt}[config.train]
    if place := adapter_folder(config):
        made = load_adapter(model, place)
    else:
        with torch.no_grad(), _quiet(), torch.random.fork_rng(devices=[]):
            made = make(model, config)
    wide = torch.promote_types(_dtype(model), torch.float32)
    for name, p in named(made):
        p.data = p.data.to(wide)
        if p.is_meta or config.adapter:
            continue
        if "lora_A" in name:
            p.data.copy_(uniform(p.shape, config.seed, name) / p[0].numel() ** 0.5)
        elif "lora_embedding_B" in name:
            p.data.copy_(normal(p.shape, config.seed, name))
    if start is not None and start.exists():
        _restore(made, start)
    if config.train != "lora":  # a copy from the CPU in every forward would keep graphs from being captured
        made.prompt_tokens = {k: v.to(next(model.parameters()).device) for k, v in made.prompt_tokens.items()}
        if not next(model.parameters()).is_meta:
            with torch.no_grad():
                _works(made.eval(), config.train, made.active_peft_config.num_virtual_tokens)
    return made.eval()


def _lora(model: nn.Module, config: Config) -> Any:
    with plain_shapes(model):
        return _pairs(model, config)


def _pairs(model: nn.Module, config: Config) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, config.lora_targets)
    if isinstance(targets, str) and targets != "all-linear":
        if fault := pattern_fault(targets):
            raise UserError(f"lora_targets={targets}: {fault.removesuffix('; fetch it again')}")
        _match_in_time(model, f"lora_targets={targets}", [targets])
    layers: dict[str, Any] = {}
    if config.lora_layers is not None:
        prefix, blocks = blocks_of(model)
        k = int(config.lora_layers.removeprefix("last-"))
        if k > len(blocks):
            raise UserError(
                f"lora_layers=last-{k}: the model has {len(blocks)} blocks; use last-1 to last-{len(blocks)}"
            )
        last = range(len(blocks) - k, len(blocks))
        if isinstance(targets, str):  # which peft does not take beside layers
            targets = _names(model, targets, tuple(f"{prefix}.{i}." for i in last))
        else:
            layers = {"layers_to_transform": list(last), "layers_pattern": prefix.rpartition(".")[2]}
    kind = None if is_masked(model) else "CAUSAL_LM"  # peft has none for masked models
    settings = LoraConfig(
        task_type=kind, r=config.lora_rank or 8, lora_alpha=config.lora_alpha or 16, lora_dropout=0.0,
        target_modules=targets, fan_in_fan_out=False, **layers,
    )  # fmt: skip
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"lora_targets={config.lora_targets or 'null'}: {str(error).splitlines()[0][:160]}; "
            f"linear layers here are {', '.join(known) or 'none'}"
        ) from None


def _targets(model: Any, asked: str | None) -> Any:
    """peft's target_modules: a list of ends of names, or a pattern for whole names."""
    if asked is not None:
        words = asked.split()
        plain = all(re.fullmatch(r"[\w.]+", w) for w in words)
        return words if words and plain and asked != "all-linear" else asked
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind in KNOWN:
        return KNOWN[kind]
    ends = {n.rpartition(".")[2] for n, m in model.named_modules() if "weight" in m._parameters}
    found = next((list(pair) for pair in _PAIRS if set(pair) <= ends), None)
    if found is None:
        raise UserError(
            f"train=lora: no query and value projections are known for a model of type {kind}; set lora_targets, "
            f"to some of {', '.join(sorted(ends))}, or to all-linear"
        )
    return found


def _names(model: nn.Module, asked: str, starts: tuple[str, ...]) -> list[str]:
    """Whole names of the modules below `starts` that all-linear or a pattern means."""

    def meant(name: str, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Linear | Conv1D)
            if asked == "all-linear"
            else bool(re.fullmatch(asked, name))
        )

    found = [n for n, m in model.named_modules() if n.startswith(starts) and meant(n, m)]
    if not found:
        raise UserError(f"lora_targets={asked}: no module of those blocks has such a name")
    return found


def _prefix(model: Any, config: Config) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    n = config.virtual_tokens or 5
    if next(model.parameters()).is_meta:
        return get_peft_model(
            model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, inference_mode=False)
        )
    keys_values = adapter_start.keys_values(
        model, tokens_of(model, n, config.seed)
    )  # [n, layers, 2, heads, dim]
    _, layers, _, heads, dim = keys_values.shape
    made: Any = get_peft_model(model, PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, inference_mode=False,
        num_layers=layers, num_attention_heads=heads, token_dim=heads * dim,
    ))  # fmt: skip
    table = made.prompt_encoder["default"].embedding.weight
    table.data = keys_values.flatten(1).to(
        table.device, torch.promote_types(keys_values.dtype, torch.float32)
    )
    return made


def _prompt(model: Any, config: Config) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    if is_masked(model):
        raise UserError("train=prompt: peft puts no prompt before a masked language model; use train=lora")
    n, table, shape = (
        config.virtual_tokens or 10,
        model.get_input_embeddings(),
        model.config.get_text_config(),
    )
    made: Any = get_peft_model(model, PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, prompt_tuning_init="RANDOM", token_dim=table.weight.shape[1],
        num_layers=getattr(shape, "num_hidden_layers", 1), num_attention_heads=getattr(shape, "num_attention_heads", 1),
    ))  # fmt: skip
    # A row of its own for each row of the batch, as a prefix has it, so that each probe's rows get that probe's prompt.
    made.get_prompt = partial(_rows_of_prompt, made)
    if not table.weight.is_meta:
        start = table(tokens_of(model, n, config.seed))  # [n, width]
        own = made.prompt_encoder["default"].embedding.weight
        own.data = start.to(torch.promote_types(start.dtype, torch.float32))
    return made


def _works(made: Any, train: str, n: int) -> None:
    """Raise UserError where the model cannot run behind a prefix or a prompt."""
    base = type(made.get_base_model()).__name__
    if train == "prefix" and (line := misread_prefix(made)):
        raise UserError(f"train=prefix: {base}: {line}; use a newer peft, or train=lora")
    ids = torch.full((2, 3), 1, device=made.device)
    try:
        seen = made(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.shape[1]
        assert seen == 3 + (n if train == "prompt" else 0), f"logits at {seen} positions"
    except Exception as error:  # whatever peft or the model cannot do
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"train={train}: {base} does not run with one ({why}); use train=lora") from None


def _rows_of_prompt(model: Any, batch_size: int, **unused: Any) -> Tensor:
    """Return what PeftModel.get_prompt gives, [rows, n, width], by embeddings of n tokens a row."""
    tokens = model.prompt_tokens["default"].expand(batch_size, -1)
    return model.prompt_encoder["default"](tokens.to(model.device))


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the adapter's own tensors."""
    return [(n, p) for n, p in model.named_parameters() if ADDED.search(n)]


def place_adapter(trained: Sequence[Stored], compute: torch.dtype) -> None:
    """Probe adapters in the precision they are kept in: whoever reads them casts to what the base computes in."""
    for t in trained:
        t.compute = torch.promote_types(t.stored.dtype, compute)


# ---- in a run's folder ---------------------------------------------------------------------------------------------


def adapter_fingerprint(trained: Sequence[Stored]) -> str:
    """Hash of what the adapter starts from."""
    h = hashlib.blake2b(digest_size=16)
    for t in trained:
        h.update(f"{t.name} {tuple(t.stored.shape)} {t.stored.dtype}\n".encode())
        h.update(memoryview(raw_bytes(t.stored.detach().flatten())))
    return f"blake2b:{h.hexdigest()}"


def _restore(model: nn.Module, start: Path) -> None:
    from safetensors.torch import load_file

    back = "put back the file that the run wrote"
    held = read_header(str(start), start, "adapter")
    for name, p in named(model):
        if name not in held or held[name]["shape"] != list(p.shape):
            raise UserError(f"{start}: tensor {name} {list(p.shape)} is not in it; {back}")
    kept = load_file(start)
    refuse_non_finite(str(start), kept, back)
    for name, p in named(model):
        p.data = kept[name].to(p.device)


def save_adapter(model: Any, folder: str | Path, *, tokenizer: Any = None, card: str = "") -> None:
    """Write the adapter as peft does, in the dtype it is kept in; all or nothing.

    adapter_config.json and adapter_model.safetensors, which PeftModel.from_pretrained reads; the tokenizer, if one is
    given; card: text of README.md, see card.model_card.
    """
    refuse_non_finite("nothing is saved", dict(named(model)), NOT_WRITTEN)
    with whole_folder(folder) as place, _quiet():
        model.save_pretrained(str(place), save_embedding_layers=False)
        if tokenizer is not None:
            save_tokenizer(tokenizer, place)
        write_card(place, card)


def load_adapter(model: nn.Module, folder: str | Path) -> Any:
    """Return the base model with a saved adapter. Raises UserError where it does not fit."""
    from peft import PeftConfig, PeftModel, get_peft_model

    if lora_pairs(model):
        raise UserError(f"{folder}: the model has an adapter in place already")
    try:
        settings = read_object(str(folder), Path(folder) / ADAPTER_CONFIG, "adapter")
        check_adapter_values(str(folder), settings)
        if (weights := Path(folder) / ADAPTER_WEIGHTS).is_file():
            refuse_larger(str(folder), settings, read_header(str(folder), weights, "adapter"))
        _match_in_time(model, f"adapter={folder}", (p for _, p in adapter_patterns(settings)))
        with _quiet(), plain_shapes(model), torch.random.fork_rng(devices=[]):
            if next(model.parameters()).is_meta:
                return get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
            made: Any = PeftModel.from_pretrained(model, str(folder))
            refuse_non_finite(f"adapter={folder}", dict(named(made)), "the adapter is damaged")
            complete(made, Path(folder))
            if made.active_peft_config.peft_type == "PREFIX_TUNING" and (line := misread_prefix(made)):
                raise UserError(f"{folder}: {line}; use a newer peft")
            return made.eval().requires_grad_(False)
    except (ValueError, RuntimeError, OSError, LookupError, TypeError, AttributeError) as error:
        if is_memory(error):
            raise
        raise UserError(f"{folder}: {' '.join(str(error).split())[:200]}") from None


def merge_adapter(model: Any) -> Any:
    """Return the base model with its LoRA pairs added to its matrices: W + (alpha / rank)·B A, summed in fp32, rounded once.

    The model's own matrices change. Raises UserError for a prefix or a prompt, which are no change of weights.
    """
    if model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"{model.active_peft_config.peft_type.value.lower()}: it cannot be merged into weights; keep the adapter"
        )
    return model.merge_and_unload()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _match_in_time(model: nn.Module, what: str, patterns: Iterable[str]) -> None:
    """Match patterns with the names of all modules, as peft will. Raises UserError where it takes PATTERN_SECONDS.

    what: what holds the patterns, as the message begins.
    """
    names = [name for name, _ in model.named_modules()]
    slow = f"{what}: its patterns take more than {PATTERN_SECONDS:g} s to match; name the modules in a list"
    with at_most_seconds(PATTERN_SECONDS, slow):
        for form in (f"({p})" for p in patterns):
            for ways in (form, rf"(.*\.)?{form}$", rf".*\.{form}\.(\d+)\."):
                compiled = re.compile(ways)
                for name in names:
                    compiled.match(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """peft's and transformers' advice is for those who call them."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield
