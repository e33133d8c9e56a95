"""Versions and hardware: what a bug report needs, and what a run's env.json keeps."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from zoft import __version__

PACKAGES = (
    "torch transformers tokenizers peft datasets accelerate safetensors gguf numpy numba triton hydra-core "
    "omegaconf typer rich wandb huggingface-hub"
).split()
TESTED = "tested.txt"  # beside this file: package, lowest and newest tested version; made by `make lock`


def tested() -> dict[str, tuple[str, str]]:
    """Return the lowest and the newest version of each package that zoft was tested with."""
    lines = (Path(__file__).parent / TESTED).read_text(encoding="utf-8").splitlines()
    rows = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: (lowest, newest) for name, lowest, newest in rows}


def release(version: str) -> tuple[int, ...]:
    """Return a version's numbers, for comparison: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"[\d.]*", version)
    return tuple(int(n) for n in found.group().split(".") if n) if found else ()


def untested() -> str:
    """Return one line about installed packages newer than the tested ones, "" where there are none."""
    newer = [
        f"{name} {found} (tested: {newest})"
        for name, (_, newest) in tested().items()
        if name != "python" and (found := _version(name)) != "-" and release(found) > release(newest)
    ]
    if not newer:
        return ""
    return f"newer than what this zoft was tested with: {', '.join(newer)}; where something fails, try the tested ones"


def tested_line() -> str:
    """Return the line of docs/running.md about tested versions."""
    shown = "python torch transformers peft datasets accelerate hydra-core typer wandb numpy numba".split()
    rows = {name: tested()[name] for name in shown}
    spans = (f"{n} {a}" if a == b else f"{n} {a} to {b}" for n, (a, b) in rows.items())
    return f"Tested with {', '.join(spans)} (lowest and newest; `zoft env` shows yours beside them)."


def environment() -> dict[str, Any]:
    """Return what is installed, JSON-ready.

    zoft, python, platform, cpu, cores, memory_gb, packages {name: version or "-"}, tested {name: "lowest to newest"},
    cuda, gpus.
    """
    found: dict[str, Any] = {
        "zoft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "packages": {name: _version(name) for name in PACKAGES},
        "tested": {n: a if a == b else f"{a} to {b}" for n, (a, b) in tested().items()},
    }
    return found | _gpus()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _gpus() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"cuda": "-", "gpus": "-"}
    if not torch.cuda.is_available():
        return {"cuda": torch.version.cuda or "-", "gpus": "-"}
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "gpus": ", ".join(f"{p.name} {p.total_memory / 1e9:.0f} GB (sm_{p.major}{p.minor})" for p in every),
    }
