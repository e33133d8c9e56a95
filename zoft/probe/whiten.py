"""Measure the layers that node perturbation trains: the covariance of their inputs and the scale of their outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SINK = 16.0  # times the median of ‖y‖² over a batch's tokens: a token beyond it is an attention sink
ROOM = 1 << 29  # bytes of covariances that are summed in one sweep over the examples
PART = 1024  # tokens whose vectors are in fp64 at one time
DENSE = 4096  # columns up to which all eigenpairs are computed
ROUNDS = 30  # of subspace iteration, for wider inputs


@dataclass(frozen=True)
class Whitener:
    """Hold P = (C + ρ·(tr C / n)·I)⁻¹ of one layer input, scaled so that tr(P·C) = n: P·x = mean·x + V (gains ∘ Vᵀx).

    vectors: V [n, k], the leading eigenvectors of C. gains: [k]. mean: [], what all other directions get.
    """

    vectors: Tensor
    gains: Tensor
    mean: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the rows of x [N, n], each multiplied by P."""
        return self.mean * x + ((x @ self.vectors) * self.gains) @ self.vectors.T


def whitener_of(c: Tensor, rho: float, rank: int) -> Whitener:
    """Return P of a covariance C [n, n] by its `rank` leading eigenpairs, all others being taken at their mean.

    rho: ρ, what is added to the diagonal in units of C's mean eigenvalue.
    """
    n = len(c)
    k = min(rank, n)
    values, vectors = _leading(c, k)  # [k], [n, k]
    trace = c.diagonal().sum()
    rest = (trace - values.sum()).clamp_min(0) / max(n - k, 1)
    added = rho * trace / n
    p, mean = 1 / (values + added), 1 / (rest + added)
    scale = n / ((p * values).sum() + (n - k) * mean * rest)
    return Whitener(vectors, (p - mean) * scale, mean * scale)


def _leading(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenvalues of C [k] and their vectors [n, k]."""
    n = len(c)
    if n <= DENSE:
        values, vectors = torch.linalg.eigh(c)
        return values[n - k :].clamp_min(0), vectors[:, n - k :]
    start = torch.Generator().manual_seed(0)
    q = torch.randn(n, min(n, 2 * k), dtype=c.dtype, generator=start).to(c.device)
    for _ in range(ROUNDS):
        q = torch.linalg.qr(c @ q)[0]
    values, inner = torch.linalg.eigh(q.T @ c @ q)
    return values[-k:].clamp_min(0), q @ inner[:, -k:]


@dataclass
class Measured:
    """Hold what calibration found. whiteners: one for each distinct input. inputs: layer -> which of them it takes.
    sigmas: layer -> rms of its output. forwards: how many it took. sinks: share of tokens that were left out of σ."""

    whiteners: list[Whitener]
    inputs: dict[str, int]
    sigmas: dict[str, float]
    forwards: int = 0
    sinks: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as named tensors, for a file."""
        found: dict[str, Tensor] = {"forwards": torch.tensor([self.forwards])}
        for i, w in enumerate(self.whiteners):
            found |= {f"{i}.vectors": w.vectors, f"{i}.gains": w.gains, f"{i}.mean": w.mean.reshape(1)}
        for name, i in self.inputs.items():
            found[f"{name}.input"] = torch.tensor([i])
            found[f"{name}.sigma"] = torch.tensor([self.sigmas[name]], dtype=torch.float64)
        return {name: t.cpu().contiguous() for name, t in sorted(found.items())}

    def digest(self) -> str:
        """Return a hash of all of it, for the ledger's header."""
        h = hashlib.blake2b(digest_size=16)
        for name, t in self.tensors().items():
            h.update(name.encode() + bytes(t.numpy().tobytes()))
        return f"blake2b:{h.hexdigest()}"


def measured_from(tensors: dict[str, Tensor], device: Any) -> Measured:
    """Return what `Measured.tensors` has written, on a device."""
    t = {name: value.to(device) for name, value in tensors.items()}
    count = sum(name.endswith(".vectors") for name in t)
    whiteners = [Whitener(t[f"{i}.vectors"], t[f"{i}.gains"], t[f"{i}.mean"][0]) for i in range(count)]
    names = [name.removesuffix(".sigma") for name in t if name.endswith(".sigma")]
    inputs = {name: int(t[f"{name}.input"]) for name in names}
    return Measured(whiteners, inputs, {n: float(t[f"{n}.sigma"]) for n in names}, int(t["forwards"]))


@torch.no_grad()
def measure(
    layers: Sequence[tuple[str, nn.Module]], batches: Sequence[tuple[Any, Tensor, int]], run: Callable[[Any], Any],
    *, rho: float, rank: int, dtype: torch.dtype,
) -> Measured:  # fmt: skip
    """Run clean forwards and return each distinct input's whitener and each layer's σ.

    layers: (name, linear layer), which take [.., n] and give [.., m]. batches: (batch, places of its valid tokens
    int64 [N] in the flattened rows, examples). run(batch): a forward. dtype: that the whiteners are kept in.
    C is the mean over valid tokens of x·xᵀ, summed in fp64 (in `dtype` for more than DENSE inputs). σ is the rms of the output over valid tokens that are no sink:
    a token whose ‖y‖² is beyond SINK times the median of its batch is left out, of σ alone. Layers that are called with one
    and the same tensor, one after the other, share its C.
    """
    inputs = _shared_inputs(layers, lambda: run(batches[0][0]))
    widths = {inputs[name]: _width(module) for name, module in layers}
    owners = {inputs[name]: name for name, _ in reversed(layers)}  # the first layer that takes each input
    whiteners: dict[int, Whitener] = {}
    scales = {name: Scale() for name, _ in layers}
    todo, forwards = sorted(widths), 0
    device = next(layers[0][1].parameters()).device
    while todo:
        chosen: list[int] = []
        size = 0
        while todo and (not chosen or size + _bytes(widths[todo[0]], dtype) <= ROOM):
            size += _bytes(widths[todo[0]], dtype)
            chosen.append(todo.pop(0))
        c = {
            i: torch.zeros(widths[i], widths[i], dtype=_sums(widths[i], dtype), device=device) for i in chosen
        }
        looks = {
            name: _Look(
                c.get(inputs[name]) if owners[inputs[name]] == name else None,
                scales[name] if not forwards else None,
            )
            for name, _ in layers
        }
        with ExitStack() as stack:
            for name, module in layers:
                stack.callback(module.register_forward_hook(looks[name]).remove)
            for batch, places, examples in batches:
                for look in looks.values():
                    look.places = places
                run(batch)
                forwards += examples
        seen = sum(len(places) for _, places, _ in batches)
        for i in chosen:
            w = whitener_of(c.pop(i).div_(seen), rho, rank)
            whiteners[i] = Whitener(w.vectors.to(dtype).contiguous(), w.gains.to(dtype), w.mean.to(dtype))
    sigmas = {name: (s.squares / s.numbers) ** 0.5 for name, s in scales.items()}
    sinks = sum(s.sinks for s in scales.values()) / sum(s.tokens for s in scales.values())
    return Measured([whiteners[i] for i in sorted(whiteners)], inputs, sigmas, forwards, sinks)


@dataclass
class Scale:
    """Sum up the size of a layer's output: squares over numbers, sinks left out of them."""

    squares: float = 0.0
    numbers: float = 0.0
    sinks: int = 0
    tokens: int = 0

    def add(self, y: Tensor) -> None:
        """Take the outputs of a batch's valid tokens [N, m]."""
        size = torch.cat([part.double().square().sum(1) for part in y.split(PART)])  # [N]
        keep = size <= SINK * size.median()
        self.squares += float(size[keep].sum())
        self.numbers += float(keep.sum()) * y.shape[1]
        self.sinks += int((~keep).sum())
        self.tokens += len(keep)


@dataclass(eq=False)
class _Look:
    """A forward hook that adds a batch's tokens to the covariance of a layer's input, and to the scale of its output."""

    c: Tensor | None
    scale: Scale | None
    places: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        if self.c is not None:
            for part in args[0].reshape(-1, len(self.c))[self.places].split(PART):
                x = part.to(self.c.dtype)
                self.c.addmm_(x.T, x)
        if self.scale is not None:
            self.scale.add(out.reshape(-1, out.shape[-1])[self.places])


def _sums(n: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a covariance of n inputs is summed in: fp64, but where it would be large beside the layer."""
    return torch.float64 if n <= DENSE else torch.promote_types(dtype, torch.float32)


def _bytes(n: int, dtype: torch.dtype) -> int:
    return n * n * _sums(n, dtype).itemsize


def _width(module: nn.Module) -> int:
    """Return the inputs of a linear layer: of transformers' Conv1D, too, whose matrix is [n, m]."""
    weight: Any = module.weight
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]


def _shared_inputs(layers: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> dict[str, int]:
    """Return which distinct input each layer takes, counted from 0 in the order of the forward."""
    found: dict[str, int] = {}
    last: list[Tensor] = []  # kept alive, so that its memory is nobody else's meanwhile

    def look(name: str, x: Tensor) -> None:
        same = bool(last) and (
            x is last[0] or (x.data_ptr() == last[0].data_ptr() and x.shape == last[0].shape)
        )
        found[name] = max(found.values(), default=-1) + (not same)
        last[:] = [x]

    with ExitStack() as stack:
        for name, module in layers:
            handle = module.register_forward_hook(lambda m, args, out, name=name: look(name, args[0]))
            stack.callback(handle.remove)
        run()
    return found
