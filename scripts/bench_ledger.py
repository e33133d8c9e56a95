"""Time the ledger: appending a step under each `sync`, reading a long run back, taking and checking a snapshot.

    python scripts/bench_ledger.py --folder runs

Prints a table. The folder decides what is measured: its disk is what syncing waits for. Nothing is left in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zoft.ledger import log
from zoft.ledger.log import Ledger, Record
from zoft.replay import snapshot

STEPS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("."), help="where a run would be (default: here)")
    parser.add_argument("--synced", type=int, default=1000, help="steps to append under sync=step")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the snapshot")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        print(f"{filesystem(folder)}, {platform.processor() or platform.machine()}\n")
        print("| what | cost |\n|---|---|")
        for policy, steps in (("end", STEPS), (1, STEPS), ("step", args.synced)):
            ms = sorted(appends(folder / f"ledger-{policy}", policy, steps))
            mean, worst = sum(ms) / len(ms), ms[-1 - len(ms) // 100]
            print(f"| a step, `sync={policy}` | {mean:.3f} ms, 99 % below {worst:.3f} ms |", flush=True)
        path = folder / "ledger-end"
        print(f"| {STEPS:,} steps of one direction | {path.stat().st_size / 1e3:.0f} kB |")
        print(f"| reading and checking them | {seconds(lambda: log.read_ledger(path)):.2f} s |")
        tensors = {
            f"w{i}": torch.randn(1 << 22, generator=torch.manual_seed(i)) for i in range(args.megabytes >> 4)
        }
        file = folder / "x.safetensors"
        taken = seconds(lambda: snapshot.write_tensors(file, tensors, {}))
        checked = seconds(lambda: snapshot.digest_of(file))
        size = file.stat().st_size / 1e9
        print(
            f"| a snapshot of {size:.2f} GB: written, hashed, on the disk | {taken:.2f} s, {size / taken:.2f} GB/s |"
        )
        print(f"| checking it | {checked:.2f} s, {size / checked:.2f} GB/s |")


def appends(path: Path, policy: int | str, steps: int) -> list[float]:
    """Milliseconds of each append."""
    took = []
    with Ledger.create(path, {"seed": 0}, sync=policy) as opened:
        for i in range(steps):
            record = Record(i, (0.5,), 1.0, (1.0, 2.0))
            began = time.perf_counter()
            opened.append(record)
            took.append(1e3 * (time.perf_counter() - began))
    return took


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def filesystem(folder: Path) -> str:
    """Type and device of the file system that a folder is on."""
    where = folder.resolve()
    best = ("", "unknown file system")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        device, point, kind = line.split()[:3]
        if os.path.commonpath([where, point]) == point and len(point) >= len(best[0]):
            best = (point, f"{kind} on {device}")
    return best[1]


if __name__ == "__main__":
    main()
