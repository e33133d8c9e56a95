"""Snapshots: a run's trained weights and momentum at a step, which shorten a resume or a replay.

RUN/snapshots/step-00001000.safetensors holds each trained tensor under its name, in its storage dtype, its momentum, if
any, as NAME@momentum, and what its update rule keeps as NAME@m, NAME@v, …, NAME@t (its count of updates). The ledger's event of that step holds the file's digest: a file is as sound as
the ledger says, whatever happened to it; one that the ledger does not know is not used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft import __version__
from zoft.errors import UserError
from zoft.ledger.format import DIGEST, Event
from zoft.models.checkpoint import HEADER_MAX

if TYPE_CHECKING:
    import torch

    from zoft.ledger.log import Ledger
    from zoft.method.space import Trained

FOLDER = "snapshots"
NAME = re.compile(r"step-(\d{8,10})\.safetensors")
MISSING = "is missing"
CHUNK = 1 << 24  # bytes read or written at a time


def file_of(folder: Path, step: int) -> Path:
    """Return the path of the snapshot of a run's step."""
    return folder / FOLDER / f"step-{step:08d}.safetensors"


def take_snapshot(folder: Path, ledger: Ledger, trained: Sequence[Trained]) -> str:
    """Save the weights after the ledger's last step, then note it there; returns a line about it.

    The ledger is synced first and the file gets its name when it is whole and on the disk, so that a snapshot is
    never ahead of its ledger and a name never holds half of one. trained: up to date (axis.flush()).
    Raises UserError where it cannot be written; the run's other files are untouched then.
    """
    began, step = time.monotonic(), len(ledger.records)
    ledger.sync()
    path = file_of(folder, step)
    tensors = {t.name: t.stored for t in trained}
    tensors |= {f"{t.name}@momentum": t.momentum for t in trained if t.momentum is not None}
    tensors |= {f"{t.name}@{key}": value for t in trained for key, value in t.state.items()}
    try:
        path.parent.mkdir(exist_ok=True)
        remove_drafts(folder)
        digest = write_tensors(path, tensors, _facts(ledger.header, step))
    except OSError as error:
        raise UserError(
            f"snapshot: cannot write {path}: {error.strerror}; resume the run when it can be"
        ) from error
    ledger.note(Event("snapshot", step, digest))
    size, seconds = path.stat().st_size / 1e6, time.monotonic() - began
    return f"snapshot at step {step}: {size:.4g} MB in {seconds:.1f} s"


def remove_drafts(folder: Path) -> None:
    """Delete what a killed run has left of snapshots that never were whole."""
    for left in (folder / FOLDER).glob(".*.new"):
        left.unlink(missing_ok=True)


def newest_snapshot(
    folder: Path, header: Mapping[str, Any], events: Iterable[Event], *, last: int | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> tuple[int, Path] | None:  # fmt: skip
    """Return (step, file) of the newest sound snapshot, at step `last` at most; None without one.

    Every byte is checked against the ledger's digest; what is passed over for that is said in a line each.
    """
    for event in reversed([e for e in events if e.kind == "snapshot" and (last is None or e.step <= last)]):
        path = file_of(folder, event.step)
        fault = fault_of(path, header, event)
        if not fault:
            return event.step, path
        if fault != MISSING:  # those are the ones that were not kept
            say(f"snapshot at step {event.step} is not used: {path} {fault}")
    return None


def fault_of(path: Path, header: Mapping[str, Any], event: Event) -> str:
    """Return what is wrong with a snapshot's file; "" where it is, to the bit, what the run has written."""
    if path.exists() and not path.is_file():
        return "is no file"
    try:
        if (size := path.stat().st_size) > (most := largest_snapshot(header)):  # before all of it is read
            return f"is damaged: it has {size:,} bytes, and a snapshot of this run at most {most:,}"
        if digest_of(path) == event.digest:
            return content_fault(path, header)
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except Exception:  # whatever a damaged header does to the library
        return "is damaged: its checksum does not match"
    expected = _facts(header, event.step)
    for name, text in (("base", "a run from another base"), ("run", "another run"), ("step", "another step")):
        if facts.get(name, expected[name]) != expected[name]:
            return f"is of {text}"
    return "is damaged: its checksum does not match"


def largest_snapshot(header: Mapping[str, Any]) -> int:
    """Return how many bytes a snapshot of a run can have: 8 for a number, and as many for each of 8 states of it."""
    trained = header.get("trained")
    shapes = [shape for _, shape, _ in trained.values()] if isinstance(trained, dict) else []
    return HEADER_MAX + 64 * sum(map(math.prod, shapes))


def content_fault(path: Path, header: Mapping[str, Any]) -> str:
    """Return what a snapshot with the right digest holds otherwise than its run's header says; "" where nothing.

    A digest tells that the ledger and the file belong together, and not that both are a run's. Checked are the tensors'
    names, shapes and dtypes, and that no trained weight or momentum is NaN or infinity. Loads no torch.
    """
    from zoft.models.checkpoint import read_header

    try:
        held = read_header(str(path), path)
    except UserError as error:
        return f"is damaged: {str(error).partition(' is damaged: ')[2] or error}"
    trained = header.get("trained")
    if not isinstance(trained, dict):  # check.py says so
        return ""
    dtypes = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    for name, (_, shape, dtype) in trained.items():
        entry = held.get(name)
        if entry is None:
            return f"lacks {name}"
        if (entry["shape"], entry["dtype"]) != (shape, dtypes[dtype]):
            return f"has {name} as {entry['dtype']} {entry['shape']}, its header as {dtypes[dtype]} {shape}"
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in held.items():
            own, _, key = name.rpartition("@")
            if name not in trained and own not in trained:
                return f"has {name[:200]}, which is not trained"
            if name not in trained and key == "momentum" and entry["shape"] != trained[own][1]:
                return f"has {name} in another shape than {own}"
            if (name in trained or key == "momentum") and not _finite(file, begin, entry):
                return f"holds NaN or infinity in {name}"
    return ""


# dtype of a safetensors file -> (its words as NumPy has them, the bits that NaN and infinity alone have all set).
EXPONENTS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def _finite(file: Any, begin: int, entry: Mapping[str, Any]) -> bool:
    """Return whether the words of a tensor hold no NaN and no infinity; file: open, its tensors from byte `begin` on."""
    import numpy as np

    if entry["dtype"] not in EXPONENTS:
        return True
    words, bits = EXPONENTS[entry["dtype"]]
    start, end = entry["data_offsets"]
    file.seek(begin + start)
    for at in range(start, end, CHUNK):
        found = np.frombuffer(file.read(min(CHUNK, end - at)), words)
        if ((found & np.dtype(words).type(bits)) == bits).any():
            return False
    return True


def load_snapshot(path: Path, trained: Sequence[Trained], step: int) -> None:
    """Put a sound snapshot of `step` (from `newest`) into the weights."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names, ours = set(file.keys()), {t.name for t in trained}
        assert ours == {n if n in ours else n.rpartition("@")[0] for n in names}, sorted(names)[:3]
        for t in trained:
            for key, value in t.state.items():
                n = f"{t.name}@{key}"
                if n not in names or tuple(file.get_slice(n).get_shape()) != tuple(value.shape):
                    raise UserError(
                        f"{path}: {n} is not in it as this run keeps it; delete the file and resume"
                    )
        for t in trained:
            value = file.get_tensor(t.name)
            assert (value.shape, value.dtype) == (t.stored.shape, t.stored.dtype), (
                t.name,
                value.shape,
                value.dtype,
            )
            t.stored.copy_(value)
            t.step = step
            key = f"{t.name}@momentum"
            if key in names:
                value = file.get_tensor(key)
                if t.momentum is None:
                    t.momentum = torch.empty_like(t.stored, dtype=value.dtype)
                t.momentum.copy_(value)
            elif t.momentum is not None:
                t.momentum.zero_()
            for key, value in t.state.items():
                value.copy_(file.get_tensor(f"{t.name}@{key}"))


def _facts(header: Mapping[str, Any], step: int) -> dict[str, str]:
    """A snapshot's metadata: whose it is. run: a hash of the ledger's header."""
    text = json.dumps(header, sort_keys=True)
    run = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {"zoft": __version__, "run": run, "base": str(header.get("base")), "step": str(step)}


def digest_of(path: Path) -> bytes:
    """Return the digest of a file's bytes [DIGEST]. Raises OSError."""
    h = hashlib.blake2b(digest_size=DIGEST)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            h.update(chunk)
    return h.digest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> bytes:
    """Write a .safetensors file, a tensor at a time, and return its digest; the name appears when it is on the disk.

    In place of safetensors' own writer, which wants all tensors in the CPU's memory at once. facts: its metadata.
    Raises OSError; nothing is left behind then.
    """
    from zoft.ledger.log import sync_folder
    from zoft.models.safetensors_writer import safetensors_header

    head, starts = safetensors_header({name: (t.shape, t.dtype) for name, t in tensors.items()}, facts)
    draft = path.with_name(f".{path.name}.new")
    h = hashlib.blake2b(digest_size=DIGEST)
    try:
        with draft.open("wb") as file:
            for part in _parts(head, (tensors[name] for name in starts)):
                h.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return h.digest()


def _parts(head: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[Any]:
    """The file's bytes in pieces."""
    import torch

    yield head
    for t in tensors:
        flat = t.detach().reshape(-1)
        n = max(CHUNK // t.element_size(), 1)
        for i in range(0, flat.numel(), n):
            yield flat[i : i + n].cpu().view(torch.uint8).numpy().data
