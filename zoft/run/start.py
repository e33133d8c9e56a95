"""Start a run: what is refused before anything loads, the parts of the run, and its loop from there."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.schema import Config
from zoft.env import untested
from zoft.errors import UserError, writing
from zoft.folder import ASKED, alone
from zoft.parallel.launch import process_place
from zoft.replay.saved_model import read_result, saved_faults
from zoft.run.guards import explain_memory
from zoft.run.preflight import (
    check_elastic,
    claim_folder,
    first_look,
    refuse_reward,
)
from zoft.signals import listening
from zoft.train.resolve import settled

if TYPE_CHECKING:
    from zoft.data.example import Example


def train_run(config: Config, *, resume: str | Path | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Run a config's recipe: a new run in config.output_dir, or the rest of the run in `resume`.

    Returns result.json's content. Raises UserError before anything heavy where a mistake shows early.
    """
    if resume and (Path(resume) / "result.json").exists():
        found = read_result(Path(resume))
        if wrong := saved_faults(Path(resume), config):
            print(f"{resume}: this run is finished, but {wrong}: it is written again", file=sys.stderr)
            with writing(Path(resume) / "result.json"):
                (Path(resume) / "result.json").unlink()
            return train_run(config, resume=resume, dry_run=dry_run)
        print(f"{resume}: this run is finished; its result follows", file=sys.stderr)
        return found
    if resume and (Path(resume) / ASKED).exists():
        raise UserError(
            f"{resume}: a baseline, which is not resumed; delete it and start `zoft baseline` again"
        )
    refuse_reward(config, resume)
    folder = str(resume or config.output_dir)
    if config.elastic:
        check_elastic(config)
    elif config.listen != "127.0.0.1:0":
        raise UserError(f"listen={config.listen}: is for elastic=true; leave it out")
    writes = process_place()[0] == 0  # of several processes, one does
    if writes and resume is None and not dry_run:
        claim_folder(Path(folder))
    mine = alone(Path(folder), resume is None) if writes and not dry_run else nullcontext()
    # A signal that comes while things load says "resume me", too.
    with listening(folder), explain_memory(config), mine:
        if writes:
            first_look(config, resume, dry_run)
            if line := untested():
                print(line, file=sys.stderr)
        from zoft.parallel.world import joined_processes

        with joined_processes(config, folder):
            return _trained(settled(config, resume), resume, dry_run)


def _trained(config: Config, resume: str | Path | None, dry_run: bool) -> dict[str, Any]:
    """Assemble a run and train it to its end; returns result.json's content, or the plan of a dry run."""
    from zoft.data.tasks import subset
    from zoft.evaluation.evaluate import evaluate
    from zoft.objectives.text import writer
    from zoft.run.loop import finish, fit
    from zoft.run.session import session
    from zoft.train.assemble import assemble
    from zoft.train.build import build_trainer, plan_run
    from zoft.train.header import keep_prefix_start
    from zoft.train.node_axis import keep_calibration

    parts = assemble(config, resume)
    config, objective, axis = parts.config, parts.objective, parts.axis
    if dry_run:
        return plan_run(parts)
    write = None if objective.texts else writer(config, parts.model, parts.tokenizer, axis.clean)

    def score(examples: list[Example], rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = evaluate(parts.model, examples, parts.train, context=axis.clean, write=write)
        return {**found, **objective.evaluate(parts.model, axis.clean, rows)}

    data, dev = parts.data, parts.dev
    test = partial(score, parts.held_out, subset(data.eval, config.eval_limit))
    choose = partial(score, dev, data.dev) if dev and data.dev else None
    with session(config, parts.header, resume) as s:
        keep_prefix_start(config, parts.trained, s.folder)
        keep_calibration(axis, s.folder)
        objective.watched(s.ledger.header, s.tracker)
        result = fit(build_trainer(parts, s.ledger), s, test, choose)
        return finish(s, parts.model, parts.tokenizer, result)
