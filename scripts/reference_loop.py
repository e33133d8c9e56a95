"""MeZO as everyone runs it, the yardstick: the weights themselves are moved, in place of their own dtype.

A step reseeds torch and draws z for one parameter after the other, θ ← θ + s·z·eps out of place for s = +1, −2, +1,
with a forward after the first two, then draws z once more for θ ← θ − lr·g·z. In bf16 this loop loses its weights:
every addition rounds, and most updates are below half a step of the grid.

python scripts/reference_loop.py --config mezo/reviews train=all lr=1e-5 steps=5000            # bf16
python scripts/reference_loop.py --dtype fp32 --config mezo/reviews train=all lr=1e-5 steps=5000 --json out.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def move(params: Sequence[nn.Parameter], seed: int, scale: float, eps: float) -> None:
    """p ← p + scale·z·eps with z = torch.normal of p's dtype, all p in order from one seed."""
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
        p.data = p.data + scale * z * eps


def update(params: Sequence[nn.Parameter], seed: int, slope: float, lr: float) -> None:
    """p ← p − lr·slope·z, the same z drawn again."""
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
        p.data = p.data - lr * (slope * z)


@torch.no_grad()
def step(
    params: Sequence[nn.Parameter], loss: Callable[[], Tensor], *, seed: int, eps: float, lr: float
) -> tuple[float, float]:
    """One step; loss() is one full forward. Returns (L(θ + eps·z), L(θ − eps·z))."""
    move(params, seed, 1, eps)
    plus = loss().item()
    move(params, seed, -2, eps)
    minus = loss().item()
    move(params, seed, 1, eps)
    update(params, seed, (plus - minus) / (2 * eps), lr)
    return plus, minus


def language_loss(model: Any, ids: Tensor) -> Tensor:
    """Loss over all positions of the rows [B, T], as a model gives it for labels."""
    return model(input_ids=ids, labels=ids).loss


def train(config: Any, dtype: str, say: Callable[[str], Any]) -> dict[str, Any]:
    """Train on a config's task with this loop, on zoft's own batches and objective.

    Uses model, task, train, lr (with its schedule), eps, steps, batch_size, seed, max_length, eval_*, device.
    Returns {before, after, evals [(step, metrics)], seconds, dtype, moved: ‖θ − θ₀‖ / ‖θ₀‖ }.
    """
    from zoft.data import tasks
    from zoft.evaluation import evaluate
    from zoft.method import space
    from zoft.method import updates as schedules
    from zoft.objectives.losses import losses
    from zoft.train import batches as data_order
    from zoft.train import parts

    if config.q != 1 or config.accumulate != 1 or config.momentum or config.weight_decay:
        raise SystemExit("reference loop: q=1 accumulate=1 momentum=0 weight_decay=0 is all it knows")
    config = parts.resolve_device(config)
    data = tasks.load_task(config.task)
    model, tokenizer, _ = parts.load_run_model(config)
    model = model.to(space.DTYPES[dtype])
    examples, held_out = parts.encode_examples(config, tokenizer, data)
    names = set(space.train_names(model, config.train))
    params = [p for n, p in model.named_parameters() if n in names]
    start = [p.data.cpu() for p in params]
    batches = data_order.batches_of(config, examples)
    every = config.eval_every or config.steps
    evals = [(0, evaluate.evaluate(model, held_out, examples))]
    say(f"0 {evals[0][1]}")
    seconds = 0.0
    for t in range(config.steps):
        began = time.perf_counter()
        (batch,) = batches(t)

        def loss(batch: Any = batch) -> Tensor:
            sums, counts = losses(model, batch)
            return sums.sum() / counts.sum()

        lr = schedules.lr_at(
            t, lr=config.lr, steps=config.steps, schedule=config.schedule, warmup=config.warmup
        )
        step(params, loss, seed=config.seed * 1_000_003 + t, eps=config.eps, lr=lr)
        seconds += time.perf_counter() - began
        if (t + 1) % every == 0 or t + 1 == config.steps:
            evals.append((t + 1, evaluate.evaluate(model, held_out, examples)))
            say(f"{t + 1} {evals[-1][1]} ({seconds:.0f} s)")
    moved = sum(float((p.data.cpu().double() - s.double()).square().sum()) for p, s in zip(params, start))
    size = sum(float(s.double().square().sum()) for s in start)
    return {
        "loop": "reference", "dtype": dtype, "steps": config.steps, "seed": config.seed, "lr": config.lr, "eps": config.eps,
        "before": evals[0][1], "after": evals[-1][1], "evals": evals, "seconds": seconds, "moved": (moved / size) ** 0.5,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", "-c", default="mezo/reviews", help="a packaged config or a .yaml file")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="of the weights")
    parser.add_argument("--json", metavar="FILE", help="write the result here too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `zoft train`")
    args = parser.parse_intermixed_args()
    from zoft.errors import UserError
    from zoft.method.configured import compose
    from zoft.replay.saved_model import metrics_table

    try:
        result = train(compose(args.config, args.overrides), args.dtype, lambda s: print(s, file=sys.stderr))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(metrics_table({"before": result["before"], "after": result["after"]}))
    print(
        f"{result['steps']} steps in {result['seconds']:.1f} s; the weights moved by {result['moved']:.1%} of their size"
    )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
