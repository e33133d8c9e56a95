"""Assemble a run from its config: data, model, trained space, axis and objective, with nothing left `auto`.

Whoever trains, joins a run or rebuilds one starts here. After `assemble` nobody rewrites the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zoft.config.schema import Config
from zoft.data import tasks
from zoft.data.example import Example
from zoft.data.tasks import TaskData
from zoft.evaluation.best_by import refuse_best_by
from zoft.method.auto_lr import check_auto_lr
from zoft.method.recipes import method_of
from zoft.method.space import Trained, adopt, train_names
from zoft.method.trial import try_page
from zoft.objectives.objectives import Goal, make_objective, reward_of
from zoft.objectives.preference import Pairs
from zoft.objectives.text import writing_digest
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.probe.members import Members
from zoft.probe.nodes import NodeAxis
from zoft.train.axis import make_axis, placed_axis
from zoft.train.batches import picked
from zoft.train.header import agree, header_of, model_settings
from zoft.train.learning_rate import Line, find_lr
from zoft.train.parts import (
    dev_examples,
    encode_examples,
    load_run_model,
    refuse_pattern,
    resolve_device,
    resolve_precision,
    say,
)
from zoft.train.resolve import with_lr, with_objective
from zoft.train.rollouts import with_members


@dataclass(frozen=True)
class Parts:
    """Hold what a run is made of.

    config: resolved. trained: the tensors that are really trained. header: of the ledger. train, held_out, dev: rows as
    token ids, scored: the training rows as the objective scores them. line: what lr=auto measured.
    """

    config: Config
    data: TaskData
    model: nn.Module
    tokenizer: Any
    objective: Goal
    train: list[Example]
    held_out: list[Example]
    dev: list[Example] | None
    scored: list[Example]
    trained: list[Trained]
    axis: ProbeAxis | InPlace | NodeAxis
    header: dict[str, Any]
    members: Members | None = None  # where the members of a step write together
    line: Line | None = None  # of lr=auto


def assemble(config: Config, folder: str | Path | None = None) -> Parts:
    """Build all parts of a run and resolve every key that is `auto`, on the way and only here.

    config: checked. folder: of a run that goes on. Raises UserError for a mistake, one in the data before weights load.
    """
    method = method_of(config.recipe)
    try_page(config, method)
    config = resolve_device(config)
    data = tasks.load_task(config.task, config.limits)
    config, reward = with_objective(config, data), reward_of(config)
    check_auto_lr(config)
    refuse_best_by(config, data)
    refuse_pattern(config, method)
    model, tokenizer, base = load_run_model(config, folder)
    train, held_out = encode_examples(config, tokenizer, data)
    objective = make_objective(config, data, tokenizer, reward)
    scored = objective.examples(train)

    # The space, then the axis: which tensors are trained, in which precision, and how the model runs at θ + s·z.
    names = train_names(model, config.train, config.perturb == "nodes")
    config = resolve_precision(config, model, names)
    config, trained, axis = make_axis(config, model, adopt(model, names), scored, folder)
    dev = dev_examples(config, tokenizer, data)
    if objective.pairs is not None:
        scored = with_references(config, model, axis, objective.pairs, scored, [*held_out, *(dev or [])])
    members = None
    if objective.texts is not None:
        config, members = with_members(config, model, tokenizer, axis, objective.texts)
    line: Line | None = None
    if config.lr == "auto":
        line = find_lr(config, model, axis, scored, objective)
        say(f"lr=auto: lr={line.lr:g}, of {line.lines} lines ({line.forwards} forwards)")
        config = with_lr(config, line.lr)
    header = header_of(config, base, trained, train, model=model, held_out=held_out) | objective.header()
    if objective.texts is not None:
        header["writing"] = writing_digest(model, tokenizer)
    if isinstance(axis, NodeAxis):
        header["nodes"] = axis.measured.digest()
    if line is not None:
        header["lr_auto"] = line.header()
    return Parts(
        config=config, data=data, model=model, tokenizer=tokenizer, objective=objective, train=train,
        held_out=held_out, dev=dev, scored=scored, trained=trained, axis=axis,
        header=header, members=members, line=line,
    )  # fmt: skip


def with_references(
    config: Config, model: nn.Module, axis: Any, pairs: Pairs, train: list[Example], judged: list[Example]
) -> list[Example]:
    """Ask the base for both answers of each pair that a step or an evaluation meets; returns the training pairs with that.

    Its forwards are counted, one per pair.
    """
    met = {i for step in range(config.steps) for picks in picked(config, len(train), step) for i in picks}
    axis.forwards = pairs.meet(model, [*(train[i] for i in sorted(met)), *judged], axis.clean)
    say(f"{axis.forwards:,} pairs scored by the base, once")
    return pairs.with_reference(train)


@dataclass(frozen=True)
class Rebuilt:
    """Hold what a run's weights are rebuilt with: no data, and an axis that only applies updates."""

    config: Config
    model: nn.Module
    tokenizer: Any
    axis: ProbeAxis | InPlace


def assemble_again(config: Config, folder: Path, header: Mapping[str, Any]) -> Rebuilt:
    """Build the model of the run in `folder` at its base, trained tensors in the precision that its ledger names.

    config: under the ledger's plan. Raises UserError for another base.
    """
    from zoft.models.adapters.attach import adapter_fingerprint

    model, tokenizer, found = load_run_model(config, folder)
    agree(header, {"base": found, "model": model_settings(model)}, folder)
    config, trained, axis = placed_axis(config, model, adopt(model, list(header["trained"])))
    if "adapter" in header and config.storage == header["storage"]:
        agree(header, {"adapter": adapter_fingerprint(trained)}, folder)
    return Rebuilt(config, model, tokenizer, axis)
