"""Workers of an elastic run as Ray tasks: the run deals out its evaluations to wherever Ray has room.

zoft train --config mezo/reviews elastic=true q=4 listen=0.0.0.0:29555 output_dir=runs/mine
python scripts/ray_workers.py runs/mine --workers 4 --gpus 1 --host $(hostname)

Each task is `zoft join`: it loads the base, replays the ledger and evaluates (probe, batch) pairs until the run ends. Ray starts
a task again whose node has died; the run goes on meanwhile. The run's model and data must be found on every node.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path


def work(invitation: str) -> str:
    """One worker, from the text of a run's join.json; returns the line that it ends with."""
    from zoft.cli import join
    from zoft.parallel import messages
    from zoft.signals import Stopped

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / messages.JOIN
        path.write_text(invitation, encoding="utf-8")
        path.chmod(0o600)
        try:
            return join.join_run(json.loads(invitation)["address"], str(path), trust_remote_code=False)
        except Stopped as stopped:
            return str(stopped)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run that goes on, with elastic=true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="that Ray reserves for each")
    parser.add_argument("--gpus", type=float, default=0, help="that Ray reserves for each")
    parser.add_argument("--host", help="the coordinator's, as other nodes see it; default: where it listens")
    args = parser.parse_args(argv)
    try:
        import ray
    except ImportError:
        sys.exit("ray is not installed: pip install ray")
    path = Path(args.run) / "join.json"
    if not path.exists():
        sys.exit(f"{path}: not there; a run with elastic=true writes it while it goes on")
    found = json.loads(path.read_text(encoding="utf-8"))
    if args.host:
        found["address"] = f"{args.host}:{found['address'].rpartition(':')[2]}"
    ray.init(ignore_reinit_error=True)
    task = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=-1)(work)
    for line in ray.get([task.remote(json.dumps(found)) for _ in range(args.workers)]):
        print(line)


if __name__ == "__main__":
    main()
