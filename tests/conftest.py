"""Skips for what this machine lacks, and one thread a test process."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests bring their own models and data

import pytest
import slurm

# A shell that starts a command in the background has it ignore Ctrl-C; tests of Ctrl-C send their own.
signal.signal(signal.SIGINT, signal.default_int_handler)


COMPAT = Path(__file__).parent / "compat.txt"


def compat():
    """The entries of compat.txt, each a file or file::test."""
    lines = COMPAT.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pytest_collection_modifyitems(items):
    chosen = set(compat())
    for item in items:
        file = item.path.relative_to(COMPAT.parent).as_posix()
        names = {file, f"{file}::{getattr(item, 'originalname', item.name)}"}
        if chosen & names and not {"slow", "slurm"} & {*item.keywords}:
            item.add_marker(pytest.mark.compat)
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "no CUDA device")
    if any("slurm" in item.keywords for item in items) and (why := slurm.unavailable()):
        _skip(items, "slurm", why)


def _skip(items, marker, reason):
    for item in items:
        if marker in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
