"""Philox and the distributions of `zoft.noise` as compiled CPU loops: words, gaussians and signs of a range of elements."""

import numpy as np

from zoft.noise.intrinsics import bits_of, float_of, fma, jit, signs_of

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
# spec.KINDS and its purposes; here, as kept machine code is named after this file's text
GAUSSIAN, RADEMACHER, RANK1, FLIPPED = 0, 1, 2, 4
ROWS, COLUMNS = 4, 5
SIGNS = (
    2048 + 256
)  # room for the column signs of a stretch of elements that does not begin at a multiple of 128


@jit
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
_ONE_BITS, _SQRT_HALF_BITS = 0x3F800000, 0x3F3504F3
_17_EXPONENTS = 17 << 23


@jit
def radius(word):
    """sqrt(-2 ln u), u = (k + ½)·2⁻¹⁶, k the upper half of word (uint32)."""
    bits = bits_of(_f(np.int32((word >> 15) | 1)))  # of 2¹⁷·u, an odd integer: exact
    above = np.int32(bits - (_SQRT_HALF_BITS + _17_EXPONENTS))
    exponent = np.int32(above >> 23)
    # exact: u = 2^exponent·(1 + f), √½ <= 1 + f < √2
    f = float_of(np.int32((above & 0x7FFFFF) + _SQRT_HALF_BITS)) - _ONE
    p = fma(fma(fma(fma(fma(_L5, f, _L4), f, _L3), f, _L2), f, _L1), f, _L0)
    near = f * fma(p, f, _MINUS_2)  # keeps its relative precision as u -> 1, where exponent is 0
    return np.sqrt(fma(_f(exponent), _MINUS_2LN2, near))


@jit
def half_turn(word):
    """cos(2πv), sin(2πv), v = (j + ½)·2⁻¹⁶ turns, j the lower 15 bits of word (uint32)."""
    t = float_of(np.int32(((word & 0x7FFF) << 8) | 0x80 | _ONE_BITS)) - _THREE_HALVES  # 2v - ½, exact
    g = t * t
    s = t * fma(fma(fma(fma(_S4, g, _S3), g, _S2), g, _S1), g, _S0)
    c = fma(fma(fma(fma(_C3, g, _C2), g, _C1), g, _C0), g, _ONE)
    return -s, c


@jit
def gaussian_pair(word):
    """The even and the odd element that one word (uint32) makes."""
    r, (c, s) = radius(word), half_turn(word)
    r = float_of(
        np.int32(bits_of(r) ^ np.int32((word & 0x8000) << 16))
    )  # j < 0 is half a turn back: both change sign
    return r * c, r * s


@jit
def _fill_gaussian(z, words, n):
    for j in range(n):
        z[2 * j], z[2 * j + 1] = gaussian_pair(words[j])


@jit
def fill_rademacher(z, words, n):
    for j in range(n):
        signs_of(z, 32 * j, words[j])


@jit
def _noise(z, words, base, n, tid, k0, k1, kind):
    """z[i - base] for i in [base, base + n), base a multiple of 128; z is filled up to the next multiple of 128.

    kind: a code of spec.KINDS.
    """
    blocks = (n + 127) // 128  # whole vectors, no loop tails
    if kind == GAUSSIAN:
        philox(words, base // 8, 16 * blocks, tid, 0, k0, k1)
        _fill_gaussian(z, words.view(np.uint32), 64 * blocks)
    elif kind == RADEMACHER:
        philox(words, base // 128, blocks, tid, 0, k0, k1)
        fill_rademacher(z, words.view(np.uint32), 4 * blocks)


@jit
def signs_at(z, words, start, n, tid, purpose, k0, k1):
    """The signs of places [start, start + n), start a multiple of 128; z is filled up to the next multiple of 128."""
    blocks = (n + 127) // 128
    philox(words, start // 128, blocks, tid, purpose, k0, k1)
    fill_rademacher(z, words.view(np.uint32), 4 * blocks)


@jit
def _times_sign(z, columns, sign, n):
    for i in range(n):
        z[i] = sign * columns[i]


@jit
def _outer(z, words, columns, base, n, width, tid, k0, k1):
    """a_r·b_j of the elements [base, base + n) of a matrix of that width into z; columns: scratch [SIGNS]."""
    first, end, block = 0, 0, -1  # the columns whose signs are held, and which 128 rows' words are
    w0, w1 = np.uint64(0), np.uint64(0)
    row_words = np.empty(2, np.uint64)
    lo = base
    while lo < base + n:
        row = lo // width
        column = lo - row * width
        m = min(width - column, base + n - lo)
        if column < first or column + m > end:
            first = column - column % 128
            end = column + m
            signs_at(columns, words, first, end - first, tid, COLUMNS, k0, k1)
        if row // 128 != block:
            block = row // 128
            philox(row_words, block, 1, tid, ROWS, k0, k1)
            w0, w1 = row_words[0], row_words[1]
        half = w0 if row % 128 < 64 else w1
        sign = np.float32(np.int32((half >> np.uint64(row % 64)) & np.uint64(1)) * 2 - 1)
        _times_sign(z[lo - base :], columns[column - first :], sign, m)
        lo += m


@jit
def _times(z, u, n):
    for i in range(n):
        z[i] = u[i] * z[i]


@jit
def draw(z, words, base, n, tid, keys, k, last, kind, width, aux):
    """Noise of keys[k], unless z holds it already as that of keys[last] (-1: it holds none); returns k.

    width: of the tensor as a matrix, 0: it is none. aux: scratch fp32 [2, SIGNS], which between calls on one stretch holds
    what directions of a flipped kind share.
    """
    if last >= 0 and keys[k, 0] == keys[last, 0] and keys[k, 1] == keys[last, 1]:
        return k
    flipped = kind & FLIPPED
    if flipped and (last < 0 or keys[k, 2] != keys[last, 2] or keys[k, 3] != keys[last, 3]):
        _noise(aux[0], words, base, n, tid, keys[k, 2], keys[k, 3], kind - FLIPPED)
    if kind != RANK1 and not flipped:
        _noise(z, words, base, n, tid, keys[k, 0], keys[k, 1], kind)
    elif width > 0:
        _outer(z, words, aux[1], base, n, width, tid, keys[k, 0], keys[k, 1])
    else:
        _noise(z, words, base, n, tid, keys[k, 0], keys[k, 1], RADEMACHER)
    if flipped:
        _times(z, aux[0], n)
    return k


@jit
def halves(words, base, n, tid, purpose, k0, k1):
    """The 16 random bits of element i at position i - base of words seen as (little-endian) uint16."""
    philox(words, base // 8, 16 * ((n + 127) // 128), tid, purpose, k0, k1)
