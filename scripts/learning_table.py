"""What a choice does to learning: one model, one task, equal forwards, several seeds, side by side.

    python scripts/learning_table.py storage --device cuda --json storage.json
    python scripts/learning_table.py recipes --device cuda:0 --device cuda:1 --jobs 4 --json recipes.json
    python scripts/learning_table.py storage --add storage.json --add more.json    (prints, runs nothing)

Each run is `zoft train` in a process of its own; the usual in-place bf16 loop is scripts/reference_loop.py, training with
gradients is scripts/first_order.py. Prints a markdown table of mean ± sd over the seeds; results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
METRICS = ("accuracy", "auc", "calibrated_accuracy", "macro_f1", "loss")
MEZO = ["--config", "mezo/reviews", "task=reviews", "train=all", "cache_frozen=false", "schedule=constant", "batch_size=16",
        "eps=1e-3", "eval_every=0", "lr=1e-5"]  # fmt: skip
# name -> (script, or "" for `zoft train`; arguments; seeds)
Row = tuple[str, list[str], int]
TABLES: dict[str, dict[str, Row]] = {
    "storage": {
        "fp16 / bf16": ("", [*MEZO, "noise=gaussian", "storage=fp16", "compute=bf16"], 3),
        "usual loop, bf16": ("reference_loop.py", [*MEZO, "noise=gaussian"], 1),
        "fp32 / bf16": ("", [*MEZO, "noise=gaussian", "storage=fp32", "compute=bf16"], 3),
        "bf16 / bf16": ("", [*MEZO, "noise=gaussian", "storage=bf16", "compute=bf16"], 1),
        "fp16 / bf16, rademacher": ("", [*MEZO, "noise=rademacher", "storage=fp16", "compute=bf16"], 1),
    },
}


def one(name: str, row: Row, seed: int, steps: int, device: str, folder: Path) -> dict[str, Any]:
    """Train once; {name, seed, before, after, seconds, steps} or {name, seed, error}."""
    script, arguments, _ = row
    out = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    own = [f"steps={steps}", f"seed={seed}", f"device={device}"]
    if script:
        command = [sys.executable, str(SCRIPTS / script), "--json", f"{out}.json", *arguments, *own]
    else:
        command = [
            sys.executable,
            "-m",
            "zoft",
            "train",
            *arguments,
            *own,
            f"output_dir={out}",
            "save_model=false",
        ]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{name} seed {seed}: {'done' if done.returncode == 0 else 'failed'}", file=sys.stderr, flush=True)
    if done.returncode:
        return {"name": name, "seed": seed, "error": " ".join(done.stderr.strip().splitlines()[-3:])[-400:]}
    found = json.loads(Path(f"{out}.json" if script else out / "result.json").read_text(encoding="utf-8"))
    kept = {k: found[k] for k in ("before", "after", "steps")}
    seconds = found.get("train_seconds", found.get("seconds"))
    return {"name": name, "seed": seed, "seconds": seconds, "forwards": found.get("forwards"), **kept}


def table(rows: list[dict[str, Any]]) -> str:
    good = [r for r in rows if "error" not in r]
    lines = ["| | seeds | steps | " + " | ".join(METRICS) + " | seconds |"]
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


def run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Every run of the table that `rows` lacks, --jobs at a time, spread over the devices; appended to `rows`."""
    chosen = {n: r for n, r in TABLES[args.table].items() if not args.only or n in args.only}
    have = {(r["name"], r["seed"]) for r in rows if "error" not in r}
    jobs = [
        (n, r, s) for s in range(args.seeds) for n, r in chosen.items() if s < r[2] and (n, s) not in have
    ]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for i in range(args.jobs):
        free.put(args.device[i % len(args.device)])
    lock = threading.Lock()

    def work(job: tuple[str, Row, int]) -> None:
        device = free.get()
        try:
            found = one(*job, args.steps, device, Path(folder))
        finally:
            free.put(device)
        with lock:
            rows.append(found)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3, help="at most")
    parser.add_argument("--device", action="append", help="repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, over all devices")
    parser.add_argument("--only", action="append", default=[], help="a row to run (repeatable)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--add", action="append", default=[], metavar="FILE", help="results of an earlier call"
    )
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in args.add:
        rows += json.loads(Path(path).read_text(encoding="utf-8"))
    if args.device:
        run(args, rows)
        import torch
        import transformers

        cuda = args.device[0].startswith("cuda")
        where = torch.cuda.get_device_name(0) if cuda else platform.machine()
        print(f"{where}; torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")
    order = list(TABLES[args.table])
    rows.sort(key=lambda r: (order.index(r["name"]) if r["name"] in order else len(order), r["seed"]))
    print(f"`python scripts/learning_table.py {' '.join(sys.argv[1:])}`\n\n{table(rows)}")


if __name__ == "__main__":
    main()
