"""Before a run, while nothing heavy has loaded: what cannot work is refused, and paths and steps of its config are settled."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from zoft.config.schema import GENERATED, Config, lacks_reward
from zoft.errors import UserError
from zoft.folder import ASKED, refuse_unwritable
from zoft.method.configured import again, reward_named
from zoft.method.recipes import is_page
from zoft.parallel.launch import process_place
from zoft.run.tracker import require_tracker

OURS = (
    "config.yaml",
    "ledger",
    "metrics.jsonl",
    "result.json",
    ASKED,
    "env.json",
    "model",
    "adapter",
    "start.safetensors",
    "nodes.safetensors",
    "snapshots",
)

# Names under which files are written before they take their own.
DRAFTS = ("ledger.new", ".config.yaml.new", ".env.json.new", ".result.json.new")

# What a resumed run writes in place, and deletes from.
LINKED = ("ledger", "metrics.jsonl", "snapshots")

# What drivers make in /dev: NVIDIA's, WSL's, Jetson's, AMD's.
DRIVERS = ("nvidiactl", "nvidia0", "dxg", "nvmap", "nvhost-gpu", "kfd")


def first_look(config: Config, resume: str | Path | None, dry_run: bool) -> None:
    """Raise UserError for what can be seen before anything heavy loads."""
    from zoft.data.tasks import check_task
    from zoft.models import load
    from zoft.models.checkpoint import check_adapter
    from zoft.models.load import block_count, find_model

    require_tracker(config.track)
    refuse_missing_devices(config)
    if resume is None and not dry_run:
        claim_folder(Path(str(config.output_dir)))
    for name in LINKED if resume else ():
        path, kind = Path(str(resume)) / name, "folder" if name == "snapshots" else "file"
        if path.is_symlink():
            raise UserError(
                f"{resume}: {name} is a link, which would be written through; put what it leads to in its place"
            )
        if path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise UserError(f"{resume}: {name} is no {kind}; put it away, and resume")
    if resume and (Path(resume) / "ledger").exists():  # damage shows before weights load
        from zoft.ledger.check import refuse_unsound
        from zoft.ledger.log import read_ledger

        refuse_unsound(resume, read_ledger(Path(resume) / "ledger"))
    load.check_model(source := find_model(config.model))
    blocks, last = block_count(source), re.fullmatch(r"last-(\d+)", config.train)
    if blocks and last and int(last[1]) > blocks:
        raise UserError(f"train={config.train}: the model has {blocks} blocks; use last-1 to last-{blocks}")
    if config.adapter:
        check_adapter(config.adapter, Path(config.adapter).expanduser())
    check_task(config.task)


def claim_folder(folder: Path) -> None:
    """Refuse a folder that holds a run, or files that a run would overwrite."""
    refuse_unwritable("output_dir", folder)
    if os.path.lexists(folder / "ledger"):
        raise UserError(
            f"output_dir={folder}: it holds a run; continue it with `zoft train --resume {folder}`, "
            "or choose another name with output_dir=…"
        )
    taken = [name for name in OURS if os.path.lexists(folder / name)]  # a link to nothing is in the way, too
    taken += [name for name in DRAFTS if (folder / name).is_symlink()]
    if taken:
        held = "a baseline" if ASKED in taken else taken[0]
        raise UserError(f"output_dir={folder}: {held} is in the way; choose another name with output_dir=…")


def refuse_missing_devices(config: Config) -> None:
    """Refuse CUDA where no driver has left its file in /dev; whatever is subtler shows once torch is there."""
    if config.device.startswith("cuda") and sys.platform.startswith("linux"):
        if not any(Path("/dev", name).exists() for name in DRIVERS):
            raise UserError(f"device={config.device}: no CUDA devices here; use device=cpu or device=auto")


def refuse_reward(config: Config, resume: str | Path | None, *, must: bool = True) -> None:
    """Refuse a reward that is not there, and to train on one (must) that is not named on the command line."""
    own = (
        resume is not None and config.reward is None and reward_named(resume)
    )  # a task's reward is not a run's own
    if must and (lacks_reward(config) or own):
        if resume:
            raise again(resume)
        raise UserError("objective=reward: name the function: --reward my_reward.py:score")
    if config.reward is not None:
        from zoft.objectives import reward as rewards

        rewards.check_reward(config.reward)


def check_elastic(config: Config) -> None:
    """Raise UserError for what elastic=true cannot have."""
    if process_place()[1] > 1:
        raise UserError(
            "elastic=true: torchrun starts all again where one dies; use `zoft train --nproc N` and `zoft join`"
        )
    if is_page(config.recipe):  # a worker would run whatever page it is told of
        raise UserError(
            f"elastic=true: recipe={config.recipe} is a page of your own; use `zoft train --nproc N`"
        )
    if config.perturb == "inplace":
        raise UserError("elastic=true: perturb=inplace moves weights as it probes; use perturb=probes")
    if config.objective in GENERATED:
        raise UserError(
            f"elastic=true: objective={config.objective} scores texts; use `zoft train --nproc N`"
        )
    if config.denoise_every:
        raise UserError(f"elastic=true: denoise_every={config.denoise_every} rebuilds weights; leave it out")
    if config.probes_per_forward not in ("auto", 1):
        raise UserError(
            f"elastic=true: probes_per_forward={config.probes_per_forward}: a pair is one probe; leave it out"
        )
    if config.parallel != "auto":
        raise UserError(
            f"elastic=true: parallel={config.parallel}: pairs of probe and batch are dealt out; leave it out"
        )
