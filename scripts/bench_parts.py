"""Build what bench_step.py times: the yardsticks, and a step of zoft's own Trainer. Milliseconds and bytes throughout."""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import reference_loop
import torch
from bench_models import plain_causal
from torch import Tensor, nn

from zoft.config.schema import ADAPTERS, Config, Task
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.ledger.log import Ledger
from zoft.method import space
from zoft.models.adapters import attach
from zoft.train import axis as setup_axis
from zoft.train import build, header, parts
from zoft.train.trainer import Trainer

WARM = 10  # steps before the clock of a Trainer starts: kernels compile, graphs are captured
EDGE = 8  # appends at each end of a run that are not timed: more than steps may be under way


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # of streams that are gone
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> tuple[int | None, int | None]:
    """(allocated, reserved) bytes at most since the last reset; None on a CPU."""
    if not device.startswith("cuda"):
        return None, None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def times(
    call: Callable[[], Any], device: str, *, repeats: int, seconds: float, warm: int = 3
) -> list[float]:
    """Milliseconds of each of the calls, device events on a GPU; fewer repeats where `seconds` run out, 3 at least."""
    for _ in range(warm):
        call()
    sync(device)
    began = time.perf_counter()
    call()
    sync(device)
    once = time.perf_counter() - began
    repeats = max(3, min(repeats, int(seconds / max(once, 1e-9))))
    if not device.startswith("cuda"):
        spent = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - began))
        return spent
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a copy within the device, read plus written; median of 20."""
    size = 2 << 30 if device.startswith("cuda") else 64 << 20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = median(times(lambda: target.copy_(source), device, repeats=20, seconds=5))
    return 2 * size / (spent / 1e3)


def one_forward(model: Any, rows: int, tokens: int, device: str, seconds: float) -> dict[str, Any]:
    """One inference forward, logits for the last position only, captured as a CUDA graph on a GPU.

    {ms, graph: bool, activation_bytes: what the forward allocates at most beyond the weights, run eagerly}
    """
    ids = random_ids(model, rows, tokens, device)

    @torch.no_grad()
    def forward() -> Tensor:
        with plain_causal(model):
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    forward()
    release(device)
    if not device.startswith("cuda"):
        return {
            "ms": median(times(forward, device, repeats=50, seconds=seconds)),
            "graph": False,
            "activation_bytes": None,
        }
    before = torch.cuda.memory_allocated()
    forward()
    activations = torch.cuda.max_memory_allocated() - before
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    spent = median(times(graph.replay, device, repeats=50, seconds=seconds))
    return {"ms": spent, "graph": True, "activation_bytes": activations}


@contextmanager
def adapter(model: Any, train: str) -> Iterator[Any]:
    """The model with the adapter that `train` names, or as it is; and as it was at the end."""
    if train not in ADAPTERS:
        yield model
        return
    made = attach.attach_adapter(model, Config(train=train))
    try:
        yield made
    finally:
        made.unload() if train == "lora" else None


def reference(
    model: nn.Module, rows: int, tokens: int, device: str, seconds: float, steps: int, train: str
) -> dict[str, Any]:
    """The reference loop's step on random rows, loss over all positions; wall-clock, the device drained at both ends."""
    ids = random_ids(model, rows, tokens, device)
    names = set(space.train_names(model, train))
    params = [p for n, p in model.named_parameters() if n in names]
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        reference_loop.step(
            params, lambda: reference_loop.language_loss(model, ids), seed=count, eps=1e-3, lr=1e-7
        )

    release(device)
    spent = times(step, device, repeats=steps, seconds=seconds, warm=2)
    return {
        "ms": median(spent),
        "steps": len(spent),
        "peak_bytes": peak(device)[0],
        "peak_reserved_bytes": peak(device)[1],
    }


def trainer_step(
    model: Any, config: Config, rows: list[Example], seconds: float, steps: int
) -> dict[str, Any]:
    """A step of zoft's Trainer, built as a recipe builds it, a real ledger under it.

    config: see `config_for`. rows: training examples. Time runs from ledger append to ledger append.
    {ms: (last append − first) / steps, by the wall; events_ms: the same by device events; median_ms: of single
    steps; steps, trained, storage, compute, group, weights_bytes, peak_bytes (set-up and capture included), steps_peak_bytes
    (the steps', whose activations are in a graph's pool, and not counted), losses}
    """
    device = config.device
    precisions = {n: p.dtype for n, p in model.named_parameters()}
    trained: Any = None
    axis: Any = None
    trainer: Any = None
    release(device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config, trained, axis = resolved(parts.resolve_device(config), model, rows)
            with Ledger.create(
                Path(folder) / "ledger", header.header_of(config, "random weights", trained)
            ) as ledger:
                trainer = build.build_trainer_of(config, model, axis, rows, ledger)
                found = timed(trainer, ledger, device, seconds, steps)
                used = ledger.records[-1]
                found |= {"losses": list(used.losses), "skipped": sum(r.skipped for r in ledger.records)}
        found |= {
            "trained": sum(t.stored.numel() for t in trained),
            "storage": config.storage,
            "compute": config.compute,
        }
        found |= {
            "group": config.probes_per_forward,
            "perturb": config.perturb,
            "weights_bytes": weights_bytes(model),
        }
        return found
    finally:
        getattr(axis, "release", lambda: None)()
        config = trained = axis = trainer = None  # their tensors go, one by one, as the model's come back
        gc.collect()
        for n, p in model.named_parameters():  # as it was, for the next cell
            p.data = p.data.to(precisions[n])


def resolved(config: Config, model: Any, rows: list[Example]) -> tuple[Config, Any, Any]:
    """(config with nothing left at auto, trained tensors, axis), as a recipe makes them."""
    names = space.train_names(model, config.train, config.perturb == "nodes")
    config = parts.resolve_precision(config, model, names)
    return setup_axis.make_axis(config, model, space.adopt(model, names), rows)


def timed(trainer: Trainer, ledger: Any, device: str, seconds: float, steps: int) -> dict[str, Any]:
    cuda = device.startswith("cuda")
    walls: list[float] = []
    events: list[Any] = []
    append = ledger.append

    def noted(record: Any) -> None:
        append(record)
        walls.append(time.perf_counter())
        if cuda:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

    ledger.append = noted
    trainer.run(until=WARM // 2)
    sync(device)
    setup_peak = peak(device)[0]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.run(until=WARM)
    sync(device)
    pace = (time.perf_counter() - began) / (WARM - WARM // 2)
    steps = max(20 if cuda else 2, min(steps, int(seconds / max(pace, 1e-9))))
    # The first and last appends of a run do not count: there the ledger is catching up with the device.
    trainer.run(until=WARM + steps + 1 + 2 * EDGE)
    sync(device)
    walls, events = walls[WARM + EDGE : -EDGE], events[WARM + EDGE : -EDGE]
    assert len(walls) == steps + 1, (len(walls), steps)
    allocated, reserved = peak(device)
    return {
        "ms": 1e3 * (walls[-1] - walls[0]) / steps,
        "events_ms": events[0].elapsed_time(events[-1]) / steps if cuda else None,
        "median_ms": median(1e3 * (b - a) for a, b in zip(walls, walls[1:])),
        "steps": steps,
        "peak_bytes": None if allocated is None or setup_peak is None else max(allocated, setup_peak),
        "peak_reserved_bytes": reserved,
        "steps_peak_bytes": allocated,
    }


def config_for(args: Any, rows: int, perturb: str, dtype: str) -> Config:
    """A run's config as `zoft train` would have it, everything that is not asked for at its default."""
    inplace = perturb == "inplace"  # the model runs on its stored weights
    return Config(
        model="random", task=Task(name="random"), train=args.train, lr=1e-7, eps=1e-3, noise=args.noise, q=args.q, directions=args.directions,
        steps=1 << 20, batch_size=rows, device=args.device, perturb=perturb,
        mask="none" if inplace and args.mask == "magnitude" else args.mask, storage=dtype if inplace else args.storage, compute=dtype if inplace else args.compute,
        probes_per_forward=1 if inplace else args.probes_per_forward,
    )  # fmt: skip


def node_config_for(args: Any, rows: int) -> Config:
    """A run's config of recipe=node at its defaults, but for an lr that leaves random weights alone."""
    return Config(
        model="random", task=Task(name="random"), recipe="node", train="upper", perturb="nodes", noise="rademacher", directions="example",
        lr=1e-7, eps=1e-2, steps=1 << 20, batch_size=rows, device=args.device, storage=args.storage, compute=args.compute,
    )  # fmt: skip


def random_rows(model: Any, count: int, tokens: int, padded: bool, targets: int = 0) -> list[Example]:
    """Rows of random tokens, exactly `tokens` long, two single-token candidates; padded: half of them shorter.

    targets: no candidates, but so many tokens at the end of each row to learn, over the whole vocabulary."""
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    made = []
    for i in range(count):
        n = int(rng.integers(tokens // 2, tokens + 1)) if padded and i % 2 else tokens
        context = tuple(int(t) for t in rng.integers(4, vocab, n))
        if targets:
            ends = (*context[n + 1 - targets :], int(rng.integers(4, vocab)))  # the last is not an input
            made.append(Example((context[: n + 1 - targets],), (ends,), 0, "lm"))
            continue
        made.append(Example((context, context), ((5,), (9,)), i % 3 % 2, "choice", True))
    return made


def random_ids(model: Any, rows: int, tokens: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, model.config.vocab_size, (rows, tokens), generator=generator).to(device)


def weights_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def trained_numbers(model: nn.Module, train: str) -> int | None:
    try:
        names = set(space.train_names(model, train))
    except UserError:
        return None
    return sum(p.numel() for n, p in model.named_parameters() if n in names)


def attempt(call: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """call's result, or {"error": one line}; a cell that fails does not stop the others."""
    try:
        return call()
    except Exception as error:
        traceback.print_exc(limit=-6)
        text = " ".join(str(error).split())
        kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        return {"error": kind if kind == "out of memory" else f"{kind}: {text[:200]}"}
    finally:
        release(device)
