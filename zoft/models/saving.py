"""Models, written as others read them; all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.models import kind, load
from zoft.models.finite import is_finite, refuse_non_finite
from zoft.models.fingerprint import memory_of

if TYPE_CHECKING:
    import torch
    from torch import nn

NOT_WRITTEN = "the base, its adapter or the run's ledger holds it too"


def save_model(
    model: Any,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    dtype: Any = "auto",
    card: str = "",
    dequantise: bool = False,
) -> None:
    """Write model, tokenizer and model card as others read them; all or nothing.

    The files go to a folder beside out_dir that takes its name when it is whole (an older out_dir is
    replaced then). The model in memory is not changed.

    model: a transformers model, or one with an adapter in place: the pairs are added to the matrices where these are
    plain, else the adapter goes along, in a folder of its own. tokenizer: its tokenizer, chat template included. dtype:
    torch.dtype of the floating tensors on disk, or "auto": each as it is (scales of quantised layers stay in fp32).
    card: text of README.md, see model_card(). dequantise: write quantised layers as plain weights, which every library
    reads.
    Errors: UserError where a value does not fit in dtype.
    """
    from zoft.models import quantised_files
    from zoft.models.adapters import kept_in_place
    from zoft.models.adapters.kept_in_place import changes, without
    from zoft.models.quant.linear import quantised_layers
    from zoft.models.quant.other_libraries import other_layers, own_form, plain_form

    added = changes(model, dequantise)
    with whole_folder(out_dir) as folder, without(model) as base:
        # transformers cannot undo what it did to such a model while it loaded it; it loads this form as well.
        theirs = other_layers(base)
        form = {"save_original_format": False} if theirs and not dequantise else {}
        how = plain_form if dequantise else own_form
        with kind.quiet(), how(base):
            base.save_pretrained(folder, state_dict=_cast(base, dtype, dequantise, added or {}), **form)
        if quantised_layers(base) and not dequantise:
            quantised_files.mark(folder, base)
        if added is None:
            kept_in_place.write(model, folder)
        finish_folder(folder, tokenizer, dtype, card)


def finish_folder(folder: Path, tokenizer: Any, dtype: Any, card: str) -> None:
    """What goes with weights and config.json: the dtype in it, the tokenizer, the model card."""
    if dtype != "auto":
        # save_pretrained writes the dtype that the model in memory has.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as its base has it: without the pad token that it was lent for its rows."""
    lent = getattr(tokenizer, "lent_pad_token", None)
    if lent is None or tokenizer.pad_token != lent:
        tokenizer.save_pretrained(folder)
        return
    tokenizer.pad_token = None
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.pad_token = lent


@contextmanager
def whole_folder(out_dir: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name out_dir when the context ends well, in place of an older one."""
    out = Path(out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's folder is private, and so are safetensors' files
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.rename(out, old / "model")
            os.rename(temporary, out)
            shutil.rmtree(old)
        else:
            os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cast_tensor(name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor to save, on the CPU in dtype. Raises UserError for values that it cannot hold, and for NaN and infinity."""
    refuse_non_finite("nothing is saved", {name: t}, NOT_WRITTEN)
    made = t.to("cpu", dtype)
    if not is_finite(made):
        raise UserError(f"save_dtype: {name} has values that {dtype} cannot hold; use bf16 or fp32")
    return made


def _cast(
    model: nn.Module, dtype: Any, dequantise: bool, added: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    from zoft.models import quantised_files

    tensors, kept = quantised_files.state(model, dequantise)
    for name, change in added.items():  # summed in fp32 at least, rounded once
        w = tensors[name]
        tensors[name] = cast_tensor(name, w.to("cpu") + change, w.dtype if dtype == "auto" else dtype)
    done: dict[tuple, torch.Tensor] = {}  # ties stay ties
    out = {}
    for name, t in tensors.items():
        if name not in kept and dtype != "auto" and t.is_floating_point() and t.dtype != dtype:
            if memory_of(t) not in done:
                done[memory_of(t)] = cast_tensor(name, t, dtype)
            t = done[memory_of(t)]
        out[name] = t
    refuse_non_finite("nothing is saved", out, NOT_WRITTEN)
    return out


def model_card(base: load.Source | str, facts: dict[str, Any]) -> str:
    """The text of a README.md: front matter that the Hub reads, then the facts as a table.

    base: what was trained. facts: label -> value, one row each, in order (recipe, steps, accuracy, …).
    """
    source = base if isinstance(base, load.Source) else load.Source("folder", base, base)
    front = ["---", "library_name: transformers", "tags: [zoft, zeroth-order, mezo]"]
    if source.home:
        front.append(f"base_model: {json.dumps(source.home)}")
    rows = [f"| {k} | {v} |" for k, v in facts.items()]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {Path(source.name).name}, fine-tuned with forward passes only",
            "",
            "Trained by zoft with zeroth-order optimisation: forward passes, no back-propagation.",
            "",
            "| | |",
            "|---|---|",
            f"| base | {source.name} |",
            *rows,
            "",
        ]
    )
