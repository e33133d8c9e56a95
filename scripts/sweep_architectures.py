"""Is the probe axis exact on every architecture that transformers knows? A tiny random model of each is asked.

Columns: off, the largest difference of a stacked loss from that of a copy whose weights were really set to
θ + s·z, relative to 1 + loss, over five probes, padding to the right, to the left and none, and a second batch
of other size and padding; probes apart, the smallest difference between two probes, which is what a mistake would
look like; sites, the modules that work per probe; seconds, what finding and proving them took.

python scripts/sweep_architectures.py                       # all three kinds, a table
python scripts/sweep_architectures.py --kind causal --only llama
python scripts/sweep_architectures.py --kind causal --train lora   # or prefix, prompt: beside a frozen model
python scripts/sweep_architectures.py --kind causal --noise rank1   # or gaussian_flipped, rademacher_flipped, …
python scripts/sweep_architectures.py --json sweep.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import inspect
import json
import platform
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import shrink
import torch
import transformers as hf
from torch import nn

from zoft.config.schema import ADAPTERS, Config
from zoft.errors import UserError
from zoft.method import space
from zoft.method.estimators.estimator import Probe
from zoft.models.adapters import attach
from zoft.noise import noise
from zoft.noise.spec import GAUSSIAN, KINDS, RADEMACHER
from zoft.probe import proof
from zoft.probe.axis import ProbeAxis

EPS, SEED, STEP = 1e-2, 7, 3
PROBES = [Probe(0, EPS), Probe(0, -EPS), Probe(1, EPS), Probe(1, -EPS), Probe(1, 8 * EPS)]
ORDER = ["WRONG", "not built", "one probe per forward", "stacked"]  # worst first
SIDES = ["right", "left", "none"]
EXACT = 1e-5  # largest |stacked loss - twin's| / (1 + |twin's|), fp32


@dataclasses.dataclass
class Batch:
    inputs: dict[str, torch.Tensor]  # each [rows, T]

    @property
    def rows(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def repeat(self, probes: int) -> Batch:
        return Batch({k: v.repeat(probes, 1) for k, v in self.inputs.items()})


@dataclasses.dataclass
class Result:
    """One architecture; over several sides of padding, the worst of them."""

    kind: str
    name: str
    outcome: str  # stacked | one probe per forward | WRONG | not built
    worst: float = float("nan")  # largest relative difference of a loss from the twin's
    apart: float = float("nan")  # smallest relative difference between the losses of two probes
    sites: int = 0
    seconds: float = 0.0
    note: str = ""


def batch(model: nn.Module, side: str, decoder: bool, rows: int, length: int, seed: int) -> Batch:
    """Random tokens; every other row is padded by three on that side ("none": no row is)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, shrink.VOCAB, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if side != "none":
        mask[1::2, slice(-3, None) if side == "right" else slice(3)] = 0
    pad = getattr(model.config, "pad_token_id", None)
    ids[mask == 0] = pad if isinstance(pad, int) and 0 <= pad < shrink.VOCAB else 4
    inputs = {"input_ids": ids, "attention_mask": mask}
    if decoder:
        inputs["decoder_input_ids"] = torch.randint(5, shrink.VOCAB, (rows, length - 2), generator=generator)
    return Batch(inputs)


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[rows] mean log-probability of the row's own tokens: any function of the logits of one row will do."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # within a peft model
    known = inspect.signature(type(base).forward).parameters
    inputs = {k: v for k, v in batch.inputs.items() if k in known or k in ("input_ids", "attention_mask")}
    out = model(**inputs, **({"use_cache": False} if "use_cache" in known else {}))
    logits = out.logits if hasattr(out, "logits") else out[0]
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    logits = logits[:, getattr(model, "prompt_length", 0) :]
    logp = logits.float().log_softmax(-1)
    assert logp.shape[:2] == ids.shape, f"logits {tuple(logits.shape)} for tokens {tuple(ids.shape)}"
    picked = logp.gather(-1, ids.clamp(max=logp.shape[-1] - 1)[..., None])[..., 0]  # [rows, T]
    if "decoder_input_ids" not in inputs:
        picked = picked * batch.inputs["attention_mask"]
    return -picked.sum(-1) / picked.shape[-1]


@torch.no_grad()
def twin(
    model: nn.Module, trained: list[space.Trained], batch: Batch, probes: list[Probe], noise_kind: str
) -> torch.Tensor:
    """[P, rows]: an untouched copy, its weights set to θ + s·z with z asked of the noise itself, run plainly."""
    rows, names = [], {t.name: t for t in trained}
    for p in probes:
        other = copy.deepcopy(model)
        for name, param in other.named_parameters():
            if name in names:
                where = {"seed": SEED, "step": STEP, "direction": p.direction, "width": names[name].width}
                z = noise.direction(param.shape, names[name].id, noise=noise_kind, **where)
                param.data = param.data + p.scale * z.to(param.dtype)
        rows.append(losses(other, batch))
    return torch.stack(rows)


def with_adapter(model: nn.Module, train: str) -> nn.Module:
    """The model with what `train` adds to it, LoRA's B moved from where it hides A."""
    made = attach.attach_adapter(model, Config(train=train, virtual_tokens=None if train == "lora" else 3))
    generator = torch.Generator().manual_seed(1)
    for key, p in attach.named(made):
        if "lora_B" in key or "lora_embedding_A" in key:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    if train == "prompt":
        made.prompt_length = 3
    return made


@torch.no_grad()
def check(kind: str, name: str, side: str, train: str = "all", drawn: str = GAUSSIAN) -> Result:
    """Find the sites of a tiny model of the architecture and compare all probes with the twin."""
    result = Result(kind, name, "not built")
    start = time.perf_counter()
    try:
        model = shrink.model(kind, name)
        if train in ADAPTERS:
            model = with_adapter(model, train)
        decoder = kind == "seq2seq"
        double = batch(model, side, decoder, 4, shrink.TOKENS, seed=2)
        small = Batch({k: v[:2].clone() for k, v in double.inputs.items()})
        again = [losses(model, double) for _ in range(2)]
        assert torch.isfinite(again[0]).all(), "its losses are not finite"
        assert torch.allclose(*again, rtol=1e-5), "its losses differ from one forward to the next"
    except Exception as error:
        result.note = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        result.seconds = time.perf_counter() - start
        return result
    copied = copy.deepcopy(model)
    trained = space.adopt(model, space.train_names(model, train))
    start = time.perf_counter()
    try:
        proved = RADEMACHER if drawn == GAUSSIAN else drawn
        found = proof.find_sites(model, trained, lambda b: losses(model, b), small, double, EPS, proved)
    except UserError as error:
        if train not in ADAPTERS:  # for a model's own weights there is always a way
            raise
        result.note = f"refused: {error}"
        return result
    result.seconds = time.perf_counter() - start
    axis = ProbeAxis(proof.live(trained, found), found.sites, seed=SEED, kind=drawn)
    # A run's batches have other sizes than the one that was looked at, and other padding.
    fixed = getattr(model.config, "model_type", "") == "perceiver"  # gives as many logits as it has positions
    length = shrink.TOKENS + (0 if fixed else 3)
    other = batch(model, "right" if side == "none" else "none", decoder, 3, length, seed=4)
    groups = [PROBES] if found.stacked else [[p] for p in PROBES]
    result.worst, result.apart = 0.0, float("inf")
    for data in (double, other):
        expected = twin(copied, trained, data, PROBES, drawn)  # [P, rows]
        got = []
        for group in groups:
            with axis.at(STEP, group, data.rows):
                got.append(losses(model, data.repeat(len(group))).view(len(group), -1))
        off = (torch.cat(got) - expected).abs() / (1 + expected.abs())
        result.worst = max(result.worst, float(off.nan_to_num(nan=float("inf")).max()))
        pairs = [(expected[i] - expected[j]).abs().max() for i in range(len(PROBES)) for j in range(i)]
        result.apart = min(result.apart, float(min(pairs) / (1 + expected.abs().max())))
    result.sites, result.note = len(found.sites), found.note
    if found.unread:
        result.note += f"{'; ' if result.note else ''}{len(found.unread)} unread"
    result.outcome = (
        "WRONG" if result.worst > EXACT else "stacked" if found.stacked else "one probe per forward"
    )
    return result


def limited(
    kind: str, name: str, side: str, seconds: int, train: str = "all", drawn: str = GAUSSIAN
) -> Result:
    """check under a time limit; whatever goes wrong in finding sites is WRONG, never left out."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return check(kind, name, side, train, drawn)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = str(error).strip().splitlines()[:1]
        note = f"{type(error).__name__}: {' '.join(first)} ({Path(where.filename).name}:{where.lineno})"
        return Result(kind, name, "WRONG", note=f"{side} padding: {note}")
    finally:
        signal.alarm(0)


def worst_of(sides: list[Result]) -> Result:
    """One result of those of the sides of padding."""
    first = min(sides, key=lambda r: ORDER.index(r.outcome))
    return dataclasses.replace(
        first,
        worst=max(r.worst for r in sides),
        apart=min(r.apart for r in sides),
        seconds=max(r.seconds for r in sides),
    )


def line(r: Result) -> str:
    figures = (
        f"{r.worst:.1e} | {r.apart:.1e} | {r.sites} | {r.seconds:.2f}"
        if r.outcome in ORDER[2:]
        else " | | | "
    )
    return f"| {r.kind} | {r.name} | {r.outcome} | {figures} | {r.note[:200]} |"


def summary(results: list[Result]) -> dict[str, int]:
    count = [r.outcome for r in results].count
    built = len(results) - count("not built")
    return {
        "exact": count("stacked"), "of": built, "one probe per forward": count("one probe per forward"),
        "wrong": count("WRONG"), "not built": count("not built"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=list(shrink.KINDS), help="one kind of head (default: all)")
    parser.add_argument("--only", action="append", help="a model type, e.g. llama; may be repeated")
    parser.add_argument(
        "--side", choices=SIDES, help="padding of the batch that sites are found on (default: each)"
    )
    parser.add_argument("--train", default="all", help="trained tensors, as in a config (default: all)")
    parser.add_argument("--noise", default=GAUSSIAN, choices=sorted(KINDS), help="what z is drawn from")
    parser.add_argument("--limit", type=int, default=60, help="seconds an architecture may take")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, transformers {hf.__version__}, {platform.machine()}, {len(PROBES)} probes, fp32\n"
    )
    print("| kind | architecture | outcome | off | probes apart | sites | seconds | note |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for kind in [args.kind] if args.kind else shrink.KINDS:
        for name in shrink.KINDS[kind]:
            if args.only and name not in args.only:
                continue
            sides = [args.side] if args.side else SIDES
            results.append(
                worst_of([limited(kind, name, side, args.limit, args.train, args.noise) for side in sides])
            )
            print(line(results[-1]), flush=True)
            gc.collect()
    totals = {
        kind: summary([r for r in results if r.kind == kind])
        for kind in dict.fromkeys(r.kind for r in results)
    }
    if args.json:
        args.json.write_text(
            json.dumps({"results": [dataclasses.asdict(r) for r in results], "totals": totals}, indent=1)
        )
    print()
    for kind, t in [*totals.items(), ("all", summary(results))]:
        print(
            f"{kind}: exact {t['exact']} of {t['of']}, one probe per forward {t['one probe per forward']}, "
            f"wrong {t['wrong']}, not built {t['not built']}  "
        )
    sys.exit(1 if any(t["wrong"] for t in totals.values()) else 0)


if __name__ == "__main__":
    main()
