"""The noise of `zoft.noise` as compiled CPU loops: one fused pass over a range of one tensor's elements.

Every loop here is written so that LLVM turns it into vector code, and so that the result depends on nothing but the
specification: no libm, no fast-math, no contraction (each fused multiply-add is spelled out), hence the same bits
on every CPU, vector width and thread count. What they call is in distributions.py, storage.py and intrinsics.py.
"""

import hashlib
import inspect

import numba
import numpy as np

from zoft.noise import distributions, intrinsics, storage
from zoft.noise.distributions import SIGNS, draw, fill_rademacher, halves, philox, signs_at
from zoft.noise.intrinsics import jit
from zoft.noise.storage import BF16, FP16, FP32, FP64, load, store, store_stochastic

NOTHING = -1.0  # spec.NOTHING
ALL, SMALL, CHOSEN = 0, 1, 2  # kinds of mask: none, by magnitude, at random

CHUNK = (
    2048  # elements worked on at a time: all scratch (18 bytes an element in fp32) stays in the nearest cache
)
_ALIGN = 128  # elements that one rademacher counter serves; the other counters divide it
_ONE, _ZERO, _MINUS_0 = np.float32(1), np.float32(0), np.float32(-0.0)
COMPILED = (distributions, intrinsics, storage)  # what `run` is made of besides this file


def _entry(function):
    """A function called from Python: others may run meanwhile, and its compiled code is kept on disk.

    numba's disk cache finds code by the function's qualified name, and notices changes to that function's file alone:
    the other files' digest is part of the name, so that no code outlives a change to one of them.
    """
    try:
        sources = "".join(inspect.getsource(module) for module in COMPILED)
        function.__qualname__ += "_" + hashlib.sha256(sources.encode()).hexdigest()[:16]
        return numba.njit(cache=True, nogil=True, fastmath=False)(function)
    except (OSError, RuntimeError):
        # No sources, or no folder is writable: it is compiled in every process instead.
        return numba.njit(nogil=True, fastmath=False)(function)


@jit
def _scaled(s, m, z, n):
    for i in range(n):
        s[i] = m * z[i]


@jit
def _add_scaled(s, a, m, z, n):
    for i in range(n):
        s[i] = a[i] + m * z[i]


@jit
def _accumulate(s, m, z, n):
    for i in range(n):
        s[i] = s[i] + m * z[i]


@jit
def _decay(a, d, n):
    for i in range(n):
        a[i] = d * a[i]


@jit
def _raise(a, floor, n):
    for i in range(n):
        a[i] = max(a[i], floor)


@jit
def _add(a, s, n):
    for i in range(n):
        a[i] = a[i] + s[i]


@jit
def _add_scaled_where(keep, s, a, m, z, n):
    for i in range(n):
        x = a[i]  # both values first, so that choosing is no branch
        y = x + m * z[i]
        s[i] = y if keep[i] != 0 else x


@jit
def _smaller(keep, a, threshold, n):
    for i in range(n):
        keep[i] = _ONE if abs(a[i]) <= threshold else _ZERO


@jit
def _drawn(keep, r, share, n):
    for i in range(n):
        keep[i] = _ONE if np.int32(r[i]) < share else _ZERO


@jit
def _where(keep, a, other, n):
    """a, where it moves, else other."""
    for i in range(n):
        x, y = a[i], other[i]
        a[i] = x if keep[i] != 0 else y


@jit
def _silence(keep, s, n):
    for i in range(n):
        x = s[i]
        s[i] = x if keep[i] != 0 else _MINUS_0


@jit
def _copy(a, b, n):
    for i in range(n):
        a[i] = b[i]


@_entry
def run(theta, code, start, end, tid, kind, width, momentum, rules, plan, out, shape):
    """Elements [start, end) of one tensor: pending updates in order, then every probe.

    kind, width: as `draw` takes them. theta, momentum, out: uint64 addresses (momentum 0: none). rules fp64 [7]: beta, floor (-inf: none), of the mask its
    kind, threshold, share and the two words of its key. The plan's arrays of floats have the work dtype.
    plan (counts, keys, values, decays, restores, rounding, probes):
        counts int64 [U] the directions of each update; keys uint32 [Σ counts + G, 2 or 4] of those directions, then of the
        probe groups (spec.keys_of); values [Σ counts + P] the multipliers, then the scales of the probes; decays [U]
        (NOTHING: a restore alone); restores [U], along the last direction; rounding uint32 [U, 2] keys; probes int64
        [G] the consecutive probes that share a direction (negative: the same without noise).
    shape: out's storage code, elements between two probes' rows, place of element `start` in a row.
    """
    counts, keys, values, decays, restores, rounding, probes = plan
    words = np.empty(CHUNK // 4 + 4, np.uint64)
    aux = np.empty((2, SIGNS), np.float32)
    bits = words.view(np.uint16)
    z = np.empty(CHUNK, np.float32)
    a, s, m = np.empty(CHUNK, values.dtype), np.empty(CHUNK, values.dtype), np.empty(CHUNK, values.dtype)
    m[0], m[1], m[2] = rules[0], rules[1], rules[3]
    beta, floor, threshold = m[0], m[1], m[2]  # in the work dtype
    mask, share, mask0, mask1 = int(rules[2]), np.int32(rules[4]), np.uint32(rules[5]), np.uint32(rules[6])
    size = CHUNK if mask != ALL else 1
    keep, old = np.empty(size, np.float32), np.empty(size, values.dtype)
    out_code, stride, origin = shape
    work = FP32 if values.itemsize == 4 else FP64
    lo = start
    while lo < end:
        base = lo - lo % _ALIGN
        hi = min(end, base + CHUNK)
        n, skip = hi - lo, lo - base
        load(a, theta, code, lo, n)
        if mask == CHOSEN:
            halves(words, base, n + skip, tid, 2, mask0, mask1)
            _drawn(keep, bits[skip:], share, n)
        k, last = 0, -1
        for u in range(len(counts)):
            if mask != ALL:
                if mask == SMALL:
                    _smaller(keep, a, threshold, n)
                _copy(old, a, n)
            if counts[u] == 0:
                s[:n] = -0.0  # an empty sum leaves the signs of zeros alone
            for d in range(counts[u]):
                last = draw(z, words, base, n + skip, tid, keys, k, last, kind, width, aux)
                if d == 0:
                    _scaled(s, values[k], z[skip:], n)
                else:
                    _accumulate(s, values[k], z[skip:], n)
                k += 1
            if restores[u] != 0:
                _accumulate(a, restores[u], z[skip:], n)
            if decays[u] == NOTHING:
                if mask != ALL:
                    _where(keep, a, old, n)
                if code == BF16 or code == FP16:  # to nearest
                    store(a, theta, code, lo, n)
                    load(a, theta, code, lo, n)
                continue
            if momentum != 0:
                if mask != ALL:
                    _silence(keep, s, n)
                load(m, momentum, work, lo, n)
                _accumulate(s, beta, m, n)
                store(s, momentum, work, lo, n)
            if decays[u] != 1:
                _decay(a, decays[u], n)
            _add(a, s, n)
            if floor > -np.inf:
                _raise(a, floor, n)
            if mask != ALL:  # what stays is on the grid of its dtype, which no rounding leaves
                _where(keep, a, old, n)
            if code == BF16 or code == FP16:
                halves(words, base, n + skip, tid, 1, rounding[u, 0], rounding[u, 1])
                store_stochastic(a, bits[skip:], theta, code, lo, n)
        if len(counts) > 0 and (code == FP32 or code == FP64):
            store(a, theta, code, lo, n)
        if mask == SMALL and len(probes) > 0:
            _smaller(keep, a, threshold, n)
        p, v = 0, k
        for g in range(len(probes)):
            if probes[g] > 0:
                last = draw(z, words, base, n + skip, tid, keys, k, last, kind, width, aux)
            for _ in range(abs(probes[g])):
                at = p * stride + origin + lo - start
                if probes[g] > 0:
                    if mask == ALL:
                        _add_scaled(s, a, values[v], z[skip:], n)
                    else:
                        _add_scaled_where(keep, s, a, values[v], z[skip:], n)
                    store(s, out, out_code, at, n)
                else:
                    store(a, out, out_code, at, n)
                p += 1
                v += 1
            k += 1
        lo = hi


@_entry
def signs(out, tid, purpose, keys):
    """out[d, i] = the sign of place i for keys[d], fp32 [D, n]: a tensor's rows or columns, by the purpose."""
    n = out.shape[1]
    z, words = np.empty(CHUNK, np.float32), np.empty(CHUNK // 64, np.uint64)
    for d in range(out.shape[0]):
        for lo in range(0, n, CHUNK):
            m = min(CHUNK, n - lo)
            signs_at(z, words, lo, m, tid, purpose, keys[d, 0], keys[d, 1])
            for i in range(m):
                out[d, lo + i] = z[i]


@_entry
def run_rows(theta, code, rows, first, last, size, origin, tid, kind, width, rules, plan, out, out_code):
    """out[n] = θ[rows[n]] + scale·z[rows[n]] for first <= n < last; a row is `size` consecutive elements, row 0
    begins with element `origin`."""
    for n in range(first, last):
        start = origin + rows[n] * size
        run(
            theta,
            code,
            start,
            start + size,
            tid,
            kind,
            width,
            np.uint64(0),
            rules,
            plan,
            out,
            (out_code, size, n * size),
        )


@_entry
def node_signs(out, tid, rows, positions, keys):
    """out[t] = the signs of token t's units, fp32 [N, m]; rows, positions: int64 [N]; keys: uint32 [N, 2]."""
    n, m = out.shape
    blocks = (m + 127) // 128
    words, z = np.empty(2 * blocks, np.uint64), np.empty(128 * blocks, np.float32)
    for t in range(n):
        philox(words, (rows[t] << 32) + (positions[t] << 14), blocks, tid, 3, keys[t, 0], keys[t, 1])
        fill_rademacher(z, words.view(np.uint32), 4 * blocks)
        for i in range(m):
            out[t, i] = z[i]
