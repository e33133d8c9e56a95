"""Kill training runs at random moments, resume them, and compare what they end with, bit for bit.

    python scripts/kill_runs.py
    python scripts/kill_runs.py --kills 5 --variants fp16-momentum-gaussian --seed 3

Each run is a process of its own (forked with the libraries loaded, so that a kill meets training and not imports)
that trains a tiny model with a real ledger, snapshots and evaluations, and gets SIGKILL: one before its first
record, one after its last, the others at random moments between. It is resumed once, in another process, and must
end with the ledger, weights and metrics of a run that nobody touched. Prints a line a variant; exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = 150
VARIANTS = {
    f"{storage}-{'momentum' if beta else 'plain'}-{noise}": [f"storage={storage}", f"momentum={beta}", f"noise={noise}"]
    for storage, beta, noise in product(("fp32", "fp16"), (0.0, 0.9), ("gaussian", "rademacher"))
} | {
    "rank1": ["storage=fp16", "noise=rank1"],
    "example-gaussian": ["storage=fp16", "directions=example", "q=2"],
    "example-rank1": ["noise=rank1", "directions=example", "momentum=0.9"],
    "conservative": ["update=conservative", "storage=fp16", "weight_decay=0"],
    "reweighted": ["update=momentum", "momentum=0.9", "noise=rademacher", "storage=fp16"],
    "blocks": ["blocks=random", "momentum=0.9", "storage=fp16"],
    "mask-every": ["recipe=sparse_mezo", "mask=random", "mask_every=3", "storage=fp16"],
    "anchor": ["anchor=0.5", "update=adam", "lr=0.001", "storage=fp16"],
}  # fmt: skip
TASK = {
    "name": "local",
    "train": "data.jsonl",
    "prompt": "{text} ",
    "label": "label",
    "choices": {"a": "a", "b": "b"},
}
CONFIG = {
    "model": "tiny", "task": TASK, "steps": STEPS, "batch_size": 4, "lr": 0.01, "max_length": 32, "threads": 1,
    "device": "cpu", "eval_every": 50, "snapshot_every": 40, "weight_decay": 0.01,
}  # fmt: skip


def main() -> int:
    """Parse the arguments, run the variants; the exit code."""
    about = (__doc__ or "").strip()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills a variant (default 20, at least 2)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
                        help=f"which of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="work here and leave it (default: a temporary folder)")
    args = parser.parse_args()
    if args.kills < 2:
        parser.error("--kills: at least 2, before the first record and after the last")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="zoft-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.chdir(folder)
        prepare()
        rng, same = random.Random(args.seed), 0
        for name in args.variants:
            found = variant(name, args.kills, rng)
            same += found == args.kills
        print(
            f"{same} of {len(args.variants)} variants: every run ends with the bits of the one that nobody touched"
        )
        return int(same < len(args.variants))
    finally:
        os.chdir(ROOT)
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """A model of a few thousand weights in bf16, its tokenizer and 60 examples, in the current folder."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    words = ["<pad>", "<eos>", *" abdno0123456789"]
    config = hf.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    hf.utils.logging.disable_progress_bar()
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained("tiny")
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        "tiny"
    )
    rows = [{"text": "bad no " * (i % 3) + str(i), "label": "ab"[i % 2]} for i in range(60)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("mine.yaml").write_text(json.dumps(CONFIG))


def variant(name: str, kills: int, rng: random.Random) -> int:
    """Return how many of `kills` killed and resumed runs end as the one that nobody touched."""
    keys, whole = VARIANTS[name], Path(name) / "whole"
    assert ended(forked("--config", "mine.yaml", f"output_dir={whole}", *keys)) == 0, "the run itself fails"
    same, records = 0, []
    for i in range(kills):
        run = Path(name) / f"killed-{i}"
        # Anywhere between two records, in a snapshot, in an evaluation: so many records, and a moment more.
        target, later = rng.randrange(1, STEPS), rng.uniform(0, 0.05)
        pid = forked("--config", "mine.yaml", f"output_dir={run}", *keys)
        if i == 0:
            wait(lambda run=run: (run / "config.yaml").exists())  # its ledger is being made
        else:
            wait(lambda run=run, n=STEPS if i == 1 else target: steps_of(run) >= n)
            time.sleep(0 if i == 1 else later)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        records.append(steps_of(run))
        # A run that was killed before it had a folder is begun again; there is nothing to resume.
        again = (
            ("--resume", str(run))
            if (run / "config.yaml").exists()
            else ("--config", "mine.yaml", f"output_dir={run}", *keys)
        )
        code = ended(forked(*again))
        fault = f"exit code {code}" if code else differs(run, whole)
        same += not fault
        if fault:
            print(f"{name}: killed at {records[-1]} steps: {fault}")
    print(
        f"{name}: {same} of {kills} the same; killed after {', '.join(map(str, records))} of {STEPS} steps",
        flush=True,
    )
    return same


def forked(*args: str) -> int:
    """Start `zoft train` with these arguments in a process of its own; its id."""
    import zoft.evaluation.evaluate  # noqa: F401
    import zoft.replay.live  # noqa: F401
    import zoft.train.build  # noqa: F401 - and with these all that training imports
    from zoft.cli.main import app

    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 70
    try:
        app(["train", *args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait(until: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.001)


def steps_of(run: Path) -> int:
    """Whole steps in a run's ledger, which may be under way."""
    from zoft.ledger import log as ledger

    return len(ledger.read_ledger(run / "ledger").records) if (run / "ledger").exists() else 0


def differs(run: Path, whole: Path) -> str:
    """Return what differs between two finished runs; "" where nothing does."""
    for name in ("ledger", "model/model.safetensors"):
        if not (run / name).exists():
            return f"no {name}"
        if (run / name).read_bytes() != (whole / name).read_bytes():
            return f"another {name}"
    rows = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, whole)]
    if [(r["step"], r.get("eval")) for r in rows[0]] != [(r["step"], r.get("eval")) for r in rows[1]]:
        return "other lines in metrics.jsonl"
    return ""


if __name__ == "__main__":
    sys.exit(main())
