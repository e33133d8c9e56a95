"""Make probes θ + s·z of tensors in scratch memory that one forward's sites share."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from zoft.method.blocks import seen_by
from zoft.method.estimators.estimator import Probe
from zoft.method.space import Trained
from zoft.method.updates import advance_trained, mark_advanced, pending_updates
from zoft.models.quant.linear import QuantLinear
from zoft.noise import noise
from zoft.noise.noise import outer_signs
from zoft.noise.spec import PART, SHARED, Update, key
from zoft.probe.outer_forward import outer_product
from zoft.probe.sites import Site

PENDING_MAX = 64  # a tensor that no forward reads is brought up to date at least this often
CLEAN = (Probe(0, 0.0),)  # θ itself: no noise is made for a scale of 0

# Bytes of one probe of a linear layer's matrix that are made at one time. Matrices of the blocks of a 30B model fit;
# output matrices over a whole vocabulary are made in slabs.
SLAB = 1 << 29


def slab_rows(t: Trained) -> int:
    """Return the rows of a matrix whose probes are made at one time: SLAB bytes of one probe, from a multiple of PART on."""
    width = t.stored.shape[1]
    unit = PART // math.gcd(width, PART)
    return max(unit, SLAB // (width * t.compute.itemsize) // unit * unit)


def part(x: torch.Tensor, rows: slice) -> torch.Tensor:
    return x if rows == slice(None) else x[rows]


def start(x: torch.Tensor, rows: slice) -> int:
    """Return the index, in all of x, of the first element of these rows."""
    return (rows.start or 0) * math.prod(x.shape[1:])


def nbytes(t: Trained) -> int:
    """Return the scratch that one probe of a tensor takes."""
    return -(-t.stored.numel() * t.compute.itemsize // 64) * 64  # each tensor starts on a cache line


def dense_bytes(sites: Sequence[Site], dtype: torch.dtype) -> int:
    """Return the bytes that two probes of any quantised site take: its trained tensors, and its matrix written out in dtype."""
    return max(
        (
            2
            * (
                sum(nbytes(t) for t in s.trained)
                + s.module.in_features * s.module.out_features * dtype.itemsize
            )
            for s in sites
            if isinstance(s.module, QuantLinear)
        ),
        default=0,
    )


def in_slabs(t: Trained) -> bool:
    """Say whether a linear layer makes this tensor's probes some rows at a time."""
    return t.stored.ndim == 2 and nbytes(t) > SLAB


def signs_at(
    t: Trained, seed: int, step: int, probes: Sequence[Probe], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signs of a matrix's rows [P, m] and columns [P, n] at each probe of a step."""
    which = [p.direction for p in probes]
    own = list(dict.fromkeys(which))  # the two probes of a direction have the same
    m, n = t.stored.shape
    a, b = outer_signs(m, n, t.id, [key(seed, step, k) for k in own], t.stored.device)
    if len(own) < len(which):
        places = torch.tensor([own.index(k) for k in which], device=a.device)
        a, b = a[places], b[places]
    return a.to(dtype), b.to(dtype)


class Scratch:
    """Make the probes of trained tensors in scratch memory when a site asks for them, and bring θ up to date as it is read.

    seed: the run's. kind: the noise distribution. beta: momentum. size: the fewest bytes that are allocated.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        sites: Sequence[Site],
        *,
        seed: int,
        kind: str,
        beta: float,
        size: int,
    ) -> None:
        self.trained, self.sites, self.seed, self.kind = list(trained), list(sites), seed, kind
        self.beta = beta
        self.updates: list[Update] = []  # committed, and lacked by some tensor
        self.step, self.batch_rows = 0, 0
        self.probes: tuple[Probe, ...] = CLEAN
        self.first = 0  # index of probes[0] in the forward's list: within a site, one probe of it runs
        self.calls: dict[Site, int] = {}  # of each site, in the forward under way
        self.scratch_bytes = size
        self._arenas: list[torch.Tensor] = []  # the last is in use; others only where the first was too small
        self.used = 0  # bytes of it that running sites hold
        # Of a lone probe, for forwards that come many to an `at`: its tensors [1, *shape], made once.
        self._held: dict[int, torch.Tensor] = {}
        self._holding = False

    def groups(self) -> Iterator[tuple[int, list[Probe]]]:
        """Yield (first index, probes) of each run of at most two probes that share a direction, hence one draw of z."""
        i = 0
        while i < len(self.probes):
            pair = [p.direction for p in self.probes[i : i + 2]]
            n = 2 if len(pair) == 2 and pair[0] == pair[1] else 1
            yield i, list(self.probes[i : i + n])
            i += n

    def perturbed(self, tensors: list[Trained], group: list[Probe], first: int) -> list[torch.Tensor]:
        """Return [G, *shape] for each tensor: θ + s·z at the probes of the group, in scratch that the next call reuses.

        first: index of the group's first probe among axis.probes.
        """
        if self._holding:
            return [self._held[t.id] for t in tensors]
        arena = self._room(sum(nbytes(t) for t in tensors) * len(group))
        offset, made = 0, []
        for t in tensors:
            size = t.stored.numel() * t.compute.itemsize * len(group)
            out = arena[offset : offset + size].view(t.compute).view(len(group), *t.stored.shape)
            offset += nbytes(t) * len(group)
            self._fill(t, out, group, first)
            self._mark(t)
            made.append(out)
        return made

    def room(self, shape: Sequence[int], dtype: torch.dtype, taken: int) -> torch.Tensor:
        """Return the scratch of that shape, after the `taken` bytes that the last `perturbed` gave; the next call reuses both."""
        size = math.prod(shape) * dtype.itemsize
        if not self._arenas or self._arenas[-1].numel() < self.used + taken + size:
            self.scratch_bytes = max(self.scratch_bytes, dense_bytes(self.sites, dtype))
        return self._room(taken + size)[taken : taken + size].view(dtype).view(*shape)

    def slabs(
        self, t: Trained, group: list[Probe], first: int
    ) -> Generator[tuple[slice, torch.Tensor], None, None]:
        """Yield (rows, [G, r, D]): a matrix at the probes of the group, some rows at a time, in scratch that the next ones reuse.

        To be closed: what is pending reaches all rows, whatever happens to the one who asks.
        """
        step, end = slab_rows(t), 0
        size = t.stored.shape[1] * t.compute.itemsize * len(group)
        try:
            while end < len(t.stored):
                rows = slice(end, min(end + step, len(t.stored)))
                r = rows.stop - rows.start
                if self._holding:
                    out = self._held[t.id][:, rows]
                else:
                    out = self._room(r * size)[: r * size].view(t.compute).view(len(group), r, -1)
                    self._fill(t, out, group, first, rows)
                end = rows.stop
                yield rows, out
        finally:
            if end < len(t.stored):
                self._fill(t, None, [], first, slice(end, len(t.stored)))
            self._mark(t)

    def _room(self, size: int) -> torch.Tensor:
        """Scratch of that many bytes at least, after what running sites hold."""
        need = self.used + size
        if not self._arenas or self._arenas[-1].numel() < need:
            device = self.trained[0].stored.device
            self._arenas.append(torch.empty(max(need, self.scratch_bytes), dtype=torch.uint8, device=device))
        return self._arenas[-1][self.used :]

    def _fill(
        self, t: Trained, out: torch.Tensor | None, group: list[Probe], first: int, rows: slice = slice(None)
    ) -> None:
        """One pass over rows of θ: the updates they lack, then the probes of the group into out [G, *shape of the rows]."""
        updates = pending_updates(t, self.updates, self.beta)
        noise.perturb(
            part(t.stored, rows), t.id, out, seen_by(t, group, self.seed, self.step), seed=self.seed, step=self.step, noise=self.kind, updates=updates,
            momentum=None if t.momentum is None else part(t.momentum, rows), beta=self.beta,
            start=start(t.stored, rows), floor=t.floor, mask=t.mask, width=t.width,
        )  # fmt: skip

    def _mark(self, t: Trained) -> None:
        """Note that all of a tensor has what was pending."""
        mark_advanced(t, self.updates)

    def gathered(self, t: Trained, rows: torch.Tensor, group: list[Probe], first: int) -> torch.Tensor:
        """Return [G, N, D]: rows [G, N] of θ + s·z of a matrix at the probes of the group, noise made for these rows only."""
        if self._holding:
            return self._held[t.id][0][rows]
        advance_trained(t, self.updates, self.kind, self.beta)
        out = torch.empty(*rows.shape, t.stored.shape[1], dtype=t.compute, device=t.stored.device)
        where: dict[str, Any] = {"seed": self.seed, "step": self.step, "noise": self.kind, "mask": t.mask}
        where["width"] = t.width
        for i, probe in enumerate(seen_by(t, group, self.seed, self.step)):
            noise.gather(t.stored, t.id, rows[i].contiguous(), out[i], *probe, **where)
        return out

    # ---- what outer_forward asks for

    def outer(
        self, weight: Trained, bias: Trained | None, plain_bias: Any, xs: torch.Tensor, transposed: bool
    ) -> torch.Tensor | None:
        """Return `outer_product`, or None where each probe's weights are there, or making them costs less."""
        return None if self._holding else outer_product(self, weight, bias, plain_bias, xs, transposed)

    def plain_product(self, t: Trained, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return x @ θᵀ (transposed), or x @ θ: a matrix at θ itself, with all updates in. x: [n, in], in its compute dtype."""
        assert not self._holding, f"{t.name}: θ itself, where a probe is held"
        if t.stored.dtype == t.compute:
            advance_trained(t, self.updates, self.kind, self.beta)
            return x @ (t.stored.T if transposed else t.stored)
        if transposed and in_slabs(t):
            y = x.new_empty(len(x), len(t.stored))
            with closing(self.slabs(t, list(CLEAN), 0)) as slabs:
                for rows, w in slabs:
                    y[:, rows] = x @ w[0].T
            return y
        (w,) = self.perturbed([t], list(CLEAN), 0)  # [1, *shape]: converted, in scratch
        return x @ (w[0].T if transposed else w[0])

    def scales_of(self, probes: Sequence[Probe], like: torch.Tensor) -> torch.Tensor:
        """Return the scales of probes [P], like's dtype and device."""
        return like.new_tensor([p.scale for p in probes])

    def signs_of(
        self, t: Trained, probes: Sequence[Probe], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the signs of a matrix's rows [P, m] and columns [P, n] at each probe."""
        return signs_at(t, self.seed, self.step, probes, dtype)

    def shared_noise(self, t: Trained) -> torch.Tensor:
        """Return the noise that a step's flipped directions share, of a tensor's shape, in its compute dtype."""
        base = self.kind.removesuffix("_flipped")
        where: dict[str, Any] = {"seed": self.seed, "step": self.step, "direction": SHARED, "noise": base}
        return noise.direction(t.stored.shape, t.id, device=t.stored.device, dtype=t.compute, **where)

    def scratch_held(self) -> int:
        """Return the bytes of scratch that are allocated now."""
        return sum(a.numel() for a in self._arenas)

    def in_scratch(self, x: torch.Tensor) -> bool:
        return any(x.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in self._arenas)
