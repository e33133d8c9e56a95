"""MeZO: full-parameter SPSA with forward passes only.

z ~ N(0, I);  g = (L(θ + eps·z) - L(θ - eps·z)) / (2 eps);  θ ← θ - lr·g·z        (q > 1: the mean over q z's)

Here θ is never moved by probing: both losses come from one forward with a probe axis. `perturb=inplace` is the
paper's own cycle. Differences from the paper's code: noise by counter instead of a reseeded stream, updates in
fp32 with stochastic rounding, weight decay not on norms and biases.
Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333.
"""

from zoft.method.method import Method

METHOD = Method()
