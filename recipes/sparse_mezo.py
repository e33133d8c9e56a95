"""Sparse-MeZO: MeZO's step over the small numbers of each matrix.

m = 1[|θ| <= h] for each matrix, h = the quantile of |θ| of the base that a share 1 - sparsity lies below; fixed.
z ~ N(0, I);  g = (L(θ + eps·m∘z) - L(θ - eps·m∘z)) / (2 eps);  θ ← θ - lr·g·m∘z            (q > 1: the mean over q z's)

m is never stored: each pass over θ finds it anew from θ itself, which probing does not move. So one mask holds for all
probes of a step and for its update, though that rides on the next step's pass; what the update brings across h is in
or out from the next step on. 1-D tensors (norms, biases) move whole; decay spares what stays. mask=random is the
control: as many numbers, drawn once, whatever their size (the paper's R-MeZO). mask=random mask_every=1 draws them anew each
step: the random gradient sparsity of ZO-Bench (arXiv 2402.11592), whose released code compares a normal with the ratio and so
leaves out .54, .69 and .82 where .1, .5 and .9 are asked for; here it is the share that is asked for. mask=none is MeZO.
Differences from the paper: its algorithm compares θ with h, its text |θ|: here |θ|; the mask is looked at in each step.
Source: Liu et al. 2024, Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning, arXiv 2402.15751.
"""

from zoft.method.method import Method, Space, is_set


def nothing_masked(config) -> str:
    """Refuse a sparsity that mask=none makes void."""
    if config.mask == "none" and is_set(config, "sparsity"):
        return f"sparsity={config.sparsity:g}: mask=none leaves nothing out; leave one of them out"
    return ""


def nothing_redrawn(config) -> str:
    """Refuse new draws of a mask that is not drawn."""
    if config.mask_every and (config.mask != "random" or not config.sparsity):
        why = f"mask={config.mask} draws nothing" if config.sparsity else "sparsity=0 leaves nothing out"
        return f"mask_every={config.mask_every}: {why}; use mask=random and a sparsity, or leave it out"
    return ""


METHOD = Method(
    space=Space(never=("lora", "prefix", "prompt")),
    mask="magnitude",
    keys=("mask", "sparsity", "mask_every"),
    refuses=(nothing_masked, nothing_redrawn),
)
