"""Texts of many members beside plain batched generation and one member at a time, on a model of random weights, in one run.

plain:     transformers' `generate`, greedy, over members × rows rows of the model as it is.
together:  the members of a step in one batch (noise=rank1), as `zoft train` writes them; captured on a GPU.
eager:     the same without capture.
alone:     one member after another, as members_per_batch=1 writes them; so many members are timed, and scaled.
All write exactly --tokens tokens after prompts of --prompt tokens.

python scripts/bench_generation.py --model opt-1.3b --members 64 --rows 8 --tokens 128
python scripts/bench_generation.py --model tiny --members 4 --rows 2 --tokens 8 --device cpu --alone 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench_parts as parts
import torch
from bench_models import MODELS, build
from transformers import GenerationConfig

from zoft.env import environment
from zoft.method.estimators.named import estimator_of
from zoft.method.space import DTYPES
from zoft.objectives import decode
from zoft.probe.members import Members
from zoft.train import parts as train_parts


def timed(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    found = []
    for i in range(repeats + 1):
        parts.sync(device)
        began = time.perf_counter()
        call()
        parts.sync(device)
        if i or repeats == 0:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens per second of each way."""
    dtype = DTYPES[args.dtype]
    model: Any = build(args.model, args.device, dtype)
    examples = parts.random_rows(model, args.rows, args.prompt, False)
    config = parts.config_for(args, args.rows, "auto", args.dtype)
    config, _, axis = parts.resolved(train_parts.resolve_device(config), model, examples)
    contexts = [e.contexts[0] for e in examples]
    probes = estimator_of(config).probes(config.q, config.eps)[: args.members]
    members = Members(axis)
    how: dict[str, Any] = {"pad": 0, "ends": [], "max_new_tokens": args.tokens}
    ids = torch.tensor(contexts, device=args.device)
    asked = GenerationConfig(
        do_sample=False,
        max_new_tokens=args.tokens,
        min_new_tokens=args.tokens,
        pad_token_id=0,
        disable_compile=True,
    )

    @torch.no_grad()
    def plain(rows: int) -> None:
        whole = ids.repeat(rows // len(ids), 1)
        model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), generation_config=asked)

    def together() -> None:
        with members.at(0, probes):
            decode.decode(model, contexts, members, count=len(probes), **how)

    def alone() -> None:
        for probe in probes[: args.alone]:
            with axis.at(0, [probe], args.rows):
                plain(args.rows)

    def eager() -> None:
        captured, decode._is_static = decode._is_static, lambda cache: False
        try:
            together()
        finally:
            decode._is_static = captured

    axis.hold = True  # as hold_probe=true has it: the faster of the two
    count = len(probes) * args.rows
    found: dict[str, Any] = {}
    for name, call, texts in (
        ("plain", lambda: plain(count), count),
        ("together", together, count),
        ("eager", eager, count),
        ("alone", alone, args.alone * args.rows),
    ):
        if name in args.skip:
            continue
        repeats = 1 if name in ("alone", "eager") else args.repeats
        parts.release(args.device)
        seconds = timed(call, args.device, 0 if name == "alone" and args.device == "cpu" else repeats)
        found[name] = {
            "seconds": seconds * count / texts,
            "tokens_per_s": texts * args.tokens / seconds,
            "peak_gb": (parts.peak(args.device)[0] or 0) / 1e9,
        }
        print(f"{name:9} {found[name]['seconds']:9.2f} s  {found[name]['tokens_per_s']:12,.0f} tokens/s  "
              f"{found[name]['peak_gb']:6.1f} GB", flush=True)  # fmt: skip
    mine = found["together"]["tokens_per_s"]
    for name in ("plain", "alone"):
        if name in found:
            print(f"together ÷ {name}: {mine / found[name]['tokens_per_s']:.2f}", flush=True)
    return found


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="opt-1.3b", choices=MODELS)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--alone", type=int, default=2, help="members that are timed one after another")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    # What `config_for` reads beside these.
    for name, value in {
        "train": "all", "noise": "rank1", "q": (args.members + 1) // 2, "directions": "shared", "mask": "none",
        "storage": args.dtype, "compute": args.dtype, "probes_per_forward": "auto", "seconds": 1.0, "steps": 1,
    }.items():  # fmt: skip
        setattr(args, name, value)
    found = measure(args)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump({"args": vars(args), "environment": environment(), "found": found}, out, indent=2)


if __name__ == "__main__":
    main()
