"""`zoft eval`: a run's saved model, any model, or an adapter, judged on the evaluation data of a config."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.config.schema import GENERATED, Config, lacks_reward
from zoft.errors import UserError, writing
from zoft.folder import write as write_file
from zoft.method.configured import compose, load_run
from zoft.replay.saved_model import folder_name, metrics_table
from zoft.run.guards import explain_memory
from zoft.run.preflight import refuse_reward
from zoft.yaml_files import yaml_tree

if TYPE_CHECKING:
    from zoft.evaluation.evaluate import Judged

GIVE = "give one run's folder, a model's or an adapter's, or --config NAME|FILE"
# Keys that an evaluation takes from the command line; what a config says besides is of its training.
BASE = ("model", "bits", "group", "zero_points", "quantise_head", "adapter")  # whose model it is
ANY = ("task", "limits", "max_length", "eval_limit", "device", "threads", "trust_remote_code", "max_new_tokens", "stop",
       "objective", "reward", "reward_seconds")  # fmt: skip


def evaluated_config(
    target: str | None, name: str | None, overrides: Sequence[str]
) -> tuple[Config, Path | None]:
    """Return (config whose model is to be judged, adapter folder or None) of what the command line says.

    target: a run's folder, or one of a model or of an adapter; name: of a config, whose task (and, without a target, whose
    model) is taken. An adapter's base is `model=…`, else the one it says itself, else the model of `name`.
    Raises UserError for keys that do nothing here.
    """
    keys = {text.partition("=")[0].partition(".")[0] for text in overrides}
    for key in (text.partition("=")[0] for text in overrides):
        if key.partition(".")[0] not in ANY + BASE:
            raise UserError(f"{key}: does nothing in an evaluation; leave it out")
    if other := [t for t in overrides if t.startswith("objective=") and t[10:] not in GENERATED]:
        raise UserError(
            f"{other[0]}: metrics of labels and losses are there anyway; leave it out, or ask for those of text that is "
            "written: exact_match, f1"
        )
    if keys & {"objective", "reward"}:
        # Settings of a training by losses, which a run has resolved, would not do for one by texts.
        overrides = [*overrides, "probes_per_forward=auto", "cache_frozen=auto"]
    if "reward" in keys and "objective" not in keys:
        overrides = [*overrides, "objective=reward"]
    return _source(target, name, overrides, keys)


def _source(
    target: str | None, name: str | None, overrides: Sequence[str], keys: set[str]
) -> tuple[Config, Path | None]:
    if target is None:
        if name is None:
            raise UserError(f"eval: {GIVE}")
        return compose(name, overrides), None
    folder = Path(target)
    if (folder / "config.yaml").is_file():
        if name is not None:
            raise UserError(
                f"--config {name}: {target} is a run, which has its own config; leave --config out"
            )
        config, saved = of_run(folder, load_run(folder, overrides, trains=False))
        for key in BASE:
            if key in keys and (saved is None or key == "adapter"):
                raise UserError(f"{key}: {target} is a run, whose own model is judged; leave it out")
        if lacks_reward(config):
            named = yaml_tree(folder / "config.yaml").get("reward")
            print(f"{target}: its reward runs code, so it is not asked here; --reward {named} asks it",
                  file=sys.stderr)  # fmt: skip
        return config, saved
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{target}: not a run's folder (it has no config.yaml); {GIVE}")
    given = [text for text in overrides if text.startswith("model=")]
    if not adapter.is_file():
        if given:
            raise UserError(f"{given[0]}: {target} is a model already; leave one of them out")
        overrides = [*overrides, f"model={target}"]
    else:
        if "adapter" in keys:
            raise UserError(f"adapter: {target} is an adapter already; leave one of them out")
        if not given and (base := _base(adapter, must=name is None)):
            overrides = [*overrides, f"model={base}"]
    config = compose(name, overrides)
    return dataclasses.replace(config, eps_mode="absolute"), folder if adapter.is_file() else None


def of_run(folder: Path, config: Config) -> tuple[Config, Path | None]:
    """Do as source(), for a run's folder and its config."""
    name = folder_name(config)
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


def _base(adapter: Path, must: bool) -> str | None:
    """The base that an adapter says it has, None where it says none and need not."""
    try:
        found = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not found:
        if not must:
            return None
        raise UserError(f"{adapter.parent}: this adapter does not say what its base is; add model=…")
    return found


def load_evaluated(config: Config, adapter: Path | None) -> tuple[Config, Any, Any]:
    """Return (config with its device, model, tokenizer), with the adapter in it."""
    from zoft.models.adapters.attach import load_adapter
    from zoft.replay.export import without_adapter
    from zoft.train.parts import load_run_model, resolve_device

    config = resolve_device(config if adapter is None else dataclasses.replace(config, adapter=None))
    model, tokenizer, base = load_run_model(without_adapter(config))
    if adapter is not None and (line := other_base(config.model, adapter, base)):
        print(line, file=sys.stderr)
    return config, model if adapter is None else load_adapter(model, adapter), tokenizer


def other_base(model: str, adapter: Path, found: str) -> str:
    """Return a line where a model is not the base that an adapter was trained on, "" where it is, or nothing says so.

    found: the model's fingerprint. The ledger of the adapter's run tells, where it is beside it; else the names do.
    """
    from zoft.ledger.log import read_ledger
    from zoft.models.load import find_model

    said = _base(adapter / "adapter_config.json", must=False)
    with suppress(UserError):
        base = str(read_ledger(adapter.parent / "ledger").header["base"]).partition("+")[0]
        named = f" ({said})" if said and said != model else ""
        why = f"other weights than those that {adapter} was trained on{named}"
        return "" if base == found else f"model={model}: {why}; its figures here are not those of its run"
    source = find_model(model)
    if said is None or said in (model, source.home, source.place):
        return ""
    if Path(said).exists() and Path(said).resolve() == Path(source.place).resolve():
        return ""
    return f"model={model}: {adapter} says that it was trained on {said}; on other weights its figures mean little"


def evaluate_config(
    config: Config, adapter: Path | None = None, *, resamples: int = 0, out: str | None = None
) -> dict[str, Any]:
    """Return metrics of a model on a config's evaluation data; with resamples, {metric: [low, high]} beside them as ci95.

    Where the config's objective is of texts that the model writes (exact_match, f1, a reward), they are written and judged.
    out: a .jsonl file that gets a line an example. Raises UserError before weights load where it can.
    """
    import numpy as np

    from zoft.data import tasks
    from zoft.data.tasks import check_task, subset
    from zoft.models import load as models
    from zoft.models.kind import refuse_other_kind
    from zoft.models.load import find_model

    if out is not None:
        with writing(out):  # not after an hour of work
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            open(out, "ab").close()
    refuse_reward(config, None, must=False)
    models.check_model(find_model(config.model))
    check_task(config.task)
    from zoft.data.encode import rows_of
    from zoft.evaluation import evaluate
    from zoft.evaluation.evaluate import bootstrap, judge_model
    from zoft.objectives.objectives import make_objective, reward_of
    from zoft.objectives.text import writer
    from zoft.train.parts import encode_examples
    from zoft.train.resolve import with_objective

    with explain_memory(config):
        writes = config.objective in GENERATED and not lacks_reward(config)
        mine = reward_of(config)
        data = tasks.load_task(config.task, config.limits)
        config = with_objective(config, data) if writes else config
        config, model, tokenizer = load_evaluated(config, adapter)
        train, held_out = encode_examples(config, tokenizer, data)
        refuse_other_kind(config.model, model, held_out[0].masked)
        texts = make_objective(config, data, tokenizer, mine).texts if writes else None
        write = None if texts else writer(config, model, tokenizer)
        found = judge_model(model, held_out, train, write=write)
        rows = subset(data.eval, config.eval_limit)
        if texts is not None:
            found.texts, scored = texts.judge(model, None, rows)
            found.scored = {name: np.array(values) for name, values in scored.items()}
            if (
                found.scores is None and "f1" in scored and all(r.get("answers") for r in rows)
            ):  # as of any such text
                found.exact, found.f1, found.scored = found.scored["exact_match"], found.scored["f1"], {}
    if out is not None:
        rows = rows_of(rows, held_out)
        write_file(Path(out), "".join(lines(rows, found)))
    result = evaluate.figures(found)
    return result | ({"ci95": bootstrap(found, resamples=resamples)} if resamples else {})


def harness(config: Config, adapter: Path | None, tasks: str, path: str | None) -> tuple[dict[str, Any], str]:
    """Return (results of lm-evaluation-harness's tasks, the same as text); config.eval_limit examples of each."""
    from zoft.cli.lm_eval import require_tasks, run_tasks, tasks_text
    from zoft.models import load as models
    from zoft.models.load import find_model

    names = require_tasks(tasks, path)
    models.check_model(find_model(config.model))
    with explain_memory(config):
        config, model, tokenizer = load_evaluated(config, adapter)
        found = run_tasks(config, model, tokenizer, names, path, config.eval_limit)
    return found, tasks_text(found)


def lines(rows: Sequence[Mapping[str, Any]], found: Judged) -> list[str]:
    """Return a JSON line per example: row, prompt, gold, scores or loss, prediction, right.

    scores: as evaluate.scores gives them, logits where each candidate is one token. probabilities: their softmax.
    """
    from zoft.console import finite
    from zoft.evaluation.evaluate import log_softmax

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
            among = log_softmax(found.scores[i : i + 1])[0]  # of the candidates
            about["probabilities"] = {c: math.exp(p) for c, p in zip(row["candidates"], among.tolist())}
            about["prediction"] = row["candidates"][int(found.predicted[i])]
            about["right"] = bool(found.right[i])
        if found.sums is not None and found.counts is not None:
            about |= {"loss": float(found.sums[i] / found.counts[i]), "tokens": int(found.counts[i])}
        if found.texts is not None and found.exact is not None and found.f1 is not None:
            about |= {"answers": row["answers"], "prediction": found.texts[i], "right": bool(found.right[i])}
            about |= {"exact_match": float(found.exact[i]), "f1": float(found.f1[i])}
        elif found.texts is not None:
            about["text"] = found.texts[i]
        about |= {name: float(values[i]) for name, values in found.scored.items()}
        made.append(json.dumps(finite(about), ensure_ascii=False) + "\n")
    return made


def evaluation_text(result: Mapping[str, Any]) -> str:
    """Return the text that a user reads: a line per metric, its interval beside it."""
    from zoft.console import short

    shown, between = {k: v for k, v in result.items() if not isinstance(v, Mapping)}, result.get("ci95", {})
    lines = metrics_table({"": shown}).split("\n")
    for i, name in enumerate(shown):
        lines[i] += f"   {short(between[name][0])} to {short(between[name][1])}" if name in between else ""
    return "\n".join(([f"{'':34}   95 % interval"] if between else []) + lines)
