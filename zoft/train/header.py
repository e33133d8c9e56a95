"""Make and compare a ledger's header: what replay needs beside the base, and how the run was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zoft import __version__
from zoft.config.digest import LATER, changed, digests
from zoft.config.schema import ADAPTERS, Config, fields
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.folder import write
from zoft.method import space
from zoft.method.estimators.named import ESTIMATORS, estimator_of, examples_per_step
from zoft.method.recipes import method_of
from zoft.method.rules import update_name
from zoft.method.space import Trained
from zoft.models.adapters.attach import START, adapter_fingerprint
from zoft.noise import spec

# What it means where a resumed run's ledger says something else.
DIFFERS = {
    "base": "starts from other weights ({found}) than this model has ({value})",
    "data": "was begun on other training data: put back what was changed there",
    "rows": "was begun on rows with other columns or answers: put back what was changed there",
    "writing": "was begun with other ends of texts, or other words of the tokenizer, than the model's folder has now: put back what "
    "was changed there",
    "noise_version": "has noise of version {found}, this zoft makes version {value}: use the zoft that wrote it",
    "page": "was begun with another text of its recipe ({found}) than that file has now ({value}): put back what it was",
    "nodes": "was begun with other measurements of its layers than nodes.safetensors has now: put that file back",
    "adapter": "starts from an adapter ({found}) that is not made here ({value}): put back start.safetensors",
}

# What a ledger's header says of the run, beside the base and the trained tensors.
PLAN = (
    "seed",
    "noise",
    "momentum",
    "eps",
    "q",
    "storage",
    "compute",
    "perturb",
    "mask",
    "sparsity",
    "eps_mode",
)
# Keys of the plan that came later: a header lacks them where they are at their default.
OWN = ("blocks", "mask_every", "anchor", "rho", "calibration_rows", "node_rank", "node_tokens", "node_inputs")
# What it says for people, of how the run began; another machine may go on with it otherwise.
MADE = ("recipe", "train", "steps", "lr", "schedule", "warmup", "clip", "meazo", "weight_decay", "batch_size", "accumulate",
        "device", "threads", "probes_per_forward", "cache_frozen")  # fmt: skip


# Keys of a model's config that decide nothing of what it computes.
NOT_COMPUTED = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "id2label",
    "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions", "task_specific_params",
    "chunk_size_feed_forward", "is_encoder_decoder", "quantization_config", "initializer_range", "auto_map",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "finetuning_task", "torchscript",
}  # fmt: skip
SHORT = 64  # characters of a value that the header keeps as it is; a longer one is hashed


def header_of(
    config: Config,
    base: str,
    trained: Sequence[Trained],
    train: Sequence[Example] = (),
    *,
    model: Any = None,
    held_out: Sequence[Example] = (),
) -> dict[str, Any]:
    """Return the ledger's header: what the run is, all that replay needs beside the base, and how the run was made.

    base: the fingerprint of the weights. train, held_out: the training and the evaluation rows. model: whose config is kept.
    """
    tensors = {t.name: [t.id, list(t.stored.shape), dtype_name(t.stored.dtype)] for t in trained}
    known = {k: getattr(config, k) for k in PLAN}
    if (name := estimator_of(config).name) not in LATER["estimator"]:
        known["estimator"] = name
    if (name := update_name(config)) not in LATER["update"]:
        known["update"] = name
    if config.directions == "example":
        known["examples"] = examples_per_step(config)
    known |= {k: value for k in OWN if (value := getattr(config, k)) not in LATER[k]}
    if turns := {t.name: t.turn.mine for t in trained if t.turn is not None}:
        known["turns"] = turns
    if config.train in ADAPTERS:
        known["adapter"] = adapter_fingerprint(trained)
    found: dict[str, Any] = {
        "zoft": __version__,
        "noise_version": spec.VERSION,
        "base": base,
        "config": digests(config),
    }
    found["versions"] = versions()
    if model is not None:
        found["model"] = model_settings(model)
    if train:
        found["data"] = data_digest(train)
    if held_out:
        named = json.dumps(
            [Path(str(config.task.eval)).name, config.task.num_eval, config.eval_limit]
        ).encode()
        asked = hashlib.blake2b(named, digest_size=4).hexdigest()
        found["evaluation"] = {"rows": data_digest(held_out), "asked": asked}
    found |= page_of(config)
    floors = {t.name: t.floor for t in trained if t.floor is not None}
    found |= {"floors": floors} if floors else {}
    return {**found, **known, "trained": tensors, "plan": {k: getattr(config, k) for k in MADE}}


def versions() -> dict[str, str]:
    """Return the versions of what computes a run's numbers."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {**found, "python": platform.python_version()}


def model_settings(model: Any) -> dict[str, Any]:
    """Return what a model's config says of its computation, {key: value, or a hash of a long one}.

    Ids of tokens are among it: padding, beginnings and ends. NaN and infinity are kept as text.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {}
    for key, value in sorted(base.config.to_dict().items()):
        if key in NOT_COMPUTED or value is None:
            continue
        text = json.dumps(value, sort_keys=True, default=str)
        plain = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
        kept = value if plain else text
        found[key] = kept if len(text) <= SHORT else hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return found


def said_of_resume(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the lines about what a resumed run has otherwise than it began with, which need not change its weights.

    found: the ledger's header; one of an older zoft says less. wanted: the header that the run would begin with now.
    Raises UserError where the evaluation rows have changed under the same keys.
    """
    lines = []
    before = {"zoft": found.get("zoft"), **found.get("versions", {})}
    now = {"zoft": wanted.get("zoft"), **wanted.get("versions", {})}
    other = [f"{k} {before[k]} (now {now[k]})" for k in now if before.get(k, now[k]) != now[k]]
    if other:
        lines.append(f"this run was begun with {', '.join(other)}; steps from here on may round otherwise")
    was, has = found.get("evaluation"), wanted.get("evaluation")
    if was and has and was["rows"] != has["rows"]:
        if was["asked"] == has["asked"]:
            raise UserError(
                f"{folder}: its ledger was begun with other evaluation rows ({was['rows']}) than task.eval gives now "
                f"({has['rows']}): put back what was changed there"
            )
        lines.append(
            "task.eval, task.num_eval, eval_limit: other evaluation rows than before; figures before and after do not compare"
        )
    return lines


def page_of(config: Config) -> dict[str, str]:
    """Return what a ledger's header says of a recipe's page that is the user's own."""
    digest = method_of(config.recipe).digest
    return {"page": digest} if digest else {}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that config and ledger have for a dtype."""
    return next(name for name, d in space.DTYPES.items() if d == dtype)


def data_digest(train: Sequence[Example]) -> str:
    """Return a hash of the training examples' tokens, in their order."""
    h = hashlib.blake2b(digest_size=16)
    for e in train:
        rest: list[Any] = [e.after] if e.masked else [e.scored] if e.scored is not None else []
        h.update(json.dumps([e.contexts, e.completions, e.gold, *rest]).encode())
    return f"blake2b:{h.hexdigest()}"


def with_plan(config: Config, found: Mapping[str, Any]) -> Config:
    """Return the config with the plan that a ledger was written under."""
    plan = {k: found[k] for k in PLAN if k in found} | {k: found.get(k, LATER[k][0]) for k in OWN}
    named = found.get("estimator", "two_sided")
    ruled = found.get("update", "sgd")
    # Those of a page of the user's own are `auto`: the page says which.
    return replace(
        config,
        **plan,
        estimator=named if named in ESTIMATORS else "auto",
        update=ruled if ruled in fields()["update"].metadata["one_of"] else "auto",
        directions="example" if "examples" in found else "shared",
    )


def agree(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue or replay a ledger on anything but what it was written on."""
    if "config" in wanted and (began := found.get("update", "sgd")) != wanted.get("update", "sgd"):
        raise UserError(f"{folder}: its ledger was written with update={began}: put that back in config.yaml")
    for name, value in wanted.items():
        if (
            name in ("zoft", "plan", "reward", "versions", "evaluation")
            or name not in found
            or found[name] == value
        ):
            continue
        other = DIFFERS.get(name, f"was written with {name}={found[name]}, not {value}")
        if name == "config":
            keys = changed(found[name], value)
            if not keys:  # a zoft that knows other keys
                continue
            other = f"was begun with another {', '.join(keys)} than config.yaml has now: put back what it was"
        if name == "model":  # a key that one of them lacks belongs to another version of transformers
            keys = [k for k in value if k in found[name] and found[name][k] != value[k]]
            if not keys:
                continue
            was, has = found[name][keys[0]], value[keys[0]]
            other = f"was begun on a model whose config.json has {keys[0]}={was}, not {has}: put that back"
            raise UserError(f"{folder}: its ledger {other}")
        if name == "trained":
            names = [n for n in {**found[name], **value} if found[name].get(n) != value.get(n)]
            other = f"trains other tensors than this model has now, {names[0]} among them"
        raise UserError(f"{folder}: its ledger {other.format(found=found[name], value=value)}")


def keep_prefix_start(config: Config, trained: Sequence[Trained], folder: Path) -> None:
    """Write a prefix's start beside the ledger: another machine's forward pass would round otherwise."""
    from safetensors.torch import save

    from zoft.parallel.world import this_world

    path = folder / START
    if config.train == "prefix" and this_world().rank == 0 and not path.exists():
        write(path, save({t.name: t.stored.detach().cpu().contiguous() for t in trained}))
