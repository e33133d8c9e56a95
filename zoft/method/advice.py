"""Advise on settings that are far from any that worked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.config.schema import Config
from zoft.method.estimators.named import estimator_of
from zoft.method.recipes import method_of
from zoft.method.rules import is_sized, rule_of

if TYPE_CHECKING:
    from zoft.method.space import Trained


@dataclass(frozen=True)
class Known:
    """Hold settings that a paper searched: lowest and highest lr and eps, on models that trained `numbers` and more."""

    what: str
    lr: tuple[float, float]
    eps: tuple[float, float]
    numbers: float
    far: float  # times the highest lr, a run seldom survives


# Malladi et al. 2023 (MeZO), grids of appendix E.3: RoBERTa-large and OPT, q = 1, no momentum. `numbers` are
# RoBERTa-large's: all of it, LoRA of rank 8 on queries and values, prefixes of 5.
# far: SmolLM2's last 2 blocks learn at 1e-3 and are destroyed at 2e-3, 4 times what scaling by numbers gives
# (docs/decisions.md); adapters of small models bear more: LoRA on its last 2 blocks learns at 10 times that.
WEIGHTS = Known("all weights", (1e-7, 1e-5), (1e-3, 1e-3), 3.5e8, 3)
LORA = Known("LoRA", (1e-5, 1e-4), (1e-3, 1e-2), 7.9e5, 30)
PREFIX = Known("prefixes", (1e-3, 1e-1), (1e-1, 1e-1), 2.5e5, 30)
FAR_BELOW, FAR_EPS = 0.1, 10.0  # a tenth of the lowest lr wastes time


def known_settings(config: Config) -> Known | None:
    """Return what is known of training what this config trains; None where nothing is."""
    # Prompts, and the scales of a quantisation, are in no grid of that paper.
    if (
        config.perturb == "nodes"
        or method_of(config.recipe).space.quantised
        or config.train in ("prompt", "scales")
    ):
        return None
    return {"lora": LORA, "prefix": PREFIX}.get(config.train, WEIGHTS)


def lr_range(config: Config, k: Known, numbers: int) -> tuple[float, float]:
    """Return the range of lr that `k` means for this run.

    The variance of c·z grows with the count of trained numbers, so fewer of them bear a larger lr, in proportion:
    350 M at 1e-5 and 7 M at 5e-4 are the same edge. The mean of q directions bears q times as much; momentum adds
    1/(1 - momentum) steps to each.
    """
    scale = max(1.0, k.numbers / max(numbers, 1)) * config.q * (1 - config.momentum)
    return k.lr[0] * scale, k.lr[1] * scale


def advice_at_start(config: Config, trained: Sequence[Trained]) -> list[str]:
    """Return a line for each of lr and eps that is far outside of what is known to work, and for what is slow or moves nothing."""
    k, lines = known_settings(config), []
    lr = float(config.lr)
    if lr == 0:
        lines.append("lr=0: no step will change a weight")
    if config.device.startswith("cuda") and config.compute == "fp32":  # a GGUF file's weights load as fp32
        lines.append("compute=fp32: the GPU's tensor cores stand idle; compute=bf16 uses them")
    if config.update == "conservative" and config.compute in ("bf16", "fp16"):
        lines.append(
            f"update=conservative: the points it compares lie lr·c from the weights, which compute={config.compute} may round away; "
            "compute=fp32 keeps them apart"
        )
    if k is None:
        return lines
    numbers = sum(t.stored.numel() for t in trained)
    low, high = lr_range(config, k, numbers)
    rule = rule_of(config)
    if rule and rule.name == "adam" and config.train == "all" and config.q == 1:
        exactly = "" if config.noise == "rademacher" else "nearly "
        lines.append(
            f"update=adam: with q=1 and train=all this is {exactly}momentum divided by one number, and its moments take "
            f"{8 * numbers / 1e9:.2g} GB (8 bytes per trained number); for small trained sets, or a large q"
        )
    # With meazo, a normalised estimate or an update rule, lr is the size of a step; nobody has searched that.
    sized = estimator_of(config).sized or is_sized(config)
    if lr and not sized and not FAR_BELOW * low <= lr <= k.far * high:
        lines.append(
            f"lr={lr:g} is far {'above' if lr > high else 'below'} what is known to work: "
            f"{low:.1g} to {high:.1g} for {numbers:,} trained numbers ({paper_range(k)})"
        )
    if not k.eps[0] / FAR_EPS <= config.eps <= FAR_EPS * k.eps[1]:
        lines.append(
            f"eps={config.eps:g} is far {'above' if config.eps > k.eps[1] else 'below'} what is known to work: {paper_range(k)}"
        )
    return lines


def paper_range(k: Known) -> str:
    eps = f"{k.eps[0]:g}" if k.eps[0] == k.eps[1] else f"{k.eps[0]:g} to {k.eps[1]:g}"
    return f"MeZO's paper, {k.what}: lr {k.lr[0]:g} to {k.lr[1]:g}, eps {eps}"
