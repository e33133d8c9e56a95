"""Sparse-MeZO: MeZO's step over the small numbers of each matrix.

m = 1[|θ| <= h] for each matrix, h = the quantile of |θ| of the base that a share 1 - sparsity lies below; fixed.
z ~ N(0, I);  g = (L(θ + eps·m∘z) - L(θ - eps·m∘z)) / (2 eps);  θ ← θ - lr·g·m∘z            (q > 1: the mean over q z's)

m is never stored: each pass over θ finds it anew from θ itself, which probing does not move. So one mask holds for all
probes of a step and for its update, though that rides on the next step's pass; what the update brings across h is in
or out from the next step on. 1-D tensors (norms, biases) move whole; decay spares what stays. mask=random is the
control: as many numbers, drawn once, whatever their size (the paper's R-MeZO). mask=none is MeZO.
Differences from the paper: its algorithm compares θ with h, its text |θ|: here |θ|; the mask is looked at in each step.
Source: Liu et al. 2024, Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning, arXiv 2402.15751.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoft.config import Config
from zoft.ledger import Log
from zoft.recipe import recipe
from zoft.replay import Ask


def run(config: Config, *, resume: str | Path | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Train, from the start or from where `resume` stopped; returns result.json's content, or the plan of a dry run."""
    # config.mask says which numbers move; zoft/sparse.py makes the masks when the tensors have their precision.
    return recipe("mezo").run(config, resume=resume, dry_run=dry_run)


def replay(config: Config, folder: Path, out: Path, ask: Ask) -> int:
    """Base + ledger -> a model of the run in `out`; returns its number of steps."""
    return recipe("mezo").replay(config, folder, out, ask)


def rebuild(config: Config, folder: Path, log: Log) -> tuple[Any, Any, Config]:
    """(the run's model in memory after the log's steps, its tokenizer, the config)."""
    return recipe("mezo").rebuild(config, folder, log)
