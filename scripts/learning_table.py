"""What storage does to learning: one model, one task, MeZO with several stores and seeds, and the usual loop.

    python scripts/learning_table.py --device cuda --steps 5000 --json learning.json

Each run is `zoft train` in a process of its own (--jobs at a time); the usual in-place bf16 loop is
scripts/reference_loop.py. Prints a markdown table of mean ± sd over the seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
# name -> (overrides of zoft train, seeds)
RUNS: dict[str, tuple[list[str], int]] = {
    "fp16 / bf16": (["storage=fp16", "compute=bf16", "noise=gaussian"], 3),
    "fp32 / bf16": (["storage=fp32", "compute=bf16", "noise=gaussian"], 3),
    "bf16 / bf16": (["storage=bf16", "compute=bf16", "noise=gaussian"], 1),
    "fp16 / bf16, rademacher": (["storage=fp16", "compute=bf16", "noise=rademacher"], 1),
}
USUAL = "usual loop, bf16"
METRICS = ("accuracy", "auc", "calibrated_accuracy", "macro_f1", "loss")


def one(name: str, extra: list[str], seed: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once; {name, seed, before, after, seconds} or {name, seed, error}."""
    out = folder / f"{name.replace(' ', '').replace('/', '-').replace(',', '-')}-{seed}"
    steps = args.reference_steps if name == USUAL else args.steps
    common = [*args.overrides, f"steps={steps}", f"seed={seed}", f"device={args.device}"]
    if name == USUAL:
        script = str(SCRIPTS / "reference_loop.py")
        command = [sys.executable, script, "--config", args.config, "--json", f"{out}.json", *common]
    else:
        command = [sys.executable, "-m", "zoft", "train", "--config", args.config, *common, *extra]
        command += [f"output_dir={out}", "save_model=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{name} seed {seed}: {'done' if done.returncode == 0 else 'failed'}", file=sys.stderr, flush=True)
    if done.returncode:
        return {"name": name, "seed": seed, "error": " ".join(done.stderr.strip().splitlines()[-3:])[-400:]}
    found = json.loads(
        (out / "result.json" if name != USUAL else Path(f"{out}.json")).read_text(encoding="utf-8")
    )
    seconds = found.get("train_seconds", found.get("seconds"))
    return {
        "name": name,
        "seed": seed,
        "before": found["before"],
        "after": found["after"],
        "seconds": seconds,
        "steps": found["steps"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    good = [r for r in rows if "error" not in r]
    lines = ["| weights stored / computed | seeds | steps | " + " | ".join(METRICS) + " | seconds |"]
    lines.append("| --- " * (len(METRICS) + 4) + "|")
    if good:
        cells = [f"{good[0]['before'][m]:.3f}" for m in METRICS]
        lines.append(f"| untrained | | 0 | {' | '.join(cells)} | |")
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in good if r["name"] == name]
        if not mine:
            lines.append(f"| {name} | failed | | {next(r['error'] for r in rows if r['name'] == name)} |")
            continue
        cells = []
        for m in METRICS:
            values = [r["after"][m] for r in mine]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        seconds = statistics.mean(r["seconds"] for r in mine)
        lines.append(f"| {name} | {len(mine)} | {mine[0]['steps']} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="mezo/reviews", help="a packaged config")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--reference-steps", type=int, default=5000, help="of the usual loop")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time on the one device")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--skip", action="append", default=[], help="a row to leave out (repeatable)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    args = parser.parse_intermixed_args()
    if not args.overrides:
        args.overrides = [
            "task=reviews", "train=all", "cache_frozen=false", "lr=1e-5", "schedule=constant", "batch_size=16",
            "eps=1e-3", "eval_every=0",
        ]  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            (n, e, s)
            for seed in range(3)
            for n, (e, k) in RUNS.items()
            if n not in args.skip
            for s in [seed]
            if s < k
        ]
        jobs.insert(2, (USUAL, [], 0))
        jobs = [j for j in jobs if j[0] not in args.skip]
        rows = list(pool.map(lambda job: one(*job, args, Path(folder)), jobs))
    import torch
    import transformers

    where = torch.cuda.get_device_name(0) if args.device.startswith("cuda") else platform.machine()
    print(
        f"{where}; torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}; {time.monotonic() - began:.0f} s"
    )
    print(
        f"`python scripts/learning_table.py {' '.join(sys.argv[1:])}`\n\noverrides: {' '.join(args.overrides)}\n"
    )
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
