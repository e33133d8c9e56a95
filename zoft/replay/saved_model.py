"""Write what a run leaves: its model with a card, its result.json, and the text that a user reads of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoft import console
from zoft.config.compose import dump
from zoft.config.schema import ADAPTERS, Config
from zoft.errors import UserError
from zoft.limits import read_bytes

RESULT_BYTES = 1 << 24  # of a result.json


def folder_name(config: Config) -> str:
    """Return the folder that a run leaves: `model`, or `adapter` where one was trained beside a frozen model."""
    return "adapter" if config.train in ADAPTERS else "model"


def save_run_model(
    config: Config, model: Any, tokenizer: Any, out: Path, result: Mapping[str, Any], **facts: Any
) -> None:
    """Write a run's model as others load it, in the checkpoint's dtype or save_dtype; facts: more for its card.

    Of a model with an adapter, the adapter alone.
    """
    from zoft.method import space
    from zoft.models.adapters.attach import save_adapter
    from zoft.models.saving import save_model

    text = model_card_of(config, result, **facts)
    dtype = model.checkpoint_dtype if config.save_dtype == "auto" else space.DTYPES[config.save_dtype]
    if config.train in ADAPTERS:
        save_adapter(model, out, tokenizer=tokenizer, card=text)
    else:
        save_model(model, tokenizer, out, dtype=dtype, card=text, dequantise=config.save_dequantised)


def model_card_of(config: Config, result: Mapping[str, Any], **facts: Any) -> str:
    """Return the text of a model's README.md; facts: what else its table of the method says."""
    from zoft.models.card import model_card
    from zoft.models.load import find_model

    task = config.task
    data = {"task": task.name, "training data": _public(task.train), "evaluation data": _public(task.eval) or "held out of the training data",
            "prompt": task.prompt, "target": task.target, "label words": ", ".join(f"{k}:{v}" for k, v in task.choices.items()),
            "objective": config.objective}  # fmt: skip
    keys = (
        "recipe",
        "train",
        "steps",
        "lr",
        "schedule",
        "eps",
        "q",
        "noise",
        "estimator",
        "update",
        "batch_size",
        "seed",
    )
    method = (
        {k: getattr(config, k) for k in keys}
        | {"storage, compute": f"{config.storage}, {config.compute}"}
        | facts
    )
    if "forwards" in result:
        method["counted forwards"] = f"{result['forwards']:,}"
    needs = "the base and the training data" if config.perturb == "nodes" else "the base"
    rebuild = (
        f"The run's folder RUN has `ledger` and `config.yaml`. With {needs} they give these weights bit for bit. The ledger has a hash of "
        "the base, so another base is refused.\n\n```bash\nzoft replay RUN --out DIR\n```"
    )
    return model_card(
        find_model(config.model),
        data={k: v for k, v in data.items() if v},
        method=method,
        results={when: result.get(when, {}) for when in ("before", "after")},
        rebuild=rebuild,
    )


def _public(place: str | None) -> str:
    """Return the name of a file or a Hub data set, without the folders of this machine."""
    return Path(place).name if place and os.path.isabs(place) else place or ""


def read_result(folder: Path) -> dict[str, Any]:
    """Return result.json's content, empty for a run that is not finished."""
    path = folder / "result.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(read_bytes(path, RESULT_BYTES, "it is no result") if path.is_file() else b"")
        result_summary(found)
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: damaged; delete it, and `zoft train --resume {folder}` writes it again"
        ) from None


def saved_faults(folder: Path, config: Config) -> str:
    """Return what is wrong with the files of the model of a finished run; "" where they are whole, or not there at all.

    A folder that is gone was moved by the user. Files are compared with their own headers, by length: no tensor is read.
    """
    from zoft.models.checkpoint import check_saved

    place = folder / folder_name(config)
    if not config.save_model or not place.is_dir():
        return ""
    try:
        check_saved(str(place), place)
    except UserError as error:
        return str(error).removesuffix("; fetch it again")
    return ""


def result_summary(result: Mapping[str, Any]) -> str:
    """Return the text that a user reads at the end of a run."""
    rows = metrics_table({"before": result["before"], "after": result["after"]})
    return (
        f"{rows}\n{result['steps']} steps, {result['forwards']} forwards in {result['train_seconds']:.0f} s, "
        f"peak memory {result['peak_memory_gb']:.2f} GB: {result['output_dir']}"
    )


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return metrics side by side, a line each, columns named."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    head = [f"{'':22}" + "".join(f"{title:>12}" for title in columns)] if any(columns) else []
    return "\n".join(
        head
        + [f"{n:22}" + "".join(f"{console.short(m.get(n, '')):>12}" for m in columns.values()) for n in names]
    )


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return the text that a dry run prints: the resolved config, then what training would do."""
    config = plan["config"]
    return (
        f"{dump(config)}\n"
        f"{plan['train_examples']} training and {plan['eval_examples']} evaluation examples, "
        f"the longest of {plan['longest']} tokens\n"
        f"{plan['trained_tensors']} tensors trained, {plan['trained_numbers']:,} numbers, "
        f"{plan['trained_share']:.1%} of the model; the weakest realised direction has cosine "
        f"{plan['weakest_cosine']:.4f} with z ({plan['weakest_direction']})\n"
        f"{config['steps']} steps, {plan['forwards']} forwards; nothing was trained or written"
    )
