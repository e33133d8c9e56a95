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

from zoft.method.method import Method, Space

METHOD = Method(
    space=Space(train="scales", never=("lora", "prefix", "prompt"), quantised=True),
    defaults={"clip": 100.0},
    keys=("eps_mode",),
)
