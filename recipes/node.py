"""Node perturbation, whitened: ask about what linear layers compute, and move only in directions worth moving.

u ∈ {±1} per example, token and unit;  probes add ±eps·σ·u to a layer's outputs;  c_i = (S_i⁺ - S_i⁻) / (2 eps N)
Ĝ = Σ_i Σ_t (c_i / σ) u_{i,t} (P x_{i,t})ᵀ,  P ~ (C + ρ (tr C / n) I)⁻¹,  W ← W - lr·Ĝ / rms(Ĝ)

S_i is an example's sum of losses, N the step's count. C is the covariance of the layer's inputs and σ the rms of its outputs,
both measured once at the start. Ĝ needs the inputs x: a third forward per step, the update pass, has them. lr is the size of
a step. Only matrices of linear layers are trained.
Sources: Ren et al. 2022 (arXiv 2210.03310) for activity perturbation, Dalm et al. 2023 (2310.00965) for decorrelated inputs.
Deviations: signs for Gaussians, both signs of a probe, C fixed, each matrix normalised by its own rms.
"""

from zoft.method.method import Method, Space

# key -> (the values that go with perturb=nodes, why)
ONLY = {
    "perturb": (("nodes",), "it perturbs what layers compute"),
    "directions": (("example",), "every example has noise of its own"),
    "estimator": (("two_sided",), "its coefficients are two-sided"),
    "update": (("sgd",), "its step is normalised by itself"),
    "q": ((1,), "a step asks each example once"),
    "momentum": ((0.0,), "it keeps no buffer"),
    "anchor": ((0.0,), "it keeps no second copy of the weights"),
    "blocks": (("all",), "every trained layer moves at each step"),
    "denoise_every": ((0,), "base and ledger give no sum without the data"),
    "save_best": ((False,), "weights of an earlier step follow from the data alone; take the last ones"),
    "keep_best": ((0,), "only the newest snapshots shorten a resume"),
    "elastic": ((False,), "workers would need the whole step's rows"),
    "bits": ((None,), "quantised matrices do not move"),
    "adapter": ((None,), "layers with an adapter are not linear ones"),
}


def others(config) -> str:
    """Refuse the first key that node perturbation does not have."""
    for name, (allowed, why) in ONLY.items():
        value = getattr(config, name)
        if value not in allowed:
            return f"{name}={value}: recipe=node has {name}={allowed[0]} alone ({why}); leave it out or change the recipe"
    return ""


def frozen(config) -> str:
    """Refuse to train what is no matrix of a linear layer."""
    if config.train in ("norms", "bias", "head", "scales", "lora", "prefix", "prompt"):
        return (
            f"train={config.train}: recipe=node trains matrices of linear layers alone; use train=upper, last-2, all or a pattern, "
            "or change the recipe"
        )
    return ""


METHOD = Method(
    space=Space(train="upper"),
    directions=("rademacher",),
    policies=("nodes",),
    defaults={
        "perturb": "nodes",
        "directions": "example",
        "noise": "rademacher",
        "schedule": "linear",
        "lr": 2e-3,
        "eps": 1e-2,
    },
    keys=("rho", "calibration_rows", "node_rank", "node_tokens", "node_inputs"),
    refuses=(others, frozen),
)
