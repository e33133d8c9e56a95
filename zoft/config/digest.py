"""Tell which keys decide a run's weights, and whether two configs agree in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from zoft.config.schema import Config, values

# Keys that do not decide the weights: where a run is, how it is watched and kept. A run may go on under others.
FREE = ("model", "adapter", "output_dir", "device", "threads", "parallel", "elastic", "listen", "check_every",
        "probes_per_forward", "cache_frozen", "eval_every", "eval_limit",
        "max_skipped", "on_divergence", "sync", "snapshot_every", "keep_last", "keep_best", "best_by", "save_best", "save_model",
        "save_dequantised", "save_dtype", "track",
        "trust_remote_code", "task.train", "task.eval", "task.num_eval", "reward", "reward_seconds", "hold_probe", "members_per_batch",
        "task.null_prompt",
        "limits.rows", "limits.bytes", "limits.cell")  # fmt: skip

# Keys that came later. Ledgers of runs that have them at these values lack them, as older ledgers do.
LATER: dict[str, tuple] = {
    "estimator": ("auto", "two_sided"),
    "update": ("auto", "sgd"),
    "directions": ("shared",),
    "blocks": ("all",),
    "mask_every": (0,),
    "anchor": (0.0,),
    "rho": (0.1,),
    "calibration_rows": (256,),
    "node_rank": (32,),
    "node_tokens": ("all",),
    "node_inputs": ("pass",),
    "temperature": (0.0,),
    "shaping": ("none",),
    "shaping_group": ("all",),
    "preference_beta": (0.1,),
    "rank_by": ("score",),
    "rank_best": (None,),
    "rank_line": (0,),
    "task.rows": (None,),
    "task.level": (None,),
}


def digests(config: Config) -> dict[str, str]:
    """Return a short hash of the value of each key but FREE ones, and LATER ones at their default."""
    found = {}
    for name, value in values(config).items():
        if name == "recipe" and value.endswith(
            ".py"
        ):  # the text's digest is in the header, wherever the file is
            value = "a page"
        if name not in FREE and value not in LATER.get(name, ()):
            value = int(value) if isinstance(value, float) and value.is_integer() else value  # 0 is 0.0
            text = json.dumps(value, sort_keys=True, default=str)
            found[name] = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the keys in which two configs differ, from their `digests`.

    A key that one of them lacks is a key of another zoft, and no difference; but a LATER one is at its default there.
    """
    found = [k for k, value in before.items() if k not in LATER and now.get(k, value) != value]
    return found + [k for k in LATER if before.get(k) != now.get(k)]
