"""Values of keys that are out of range, or do not go together: refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from zoft.config.schema import (
    ADAPTERS,
    GENERATED,
    LORA,
    ONLY,
    ROLLOUT,
    SECTIONS,
    SETS,
    VERIFIED,
    Config,
    fields,
)
from zoft.errors import UserError, nearest


def unknown_key(name: str, where: str = "") -> UserError:
    """Return the error for a key that is not in the schema, with the nearest one that is."""
    # Compared by last parts: a shared `task.` would make everything look alike.
    tails = {
        full.rsplit(".", 1)[-1]: full for full in reversed(fields())
    }  # a top-level key wins over task.train
    near = tails.get(str(nearest(name.rsplit(".", 1)[-1], tails)))
    section = name.partition(".")[0]
    if near and section in SECTIONS and f"{section}.{near}" in fields():
        near = f"{section}.{near}"
    hint = f"did you mean {near}?" if near else "`zoft keys` lists them all"
    return UserError(f"unknown key {name}{where}: {hint}")


def check_config(config: Config) -> Config:
    """Raise UserError for the first value that is out of range; returns config, label names made strings."""
    for name, f in fields().items():
        section, _, last = name.rpartition(".")
        check_value(name, getattr(getattr(config, section) if section else config, last), f)
    if config.output_dir is not None and not config.output_dir.strip():
        raise UserError("output_dir is empty: give the run's folder a name, or leave the key out")
    if not config.model.strip():
        raise UserError(
            "model is not set: model=NAME, a folder, a .gguf file or a Hub id (or --config; see `zoft ls`)"
        )
    if not config.task.name:
        raise UserError("task is not set: task=reviews, task=trec or task=local (or --config; see `zoft ls`)")
    if config.warmup >= 1 and config.warmup != int(config.warmup):
        raise UserError(f"warmup={config.warmup:g}: give whole steps, or a fraction below 1 of all steps")
    _check_snapshots(config)
    if config.warmup > config.steps:
        raise UserError(f"warmup={config.warmup:g}: must not exceed steps={config.steps}")
    if re.fullmatch(r"last-0+", config.train):
        raise UserError(f"train={config.train}: that is no block; last-1 is the last one")
    if idle := [n for n, sets in ONLY.items() if getattr(config, n) is not None and config.train not in sets]:
        name, sets = idle[0], ONLY[idle[0]]
        meant = None if re.fullmatch(SETS, config.train) else nearest(config.train, sets)
        raise UserError(
            f"{name}={getattr(config, name)}: is for train={' or '.join(sets)}, not {config.train}; "
            + (f"did you mean train={meant}?" if meant else _away(idle))
        )
    _check_adapter(config)
    try:
        re.compile(config.lora_targets or "")
    except re.error as error:
        raise UserError(
            f"lora_targets={config.lora_targets}: use ends of names ('q_proj v_proj'), all-linear or a regular expression ({error})"
        ) from None
    if config.save_dtype != "auto" and config.train in ADAPTERS:
        raise UserError(
            f"save_dtype={config.save_dtype}: an adapter is saved as it is kept; leave it out, or set storage"
        )
    if not re.fullmatch(SETS, config.train):
        try:
            re.compile(config.train)
        except re.error as error:
            raise UserError(
                f"train={config.train}: use all, last-2, norms, bias, head or a regular expression ({error})"
            ) from None
    lr = 0.0 if config.lr == "auto" else float(config.lr)
    if lr * config.weight_decay >= 1:
        raise UserError(
            f"weight_decay={config.weight_decay:g}: times lr={lr:g} it takes each weight away in one step; lower it"
        )
    if lr * config.anchor >= 1:
        raise UserError(
            f"anchor={config.anchor:g}: times lr={lr:g} it takes the weights to their start and beyond in one step; lower it"
        )
    if config.eps < 1e-30:
        raise UserError(f"eps={config.eps:g}: it is 0 in fp32; use 1e-3 or so")
    _check_quantised(config)
    _check_objective(config)
    # YAML reads `yes:` and `true:` as booleans, and `0:` as a number, where data files hold their names.
    choices: dict[Any, str] = {}
    for k, v in config.task.choices.items():
        name = str(k).lower() if isinstance(k, bool) else str(k)
        if name in choices:
            raise UserError(f"task.choices: {name} is there twice; keep one")
        choices[name] = v
    config.task.choices = choices
    return config


def _away(names: list[str]) -> str:
    """Return how to be without keys that the user, or the config that was named, has set."""
    return f"leave it out, or set {' '.join(f'{n}=null' for n in names)}"


def _check_adapter(config: Config) -> None:
    """Refuse what does not go with an adapter in place."""
    if config.adapter is None:
        return
    if not config.adapter.strip():
        raise UserError("adapter is empty: give a folder, or leave the key out")
    if idle := [n for n in LORA if getattr(config, n) is not None]:
        raise UserError(f"{idle[0]}={getattr(config, idle[0])}: the adapter has its own; {_away(idle)}")
    if config.train in ("prefix", "prompt"):
        raise UserError(
            f"train={config.train}: does not go with adapter; use train=lora to train on from it, or scales, norms, all, …"
        )
    if config.denoise_every:
        raise UserError(
            f"denoise_every={config.denoise_every}: rebuilds weights from the model's own files, without an adapter in place; leave it out"
        )


def _check_objective(config: Config) -> None:
    """Refuse keys of an objective where they do nothing; a reward that is named is the objective."""
    if config.objective == "auto" and (config.reward is not None or config.task.name in VERIFIED):
        config.objective = "reward"
    if config.objective == "preference" and config.task.name == "local" and config.task.format == "auto":
        config.task.format = "preference"
    found, written = fields(), config.objective in GENERATED
    pairs = config.objective == "preference" or (
        config.objective == "auto" and config.task.format == "preference"
    )
    if not pairs and config.preference_beta != found["preference_beta"].default:
        raise UserError(
            f"preference_beta={config.preference_beta:g}: is for objective=preference, not {config.objective}; leave it out"
        )
    if pairs and config.perturb == "nodes":
        raise UserError("objective=preference: recipe=node has losses of tokens alone; use another recipe")
    for name in ("reward", "reward_seconds"):
        if config.objective not in ("reward", "rank") and getattr(config, name) != found[name].default:
            raise UserError(
                f"{name}={getattr(config, name)}: objective={config.objective} asks no reward; leave one out"
            )
    for name in ("rank_by", "rank_best", "rank_line"):
        if config.objective != "rank" and getattr(config, name) != found[name].default:
            raise UserError(
                f"{name}={getattr(config, name)}: is for objective=rank, not {config.objective}; leave it out"
            )
    if config.rank_by == "file" and config.rank_best is not None:
        raise UserError(
            f"rank_best={config.rank_best}: whoever ranks names as many as they like; leave it out"
        )
    for name in ("max_new_tokens", "stop", "hold_probe", *ROLLOUT):
        evaluated = (
            name in ("max_new_tokens", "stop") and not config.task.choices
        )  # text to learn is judged by what is written
        if not (written or evaluated) and getattr(config, name) != found[name].default:
            raise UserError(
                f"{name}={getattr(config, name)!r}: no text is written with objective={config.objective}; leave it out"
            )
    if config.stop == "":
        raise UserError("stop is empty: give the text that ends what is written, or null")
    if not written:
        return
    if config.max_new_tokens >= config.max_length:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in max_length={config.max_length}"
        )
    if config.probes_per_forward not in ("auto", 1):
        raise UserError(
            f"probes_per_forward={config.probes_per_forward}: text is generated for one probe at a time; leave it out"
        )
    if config.members_per_batch not in ("auto", 1) and (config.elastic or config.perturb == "inplace"):
        other = "elastic=true" if config.elastic else "perturb=inplace"
        raise UserError(
            f"members_per_batch={config.members_per_batch}: {other} has one probe at a time; leave it out"
        )
    if config.temperature and config.elastic:
        raise UserError(f"temperature={config.temperature:g}: elastic=true writes greedily; leave one out")
    if config.cache_frozen is True:
        raise UserError("cache_frozen=true: keeps the outputs of whole rows, and text grows; leave it out")
    if config.perturb == "inplace" and config.hold_probe is True:
        raise UserError("hold_probe=true: perturb=inplace moves the weights themselves; leave it out")


def _check_snapshots(config: Config) -> None:
    every, found = config.snapshot_every, fields()
    for name in ("save_best", "early_stop"):
        if getattr(config, name) and not config.eval_every:
            raise UserError(
                f"{name}={getattr(config, name)}: needs evaluations during training; set eval_every, too"
            )
    if config.early_stop and config.denoise_every and config.eval_every % config.denoise_every:
        raise UserError(
            f"early_stop={config.early_stop}: a run may end at any evaluation, each of which must follow a denoising: "
            f"set eval_every to a multiple of denoise_every={config.denoise_every}"
        )
    unused: tuple[str, ...] = ("keep_last", "keep_best") if not every else ()
    unused += () if config.keep_best or config.save_best or config.early_stop else ("best_by",)
    for name in unused:
        if getattr(config, name) != found[name].default:
            wanted = "snapshot_every" if name != "best_by" else "keep_best, save_best or early_stop"
            raise UserError(f"{name}={getattr(config, name)}: does nothing without {wanted}; set that too")
    if every > config.steps:
        raise UserError(f"snapshot_every={every}: must not exceed steps={config.steps}")
    if config.keep_best and (not config.eval_every or every % config.eval_every):
        raise UserError(
            f"keep_best={config.keep_best}: each snapshot needs an evaluation at its step: "
            f"set eval_every={every}, or to a divisor of it"
        )


def _check_quantised(config: Config) -> None:
    for name, allowed in (("bits", (4, 8)), ("group", (32, 64, 128))):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise UserError(f"{name}={value}: use {', '.join(map(str, allowed))}")
    for name in ("group", "zero_points", "quantise_head"):
        value = getattr(config, name)
        if config.bits is None and value != fields()[name].default:
            raise UserError(f"{name}={value}: nothing is quantised here; set bits=4 or bits=8, too")


def check_value(name: str, value: Any, f: dataclasses.Field[Any]) -> None:
    """Raise UserError for a value, of its key's type, that is out of the key's limits."""
    m = f.metadata
    if isinstance(value, dict):
        for label, text in value.items():
            if not isinstance(text, str):
                raise UserError(f"{name}: {label} stands for {text!r}; give it some text")
            _check_text(f"{name}.{label}", f"{label}{text}")
    if value is None or isinstance(value, (dict, *SECTIONS.values())):
        return
    if isinstance(value, str):
        _check_text(name, value)
        allowed = m.get("one_of", ())
        if allowed and value not in allowed:
            kind = "number from" if str(f.type).startswith("float") else "whole number from"
            number = f" or a {kind} {m['least']}" if "least" in m else ""
            near = nearest(value, allowed)
            hint = f"; did you mean {near}?" if near and len(allowed) > 1 else ""
            raise UserError(f"{name}={value}: use {', '.join(allowed)}{number}{hint}")
        if "pattern" in m and not re.fullmatch(m["pattern"][0], value):
            raise UserError(f"{name}={value}: use {m['pattern'][1]}")
    elif not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{name}={value}: must be a finite number")
        for limit, holds, sign in (
            ("least", lambda v, b: v >= b, "≥"),
            ("above", lambda v, b: v > b, ">"),
            ("below", lambda v, b: v < b, "<"),
            ("most", lambda v, b: v <= b, "≤"),
        ):
            if limit in m and not holds(value, m[limit]):
                shown = value if isinstance(value, int) else f"{value:g}"
                raise UserError(f"{name}={shown}: must be {sign} {m[limit]}")


def _check_text(name: str, value: str) -> None:
    """Refuse what no file name, tokenizer or YAML file can hold."""
    bad = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        what = "a zero byte" if bad == "\0" else "bytes that are not UTF-8"
        raise UserError(f"{name.encode('ascii', 'replace').decode()}: holds {what}; give it plain text")
