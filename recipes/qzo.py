"""QZO: a quantised model fine-tuned through the scales of its codes, with forward passes only.

W = Δ·(c − zero), codes c and zeros fixed;  z ~ N(0, I) of Δ's shape
d = (L(Δ + eps·z) - L(Δ - eps·z)) / (2 eps),  at most ±clip;  Δ ← max(Δ - lr·d·z, floor)

`train: scales` trains these alone, `train: all` what is not quantised besides (paper: "unquantized"); the model is
quantised as it is loaded (`bits`), or comes quantised (GPTQ, zoft's own folders, bitsandbytes, HQQ). Differences from
the paper: scales are kept and probed in fp32, not fp16, and are never moved to be probed; the floor is 1e-7, as in its
code (0 in the paper). `eps_mode: relative` trains ln Δ with the same rule: a probe scales Δ by exp(±eps·z), no scale
reaches 0, and there is no floor; eps and lr are then shares of a scale, not its units.
Source: Shang et al. 2025, Fine-tuning Quantized Neural Networks with Zeroth-order Optimization, arXiv 2505.13430.
"""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from zoft.config import Config
from zoft.ledger import Log
from zoft.recipe import recipe
from zoft.replay import Ask
from zoft.replay_live import in_memory

CLIP = 100.0


def run(config: Config, *, resume: str | Path | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Train, from the start or from where `resume` stopped; returns result.json's content, or the plan of a dry run."""
    config = changed(config, clip=CLIP if config.clip is None else config.clip)
    return recipe("mezo").run(config, resume=resume, dry_run=dry_run)


def replay(config: Config, folder: Path, out: Path, ask: Ask) -> int:
    """Base + ledger -> a model of the run in `out`; returns its number of steps."""
    return in_memory(config, folder, out, ask, rebuild)


def rebuild(config: Config, folder: Path, log: Log) -> tuple[Any, Any, Config]:
    """(the run's model in memory after the log's steps, its tokenizer, the config)."""
    return recipe("mezo").rebuild(config, folder, log)
