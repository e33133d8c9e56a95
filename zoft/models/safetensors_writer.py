"""A safetensors checkpoint written tensor by tensor: no more than one of them is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

LIMIT = 5_000_000_000  # bytes of a shard, unless one tensor is larger
# In the order in which safetensors lays tensors out, which is by alignment.
DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: i for i, dtype in enumerate(DTYPES)}


def write_shards(
    folder: Path,
    sizes: Mapping[str, tuple[Sequence[int], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    limit: int = LIMIT,
) -> None:
    """Write model.safetensors in `folder`, or several of them and their index, as transformers loads them.

    sizes: name -> (shape, dtype) of every tensor. tensors: (name, tensor) in any order, each freed when the next
    is asked for. The bytes are those that safetensors would write of the same tensors.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in sizes.items():
        n = _bytes(shape, dtype)
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    places: dict[str, tuple[str, int]] = {}  # name -> (file, first byte)
    for i, names in enumerate(shards):
        file = (
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        head, starts = safetensors_header({name: sizes[name] for name in names}, {"format": "pt"})
        (folder / file).write_bytes(head)
        places |= {name: (file, at) for name, at in starts.items()}
    left = set(sizes)
    for name, tensor in tensors:
        shape, dtype = sizes[name]
        assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype, (
            name,
            tensor.shape,
            tensor.dtype,
        )
        file, at = places[name]
        with (folder / file).open("r+b") as f:
            f.seek(at)
            f.write(_memory(tensor))
        left.remove(name)
    assert not left, f"{len(left)} tensors were not written: {sorted(left)[:3]}"
    if len(shards) > 1:
        total = {
            "total_parameters": sum(torch.Size(shape).numel() for shape, _ in sizes.values()),
            "total_size": sum(_bytes(*s) for s in sizes.values()),
        }
        index = {"metadata": total, "weight_map": {name: file for name, (file, _) in places.items()}}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def safetensors_header(
    sizes: Mapping[str, tuple[Sequence[int], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file, and where each of its tensors begins, in the order they have there."""
    head: dict[str, object] = {"__metadata__": dict(metadata)}
    at, starts = 0, {}
    for name in sorted(sizes, key=lambda n: (_ORDER[sizes[n][1]], n.encode())):
        shape, dtype = sizes[name]
        starts[name], end = at, at + _bytes(shape, dtype)
        head[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {n: 8 + len(text) + a for n, a in starts.items()}


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _memory(tensor: torch.Tensor) -> bytes | memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""  # type: ignore[arg-type]
