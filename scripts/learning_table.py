"""Measure what a choice does to learning: one model, one task, equal forwards, several seeds, side by side.

    python scripts/learning_table.py storage --device cuda --json storage.json
    python scripts/learning_table.py recipes --steps 2000 --tune-steps 1000 --device cuda:0 --device cuda:1 --jobs 8 --json recipes.json
    python scripts/learning_table.py storage --add storage.json --add more.json    (prints, runs nothing)

Each run is a process of its own: `zoft train`, `zoft baseline` where training takes gradients, or the usual in-place bf16
loop, scripts/reference_loop.py. Prints a markdown table of mean ± sd over the seeds; results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spread import spread

from zoft.tables import markdown

SCRIPTS = Path(__file__).resolve().parent
TUNE = 1000  # seed of the runs that choose
WRITTEN = ("f1", "reward")  # of text that the model writes: columns of tables whose rows have them
METRICS = ("accuracy", "auc", "calibrated_accuracy", "macro_f1", "loss")
MEZO = ["--config", "mezo/reviews", "task=reviews", "train=all", "cache_frozen=false", "schedule=constant", "batch_size=16",
        "eps=1e-3", "eval_every=0", "lr=1e-5"]  # fmt: skip
COMMON = ["cache_frozen=false", "batch_size=16", "eval_every=0"]
REVIEWS = "--config mezo/reviews task=reviews"


@dataclass(frozen=True)
class Row:
    """One line of a table: a command, its seeds, and the values among which a short run with another seed chooses."""

    arguments: list[str]
    seeds: int = 1
    command: str = "train"  # a verb of zoft, or a file of scripts/
    grid: tuple[str, ...] = ()  # of overrides, spaces between


def recipe(base: str, arguments: str, *lrs: str) -> Row:
    """A recipe on the table's terms, its lr chosen among these."""
    fixed = [*base.split(), *arguments.split(), *COMMON, "schedule=linear", "noise=gaussian", "compute=bf16"]
    return Row(fixed, 3, grid=tuple(f"lr={lr}" for lr in lrs))


def gradients(base: str, method: str, arguments: str) -> Row:
    return Row(["--method", method, *base.split(), "batch_size=16", *arguments.split()], 3, "baseline")


def recipes(base: str) -> dict[str, Row]:
    """Return what the papers compare, on one task; the first rows decide most."""
    sparse, qzo, adapter = (
        "recipe=sparse_mezo train=all eps=1e-3",
        "recipe=qzo train=scales group=32",
        "recipe=lora_zo",
    )
    return {
        "MeZO": recipe(base, "train=all eps=1e-3", "1e-5", "2e-5", "4e-5"),
        "Sparse-MeZO 0.75": recipe(base, f"{sparse} sparsity=0.75", "2e-5", "4e-5", "8e-5"),
        "random mask 0.75": recipe(base, f"{sparse} sparsity=0.75 mask=random", "2e-5", "4e-5", "8e-5"),
        "LoRA-ZO, rank 8": recipe(base, f"{adapter} train=lora eps=1e-2", "5e-4", "1e-3"),
        "QZO, 4 bits": recipe(base, f"{qzo} bits=4 eps=1e-3", "5e-6", "1e-5"),
        "QZO, 4 bits, relative": recipe(base, f"{qzo} bits=4 eps_mode=relative eps=1e-2", "2e-3", "4e-3"),
        "QZO, 8 bits, relative": recipe(base, f"{qzo} bits=8 eps_mode=relative eps=1e-2", "2e-3", "4e-3"),
        "prefix of 5": recipe(base, f"{adapter} train=prefix eps=1e-1", "3e-3", "1e-2"),
        "prompt of 10": recipe(base, f"{adapter} train=prompt eps=1e-2", "3e-3", "1e-2"),
        "Sparse-MeZO 0.5": recipe(base, f"{sparse} sparsity=0.5", "2e-5", "4e-5"),
        "Sparse-MeZO 0.8": recipe(base, f"{sparse} sparsity=0.8", "4e-5", "8e-5"),
        "AdamW, all weights": gradients(base, "first-order", "lr=2e-5 steps=500"),
        "AdamW, LoRA of rank 8": gradients(base, "first-order-lora", "lora_rank=8 lr=5e-4 steps=500"),
    }  # fmt: skip


def aim(arguments: str, *grid: str) -> Row:
    """Return what mezo/reviews trains (the last 2 blocks, short sentences) with another objective; batches of 64, for a metric
    moves by whole rows. Its seconds include what is written for the evaluations, where it is one of text."""
    fixed = ["--config", "mezo/reviews", "batch_size=64", "eval_every=0", *arguments.split()]
    return Row(fixed, 3, grid=grid)


SCORED = ("eps=1e-2 lr=3e-4", "eps=1e-2 lr=1e-3")  # smaller steps move few whole rows
REWARD = f"--reward {SCRIPTS / 'sentiment_reward.py'}:score max_new_tokens=8"
TABLES: dict[str, dict[str, Row]] = {
    "storage": {
        "fp16 / bf16": Row([*MEZO, "noise=gaussian", "storage=fp16", "compute=bf16"], 3),
        "usual loop, bf16": Row([*MEZO, "noise=gaussian"], 1, "reference_loop.py"),
        "fp32 / bf16": Row([*MEZO, "noise=gaussian", "storage=fp32", "compute=bf16"], 3),
        "bf16 / bf16": Row([*MEZO, "noise=gaussian", "storage=bf16", "compute=bf16"], 1),
        "fp16 / bf16, rademacher": Row([*MEZO, "noise=rademacher", "storage=fp16", "compute=bf16"], 1),
    },
    "recipes": recipes(REVIEWS),
    "trec": recipes("--config mezo/trec eval_limit=null"),
    # python scripts/learning_table.py objectives --steps 1500 --tune-steps 300 --device cuda --json objectives.json
    "objectives": {
        "loss": aim("eps=1e-3", "lr=5e-4", "lr=1e-3"),
        "accuracy": aim("objective=accuracy", *SCORED),
        "macro-F1": aim("objective=macro_f1", *SCORED),
        "F1 of what it writes": aim("objective=f1 max_new_tokens=4", *SCORED),
        "a reward": aim(REWARD, *SCORED),
    },
}


def one(name: str, row: Row, seed: int, steps: int, device: str, folder: Path) -> dict[str, Any]:
    """Train once; {name, seed, before, after, seconds, steps, forwards, late} or {name, seed, error}.

    late: mean training loss of the last fifth of the steps."""
    out = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    own = [*row.arguments, f"seed={seed}", f"device={device}"]
    if row.command != "baseline":  # whose rows name their steps: one is a backward pass, too
        own.append(f"steps={steps}")
    script = row.command.endswith(".py")
    if script:
        command = [sys.executable, str(SCRIPTS / row.command), "--json", f"{out}.json", *own]
    else:
        command = [sys.executable, "-m", "zoft", row.command, *own, f"output_dir={out}", "save_model=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{name} seed {seed}: {'done' if done.returncode == 0 else 'failed'}", file=sys.stderr, flush=True)
    if done.returncode:
        return {"name": name, "seed": seed, "error": " ".join(done.stderr.strip().splitlines()[-3:])[-400:]}
    found = json.loads(Path(f"{out}.json" if script else out / "result.json").read_text(encoding="utf-8"))
    numbers = {k: found[k] for k in ("before", "after", "steps")}
    if row.command == "train":
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [m["loss"] for m in map(json.loads, lines) if "loss" in m]
        numbers["late"] = statistics.fmean(losses[-len(losses) // 5 :])
    seconds = found.get("train_seconds", found.get("seconds"))
    about = {"seconds": seconds, "forwards": found.get("forwards"), "command": kept(row.arguments)}
    return {"name": name, "seed": seed, **about, **numbers}


def table(rows: list[dict[str, Any]]) -> str:
    short = [r for r in rows if r["seed"] == TUNE]
    rows = [r for r in rows if r["seed"] != TUNE]
    good = [r for r in rows if "error" not in r]
    shown = [*METRICS, *(m for m in WRITTEN if any(m in r["after"] for r in good))]
    lines = []
    if good:
        cells = [next((f"{r['before'][m]:.3f}" for r in good if m in r["before"]), "") for m in shown]
        lines.append(["untrained", "", "0", *cells, ""])
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in good if r["name"] == name]
        if not mine:
            lines.append([name, "failed", "", next(r["error"] for r in rows if r["name"] == name)])
            continue
        cells = []
        for m in shown:
            values = [r["after"][m] for r in mine if m in r["after"]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        seconds = statistics.mean(r["seconds"] for r in mine)
        lines.append([name, str(len(mine)), str(mine[0]["steps"]), *cells, f"{seconds:.0f}"])
    text = [markdown(["", "seeds", "steps", *shown, "seconds"], lines)]
    if short:
        text += ["", "Chosen by the mean training loss at the end of a short run with another seed:", ""]
        text += [f"- {r['name']}: {r.get('late', r.get('error', '?'))}" for r in short]
    return "\n".join(text)


def run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Every run of the table that `rows` lacks, --jobs at a time, spread over the devices; appended to `rows`.

    A row with a grid first runs --tune-steps of each value with seed TUNE, and goes on with the one of least `late`.
    """
    chosen = {n: r for n, r in TABLES[args.table].items() if not args.only or n in args.only}
    lock = threading.Lock()

    def work(job: tuple[str, Row, int, int], device: str) -> None:
        found = one(*job, device, Path(folder))
        with lock:
            rows.append(found)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def lacking(jobs: list[tuple[str, Row, int, int]]) -> list[tuple[str, Row, int, int]]:
        """Return the rows that `rows` has not; a run of theirs by another command or of another length is dropped."""
        wanted = {(name, seed): (row, steps) for name, row, seed, steps in jobs}
        rows[:] = [
            r for r in rows if (r["name"], r["seed"]) not in wanted or made(r, *wanted[r["name"], r["seed"]])
        ]
        have = {(r["name"], r["seed"]) for r in rows}
        return [job for job in jobs if (job[0], job[2]) not in have]

    with tempfile.TemporaryDirectory() as folder:
        trials = [
            (f"{n}: {g}", replace(r, arguments=[*r.arguments, *g.split()]), TUNE, args.tune_steps)
            for n, r in chosen.items()
            for g in r.grid
        ]
        spread(work, lacking(trials), args.device, args.jobs)
        jobs = []
        for seed in range(args.seeds):
            for name, row in chosen.items():
                if seed < row.seeds:
                    best = [*row.arguments, *(tuned(name, row, rows).split() if row.grid else [])]
                    jobs.append((name, replace(row, arguments=best), seed, args.steps))
        spread(work, lacking(jobs), args.device, args.jobs)


def made(found: dict[str, Any], row: Row, steps: int) -> bool:
    """Say whether a result is of this row's command and of so many steps, which a baseline names itself."""
    same = found.get("command") == kept(row.arguments)
    return "error" not in found and same and (row.command == "baseline" or found["steps"] == steps)


def kept(arguments: list[str]) -> list[str]:
    return [a for a in arguments if a not in COMMON]


def tuned(name: str, row: Row, rows: list[dict[str, Any]]) -> str:
    """The value of a row's grid whose short run ended with the least training loss."""
    late = {r["name"]: r.get("late", math.inf) for r in rows if r["seed"] == TUNE}
    return min(row.grid, key=lambda g: late.get(f"{name}: {g}", math.inf))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tune-steps", type=int, default=750, help="of the short runs that choose")
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
