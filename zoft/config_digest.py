"""Which keys decide a run's weights, and whether two configs agree in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from zoft.config import Config

# Keys that do not decide the weights: where a run is, how it is watched and kept. A run may go on under others.
FREE = ("model", "adapter", "output_dir", "device", "threads", "parallel", "elastic", "listen", "check_every",
        "probes_per_forward", "cache_frozen", "eval_every", "eval_limit",
        "max_skipped", "on_divergence", "sync", "snapshot_every", "keep_last", "keep_best", "best_by", "save_best", "save_model",
        "save_dequantised", "save_dtype", "track",
        "trust_remote_code", "task.train", "task.eval", "task.num_eval", "reward", "reward_seconds", "hold_probe",
        "task.null_prompt")  # fmt: skip

# Keys that came later, at the value that runs from before have: left out then, so that headers stay what they were.
LATER = {"update": "sgd"}


def digests(config: Config) -> dict[str, str]:
    """A short hash of the value of each key but FREE ones."""
    tree = dataclasses.asdict(config)
    flat = tree | {f"task.{k}": v for k, v in tree.pop("task").items()}
    found = {}
    for name, value in flat.items():
        if name not in FREE and not (name in LATER and value == LATER[name]):
            value = int(value) if isinstance(value, float) and value.is_integer() else value  # 0 is 0.0
            text = json.dumps(value, sort_keys=True, default=str)
            found[name] = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The keys in which two configs differ, from their `digests`; a key of another zoft, which one lacks, is none."""
    return [k for k, value in before.items() if now.get(k, value) != value]
