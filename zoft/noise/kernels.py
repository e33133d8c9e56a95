"""The noise of `zoft.noise` as compiled CPU loops: one fused pass over a range of one tensor's elements.

Every loop here is written so that LLVM turns it into vector code, and so that the result depends on nothing but the
specification: no libm, no fast-math, no contraction (each fused multiply-add is spelled out), hence the same bits
on every CPU, vector width and thread count. All compiled code lives in this one file because numba's disk cache
only notices changes to the file of the function that is called.

Tensors come in as addresses with a storage code, so that numba compiles `run` twice at most (fp32 and fp64 work).
"""

from typing import Any

import numba
import numba.extending
import numpy as np
from llvmlite import ir
from numba import carray, types

NOTHING = -1.0  # noise.NOTHING
ALL, SMALL, CHOSEN = 0, 1, 2  # kinds of mask: none, by magnitude, at random
FP32, BF16, FP16, FP64, ZERO = 0, 1, 2, 3, 4  # storage codes; ZERO: no memory at all, every element is -0.0

CHUNK = (
    2048  # elements worked on at a time: all scratch (18 bytes an element in fp32) stays in the nearest cache
)
_ALIGN = 128  # elements that one rademacher counter serves; the other counters divide it

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


intrinsic: Any = numba.extending.intrinsic  # untyped: what it makes is called without its first argument
_jit = numba.njit(fastmath=False)


def _entry(function):
    """A function called from Python: others may run meanwhile, and its compiled code is kept on disk."""
    try:
        return numba.njit(cache=True, nogil=True, fastmath=False)(function)
    except RuntimeError:  # no folder is writable: it is compiled in every process instead
        return numba.njit(nogil=True, fastmath=False)(function)


@intrinsic
def _fma(_context, x, y, z):
    """x·y + z rounded once (the instruction, or libm's exact fmaf where a CPU has none)."""
    return types.float32(types.float32, types.float32, types.float32), lambda _c, b, _s, args: b.fma(*args)


@intrinsic
def _bits(_context, x):
    return types.int32(types.float32), lambda c, b, s, args: b.bitcast(
        args[0], c.get_value_type(s.return_type)
    )


@intrinsic
def _float(_context, x):
    return types.float32(types.int32), lambda c, b, s, args: b.bitcast(
        args[0], c.get_value_type(s.return_type)
    )


@intrinsic
def _truncate(_context, x):
    return types.int32(types.float32), lambda c, b, s, args: b.fptosi(
        args[0], c.get_value_type(s.return_type)
    )


def _pointer(element):
    @intrinsic
    def at(_context, address):
        signature = types.CPointer(element)(types.uint64)
        return signature, lambda c, b, s, args: b.inttoptr(args[0], c.get_value_type(s.return_type))

    return at


_as_f32, _as_f64 = _pointer(types.float32), _pointer(types.float64)
_as_u16 = _pointer(types.uint16)


# ---- bits ----------------------------------------------------------------------------------------------------------


@_jit
def philox(words, start, n, tid, purpose, k0, k1):
    """Four words a counter, in order: Philox4x32-10(counter (start + j as 64 bits, tid, purpose), key (k0, k1)), j < n.

    words: uint64 [2n], two words each, the first one low: seen as (little-endian) uint32 [4n] they are in order.
    The words are kept in 64-bit lanes whose upper halves may hold rubbish: the products only read the lower halves.
    """
    for j in range(n):
        c = np.uint64(start) + np.uint64(j)
        a, b, d = c, c >> _32, np.uint64(purpose)
        c = np.uint64(tid)
        p, q = np.uint64(k0), np.uint64(k1)
        for _ in range(10):
            x, y = (a & _LOW) * _M0, (c & _LOW) * _M1
            a, b, c, d = (y >> _32) ^ b ^ p, y, (x >> _32) ^ d ^ q, x
            p, q = (p + _W0) & _LOW, (q + _W1) & _LOW
        words[2 * j], words[2 * j + 1] = (a & _LOW) | (b << _32), (c & _LOW) | (d << _32)


# ---- distributions -------------------------------------------------------------------------------------------------

# Minimax fits, coefficients rounded to fp32: -2·log1p(f) = -2f + f²·L(f) on [√½-1, √2-1], good for 3.5e-7 in any
# radius; sin πt = t·S(t²) to 8e-9 and cos πt = 1 + t²·C(t²) to 5.5e-8 absolute on [-½, ½].
_f = np.float32
# fmt: off
_L0, _L1, _L2 = _f(1.0000439882278442), _f(-0.6663281917572021), _f(0.4975622594356537)
_L3, _L4, _L5 = _f(-0.40924569964408875), _f(0.37785011529922485), _f(-0.24461747705936432)
_S0, _S1, _S2 = _f(3.141592502593994), _f(-5.1677021980285645), _f(2.549957752227783)
_S3, _S4 = _f(-0.5976253747940063), _f(0.07643380761146545)
_C0, _C1 = _f(-4.934795379638672), _f(4.058447360992432)
_C2, _C3 = _f(-1.3320624828338623), _f(0.22000809013843536)
# fmt: on
_ONE, _THREE_HALVES, _MINUS_2, _MINUS_2LN2 = _f(1), _f(1.5), _f(-2), _f(-1.3862943611198906)
_ZERO, _MINUS_0 = _f(0), _f(-0.0)
_ONE_BITS, _SQRT_HALF_BITS = 0x3F800000, 0x3F3504F3
_17_EXPONENTS = 17 << 23


@_jit
def radius(word):
    """sqrt(-2 ln u), u = (k + ½)·2⁻¹⁶, k the upper half of word (uint32)."""
    bits = _bits(_f(np.int32((word >> 15) | 1)))  # of 2¹⁷·u, an odd integer: exact
    above = np.int32(bits - (_SQRT_HALF_BITS + _17_EXPONENTS))
    exponent = np.int32(above >> 23)
    # exact: u = 2^exponent·(1 + f), √½ <= 1 + f < √2
    f = _float(np.int32((above & 0x7FFFFF) + _SQRT_HALF_BITS)) - _ONE
    p = _fma(_fma(_fma(_fma(_fma(_L5, f, _L4), f, _L3), f, _L2), f, _L1), f, _L0)
    near = f * _fma(p, f, _MINUS_2)  # keeps its relative precision as u -> 1, where exponent is 0
    return np.sqrt(_fma(_f(exponent), _MINUS_2LN2, near))


@_jit
def half_turn(word):
    """cos(2πv), sin(2πv), v = (j + ½)·2⁻¹⁶ turns, j the lower 15 bits of word (uint32)."""
    t = _float(np.int32(((word & 0x7FFF) << 8) | 0x80 | _ONE_BITS)) - _THREE_HALVES  # 2v - ½, exact
    g = t * t
    s = t * _fma(_fma(_fma(_fma(_S4, g, _S3), g, _S2), g, _S1), g, _S0)
    c = _fma(_fma(_fma(_fma(_C3, g, _C2), g, _C1), g, _C0), g, _ONE)
    return -s, c


@_jit
def gaussian_pair(word):
    """The even and the odd element that one word (uint32) makes."""
    r, (c, s) = radius(word), half_turn(word)
    r = _float(
        np.int32(_bits(r) ^ np.int32((word & 0x8000) << 16))
    )  # j < 0 is half a turn back: both change sign
    return r * c, r * s


@_jit
def _gaussian(z, words, n):
    for j in range(n):
        z[2 * j], z[2 * j + 1] = gaussian_pair(words[j])


@intrinsic
def _spread_bits(_context, z, at, word):
    """z[at + b] = +1 if bit b of word is set else -1, b < 32, as vector code: LLVM finds none in the loop."""

    def code(context, builder, signature, args):
        lanes = ir.VectorType(ir.IntType(32), 32)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), ir.PointerType(lanes))
        one = builder.insert_element(
            ir.Constant(lanes, ir.Undefined), args[2], ir.Constant(ir.IntType(32), 0)
        )
        spread = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), ir.Constant(lanes, [0] * 32))
        clear = builder.and_(builder.not_(spread), ir.Constant(lanes, [1 << b for b in range(32)]))
        minus = builder.select(
            builder.icmp_unsigned("!=", clear, ir.Constant(lanes, [0] * 32)),
            ir.Constant(lanes, [0xBF800000] * 32),
            ir.Constant(lanes, [0x3F800000] * 32),
        )
        builder.store(minus, place, align=4)
        return context.get_dummy_value()

    return types.void(z, types.intp, types.uint32), code


@_jit
def _rademacher(z, words, n):
    for j in range(n):
        _spread_bits(z, 32 * j, words[j])


@_jit
def _noise(z, words, base, n, tid, k0, k1, gaussian):
    """z[i - base] for i in [base, base + n), base a multiple of 128; z is filled up to the next multiple of 128."""
    blocks = (n + 127) // 128  # whole vectors, no loop tails
    if gaussian:
        philox(words, base // 8, 16 * blocks, tid, 0, k0, k1)
        _gaussian(z, words.view(np.uint32), 64 * blocks)
    else:
        philox(words, base // 128, blocks, tid, 0, k0, k1)
        _rademacher(z, words.view(np.uint32), 4 * blocks)


@_jit
def _draw(z, words, base, n, tid, keys, k, last, gaussian):
    """Noise of keys[k], unless z holds it already as that of keys[last] (-1: it holds none); returns k."""
    if last < 0 or keys[k, 0] != keys[last, 0] or keys[k, 1] != keys[last, 1]:
        _noise(z, words, base, n, tid, keys[k, 0], keys[k, 1], gaussian)
    return k


@_jit
def _halves(words, base, n, tid, purpose, k0, k1):
    """The 16 random bits of element i at position i - base of words seen as (little-endian) uint16."""
    philox(words, base // 8, 16 * ((n + 127) // 128), tid, purpose, k0, k1)


# ---- storage -------------------------------------------------------------------------------------------------------


@_jit
def _from_fp16(h):
    magnitude = np.int32(h & 0x7FFF)
    bits = np.int32((magnitude << 13) + (112 << 23))
    bits = np.int32(bits + (112 << 23)) if magnitude >= 0x7C00 else bits
    bits = _bits(_f(magnitude) * _f(2.0**-24)) if magnitude < 0x400 else bits
    return _float(np.int32(bits | np.int32((h & 0x8000) << 16)))


@_jit
def to_fp16(x):
    """Round to nearest even; beyond 65519.99 to infinity; NaN stays NaN."""
    bits = _bits(x)
    magnitude = np.int32(bits & 0x7FFFFFFF)
    normal = np.int32(np.int32(magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13)
    normal = np.int32(0x7C00) if normal > 0x7C00 else normal
    small = np.int32(_bits(_float(magnitude) + _f(0.5)) - 0x3F000000)
    h = small if magnitude < (113 << 23) else normal
    h = np.int32(0x7E00) if magnitude > 0x7F800000 else h
    return np.uint16(np.int32(h | np.int32(np.int32(bits >> 16) & 0x8000)))


@_jit
def to_bf16(x):
    """Round to nearest even; NaN stays NaN."""
    bits = _bits(x)
    rounded = np.int32(bits + np.int32(0x7FFF + ((bits >> 16) & 1)))
    nan = np.int32(bits & 0x7FFFFFFF) > 0x7F800000
    return np.uint16((np.int32(bits | 0x400000) if nan else rounded) >> 16)


@_jit
def to_fp16_stochastic(x, r):
    """Up with the probability of the fraction lost, to 13 bits of it; finite x."""
    bits, r = _bits(x), np.int32(np.int32(r) >> 3)
    magnitude = np.int32(bits & 0x7FFFFFFF)
    normal = np.int32(np.int32(magnitude - (112 << 23) + r) >> 13)
    normal = np.int32(0x7BFF) if normal > 0x7BFF else normal
    tiny = magnitude < (113 << 23)
    # units of 2⁻²⁴: the product is exact, the sum rounds once
    near = _float(magnitude if tiny else np.int32(0)) * _f(2.0**24)
    h = _truncate(near + _f(r) * _f(2.0**-13)) if tiny else normal
    return np.uint16(np.int32(h | np.int32(np.int32(bits >> 16) & 0x8000)))


@_jit
def to_bf16_stochastic(x, r):
    """Up with the probability of the fraction lost, all 16 bits of it; finite x."""
    return np.uint16(np.int32(_bits(x) + np.int32(r)) >> 16)


@_jit
def _load(a, address, code, at, n):
    if code == FP32:
        source = carray(_as_f32(address + np.uint64(4) * np.uint64(at)), n)
        for i in range(n):
            a[i] = source[i]
    elif code == BF16:
        half = carray(_as_u16(address + np.uint64(2) * np.uint64(at)), n)
        for i in range(n):
            a[i] = _float(np.int32(half[i] << 16))
    elif code == FP16:
        half = carray(_as_u16(address + np.uint64(2) * np.uint64(at)), n)
        for i in range(n):
            a[i] = _from_fp16(half[i])
    elif code == FP64:
        wide = carray(_as_f64(address + np.uint64(8) * np.uint64(at)), n)
        for i in range(n):
            a[i] = wide[i]
    else:
        for i in range(n):
            a[i] = -0.0  # the neutral element of addition, signs of zeros included


@_jit
def _store(a, address, code, at, n):
    if code == FP32:
        target = carray(_as_f32(address + np.uint64(4) * np.uint64(at)), n)
        for i in range(n):
            target[i] = a[i]
    elif code == FP64:
        wide = carray(_as_f64(address + np.uint64(8) * np.uint64(at)), n)
        for i in range(n):
            wide[i] = a[i]
    else:
        half = carray(_as_u16(address + np.uint64(2) * np.uint64(at)), n)
        if code == BF16:
            for i in range(n):
                half[i] = to_bf16(_f(a[i]))
        else:
            for i in range(n):
                half[i] = to_fp16(_f(a[i]))


@_jit
def _store_stochastic(a, r, address, code, at, n):
    """Stores a and leaves in it the value stored."""
    half = carray(_as_u16(address + np.uint64(2) * np.uint64(at)), n)
    if code == BF16:
        for i in range(n):
            half[i] = to_bf16_stochastic(_f(a[i]), r[i])
            a[i] = _float(np.int32(half[i] << 16))
    else:
        for i in range(n):
            half[i] = to_fp16_stochastic(_f(a[i]), r[i])
            a[i] = _from_fp16(half[i])


# ---- the pass ------------------------------------------------------------------------------------------------------


@_jit
def _scaled(s, m, z, n):
    for i in range(n):
        s[i] = m * z[i]


@_jit
def _add_scaled(s, a, m, z, n):
    for i in range(n):
        s[i] = a[i] + m * z[i]


@_jit
def _accumulate(s, m, z, n):
    for i in range(n):
        s[i] = s[i] + m * z[i]


@_jit
def _decay(a, d, n):
    for i in range(n):
        a[i] = d * a[i]


@_jit
def _raise(a, floor, n):
    for i in range(n):
        a[i] = max(a[i], floor)


@_jit
def _add(a, s, n):
    for i in range(n):
        a[i] = a[i] + s[i]


@_jit
def _add_scaled_where(keep, s, a, m, z, n):
    for i in range(n):
        x = a[i]  # both values first, so that choosing is no branch
        y = x + m * z[i]
        s[i] = y if keep[i] != 0 else x


@_jit
def _smaller(keep, a, threshold, n):
    for i in range(n):
        keep[i] = _ONE if abs(a[i]) <= threshold else _ZERO


@_jit
def _drawn(keep, r, share, n):
    for i in range(n):
        keep[i] = _ONE if np.int32(r[i]) < share else _ZERO


@_jit
def _where(keep, a, other, n):
    """a, where it moves, else other."""
    for i in range(n):
        x, y = a[i], other[i]
        a[i] = x if keep[i] != 0 else y


@_jit
def _silence(keep, s, n):
    for i in range(n):
        x = s[i]
        s[i] = x if keep[i] != 0 else _MINUS_0


@_jit
def _copy(a, b, n):
    for i in range(n):
        a[i] = b[i]


@_entry
def run(theta, code, start, end, tid, gaussian, momentum, rules, plan, out, shape):
    """Elements [start, end) of one tensor: pending updates in order, then every probe.

    theta, momentum, out: uint64 addresses (momentum 0: none). rules fp64 [7]: beta, floor (-inf: none), of the mask its
    kind, threshold, share and the two words of its key. The plan's arrays of floats have the work dtype.
    plan (counts, keys, values, decays, restores, rounding, probes):
        counts int64 [U] the directions of each update; keys uint32 [Σ counts + G, 2] of those directions, then of the
        probe groups; values [Σ counts + P] the multipliers, then the scales of the probes; decays [U]
        (NOTHING: a restore alone); restores [U], along the last direction; rounding uint32 [U, 2] keys; probes int64
        [G] the consecutive probes that share a direction (negative: the same without noise).
    shape: out's storage code, elements between two probes' rows, place of element `start` in a row.
    """
    counts, keys, values, decays, restores, rounding, probes = plan
    words = np.empty(CHUNK // 4, np.uint64)
    bits = words.view(np.uint16)
    z = np.empty(CHUNK, np.float32)
    a, s, m = np.empty(CHUNK, values.dtype), np.empty(CHUNK, values.dtype), np.empty(CHUNK, values.dtype)
    m[0], m[1], m[2] = rules[0], rules[1], rules[3]
    beta, floor, threshold = m[0], m[1], m[2]  # in the work dtype
    kind, share, mask0, mask1 = int(rules[2]), np.int32(rules[4]), np.uint32(rules[5]), np.uint32(rules[6])
    size = CHUNK if kind != ALL else 1
    keep, old = np.empty(size, np.float32), np.empty(size, values.dtype)
    out_code, stride, origin = shape
    storage = FP32 if values.itemsize == 4 else FP64
    lo = start
    while lo < end:
        base = lo - lo % _ALIGN
        hi = min(end, base + CHUNK)
        n, skip = hi - lo, lo - base
        _load(a, theta, code, lo, n)
        if kind == CHOSEN:
            _halves(words, base, n + skip, tid, 2, mask0, mask1)
            _drawn(keep, bits[skip:], share, n)
        k, last = 0, -1
        for u in range(len(counts)):
            if kind != ALL:
                if kind == SMALL:
                    _smaller(keep, a, threshold, n)
                _copy(old, a, n)
            if counts[u] == 0:
                s[:n] = -0.0  # an empty sum leaves the signs of zeros alone
            for d in range(counts[u]):
                last = _draw(z, words, base, n + skip, tid, keys, k, last, gaussian)
                if d == 0:
                    _scaled(s, values[k], z[skip:], n)
                else:
                    _accumulate(s, values[k], z[skip:], n)
                k += 1
            if restores[u] != 0:
                _accumulate(a, restores[u], z[skip:], n)
            if decays[u] == NOTHING:
                if kind != ALL:
                    _where(keep, a, old, n)
                if code == BF16 or code == FP16:  # to nearest
                    _store(a, theta, code, lo, n)
                    _load(a, theta, code, lo, n)
                continue
            if momentum != 0:
                if kind != ALL:
                    _silence(keep, s, n)
                _load(m, momentum, storage, lo, n)
                _accumulate(s, beta, m, n)
                _store(s, momentum, storage, lo, n)
            if decays[u] != 1:
                _decay(a, decays[u], n)
            _add(a, s, n)
            if floor > -np.inf:
                _raise(a, floor, n)
            if kind != ALL:  # what stays is on the grid of its dtype, which no rounding leaves
                _where(keep, a, old, n)
            if code == BF16 or code == FP16:
                _halves(words, base, n + skip, tid, 1, rounding[u, 0], rounding[u, 1])
                _store_stochastic(a, bits[skip:], theta, code, lo, n)
        if len(counts) > 0 and (code == FP32 or code == FP64):
            _store(a, theta, code, lo, n)
        if kind == SMALL and len(probes) > 0:
            _smaller(keep, a, threshold, n)
        p, v = 0, k
        for g in range(len(probes)):
            if probes[g] > 0:
                last = _draw(z, words, base, n + skip, tid, keys, k, last, gaussian)
            for _ in range(abs(probes[g])):
                at = p * stride + origin + lo - start
                if probes[g] > 0:
                    if kind == ALL:
                        _add_scaled(s, a, values[v], z[skip:], n)
                    else:
                        _add_scaled_where(keep, s, a, values[v], z[skip:], n)
                    _store(s, out, out_code, at, n)
                else:
                    _store(a, out, out_code, at, n)
                p += 1
                v += 1
            k += 1
        lo = hi


@_entry
def run_rows(theta, code, rows, first, last, width, origin, tid, gaussian, rules, plan, out, out_code):
    """out[n] = θ[rows[n]] + scale·z[rows[n]] for first <= n < last; a row is `width` consecutive elements, row 0
    begins with element `origin`."""
    for n in range(first, last):
        start = origin + rows[n] * width
        run(
            theta,
            code,
            start,
            start + width,
            tid,
            gaussian,
            np.uint64(0),
            rules,
            plan,
            out,
            (out_code, width, n * width),
        )
