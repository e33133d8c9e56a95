"""`zoft baseline`: what a model scores without zeroth-order training, in a folder like a run's.

zero-shot: as it is. icl: after k demonstrations. calibrated: label bias taken off. sfc: surface forms taken off.
linear-probe: logistic regression on last-token features. first-order, first-order-lora, checkpointed-lora: AdamW with
gradients (first_order.py). forward-gradient: MeZO's step with the exact slope (forward_gradient.py).
None of this is part of the forward-only trainer, and it imports none of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoft.baselines.ask import DEMOS, FORWARD_GRADIENT, ON_PAIRS, WITH_GRADIENTS, Ask, adjusted
from zoft.config.schema import ADAPTERS, LORA, Config
from zoft.errors import UserError, nearest, writing
from zoft.folder import ASKED
from zoft.packages import missing
from zoft.report.runs import ANY

METHODS = ("zero-shot", "icl", "calibrated", "sfc", "linear-probe", *WITH_GRADIENTS, FORWARD_GRADIENT)
GRADIENTS = (
    "lr",
    "steps",
    "batch_size",
    "accumulate",
    "schedule",
    "warmup",
    "weight_decay",
    "eval_every",
    "save_model",
    "save_dtype",
)
ENDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".gguf")  # left out of a folder's name
LONGEST = 60  # characters of a model or file in it


def baseline_settings(
    name: str | None, overrides: Sequence[str], method: str, demos: int | None, epochs: float | None
) -> tuple[Config, Ask]:
    """Return (config, what is asked) of a command line; raises UserError for what does not apply to the method."""
    from zoft.method.configured import compose

    if method not in METHODS:
        near = nearest(method, METHODS)
        raise UserError(
            f"--method {method}: use {', '.join(METHODS)}{f'; did you mean {near}?' if near else ''}"
        )
    gradients = method in WITH_GRADIENTS
    if demos is not None and method != "icl":
        raise UserError(f"--demos {demos}: belongs to --method icl, not to {method}; leave it out")
    if epochs is not None and not gradients:
        raise UserError(
            f"--epochs {epochs:g}: belongs to --method first-order, not to {method}; leave it out"
        )
    keys = tuple(text.partition("=")[0] for text in overrides if not text.startswith("-"))
    known = keys_of(method)
    if epochs is not None and "steps" in keys:
        raise UserError(f"--epochs {epochs:g}: steps= says how long already; leave one of them out")
    if gradients:
        overrides = [*overrides, "train=" + ("lora" if method in ON_PAIRS else "all")]
    config = compose(name, overrides)
    if config.lr == "auto" and (gradients or method == FORWARD_GRADIENT):
        raise UserError(f"lr=auto: is for forward-only recipes, not --method {method}; set lr to a number")
    for k in keys:
        if k.partition(".")[0] not in known:
            raise UserError(f"{k}: does nothing in a baseline of --method {method}; leave it out")
    if method == FORWARD_GRADIENT and config.train in ADAPTERS:
        raise UserError(
            f"train={config.train}: --method {method} trains a model's own tensors; use train=all"
        )
    if "output_dir" not in keys:
        stem = str(config.output_dir).removesuffix(f"-seed{config.seed}")
        name = "-".join([stem, *_others(config, keys), method, f"seed{config.seed}"])
        config = dataclasses.replace(config, output_dir=name)
    return config, Ask(method, demos, epochs, keys)


def keys_of(method: str) -> tuple[str, ...]:
    """Return the config keys that a baseline of this method takes."""
    return (
        ANY
        + (GRADIENTS if method in WITH_GRADIENTS else ())
        + (("train", *(k for k in GRADIENTS if "save" not in k)) if method == FORWARD_GRADIENT else ())
        + (LORA if method in ON_PAIRS else ())
        + (("compute",) if method == "checkpointed-lora" else ())
    )


def _others(config: Config, keys: Sequence[str]) -> list[str]:
    """Return what the command line puts in place of a config's model and task, for a folder's name."""
    task = config.task
    named = [("model", config.model), ("bits", f"bits{config.bits}"), ("task", "" if task.name == "local" else task.name),
             ("task.train", str(task.train).partition(":")[0])]  # fmt: skip
    names = [
        Path(text).stem if Path(text).suffix in ENDS else Path(text).name for k, text in named if k in keys
    ]
    return [made for n in names if (made := re.sub(r"[^\w.-]+", "-", n).strip("-.")[:LONGEST])]


def run_baseline(config: Config, ask: Ask) -> dict[str, Any]:
    """Make a baseline; returns the content of its result.json, which has a run's keys and `method`."""
    from zoft import console
    from zoft.config.compose import to_yaml
    from zoft.console import peak_memory_gb
    from zoft.data import tasks
    from zoft.data.tasks import check_task
    from zoft.env import environment
    from zoft.folder import write
    from zoft.models import load
    from zoft.models.load import find_model
    from zoft.run.guards import explain_memory
    from zoft.run.preflight import claim_folder
    from zoft.train.resolve import absolute_paths

    folder = Path(str(config.output_dir))
    _require(ask.method)
    load.check_model(find_model(config.model))
    check_task(config.task)
    config = absolute_paths(config)
    with explain_memory(config):
        data = tasks.load_task(config.task, config.limits)
        _refuse(ask.method, data)
        claim_folder(folder)  # a folder of another name would not mend the others
        from zoft.replay.export import without_adapter
        from zoft.train.parts import encode_examples, load_run_model, resolve_device

        config = resolve_device(config)
        model, tokenizer, _ = load_run_model(config if ask.method in ON_PAIRS else without_adapter(config))
        if ask.method in WITH_GRADIENTS:
            from zoft.baselines.first_order import first_order_defaults

            # Of examples: plain text has as many as there are pieces.
            config = first_order_defaults(config, ask, len(encode_examples(config, tokenizer, data)[0]))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", to_yaml(config))
        write(folder / "env.json", json.dumps(environment(), indent=2) + "\n")
        write(folder / ASKED, json.dumps(ask.kept()) + "\n")
        began = time.monotonic()
        found = _made(config, ask, data, model, tokenizer)
    between = found.pop("between", [])  # evaluations on the way
    result = {
        **ask.kept(), "steps": 0, "forwards": 0, "train_seconds": round(time.monotonic() - began, 3),
        "peak_memory_gb": round(peak_memory_gb(config.device), 2), "before": {}, **found,
        "output_dir": str(folder),
    }  # fmt: skip
    last = {"step": result["steps"], "seconds": result["train_seconds"], "eval": result["after"]}
    rows = [{"step": 0, "eval": result["before"]}, *between, last]
    text = "".join(json.dumps(console.finite(r)) + "\n" for r in rows if r["eval"])
    write(folder / "metrics.jsonl", text)
    write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _made(config: Config, ask: Ask, data: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what a method adds to result.json; {after: metrics} at least."""
    from zoft.evaluation import evaluate
    from zoft.evaluation.evaluate import CALIBRATION, judge_model, log_softmax, spread
    from zoft.objectives.text import writer
    from zoft.train.parts import encode_examples

    if ask.method == "icl":
        data = demonstrated(config, ask.demos or DEMOS, data, tokenizer)
    train, held_out = encode_examples(config, tokenizer, data)
    write = writer(config, model, tokenizer)
    if ask.method in ("zero-shot", "icl"):
        shots = {"demos_used": data.demos} if ask.method == "icl" else {}
        return {**shots, "after": evaluate.evaluate(model, held_out, train, write=write)}
    if ask.method in ("calibrated", "sfc"):
        judged: Any = judge_model(model, _choice(held_out), _choice(train))
        if ask.method == "calibrated":
            judged.scores = log_softmax(judged.scores) - judged.bias
            forwards = len(spread(train, CALIBRATION))
        else:
            judged.scores, forwards = surface_form(config, data, model, tokenizer, held_out)
        return {"forwards": forwards, "after": adjusted(judged)}
    if ask.method == "linear-probe":
        from zoft.baselines.linear_probe import fit_linear_probe

        return fit_linear_probe(model, train, held_out, len(data.choices), config.seed)
    if ask.method == FORWARD_GRADIENT:
        from zoft.baselines.forward_gradient import train_forward_gradient

        return train_forward_gradient(config, model, tokenizer, train, held_out, write)
    from zoft.baselines.first_order import train_first_order

    checkpointed = ask.method == "checkpointed-lora"
    return train_first_order(config, model, tokenizer, train, held_out, write, checkpointed)


def demonstrated(config: Config, k: int, data: Any, tokenizer: Any) -> Any:
    """Return the task's data with the same k training rows, prompt and gold text, in front of every prompt, blank lines between.

    The rows are drawn by config.seed; the last ones are left out until the longest row fits into max_length, and a line
    says so. Raises UserError where not even one fits.
    """
    from zoft.data.encode import encode

    drawn = random.Random(config.seed).sample(range(len(data.train)), min(k, len(data.train)))
    shown = [
        (data.train[i]["prompt"] + data.train[i]["candidates"][data.train[i]["gold"]]).rstrip() for i in drawn
    ]
    rest = [row for i, row in enumerate(data.train) if i not in set(drawn)] or data.train

    def put(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
        front = "\n\n".join(shown[:n]) + "\n\n"
        return [{**row, "prompt": front + row["prompt"]} for row in rows]

    from zoft.data.tasks import subset
    from zoft.evaluation.evaluate import CALIBRATION, spread

    used: list[Any] = [
        *subset(data.eval, config.eval_limit),
        *spread(rest, CALIBRATION),
    ]
    bare = encode(used, tokenizer, data, 1 << 30)
    longest: Any = used[max(range(len(bare)), key=lambda i: bare[i].length)]
    n, room = len(shown), config.max_length
    if any(row.get("answers") for row in used):
        room -= config.max_new_tokens  # text is written after them
    while n and encode(put([longest], n), tokenizer, data, 1 << 30)[0].length > room:
        n -= 1
    if not n:
        raise UserError(
            f"max_length={config.max_length}: no demonstration fits before the longest row; raise it"
        )
    if n < k:
        why = (
            "in the training set"
            if n == len(drawn)
            else f"into max_length={config.max_length} before the longest row"
        )
        print(f"{n} of {k} demonstrations fit {why}", file=sys.stderr, flush=True)
    made = dataclasses.replace(data, train=put(rest, n), eval=put(data.eval, n))
    made.demos = n
    return made


def surface_form(
    config: Config, data: Any, model: Any, tokenizer: Any, held_out: Sequence[Any]
) -> tuple[Any, int]:
    """Return (Σ log p(candidate | prompt) − Σ log p(candidate | null prompt) [n, C], forwards that the null prompts took).

    The null prompt is task.null_prompt with the row's columns in it, else the template with empty columns.
    Source: Holtzman et al., Surface Form Competition (arXiv 2104.08315), as MeZO's code has it: sums, not means.
    """
    import numpy as np

    from zoft.data.encode import encode
    from zoft.data.tasks import subset, template
    from zoft.data.tasks.template import columns
    from zoft.evaluation import evaluate

    null = config.task.null_prompt
    if null is None:
        pieces = template.parse("task.prompt", data.prompt)
        null = template.fill(pieces, dict.fromkeys(columns(pieces), ""), strip=True)
    rows = subset(data.eval, config.eval_limit)
    which = [(row.get("null", null), tuple(row["candidates"])) for row in rows]
    kinds = list(dict.fromkeys(which))  # most tasks have one
    blanks: list[dict[str, Any]] = [
        {"prompt": text, "candidates": list(c), "gold": 0, "where": "task.null_prompt"} for text, c in kinds
    ]
    nulls = _choice(encode(blanks, tokenizer, data, config.max_length))
    total, _ = evaluate.totals(model, _choice(held_out))
    free, _ = evaluate.totals(model, nulls)
    place = {kind: i for i, kind in enumerate(kinds)}
    width = min(total.shape[1], free.shape[1])
    total, free = total[:, :width], free[[place[kind] for kind in which], :width]
    found = np.full_like(total, -np.inf)  # where an example has no such candidate
    np.subtract(total, free, out=found, where=total > -np.inf)
    return found, sum(len(c) for _, c in kinds)


def _choice(examples: Sequence[Any]) -> list[Any]:
    """The examples with their candidates competing, whatever the task learns by."""
    return [dataclasses.replace(e, objective="choice") for e in examples]


def _refuse(method: str, data: Any) -> None:
    """Raise UserError where a method says nothing of a task, with those without training that do."""
    if why := _fault(method, data):
        fit = [m for m in ("zero-shot", "icl") if not _fault(m, data)]
        raise UserError(f"--method {method}: {why}; use {' or '.join(fit)}")


def _fault(method: str, data: Any) -> str:
    """Return why a method says nothing of a task, "" where it does."""
    if method == "icl" and data.reading and "joins" not in data.eval[0]:
        return "needs a prompt and an answer in each row, not conversations or plain text"
    if method == "icl" and data.reading:
        return "demonstrations stand before a prompt, which task.prompt and task.target (or task.label) would say"
    if method == "sfc" and len(data.eval[0].get("candidates", ())) < 2:
        return "needs candidates to choose from, and this task has text to learn"
    if method in ("calibrated", "linear-probe") and not data.choices:
        return f"needs labels (task.choices), which task={data.name} has not"
    if method in ("icl", "sfc") and "after" in data.eval[0]:
        return "is for prompts that end where the answer begins, not for [MASK]"
    return ""


def _require(method: str) -> None:
    import importlib.util

    if method == "linear-probe" and importlib.util.find_spec("sklearn") is None:
        raise UserError(missing("--method linear-probe", "scikit-learn"))


def baseline_text(result: Mapping[str, Any]) -> str:
    """Return the text that a user reads: what was not trained has one column, and no steps."""
    from zoft.replay.saved_model import metrics_table

    method, before, after = result["method"], result["before"], result["after"]
    rows = (
        f"{method}\n{metrics_table({'before': before, 'after': after})}"
        if before
        else metrics_table({method: after})
    )
    counts = ", ".join(f"{result[k]} {k}" for k in ("steps", "forwards") if result[k])
    return (
        f"{rows}\n{counts}{' in ' if counts else ''}{result['train_seconds']:.0f} s, "
        f"peak memory {result['peak_memory_gb']:.2f} GB: {result['output_dir']}"
    )
