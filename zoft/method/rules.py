"""Update rules without a kernel of their own: θ, the estimate of its gradient, and what a rule remembers.

A rule is plain tensor operations on whole tensors. It is applied eagerly, right after its step, by
`noise.reference.advance`, which draws the noise, masks, rounds to the storage dtype and works in chunks. It is slower
than the fused passes of plain and momentum steps, and needs one function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.method.anchor import anchored, plain
from zoft.method.recipes import method_of

if TYPE_CHECKING:
    from torch import Tensor

    from zoft.method.space import Trained


@dataclass(frozen=True)
class Rule:
    """Move a tensor by a step, given g = Σ_k c_k·z_k, the estimate of its gradient.

    Operations must work on each element alone, because a tensor comes in parts. For the same bits on CPU and GPU, write
    products and sums apart (`theta - lr * g`, not `add(g, alpha=)`, `lerp` or a division by a number), and take roots
    with `root`.

    Args:
        name: The name that messages and ledger headers show.
        step: step(theta, g, state, lr) returns the new θ. theta and g are [n], a part of one tensor, fp32 (fp64 for an
            fp64 θ). theta is already multiplied by the step's weight decay. state maps names to buffers [n] of the same
            dtype, zeros at the start, which may be changed in place or replaced. state["t"] is the number of this update,
            from 1; skipped steps do not count.
        state: The names of the buffers.
        anchor: The strength of the pull towards the base before `step`; set by the key `anchor`.
    """

    name: str
    step: Callable[[Tensor, Tensor, dict[str, Any], float], Tensor]
    state: tuple[str, ...] = ()
    anchor: float = 0.0  # set by the key: θ is pulled towards the base before `step`


def sign(theta: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> Tensor:
    """Move each number by lr against the sign of its estimate: θ ← θ - lr·sign(g).

    Source: Liu et al. 2019 (signSGD via zeroth-order oracle), as ZO-SGD-Sign in Zhang et al. 2024 (ZO-Bench,
    arXiv 2402.11592). Their released code does something else: it takes the sign of the projected gradient, a scalar,
    so that θ moves by lr·sign(c)·z, and its sweeps leave the step to AdamW. With rademacher noise and one direction both are the same.
    """
    return theta - lr * g.sign()


def adam(
    theta: Tensor, g: Tensor, state: dict[str, Any], lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Tensor:  # fmt: skip
    """Move each number by its first moment over the root of its second: θ ← θ - lr·m̂ / (√v̂ + eps).

    m ← beta1·m + (1 - beta1)·g,  v ← beta2·v + (1 - beta2)·g²,  m̂ = m / (1 - beta1ᵗ),  v̂ = v / (1 - beta2ᵗ).
    Source: Kingma and Ba 2015 (arXiv 1412.6980), with the decoupled decay of AdamW (arXiv 1711.05101).
    """
    m = state["m"] = beta1 * state["m"] + (1 - beta1) * g
    v = state["v"] = beta2 * state["v"] + (1 - beta2) * (g * g)
    t = state["t"]
    # The inverses are made here: GPUs multiply by one where a tensor is divided by a number, CPUs divide.
    size = root(v * (1 / (1 - beta2**t))) + eps
    return theta - lr * ((m * (1 / (1 - beta1**t))) / size)


def root(x: Tensor) -> Tensor:
    """Return √x, for fp32 correctly rounded on every device, which `sqrt` on a CPU is not (a fifth is one bit off)."""
    return x.double().sqrt().to(x.dtype)


RULES = {"sign": Rule("sign", sign), "adam": Rule("adam", adam, ("m", "v"))}


def attach_rule(trained: Sequence[Trained], rule: Rule | None) -> None:
    """Give tensors, in their storage dtype and at the base, an update rule and its state of zeros; None: they keep the fused passes."""
    if rule is None:
        return
    for t in trained:
        t.rule = rule
        t.base = t.stored.clone() if rule.anchor else None
        wide = t.stored.new_zeros(1)
        wide = wide if wide.element_size() == 8 else wide.float()
        t.state = {name: wide.new_zeros(t.stored.shape) for name in rule.state}
        t.state["t"] = t.stored.new_zeros(1, device="cpu").long()  # how many updates it has had


def rule_of(config: Any) -> Rule | None:
    """Return the rule of a config's updates, anchored where `anchor` is set; None: the fused passes of plain and momentum steps.

    config.update: a key of RULES, the name of a fused pass, or `auto`: what the page of the config's recipe says.
    """
    asked = config.update
    if asked == "auto":
        asked = method_of(config.recipe).update
    rule = asked if isinstance(asked, Rule) else RULES.get(asked)
    if not config.anchor:
        return rule
    rule = rule or Rule("sgd", plain)
    return replace(rule, step=anchored(rule.step, config.anchor), anchor=config.anchor)


def rule_words(config: Any) -> str:
    """Return the key and value that give a config its rule, as a message names them; "" without a rule."""
    rule = rule_of(config)
    return (
        "" if rule is None else f"anchor={config.anchor:g}" if rule.name == "sgd" else f"update={rule.name}"
    )


def is_sized(config: Any) -> bool:
    """Say whether a config's rule, or its shaping, makes lr the size of a step, so that lr does not compare with a plain step's."""
    rule = rule_of(config)
    return (rule is not None and rule.name != "sgd") or config.shaping != "none" or config.objective == "rank"


def update_name(config: Any) -> str:
    """Return the name of a config's update: its rule's, or which of the fused passes' it is (sgd, momentum, conservative)."""
    rule = rule_of(config)
    return rule.name if rule else "sgd" if config.update == "auto" else config.update


def check_update(config: Any) -> None:
    """Refuse what update rules do not go with."""
    rule = rule_of(config)
    if rule is None:
        return
    what = rule_words(config)
    if config.momentum:
        why = f"is for update=sgd, not {rule.name}" if rule.name != "sgd" else f"has no buffer with {what}"
        raise UserError(f"momentum={config.momentum:g}: {why}; leave one of them out")
    if config.perturb == "inplace":
        raise UserError(f"{what}: perturb=inplace makes its own updates on the way; use perturb=probes")
    if config.denoise_every:
        raise UserError(
            f"denoise_every={config.denoise_every}: base and ledger give no plain sum with {what}; leave it out"
        )
    if (
        config.clip not in (None, method_of(config.recipe).defaults.get("clip"))
        and config.q == 1
        and rule.name == "sign"
    ):
        raise UserError(
            f"clip={config.clip:g}: changes no sign, so nothing of update=sign with q=1; leave it out"
        )
    if config.meazo and rule.name == "sign":
        raise UserError(f"meazo={config.meazo:g}: changes no sign, so none of update=sign; leave it out")
