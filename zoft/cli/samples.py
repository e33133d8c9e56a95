"""`zoft samples`: what the base and a run's model write after the same held-out prompts, side by side, with their scores."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoft.cli.eval import load_evaluated, of_run
from zoft.config.schema import GENERATED, Config, lacks_reward
from zoft.errors import UserError
from zoft.method.configured import load_run, reward_named
from zoft.replay.export import without_adapter
from zoft.run.guards import explain_memory
from zoft.run.preflight import refuse_reward

PROMPT = 400  # characters of a prompt that are shown, the last ones
WIDTH = 100


def samples_of(
    run: str, count: int, reward: str | None, overrides: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return one dict per held-out row: row, prompt, and of `base` and `run` each {text, and a number per score}.

    run: a finished run's folder. count: rows, the first ones of its evaluation. reward: named again, where the run has one of
    the user's own; without, texts are shown and not scored. Raises UserError before weights load where it can.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{run}: not a run's folder (it has no config.yaml)")
    for text in overrides:
        if text.partition("=")[0] not in ("device", "threads", "max_new_tokens", "stop"):
            raise UserError(f"{text.partition('=')[0]}: does nothing to samples; leave it out")
    more = [*overrides, *([f"reward={reward}"] if reward else [])]
    config = load_run(folder, more, trains=False)
    named = reward_named(folder)
    if config.objective not in GENERATED:
        if reward:
            config = dataclasses.replace(config, objective="reward")
        elif config.task.choices:
            raise UserError(
                f"{run}: its objective, {config.objective}, writes no text; --reward FILE.py:FUNCTION scores some"
            )
        else:
            config = dataclasses.replace(config, objective="f1")
    if lacks_reward(config):
        print(
            f"{run}: its reward runs code, so texts are not scored; --reward {named} scores them",
            file=sys.stderr,
        )
        config = dataclasses.replace(config, objective="f1")
        unscored = True
    else:
        unscored = False
        if named and not reward and config.objective == "reward":
            print(
                f"{run}: its reward runs code, so the task scores texts here; --reward {named} scores them",
                file=sys.stderr,
            )
    refuse_reward(config, None, must=False)
    trained, adapter = of_run(folder, config)
    with explain_memory(config):
        rows, base = _written(without_adapter(config), None, count)
        _, mine = _written(trained, adapter, count)
    found = []
    for row, before, after in zip(rows, base, mine, strict=True):
        if unscored:
            before, after = ({"text": side["text"]} for side in (before, after))
        found.append({"row": row["where"], "prompt": row["prompt"], "base": before, "run": after})
    return found


def _written(
    config: Config, adapter: Path | None, count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (rows, what a model writes after each with its scores)."""
    from zoft.data import tasks
    from zoft.data.tasks import subset
    from zoft.objectives.objectives import make_objective, reward_of
    from zoft.train.resolve import with_objective

    mine = reward_of(config)
    data = tasks.load_task(config.task, config.limits)
    config = with_objective(dataclasses.replace(config, probes_per_forward="auto", cache_frozen="auto"), data)
    config, model, tokenizer = load_evaluated(config, adapter)
    texts = make_objective(config, data, tokenizer, mine).texts
    assert texts is not None, config.objective
    rows = subset(data.eval, config.eval_limit)[:count]
    said, scored = texts.judge(model, None, rows)
    return rows, [
        {"text": text, **{name: values[i] for name, values in scored.items()}} for i, text in enumerate(said)
    ]


def samples_text(found: Sequence[dict[str, Any]]) -> str:
    """Return samples as text: prompt, what the base wrote, what the run wrote, and the mean of each score."""
    lines = []
    for sample in found:
        prompt = sample["prompt"]
        lines.append(f"── {sample['row']}")
        lines += _wrapped("prompt", ("… " if len(prompt) > PROMPT else "") + prompt[-PROMPT:])
        for side in ("base", "run"):
            scores = "  ".join(f"{k} {v:.4g}" for k, v in sample[side].items() if k != "text")
            lines += _wrapped(side, sample[side]["text"] or "(nothing)", scores)
        lines.append("")
    for side in ("base", "run"):
        names = [k for k in found[0][side] if k != "text"]
        means = "  ".join(f"{n} {sum(s[side][n] for s in found) / len(found):.4g}" for n in names)
        if means:
            lines.append(f"{side:8}{means}  (mean of {len(found)})")
    return "\n".join(lines).rstrip()


def _wrapped(label: str, text: str, after: str = "") -> list[str]:
    parts = [
        piece
        for line in text.splitlines()
        for piece in textwrap.wrap(line, WIDTH - 8, replace_whitespace=False) or [""]
    ] or [""]
    head = f"{label:8}{parts[0]}" + (f"   [{after}]" if after and len(parts) == 1 else "")
    rest = [f"{'':8}{piece}" for piece in parts[1:]]
    if after and len(parts) > 1:
        rest.append(f"{'':8}[{after}]")
    return [head, *rest]
