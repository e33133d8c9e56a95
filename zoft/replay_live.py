"""Base + ledger -> the run's model, all of it in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoft import adapters, replay, results, setup, setup_axis, snapshot, space
from zoft.config import Config
from zoft.headers import agree
from zoft.ledger import Log
from zoft.trainer import Trainer

Rebuild = Callable[[Config, Path, Log], tuple[Any, Any, Config]]  # what a recipe's `rebuild` is


def in_memory(config: Config, folder: Path, out: Path, ask: replay.Ask, rebuild: Rebuild) -> int:
    """As replay.replay, for a recipe that trains few numbers beside a frozen model, all of which is loaded."""
    config, log = replay.asked(setup.device(config), folder, ask)
    model, tokenizer, config = rebuild(config, folder, log)
    result, facts = replay.told(config, folder, log, ask)
    results.save(config, model, tokenizer, out, result, **facts)
    return len(log.records)


def live(config: Config, folder: Path, log: Log) -> tuple[Any, Any, Config]:
    """(the model as the run has it after the log's steps, its tokenizer, the config): all of it in memory.

    config, log: from replay.asked. Raises UserError for another base.
    """
    model, tokenizer, found = setup.model(config, folder)
    agree(log.header, {"base": found}, folder)
    config, trained, axis = setup_axis.placed(config, model, space.adopt(model, list(log.header["trained"])))
    if "adapter" in log.header and config.storage == log.header["storage"]:
        agree(log.header, {"adapter": adapters.fingerprint(trained)}, folder)
    trainer = Trainer(model, axis, lambda step: [], None, setup.settings(config))
    catch_up(trainer, folder, config, log, setup.say)
    return model, tokenizer, config


def catch_up(trainer: Trainer, folder: Path, config: Config, log: Log, say: Callable[[str], Any]) -> None:
    """Bring the weights to the log's last step: the newest sound snapshot, then what came after it."""
    records = log.records
    found = snapshot.newest(folder, log.header, log.events, say=say)
    if found:
        step, path = found
        say(f"starting from the snapshot at step {step}")
        snapshot.load(path, trainer.axis.trained, step)
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
        say(replay.denoise(folder, config, log, denoised, trained))
    trainer.replay(records[trainer.next :])
