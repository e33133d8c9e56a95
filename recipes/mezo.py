"""MeZO: full-parameter SPSA with forward passes only.

z ~ N(0, I);  g = (L(θ + eps·z) - L(θ - eps·z)) / (2 eps);  θ ← θ - lr·g·z        (q > 1: the mean over q z's)

Here θ is never moved by probing: both losses come from one forward with a probe axis. `perturb=inplace` is the
paper's own cycle. Differences from the paper's code: noise by counter instead of a reseeded stream, updates in
fp32 with stochastic rounding, weight decay not on norms and biases.
Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from zoft import (
    adapter_beside,
    adapters,
    goal,
    headers,
    selection,
    setup,
    setup_axis,
    setup_trainer,
    space,
    tasks,
)
from zoft import replay as replays
from zoft import run as runs
from zoft.config import Config
from zoft.evaluate import evaluate
from zoft.example import Example
from zoft.generate import writer
from zoft.ledger import Log
from zoft.replay_live import in_memory, live
from zoft.session import session


def run(config: Config, *, resume: str | Path | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Train, from the start or from where `resume` stopped; returns result.json's content, or the plan of a dry run."""
    config = setup.device(config)
    data = tasks.load(config.task)  # a mistake in the data shows before weights load
    config, reward = goal.resolve(config, data), goal.reward(config)
    selection.check(config, data)
    setup.refuse_pattern(config)
    model, tokenizer, base = setup.model(config, resume)
    train, held_out = setup.examples(config, tokenizer, data)
    objective = goal.make(config, data, tokenizer, reward)
    scored = objective.examples(train)

    # The space, then the axis: which tensors are trained, in which precision, and how the model runs at θ + s·z.
    names = space.train_names(model, config.train)
    config = setup.dtypes(config, model, names)
    config, trained, axis = setup_axis.make(config, model, space.adopt(model, names), scored)
    if dry_run:
        return setup_trainer.plan(config, model, trained, train, held_out)

    dev = setup.dev_examples(config, tokenizer, data)
    write = None if objective.texts else writer(config, model, tokenizer, axis.clean)

    def score(examples: list[Example], rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = evaluate(model, examples, train, context=axis.clean, write=write)
        return {**found, **objective.evaluate(model, axis.clean, rows)}

    test = partial(score, held_out, tasks.subset(data.eval, config.eval_limit))
    choose = partial(score, dev, data.dev) if dev and data.dev else None

    with session(config, headers.of(config, base, trained, train) | objective.header(), resume) as s:
        headers.keep(config, trained, s.folder)
        objective.watched(s.ledger.header, s.tracker)
        trainer = setup_trainer.trainer(config, model, axis, scored, s.ledger, objective)
        result = runs.fit(trainer, s, test, choose)
        return runs.finish(s, model, tokenizer, result)


def replay(config: Config, folder: Path, out: Path, ask: replays.Ask) -> int:
    """Base + ledger -> a model of the run in `out`, or its adapter; returns its number of steps."""
    if config.train in adapters.ADAPTERS or adapter_beside.folder_of(config):
        return in_memory(config, folder, out, ask, rebuild)
    return replays.replay(config, folder, out, ask)


def rebuild(config: Config, folder: Path, log: Log) -> tuple[Any, Any, Config]:
    """(the run's model in memory after the log's steps, its tokenizer, the config)."""
    return live(config, folder, log)
