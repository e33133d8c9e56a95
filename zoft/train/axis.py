"""The way a run's model is asked for its losses at θ + s·z: proved, given its precision, its memory looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoft.config.schema import ADAPTERS, GENERATED, Config
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.evaluation.evaluate import CALIBRATION, spread
from zoft.method import space
from zoft.method.blocks import give_turns
from zoft.method.estimators.named import estimator_of, probes_per_step
from zoft.method.estimators.two_sided import TWO_SIDED
from zoft.method.masks import mask_tensors
from zoft.method.momentum import MOMENTUM, buffer_beta
from zoft.method.precision import weak_directions
from zoft.method.rules import attach_rule, rule_of, rule_words
from zoft.method.space import Trained, place_in_precision
from zoft.method.updates import decay_is_lost
from zoft.models.adapters.attach import place_adapter
from zoft.models.footprint import Live
from zoft.models.head import head_of
from zoft.models.kind import refuse_longer_rows, refuse_other_kind, trained_positions
from zoft.noise.spec import GAUSSIAN, RADEMACHER, noise_of
from zoft.objectives.losses import Batch, collate, losses
from zoft.parallel.world import this_world
from zoft.probe import proof
from zoft.probe.axis import ProbeAxis
from zoft.probe.frozen_blocks import FROZEN_BYTES, Row, prefix_of, rows_of
from zoft.probe.inplace import InPlace
from zoft.probe.nodes import NodeAxis
from zoft.probe.site_forwards import fast, scratch_bytes
from zoft.probe.sites import Found
from zoft.train.batches import picked
from zoft.train.node_axis import calibrated, make_nodes
from zoft.train.parts import refuse_unquantised, say


def make_axis(
    config: Config,
    loaded: nn.Module,
    trained: list[Trained],
    train: Sequence[Example],
    folder: str | Path | None = None,
) -> tuple[Config, list[Trained], ProbeAxis | InPlace | NodeAxis]:
    """Return the way to run the model at θ + s·z: proved on the run's own first examples, or in place.

    folder: of a run that goes on. Returns (config with perturb and probes_per_forward resolved, tensors that are really trained, axis).
    """
    refuse_other_kind(config.model, loaded, train[0].masked)
    longest, known = max(e.length for e in train), trained_positions(loaded)
    refuse_longer_rows(loaded, longest)
    if known is not None and longest > known:
        say(
            f"max_length={config.max_length}: rows of {longest} tokens; this model was trained on at most {known}"
        )
    refuse_unquantised(config, loaded)
    if config.lr != "auto" and decay_is_lost(float(config.lr), config.weight_decay):
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
        return placed_axis(config, loaded, trained)

    def run(batch: Batch) -> torch.Tensor:
        return losses(loaded, batch)[0]

    small, double = (b.to(config.device) for b in calibration(train))
    # Directions of rank 1 have forwards of their own to prove; those of other kinds are the same but for their numbers.
    kind = RADEMACHER if drawn(config) == GAUSSIAN else drawn(config)
    found = agreed(proof.find_sites(loaded, trained, run, small, double, config.eps, kind))
    for t in found.unread:
        say(f"{t.name}: no forward reads it; it is not trained")
    if found.note:
        say(found.note)
    if config.directions == "example" and not found.stacked:
        raise UserError(f"directions=example: {found.note}; use directions=shared")
    if config.perturb == "nodes":
        return node_axis(config, loaded, proof.live(trained, found), train, found, folder)
    auto = config.probes_per_forward == "auto"
    wanted = 2 if auto else int(config.probes_per_forward)
    group = min(wanted, probes_per_step(config)) if found.stacked else 1
    config = replace(config, perturb="probes", probes_per_forward=group)
    config, trained, made = placed_axis(config, loaded, proof.live(trained, found), found.sites)
    if small.tokens is not None and isinstance(made, ProbeAxis):
        # Only the candidates' rows of the output matrix are ever made.
        head = head_of(loaded)
        dense = [s for s in found.sites if s.module is not head or fast(s) is None]
        made.scratch_bytes = scratch_bytes(dense)
    for line in weak_directions(trained, config.eps, seed=config.seed, kind=drawn(config)):
        say(line)

    if auto and group > 1 and isinstance(made, ProbeAxis):
        room = memory_left(config.device) // 2
        group = this_world().minimum(grouped(config, loaded, made, train, room))
        config = replace(config, probes_per_forward=group)

    def clean() -> torch.Tensor:
        with made.clean(small.rows):
            return run(small)

    return held(cached(config, loaded, trained, train, clean), made), trained, made


def node_axis(
    config: Config, loaded: nn.Module, trained: list[Trained], train: Sequence[Example], found: Found,
    folder: str | Path | None,
) -> tuple[Config, list[Trained], NodeAxis]:  # fmt: skip
    """Build the axis of perturb=nodes: layers proved, in their precision, and measured, or as a resumed run's file has them."""
    group = 2 if config.probes_per_forward == "auto" else min(2, int(config.probes_per_forward))
    config = replace(config, probes_per_forward=group)
    place_in_precision(loaded, trained, config.storage, config.compute)
    made = make_nodes(config, loaded, trained, found, train)

    def clean() -> torch.Tensor:
        return losses(loaded, calibration(train)[0].to(config.device))[0]

    config = cached(config, loaded, trained, train, clean)
    made.place(calibrated(config, loaded, made, train, folder))
    m = made.measured
    say(
        f"{len(made.layers)} linear layers, {len(m.whiteners)} distinct inputs measured on {m.forwards} forwards; "
        f"{m.sinks:.2%} of the tokens are left out of the layers' scales"
    )
    return config, trained, made


def drawn(config: Config) -> str:
    """Return the noise (spec.KINDS) that a config's directions have."""
    return noise_of(config.noise, config.directions)


def calibration(train: Sequence[Example]) -> tuple[Batch, Batch]:
    """Return a batch of two examples, and one of those and as many others under the same mask.

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


def agreed(found: Found) -> Found:
    """Return what one of several processes found, for all: probes share a forward everywhere or nowhere. The two of a direction,
    run in two ways, would differ by rounding that is not theirs; and config.yaml says one thing for the run."""
    world = this_world()
    seen = world.all_gather([found.stacked, found.note])
    if all(stacked for stacked, _ in seen):
        return found
    rank, note = next((r, note) for r, (stacked, note) in enumerate(seen) if not stacked)
    return replace(found, stacked=False, note=f"rank {rank}: {note}" if rank else note)


def placed_axis(
    config: Config, loaded: nn.Module, trained: list[Trained], sites: Sequence[Any] = ()
) -> tuple[Config, list[Trained], ProbeAxis | InPlace]:
    """Return the axis itself, tensors in their precision; without sites it can only apply updates (replay)."""
    inplace = config.perturb == "inplace"
    place_in_precision(loaded, trained, config.storage, config.compute, uniform=inplace)
    if config.train in ADAPTERS:
        place_adapter(trained, space.DTYPES[config.compute])
    for line in mask_tensors(
        trained, config.mask, config.sparsity, config.seed, config.mask_every
    ):  # θ is the base, as stored
        say(line)
    for line in give_turns(loaded, trained, config.blocks):
        say(line)
    refuse_denoise(config, trained)
    attach_rule(trained, rule_of(config))
    common: dict[str, Any] = {"seed": config.seed, "kind": drawn(config), "beta": buffer_beta(config)}
    probes = estimator_of(config).probes(config.q, config.eps)
    fed: dict[str, Any] = common | {"q": config.q, "eps": config.eps}
    captured = config.device.startswith("cuda") and config.storage != "fp64" and not why_eager(config)
    if inplace:
        config = replace(config, probes_per_forward=1)
        if captured and probes == TWO_SIDED.probes(config.q, config.eps):  # the only cycle that is captured
            from zoft.probe.cuda.inplace import DeviceInPlace

            return config, trained, DeviceInPlace(trained, **fed)
        return config, trained, InPlace(trained, **common)
    if captured:
        from zoft.probe.cuda.axis import DeviceAxis

        return (
            config,
            trained,
            DeviceAxis(trained, sites, compute=space.DTYPES[config.compute], probes=probes, **fed),
        )
    return config, trained, ProbeAxis(trained, sites, **common)


def why_eager(config: Config) -> str:
    """Say why a config's steps cannot be captured as CUDA graphs; "" where its method lets them be."""
    if ruled := rule_words(config):
        return f"{ruled} has no kernel"
    if (used := estimator_of(config)).second:
        return f"{used.second.name} asks for a second round of losses that depends on the first"
    if config.update == MOMENTUM:
        return f"update={MOMENTUM} has the directions of many steps in one"
    if config.blocks != "all":
        return f"blocks={config.blocks} moves other tensors at each step"
    if config.mask_every:
        return f"mask_every={config.mask_every} moves other numbers at other steps"
    return ""


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


@torch.no_grad()
def grouped(config: Config, loaded: nn.Module, made: ProbeAxis, train: Sequence[Example], room: int) -> int:
    """Return how many of a step's probes share a forward: as many as have their activations in `room` bytes.

    All of them, or equal groups of whole directions, or 1 where not even the probes of one direction fit. Where probes are
    no multiple of the directions, the groups are as equal as can be. What a probe takes is measured, on the longest
    examples. More probes at once gain where much is frozen, and where batches are small.
    """
    longest = sorted(train, key=lambda e: -e.length)[: config.batch_size]
    batch = collate(longest).to(config.device)
    kept = [*loaded.parameters(), *loaded.buffers(), *batch.inputs.values()]
    with made.clean(batch.rows), Live(kept, count=False) as live:
        losses(loaded, batch)
    each = max(1, live.most - made.scratch_held())  # the scratch was allocated meanwhile
    return group_of(config, each, room)


def group_of(config: Config, each: int, room: int) -> int:
    """Return how many of a step's probes share a forward, if a probe's activations take `each` bytes and `room` has them."""
    probes = probes_per_step(config)
    shared = (
        probes // config.q if probes % config.q == 0 else 1
    )  # probes that share a draw of z, kept together
    units = probes // shared
    fit = min(units, room // (shared * each))
    if not fit:
        return 1
    if probes % config.q:
        return math.ceil(units / math.ceil(units / fit))
    while units % fit:  # groups of one size: no small one at the end
        fit -= 1
    return shared * fit


def held(config: Config, made: ProbeAxis | InPlace) -> Config:
    """Resolve hold_probe where text is written: a probe's weights once beside θ, where half of the free memory has room.

    Either way they are the same numbers and θ is only read; what differs is noise for each probe, or for each token.
    """
    if config.objective not in GENERATED or not isinstance(made, ProbeAxis):
        return config
    need, auto = made.held_bytes(), config.hold_probe == "auto"
    fits = need <= memory_left(config.device) // 2
    world = this_world()
    made.hold = world.all(fits) if auto else bool(config.hold_probe)
    if auto:
        world.auto["hold_probe"] = made.hold
    if auto and not made.hold:
        say(
            f"hold_probe: a probe's weights would need {need / 1e9:.2g} GB more, so they are computed for each token; "
            "perturb=inplace computes them once, in place, with some rounding per step"
        )
    return replace(config, hold_probe=made.hold)


def memory_left(device: str) -> int:
    """Return the bytes that a tensor on this device could take."""
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
    kept = this_world().all(prefix is not None)
    if prefix is not None and not kept:
        prefix.remove()
        note = "another process of this run cannot"
    if note:
        say(f"cache_frozen: {note}")
    return replace(config, cache_frozen=kept)


def first_met(config: Config, train: Sequence[Example]) -> Iterator[list[Row]]:
    """Yield the rows of training, by the batch in which the run meets them first: an evaluation's label bias, then steps."""
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
