"""Compare lr=auto with a grid of fixed learning rates, per recipe and task, over seeds; print a Markdown table.

    python scripts/measure_lr.py --steps 600 --seeds 0,1,2 --factors 0.25,1,4 device=cuda
    python scripts/measure_lr.py --configs mezo/reviews --steps 150 --seeds 0 threads=1

The grid is each config's own lr times the factors. All runs of a call share one process. `key=value` goes to all of them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from zoft.method.configured import compose
from zoft.run.start import train_run

CONFIGS = "mezo/reviews,mezo/trec,lora_zo/reviews,qzo/reviews"
METRICS = ("accuracy", "auc", "calibrated_accuracy", "macro_f1", "loss")


def one(config: str, words: list[str], lr: str, seed: int, folder: Path) -> dict:
    """Run a config once; return its metrics after training, and the lr it took."""
    place = folder / f"{config.replace('/', '-')}-{lr}-{seed}"
    given = [*words, f"lr={lr}", f"seed={seed}", f"output_dir={place}", "save_model=false", "eval_every=0"]
    if not (place / "result.json").exists():
        train_run(compose(config, given))
    result = json.loads((place / "result.json").read_text())
    header = compose(str(place / "config.yaml"), [f"output_dir={place}"])
    return {**result["after"], "lr": header.lr}


def shown(values: list[float]) -> str:
    """Return mean ± sd."""
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--factors", default="0.25,0.5,1,2,4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--folder", help="where runs stay, so that a second call goes on")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="measure-lr-"))
    words = [f"steps={args.steps}", *args.words]
    print(f"| config | lr | {' | '.join(METRICS)} |\n|{' --- |' * (2 + len(METRICS))}")
    for config in args.configs.split(","):
        own = compose(config, words).lr
        for lr in [*(f"{own * float(f):.4g}" for f in args.factors.split(",")), "auto"]:
            runs = [one(config, words, lr, int(seed), folder) for seed in args.seeds.split(",")]
            took = f"auto: {shown([r['lr'] for r in runs])}" if lr == "auto" else lr
            cells = [shown([r[m] for r in runs]) if m in runs[0] else "" for m in METRICS]
            print(f"| {config} | {took} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
