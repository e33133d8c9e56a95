"""Base + ledger -> weights, a tensor at a time; and 16-bit weights rebuilt without the noise of their roundings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zoft import console
from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.ledger.check import refuse_unsound
from zoft.ledger.log import Event, Log, read_ledger, updates_of
from zoft.method import space
from zoft.method.blocks import Turn
from zoft.method.estimators.named import estimator_of
from zoft.method.masks import mask_tensor
from zoft.method.momentum import Window, buffer_beta, window_beta
from zoft.method.rules import attach_rule, rule_of, rule_words
from zoft.method.space import FP16_MAX, Trained, adopt_tensor, frozen_dtype
from zoft.method.updates import advance_trained
from zoft.models.safetensors_writer import write_shards
from zoft.models.saving import cast_tensor, finish_folder, save_model, whole_folder
from zoft.noise.spec import Update
from zoft.probe.inplace import InPlace
from zoft.replay.base_weights import Base, find_base
from zoft.replay.saved_model import model_card_of, read_result
from zoft.replay.snapshot import newest_snapshot
from zoft.train import header as headers
from zoft.train import parts
from zoft.train.axis import drawn
from zoft.train.header import page_of, with_plan
from zoft.train.parts import resolve_device

WORK = 1 << 29  # updates × elements between two looks at progress, and at Ctrl-C
SIXTEEN = ("fp16", "bf16")
Found = tuple[int, Path] | None  # a snapshot: its step and its file
AT_ONCE = (64, 4096)  # updates that one pass takes at least, where a pass is worth it, and at most


@dataclass(frozen=True)
class Ask:
    """Say what of a run is rebuilt: after `steps` steps (None: all there are); with fp32 weights in place of 16-bit ones
    (`exact`); with 16-bit weights rounded once, from those (`denoise`)."""

    steps: int | None = None
    exact: bool = False
    denoise: bool = False


def requested(config: Config, folder: Path, ask: Ask) -> tuple[Config, Log]:
    """Return the run's config under its ledger's plan, and its ledger up to what is asked for; reads only.

    Raises UserError for steps that the ledger does not have, and for a wish that its storage makes void.
    """
    header, records, events = refuse_unsound(folder, read_ledger(folder / "ledger"))
    headers.agree(header, page_of(config), folder)
    trained = header["trained"]
    n = len(records) if ask.steps is None else ask.steps
    if n > len(records):
        raise UserError(f"--step {n}: the ledger of {folder} has {len(records)} steps so far")
    config = with_plan(config, header)
    if ask.exact and ask.denoise:
        raise UserError(
            "--denoise: weights replayed with --storage fp32 were never rounded; leave one of them out"
        )
    if ask.exact or ask.denoise:
        word = "--denoise" if ask.denoise else "--storage fp32"
        if config.perturb == "nodes":
            raise UserError(
                f"{word}: {folder} was trained with perturb=nodes: its weights follow from its update passes, and no sum over the "
                "ledger has them; leave it out"
            )
        if "+" in header["base"]:
            raise UserError(
                f"{word}: {folder} has an adapter in place, which the sum over the ledger leaves out"
            )
        if ruled := rule_words(config):
            raise UserError(
                f"{word}: {folder} was trained with {ruled}, so base and ledger give no plain sum"
            )
        if config.mask == "magnitude" and config.sparsity:
            raise UserError(
                f"{word}: what moves depends on the weights in {folder}, so base and ledger give no sum"
            )
        if not any(dtype in SIXTEEN for _, _, dtype in trained.values()):
            raise UserError(
                f"{word}: {folder} stores its weights in {config.storage}; there is no rounding to undo"
            )
    events = [e for e in events if e.step <= n]
    if ask.denoise:
        events.append(Event("denoise", n))
    if ask.exact:
        rounded = {
            name: [tid, shape, "fp32"] for name, (tid, shape, dtype) in trained.items() if dtype in SIXTEEN
        }
        header = {**header, "trained": trained | rounded}
        saved = "fp32" if config.save_dtype == "auto" else config.save_dtype
        config, events = replace(config, storage="fp32", perturb="probes", save_dtype=saved), []
    return config, Log(header, records[:n], events)


def replay_tensors(config: Config, folder: Path, out: Path, ask: Ask) -> int:
    """Write the model of the run in `folder` to `out`, tensor by tensor; returns the number of its steps.

    Memory: the largest tensor, in its checkpoint's dtype, its storage's and its momentum (and fp32, to denoise).
    Raises UserError for another base.
    """
    config, log = requested(resolve_device(config), folder, ask)
    base = find_base(config, log.header["base"], str(folder))
    headers.agree(log.header, {"model": headers.model_settings(base.model)}, folder)
    dtype = base.model.checkpoint_dtype if config.save_dtype == "auto" else space.DTYPES[config.save_dtype]
    found = start(folder, log, ask)
    result, facts = result_and_facts(config, folder, log, ask)
    tokenizer, text = base.tokenizer(), model_card_of(config, result, **facts)
    with progress(log, found[0] if found else 0) as did:
        made = weights(config, base, log, found, did)
        if base.whole:
            state = dict(base.model.named_parameters())
            for name, tensor in made:
                if name in log.header["trained"]:
                    state[name].data = tensor.cpu()
            save_model(base.model, tokenizer, out, dtype=dtype, card=text, dequantise=config.save_dequantised)
        else:
            with whole_folder(out) as draft:
                stream(base, made, draft, dtype)
                finish_folder(draft, tokenizer, dtype, text)
    return len(log.records)


def result_and_facts(
    config: Config, folder: Path, log: Log, ask: Ask
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (the run's result, where this is the model that it ended with, else nothing; what else a card should say)."""
    steps = len(log.records)
    if steps == config.steps and not (ask.exact or ask.denoise):
        return read_result(folder), {}
    how = (
        {"replayed with": "fp32 storage"}
        if ask.exact
        else {"denoised at the end": "yes"}
        if ask.denoise
        else {}
    )
    return {}, {"steps": f"{steps} of {config.steps}", **how}


def stream(base: Base, made: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write weights, config.json and generation_config.json, as save_pretrained would write them."""
    ignored = set(getattr(base.model, "_keys_to_ignore_on_save", None) or ())
    sizes = {
        name: (tuple(t.shape), dtype if t.is_floating_point() else t.dtype)
        for name, t in base.tensors.items()
        if name not in ignored
    }

    def cast() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in made:
            if name in sizes:
                yield name, cast_tensor(name, tensor, sizes[name][1])

    write_shards(folder, sizes, cast())
    model = base.model
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def start(folder: Path, log: Log, ask: Ask) -> Found:
    """Return (step, file) of the newest snapshot that what is asked for can start from."""
    if ask.exact or ask.denoise:
        return None
    found = newest_snapshot(folder, log.header, log.events, say=parts.say)
    if found:
        parts.say(f"starting from the snapshot at step {found[0]}")
    return found


def weights(
    config: Config, base: Base, log: Log, found: Found = None, did: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all of the model's state: trained ones as the run has them, others as it ran with them.

    found: the snapshot to start from. did(updates × elements) is told how it goes.
    """
    trained, params = log.header["trained"], {n for n, _ in base.model.named_parameters()}
    tensors = Tensors(config, log)
    for name in base.tensors:
        theta = base.read(name)
        if name in trained:
            yield name, tensors.at_the_end(name, theta, found, did)
        else:
            yield name, theta.to(frozen_dtype(theta, config.compute, name in params))


@dataclass
class Tensors:
    """Replay the trained tensors of a ledger, each on its own: none of them depends on another."""

    config: Config
    log: Log

    def __post_init__(self) -> None:
        window = Window(window_beta(self.config))
        self.updates = [window.take(u) for u in updates_of(self.log.header, self.log.records)]
        self.beta = buffer_beta(self.config)
        self.denoised = max((e.step for e in self.log.events if e.kind == "denoise"), default=0)

    def at_the_end(self, name: str, theta: Tensor, found: Found, did: Callable[[int], None]) -> Tensor:
        """Return a tensor after the log's last step, from its base (any dtype), or from a snapshot (step, file)."""
        dtype = space.DTYPES[self.log.header["trained"][name][2]]
        theta = theta.to(self.config.device)
        if found and found[0] >= self.denoised:
            t = self._of(name, theta, dtype)
            t.step, path = found
            with safe_open(path, "pt", device=self.config.device) as file:
                t.stored = file.get_tensor(name).clone()
                if f"{name}@momentum" in set(file.keys()):
                    t.momentum = file.get_tensor(f"{name}@momentum").clone()
                for key, value in t.state.items():
                    value.copy_(file.get_tensor(f"{name}@{key}"))
        elif self.denoised and dtype.itemsize == 2:
            exact = self.summed(name, theta, self.denoised, did)
            t = self._of(name, theta, dtype)
            t.stored, t.step, t.momentum = nearest(exact.stored, dtype), self.denoised, exact.momentum
        else:
            t = self._of(name, theta, dtype)
        self._repeat(t, did)
        return t.stored

    def summed(self, name: str, theta: Tensor, steps: int, did: Callable[[int], None]) -> Trained:
        """Return θ + Σ multipliers·z of the first `steps` steps in fp32, momentum with it: nothing is rounded to 16 bits."""
        t = self._of(name, theta, torch.float32)
        advance(t, [u for u in self.updates if u.step < steps], self.config, did)
        return t

    def _of(self, name: str, theta: Tensor, dtype: torch.dtype) -> Trained:
        c = self.config
        t = adopt_tensor(name, nn.Parameter(theta.to(dtype), requires_grad=False))
        mask_tensor(t, c.mask, c.sparsity, c.seed, c.mask_every)
        if turns := self.log.header.get("turns"):
            t.turn = Turn(self.config.blocks, max(turns.values()) + 1, turns[name])
        t.floor = self.log.header.get("floors", {}).get(name)
        attach_rule([t], rule_of(self.config))
        return t

    def _repeat(self, t: Trained, did: Callable[[int], None]) -> None:
        """The run's own steps from where t is, to the bit."""
        if self.config.perturb != "inplace":
            advance(t, [u for u in self.updates if u.step >= t.step], self.config, did)
            return
        c, todo = self.config, {u.step: u for u in self.updates}
        probes = estimator_of(c).probes(c.q, c.eps)
        before = t.momentum
        axis = InPlace([t], seed=c.seed, kind=drawn(c), beta=self.beta)  # with a buffer of its own
        if before is not None and t.momentum is not None:
            t.momentum.copy_(before)
        for record in self.log.records[t.step :]:
            axis.repeat_step(record.step, probes)
            if record.step in todo:
                axis.commit(todo[record.step])
            did(t.stored.numel())
        axis.flush()


def advance(t: Trained, updates: Sequence[Update], config: Config, did: Callable[[int], None]) -> None:
    """Run updates.advance_trained in slices: as large as small tensors need, whose plans cost more than their noise."""
    least, most = AT_ONCE
    size = min(most, max(least, 1 << (WORK // max(1, t.stored.numel())).bit_length()))
    for i in range(0, len(updates), size):
        some = updates[i : i + size]
        advance_trained(t, some, drawn(config), buffer_beta(config))
        did(len(some) * t.stored.numel())


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to 16 bits, to nearest even; fp16 stops at its largest number, as updates do."""
    return (x.clamp(-FP16_MAX, FP16_MAX) if dtype == torch.float16 else x).to(dtype)


@torch.no_grad()
def denoise(folder: Path, config: Config, log: Log, steps: int, trained: Sequence[Trained]) -> str:
    """Set θ ← nearest(base + Σ multipliers·z), the sum in fp32, for what a run keeps in 16 bits; returns a line about it.

    The sum is that of the log's first `steps` steps. A function of base and ledger alone: the rounding noise that the
    run has gathered is gone, momentum and fp32 tensors stay as they are. The base is read again from the model's files,
    a tensor at a time. trained: up to date.
    """
    began = time.monotonic()
    base = find_base(config, log.header["base"], str(folder))
    tensors = Tensors(config, log)
    noise = moved = numbers = 0.0
    for t in trained:
        if t.stored.element_size() == 2:
            theta = base.read(t.name).to(t.stored.device)
            exact = tensors.summed(t.name, theta, steps, lambda n: None).stored
            noise += float((t.stored.float() - exact).norm()) ** 2
            moved += float((exact - theta.float()).norm()) ** 2
            numbers += exact.numel()
            t.stored.copy_(nearest(exact, t.stored.dtype))
    share = (
        f"rounding had moved it {(noise / moved) ** 0.5:.2g} × as far as training"
        if moved
        else "nothing had moved"
    )
    return f"denoised {numbers:,.0f} numbers at step {steps} in {time.monotonic() - began:.1f} s: {share}"


def describe_replay(config: Config, folder: Path, ask: Ask) -> str:
    """Return what a replay would make, as text; the base and the ledger are checked, nothing is written."""
    config, log = requested(resolve_device(config), folder, ask)
    base = find_base(config, log.header["base"], str(folder))
    numbers, total = numbers_of(log), sum(t.numel() for t in base.tensors.values())
    noted = [f"{e.kind} at step {e.step}" for e in log.events if not ask.denoise]
    return (
        f"{folder}: {len(log.records)} of {config.steps} steps on {config.model}, whose weights are the ledger's base "
        f"({log.header['base']})\n"
        f"{len(log.header['trained'])} tensors trained, {numbers:,} of {total:,} numbers, stored in {config.storage}"
        f"{'; ' + ', '.join(noted) if noted else ''}\n"
        "nothing was written; --out DIR writes the model"
    )


def numbers_of(log: Log) -> int:
    """Return how many numbers a run trains."""
    return sum(math.prod(shape) for _, shape, _ in log.header["trained"].values())


@contextmanager
def progress(log: Log, begin: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, a line now and then elsewhere; yields did(updates × elements)."""
    total = max(1, numbers_of(log) * sum(not r.skipped for r in log.records[begin:]))
    with console.bar(f"replaying {len(log.records) - begin} steps", total) as did:
        yield did
