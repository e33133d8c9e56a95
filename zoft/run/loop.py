"""Run the loop around the trainer: what is due on the way, and a run's end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.compose import to_yaml
from zoft.console import logged, peak_memory_gb
from zoft.folder import write
from zoft.method.estimators.named import forwards_per_step
from zoft.replay.saved_model import folder_name, save_run_model
from zoft.run.guards import Watch, bias_alone, watch_cores
from zoft.run.session import Presence, Session, steps_of
from zoft.run.stops import due_at, next_stop
from zoft.train.resolve import as_begun, with_group

if TYPE_CHECKING:
    from zoft.train.trainer import Trainer


def fit(
    trainer: Trainer, s: Session, evaluate: Callable[[], dict[str, Any]], dev: Callable[[], dict[str, Any]] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Catch up with the ledger, train to the end with whatever is due on the way, and return the result.

    evaluate() -> metrics of the weights as they are; dev() -> those on the dev set, where there is one.
    `before` is the base's, kept by metrics.jsonl on resume.
    """
    from zoft.ledger.log import Event, Log
    from zoft.parallel.world import this_world
    from zoft.replay.live import catch_up
    from zoft.replay.snapshot import take_snapshot
    from zoft.replay.tensors import denoise
    from zoft.run.selection import (
        best_step,
        check_metric,
        has_test_metrics,
        look_back,
        prune_snapshots,
        score_step,
        selection_note,
        stops_early,
    )
    from zoft.signals import Stopped

    config, t, world = s.config, s.tracker, this_world()
    known, past = world.broadcast(lambda: before(s.folder))
    evals: dict[int, dict[str, Any]] = dict(known)

    def scored(step: int) -> dict[str, Any]:
        return world.broadcast(
            lambda: score_step(config, evals, step, evaluate, dev)
        )  # by rank 0; the others wait

    if 0 not in evals:
        evals[0] = scored(0)
        t.evaluation(0, evals[0])
    if line := selection_note(config, evals):
        t.note(line)
    check_metric(config, evals[0])
    log = Log(s.ledger.header, s.ledger.records, s.ledger.events)  # the ledger's own lists: they grow
    catch_up(trainer, s.folder, config, log, t.note)
    if world.rank == 0:  # a kill may have come between a snapshot and the removal of an older one
        prune_snapshots(s.folder, config, s.ledger.events, evals)
    watch = Watch(config, trainer.axis.trained, steps_of(s.ledger, config))
    cores = watch_cores(config, world.size)
    folder = Presence(s.ledger, {"config.yaml": to_yaml(config)})

    def on_step(metrics: dict[str, Any]) -> None:
        seconds = past + time.monotonic() - began - paused
        lines = watch.see(metrics) + cores.step()
        t.step(metrics.pop("step"), **metrics, seconds=round(seconds, 3))
        for line in lines:
            t.note(line)
        if world.rank == 0:
            folder.look()
        if trainer.settings.probes_per_forward != s.config.probes_per_forward:  # a batch could not be stacked
            s.config = with_group(s.config, trainer.settings.probes_per_forward)
            if world.rank == 0:  # on resume, too, for the same bits
                write(s.folder / "config.yaml", to_yaml(as_begun(s.config, s.folder)))
        if world.size == 1:  # else all stop after the same step, by trainer.halted
            s.stop.check()

    def at_stop(step: int) -> None:
        s.ledger.sync()  # nothing durable is ever ahead of the ledger
        noted = {e.kind for e in s.ledger.events if e.step == step}  # a run that stopped here has done these
        for what in due_at(config, step):
            if what == "denoise" and what not in noted:
                s.ledger.note(Event("denoise", step))  # first, as with steps: from here on it is a fact
                t.note(denoise(s.folder, config, log, step, trainer.axis.trained))
            elif what == "eval" and step not in evals:
                evals[step] = scored(step)
                t.evaluation(step, evals[step])
            elif what == "snapshot" and what not in noted and world.rank:
                s.ledger.note(Event("snapshot", step))
            elif what == "snapshot" and what not in noted:
                t.note(take_snapshot(s.folder, s.ledger, trainer.axis.trained))
                prune_snapshots(s.folder, config, s.ledger.events, evals)
        if {"snapshot", "denoise"} & {*due_at(config, step)}:
            world.broadcast(lambda: None)  # however long it takes: a wait for losses has an end

    world.check(trainer.next, trainer.axis.trained)
    at_stop(trainer.next)
    began, paused = time.monotonic(), 0.0
    cores.paused()
    while trainer.next < config.steps and not stops_early(config, evals):
        with s.stop.finishing():
            trainer.run(on_step, until=next_stop(config, trainer.next, world.size))
        if trainer.halted:
            raise Stopped(0, str(s.folder))
        pause = time.monotonic()
        if trainer.next == config.steps or (config.check_every and not trainer.next % config.check_every):
            world.check(trainer.next, trainer.axis.trained)
        if due_at(config, trainer.next):
            at_stop(trainer.next)
        paused += time.monotonic() - pause
        t.paused()
        cores.paused()
    trainer.end()
    seconds = past + time.monotonic() - began - paused
    several: dict[str, Any] = {"processes": world.size, "wire_bytes": world.sent} if world.size > 1 else {}
    last = trainer.next
    if not has_test_metrics(evals[last]):  # an early end, judged on the dev set so far
        evals[last] = {**world.broadcast(evaluate), **evals[last]}
        t.evaluation(last, evals[last])
    chosen = best_step(config, evals) if config.save_best else last
    if not has_test_metrics(evals[chosen]):
        back = world.broadcast(lambda: look_back(config, s.folder, chosen, trainer.axis.trained, evaluate))
        evals[chosen] = {**back, **evals[chosen]}
    if last < config.steps:
        several["stopped_early"] = True
        t.note(
            f"early_stop={config.early_stop}: nothing better than at step {best_step(config, evals)}; stopped"
        )
    if said := bias_alone(evals[0], evals[chosen]):
        t.note(said)
    if config.save_best:
        several |= {"best_step": chosen, "last": evals[last]}
    return {
        **several,
        "steps": last,
        "skipped": sum(r.skipped for r in s.ledger.records),
        "forwards": last * forwards_per_step(config)
        + getattr(trainer.axis, "forwards", 0)
        + s.ledger.header.get("lr_auto", {}).get("forwards", 0),
        "train_seconds": round(seconds, 3),
        "peak_memory_gb": round(peak_memory_gb(config.device), 2),
        "before": evals[0],
        "after": evals[chosen],
    }


def before(folder: Path) -> tuple[list[tuple[int, dict[str, Any]]], float]:
    """Read from a run's metrics.jsonl its evaluations with their steps, and the seconds that training took so far."""
    seen = logged(folder / "metrics.jsonl")
    past = next((row["seconds"] for row in reversed(seen) if "seconds" in row), 0.0)
    return [(row["step"], row["eval"]) for row in seen if "eval" in row], past


def finish(s: Session, model: Any, tokenizer: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Save the model and, last of all, result.json: its presence says that the run is complete. Rank 0 alone does."""
    from zoft.parallel.world import this_world

    if this_world().rank:
        return result
    Presence(s.ledger, {"config.yaml": to_yaml(s.config)}).look(now=True)
    if s.config.save_model:
        out, best = s.folder / folder_name(s.config), result.get("best_step", s.config.steps)
        if best == s.config.steps:
            save_run_model(s.config, model, tokenizer, out, result)
        else:
            from zoft.run.selection import save_step

            s.ledger.sync()
            save_step(s.config, s.folder, out, best)
    result = {**result, "output_dir": str(s.folder)}
    write(s.folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result
