"""From a config to its device, data, model and dtypes; whatever of these is `auto` is resolved here."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoft.config.schema import ADAPTERS, SETS, Config
from zoft.console import escaped
from zoft.data.encode import encode, how, refuse_foreign_ids
from zoft.data.example import Example
from zoft.data.tasks import TaskData, subset
from zoft.errors import UserError
from zoft.method.estimators.named import base_estimator
from zoft.method.method import Method
from zoft.method.recipes import method_of
from zoft.method.space import resolve_dtypes, train_names
from zoft.models.adapters.attach import START, attach_adapter, load_adapter
from zoft.models.adapters.kept_in_place import adapter_files, adapter_folder, folder_fingerprint, lora_pairs
from zoft.models.fingerprint import of_model
from zoft.models.load import find_model, load_model, load_tokenizer
from zoft.models.quant.linear import Scales, quantise_model, quantised_layers, set_log
from zoft.models.quant.other_libraries import attach_scales, keep_other_layers, other_layers
from zoft.models.vocabulary import embedding_rows
from zoft.parallel.world import this_world, threads_each
from zoft.train.trainer import Settings

# Where a GPU works, a CPU only puts batches together; more threads spin while they wait, and take from runs beside it.
CUDA_THREADS = 4


def resolve_device(config: Config) -> Config:
    """Resolve device and threads, and set the threads."""
    where, world = config.device, this_world()
    if where == "auto":
        where = "cuda" if (torch.cuda.is_available() if world.cuda is None else world.cuda) else "cpu"
    elif where.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(where.partition(":")[2] or 0) >= count:
            raise UserError(
                f"device={where}: {count or 'no'} CUDA devices here; use device=cpu or device=auto"
            )
    if where.startswith("cuda:"):  # kernels and streams go to the current device
        torch.cuda.set_device(where)
    auto = config.threads == "auto"
    threads = threads_each(world) if auto else int(config.threads)
    if auto and where.startswith("cuda"):
        threads = min(threads, CUDA_THREADS)
    world.auto = {"threads": threads} if auto else {}
    cores = os.cpu_count() or 1
    if world.rank == 0 and world.local_size > 1 and threads * world.local_size > cores:
        say(
            f"threads={threads}: {world.local_size} processes with that many threads on {cores} cores wait for each other"
        )
    torch.set_num_threads(threads)
    return replace(config, device=where, threads=threads)


def load_run_model(config: Config, folder: str | Path | None = None) -> tuple[nn.Module, Any, str]:
    """Return (model on its device in the checkpoint's dtype, tokenizer, fingerprint of the base).

    With the adapter that config.train asks for, or one that is in place (model.beside has its files, and the fingerprint
    goes on with its own). folder: of a run that goes on or is replayed.
    """
    say(f"loading {config.model}")
    loaded, tokenizer = load_base(config)
    base = of_model(loaded)
    if next(loaded.parameters()).device != torch.device(
        config.device
    ):  # some quantised models cannot be moved
        loaded = loaded.to(config.device)
    place = adapter_folder(config)
    if place is not None:
        base += f"+{folder_fingerprint(place)}"
    if config.train in ADAPTERS:
        loaded = attach_adapter(loaded, config, Path(folder) / START if folder else None)
        source = find_model(config.model)
        loaded.peft_config["default"].base_model_name_or_path = source.home or source.place
    elif place is not None:
        files = adapter_files(place)
        loaded = load_adapter(loaded, place)
        loaded.beside = files
        say(f"{len(lora_pairs(loaded))} LoRA pairs in place, frozen: {place}")
    return loaded, tokenizer, base


def load_base(config: Config) -> tuple[Any, Any]:
    """Return (model, tokenizer): the checkpoint, quantised layer by layer on config.device where `bits` asks for that."""
    loaded, tokenizer = load_model(config.model, dtype="auto", trust_remote_code=config.trust_remote_code)
    if config.bits is not None:
        keys: dict[str, Any] = {k: getattr(config, k) for k in ("bits", "group", "zero_points")}
        say(quantise_model(loaded, **keys, head=config.quantise_head, device=config.device))
    keep_other_layers(loaded)
    wanted = method_of(config.recipe).space.quantised or config.train == "scales"
    if wanted and not quantised_layers(loaded) and (found := dict(attach_scales(loaded))):
        say(f"{len(found)} quantised layers follow their scales")
    if config.eps_mode == "relative" and not quantised_layers(loaded):
        raise UserError(
            "eps_mode=relative: no layer of this model is quantised by zoft; set bits=4 or bits=8"
        )
    set_log(loaded, config.eps_mode == "relative")
    return loaded, tokenizer


def refuse_pattern(config: Config, method: Method) -> None:
    """Raise UserError for a pattern in `train` that fits no tensor, before weights load: by the model's shapes alone."""
    if re.fullmatch(SETS, config.train) or method.space.quantised or config.bits is not None:
        return
    from zoft.models.skeleton import skeleton

    try:
        shapes = skeleton(config)
    except Exception:  # of a file or code that has no shapes without weights: seen once it is loaded
        return
    if getattr(shapes.config, "quantization_config", None) is None:
        train_names(shapes, config.train, config.perturb == "nodes")


def run_tokenizer(config: Config) -> Any:
    """Return the tokenizer alone, without loading weights."""
    return load_tokenizer(config.model, config.trust_remote_code)


def encode_examples(config: Config, tokenizer: Any, data: TaskData) -> tuple[list[Example], list[Example]]:
    """Turn training rows and the evaluation rows that eval_limit keeps into token ids."""
    held_out = subset(data.eval, config.eval_limit)
    size = embedding_rows(config.model, config.trust_remote_code)
    train = encode(data.train, tokenizer, data, config.max_length, pack=data.pack)
    made = train, encode(held_out, tokenizer, data, config.max_length)
    for rows, examples in ((data.train, train), (held_out, made[1])):
        refuse_foreign_ids(rows, examples, tokenizer, size)
    for line in reading(tokenizer, data):
        say(line)
    if cut := sum(e.cut > 0 for e in train):
        say(
            f"{cut} of {len(train)} training examples are cut to max_length={config.max_length} (see `zoft data`)"
        )
    return made


def reading(tokenizer: Any, data: TaskData) -> list[str]:
    """Return what was left out of the user's own data and, where no template says, what was recognised in it and how it
    is written for the model."""
    return data.left_out + ([data.reading, how(tokenizer, data)] if data.reading else [])


def dev_examples(config: Config, tokenizer: Any, data: TaskData) -> list[Example] | None:
    """Return the rows that a model is chosen by, as token ids; None where task.num_dev and task.k_shot ask for none."""
    if data.dev is None:
        return None
    made = encode(data.dev, tokenizer, data, config.max_length)
    refuse_foreign_ids(data.dev, made, tokenizer, embedding_rows(config.model, config.trust_remote_code))
    return made


def resolve_precision(config: Config, loaded: nn.Module, names: Sequence[str]) -> Config:
    """Resolve storage and compute."""
    kind = config.device.partition(":")[0]
    if config.train in ADAPTERS:  # kept in fp32, beside a base that computes as it would without them
        base = [n for n, p in loaded.named_parameters() if n not in set(names) and p.is_floating_point()]
        _, compute = resolve_dtypes(loaded, base, "fp32", config.compute, kind)
        wide = "fp64" if compute == "fp64" else "fp32"
        return replace(config, storage=wide if config.storage == "auto" else config.storage, compute=compute)
    storage, compute = resolve_dtypes(loaded, list(names), config.storage, config.compute, kind)
    if config.perturb == "inplace" and storage != compute:
        # The model runs on its stored weights here, so there is one precision.
        asked = [d for d in (config.storage, config.compute) if d != "auto"]
        if len(asked) == 2:
            raise UserError(
                f"storage={storage}, compute={compute}: perturb=inplace has one dtype; set both alike"
            )
        storage = compute = asked[0] if asked else compute
    return replace(config, storage=storage, compute=compute)


def refuse_unquantised(config: Config, loaded: nn.Module) -> None:
    """Raise UserError where a recipe of quantised models would be another one's run of a plain model, and for keys that do
    nothing to one."""
    if config.save_dequantised and not (quantised_layers(loaded) or other_layers(loaded)):
        raise UserError(
            "save_dequantised=true: no layer of this model is quantised; set bits=4, or leave it out"
        )
    wanted = method_of(config.recipe).space.quantised
    if wanted and not any(isinstance(p, Scales) for p in loaded.parameters()):
        raise UserError(
            f"recipe={config.recipe}: no layer of this model is quantised; set bits=4, take such a model, or use another recipe"
        )


def trainer_settings(config: Config) -> Settings:
    """Return what the trainer needs of a resolved config."""
    names = Settings.__dataclass_fields__
    known = {k: v for k, v in asdict(config).items() if k in names}
    return Settings(**known | {"estimator": base_estimator(config)})


_silent = False


def say(text: str) -> None:
    """Print a line about the set-up, for the reader."""
    if not _silent:
        print(escaped(text), file=sys.stderr, flush=True)


@contextmanager
def said_before() -> Iterator[None]:
    """Keep quiet about what is set up in this context: the reader has been told of it already."""
    global _silent
    was, _silent = _silent, True
    try:
        yield
    finally:
        _silent = was
