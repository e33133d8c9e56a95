"""Training with gradients on zoft's own data and loss, the yardstick for learning: AdamW on all weights, or LoRA's.

python scripts/first_order.py --config mezo/reviews task=reviews train=all lr=2e-5 steps=500 --json out.json
python scripts/first_order.py --lora 8 --config mezo/reviews task=reviews train=all lr=5e-4 steps=500
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

WARMUP = 0.06  # share of the steps, then linear to 0, as is usual for fine-tuning


def train(config: Any, lora: int) -> dict[str, Any]:
    """Train in fp32 and evaluate as `zoft train` does. Uses model, task, lr, steps, batch_size, seed, device, max_length."""
    from zoft import evaluate, setup, tasks
    from zoft.objective import losses

    config = setup.device(config)
    data = tasks.load(config.task)
    model, tokenizer, _ = setup.model(config)
    examples, held_out = setup.examples(config, tokenizer, data)
    model = model.float()
    torch.manual_seed(config.seed)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, task_type="CAUSAL_LM"))
        model.to(config.device).eval()  # no dropout
    else:
        model.requires_grad_(True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.0)
    batches = setup.batches(config, examples)

    def score() -> dict[str, Any]:
        with torch.no_grad():
            return evaluate.evaluate(model, held_out, examples)

    before, began = score(), time.monotonic()
    for t in range(config.steps):
        share = min(1.0, (t + 1) / max(1, WARMUP * config.steps)) * (1 - t / config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * share
        optimizer.zero_grad(set_to_none=True)
        for batch in batches(t):
            sums, counts = losses(model, batch)
            (sums.sum() / counts.sum() / config.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    seconds = time.monotonic() - began
    forwards = config.steps * config.batch_size * config.accumulate
    trained = sum(p.numel() for p in params)
    return {
        "before": before, "after": score(), "steps": config.steps, "seconds": seconds, "forwards": forwards, "trained": trained
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", "-c", default="mezo/reviews", help="a packaged config or a .yaml file")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="train LoRA pairs of rank R only")
    parser.add_argument("--json", metavar="FILE", help="write the result here too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `zoft train`")
    args = parser.parse_intermixed_args()
    from zoft.compose import compose
    from zoft.errors import UserError
    from zoft.run import table

    try:
        result = train(compose(args.config, args.overrides), args.lora)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(table({"before": result["before"], "after": result["after"]}))
    print(f"{result['steps']} steps in {result['seconds']:.1f} s", file=sys.stderr)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
