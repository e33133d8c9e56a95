"""Specify the noise: every random number of a step is a pure function of where it is used, on every device alike.

Specification
    Generator: Philox4x32-10 [1]. key(seed, step, k) = the first two output words for counter
    (step mod 2³², step // 2³², k, 0x7a6f6674) and key (seed mod 2³², seed // 2³²).
    Words of element i of a tensor: counter (c mod 2³², c // 2³², tensor_id, purpose), c and purpose as below.

    gaussian (purpose 0): c = i // 8; word (i mod 8) // 2 serves an even element and the odd one after it.
        Of a word: u = (k + ½)·2⁻¹⁶ in (0, 1), k its upper 16 bits; v = (j + ½)·2⁻¹⁶ in (-½, ½), j = int16(its lower 16);
        z = sqrt(-2 ln u)·cos 2πv (even element), sqrt(-2 ln u)·sin 2πv (odd), as fp32, within GAUSSIAN_BOUND of that: the
        same bits on every CPU; on a GPU within GAUSSIAN_BOUND_GPU.
        16 bits each for u and v, not 32: half the Philox work an element, which is what limits a GPU. What it costs, all
        exact sums over the 2³² words: |z| <= sqrt(34 ln 2) = 4.8546 (a normal z is beyond once in 830,000), never 0
        (>= 1.8e-7), symmetric, mean 0, variance 1 - 5.29e-6 (1 - 2⁻¹⁷ ln 2), fourth moment 2.99979, P(|z| > 3) short by
        3e-5 of it and P(|z| > 4) by 1.7e-3, the distribution function within 6.1e-7 of the normal one. 65,536 angles,
        0.0055° apart; 65,536 radii, 2.5e-5 apart at 1 but 0.23 at the far end: 4.85, 4.62, 4.51, …
    rademacher (purpose 0): c = i // 128, bit i mod 32 of word (i mod 128) // 32; set: +1, clear: -1. Exact.
    rank1: a tensor of a given width n (its last dimension, `width`) is a matrix of rows r = i // n and columns j = i mod n;
        z = a_r·b_j. a is drawn like rademacher with purpose 4 and r for i, b with purpose 5 and j for i. A tensor of width 0
        has no such form: its z is rademacher's. Entries are uncorrelated with variance 1, so that to first order the estimate
        is dense noise's; E|(gᵀz)z|² is (m + 2)(n + 2)|g|², where dense noise has (mn + 2)|g|².
    gaussian_flipped, rademacher_flipped: z = u∘s, u the gaussian or rademacher noise of direction SHARED of the step, which
        all of its directions have in common, s the direction's own rank1. So one draw serves many uncorrelated directions.
    node (purpose 3): a sign for each output unit of a layer at each token, exact. A token is (row, part, position): row is the
        example's place in the training set; part is 0 for what all rows of the example begin with and c + 1 for the rest of
        candidate c's row; position counts the row's tokens from 0 and never padding. The key is key(seed, step, part), tensor_id
        is the layer's matrix, c = row·2³² + position·2¹⁴ + unit // 128, and the bit is that of rademacher for i = unit.
    rounding (purpose 1, key of direction 0): c = i // 8, half-word i mod 8, low halves first: 16 bits r.
        to bf16: add r to the fp32 bits and drop the lower 16.
        to fp16: s = fl(x + sign(x)·(r >> 3)·2⁻¹³·ulp(x)), ulp(x) = 2^(max(e, -14) - 10), e the exponent of |x|, fl to fp32
        (the product is exact); then s toward zero to fp16, subnormal or not, magnitudes stop at 65504.
        What is rounded is finite, as weights (checked when training is set up) and multipliers are (a skipped step is
        no update): NaN and infinity have no rule here. fp32 and fp64: no rounding bits.

    Update, in fp32 (fp64 for fp64 tensors, z widened), every operation rounded on its own, in this order:
        s = m₀·z₀; s = s + m₁·z₁; …; with momentum: buffer = beta·buffer + s, s = buffer; a = θ + restore·z_last unless
        restore is 0; a = decay·a unless decay is 1; a = a + s; with a floor a = max(a, floor); θ = round(a).
        A multiplier of -0 counts as +0. A no-op (all multipliers 0, decay 1) writes nothing at all, unless there is a
        momentum buffer (and beta is not 0): then it coasts like any other update.
        An update rule (reference.advance) stands in place of a + s, after decay; with an anchor of strength λ at θ₀ it begins
        with a = a - fl32(lr·λ)·(a - θ₀), three roundings.
        decay NOTHING: no update, momentum included, whatever the multipliers.
        Of a no-op and of NOTHING the restore remains, if it is not 0: θ = nearest(θ + restore·z_last), nearest even in
        θ's dtype. z_last is the z of the last multiplier. In-place probing takes θ back with it, in the update's own
        pass and rounding; a move alone is the same bits as a probe of that scale, written onto θ.
    Probe: fl(θ + fl(scale·z)), then to out's dtype, nearest even; scale 0: θ itself.
    Mask: an element that is left out keeps its bits: restores, decay, sums and rounding pass it over (in its s is -0, so
        that a momentum buffer only fades), its probes are θ itself, to out's dtype.
        by magnitude: |θ| <= threshold moves, θ as it is stored before the update, compared as it is. Several updates
        in one pass each look anew, probes look at θ after them all: the order of steps, whatever is fused. So the
        probes of a step and its update, which comes later and finds the same θ, have one mask.
        at random (purpose 2, key(seed, p, 0)): c = i // 8, half-word i mod 8, low halves first: 16 bits r; r < share
        moves; each tensor its own. p, the period, is 0 at all steps, or step // every where it is drawn anew every
        `every` steps: updates and probes have that of their own step, several updates in one pass each its own.

[1] Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011. doi:10.1145/2063384.2063405
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

VERSION = 1  # of the specification above; a ledger can only be replayed under its own
GAUSSIAN, RADEMACHER, RANK1 = "gaussian", "rademacher", "rank1"
FLIPPED = (
    4  # added to the code of a kind whose one draw the step's directions share, each with signs of its own
)
# The codes by which kernels know what z is drawn from.
KINDS = {GAUSSIAN: 0, RADEMACHER: 1, RANK1: 2, "gaussian_flipped": 4, "rademacher_flipped": 5}
SHARED = 0xFFFFFFFF  # the direction whose noise the directions of a flipped kind share
ROWS, COLUMNS = 4, 5  # purposes: the signs of a matrix's rows and columns
NODE = 3  # purpose: the signs of a layer's outputs
NODE_BITS = 14  # of a counter's low word, which count 128 units each
OUTER_MIN = 16  # rows and columns that a matrix has at least for rank1: the variance of less is above 1.27 times dense noise's
NOTHING = -1.0  # a decay that says: no update at all, though a restore may come with it
PART = 128  # elements that one counter serves at most: a part of a tensor starts at a multiple
# |z - exact z| stays below, absolute:
GAUSSIAN_BOUND = 1e-6  # on a CPU; 9.3e-7 over all words, rms 1.3e-7 (scripts/bench_noise.py --exhaustive)
GAUSSIAN_BOUND_GPU = 5e-5  # on a GPU, with its own logarithm, sine and cosine; rms 3e-7

Probes = Sequence[tuple[int, float]]


class Mask(NamedTuple):
    """Which elements of a tensor move: those with |θ| <= threshold (an fp32 value), or a random share of 2¹⁶.

    every: steps between draws of a random share; 0: it is drawn once. period: which draw.
    """

    threshold: float | None = None
    seed: int = 0
    share: int = 0
    every: int = 0
    period: int = 0

    def at(self, step: int) -> Mask:
        """Return the mask of a step, which is drawn once."""
        return self._replace(every=0, period=step // self.every) if self.every else self


_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Update:
    """Hold one committed step, exactly as the ledger records it: θ <- round(decay·θ + Σ_k multipliers[k]·z_k).

    Args:
        step: The step, whose noise and rounding are used.
        seed: The run's seed.
        multipliers: One fp32 value per direction, −lr·c.
        decay: The fp32 value that multiplies θ.
        restore: The fp32 scale by which the last direction's z is added to θ first (in-place probing). With decay NOTHING
            nothing else happens.
        lr: The learning rate in fp32, read by update rules only, whose multipliers do not contain it.
        steps: The step of each multiplier's direction, if the sum takes in directions of other steps; () is this step.
        directions: The direction of each multiplier; () is 0, 1, …
    """

    step: int
    seed: int
    multipliers: tuple[float, ...]
    decay: float = 1.0
    restore: float = 0.0
    lr: float = 0.0
    steps: tuple[int, ...] = ()
    directions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.multipliers or not self.restore, "restore: along no direction"
        given = len(self.steps), len(self.directions)
        assert given in ((0, 0), (len(self.multipliers),) * 2), (given, len(self.multipliers))

    def where(self) -> list[tuple[int, int]]:
        """Return (step, direction) of each multiplier."""
        n = len(self.multipliers)
        return list(zip(self.steps or (self.step,) * n, self.directions or range(n)))

    def keys(self) -> list[tuple[int, int]]:
        """Return the Philox key of each multiplier's direction."""
        return [key(self.seed, step, k) for step, k in self.where()]

    @property
    def is_noop(self) -> bool:
        """Say whether the update by itself changes nothing: without momentum it writes nothing (-0.0 and NaN payloads survive)."""
        return self.restore == 0 and (self.is_nothing or (self.decay == 1 and not any(self.multipliers)))

    @property
    def is_nothing(self) -> bool:
        """Say whether this is no update: a move of θ by its restore, or not even that."""
        return self.decay == NOTHING


def move(seed: int, step: int, direction: int, scale: float) -> Update:
    """θ <- nearest(θ + scale·z_direction), as an entry among updates."""
    return Update(step, seed, (0.0,) * (direction + 1), NOTHING, scale)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of one counter: four uint32 words. Source: [1] above."""
    a, b, c, d = counter
    p, q = key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ p, y & _MASK, (x >> 32) ^ d ^ q, x & _MASK
        p, q = (p + 0x9E3779B9) & _MASK, (q + 0xBB67AE85) & _MASK
    return a, b, c, d


@lru_cache(maxsize=4096)
def key(seed: int, step: int, direction: int) -> tuple[int, int]:
    """The Philox key of one direction of one step: two uint32 words. seed and step count modulo 2⁶⁴."""
    return philox(
        (step & _MASK, step >> 32 & _MASK, direction, 0x7A6F6674), (seed & _MASK, seed >> 32 & _MASK)
    )[:2]


def keys_of(seed: int, step: int, direction: int, noise: str) -> tuple[int, ...]:
    """Return the Philox keys of a direction, two words each: its own and, of a flipped kind, the shared one's after it."""
    own = key(seed, step, direction)
    return own + key(seed, step, SHARED) if KINDS[noise] & FLIPPED else own


def noise_of(kind: str, directions: str) -> str:
    """Return the noise that a step's directions have: `kind` itself, or flipped where each example has a direction."""
    return f"{kind}_flipped" if directions == "example" and kind != RANK1 else kind


def tensor_id(name: str) -> int:
    """The number of a tensor in its counters: the first 32 bits (little-endian) of SHA-256 of its canonical name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
