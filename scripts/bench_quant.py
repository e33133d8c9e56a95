"""QZO on a GPU beside its yardsticks: a model of known shape and random weights, quantised as it is made.

bf16 forward, quantised forward: one inference forward each, captured, logits for the last position only.
two forwards: two quantised ones in one CUDA graph. step: QZO in zoft's own Trainer, ledger append to ledger append.
The layer table times one product in bf16, with codes unpacked into scratch first, and with codes unpacked within it.

python scripts/bench_quant.py
python scripts/bench_quant.py --model llama-8b --bits 8 --json out.json
python scripts/bench_quant.py --model tiny-opt --shape 4x16 --device cpu --steps 2 --skip layers
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import bench_parts as parts
import torch
import transformers as hf
from bench_models import MODELS, STD, _no_initialisation, build, plain_causal
from bench_step import _line, shape
from torch import nn

from zoft.config.schema import Config, Task
from zoft.env import environment
from zoft.models.quant import linear as quant

ROWS = (16, 32, 64, 128, 256, 512, 1024, 4096)
PARTS = ("bf16", "layers", "step")


def quantised(name: str, device: str, bits: int, group: int, zero_points: bool, dtype: torch.dtype) -> Any:
    """The model, its linear layers made and quantised one at a time, so that no more than one is ever there in full."""
    torch.manual_seed(0)
    with torch.device("meta"), _no_initialisation():
        model: Any = hf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        made = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype, device="meta"
        ).to_empty(device=device)
        made.weight.data.normal_(0, STD)
        if made.bias is not None:
            made.bias.data.zero_()
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, quant.from_linear(made, bits, group, zero_points))
    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                full = torch.empty(p.shape, dtype=dtype, device=device)
                full = full.normal_(0, STD) if p.ndim > 1 else full.fill_(0.0 if key == "bias" else 1.0)
                module._parameters[key] = nn.Parameter(full, requires_grad=False)
    model.tie_weights()
    _real_buffers(model, MODELS[name](), device)
    return model.eval().requires_grad_(False)


def _real_buffers(model: Any, config: Any, device: str) -> None:
    """Rotary tables and the like, from a model of the same kind with one small layer."""
    config.update({"num_hidden_layers": 1, "vocab_size": 64})
    like = hf.AutoModelForCausalLM.from_config(config)
    for name, buffer in like.named_buffers():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.to(device)
    left = [n for n, b in model.named_buffers() if b.is_meta]
    assert not left, left


def bytes_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())


def two_forwards(model: Any, rows: int, tokens: int, device: str, seconds: float) -> dict[str, Any]:
    """Two forwards of a batch, one after the other, in one graph."""
    batches = [parts.random_ids(model, rows, tokens, device) for _ in range(2)]

    @torch.no_grad()
    def both() -> None:
        with plain_causal(model):
            for ids in batches:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

    both()
    if not device.startswith("cuda"):
        return {"ms": median(parts.times(both, device, repeats=20, seconds=seconds))}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    return {"ms": median(parts.times(graph.replay, device, repeats=50, seconds=seconds))}


def layer_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One product of each shape and number of rows: milliseconds in bf16, through scratch, fused; for one probe and two."""
    if not args.device.startswith("cuda"):
        return []
    rows = []
    width = MODELS[args.model]().hidden_size
    deep = getattr(MODELS[args.model](), "ffn_dim", None) or MODELS[args.model]().intermediate_size
    limit = quant.FUSED_ROWS
    for outs, ins in ((width, width), (deep, width), (width, deep)):
        linear = nn.Linear(ins, outs, bias=False, dtype=torch.bfloat16, device=args.device)
        layer = quant.from_linear(linear, args.bits, args.group, not args.symmetric)
        for probes in (1, 2):
            scales = layer.scales.detach().expand(probes, -1, -1).contiguous()
            scratch = torch.empty(probes, outs, ins, dtype=torch.bfloat16, device=args.device)
            for n in ROWS:
                x = torch.randn(probes, n, ins, dtype=torch.bfloat16, device=args.device)
                y = torch.empty(probes, n, outs, dtype=torch.bfloat16, device=args.device)

                def plain(x=x, linear=linear, probes=probes) -> None:
                    for p in range(probes):
                        torch.mm(x[p], linear.weight.mT)

                def coded(x=x, y=y, layer=layer, scales=scales, scratch=scratch) -> None:
                    quant.product(layer, x, scales, None, y, scratch)

                row: dict[str, Any] = {"outs": outs, "ins": ins, "probes": probes, "rows": n}
                row["bf16_ms"] = _graph_ms(plain)
                for key, most in (("scratch_ms", 0), ("fused_ms", 1 << 30)):
                    quant.FUSED_ROWS = most
                    row[key] = _graph_ms(coded) if key == "scratch_ms" or n <= 1024 else None
                rows.append(row)
    quant.FUSED_ROWS = limit
    return rows


def _graph_ms(call: Any) -> float:
    """Milliseconds of a call, ten of them captured in one graph, so that launches cost what they do in a step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return median(parts.times(graph.replay, "cuda", repeats=10, seconds=0.2, warm=1)) / 10


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, one dict; a part that fails says so in its place."""
    device, found = args.device, {}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    cells: dict[str, Any] = {f"{b}x{t}": {} for b, t in args.shape}
    if "layers" not in args.skip:
        found["layers"] = layer_table(args)
        parts.release(device)
    if "bf16" not in args.skip:
        say("bf16 forwards")
        model: Any = build(args.model, device, dtype)
        for b, t in args.shape:
            cells[f"{b}x{t}"]["bf16"] = parts.attempt(
                lambda b=b, t=t: parts.one_forward(model, b, t, device, args.seconds), device
            )
        found["bf16_bytes"] = bytes_of(model)
        del model
        parts.release(device)
    say("quantising")
    model = quantised(args.model, device, args.bits, args.group, not args.symmetric, dtype)
    found["numbers"] = quant.count_numbers(model)
    found["bytes"] = bytes_of(model)
    found["making_peak_bytes"] = parts.peak(device)[0]
    for b, t in args.shape:
        cell = cells[f"{b}x{t}"]
        say(f"{b}x{t}: quantised forward")
        cell["forward"] = parts.attempt(
            lambda b=b, t=t: parts.one_forward(model, b, t, device, args.seconds), device
        )
        cell["two"] = parts.attempt(lambda b=b, t=t: two_forwards(model, b, t, device, args.seconds), device)
        if "step" in args.skip:
            continue
        say(f"{b}x{t}: QZO step")
        config = Config(
            recipe="qzo", model="random", task=Task(name="random"), train="scales", lr=1e-7, eps=1e-3, clip=100.0,
            steps=1 << 20, batch_size=b, device=device,
        )  # fmt: skip
        examples = parts.random_rows(model, 8 * b, t, False)
        cell["step"] = parts.attempt(
            lambda config=config, examples=examples: parts.trainer_step(
                model, config, examples, args.seconds, args.steps
            ),
            device,
        )
    return found | {"cells": cells}


def say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def tables(found: dict[str, Any]) -> str:
    """Markdown: a line a shape of batch, then a line a product."""
    head = ["batch × tokens", "bf16 forward", "quantised forward", "two quantised", "QZO step", "quantised ÷ bf16",
            "step ÷ two quantised", "peak of steps, GB", "peak of set-up, GB"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for title, c in found["cells"].items():
        ms = {k: c.get(k, {}).get("ms") for k in ("bf16", "forward", "two", "step")}
        ratios = [_over(ms["forward"], ms["bf16"]), _over(ms["step"], ms["two"])]
        peaks = [c.get("step", {}).get(k) for k in ("peak_bytes", "setup_peak_bytes")]
        why = [c.get(k, {}).get("error", "") for k in ms]
        cells = [w[:60] or _figure(v) for w, v in zip(why, ms.values())]
        lines.append(
            _line(
                [
                    title.replace("x", "×"),
                    *cells,
                    *map(_figure, ratios),
                    *[_figure(p and p / 1e9) for p in peaks],
                ]
            )
        )
    lines += ["", f"{found['numbers'] / 1e9:.2f} G weights, {found['bytes'] / 1e9:.2f} GB quantised"]
    if found.get("layers"):
        head = ["out × in", "probes", "rows of each", "bf16, ms", "through scratch", "fused"]
        lines += ["", _line(head), _line(["---"] * len(head))]
        for r in found["layers"]:
            cells = [f"{r['outs']}×{r['ins']}", str(r["probes"]), str(r["rows"])]
            lines.append(_line([*cells, *[_figure(r[k]) for k in ("bf16_ms", "scratch_ms", "fused_ms")]]))
    return "\n".join(lines)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="opt-13b", choices=sorted(MODELS))
    parser.add_argument(
        "--shape", action="append", type=shape, metavar="BxT", help="repeatable; 16x32 and 16x256"
    )
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--skip", action="append", default=[], choices=PARTS, help="repeatable")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a cell at most")
    parser.add_argument("--seconds", type=float, default=5, help="time for what is timed in a cell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    args.shape = args.shape or [(16, 32), (16, 256)]
    command = shlex.join(["python", *(sys.argv if argv is None else ["bench_quant.py", *argv])])
    env = environment()
    found = {"command": command, "environment": env, "arguments": vars(args)} | measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    packages = ", ".join(f"{k} {env['packages'][k]}" for k in ("torch", "triton", "transformers"))
    where = env["gpus"] if args.device.startswith("cuda") else env["cpu"]
    how = f"{args.bits} bits, groups of {args.group}{'' if args.symmetric else ', zero points'}"
    print(f"{where}; {packages}; {args.model}, {how}\n`{command}`\n\nMilliseconds.\n\n{tables(found)}")


if __name__ == "__main__":
    main()
