"""Estimate what a run will take, before a weight is loaded: memory, and time per step, beside training with gradients."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zoft.config.schema import ADAPTERS, GENERATED, Config
from zoft.data.encode import encode
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.evaluation.evaluate import room_of
from zoft.method import space
from zoft.method.auto_lr import forwards_of, lines_allowed
from zoft.method.blocks import places_of
from zoft.method.estimators.named import (
    examples_per_step,
    forwards_per_step,
    probes_per_step,
    second_probes,
)
from zoft.method.momentum import buffer_beta, window, window_beta
from zoft.method.rules import rule_of, rule_words
from zoft.method.space import train_names
from zoft.models import footprint
from zoft.models.adapters.attach import attach_adapter, load_adapter
from zoft.models.adapters.kept_in_place import adapter_folder
from zoft.models.footprint import Cost, cost
from zoft.models.kind import blocks_of
from zoft.models.load import find_model
from zoft.models.quant.linear import Scales, count_numbers, quantised_layers
from zoft.models.skeleton import quantised, skeleton
from zoft.noise import noise
from zoft.noise.noise import width_of
from zoft.noise.spec import FLIPPED, KINDS, RANK1, Update
from zoft.objectives.losses import Batch, collate, losses
from zoft.probe.frozen_blocks import FROZEN_BYTES, frozen_blocks
from zoft.probe.scratch import SLAB
from zoft.run.stops import due_at
from zoft.train.axis import drawn, group_of, memory_left
from zoft.train.batches import batch_indices
from zoft.train.parts import refuse_unquantised, resolve_device, resolve_precision, run_tokenizer

MEASURED = 0.2  # seconds that a rate is measured for
ROWS_MAX = 1 << 14  # of the product

LORA_RANK = 8  # of the LoRA run beside: pairs on query and value projections
# What cuBLAS keeps for itself on a GPU: 32 MiB (on Hopper; less on older ones) on each of two streams.
WORKSPACES = 2 * (32 << 20)


def estimate_run(config: Config, rows: Sequence[Example] | None = None) -> dict[str, Any]:
    """Return the bytes and seconds of a run with this config.

    peak = weights + momentum or state + base (anchor) + scratch + workspaces + kept frozen outputs + max(activations of a training, an evaluation forward)
    seconds a step = flops of its forwards ÷ rate of a matrix product + trained numbers ÷ rate of noise

    rows: training examples (None: the config's data; where that cannot be read, rows of max_length); the longest
    says the memory, the usual batch the time. Rates are measured here, on config.device. Returns {weights: {dtype:
    bytes}, weights_bytes, momentum_bytes, state_bytes, base_bytes, scratch_bytes, frozen_bytes, activation_bytes, evaluation_bytes,
    peak_bytes, seconds_per_step, seconds, parameters, trained, rows, tokens, adamw: {peak_bytes, seconds_per_step},
    lora: {the same}, lr_forwards: what lr=auto takes at most, config: {resolved storage, compute, perturb, probes_per_forward, device, steps}, notes: [str]}.
    Raises UserError as a run would.
    """
    find_model(config.model)  # a mistake shows before data loads
    config = resolve_device(config)
    notes: list[str] = []
    tested: int | None = None
    if rows is None:
        rows, tested, note = _examples(config)
        notes += [note] if note else []
    longest = max(rows, key=lambda e: e.length)
    model = skeleton(config)
    load = sum(p.numel() * p.element_size() for p in model.parameters())
    quantised(config, model)
    refuse_unquantised(config, model)
    if config.train in ADAPTERS:
        model = attach_adapter(model, config)
    elif place := adapter_folder(config):
        model = load_adapter(model, place)
    gradients = model
    nodes = config.perturb == "nodes"
    update_pass = nodes and config.node_inputs == "pass"
    names = train_names(model, config.train, nodes)
    if quantised_layers(model):
        gradients = skeleton(config)  # training with gradients wants the weights
        if config.device != "cpu" or config.bits is None:
            load = 0  # layer by layer, on the device; or they come quantised
    config = resolve_precision(config, model, names)
    inplace = config.perturb == "inplace"
    sizes = weights(model, names, config.storage, config.compute, uniform=inplace)
    total = sum(sizes.values())
    # Moved in place, a model runs on its stored weights; an adapter's base does not.
    compute = space.DTYPES[config.storage if inplace and config.train not in ADAPTERS else config.compute]
    for p in [*model.parameters(), *gradients.parameters()]:
        if not isinstance(p, Scales):
            p.data = p.data.to(compute)

    auto = config.probes_per_forward == "auto"
    each = probes_per_step(config)
    probes = 1 if inplace else min(2 if auto else int(config.probes_per_forward), each)
    batch = collate([longest] * config.batch_size)
    if (
        auto and probes > 1 and config.objective not in GENERATED
    ):  # as a run's start finds, if all can be stacked
        alone = max(1, _forward(model, batch, notes).activations)
        probes = group_of(config, alone, max(0, memory_left(config.device) - total) // 2)
    train = _forward(model, batch.repeat(probes), notes)
    rows_each = batch.rows // config.batch_size
    held_out = collate(
        [longest] * max(1, min(room_of(config.device) // (longest.length * rows_each), tested or 1 << 30))
    )
    evaluation = _forward(model, held_out, notes).activations
    trained = sum(p.numel() for n, p in model.named_parameters() if n in set(names))
    few = batch.tokens is not None  # of the output matrix only the candidates' rows are made
    kind, made, stays = drawn(config), min(probes, 2), False
    flipped = not nodes and config.mask == "none" and bool(KINDS[kind] & FLIPPED)
    if flipped:
        made = 1  # what a step's directions share
    elif (
        config.mask == "none" and kind == RANK1 and config.device == "cpu"
    ):  # a GPU may rather write the probes
        made, stays = 1, space.DTYPES[config.storage] == compute
    scratch = 0 if inplace else _scratch(model, names, compute, made, few, stays)
    if flipped:  # the second product; of the output matrix, of few rows
        blocks = [
            m for m in model.modules() if type(m) is nn.Linear and m is not model.get_output_embeddings()
        ]
        widest = max((m.out_features for m in blocks), default=0)
        scratch += batch.inputs["input_ids"].numel() * probes * widest * compute.itemsize
    if config.train in ADAPTERS and not inplace:
        # cuda.axis.Pack, in 32 and 16 bits
        packed = config.train == "lora" and config.device.startswith("cuda") and rule_of(config) is None
        scratch = trained * (6 * each if packed else 4 * probes)
    if nodes:
        scratch = _node_bytes(config, model, names, batch.inputs["input_ids"].numel() * probes)
        third = "the update pass is a third forward" if update_pass else "the probes' inputs are kept"
        notes.append(f"{third}; the products of the estimate are not counted in seconds_per_step")
    if config.objective in GENERATED:
        scratch += 0 if inplace or config.hold_probe is False else sum(_held(config, model, names, compute))
        notes.append(
            f"objective={config.objective}: seconds_per_step is that of the prompts alone; each of up to {config.max_new_tokens} "
            "tokens takes a small forward more, and its keys and values some memory"
        )
    momentum = (8 if compute == torch.float64 else 4) * trained if buffer_beta(config) else 0
    base = _stored(model, names, config, inplace) if config.anchor else 0
    rule = rule_of(config)
    state = len(rule.state) * (8 if config.storage == "fp64" else 4) * trained if rule else 0
    if rule:
        notes.append(
            f"{rule_words(config)}: its passes are plain tensor operations, slower than what seconds_per_step counts"
        )
    measured = forwards_of(config, lines_allowed(config)) if config.lr == "auto" else 0
    if measured:
        notes.append(
            f"lr=auto: at most {measured} forwards before the first step, "
            f"{measured / config.steps / forwards_per_step(config):.1%} of the run's, and a second copy of the trained tensors meanwhile"
        )
    frozen, share = _frozen(config, model, names, rows, tested)
    spaces = WORKSPACES if config.device.startswith("cuda") else 0
    peak = max(
        load, total + momentum + state + base + scratch + spaces + frozen + max(train.activations, evaluation)
    )

    own = config.directions == "example"
    tokens, directions = batch.inputs["input_ids"].numel() * probes, examples_per_step(config) * config.q
    speed = rates(config.device, compute, tokens, _width(model), kind, directions if own else 1)
    usual = train.flops * _usual_width(config, rows)
    flops = usual * share * (each + second_probes(config) + update_pass) / probes * config.accumulate
    flops += usual * (1 - share) / probes / config.batch_size * _met(config, rows) / config.steps
    if flipped:
        flops *= 2  # a product with the shared noise beside each with the weights
    passes = 0.0 if nodes else float(each if inplace else 1 if own else config.q)
    if config.blocks != "all":  # what a step leaves alone gets no noise
        passes /= 1 + max(places_of(model, names, config.blocks)[0].values())
    if beta := window_beta(config):
        passes += config.q * window(beta)  # drawn again, a pass each at most
    seconds = flops / speed["flops"] + passes * trained / speed["noise"]
    before = seconds * measured / forwards_per_step(config)
    # Each denoising draws all directions from the start again.
    redrawn = sum(t for t in range(config.steps + 1) if "denoise" in due_at(config, t))
    denoising = redrawn * config.q * trained / speed["noise"]
    return {
        "weights": sizes, "weights_bytes": total, "momentum_bytes": momentum, "state_bytes": state, "base_bytes": base, "scratch_bytes": scratch, "frozen_bytes": frozen,
        "activation_bytes": train.activations, "evaluation_bytes": evaluation, "peak_bytes": peak,
        "seconds_per_step": seconds, "seconds": seconds * config.steps + denoising + before, "denoising_seconds": denoising,
        "lr_forwards": measured, "flops_per_step": flops, "rates": speed,
        "parameters": count_numbers(model), "trained": trained,
        "rows": batch.rows, "tokens": batch.inputs["input_ids"].shape[1],
        **_with_gradients(gradients, batch, usual / probes / speed["flops"] * config.accumulate),
        "config": {k: getattr(config, k) for k in ("storage", "compute", "device", "steps")}
        | {"perturb": config.perturb if inplace or nodes else "probes", "probes_per_forward": probes},
        "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip


def _node_bytes(config: Config, model: nn.Module, names: Sequence[str], tokens: int) -> int:
    """Bytes that node perturbation takes beside weights and activations: at most, for inputs that layers share count once.

    Eigenpairs of every layer's input; of the largest layer Ĝ, the moved matrix and a temporary, fp32 each, and the signs of
    a batch's tokens twice; every layer's inputs, where they are kept.
    """
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if n in set(names)]
    kept = sum(4 * max(shape) * min(config.node_rank, max(shape)) for shape in shapes)
    if config.node_inputs == "kept":  # of one microbatch after another, all of a step's
        rows = tokens if config.node_tokens == "all" else config.batch_size * int(config.node_tokens)
        kept += sum(4 * rows * max(shape) for shape in shapes) * config.accumulate
    return kept + max(12 * a * b + 8 * tokens * max(a, b) for a, b in shapes)


def _held(config: Config, model: nn.Module, names: Sequence[str], compute: torch.dtype) -> Iterator[int]:
    """Bytes of each trained tensor at one probe, where its text is written with weights made once."""
    for name, p in model.named_parameters():
        if name in set(names):
            wide = config.train in ADAPTERS or p.ndim <= 1
            yield p.numel() * (max(4, compute.itemsize) if wide else compute.itemsize)


def weights(
    model: nn.Module, names: Sequence[str], storage: str, compute: str, *, uniform: bool = False
) -> dict[str, int]:
    """Return the bytes of a model's tensors by dtype, once space.place_in_precision has given each its precision."""
    chosen = set(names)
    store = space.DTYPES[storage]
    one_dim = store if uniform or store == torch.float64 else torch.float32
    sizes: Counter[str] = Counter()
    for name, p in model.named_parameters():
        dtype = p.dtype
        if isinstance(p, Scales):
            dtype = torch.float64 if store == torch.float64 and name in chosen else torch.float32
        elif name in chosen:
            dtype = one_dim if p.ndim <= 1 else store
        elif dtype in space.DTYPES.values():
            dtype = space.DTYPES[compute]
        sizes[str(dtype).removeprefix("torch.")] += p.numel() * dtype.itemsize
    for b in model.buffers():
        sizes[str(b.dtype).removeprefix("torch.")] += b.numel() * b.element_size()
    return dict(sizes)


def _stored(model: nn.Module, names: Sequence[str], config: Config, uniform: bool) -> int:
    """Bytes of a second copy of the trained tensors, as they are stored."""
    one = nn.Module()
    for i, (n, p) in enumerate(model.named_parameters()):
        if n in set(names):
            one.register_parameter(str(i), p)
    own = [n for n, _ in one.named_parameters()]
    return sum(weights(one, own, config.storage, config.compute, uniform=uniform).values())


def _examples(config: Config) -> tuple[list[Example], int | None, str]:
    """(training examples, how many there are to evaluate on, "" or why they are made up)."""
    from zoft.data import tasks
    from zoft.data.tasks import subset

    try:
        data = tasks.load_task(config.task, config.limits)
        tested = len(subset(data.eval, config.eval_limit))
        rows = encode(data.train, run_tokenizer(config), data, config.max_length, pack=data.pack)
        return rows, tested, ""
    except UserError as error:
        context = (0,) * config.max_length
        made = Example((context, context), ((1,), (2,)), 0, "choice", True)
        note = f"the data cannot be read here ({error}): rows of max_length={config.max_length} are assumed"
        return [made], None, note


def _usual_width(config: Config, rows: Sequence[Example]) -> float:
    """Tokens of the run's first batches, padding included, ÷ those of a batch of the longest example."""
    widths = [
        max(rows[i].length for i in picks)
        for step in range(min(config.steps, 16))
        for picks in batch_indices(
            step, n=len(rows), batch_size=config.batch_size, accumulate=1, seed=config.seed
        )
    ]
    return sum(widths) / len(widths) / max(e.length for e in rows)


def _met(config: Config, rows: Sequence[Example]) -> int:
    """Examples that a run sees."""
    return min(len(rows), config.steps * config.batch_size * config.accumulate)


def _frozen(
    config: Config, model: Any, names: Sequence[str], rows: Sequence[Example], tested: int | None
) -> tuple[int, float]:
    """With cache_frozen: (bytes of kept hidden states, share of the blocks that a step still runs).

    tested: rows to evaluate on; None takes those training rows that the steps do not meet.
    """
    auto = config.cache_frozen == "auto"
    if not config.cache_frozen or config.perturb == "inplace" or (auto and config.device.startswith("cuda")):
        return 0, 1.0
    first, count = frozen_blocks(model, {id(p) for n, p in model.named_parameters() if n in set(names)})
    if first in (0, count) or (auto and 2 * first < count):
        return 0, 1.0
    inside = f"{blocks_of(model)[0]}."
    outside = {n for n in names if not n.startswith(inside)}  # frozen_blocks has looked where these are all
    if len(outside) < len(names) and not outside <= set(train_names(model, "last-1")):
        return 0, 1.0  # something is trained that may come before the blocks
    states = sum(
        len(row) for row in {c + t[:-1] + e.after for e in rows for c, t in zip(e.contexts, e.completions)}
    )
    met = _met(config, rows)
    row = states / len(rows) * _width(model) * next(model.parameters()).element_size()  # bytes
    if auto and met * row > FROZEN_BYTES:
        return 0, 1.0
    kept = met + (len(rows) - met if tested is None else tested)  # rows of evaluations take what is left
    return min(int(kept * row), FROZEN_BYTES), 1 - first / count


def _forward(model: Any, batch: Batch, notes: list[str]) -> Cost:
    """Return the cost of one forward of the batch, its losses included."""
    real = batch.to("meta")
    rows, tokens = real.inputs["input_ids"].shape
    mask = 3 * rows * tokens**2  # of padded rows: yes or no, and what attention makes of that in 16 bits
    try:
        found = cost(model, lambda: losses(model, real))
        return Cost(found.activations + mask, found.flops)
    except Exception as error:  # a model that looks at values
        notes.append(f"activations by formula: this model cannot be traced ({type(error).__name__})")
    # Residual, its norm in fp32, and the widest hidden layer twice, of one block.
    wide = max(
        (p.shape[0] for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n), default=1
    )
    size = next(model.parameters()).element_size()
    numbers = sum(p.numel() for p in model.parameters())
    return Cost(mask + rows * tokens * (6 * _width(model) + 2 * wide) * size, 2 * numbers * rows * tokens)


def _scratch(
    model: Any, names: Sequence[str], compute: torch.dtype, probes: int, few: bool, stays: bool = False
) -> int:
    """θ + s·z of the largest trained tensor, for each probe; of embeddings, and of the output matrix where `few` of its
    rows are scored, no more than the rows in use are made. stays: linear layers use their matrices where they lie."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = getattr(embedding, "weight", None)
    last = getattr(head, "weight", None)
    if last is alone and not few:
        alone = None
    chosen = set(names)
    passed = (alone, last if few else None)
    linear = {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    sizes = [
        min(size, SLAB) if id(p) in linear else size
        for n, p in model.named_parameters()
        if n in chosen
        and all(p is not x for x in passed)
        and not (stays and id(p) in linear and width_of(p.shape))
        for size in [p.numel() * (4 if isinstance(p, Scales) else compute.itemsize)]
    ]
    scales = {id(m.scales): m for m in quantised_layers(model).values()}
    if any(n in chosen and id(p) in scales for n, p in model.named_parameters()):
        # One probe's matrix counts among the activations.
        matrices = [m.in_features * m.out_features * compute.itemsize for m in scales.values()]
        return probes * max(sizes) + (probes - 1) * max(matrices)
    return probes * max(sizes, default=0)


def _with_gradients(model: Any, batch: Batch, forward: float) -> dict[str, dict[str, float]]:
    """AdamW over all weights, and LoRA of rank 8, on the same batch: weights and gradients in the compute dtype
    (LoRA's own in fp32), two fp32 moments, activations kept for the backward; three and two forwards of time."""
    batch = batch.to("meta")
    numbers = sum(p.numel() for p in model.parameters())
    size = next(model.parameters()).element_size()
    pairs = [
        m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj", "c_attn", "query_key_value"))
    ]
    adapters = LORA_RANK * sum(sum(m.weight.shape) for m in pairs)

    def kept(all_weights: bool) -> float:
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(
            lambda m, a, out: out if all_weights else out.requires_grad_()
        )
        try:
            model.requires_grad_(all_weights)
            return footprint.kept(model, lambda: losses(model, batch))
        except Exception:
            return math.nan
        finally:
            handle.remove()
            model.requires_grad_(False)

    return {
        "adamw": {"peak_bytes": numbers * (2 * size + 8) + kept(True), "seconds_per_step": 3 * forward},
        "lora": {"peak_bytes": numbers * size + 16 * adapters + kept(False), "seconds_per_step": 2 * forward},
    }


def _width(model: Any) -> int:
    return int(
        getattr(model.config, "hidden_size", 0)
        or getattr(model.get_input_embeddings(), "embedding_dim", 1024)
    )


def estimate_text(found: dict[str, Any]) -> str:
    """Return the estimate for a reader."""
    c = found["config"]
    shares = (
        ", ".join(f"{_gb(size)} in {dtype}" for dtype, size in found["weights"].items() if size > 1e5)
        or "small"
    )
    lines = [
        f"{found['trained']:,} of {found['parameters']:,} numbers trained; {found['rows']} rows of {found['tokens']} "
        f"tokens, {c['probes_per_forward']} probes per forward; stored in {c['storage']}, computed in {c['compute']}, on {c['device']}",
        f"{'weights':30}{_gb(found['weights_bytes'])}   ({shares})",
        *([f"{'momentum':30}{_gb(found['momentum_bytes'])}"] if found["momentum_bytes"] else []),
        *([f"{'moments of the update rule':30}{_gb(found['state_bytes'])}"] if found["state_bytes"] else []),
        *([f"{'base, for anchor':30}{_gb(found['base_bytes'])}"] if found["base_bytes"] else []),
        f"{'scratch for probes':30}{_gb(found['scratch_bytes'])}",
        *([f"{'frozen outputs, kept':30}{_gb(found['frozen_bytes'])}"] if found["frozen_bytes"] else []),
        f"{'activations, training':30}{_gb(found['activation_bytes'])}",
        f"{'activations, evaluation':30}{_gb(found['evaluation_bytes'])}",
        "",
        f"{'':30}{'peak memory':>14}{'a step':>14}",
        _line("this run", found),
        _line("AdamW, all weights", found["adamw"]),
        _line(f"AdamW, LoRA of rank {LORA_RANK}", found["lora"]),
        f"{c['steps']} steps: about {_duration(found['seconds'])}, without evaluation and start-up"
        + (
            f"; {_duration(found['denoising_seconds'])} of it to denoise"
            if found["denoising_seconds"]
            else ""
        ),
        *(
            ["memory is that of tensors; a process on a CPU takes 0.5 to 1 GB more"]
            if c["device"] == "cpu"
            else []
        ),
        *found["notes"],
    ]
    return "\n".join(lines)


def _line(title: str, row: dict[str, float]) -> str:
    return f"{title:30}{_gb(row['peak_bytes']):>14}{_duration(row['seconds_per_step']):>14}"


def _gb(size: float) -> str:
    return "?" if math.isnan(size) else f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return (
        f"{seconds:.3g} s"
        if seconds < 120
        else f"{seconds / 60:.3g} min"
        if seconds < 7200
        else f"{seconds / 3600:.3g} h"
    )


def rates(
    device: str, dtype: torch.dtype, tokens: int, width: int, kind: str, directions: int = 1
) -> dict[str, float]:
    """Return {flops: of [tokens, width] × [width, 4·width] a second, noise: numbers a second updated and probed twice}.

    directions: of the update. Kinds whose probes are products of their own are updated only.
    """
    # No more rows than a rate wants: whoever asks may be short of memory.
    x = torch.randn(min(max(tokens, 1), ROWS_MAX), width, device=device).to(dtype)
    w = torch.randn(width, 4 * width, device=device).to(dtype)
    product = 2.0 * x.shape[0] * w.numel()
    n = 1 << 26 if device.startswith("cuda") else 1 << 18
    theta = torch.randn(n, device=device).to(dtype)
    out = torch.empty(2, n, device=device, dtype=dtype)
    change = [Update(0, 0, (1e-6,) * directions)]
    where: dict[str, Any] = {"seed": 0, "step": 1, "noise": kind, "updates": change}

    def probe() -> None:
        if KINDS[kind] >= KINDS[RANK1]:
            noise.perturb(theta, 1, None, (), width=1024, **where)
        else:
            noise.perturb(theta, 1, out, [(0, 1e-3), (0, -1e-3)], **where)

    return {"flops": product / _seconds(lambda: x @ w, device), "noise": n / _seconds(probe, device)}


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Return the time of one call, the mean over MEASURED seconds, after one that compiles."""
    cuda = device.startswith("cuda")
    call()
    if cuda:
        torch.cuda.synchronize()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < MEASURED or not calls:
        call()
        calls += 1
        if cuda and calls % 8 == 0:
            torch.cuda.synchronize()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls
