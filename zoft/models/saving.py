"""Models, written as others read them; all or nothing."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError, writing
from zoft.models import kind
from zoft.models.card import write_card
from zoft.models.fingerprint import memory_of
from zoft.models.finite import is_finite, refuse_non_finite

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
    card: text of README.md, see card.model_card. dequantise: write quantised layers as plain weights, which every library
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
    """Write what goes with weights and config.json: the dtype in it, the tokenizer, the model card."""
    if dtype != "auto":
        # save_pretrained writes the dtype that the model in memory has.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)
    write_card(folder, card)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as its base has it: without the pad token that it was lent for its rows."""
    lent = getattr(tokenizer, "lent_padding", None)
    if lent is None or tokenizer.pad_token != lent:
        tokenizer.save_pretrained(folder)
        return
    tokenizer.pad_token = None
    if core := getattr(tokenizer, "backend_tokenizer", None):
        core.no_padding()  # a padded call has left the token in there; the next one sets it again
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.pad_token = lent


@contextmanager
def whole_folder(out_dir: str | Path) -> Iterator[Path]:
    """Provide a folder to write into, which takes the name out_dir when the context ends well, in place of an older one.

    Its files are on the disk before it takes the name, and the name before the context ends. What a killed process has
    left beside it is deleted first. Raises UserError where the disk is full or cannot be written.
    """
    from safetensors import SafetensorError

    from zoft.ledger.log import sync_folder

    out = Path(out_dir)
    with writing(out):
        if out.is_symlink() and not out.exists():
            raise UserError(f"{out}: is a link to nothing; delete it, or choose another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=DRAFT, dir=out.parent))
    try:
        held = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends: it is no leftover
        try:
            with writing(out):
                yield temporary
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o777 & ~umask)  # mkdtemp's folder is private, and so are safetensors' files
                for file in temporary.rglob("*"):
                    if file.is_file():
                        file.chmod(0o666 & ~umask)
                _sync(temporary)
                if out.exists():
                    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", suffix=DRAFT, dir=out.parent))
                    os.rename(out, old / "model")
                    os.rename(temporary, out)
                    sync_folder(out.parent)
                    shutil.rmtree(old)
                else:
                    os.rename(temporary, out)
                    sync_folder(out.parent)
        except UserError as error:
            if str(temporary) in str(error):  # of a folder within this one: its name will be out's
                raise UserError(str(error).replace(str(temporary), str(out))) from error.__cause__
            raise
        except SafetensorError as error:  # its word for a full disk
            raise UserError(f"cannot write {out}: {error}") from OSError(str(error))
        except Exception as error:
            if type(error) is Exception and "os error" in str(error):  # the tokenizers library's
                raise UserError(f"cannot write {out}: {error}") from OSError(str(error))
            raise
        finally:
            os.close(held)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


DRAFT = ".draft"  # end of the name of a folder that is being written


def clean_leftovers(out: Path) -> None:
    """Delete drafts of `out` that a killed process has left beside it; an older one is put back where `out` is missing."""
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}-*{DRAFT}")):
        if left.is_symlink() or not left.is_dir():
            continue
        fd = -1
        with suppress(OSError):
            fd = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process is writing it now
                os.close(fd)
                continue
        if (left / "model").is_dir() and f"{out.name}-old-" in left.name and not os.path.lexists(out):
            os.rename(left / "model", out)
        shutil.rmtree(left, ignore_errors=True)
        if fd >= 0:
            os.close(fd)


def _sync(folder: Path) -> None:
    """Force all files in a folder, and its names, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def cast_tensor(name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor to save, on the CPU in dtype. Raises UserError for values that it cannot hold, and for NaN and infinity."""
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
