"""A training step of zoft beside its yardsticks, all measured in one run, on models of random weights.

reference: MeZO's loop as everyone runs it.  in-place, probe axis: zoft's Trainer, ledger append to ledger append.
two forwards: 2 × one inference forward, a CUDA graph, logits for the last position only.
floor: two forwards + 8 bytes × trained numbers ÷ measured copy bandwidth.
With --q above 1, also one forward of the plain model over the rows of all probes: what an adapter's step is measured by.

python scripts/bench_step.py --model opt-125m --model opt-1.3b --shape 16x32 --shape 16x256
python scripts/bench_step.py --model opt-13b --skip reference --json out.json --plot out.png
python scripts/bench_step.py --model opt-1.3b --train lora --q 8 --probes-per-forward 16 --skip inplace
python scripts/bench_step.py --model opt-1.3b --model opt-13b --shape 16x32 --mask magnitude --skip inplace --skip reference
python scripts/bench_step.py --model opt-1.3b --shape 16x256 --nodes --skip inplace --skip reference
python scripts/bench_step.py --model opt-1.3b --shape 16x256 --targets 64 --skip inplace --skip reference
python scripts/bench_step.py --model tiny --shape 4x16 --steps 3 --device cpu
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import bench_parts as parts
import torch
from bench_models import MODELS, build

from zoft.env import environment
from zoft.method.space import DTYPES

PARTS = ("reference", "inplace", "probe", "forwards")
DEFAULT_MODELS = ["opt-125m", "opt-1.3b", "opt-13b"]


def measure(args: argparse.Namespace, emit: Any) -> list[dict[str, Any]]:
    """One dict a model and shape; emit(rows) after each, so that what was measured survives what follows."""
    if args.memory_gb:
        torch.cuda.set_per_process_memory_fraction(
            args.memory_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
        )
    copy = parts.copy_bandwidth(args.device)
    parts.release(args.device)
    results: list[dict[str, Any]] = []
    for name in args.model:
        try:
            model = build(name, args.device, DTYPES[args.dtype])
        except Exception as error:
            results += [
                {"model": name, "batch": b, "tokens": t, "error": f"{type(error).__name__}: {error}"[:200]}
                for b, t in args.shape
            ]
            continue
        for batch, tokens in args.shape:
            results.append(cell(args, model, name, batch, tokens, copy))
            emit(results)
        del model
        parts.release(args.device)
    return results


def cell(
    args: argparse.Namespace, model: Any, name: str, batch: int, tokens: int, copy: float
) -> dict[str, Any]:
    """Everything about one model and shape."""
    device, seconds = args.device, args.seconds
    row: dict[str, Any] = {"model": name, "batch": batch, "tokens": tokens, "copy_bytes_per_s": copy}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["weights_bytes"] = parts.weights_bytes(model)

    def run(part: str, call: Any) -> None:
        if part.split("_")[0] in args.skip:
            row[part] = {"error": "skipped"}
            return
        print(f"{name} {batch}x{tokens}: {part} …", file=sys.stderr, flush=True)
        row[part] = parts.attempt(call, device)
        print(
            f"  {row[part].get('error') or format(row[part]['ms'], '.2f') + ' ms'}",
            file=sys.stderr,
            flush=True,
        )

    run("forwards", lambda: parts.one_forward(model, batch, tokens, device, seconds))
    if args.q > 1:  # all probes' rows at once
        run("forwards_rows", lambda: parts.one_forward(model, 2 * args.q * batch, tokens, device, seconds))
    with parts.adapter(model, args.train) as model:
        steps_of(args, model, batch, tokens, row, run)
    return row | columns(row, args.q)


def steps_of(
    args: argparse.Namespace, model: Any, batch: int, tokens: int, row: dict[str, Any], run: Any
) -> None:
    """The ways to take a step."""
    device, seconds, steps = args.device, args.seconds, args.steps
    row["trained"] = parts.trained_numbers(model, args.train)
    examples = parts.random_rows(model, 8 * batch, tokens, args.padded, args.targets)
    for part, perturb in (("probe", "auto"), ("inplace", "inplace")):
        config = parts.config_for(args, batch, perturb, args.dtype)
        run(part, lambda config=config: parts.trainer_step(model, config, examples, seconds, steps))
    if args.nodes:
        config = parts.node_config_for(args, batch)
        run("nodes", lambda: parts.trainer_step(model, config, examples, seconds, steps))
    # Last: it moves the weights.
    run("reference", lambda: parts.reference(model, batch, tokens, device, seconds, steps, args.train))


def columns(row: dict[str, Any], q: int) -> dict[str, Any]:
    """The table's figures from what was measured; None where a part is missing.

    floor = 2q forwards + (4 + 4q) bytes × trained ÷ copy bandwidth: θ read and written once in 16 bits, 2q probes written.
    """
    reference, inplace, probe, one = (row[p].get("ms") for p in ("reference", "inplace", "probe", "forwards"))
    floor = None
    if one is not None and row["trained"] is not None:
        floor = 2 * q * one + 1e3 * (4 + 4 * q) * row["trained"] / row["copy_bytes_per_s"]
    plain = row["forwards"].get("activation_bytes")
    inference = None if plain is None else row["weights_bytes"] + plain
    return {
        "reference_ms": reference,
        "inplace_ms": inplace,
        "probe_ms": probe,
        "two_forwards_ms": None if one is None else 2 * q * one,
        "floor_ms": floor,
        "probe_over_floor": _ratio(probe, floor),
        "probe_over_two_forwards": _ratio(probe, None if one is None else 2 * q * one),
        "probe_over_rows": _ratio(probe, row.get("forwards_rows", {}).get("ms")),
        "reference_over_probe": _ratio(reference, probe),
        "inference_bytes": inference,
        "peak_over_inference": _ratio(row["probe"].get("peak_bytes"), inference),
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def tables(rows: list[dict[str, Any]], q: int) -> str:
    """Markdown: milliseconds a step, then memory."""
    times = "two forwards" if q == 1 else f"{2 * q} forwards"
    extra = [] if q == 1 else [f"one forward of {2 * q}× the rows", "probe ÷ it"]
    head = [
        "model, batch × tokens",
        "reference loop",
        "in-place",
        "probe axis",
        times,
        "floor",
        "probe ÷ floor",
        f"probe ÷ {times}",
        "reference ÷ probe",
        *extra,
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for r in rows:
        title = f"{r['model']} {r['batch']}×{r['tokens']}"
        if "error" in r:
            lines.append(_line([title, r["error"], *[""] * (len(head) - 2)]))
            continue
        keys = (
            "reference_ms",
            "inplace_ms",
            "probe_ms",
            "two_forwards_ms",
            "floor_ms",
            "probe_over_floor",
            "probe_over_two_forwards",
            "reference_over_probe",
        )
        why = dict(zip(keys, (r["reference"], r["inplace"], r["probe"], r["forwards"])))
        cells = [_figure(r[k], why.get(k, {}).get("error", "")) for k in keys]
        if q > 1:
            whole = r["forwards_rows"]
            cells += [_figure(whole.get("ms"), whole.get("error", "")), _figure(r["probe_over_rows"], "")]
        lines.append(_line([title, *cells]))
    head = [
        "GB",
        "weights",
        "one forward",
        "probe axis, peak, set-up included",
        "reserved",
        "in-place, peak",
        "reference, peak",
        "probe peak ÷ (weights + one forward)",
    ]
    lines += ["", _line(head), _line(["---"] * len(head))]
    for r in (r for r in rows if "error" not in r):
        p = r["probe"]
        sizes = [r["weights_bytes"], r["forwards"].get("activation_bytes"), p.get("peak_bytes"), p.get("peak_reserved_bytes"),
                 r["inplace"].get("peak_bytes"), r["reference"].get("peak_bytes")]  # fmt: skip
        shown = ["" if s is None else f"{s / 1e9:.3f}" for s in sizes]
        lines.append(
            _line([f"{r['model']} {r['batch']}×{r['tokens']}", *shown, _figure(r["peak_over_inference"], "")])
        )
    if any("nodes" in r for r in rows):
        lines += ["", *node_table([r for r in rows if "nodes" in r])]
    return "\n".join(lines)


def node_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: node perturbation's step and its peak, each beside the probe axis's."""
    head = ["node perturbation", "ms", "÷ probe axis", "peak, GB", "÷ probe axis", "trained"]
    lines = [_line(head), _line(["---"] * len(head))]
    for r in rows:
        n, p = r["nodes"], r["probe"]
        ratios = [_ratio(n.get(k), p.get(k)) for k in ("ms", "peak_bytes")]
        peak = None if n.get("peak_bytes") is None else n["peak_bytes"] / 1e9
        cells = [n.get("ms"), ratios[0], peak, ratios[1], n.get("trained")]
        shown = [_figure(c, n.get("error", "") if i == 0 else "") for i, c in enumerate(cells)]
        lines.append(_line([f"{r['model']} {r['batch']}×{r['tokens']}", *shown]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "/") for c in cells) + " |"


def _figure(value: float | None, why: str) -> str:
    return why[:60] if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bars over the floor, a group a model and shape."""
    try:
        import matplotlib
    except ImportError:
        print("--plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r.get("floor_ms")]
    figure, axes = plt.subplots(figsize=(max(6, 1.3 * len(rows)), 4))
    series = [
        ("reference_ms", "reference loop", "#b0b0b0"),
        ("inplace_ms", "zoft, in place", "#7aa6d8"),
        ("probe_ms", "zoft, probe axis", "#1f4e9c"),
    ]
    for i, (key, label, colour) in enumerate(series):
        at = [(j + 0.27 * (i - 1), r[key] / r["floor_ms"]) for j, r in enumerate(rows) if r[key] is not None]
        if not at:
            continue
        bars = axes.bar([x for x, _ in at], [y for _, y in at], 0.25, label=label, color=colour)
        axes.bar_label(bars, [f"{y:.2f}" if y < 10 else f"{y:.0f}" for _, y in at], fontsize=8, padding=3)
    axes.axhline(1, color="black", linewidth=0.8, label="floor: two forwards + one pass over θ")
    axes.set_yscale("log")
    axes.set_ylabel("time of a step ÷ floor")
    axes.set_xticks(range(len(rows)), [f"{r['model']}\n{r['batch']}×{r['tokens']}" for r in rows], fontsize=8)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def shape(text: str) -> tuple[int, int]:
    batch, x, tokens = text.partition("x")
    if not (x and batch.isdigit() and tokens.isdigit() and int(batch) >= 2 and int(tokens) >= 4):
        raise argparse.ArgumentTypeError(f"{text}: give BATCHxTOKENS, such as 16x32")
    return int(batch), int(tokens)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", choices=sorted(MODELS), help="repeatable; default: the three OPTs"
    )
    parser.add_argument(
        "--shape", action="append", type=shape, metavar="BxT", help="repeatable; default: 16x32 and 16x256"
    )
    parser.add_argument(
        "--skip", action="append", default=[], choices=PARTS, help="repeatable: leave a part out"
    )
    parser.add_argument("--train", default="all", help="trained tensors, as in a config (default: all)")
    parser.add_argument("--storage", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--compute", default="auto", choices=("auto", *DTYPES))
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the model; auto: bf16 on a GPU, fp32 on a CPU",
    )
    parser.add_argument("--probes-per-forward", default="auto", help="auto or a number")
    parser.add_argument("--noise", default="gaussian", choices=("gaussian", "rademacher", "rank1"))
    parser.add_argument("--directions", default="shared", choices=("shared", "example"))
    parser.add_argument(
        "--mask", default="none", choices=("none", "magnitude", "random"), help="Sparse-MeZO's, sparsity 0.75"
    )
    parser.add_argument("--q", type=int, default=1, help="directions a step")
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="also a step of node perturbation of the upper half of the blocks",
    )
    parser.add_argument("--padded", action="store_true", help="half of the rows shorter than the shape says")
    parser.add_argument(
        "--targets",
        type=int,
        default=0,
        help="tokens a row to learn over the whole vocabulary; 0: two candidates",
    )
    parser.add_argument("--steps", type=int, default=100, help="timed steps of a cell at most")
    parser.add_argument(
        "--seconds",
        type=float,
        default=15,
        help="time for a cell's timed steps; fewer steps where it runs out",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-gb", type=float, help="as if the GPU had only so much")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args(argv)
    args.model, args.shape = args.model or DEFAULT_MODELS, args.shape or [(16, 32), (16, 256)]
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device.startswith("cuda") else "fp32"
    if args.probes_per_forward != "auto":
        args.probes_per_forward = int(args.probes_per_forward)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    found: dict[str, Any] = {
        "command": shlex.join(["python", *(sys.argv if argv is None else ["bench_step.py", *argv])])
    }
    found |= {"environment": environment(), "arguments": vars(args)}

    def emit(rows: list[dict[str, Any]]) -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(found | {"rows": rows}, indent=2) + "\n", encoding="utf-8")

    rows = measure(args, emit)
    emit(rows)
    env = found["environment"]
    packages = ", ".join(f"{k} {env['packages'][k]}" for k in ("torch", "triton", "transformers"))
    hardware = (
        env["gpus"] if args.device.startswith("cuda") else f"{env['cpu']}, {torch.get_num_threads()} threads"
    )
    copy = rows[-1].get("copy_bytes_per_s", 0) / 1e12
    print(
        f"{hardware}; {packages}; copy {copy:.3g} TB/s; {args.dtype} model, storage {args.storage}, compute {args.compute}, {args.noise}, directions {args.directions}, q {args.q}, train {args.train}"
    )
    print(f"`{found['command']}`\n\nMilliseconds a step.\n\n{tables(rows, args.q)}")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
