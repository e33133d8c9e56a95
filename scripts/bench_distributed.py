"""Training steps of one process and of several on one host: steps a second, what travels, and whether weights agree.

A cell is model:how:BxT: how is data (each process has B examples, the batch is B times as many) or probes (the batch is
B, each process has its share of the 2q probes). One process runs every cell, then N processes run them again.

python scripts/bench_distributed.py --json out.json
python scripts/bench_distributed.py --cell opt-1.3b:data:16x256 --cell opt-6.7b:probes:16x256 --nproc 2
python scripts/bench_distributed.py --cell tiny:data:4x16 --cell tiny:probes:4x16 --device cpu --steps 3
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_parts as parts
import torch
from bench_models import MODELS, build

from zoft.config.schema import Config, Task
from zoft.env import environment
from zoft.ledger.log import Ledger
from zoft.method.space import DTYPES
from zoft.parallel import world as distributed
from zoft.train import build as setup_trainer
from zoft.train import header
from zoft.train import parts as setup

CELLS = ["opt-1.3b:data:16x256", "opt-6.7b:probes:16x256"]


def cell(args: argparse.Namespace, name: str, how: str, batch: int, tokens: int) -> dict[str, Any]:
    """Steps of one cell in this process, beside the others if there are some."""
    world = distributed.this_world()
    whole = batch * world.size if how == "data" else batch
    config = Config(
        model="random", task=Task(name="random"), lr=1e-7, eps=1e-3, q=args.q, steps=1 << 20, batch_size=whole,
        device=args.device, parallel=how, threads=1 if args.device == "cpu" else "auto",
    )  # fmt: skip
    world.parts, world.shards = distributed.probe_grid(config, world.size) if world.size > 1 else (1, 1)
    world.sent = 0
    with tempfile.TemporaryDirectory() as folder:
        config = setup.resolve_device(config)
        model = build(name, config.device, DTYPES[args.dtype])
        rows = parts.random_rows(model, 8 * whole, tokens, padded=False)
        config, trained, axis = parts.resolved(config, model, rows)
        with Ledger.create(
            Path(folder) / "ledger", header.header_of(config, "random weights", trained)
        ) as ledger:
            trainer = setup_trainer.build_trainer_of(config, model, axis, rows, ledger)
            # Of as many steps on every process, however fast each is.
            found = parts.timed(trainer, ledger, args.device, 1e9, args.steps)
            fingerprints = world.all_gather(distributed.weights_digest(trained))
            ledgers = world.all_gather(list(ledger.records[-1].losses))
            found |= {
                "batch": whole,
                "all_steps": len(ledger.records),
                "fingerprints": fingerprints,
                "agree": len(set(fingerprints)) == 1 and all(x == ledgers[0] for x in ledgers),
                "wire_bytes_per_step": world.sent / len(ledger.records),
                "captured": not getattr(trainer, "capture", "eager"),
                "probes_per_forward": config.probes_per_forward,
                "storage": config.storage,
                "tokens_per_s": whole * tokens * 1e3 / found["ms"],
                "losses": ledgers[0],
            }
    model = rows = trained = axis = trainer = None  # noqa: F841
    parts.release(args.device)
    return found


def worker(args: argparse.Namespace) -> None:
    """All cells, one after the other, in this process; rank 0 writes what it finds."""
    config = Config(model="random", task=Task(name="random"), device=args.device, batch_size=1 << 10)
    with distributed.joined_processes(config, args.worker) as world:
        for i, (name, how, batch, tokens) in enumerate(args.cell):
            began = time.perf_counter()
            found = cell(args, name, how, batch, tokens)
            if world.rank == 0:
                Path(f"{args.worker}.{i}").write_text(json.dumps(found), encoding="utf-8")
            print(
                f"{world.size} × {name}:{how}: {found['ms']:.2f} ms a step, {time.perf_counter() - began:.0f} s in all",
                file=sys.stderr,
                flush=True,
            )


def processes(args: argparse.Namespace, size: int, argv: list[str], place: Path) -> list[dict[str, Any]]:
    """The cells as that many processes see them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = place / f"of-{size}"
    command = [sys.executable, __file__, *argv, "--worker", str(out)]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(size)}
    if sys.platform.startswith("linux"):
        common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    started = [
        subprocess.Popen(
            command, env={**common, "WORLD_SIZE": str(size), "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(size)
    ]
    while any(p.poll() is None for p in started):
        if any(p.returncode for p in started):
            for p in started:
                p.terminate()
        time.sleep(0.1)
    found = []
    for i in range(len(args.cell)):
        path = Path(f"{out}.{i}")
        error = {"error": f"exit codes {[p.returncode for p in started]}"}
        found.append(json.loads(path.read_text()) if path.exists() else error)
    return found


def table(rows: list[dict[str, Any]], size: int) -> str:
    """Markdown, a line a cell."""
    head = ["model, share, batch × tokens", "1 process, ms", f"{size} processes, ms", "batch of 1, of all", "steps/s ×",
            "tokens/s ×", "bytes sent a step a process", "weights equal after", "fingerprint"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        one, many = r["one"], r["many"]
        title = f"{r['model']} {r['how']} {r['batch']}×{r['tokens']}"
        if "error" in one or "error" in many:
            cells = [one.get("error", ""), many.get("error", ""), *[""] * (len(head) - 3)]
        else:
            equal = f"{many['all_steps']} steps" if many["agree"] else "NO"
            cells = [f"{one['ms']:.2f}", f"{many['ms']:.2f}", f"{one['batch']}, {many['batch']}",
                     f"{one['ms'] / many['ms']:.2f}", f"{many['tokens_per_s'] / one['tokens_per_s']:.2f}",
                     f"{many['wire_bytes_per_step']:g}", equal, ", ".join(dict.fromkeys(many["fingerprints"]))]  # fmt: skip
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def cell_of(text: str) -> tuple[str, str, int, int]:
    name, _, rest = text.partition(":")
    how, _, shape = rest.partition(":")
    batch, x, tokens = shape.partition("x")
    if (
        name not in MODELS
        or how not in ("data", "probes")
        or not (x and batch.isdigit() and tokens.isdigit())
    ):
        raise argparse.ArgumentTypeError(
            f"{text}: give MODEL:data:BxT or MODEL:probes:BxT, MODEL of {', '.join(MODELS)}"
        )
    return name, how, int(batch), int(tokens)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", action="append", type=cell_of, metavar="MODEL:HOW:BxT", help="repeatable")
    parser.add_argument("--nproc", type=int, default=2, help="processes, a GPU each")
    parser.add_argument("--q", type=int, default=1, help="directions a step")
    parser.add_argument("--steps", type=int, default=75, help="timed steps of a cell; 27 more are not timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.cell = args.cell or [cell_of(c) for c in CELLS]
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device.startswith("cuda") else "fp32"
    if args.worker:
        return worker(args)
    with tempfile.TemporaryDirectory() as folder:
        one = processes(args, 1, argv, Path(folder))
        many = processes(args, args.nproc, argv, Path(folder))
    keys = ("model", "how", "batch", "tokens")
    rows: list[dict[str, Any]] = [
        dict(zip(keys, c)) | {"one": a, "many": b} for c, a, b in zip(args.cell, one, many)
    ]
    found = {
        "command": shlex.join(["python", "scripts/bench_distributed.py", *argv]),
        "environment": environment(),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(found | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"`{found['command']}`\n\n{table(rows, args.nproc)}")


if __name__ == "__main__":
    main()
