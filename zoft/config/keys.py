"""Explain the keys of a run: all of them by topic, or one in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from zoft.config.schema import BY_TRAIN, SECTIONS, fields
from zoft.errors import UserError, nearest

# A key that stands in no topic belongs to that of the key before it in the schema.
TOPICS = {
    "method": ("recipe", "train", "perturb"),
    "step": (
        "lr", "schedule", "warmup", "estimator", "clip", "meazo", "max_forwards", "weight_decay", "anchor", "update", "momentum",
        "eps", "noise", "directions", "blocks", "q", "steps", "batch_size", "accumulate", "seed",
    ),
    "model": ("model", "trust_remote_code"),
    "data": ("task", "limits", "max_length"),
    "objective": ("objective", "reward", "reward_seconds", "max_new_tokens", "stop", "hold_probe"),
    "adapters": ("lora_rank", "lora_alpha", "lora_targets", "lora_layers", "adapter", "virtual_tokens"),
    "sparse_mezo": ("mask", "sparsity", "mask_every"),
    "node": ("rho", "calibration_rows", "node_rank", "node_tokens", "node_inputs"),
    "quantised models": ("bits", "group", "zero_points", "quantise_head", "eps_mode", "save_dequantised"),
    "precision": ("storage", "compute", "save_dtype", "denoise_every"),
    "evaluation": ("eval_every", "eval_limit", "best_by", "save_best", "early_stop"),
    "machine": ("device", "threads", "probes_per_forward", "cache_frozen"),
    "several processes": ("parallel", "elastic", "listen", "check_every"),
    "run": (
        "output_dir", "save_model", "track", "max_skipped", "on_divergence", "sync", "snapshot_every", "keep_last", "keep_best",
    ),
}  # fmt: skip


def topics() -> dict[str, list[str]]:
    """Return {topic: its keys by their dotted names}, every key once."""
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    where = {name: topic for topic, names in TOPICS.items() for name in names}
    topic = next(iter(TOPICS))
    for name in fields():
        topic = where.get(name.partition(".")[0], topic)
        found[topic].append(name)
    return found


def describe_keys() -> str:
    """Return a line per key, by topic: name, type, default, meaning."""
    lines = []
    for topic, names in topics().items():
        lines.append(f"{topic}:")
        for name in names:
            lines.append(f"  {name:20} {_kind(name):6} {_default(name):12} {_meaning(name)}")
    return "\n".join([*lines, "", "`zoft keys KEY` explains one key in full."])


def describe_key(name: str, recipes: Mapping[str, Any]) -> str:
    """Explain one key in full, or list the keys of a topic.

    recipes: recipe -> the default that it gives the key, where it has one. Raises UserError for an unknown name.
    """
    by_topic = topics()
    if name in by_topic and name not in fields():
        return "\n".join(
            f"{key:20} {_kind(key):6} {_default(key):12} {_meaning(key)}" for key in by_topic[name]
        )
    if name not in fields():
        near = nearest(name, [*fields(), *by_topic])
        raise UserError(
            f"{name}: no such key; {f'did you mean {near}?' if near else '`zoft keys` lists them'}"
        )
    f = fields()[name]
    topic = next(topic for topic, names in by_topic.items() if name in names)
    lines = [name, f"  {f.metadata['doc']}", f"  type: {_kind(name)}, default: {_default(name)}"]
    if values := _values(f):
        lines.append(f"  values: {values}")
    for what, found in (
        ("train", {t: d[name] for t, d in BY_TRAIN.items() if name in d}),
        ("recipe", recipes),
    ):
        if found:
            lines.append(f"  default by {what}: {', '.join(f'{k} {v}' for k, v in found.items())}")
    if "example" in f.metadata:
        lines.append(f"  example: {name}='{f.metadata['example']}'")
    if name in SECTIONS:
        lines.append(f"  keys: {', '.join(key for key in fields() if key.startswith(name + '.'))}")
    return "\n".join([*lines, f"  topic: {topic} (zoft keys '{topic}')"])


def _kind(name: str) -> str:
    if name in SECTIONS:
        return "group"
    text = str(fields()[name].type)
    return text.replace("dict[Any, str]", "map").replace(" | None", "").replace(" | str", "")


def _default(name: str) -> str:
    f = fields()[name]
    if name in SECTIONS:
        return "(choose)" if name == "task" else ""
    if f.default is dataclasses.MISSING:
        return "{}"
    if f.default == "":
        return "(choose)"
    return "null" if f.default is None else str(f.default).replace("\n", "\\n")


def _meaning(name: str) -> str:
    """Return the first part of a key's meaning, of 100 characters if it can be cut there, and its values."""
    f = fields()[name]
    words = [w for w in f.metadata.get("one_of", ()) if w != "auto" or "least" not in f.metadata]
    text = f.metadata["doc"]
    for end in (". ", "; ", ": ", " ("):
        if len(text) > 100:
            text = text.partition(end)[0]
    return text + (f" [{', '.join(words)}]" if words else "")


def _values(f: dataclasses.Field[Any]) -> str:
    """Return what a key may be, "" where its type says all."""
    m = f.metadata
    limits = [
        f"{word} {m[bound]:,}" if isinstance(m[bound], int) else f"{word} {m[bound]:g}"
        for bound, word in (
            ("least", "at least"),
            ("above", "above"),
            ("most", "at most"),
            ("below", "below"),
        )
        if bound in m
    ]
    words = list(m.get("one_of", ()))
    pattern = [m["pattern"][1]] if "pattern" in m else []
    return "; ".join(x for x in (", ".join(words), " and ".join(limits), *pattern) if x)
