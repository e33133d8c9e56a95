"""`zoft eval`: a run's saved model, any model, or an adapter, judged on the evaluation data of a config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft import compose, guards, results, run
from zoft.config import Config
from zoft.errors import UserError, writing

if TYPE_CHECKING:
    from zoft.evaluate import Judged

GIVE = "give one run's folder, a model's or an adapter's, or --config NAME|FILE"


def source(target: str | None, name: str | None, overrides: Sequence[str]) -> tuple[Config, Path | None]:
    """(config whose model is to be judged, adapter folder or None) of what the command line says.

    target: a run's folder, or one of a model or of an adapter; name: of a config, whose task (and, without a target, whose
    model) is taken. An adapter's base is the model of `name` or `model=…`, else the one it says itself.
    """
    if target is None:
        if name is None:
            raise UserError(f"eval: {GIVE}")
        return compose.compose(name, overrides), None
    folder = Path(target)
    if (folder / "config.yaml").is_file():
        if name is not None:
            raise UserError(
                f"--config {name}: {target} is a run, which has its own config; leave --config out"
            )
        return of_run(folder, compose.load_run(folder, overrides))
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{target}: not a run's folder (it has no config.yaml); {GIVE}")
    given = [text for text in overrides if text.startswith("model=")]
    if not adapter.is_file():
        if given:
            raise UserError(f"{given[0]}: {target} is a model already; leave one of them out")
        overrides = [*overrides, f"model={target}"]
    elif name is None and not given:
        overrides = [*overrides, f"model={_base(adapter)}"]
    config = compose.compose(name, overrides)
    return dataclasses.replace(config, eps_mode="absolute"), folder if adapter.is_file() else None


def of_run(folder: Path, config: Config) -> tuple[Config, Path | None]:
    """As source(), of a run's folder and its config."""
    name = results.folder_name(config)
    saved = folder / name
    if not saved.is_dir():
        raise UserError(
            f"{folder}: no {saved.name}/ in it: finish the run with `zoft train --resume {folder}`, or rebuild what it has "
            f"with `zoft replay {folder} --out DIR`"
            + (" and evaluate that with model=DIR" if saved.name == "model" else "")
        )
    if name == "adapter":
        return config, saved
    config = dataclasses.replace(config, model=str(saved), bits=None, eps_mode="absolute", adapter=None)
    return config, None  # an adapter that was in place is in that folder, or merged


def _base(adapter: Path) -> str:
    try:
        found = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not found:
        raise UserError(f"{adapter.parent}: this adapter does not say what its base is; add model=…")
    return found


def load(config: Config, adapter: Path | None) -> tuple[Config, Any, Any]:
    """(config with its device, model, tokenizer), with the adapter in it."""
    from zoft import adapters, setup

    config = setup.device(config if adapter is None else dataclasses.replace(config, adapter=None))
    model, tokenizer, _ = setup.model(run.plain(config))
    return config, model if adapter is None else adapters.load(model, adapter), tokenizer


def judge(
    config: Config, adapter: Path | None = None, *, resamples: int = 0, out: str | None = None
) -> dict[str, Any]:
    """Metrics of a model on a config's evaluation data; with resamples, {metric: [low, high]} beside them as ci95.

    out: a .jsonl file that gets a line an example. Raises UserError before weights load where it can.
    """
    from zoft import models, tasks

    if out is not None:
        with writing(out):  # not after an hour of work
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            open(out, "wb").close()
    models.check(models.resolve(config.model))
    tasks.look(config.task)
    from zoft import evaluate, setup
    from zoft.encode import rows_of

    with guards.memory(config):
        data = tasks.load(config.task)
        config, model, tokenizer = load(config, adapter)
        train, held_out = setup.examples(config, tokenizer, data)
        models.refuse_other_kind(config.model, model, held_out[0].masked)
        found = evaluate.judge(model, held_out, train, write=writer(config, model, tokenizer))
    if out is not None:
        rows = rows_of(tasks.subset(data.eval, config.eval_limit), held_out)
        with writing(out):
            Path(out).write_text("".join(lines(rows, found)), encoding="utf-8")
    result = evaluate.figures(found)
    return result | ({"ci95": evaluate.bootstrap(found, resamples=resamples)} if resamples else {})


def harness(config: Config, adapter: Path | None, tasks: str, path: str | None) -> tuple[dict[str, Any], str]:
    """(results of lm-evaluation-harness's tasks, the same as text); config.eval_limit examples of each."""
    from zoft import lm_eval_tasks, models

    names = lm_eval_tasks.require(tasks, path)
    models.check(models.resolve(config.model))
    with guards.memory(config):
        config, model, tokenizer = load(config, adapter)
        found = lm_eval_tasks.run(config, model, tokenizer, names, path, config.eval_limit)
    return found, lm_eval_tasks.text(found)


def writer(config: Config, model: Any, tokenizer: Any, context: Any = None) -> Any:
    """contexts -> the text that the model writes after each, by the config's max_new_tokens and stop.

    A context and what is written after it are max_length tokens at most: it loses tokens on its left (after BOS).
    """
    from zoft.encode import front_of
    from zoft.generate import generate

    front = len(front_of(tokenizer))
    room = max(front + 1, config.max_length - config.max_new_tokens)

    def fit(context: tuple[int, ...]) -> tuple[int, ...]:
        return context[:front] + context[max(front, front + len(context) - room) :]

    def write(contexts: Sequence[tuple[int, ...]]) -> list[str]:
        return generate(
            model,
            tokenizer,
            [fit(c) for c in contexts],
            max_new_tokens=config.max_new_tokens,
            stop=config.stop,
            context=context,
        )

    return write


def lines(rows: Sequence[Mapping[str, Any]], found: Judged) -> list[str]:
    """A JSON line an example: row, prompt, gold, scores or loss, prediction, right."""
    from zoft.tracking import finite

    made = []
    for i in range(len(found.gold)):
        # Long texts become several examples, packed ones share one, and conversations have no prompt.
        row = rows[i] if len(rows) == len(found.gold) else {}
        about: dict[str, Any] = {"row": row.get("where", str(i))}
        if "candidates" in row:
            about |= {"prompt": row["prompt"], "gold": row["candidates"][int(found.gold[i])]}
        if len(found.golds[i]) > 1:
            about["golds"] = [row["candidates"][g] for g in found.golds[i]]
        if found.scores is not None:
            about["scores"] = dict(zip(row["candidates"], found.scores[i].tolist()))
            about["prediction"] = row["candidates"][int(found.predicted[i])]
            about["right"] = bool(found.right[i])
        if found.sums is not None and found.counts is not None:
            about |= {"loss": float(found.sums[i] / found.counts[i]), "tokens": int(found.counts[i])}
        if found.texts is not None and found.exact is not None and found.f1 is not None:
            about |= {"answers": row["answers"], "prediction": found.texts[i], "right": bool(found.right[i])}
            about |= {"exact_match": float(found.exact[i]), "f1": float(found.f1[i])}
        made.append(json.dumps(finite(about), ensure_ascii=False) + "\n")
    return made


def text(result: Mapping[str, Any]) -> str:
    """What a user reads: a line a metric, its interval beside it."""
    from zoft.tracking import short

    between = result.get("ci95", {})
    head = [f"{'':22}{'':>12}   95 % interval"] if between else []
    return "\n".join(
        head
        + [
            f"{name:22}{short(value):>12}"
            + (f"   {short(between[name][0])} to {short(between[name][1])}" if name in between else "")
            for name, value in result.items()
            if not isinstance(value, Mapping)
        ]
    )
