"""Check what a ledger's header says, beyond its checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoft.config.check import check_value
from zoft.config.schema import fields
from zoft.errors import UserError
from zoft.ledger.format import Log, Record
from zoft.noise import spec
from zoft.noise.spec import tensor_id

DIMENSIONS = 16  # of a tensor
LARGEST = 1e30  # of a multiplier, a decay or a floor; fp32 ends at 3.4e38, and noise times this is near


def refuse_unsound(run: str | Path, log: Log) -> Log:
    """Return the log, if its header can be replayed: a checksum does not know what was written wrongly. Raises UserError."""
    if wrong := header_faults(log.header, log.records):
        raise UserError(f"{run}: ledger: {'; '.join(wrong)}")
    return log


def header_faults(header: Mapping[str, Any], records: Sequence[Record] = ()) -> list[str]:
    """Return what a header lacks or has wrong, beyond its checksum."""
    needed = "zoft seed noise noise_version base config storage compute trained plan".split()
    wrong = [f"its header has no {name}" for name in needed if name not in header]
    if header.get("noise_version", spec.VERSION) != spec.VERSION:
        wrong.append(f"its noise is of version {header['noise_version']}, this zoft makes {spec.VERSION}")
    wrong += [
        f"its header's {name} is no mapping"
        for name in ("config", "plan")
        if not isinstance(header.get(name, {}), dict)
    ]
    if not isinstance(header.get("base", ""), str):
        wrong.append("its header's base is no fingerprint")
    if not header.get("trained", True):
        wrong.append("its header's trained is empty")
    wrong += value_faults(header) + kind_faults(header)
    planned = plan_of(header).get("steps")
    if isinstance(planned, int) and not isinstance(planned, bool) and len(records) > planned:
        wrong.append(f"it has {len(records)} steps, and its header planned {planned}")
    vast = next(
        (r for r in records if not r.skipped and max(map(abs, (r.decay, *r.multipliers))) > LARGEST), None
    )
    if vast:
        wrong.append(
            f"step {vast.step} moves weights by {max(map(abs, (vast.decay, *vast.multipliers))):.3g}, which none can hold"
        )
    q, examples = header.get("q", 1), header.get("examples", 1)
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        return [*wrong, f"its header has examples={examples!r}"]
    if isinstance(q, bool) or not isinstance(q, int) or q < 1:
        return wrong if any("q=" in line for line in wrong) else [*wrong, f"its header has q={q!r}"]
    other = next((r for r in records if len(r.multipliers) != q * examples), None)
    if other:
        has = f"q={q}" if examples == 1 else f"q={q} for each of {examples} examples"
        wrong.append(f"step {other.step} has {len(other.multipliers)} directions, its header {has}")
    return wrong + trained_faults(header.get("trained", {}))


def value_faults(header: Mapping[str, Any]) -> list[str]:
    """Return what is no resolved value of its key, of those that the header shares with a config."""
    wrong, known = [], fields()
    shared = (
        "seed noise momentum eps q storage compute perturb mask sparsity mask_every blocks anchor "
        "eps_mode rho calibration_rows node_rank node_tokens node_inputs"
    )
    for name in shared.split():
        value = header.get(name)
        if name not in header or name not in known or (value is None and known[name].default is None):
            continue
        kind = str(known[name].type)
        right = str if kind.startswith("str") else int if kind.startswith("int") else (int, float)
        try:
            open_still = value == "auto" and name in ("storage", "compute", "perturb")
            if isinstance(value, bool) or not isinstance(value, right) or open_still:
                raise UserError(f"{name}={value!r}")
            check_value(name, value, known[name])
        except UserError as error:
            wrong.append(f"its header has {error}")
    return wrong


def kind_faults(header: Mapping[str, Any]) -> list[str]:
    """Return what is of another kind than its key in a header has, of those that no config has."""
    trained = header.get("trained")
    wrong = [
        f"its header's {name} is no text"
        for name in (
            "zoft",
            "data",
            "rows",
            "writing",
            "page",
            "adapter",
            "nodes",
            "estimator",
            "update",
            "reward",
        )
        if not isinstance(header.get(name, ""), str)
    ]
    for name in ("model", "versions", "evaluation", "floors", "turns"):
        if not isinstance(header.get(name, {}), dict):
            wrong.append(f"its header's {name} is no mapping")
    if isinstance(found := header.get("versions"), dict) and not all(
        isinstance(v, str) for v in found.values()
    ):
        wrong.append("its header's versions are no texts")
    if isinstance(found := header.get("evaluation"), dict):
        wrong += [
            f"its header's evaluation has no {k}"
            for k in ("rows", "asked")
            if not isinstance(found.get(k), str)
        ]
    if isinstance(floors := header.get("floors"), dict):
        odd = [
            n
            for n, x in floors.items()
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x < LARGEST
        ]
        odd += [n for n in floors if isinstance(trained, dict) and n not in trained]
        wrong += [f"its header's floors has {odd[0]}={floors[odd[0]]!r}"] if odd else []
    if isinstance(turns := header.get("turns"), dict):
        odd = [n for n, x in turns.items() if isinstance(x, bool) or not isinstance(x, int) or x < 0]
        odd += [n for n in turns if isinstance(trained, dict) and n not in trained]
        wrong += [f"its header's turns has {odd[0]}={turns[odd[0]]!r}"] if odd else []
    if isinstance(config := header.get("config"), dict) and not all(
        isinstance(v, str) for v in config.values()
    ):
        wrong.append("its header's config has values that are no hashes")
    return wrong


def plan_of(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how the run was made; empty where the header does not say."""
    plan = header.get("plan")
    return plan if isinstance(plan, dict) else {}


def trained_faults(trained: Any) -> list[str]:
    """Return what is wrong with a header's trained tensors."""
    for name, entry in trained.items() if isinstance(trained, dict) else (("", None),):
        match entry:
            case [int(tensor), [*shape], "fp64" | "fp32" | "fp16" | "bf16"] if (
                all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in shape)
                and len(shape) <= DIMENSIONS
            ):
                if tensor != tensor_id(name):
                    return [f"its header gives {name} the noise of another tensor"]
            case _:
                return ["its header does not give trained tensors as name: [id, shape, dtype]"]
    return []
