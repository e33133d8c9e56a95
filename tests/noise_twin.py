"""The noise of `zoft.noise.noise` once more, slow and plain, from its specification alone: the judge of every backend."""

import math

import numpy as np
import torch

from zoft.noise.spec import Update


def philox(counter, key):
    """Philox4x32-10 in Python integers. counter: 4 words, or 4 arrays of them; key: 2 words. -> 4 words (arrays)."""
    c = [np.asarray(x, dtype=object) for x in counter]
    k = list(key)
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (right // 2**32) ^ c[1] ^ k[0],
            right % 2**32,
            (left // 2**32) ^ c[3] ^ k[1],
            left % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def key(seed, step, direction):
    words = philox((step % 2**32, step // 2**32, direction, 0x7A6F6674), (seed % 2**32, seed // 2**32))
    return int(words[0]), int(words[1])


def _words(index, per_counter, tid, purpose, key):
    """The four words that element index[i] sees: object array [n, 4]. One Philox call a distinct counter."""
    counters, where = np.unique(np.asarray(index) // per_counter, return_inverse=True)
    low = [int(c) % 2**32 for c in counters]
    high = [int(c) // 2**32 for c in counters]
    words = philox((low, high, [tid] * len(low), [purpose] * len(low)), key)
    return np.stack(words, 1)[where]


def uniform(word):
    """u in (0, 1), exactly, from one word."""
    return (word // 2**16 + 0.5) / 2**16


def turn(word):
    """v in (-½, ½) turns, exactly, from one word."""
    j = word % 2**16
    return ((j - 2**16 if j >= 2**15 else j) + 0.5) / 2**16


def gaussian_pair(word):
    """The exact (fp64) pair of elements that one word makes."""
    r, angle = math.sqrt(-2 * math.log(uniform(word))), 2 * math.pi * turn(word)
    return r * math.cos(angle), r * math.sin(angle)


def z(index, tid, key, noise, width=0, shared=None):
    """Direction noise of the elements with these indices: fp64 [n]. shared: the key of what flipped directions share."""
    index = np.asarray(index)
    if noise.endswith("_flipped"):
        return z(index, tid, shared, noise.removesuffix("_flipped")) * z(index, tid, key, "rank1", width)
    if noise == "rank1":
        if not width:
            return z(index, tid, key, "rademacher")
        return sign(index // width, tid, 4, key) * sign(index % width, tid, 5, key)
    if noise == "rademacher":
        words = _words(index, 128, tid, 0, key)
        return np.array(
            [1.0 if int(w[i % 128 // 32]) >> (i % 32) & 1 else -1.0 for i, w in zip(index, words)]
        )
    words = _words(index, 8, tid, 0, key)
    return np.array([gaussian_pair(int(w[i % 8 // 2]))[i % 2] for i, w in zip(index, words)])


def sign(places, tid, purpose, key):
    """The signs of a matrix's rows or columns, by their purpose: fp64 [n]."""
    words = _words(places, 128, tid, purpose, key)
    return np.array([1.0 if int(w[i % 128 // 32]) >> (i % 32) & 1 else -1.0 for i, w in zip(places, words)])


def rounding_bits(index, tid, key):
    """The 16 bits of each element: int [n]."""
    words = _words(index, 8, tid, 1, key)
    return np.array([int(w[i % 8 // 2]) >> (16 * (i % 2)) & 0xFFFF for i, w in zip(index, words)])


def round_stochastic(x, r, dtype):
    """Finite x fp32 [n] with bits r [n], to the grid of dtype: fp64 [n]. In units of the grid."""
    significand, smallest, bits = {torch.bfloat16: (8, -126, 16), torch.float16: (11, -14, 13)}[dtype]
    x = np.asarray(x, np.float32)
    assert np.isfinite(x).all()

    def unit(size):
        exponent = np.where(size == 0, smallest, np.frexp(size)[1] - 1)
        return np.ldexp(1.0, np.maximum(exponent, smallest) - significand + 1)

    size = np.abs(x).astype(np.float64)
    part = (np.asarray(r) >> (16 - bits)) / 2**bits * unit(size)  # exact in fp32 too
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            size = np.minimum(np.abs(x) + part.astype(np.float32), np.float32(2.0**127)).astype(np.float64)
        size = np.minimum(np.floor(size / unit(size)) * unit(size), 65504.0)
    else:
        size = size + part  # exact: bf16's grid and r's fit in fp64 together
        size = np.floor(size / unit(size)) * unit(size)
        size[size >= 2.0**128] = np.inf
    return np.copysign(size, x)


def round_nearest(x, dtype):
    """Finite x fp32 [n] to the nearest of dtype, ties to even: fp64 [n]. In units of the grid."""
    significand, smallest = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    size = np.abs(np.asarray(x, np.float64))
    exponent = np.where(size == 0, smallest, np.frexp(size)[1] - 1)
    unit = np.ldexp(1.0, np.maximum(exponent, smallest) - significand + 1)
    size = np.rint(size / unit) * unit
    size[size > {torch.bfloat16: 3.3895313892515355e38, torch.float16: 65504.0}[dtype]] = np.inf
    return np.copysign(size, x)


def numbers(tensor):
    """A tensor's values as fp64 [n], exactly."""
    return tensor.detach().cpu().double().flatten().numpy()


def chosen(index, tid, seed, share):
    """Which elements a random mask lets move: bool [n]. The half-words are taken as those of the rounding."""
    words = _words(index, 8, tid, 2, key(seed, 0, 0))
    return np.array([int(w[i % 8 // 2]) >> (16 * (i % 2)) & 0xFFFF for i, w in zip(index, words)]) < share


def advance(theta, z_of, rounding_of, updates, momentum=None, beta=0.0, moving=None):
    """θ and momentum after updates, fp64 [n] each. z_of(update, k) -> fp32 z [n]; rounding_of(update) -> bits [n];
    moving(θ) -> bool [n], what a mask lets move."""
    work = np.float64 if theta.dtype is torch.float64 else np.float32
    a = numbers(theta).astype(work)
    m = None if momentum is None else numbers(momentum).astype(work)
    for u in updates:
        assert isinstance(u, Update)
        before, on = a, np.full(len(a), True) if moving is None else moving(a)
        noop = all(x == 0 for x in u.multipliers) and u.decay == 1 and (m is None or beta == 0)
        if u.restore:
            z_last = z_of(u, len(u.multipliers) - 1).astype(work)
            a = (a + (work(u.restore) * z_last).astype(work)).astype(work)
        if noop or u.decay == -1:
            if u.restore and theta.dtype in (torch.bfloat16, torch.float16):
                a = round_nearest(a, theta.dtype).astype(work)
            a = np.where(on, a, before)
            continue
        s = np.full_like(a, -0.0)  # an empty sum changes nothing
        for k, multiplier in enumerate(u.multipliers):
            product = (work(multiplier + 0.0) * z_of(u, k).astype(work)).astype(work)
            s = product if k == 0 else (s + product).astype(work)
        s = np.where(on, s, work(-0.0))
        if m is not None:
            s = m = ((work(beta) * m).astype(work) + s).astype(work)
        if u.decay != 1:
            a = (work(u.decay) * a).astype(work)
        a = (a + s).astype(work)
        if theta.dtype in (torch.bfloat16, torch.float16):
            a = round_stochastic(a, rounding_of(u), theta.dtype).astype(work)
        a = np.where(on, a, before)
    return a.astype(np.float64), m
