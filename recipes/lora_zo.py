"""LoRA-ZO: MeZO's step over an adapter beside a frozen model: LoRA pairs, or a prefix, or a prompt.

LoRA:   y = W x + (alpha / rank)·B A x, A and B trained        (train=lora, the default here)
prefix: keys and values in front of every layer's own          (train=prefix)
prompt: embeddings in front of the text                        (train=prompt)
z ~ N(0, I) over the adapter's numbers alone;  g = (L(φ + eps·z) - L(φ - eps·z)) / (2 eps);  φ ← φ - lr·g·z

The frozen model runs once over the rows of all probes, so q directions cost one forward of 2q times the rows, and
noise next to nothing; q=8 probes_per_forward=16 asks for sixteen losses in one forward. eps is 1e-2 (prefix 1e-1): an
adapter's numbers are few, and each may be moved further than a weight.
Differences from the MeZO code: the adapter is kept and probed in fp32 whatever the model computes in, so nothing of an
update rounds away; any module can have a LoRA pair, and any model that peft knows a prefix.
Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333.
"""

from zoft.method.method import Method, Space

METHOD = Method(space=Space(train="lora", only=("lora", "prefix", "prompt")))
