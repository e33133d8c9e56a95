"""Versions and hardware: what a bug report needs, and what a run's env.json keeps."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from zoft import __version__

PACKAGES = (
    "torch transformers tokenizers peft datasets accelerate safetensors gguf numpy numba triton hydra-core "
    "omegaconf typer rich wandb huggingface-hub"
).split()


def environment() -> dict[str, Any]:
    """JSON-ready: zoft, python, platform, cpu, cores, memory_gb, packages {name: version or "-"}, cuda, gpus."""
    found: dict[str, Any] = {
        "zoft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "packages": {name: _version(name) for name in PACKAGES},
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
