"""Hold what a baseline is asked for and the figures of its scores, for every method's file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEMOS = 32  # as in the papers (arXiv 2305.17333)
# Methods that train with gradients; the second and third train LoRA pairs.
WITH_GRADIENTS = ("first-order", "first-order-lora", "checkpointed-lora")
ON_PAIRS = WITH_GRADIENTS[1:]
FORWARD_GRADIENT = "forward-gradient"  # trains, with slopes along random directions in place of gradients
TRAINING = (*WITH_GRADIENTS, FORWARD_GRADIENT)


@dataclass(frozen=True)
class Ask:
    """A baseline's own settings. demos: of icl, None is DEMOS. epochs: of first-order. keys: set by the user."""

    method: str
    demos: int | None = None
    epochs: float | None = None
    keys: tuple[str, ...] = ()

    def kept(self) -> dict[str, Any]:
        """What distinguishes it, for its folder."""
        extra = {"demos": self.demos or DEMOS} if self.method == "icl" else {}
        return {"method": self.method, **extra}


def adjusted(judged: Any) -> dict[str, Any]:
    """Figures of scores that have been calibrated already, without a further calibration beside them."""
    from zoft.evaluation import evaluate

    if judged.bias is not None:
        judged.bias = judged.bias * 0
    return {k: v for k, v in evaluate.figures(judged).items() if k != "calibrated_accuracy"}
