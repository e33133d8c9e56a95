"""A run's base weights, one tensor at a time, from the files that the model was loaded from."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.models import gguf, load, safetensors_writer
from zoft.models.adapters.kept_in_place import adapter_folder, folder_fingerprint
from zoft.models.fingerprint import distinct, of_tensors
from zoft.models.gguf import llama_names, read_gguf
from zoft.models.load import find_model, user_errors
from zoft.models.skeleton import skeleton
from zoft.train.parts import load_base, run_tokenizer


@dataclass(frozen=True)
class Base:
    """Hold a run's base. model: on the meta device, or with its weights where they cannot be read one by one (`whole`).

    tensors: the model's state by name, ties under their first name; without `whole` only shapes and dtypes.
    read(name) -> that tensor on the CPU, in memory of its own, bit for bit as the run loaded it.
    """

    model: Any
    tensors: dict[str, Tensor]
    read: Callable[[str], Tensor]
    tokenizer: Callable[[], Any]
    whole: bool = False

    def fingerprint(self) -> str:
        """Compute fingerprint.of_model of the model, from its files."""
        size = sum(t.nbytes for t in self.tensors.values())
        return of_tensors(((name, self.read(name)) for name in self.tensors), size)


def find_base(config: Config, wanted: str, where: str) -> Base:
    """Return the base of the run in `where`, which has the fingerprint `wanted`.

    Read from its files tensor by tensor (safetensors, GGUF) if they give the very tensors that the run loaded,
    which the fingerprint tells; else, as for checkpoints that transformers converts while it loads, from the
    loaded model. Raises UserError for other weights.
    """
    wanted, _, beside = wanted.partition("+")  # a model and the adapter that is in place
    place = adapter_folder(config)
    if (found := folder_fingerprint(place) if place else "") != beside:
        raise UserError(
            f"{where}: its ledger starts from another adapter ({beside}) than adapter={place} ({found})"
        )
    base = streamed(config)
    if base is None or base.fingerprint() != wanted:
        base = loaded(config)
        if (found := base.fingerprint()) != wanted:
            raise UserError(
                f"{where}: its ledger starts from other weights ({wanted}) than model={config.model} has ({found})"
            )
    return base


def loaded(config: Config) -> Base:
    """Return the base from the model as it is loaded for training: all of it in memory."""
    model, tokenizer = load_base(config)
    if any(p.device.type != "cpu" for p in model.parameters()):
        model = model.cpu()
    return base_of(model, lambda: tokenizer)


def base_of(model: Any, tokenizer: Callable[[], Any]) -> Base:
    """Return the base that a model in memory is."""
    tensors = distinct(model)
    return Base(model, tensors, lambda name: tensors[name].clone(), tokenizer, whole=True)


def streamed(config: Config) -> Base | None:
    """Return the base from the model's files, or None where they do not hold every tensor under a name known here."""
    if (
        config.trust_remote_code or config.bits is not None
    ):  # loaded as its own code likes; quantised as it is loaded
        return None
    source = find_model(config.model)
    load.check_model(source)
    with user_errors(source):
        held = _gguf(Path(source.place)) if source.kind == "gguf" else _files(_folder(source))
    if not held:
        return None
    try:
        model = skeleton(config)
    except Exception:  # an architecture that cannot be built without memory, in transformers' many words
        return None
    model.checkpoint_dtype = torch.float32 if source.kind == "gguf" else model.dtype
    prefix = getattr(model, "base_model_prefix", "") + "."
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)  # the very parameters: ties are one object
    tensors = {n: t for n, t in state.items() if first.setdefault(id(t), n) == n}
    # A checkpoint of the model without its head leaves the prefix out.
    reads = {n: held.get(n) or held.get(n.removeprefix(prefix)) for n in tensors}
    if not all(reads.values()) or any(t.dtype not in safetensors_writer.DTYPES for t in tensors.values()):
        return None

    def read(name: str) -> Tensor:
        get = reads[name]
        assert get is not None, name
        with user_errors(source):
            return get().to(tensors[name].dtype)

    if source.kind != "gguf":
        with suppress(OSError):  # without the file it follows from the model's config, as it does now
            model.generation_config = GenerationConfig.from_pretrained(source.place)
    return Base(model, tensors, read, partial(run_tokenizer, config))


Held = dict[str, Callable[[], Tensor]]  # name in the files -> that tensor, read now, in memory of its own


def _gguf(path: Path) -> Held:
    from transformers import LlamaConfig

    file = read_gguf(path)
    names, settings = llama_names(file), gguf._llama_settings(file)
    if names is None or settings is None:
        return {}
    shape = LlamaConfig(**settings)

    def read(target: str, name: str) -> Tensor:
        tensor = gguf.weight(file, name, target, shape)
        file.data.madvise(mmap.MADV_DONTNEED)  # pages read so far would count as this process's memory
        return tensor

    return {target: partial(read, target, name) for target, name in names.items()}


def _folder(source: load.Source) -> Path | None:
    if source.kind == "folder":
        return Path(source.place)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.place, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _files(folder: Path | None) -> Held:
    """The tensors of the safetensors files that transformers would take in this folder."""
    if folder is None:
        return {}
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file():
        with safe_open(one, framework="pt") as file:
            where = dict.fromkeys(file.keys(), one)
    elif index.is_file():
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        where = {name: folder / Path(file).name for name, file in found.items()}
    else:
        return {}
    return {name: partial(_safetensors, path, name) for name, path in where.items()}


def _safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:  # mapped: closed, its pages no longer count
        return file.get_tensor(name).clone()
