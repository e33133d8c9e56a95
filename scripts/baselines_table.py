"""The baselines' table: what a model scores without zeroth-order training, per task, mean ± sd over seeds.

    python scripts/baselines_table.py --device cuda:0 --device cuda:1 --jobs 8 --out runs/baselines
    python scripts/baselines_table.py --tasks reviews --methods zero-shot sfc --seeds 1 eval_limit=20

Each is `zoft baseline` in a process of its own; what is finished in --out is not made again, so a stopped table goes on. Then
`zoft report` prints a table for each task. In-context rows get --max-length tokens for their demonstrations. Methods that
draw nothing run once. --runs adds zeroth-order runs of the same task to its table: --runs reviews=runs/mezo.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from spread import spread

TASKS = {
    "reviews": ["--config", "mezo/reviews", "task=reviews"],
    "trec": ["--config", "mezo/trec"],
}
METHODS = ("zero-shot", "icl", "calibrated", "sfc", "linear-probe", "first-order", "first-order-lora")
ONCE = ("zero-shot", "calibrated", "sfc")  # nothing is drawn


def make(task: str, method: str, seed: int, device: str, args: argparse.Namespace) -> bool:
    """One baseline, unless it is there; whether it is there now."""
    folder = Path(args.out) / task / f"{method}-seed{seed}"
    if (folder / "result.json").exists():
        return True
    if folder.exists():  # of a run that was stopped: baselines are not resumed
        folder.rename(folder.with_name(f".{folder.name}-stopped-{len(list(folder.parent.iterdir()))}"))
    words = [
        *TASKS[task],
        "--method",
        method,
        f"seed={seed}",
        f"device={device}",
        f"output_dir={folder}",
    ]
    if method == "icl":
        words += [f"max_length={args.max_length}", "--demos", str(args.demos)]
    if method.startswith("first-order"):
        words += ["save_model=false", *(["--epochs", str(args.epochs)] if args.epochs else [])]
    done = subprocess.run([sys.executable, "-m", "zoft", "baseline", *words, *args.overrides])
    print(f"{task} {method} seed {seed}: {'done' if done.returncode == 0 else 'failed'}", file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/baselines", help="where each baseline's folder is")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", action="append", help="repeatable (auto)")
    parser.add_argument("--jobs", type=int, default=1, help="baselines at a time, over all devices")
    parser.add_argument("--demos", type=int, default=32, help="demonstrations in context")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row with demonstrations")
    parser.add_argument("--epochs", type=float, help="of training with gradients")
    parser.add_argument(
        "--runs", action="append", default=[], metavar="TASK=DIR", help="runs to report beside them"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for `zoft baseline`, for all methods"
    )
    args = parser.parse_intermixed_args()
    beside = [text.partition("=")[::2] for text in args.runs]
    jobs = [
        (task, method, seed)
        for task in args.tasks
        for method in args.methods
        for seed in range(1 if method in ONCE else args.seeds)
    ]
    jobs.sort(key=lambda job: -METHODS.index(job[1]))  # the longest first
    made = spread(lambda job, device: make(*job, device, args), jobs, args.device or ["auto"], args.jobs)
    failed = [job for job, there in zip(jobs, made) if not there]
    for task in args.tasks:
        folders = [str(Path(args.out) / task), *(folder for name, folder in beside if name == task)]
        print(f"\n{task}\n", flush=True)
        subprocess.run([sys.executable, "-m", "zoft", "report", *folders])
    if failed:
        sys.exit(f"failed: {', '.join(' '.join(map(str, job)) for job in failed)}")


if __name__ == "__main__":
    main()
