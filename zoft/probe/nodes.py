"""Node perturbation: probes that add signs to what linear layers compute, per example and token, and the update pass.

Specification
    u in {±1} [tokens, m] for each trained layer y = W x (+ b): noise.spec, node; valid tokens only.
    Probe s = ±1: y + s·eps·σ·u, σ the layer's own scale (whiten.measure).
    Update pass, one clean forward: each layer computes y with its old W, then
        Ĝ = Σ_i Σ_t (c_i / σ) u_{i,t} (P x_{i,t})ᵀ,  W ← round(decay·W - lr·Ĝ / rms(Ĝ)),
    with c_i the example's coefficient, P the whitener of the layer's input. No activation is kept beyond the layer.
Sources: whitened node perturbation: Dalm et al. 2023 (arXiv 2310.00965) decorrelate inputs; Ren et al. 2022 (2210.03310)
perturb activities. Here P is fixed at the start, signs replace Gaussians, each matrix moves by its own rms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoft.errors import UserError
from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.method.updates import mark_advanced
from zoft.models.calls import takes
from zoft.models.head import uncached
from zoft.noise import reference
from zoft.noise.nodes import LONGEST, WIDEST, Tokens, node_signs
from zoft.noise.spec import Update, key
from zoft.probe.lockstep import Lockstep
from zoft.probe.sites import Found, Site
from zoft.probe.whiten import Measured, Whitener


@dataclass(eq=False)
class Layer:
    """Hold one trained linear layer. turned: its matrix is stored as [n, m] (transformers' Conv1D)."""

    name: str
    module: nn.Module
    trained: Trained
    turned: bool
    sigma: float = 1.0
    whitener: Whitener | None = None  # None: P = I

    @property
    def units(self) -> int:
        """Return the number of outputs m."""
        return self.trained.stored.shape[1 if self.turned else 0]


def shares(change: Update, microbatches: Sequence[Tokens]) -> list[Tensor]:
    """Return each microbatch's part of a step's coefficients c_i = -multipliers, fp64 [its examples]."""
    c = -torch.tensor(change.multipliers, dtype=torch.float64)  # [N]
    counts = [int(tokens.owners.max()) + 1 for tokens in microbatches]
    assert sum(counts) == len(c), f"{sum(counts)} examples, {len(c)} coefficients"
    return list(c.split(counts))


def is_conv1d(module: nn.Module) -> bool:
    """Say whether it is transformers' Conv1D: y = x W + b, W [n, m]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def layers_of(trained: Sequence[Trained], found: Found) -> list[Layer]:
    """Return the layers of proved sites. Raises UserError for a trained tensor that is no linear layer's matrix, or a layer
    that is called more than once a forward, or whose rows were not found."""
    layers = []
    owner = {t.id: s for s in found.sites for t in s.trained}
    for t in trained:
        site = owner[t.id]
        if (why := _unfit(site, t)) != "":
            raise UserError(f"perturb=nodes: {t.name} {why}; leave it out of `train`")
        layers.append(Layer(site.name, site.module, t, is_conv1d(site.module)))
    return layers


def _unfit(site: Site, t: Trained) -> str:
    """Return why a tensor's site cannot be perturbed at its outputs; "" where it can."""
    linear = type(site.module) is nn.Linear or is_conv1d(site.module)
    if not linear or t.param is not getattr(site.module, "weight", None):
        return f"belongs to a {type(site.module).__name__}: only matrices of linear layers are trained"
    if "forward" in site.module.__dict__:
        return "belongs to a layer with a forward of its own"
    if len(site.calls) != 1:
        return f"is read {len(site.calls)} times per forward: its layer must run once"
    if site.calls[0].inputs[:1] != [0] or site.calls[0].outputs != [0]:
        return "belongs to a layer whose first dimension does not hold rows"
    if max(t.stored.shape) > WIDEST:
        return f"is wider than {WIDEST}"
    return ""


def tokens_of(
    inputs: Mapping[str, Tensor], owners: Sequence[int], rows: Sequence[int], candidates: Sequence[int],
    shared: Sequence[int], scored: Tensor, before: int | str = "all",
) -> Tokens:  # fmt: skip
    """Return a batch's tokens, each with what its noise is drawn by.

    scored: int64, the places that are scored (Batch.positions), some in every row. before: "all", or how many tokens are
    taken that end with a row's first scored one; those up to its last scored one are taken, too.
    inputs: with an attention mask [R, T], padded on either side. owners, rows, candidates: of each batch row, its
    example's place in the batch, that example's place in the training set, and which candidate it holds. shared: how
    many tokens all rows of the row's example begin with.
    """
    mask = inputs["attention_mask"].cpu() > 0  # [R, T]
    at = mask.flatten().nonzero()[:, 0]  # [N]
    positions = (mask.cumsum(1) - 1).flatten()  # of every place
    if before != "all":
        ends = positions[scored.cpu()]
        whose = scored.cpu() // mask.shape[1]
        last = torch.zeros(len(mask), dtype=torch.int64).scatter_reduce_(0, whose, ends, "amax")
        first = last.scatter_reduce(0, whose, ends, "amin")
        here, row = positions[at], at // mask.shape[1]
        at = at[(here > first[row] - int(before)) & (here <= last[row])]
    row = at // mask.shape[1]
    position = positions[at]
    if len(position) and int(position.max()) >= LONGEST:
        raise UserError(f"max_length: perturb=nodes counts {LONGEST} tokens of a row; lower it")
    whole = torch.tensor([owners, rows, candidates, shared]).reshape(4, -1)[:, row]  # [4, N]
    part = torch.where(position < whole[3], 0, whole[2] + 1)
    return Tokens(at, whole[1], part, position, whole[0])


class NodeAxis:
    """Run a model's forwards, inside `at`, with signs added to the outputs of its trained layers.

    seed: the run's. The weights change in the update pass alone (`update`). `tokens` must be set before probes are run.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], *, seed: int) -> None:
        self.model, self.layers, self.seed = model, list(layers), seed
        self.trained = [layer.trained for layer in layers]
        self.tokens: Tokens | None = None  # of the batch whose probes are run
        self.forwards = 0  # that calibration took
        self.hold = False
        self.step = 0
        self.keeping: dict[str, Tensor] | None = (
            None  # layer -> mean input of the probes under way, where it is kept
        )
        self.met: tuple[Tensor, Tensor] | None = None  # the last input that was kept, and its mean
        for layer in layers:
            if layer.trained.stored.dtype != layer.trained.compute:
                _compute_in(layer)

    def place(self, measured: Measured) -> None:
        """Give every layer its σ and the whitener of its input."""
        self.measured, self.forwards = measured, measured.forwards
        for layer in self.layers:
            layer.sigma = measured.sigmas[layer.name]
            layer.whitener = measured.whiteners[measured.inputs[layer.name]]

    @contextmanager
    def at(self, step: int, probes: Sequence[Probe], rows: int) -> Iterator[None]:
        """Run forwards in this context at the given probes of a step: rows · len(probes) rows, probe-major.

        A probe's direction does not matter: the signs belong to examples. Its scale does; 0 adds nothing.
        """
        self.step = step
        scales = [p.scale for p in probes]
        if not any(scales):
            yield
            return

        def seen(layer: Layer, args: tuple, out: Tensor) -> Tensor:
            if self.keeping is not None:
                self.keep(layer, args[0], len(scales))
            return self.add(layer, out, scales)

        with self._hooked(seen):
            yield
        self.met = None

    def places(self) -> Tensor:
        """Return the places of this batch's tokens in its flattened rows, int64 [N]."""
        assert self.tokens is not None, "tokens are set before probes are run"
        return self.tokens.places

    def keep(self, layer: Layer, x: Tensor, probes: int) -> None:
        """Add half of a layer's input [P·R, T, n] at each probe to what is kept of it: the mean of both, [N, n]."""
        assert self.keeping is not None
        if self.met is None or self.met[0] is not x:  # layers that share an input share what is kept
            rows = x.view(probes, -1, x.shape[-1]).index_select(1, self.places())  # [P, N, n]
            wide = torch.promote_types(x.dtype, torch.float32)
            self.met = (x, (rows.to(wide).sum(0) / 2).to(x.dtype))
        half, old = self.met[1], self.keeping.get(layer.name)
        self.keeping[layer.name] = half if old is None else old + half

    def add(self, layer: Layer, out: Tensor, scales: Sequence[float]) -> Tensor:
        """Return a layer's outputs [P·R, T, m], those of probe p with scales[p]·σ·u of this batch's tokens added."""
        tokens = self.tokens
        assert tokens is not None, "tokens are set before probes are run"
        y = out.reshape(len(scales), -1, layer.units)  # [P, R·T, m]
        assert y.shape[1] >= len(tokens.places), (layer.name, out.shape, len(tokens.places))
        u = node_signs(tokens, layer.units, layer.trained.id, self.seed, self.step).to(y.dtype)  # [N, m]
        y = y.clone() if y.data_ptr() == out.data_ptr() else y
        for p, scale in enumerate(scales):
            y[p].index_add_(0, tokens.places, u, alpha=scale * layer.sigma)
        return y.view(out.shape)

    @contextmanager
    def clean(self, rows: int = 0) -> Iterator[None]:
        """Run forwards in this context at the weights as they are."""
        yield

    @contextmanager
    def _hooked(self, call: Callable[[Layer, tuple, Tensor], Tensor | None]) -> Iterator[None]:
        handles = [
            layer.module.register_forward_hook(lambda m, args, out, layer=layer: call(layer, args, out))
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def update(self, change: Update, microbatches: Sequence[tuple[Mapping[str, Tensor], Tokens]]) -> None:
        """Run the update pass of a step: every trained layer moves once all microbatches have passed it.

        change: multipliers are -c_i of the step's examples, in their order over all microbatches; lr and decay apart.
        microbatches: (inputs [R, T], tokens), whose owners count the examples of the microbatch. If all c are 0, only the
        decay moves the weights.
        """
        tokens = [t for _, t in microbatches]
        each = shares(change, tokens)

        def move(layer: Layer, xs: list[Tensor]) -> None:
            self.move_by(layer, [x[t.places] for x, t in zip(xs, tokens, strict=True)], tokens, each, change)

        self.pass_over([inputs for inputs, _ in microbatches], move)
        self.moved(change)

    def update_kept(
        self, change: Update, microbatches: Sequence[tuple[Mapping[str, Tensor], Tokens]]
    ) -> None:
        """Move every trained layer by the inputs that were kept of a step's probes, without a forward.

        microbatches: (layer -> its mean input [N, n], tokens). They differ from the update pass's inputs by O(eps²).
        """
        tokens = [t for _, t in microbatches]
        each = shares(change, tokens)
        for layer in self.layers:
            self.move_by(layer, [kept[layer.name] for kept, _ in microbatches], tokens, each, change)
        self.moved(change)

    def move_by(
        self,
        layer: Layer,
        xs: Sequence[Tensor],
        tokens: Sequence[Tokens],
        each: Sequence[Tensor],
        change: Update,
    ) -> None:
        """Move one layer by its inputs [N, n] at the tokens of each microbatch, and these' coefficients."""
        parts = (self.product(layer, x, t, c, change.step) for x, t, c in zip(xs, tokens, each, strict=True))
        move_layer(layer, functools.reduce(torch.Tensor.add_, parts), change)

    def pass_over(
        self, microbatches: Sequence[Mapping[str, Tensor]], move: Callable[[Layer, list[Tensor]], None]
    ) -> None:
        """Run one clean forward of each microbatch, all in step: move(layer, its input [R·T, n] in each of them) is called
        for every trained layer once all of them have passed it. What follows the last layer is not run."""
        todo = {layer.name for layer in self.layers}
        lock = Lockstep(len(microbatches))

        def all_met(layer: Layer, xs: list[Tensor]) -> None:
            todo.discard(layer.name)
            move(layer, xs)

        def forward(inputs: Mapping[str, Tensor]) -> None:
            done: set[str] = set()

            def meet(layer: Layer, args: tuple, out: Tensor) -> None:
                lock.meet(args[0].reshape(-1, args[0].shape[-1]), lambda xs: all_met(layer, xs))
                done.add(layer.name)
                if len(done) == len(self.layers):
                    raise _Passed  # what follows the last trained layer moves nothing

            lock.local.meet = meet
            extra = {"use_cache": False} if takes(self.model, "use_cache") else {}
            try:
                self.model(**inputs, **extra)
            except _Passed:
                return
            raise AssertionError(f"a forward did not reach {sorted(todo)}")

        calls = [lambda i=inputs: forward(i) for inputs in microbatches]
        with uncached(self.model), self._hooked(lambda layer, args, out: lock.local.meet(layer, args, out)):
            lock.run(calls)

    def moved(self, change: Update) -> None:
        """Note that the weights are at this step."""
        mark = [Update(change.step, change.seed, (0.0,))]
        for t in self.trained:
            mark_advanced(t, mark)

    def gradient(self, layer: Layer, x: Tensor, tokens: Tokens, c: Tensor, step: int) -> Tensor:
        """Return one batch's part of Ĝ [m, n], fp32 (fp64 for fp64 weights), from x [R·T, n] and c [examples]."""
        return self.product(layer, x[tokens.places], tokens, c, step)

    def product(self, layer: Layer, x: Tensor, tokens: Tokens, c: Tensor, step: int) -> Tensor:
        """Return what `gradient` does from the inputs of the batch's tokens alone, [N, n]."""
        wide = torch.promote_types(layer.trained.stored.dtype, torch.float32)
        x = x.to(wide)
        if layer.whitener is not None:
            x = layer.whitener.apply(x)
        weight = c.to(x.device, wide)[tokens.owners] / layer.sigma  # [N]
        u = node_signs(tokens, layer.units, layer.trained.id, self.seed, step).to(wide)  # [N, m]
        return u.mul_(weight[:, None]).T @ x

    # What a trainer asks of every axis; nothing is ever pending here.

    def settle(self) -> None:
        """Forget nothing: no update is pending."""

    def flush(self) -> None:
        """Apply nothing: no update is pending."""

    def repeat_step(self, step: int, probes: Sequence[Probe]) -> None:
        """Repeat what a step's probes do to the weights, for replay: nothing."""

    def release(self) -> None:
        """Give the layers their own forwards back."""
        for layer in self.layers:
            layer.module.__dict__.pop("forward", None)

    def scratch_held(self) -> int:
        """Return the bytes of scratch that are held: none."""
        return 0


class _Passed(Exception):
    """The last trained layer has moved: the rest of this forward is not needed."""


def _compute_in(layer: Layer) -> None:
    """Let a layer whose matrix is stored in another dtype convert it for each product."""
    t = layer.trained
    module: Any = layer.module

    def forward(x: Tensor) -> Tensor:
        w = module.weight.to(t.compute)
        bias = None if module.bias is None else module.bias.to(t.compute)
        return nn.functional.linear(x, w.T if layer.turned else w, bias)

    module.forward = forward


@torch.no_grad()
def move_layer(layer: Layer, g: Tensor, change: Update) -> None:
    """Move a layer's matrix: W ← round(decay·W - lr·Ĝ / rms(Ĝ)), rounded stochastically to 16 bits by the step's bits.

    g: Ĝ [m, n]; it is changed. lr is the change's own fp32 value. A Ĝ of zeros moves nothing.
    """
    t = layer.trained
    decay = change.decay if t.decays else 1.0
    if not (change.lr and any(change.multipliers)) and decay == 1:
        return
    rms = g.square().mean(dtype=torch.float64).sqrt()
    factor = torch.where(rms > 0, change.lr / rms, 0.0)  # nothing waits for a GPU
    g = g.T.contiguous() if layer.turned else g
    new = t.stored.to(g.dtype) * decay if decay != 1 else t.stored.to(g.dtype, copy=True)
    new.sub_(g.mul_(factor))
    if t.stored.itemsize == 2:
        bits = key(change.seed, change.step, 0)
        flat, out = new.view(-1), t.stored.view(-1)
        for start in range(0, flat.numel(), reference.CHUNK):
            part = flat[start : start + reference.CHUNK]
            r = reference.halves(start, part.numel(), t.id, 1, bits, part.device)
            out[start : start + reference.CHUNK] = reference.round_stochastic(part, r, t.stored.dtype)
    else:
        t.stored.copy_(new)
