"""From a config to the parts of a run: device, data, model, axis, batches; whatever is `auto` is resolved here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoft import (
    adapter_beside,
    adapters,
    distributed,
    fingerprint,
    guards,
    models,
    objective,
    precision,
    quant,
    quant_other,
    routes,
    selfcheck,
    space,
    sparse,
    tasks,
    update,
)
from zoft.config import ADAPTERS, GENERATED, Config
from zoft.data_order import batches, picked
from zoft.encode import Example, encode, how
from zoft.errors import UserError
from zoft.evaluate import CALIBRATION, spread
from zoft.footprint import Live
from zoft.frozen import Row, prefix_of, rows_of
from zoft.goal import Goal, Prompts
from zoft.ledger import Ledger
from zoft.objective import Batch, collate, losses
from zoft.probe import InPlace, ProbeAxis
from zoft.sites import Found
from zoft.space import Trained
from zoft.tasks import TaskData
from zoft.trainer import Settings, Trainer

FROZEN_BYTES = 1 << 30  # kept outputs of frozen blocks; rows beyond it are computed again each time
# Where a GPU works, a CPU only puts batches together; more threads spin while they wait, and take from runs beside it.
CUDA_THREADS = 4


def device(config: Config) -> Config:
    """Resolve device and threads, and set the threads."""
    where, world = config.device, distributed.current()
    if where == "auto":
        where = "cuda" if (torch.cuda.is_available() if world.cuda is None else world.cuda) else "cpu"
    elif where.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(where.partition(":")[2] or 0) >= count:
            raise UserError(
                f"device={where}: {count or 'no'} CUDA devices here; use device=cpu or device=auto"
            )
    if where.startswith("cuda:"):  # kernels and streams go to the current device
        torch.cuda.set_device(where)
    auto = config.threads == "auto"
    threads = distributed.threads_each(world) if auto else int(config.threads)
    if auto and where.startswith("cuda"):
        threads = min(threads, CUDA_THREADS)
    world.auto = {"threads": threads} if auto else {}
    cores = os.cpu_count() or 1
    if world.rank == 0 and world.local_size > 1 and threads * world.local_size > cores:
        say(
            f"threads={threads}: {world.local_size} processes of so many on {cores} cores wait for each other"
        )
    torch.set_num_threads(threads)
    return replace(config, device=where, threads=threads)


def model(config: Config, folder: str | Path | None = None) -> tuple[nn.Module, Any, str]:
    """(model on its device in the checkpoint's dtype, tokenizer, fingerprint of the base).

    With the adapter that config.train asks for, or one that is in place (model.beside has its files, and the fingerprint
    goes on with its own). folder: of a run that goes on or is replayed.
    """
    say(f"loading {config.model}")
    loaded, tokenizer = load(config)
    base = fingerprint.of_model(loaded)
    if next(loaded.parameters()).device != torch.device(
        config.device
    ):  # some quantised models cannot be moved
        loaded = loaded.to(config.device)
    place = adapter_beside.folder_of(config)
    if place is not None:
        base += f"+{adapter_beside.fingerprint(place)}"
    if config.train in ADAPTERS:
        loaded = adapters.attach(loaded, config, Path(folder) / adapters.START if folder else None)
        source = models.resolve(config.model)
        loaded.peft_config["default"].base_model_name_or_path = source.home or source.place
    elif place is not None:
        files = adapter_beside.files(place)
        loaded = adapters.load(loaded, place)
        loaded.beside = files
        say(f"{len(adapter_beside.pairs(loaded))} LoRA pairs in place, frozen: {place}")
    return loaded, tokenizer, base


def load(config: Config) -> tuple[Any, Any]:
    """(model, tokenizer): the checkpoint, quantised layer by layer on config.device where `bits` asks for that."""
    loaded, tokenizer = models.load(config.model, dtype="auto", trust_remote_code=config.trust_remote_code)
    if config.bits is not None:
        keys: dict[str, Any] = {k: getattr(config, k) for k in ("bits", "group", "zero_points")}
        say(quant.quantise_model(loaded, **keys, head=config.quantise_head, device=config.device))
    quant_other.keep(loaded)
    wanted = config.recipe == "qzo" or config.train == "scales"
    if wanted and not quant.layers(loaded) and (found := dict(quant_other.attach(loaded))):
        say(f"{len(found)} quantised layers follow their scales")
    if config.eps_mode == "relative" and not quant.layers(loaded):
        raise UserError(
            "eps_mode=relative: no layer of this model is quantised by zoft; set bits=4 or bits=8"
        )
    quant.set_log(loaded, config.eps_mode == "relative")
    return loaded, tokenizer


def tokenizer(config: Config) -> Any:
    """The tokenizer alone, without loading weights."""
    return models.tokenizer(config.model, config.trust_remote_code)


def examples(config: Config, tokenizer: Any, data: TaskData) -> tuple[list[Example], list[Example]]:
    """Training rows and the evaluation rows that eval_limit keeps, as token ids."""
    held_out = tasks.subset(data.eval, config.eval_limit)
    train = encode(data.train, tokenizer, data, config.max_length, pack=data.pack)
    made = train, encode(held_out, tokenizer, data, config.max_length)
    for line in reading(tokenizer, data):
        say(line)
    if cut := sum(e.cut > 0 for e in train):
        say(
            f"{cut} of {len(train)} training examples are cut to max_length={config.max_length} (see `zoft data`)"
        )
    return made


def reading(tokenizer: Any, data: TaskData) -> list[str]:
    """What was recognised in the user's own data, and how it is written for the model; none where templates say."""
    if not data.reading:
        return []
    return [data.reading, how(tokenizer, data)]


def dev_examples(config: Config, tokenizer: Any, data: TaskData) -> list[Example] | None:
    """The rows that a model is chosen by, as token ids; None where task.num_dev and task.k_shot ask for none."""
    return None if data.dev is None else encode(data.dev, tokenizer, data, config.max_length)


def dtypes(config: Config, loaded: nn.Module, names: Sequence[str]) -> Config:
    """Resolve storage and compute."""
    kind = config.device.partition(":")[0]
    if config.train in ADAPTERS:  # kept in fp32, beside a base that computes as it would without them
        base = [n for n, p in loaded.named_parameters() if n not in set(names) and p.is_floating_point()]
        _, compute = space.resolve_dtypes(loaded, base, "fp32", config.compute, kind)
        wide = "fp64" if compute == "fp64" else "fp32"
        return replace(config, storage=wide if config.storage == "auto" else config.storage, compute=compute)
    storage, compute = space.resolve_dtypes(loaded, list(names), config.storage, config.compute, kind)
    if config.perturb == "inplace" and storage != compute:
        # The model runs on its stored weights here, so there is one precision.
        asked = [d for d in (config.storage, config.compute) if d != "auto"]
        if len(asked) == 2:
            raise UserError(
                f"storage={storage}, compute={compute}: perturb=inplace has one dtype; set both alike"
            )
        storage = compute = asked[0] if asked else compute
    return replace(config, storage=storage, compute=compute)


_silent = False


def say(text: str) -> None:
    """A line about the set-up, for the reader."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def said_before() -> Iterator[None]:
    """What is set up in this context, to compare with, has been told of already."""
    global _silent
    was, _silent = _silent, True
    try:
        yield
    finally:
        _silent = was


def axis(
    config: Config, loaded: nn.Module, trained: list[Trained], train: Sequence[Example]
) -> tuple[Config, list[Trained], ProbeAxis | InPlace]:
    """The way to run the model at θ + s·z: proved on the run's own first examples, or in place.

    Returns (config with perturb and probes_per_forward resolved, tensors that are really trained, axis).
    """
    models.refuse_other_kind(config.model, loaded, train[0].masked)
    refuse_unquantised(config, loaded)
    if update.decay_is_lost(config.lr, config.weight_decay):
        say(
            f"weight_decay={config.weight_decay:g}: times lr={config.lr:g} it is lost in fp32; nothing decays"
        )
    if config.perturb == "inplace":
        if config.probes_per_forward not in ("auto", 1):
            raise UserError(
                f"probes_per_forward={config.probes_per_forward}: perturb=inplace has one; leave it out"
            )
        if config.cache_frozen is True:
            say("cache_frozen: perturb=inplace keeps nothing; every block runs every time")
        config = replace(config, cache_frozen=False)
        say("perturb=inplace: weights are moved and moved back, so rounding shifts them a little each step")
        return placed(config, loaded, trained)

    def run(batch: Batch) -> torch.Tensor:
        return losses(loaded, batch)[0]

    small, double = (b.to(config.device) for b in calibration(train))
    found = agreed(selfcheck.find_sites(loaded, trained, run, small, double, config.eps))
    for t in found.unread:
        say(f"{t.name}: no forward reads it; it is not trained")
    if found.note:
        say(found.note)
    wanted = 2 if config.probes_per_forward == "auto" else int(config.probes_per_forward)
    group = min(wanted, 2 * config.q) if found.stacked else 1
    auto = config.probes_per_forward == "auto"
    config = replace(config, perturb="probes", probes_per_forward=group)
    config, trained, made = placed(config, loaded, selfcheck.live(trained, found), found.sites)
    if small.tokens is not None and isinstance(made, ProbeAxis):
        # Only the candidates' rows of the output matrix are ever made.
        head = objective.head_of(loaded)
        dense = [s for s in found.sites if s.module is not head or routes.fast(s) is None]
        made.scratch_bytes = routes.scratch_bytes(dense)
    for line in precision.weak(trained, config.eps, seed=config.seed, kind=config.noise):
        say(line)

    if auto and group > 1 and isinstance(made, ProbeAxis):
        room = memory_left(config.device) // 2
        group = distributed.current().least(grouped(config, loaded, made, train, room))
        config = replace(config, probes_per_forward=group)

    def clean() -> torch.Tensor:
        with made.clean(small.rows):
            return run(small)

    return held(cached(config, loaded, trained, train, clean), made), trained, made


def refuse_unquantised(config: Config, loaded: nn.Module) -> None:
    """Raise UserError where recipe=qzo would be another recipe's run of a plain model."""
    if config.recipe == "qzo" and not any(isinstance(p, quant.Scales) for p in loaded.parameters()):
        raise UserError(
            "recipe=qzo: no layer of this model is quantised; set bits=4, take such a model, or use another recipe"
        )


def agreed(found: Found) -> Found:
    """Of several processes, what one of them found for all: probes share a forward everywhere or nowhere. The two of a direction,
    run in two ways, would differ by rounding that is not theirs; and config.yaml says one thing for the run."""
    world = distributed.current()
    seen = world.everyone([found.stacked, found.note])
    if all(stacked for stacked, _ in seen):
        return found
    rank, note = next((r, note) for r, (stacked, note) in enumerate(seen) if not stacked)
    return replace(found, stacked=False, note=f"rank {rank}: {note}" if rank else note)


def held(config: Config, made: ProbeAxis | InPlace) -> Config:
    """Resolve hold_probe where text is written: a probe's weights once beside θ, where half of the free memory has room.

    Either way they are the same numbers and θ is only read; what differs is noise for each probe, or for each token.
    """
    if config.objective not in GENERATED or not isinstance(made, ProbeAxis):
        return config
    need, auto = made.held_bytes(), config.hold_probe == "auto"
    fits = need <= memory_left(config.device) // 2
    world = distributed.current()
    made.hold = world.all(fits) if auto else bool(config.hold_probe)
    if auto:
        world.auto["hold_probe"] = made.hold
    if auto and not made.hold:
        say(
            f"hold_probe: a probe's weights take {need / 1e9:.2g} GB more, so each token makes them anew; "
            "perturb=inplace makes them once in place, with a little rounding each step"
        )
    return replace(config, hold_probe=made.hold)


@torch.no_grad()
def grouped(config: Config, loaded: nn.Module, made: ProbeAxis, train: Sequence[Example], room: int) -> int:
    """How many of a step's probes share a forward: as many as have their activations in `room` bytes.

    All 2q, or an equal share of the directions, or 1 where not even the two of one direction fit. What a probe takes is
    measured, on the longest examples. More probes at once gain where much is frozen, and where batches are small.
    """
    longest = sorted(train, key=lambda e: -e.length)[: config.batch_size]
    batch = collate(longest).to(config.device)
    kept = [*loaded.parameters(), *loaded.buffers(), *batch.inputs.values()]
    with made.clean(batch.rows), Live(kept, count=False) as live:
        losses(loaded, batch)
    each = max(1, live.most - made.scratch_held())  # the scratch was allocated meanwhile
    pairs = min(config.q, room // (2 * each))
    if not pairs:
        return 1
    while config.q % pairs:  # groups of one size: no small one at the end
        pairs -= 1
    return 2 * pairs


def memory_left(device: str) -> int:
    """Bytes that a tensor on this device could take."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 4 << 30


def cached(
    config: Config,
    loaded: nn.Module,
    trained: Sequence[Trained],
    train: Sequence[Example],
    clean: Callable[[], torch.Tensor],
) -> Config:
    """Keep the outputs of frozen first blocks, if cache_frozen wants it and the model allows it; resolves the key."""
    auto = config.cache_frozen == "auto"
    if config.cache_frozen is False or (auto and config.device.startswith("cuda")):  # there, graphs gain more
        return replace(config, cache_frozen=False)
    prefix, note = prefix_of(loaded, trained, first_met(config, train), FROZEN_BYTES, clean, auto)
    kept = distributed.current().all(prefix is not None)
    if prefix is not None and not kept:
        prefix.remove()
        note = "another process of this run cannot"
    if note:
        say(f"cache_frozen: {note}")
    return replace(config, cache_frozen=kept)


def first_met(config: Config, train: Sequence[Example]) -> Iterator[list[Row]]:
    """The rows of training, by the batch in which the run meets them first: an evaluation's label bias, then steps."""
    if train[0].objective == "choice":
        bias = sorted(spread(train, CALIBRATION), key=lambda e: e.length)
        for i in range(0, len(bias), config.batch_size):
            yield rows_of(collate(bias[i : i + config.batch_size]).inputs)
    seen: set[int] = set()
    for step in range(config.steps):
        for picks in picked(config, len(train), step):
            new = [i for i in dict.fromkeys(picks) if i not in seen]
            seen.update(new)
            if new:
                yield rows_of(collate([train[i] for i in new]).inputs)
        if len(seen) == len(train):
            return


def placed(
    config: Config, loaded: nn.Module, trained: list[Trained], sites: Sequence[Any] = ()
) -> tuple[Config, list[Trained], ProbeAxis | InPlace]:
    """The axis itself, tensors in their precision; without sites it can only apply updates (replay)."""
    inplace = config.perturb == "inplace"
    space.place(loaded, trained, config.storage, config.compute, uniform=inplace)
    if config.train in ADAPTERS:
        adapters.place(trained, space.DTYPES[config.compute])
    for line in sparse.mask(trained, config.mask, config.sparsity, config.seed):  # θ is the base, as stored
        say(line)
    refuse_denoise(config, trained)
    common: dict[str, Any] = {"seed": config.seed, "kind": config.noise, "beta": config.momentum}
    fed: dict[str, Any] = common | {"q": config.q, "eps": config.eps}
    captured = config.device.startswith("cuda") and config.storage != "fp64"
    if inplace:
        config = replace(config, probes_per_forward=1)
        if captured:
            from zoft.device_inplace import DeviceInPlace

            return config, trained, DeviceInPlace(trained, **fed)
        return config, trained, InPlace(trained, **common)
    if captured:
        from zoft.device import DeviceAxis

        return config, trained, DeviceAxis(trained, sites, compute=space.DTYPES[config.compute], **fed)
    return config, trained, ProbeAxis(trained, sites, **common)


def refuse_denoise(config: Config, trained: Sequence[Trained]) -> None:
    """Raise UserError where denoise_every asks for what cannot be, or is not needed."""
    if not config.denoise_every:
        return
    key = f"denoise_every={config.denoise_every}"
    if any(t.floor is not None or t.threshold is not None for t in trained):
        raise UserError(
            f"{key}: the directions of recipe={config.recipe} depend on the weights, so that base and ledger give "
            "no sum; leave it out"
        )
    if all(t.stored.element_size() > 2 for t in trained):
        raise UserError(
            f"{key}: storage={config.storage} keeps no trained tensor in 16 bits, so there is no rounding to "
            "remove; leave it out"
        )


def calibration(train: Sequence[Example]) -> tuple[Batch, Batch]:
    """A batch of two examples, and one of those and as many others under the same mask.

    Some row is padded, for models make other masks, or none, where nothing is.
    """
    other = next((e for e in train if e.length != train[0].length), train[-1])
    small = collate([train[0], other])
    if bool(small.inputs["attention_mask"].all()):
        small = small.widened(1)
    ids = small.inputs["input_ids"]  # [n, T]
    double = small.repeat(2)
    double.inputs["input_ids"][len(ids) :] = ids.flip(1)
    return small, double


def trainer(
    config: Config, loaded: nn.Module, made: ProbeAxis | InPlace, train: Sequence[Example], ledger: Ledger,
    goal: Goal | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of a run: on a GPU, one whose steps are captured where the objective is a mean over rows."""
    goal = goal or Goal(train[0].objective)
    for line in guards.at_start(config, made.trained) if ledger.last_step < 0 else ():
        say(line)
    if config.elastic:
        from zoft.elastic import ElasticTrainer

        found = ElasticTrainer(
            loaded, made, batches(config, train), ledger, settings(config), goal.forward, goal.value
        )
        found.open(config)
        return found
    at: Callable[[int], Sequence[Any]] = batches(config, train)
    if goal.texts is not None:

        def at(step: int) -> list[Prompts]:
            mine = distributed.current().examples
            return [Prompts(tuple(mine(picks))) for picks in picked(config, len(train), step)]

    eager = goal.texts is not None or goal.value is not objective.mean
    if eager or not config.device.startswith("cuda") or config.storage == "fp64":
        return Trainer(loaded, made, at, ledger, settings(config), goal.forward, goal.value)
    from zoft.captured import CapturedTrainer
    from zoft.device import DeviceAxis
    from zoft.device_inplace import DeviceInPlace

    assert isinstance(made, (DeviceAxis, DeviceInPlace)), type(made)
    why = "cache_frozen looks rows up on the CPU" if config.cache_frozen else ""
    if not why:  # captured steps send their batches to the device themselves, and do not wait for it
        at = plain = batches(replace(config, device="cpu"), train)
        if mask_is_idle(config, loaded, made, train):
            at = lambda step: [b.unmasked() for b in plain(step)]  # noqa: E731
    return CapturedTrainer(loaded, made, at, ledger, settings(config), goal.forward, capture=why)


@torch.no_grad()
def mask_is_idle(
    config: Config, loaded: nn.Module, made: ProbeAxis | InPlace, train: Sequence[Example]
) -> bool:
    """Whether padding on the right changes nothing, as in a causal model: then attention needs no mask."""
    by_length = sorted(train, key=lambda e: e.length)
    batch = collate([by_length[0], by_length[-1]]).to(config.device)
    with made.clean(batch.rows):
        masked = losses(loaded, batch)[0]
    with made.clean(batch.rows):
        plain = losses(loaded, batch.unmasked())[0]
    tolerance = 1e-4 if config.compute == "fp32" else 0.02
    idle = bool(((masked - plain).abs() <= tolerance * (1 + masked.abs())).all())
    return distributed.current().all(idle)  # the probes of a direction are run in one way


def settings(config: Config) -> Settings:
    """What the trainer needs of a resolved config."""
    names = Settings.__dataclass_fields__
    return Settings(**{k: v for k, v in asdict(config).items() if k in names})


def plan(
    config: Config,
    loaded: nn.Module,
    trained: Sequence[Trained],
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> dict[str, Any]:
    """What a run would do: the resolved config and the counts that follow from it."""
    for line in guards.at_start(config, trained):
        say(line)
    numbers = sum(t.stored.numel() for t in trained)
    realised = precision.realised(trained, config.eps, seed=config.seed, kind=config.noise)
    weakest = min(realised, key=lambda name: realised[name])
    total = quant.numbers(loaded)
    return {
        "config": asdict(config),
        "train_examples": len(train),
        "eval_examples": len(held_out),
        "longest": max(e.length for e in [*train, *held_out]),
        "trained_tensors": len(trained),
        "trained_numbers": numbers,
        "trained_share": numbers / total,
        "weakest_direction": weakest,
        "weakest_cosine": realised[weakest],
        "forwards": config.steps * 2 * config.q * config.batch_size * config.accumulate,
    }
