"""Base + ledger -> the run's model, all of it in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoft.config.schema import ADAPTERS, Config
from zoft.errors import UserError
from zoft.ledger.log import Log
from zoft.method.recipes import method_of
from zoft.models.adapters.kept_in_place import adapter_folder
from zoft.probe.nodes import NodeAxis
from zoft.replay import tensors
from zoft.replay.saved_model import save_run_model
from zoft.replay.snapshot import load_snapshot, newest_snapshot
from zoft.replay.tensors import denoise, replay_tensors, requested, result_and_facts
from zoft.train import parts
from zoft.train.assemble import assemble, assemble_again
from zoft.train.build import build_trainer_of
from zoft.train.header import agree
from zoft.train.node_axis import FILE as CALIBRATION
from zoft.train.parts import resolve_device, said_before, trainer_settings
from zoft.train.trainer import Trainer


def replay_run(config: Config, folder: Path, out: Path, ask: tensors.Ask) -> int:
    """Write the model of the run in `folder`, or its adapter, to `out`; returns the number of its steps.

    Tensor by tensor; in memory where few numbers are trained beside a frozen or quantised model.
    """
    beside = config.train in ADAPTERS or adapter_folder(config) is not None
    if not (beside or config.perturb == "nodes" or method_of(config.recipe).space.quantised):
        return replay_tensors(config, folder, out, ask)
    config, log = requested(resolve_device(config), folder, ask)
    model, tokenizer, config = live(config, folder, log)
    result, facts = result_and_facts(config, folder, log, ask)
    save_run_model(config, model, tokenizer, out, result, **facts)
    return len(log.records)


def live(config: Config, folder: Path, log: Log) -> tuple[Any, Any, Config]:
    """Return (the model as the run has it after the log's steps, its tokenizer, the config): all of it in memory.

    config, log: from tensors.requested. Raises UserError for another base.
    """
    if config.perturb == "nodes":
        return repeated(config, folder, log)
    again = assemble_again(config, folder, log.header)
    trainer = Trainer(again.model, again.axis, lambda step: [], None, trainer_settings(again.config))
    catch_up(trainer, folder, again.config, log, parts.say)
    return again.model, again.tokenizer, again.config


def repeated(config: Config, folder: Path, log: Log) -> tuple[Any, Any, Config]:
    """Rebuild a run of node perturbation by its update passes, on its own data; returns what `live` does.

    config, log: as in `live`. The weights follow from the ledger and the data together: the same bits on one kind of machine
    under the run's plan. Raises UserError where the data, the measurements of its layers or the plan are others.
    """
    plan = log.header["plan"]
    if config.device.partition(":")[0] != plan["device"].partition(":")[0]:
        raise UserError(
            f"{folder}: it ran on {plan['device']}, and its replay repeats forwards, which round otherwise on {config.device}: "
            f"use --device {plan['device']}"
        )
    if not (folder / CALIBRATION).exists():
        raise UserError(f"{folder}: {CALIBRATION} is missing, which its update passes read: put it back")
    config = replace(config, threads=plan["threads"], cache_frozen=plan["cache_frozen"])
    with said_before():
        made = assemble(config, folder)
    agree(log.header, made.header, folder)
    assert isinstance(made.axis, NodeAxis), type(made.axis)
    trainer = build_trainer_of(made.config, made.model, made.axis, made.scored, None, made.objective)
    catch_up(trainer, folder, made.config, log, parts.say)
    if prefix := made.model.__dict__.get("keeps_rows"):
        prefix.remove()
    made.axis.release()
    return made.model, made.tokenizer, made.config


def catch_up(trainer: Trainer, folder: Path, config: Config, log: Log, say: Callable[[str], Any]) -> None:
    """Bring the weights to the log's last step: the newest sound snapshot, then what came after it."""
    records = log.records
    found = newest_snapshot(folder, log.header, log.events, say=say)
    if found:
        step, path = found
        say(f"starting from the snapshot at step {step}")
        load_snapshot(path, trainer.axis.trained, step)
        trainer.skip_to(step, records)
    if trainer.next < len(records):
        say(f"replaying {len(records) - trainer.next} of {config.steps} steps from the ledger")
    # The last denoising makes all earlier roundings void.
    denoised = max((e.step for e in log.events if e.kind == "denoise"), default=0)
    if trainer.next < denoised:
        trained = trainer.axis.trained
        if not config.momentum:  # with it, only these steps give the buffers
            for t in trained:
                t.step = denoised if t.stored.element_size() == 2 else t.step
        trainer.replay(records[trainer.next : denoised])
        say(denoise(folder, config, log, denoised, trained))
    trainer.replay(records[trainer.next :])
