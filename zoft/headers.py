"""What a ledger's header says of a run: what replay needs beside the base, and how the run was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from zoft import __version__, adapters, noise, space
from zoft.config import ADAPTERS, Config
from zoft.config_digest import digests
from zoft.encode import Example
from zoft.space import Trained

# What a ledger's header says of the run, beside the base and the trained tensors.
PLAN = (
    "seed",
    "noise",
    "momentum",
    "eps",
    "q",
    "storage",
    "compute",
    "perturb",
    "mask",
    "sparsity",
    "eps_mode",
)
# What it says for people, of how the run began; another machine may go on with it otherwise.
MADE = ("recipe", "train", "steps", "lr", "schedule", "warmup", "clip", "meazo", "weight_decay", "batch_size", "accumulate",
        "device", "threads", "probes_per_forward", "cache_frozen")  # fmt: skip


def of(
    config: Config, base: str, trained: Sequence[Trained], train: Sequence[Example] = ()
) -> dict[str, Any]:
    """The ledger's header: what the run is, all that replay needs beside the base, and how the run was made."""
    tensors = {t.name: [t.id, list(t.stored.shape), short(t.stored.dtype)] for t in trained}
    known = {k: getattr(config, k) for k in PLAN}
    if config.update != "sgd":
        known["update"] = config.update
    if config.train in ADAPTERS:
        known["adapter"] = adapters.fingerprint(trained)
    found: dict[str, Any] = {
        "zoft": __version__,
        "noise_version": noise.VERSION,
        "base": base,
        "config": digests(config),
    }
    if train:
        found["data"] = data_digest(train)
    floors = {t.name: t.floor for t in trained if t.floor is not None}
    found |= {"floors": floors} if floors else {}
    return {**found, **known, "trained": tensors, "plan": {k: getattr(config, k) for k in MADE}}


def short(dtype: torch.dtype) -> str:
    """The name that config and ledger have for a dtype."""
    return next(name for name, d in space.DTYPES.items() if d == dtype)


def data_digest(train: Sequence[Example]) -> str:
    """A hash of the training examples' tokens, in their order."""
    h = hashlib.blake2b(digest_size=16)
    for e in train:
        rest: list[Any] = [e.after] if e.masked else [e.scored] if e.scored is not None else []
        h.update(json.dumps([e.contexts, e.completions, e.gold, *rest]).encode())
    return f"blake2b:{h.hexdigest()}"


def with_plan(config: Config, found: Mapping[str, Any]) -> Config:
    """The config with the plan that a ledger was written under."""
    return replace(config, **{k: found[k] for k in (*PLAN, "update") if k in found})
