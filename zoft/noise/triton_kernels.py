"""The kernels of `zoft.noise.triton`: the noise of a tile of elements, and the pass over a tensor's tiles.

A tile is 8·LANES elements of one tensor, a program of the grid. Every operation is rounded as the specification says
(fused where it is spelled out, the launches turn other fusion off); a gaussian uses the hardware's own lg2, sin and cos.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from zoft.noise.spec import COLUMNS as _COLUMNS
from zoft.noise.spec import FLIPPED as _FLIPPED
from zoft.noise.spec import GAUSSIAN as _GAUSSIAN
from zoft.noise.spec import KINDS as _KINDS
from zoft.noise.spec import NOTHING as _NOTHING
from zoft.noise.spec import RADEMACHER as _RADEMACHER
from zoft.noise.spec import RANK1 as _RANK1
from zoft.noise.spec import ROWS as _ROWS

_PLAIN = ["tid", "threshold", "share", "mask0", "mask1"]  # arguments whose values no kernel is compiled for
NOTHING = tl.constexpr(_NOTHING)
GAUSSIAN, RADEMACHER = tl.constexpr(_KINDS[_GAUSSIAN]), tl.constexpr(_KINDS[_RADEMACHER])
RANK1, FLIPPED = tl.constexpr(_KINDS[_RANK1]), tl.constexpr(_FLIPPED)
ROWS, COLUMNS = tl.constexpr(_ROWS), tl.constexpr(_COLUMNS)
ALL, SMALL, CHOSEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of mask, as in kernels.py
# Triton's interpreter knows no assembly: there the same functions, exact, stand in for the hardware's.
_HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")


# ---- noise ---------------------------------------------------------------------------------------------------------


@triton.jit
def _words(counter, tid, purpose: tl.constexpr, k0, k1):
    """The four words [n] uint32 of counters [n] int64. Products are 64 bits wide: one instruction gives both halves."""
    a, b = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c, d = a * 0 + tid, a * 0 + purpose
    for _ in tl.static_range(10):
        x = a.to(tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        y = c.to(tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        a, c = (y >> 32).to(tl.uint32) ^ b ^ k0, (x >> 32).to(tl.uint32) ^ d ^ k1
        b, d = y.to(tl.uint32), x.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return a, b, c, d


@triton.jit
def _unary(x, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(PTX + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _pair(word):
    """sqrt(-2 ln u)·(cos 2πv, sin 2πv); u from the upper half of the word, v from the lower."""
    u = tl.fma((word >> 16).to(tl.float32), 1.52587890625e-05, 7.62939453125e-06)  # exact
    turn = ((word << 16).to(tl.int32, bitcast=True) >> 16).to(tl.float32)
    angle = tl.fma(turn, 9.587379924285257e-05, 4.7936899621426287e-05)
    if _HARDWARE:
        r = _unary(_unary(u, "lg2.approx.ftz.f32") * -1.3862943611198906, "sqrt.approx.ftz.f32")
        return r * _unary(angle, "cos.approx.ftz.f32"), r * _unary(angle, "sin.approx.ftz.f32")
    r = tl.sqrt(tl.log(u) * -2.0)
    return r * tl.cos(angle), r * tl.sin(angle)


@triton.jit
def _in_order(a, b, c, d):
    """[4n] from four [n]: a[0], b[0], c[0], d[0], a[1], …"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _key(keys, k):
    return tl.load(keys + 2 * k).to(tl.uint32, bitcast=True), tl.load(keys + 2 * k + 1).to(
        tl.uint32, bitcast=True
    )


@triton.jit
def _dense(base, tid, keys, k, KIND: tl.constexpr, LANES: tl.constexpr):
    """z of the 8·LANES elements from base (a multiple of 128) on, fp32; key k of keys int32 [., 2]; gaussian or rademacher."""
    k0, k1 = _key(keys, k)
    if KIND == GAUSSIAN:
        w0, w1, w2, w3 = _words((base >> 3) + tl.arange(0, LANES), tid, 0, k0, k1)
        a0, a1 = _pair(w0)
        b0, b1 = _pair(w1)
        c0, c1 = _pair(w2)
        d0, d1 = _pair(w3)
        return tl.interleave(_in_order(a0, b0, c0, d0), _in_order(a1, b1, c1, d1))
    else:
        tl.static_assert(KIND == RADEMACHER)
        word = tl.arange(0, LANES // 4)  # of 32 elements each
        w0, w1, w2, w3 = _words((base >> 7) + word // 4, tid, 0, k0, k1)
        which = word % 4
        bits = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
        spread = (bits[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        return tl.reshape(spread.to(tl.float32) * 2.0 - 1.0, [8 * LANES])


@triton.jit
def _noise(
    base, tid, keys, k, shared, signs, j, bit, total, KIND: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """z of the 8·LANES elements from base (a multiple of 128) on, fp32; key k of keys int32 [., 2]; KIND of spec.KINDS.

    shared: of a flipped kind, the key of what directions share. WIDTH: of the tensor as a matrix, 0: it is none. signs int32
    [J, total] (`_signs`): bit `bit` of word [j, r] is row r's sign, of word [j, total - WIDTH + i] column i's.
    """
    if KIND < 2:
        return _dense(base, tid, keys, k, KIND, LANES)
    if WIDTH > 0:
        at = base + tl.arange(0, 8 * LANES)
        row = at // WIDTH
        column = at - row * WIDTH + (total - WIDTH)
        here = signs + j * total
        # Past the tensor's end any word will do: nothing of it is stored.
        differ = tl.load(here + tl.minimum(row, total - WIDTH - 1)) ^ tl.load(here + column)
        z = 1.0 - ((differ >> bit) & 1).to(tl.float32) * 2.0
    else:
        z = _dense(base, tid, keys, k, RADEMACHER, LANES)
    if KIND >= FLIPPED:
        z = _dense(base, tid, keys, shared, KIND - FLIPPED, LANES) * z
    return z


@triton.jit
def _signs(
    signs,  # int32 [J, rows + columns]
    keys,
    rows,
    columns,
    tid,
    U,
    Q,
    GROUPS: tl.constexpr,  # words that the Q directions of an update take
    PROBES: tl.constexpr,
):
    """Program (i, j): the signs of 128 rows, or of 128 columns, of the (up to 32) directions of word j, a bit each."""
    i, j = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(rows, 128)
    tid = tid.to(tl.uint32, bitcast=True)
    first = tl.where(j < U * GROUPS, (j // GROUPS) * Q + (j % GROUPS) * 32, U * Q + U + (j - U * GROUPS) * 32)
    left = tl.where(j < U * GROUPS, Q - (j % GROUPS) * 32, PROBES - (j - U * GROUPS) * 32)
    block = tl.where(i < blocks, i, i - blocks)
    word = tl.arange(0, 4)
    counter = (word * 0 + block).to(tl.int64)
    found = tl.zeros([4, 32], tl.uint32)
    shift = tl.zeros([1], tl.uint32)
    for d in range(tl.minimum(left, 32)):
        k0, k1 = _key(keys, first + d)
        if i < blocks:
            w0, w1, w2, w3 = _words(counter, tid, ROWS, k0, k1)
        else:
            w0, w1, w2, w3 = _words(counter, tid, COLUMNS, k0, k1)
        w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        bits = (w[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        found = found | (bits << shift)
        shift += 1
    place = block * 128 + word[:, None] * 32 + tl.arange(0, 32)[None, :]
    size = tl.where(i < blocks, rows, columns)
    start = tl.where(i < blocks, 0, rows)
    at = signs + j.to(tl.int64) * (rows + columns) + start + place
    tl.store(at, found.to(tl.int32, bitcast=True), mask=place < size)


@triton.jit
def _sign_vectors(
    out,  # [D, n]
    keys,  # int32 [D, 2]
    n,
    tid,
    PURPOSE: tl.constexpr,
):
    """Program (i, d): the signs of 128 places for direction d."""
    i, d = tl.program_id(0), tl.program_id(1)
    k0, k1 = _key(keys, d)
    tid = tid.to(tl.uint32, bitcast=True)
    word = tl.arange(0, 4)
    w0, w1, w2, w3 = _words((word * 0 + i).to(tl.int64), tid, PURPOSE, k0, k1)
    w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    bits = (w[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    place = i * 128 + word[:, None] * 32 + tl.arange(0, 32)[None, :]
    z = bits.to(tl.float32) * 2.0 - 1.0
    tl.store(out + d.to(tl.int64) * n + place, z.to(out.dtype.element_ty), mask=place < n)


@triton.jit
def _pairs(base, tid, purpose: tl.constexpr, k0, k1, LANES: tl.constexpr):
    """Words [4·LANES], each of two elements' 16 bits from base (a multiple of 128) on, the even one's low."""
    w0, w1, w2, w3 = _words((base >> 3) + tl.arange(0, LANES), tid, purpose, k0, k1)
    return _in_order(w0, w1, w2, w3)


@triton.jit
def _moving(a, base, tid, MASK: tl.constexpr, threshold, share, mask0, mask1, LANES: tl.constexpr):
    """Return which of the 8·LANES elements a mask lets move."""
    if MASK == SMALL:
        return tl.abs(a) <= threshold
    k0, k1 = mask0.to(tl.uint32, bitcast=True), mask1.to(tl.uint32, bitcast=True)
    pairs = _pairs(base, tid, 2, k0, k1, LANES)
    return tl.interleave(pairs & 0xFFFF, pairs >> 16).to(tl.int32, bitcast=True) < share


@triton.jit
def _round_stochastic(a, base, tid, keys, k, BF16: tl.constexpr, LANES: tl.constexpr):
    """The finite fp32 values a [8·LANES] on the grid of bf16 or fp16, still fp32."""
    k0, k1 = _key(keys, k)
    pairs = _pairs(base, tid, 1, k0, k1, LANES)
    bits = a.to(tl.int32, bitcast=True)
    if BF16:
        r = tl.interleave(pairs & 0xFFFF, pairs >> 16).to(tl.int32, bitcast=True)
        return ((bits + r) & -0x10000).to(tl.float32, bitcast=True)
    # (r >> 3)·2⁻¹³ as the mantissa of a float in [2⁻¹⁰, 2⁻⁹), then less 2⁻¹⁰: times 2^e it is that share of an ulp.
    low, high = ((pairs << 16) >> 9) & 0x007FFC00, (pairs >> 9) & 0x007FFC00
    share = (tl.interleave(low, high) | 0x3A800000).to(tl.float32, bitcast=True) - 0.0009765625
    power = tl.maximum(bits & 0x7F800000, 0x38800000) | (bits & -0x80000000)
    s = tl.fma(share, power.to(tl.float32, bitcast=True), a)
    if not _HARDWARE:  # which itself stops at the largest number when it rounds toward zero
        s = tl.minimum(tl.maximum(s, -65504.0), 65504.0)
    return s.to(tl.float16, fp_downcast_rounding="rtz").to(tl.float32)


@triton.jit
def _round_nearest(a, BF16: tl.constexpr):
    """The finite fp32 values a on the grid of bf16 or fp16, nearest even, still fp32."""
    if BF16:
        bits = a.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return a.to(tl.float16).to(tl.float32)


# ---- the pass ------------------------------------------------------------------------------------------------------


@triton.jit
def _nothing(like):
    """-0.0 in that shape and dtype: what adds nothing, not even to the sign of a zero. Triton makes +0.0 of the literal."""
    if like.dtype == tl.float64:
        return tl.full(like.shape, -0x8000000000000000, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full(like.shape, -0x80000000, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _restored(a, z, scale):
    """a + scale·z; a itself where scale is 0, signs of zeros included."""
    return tl.where(scale == 0, a, a + scale * z)


@triton.jit
def _moved(
    a, base, tid, keys, k, shared, signs, j, bit, total, scale, keep, MASK: tl.constexpr,
    STOCHASTIC: tl.constexpr, BF16: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """θ after a move by scale along key k; a mask by magnitude goes with no move."""
    z = _noise(base, tid, keys, k, shared, signs, j, bit, total, KIND, WIDTH, LANES).to(a.dtype)
    b = a + scale * z
    if STOCHASTIC:
        b = _round_nearest(b, BF16)
    if MASK:
        b = tl.where(keep, b, a)
    return b


@triton.jit
def _step(
    a, m, s, z, u, base, tid, keys, UQ, decay, beta, restores, keep, threshold, RESTORE: tl.constexpr, MASK: tl.constexpr,
    MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, BF16: tl.constexpr, LANES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """θ (and momentum) after update u, whose directions sum to s, z the last of them; UQ: multipliers in all."""
    old = a
    if MASK == SMALL:
        keep = tl.abs(a) <= threshold
    if MASK and MOMENTUM:
        s = tl.where(keep, s, _nothing(s))
    if RESTORE:
        a = _restored(a, z, tl.load(restores + u))
    a = decay * a
    if MOMENTUM:
        m = beta * m + s
        a = tl.where(m == 0, a, a + m)  # a buffer that is still empty leaves the signs of zeros alone
    else:
        a = a + s
    if FLOOR is not None:
        a = tl.maximum(a, tl.full([], FLOOR, a.dtype))
    if STOCHASTIC:
        a = _round_stochastic(a, base, tid, keys, UQ + u, BF16, LANES)
    if MASK:
        a = tl.where(keep, a, old)
    return a, m


@triton.jit
def _updated(
    a, m, base, tid, keys, values, signs, total, U, Q, keep, threshold,
    PROBES: tl.constexpr, ONE: tl.constexpr, RESTORE: tl.constexpr, MASK: tl.constexpr, MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr, BF16: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    LANES: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """θ (and momentum) after U updates of Q directions each; one whose multipliers are all 0 changes nothing, unless
    there is momentum; one whose decay is NOTHING changes nothing at all: but their restores are done.

    keep: what moves, under a random mask. ONE: there is one update of ONE directions, as in training: nothing is left
    to a loop. RESTORE: some restore is not 0.
    """
    restores = values + U * Q + U + PROBES + 1
    beta = tl.load(restores - 1)
    shared = U * Q + U + PROBES  # keys: of what each update's directions share
    if ONE:
        decay = tl.load(values + ONE)
        live = MOMENTUM | (decay != 1)
        for k in tl.static_range(ONE):
            live = live | (tl.load(values + k) != 0)
        if live & (decay != NOTHING):
            z = _noise(base, tid, keys, 0, shared, signs, 0, 0, total, KIND, WIDTH, LANES).to(a.dtype)
            s = tl.load(values) * z
            for k in tl.static_range(1, ONE):
                z = _noise(base, tid, keys, k, shared, signs, 0, k, total, KIND, WIDTH, LANES).to(a.dtype)
                s = s + tl.load(values + k) * z
            a, m = _step(
                a, m, s, z, 0, base, tid, keys, ONE, decay, beta, restores, keep, threshold,
                RESTORE, MASK, MOMENTUM, STOCHASTIC, BF16, LANES, FLOOR,
            )  # fmt: skip
        else:
            if RESTORE:
                if tl.load(restores) != 0:
                    back = tl.load(restores)
                    a = _moved(
                        a, base, tid, keys, ONE - 1, shared, signs, 0, ONE - 1, total, back, keep,
                        MASK, STOCHASTIC, BF16, KIND, WIDTH, LANES,
                    )  # fmt: skip
    else:
        for u in range(U):
            decay = tl.load(values + U * Q + u)
            live = MOMENTUM | (decay != 1)
            for k in range(Q):
                live = live | (tl.load(values + u * Q + k) != 0)
            if live & (decay != NOTHING):
                s = _nothing(a)
                z = s
                for k in range(Q):
                    j, bit = u * GROUPS + k // 32, k % 32
                    z = _noise(
                        base, tid, keys, u * Q + k, shared + u, signs, j, bit, total, KIND, WIDTH, LANES
                    ).to(a.dtype)
                    product = tl.load(values + u * Q + k) * z
                    s = tl.where(k == 0, product, s + product)
                a, m = _step(
                    a, m, s, z, u, base, tid, keys, U * Q, decay, beta, restores, keep, threshold,
                    RESTORE, MASK, MOMENTUM, STOCHASTIC, BF16, LANES, FLOOR,
                )  # fmt: skip
            else:
                if RESTORE:
                    if tl.load(restores + u) != 0:
                        last, back = u * Q + Q - 1, tl.load(restores + u)
                        j, bit = u * GROUPS + (Q - 1) // 32, (Q - 1) % 32
                        a = _moved(
                            a, base, tid, keys, last, shared + u, signs, j, bit, total, back, keep,
                            MASK, STOCHASTIC, BF16, KIND, WIDTH, LANES,
                        )  # fmt: skip
    return a, m


@triton.jit(do_not_specialize=_PLAIN)
def _pass(
    theta,  # or none
    momentum,  # or none
    out,  # [PROBES, n], or none
    keys,  # int32 [U·Q + U + PROBES (+ U + 1), 2]: of directions, rounding, probes, what directions share
    values,  # of the work dtype [U·Q + U + PROBES + 1 (+ U)]: multipliers, decays, scales, beta, restores
    signs,  # int32 [J, total] (`_signs`), or none
    total,
    n,
    start,  # index of theta's first element in its tensor, a multiple of 128
    tid,  # int32, the bits of the tensor's id
    U,
    Q,
    threshold,  # of a mask by magnitude
    share,  # of a random mask, and its key, int32 bits
    mask0,
    mask1,
    PARTIAL: tl.constexpr,  # start is not 0
    WORK: tl.constexpr,
    HAS_THETA: tl.constexpr,
    HAS_UPDATES: tl.constexpr,
    ONE: tl.constexpr,
    RESTORE: tl.constexpr,
    MASK: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    WRITE_THETA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BF16: tl.constexpr,
    PROBES: tl.constexpr,
    FRESH: tl.constexpr,  # bit p: probe p needs another draw than the one before it
    SILENT: tl.constexpr,  # bit p: probe p needs no noise
    NARROW: tl.constexpr,  # out has 16 bits
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,  # of θ as a matrix, for rank1 and flipped kinds; 0: none
    GROUPS: tl.constexpr,  # words of signs that an update's directions take
    LANES: tl.constexpr,
    FLOOR: tl.constexpr = None,  # no update brings θ below it
):
    base = tl.program_id(0).to(tl.int64) * (8 * LANES)
    at = base + tl.arange(0, 8 * LANES)
    inside = at < n
    if PARTIAL:
        base += start  # of the noise from here on
    tid = tid.to(tl.uint32, bitcast=True)
    if HAS_THETA:
        a = tl.load(theta + at, mask=inside, other=0.0).to(WORK)
    else:
        a = _nothing(tl.full([8 * LANES], 0.0, WORK))
    keep = inside
    if MASK == CHOSEN:
        keep = _moving(a, base, tid, MASK, threshold, share, mask0, mask1, LANES)
    if HAS_UPDATES:
        m = a
        if HAS_MOMENTUM:
            m = tl.load(momentum + at, mask=inside, other=0.0)
        a, m = _updated(
            a, m, base, tid, keys, values, signs, total, U, Q, keep, threshold,
            PROBES, ONE, RESTORE, MASK, HAS_MOMENTUM, STOCHASTIC, BF16, KIND, WIDTH, GROUPS, LANES, FLOOR,
        )  # fmt: skip
        if HAS_MOMENTUM:
            tl.store(momentum + at, m, mask=inside)
        if WRITE_THETA:
            tl.store(theta + at, a.to(theta.dtype.element_ty), mask=inside)
    if MASK == SMALL:
        keep = _moving(a, base, tid, MASK, threshold, share, mask0, mask1, LANES)
    z = tl.zeros([8 * LANES], tl.float32)
    for p in tl.static_range(PROBES):
        if (FRESH >> p) & 1:
            k, shared, j = U * Q + U + p, 2 * U + U * Q + PROBES, U * GROUPS + p // 32
            z = _noise(base, tid, keys, k, shared, signs, j, p % 32, total, KIND, WIDTH, LANES)
        if (SILENT >> p) & 1:
            probe = a
        else:
            probe = a + tl.load(values + U * Q + U + p) * z.to(WORK)
            if MASK:
                probe = tl.where(keep, probe, a)
        if NARROW:  # also what fp64 becomes goes through fp32
            probe = probe.to(tl.float32)
        tl.store(out + tl.full([], p, tl.int64) * n + at, probe.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pass_small(
    theta,  # fp32, all small tensors end to end
    momentum,  # like theta, or none
    out,  # fp32 [PROBES, total], or none
    narrow,  # the same in 16 bits, or none
    table,  # int64 [programs, 4]: start in theta, start in its tensor (a multiple of 128), elements, id as int32 bits
    keys,
    values,
    total,
    U,
    Q,
    HAS_UPDATES: tl.constexpr,
    ONE: tl.constexpr,
    RESTORE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    PROBES: tl.constexpr,
    FRESH: tl.constexpr,
    SILENT: tl.constexpr,
    NARROW: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
):
    """`_pass` for many small fp32 tensors in one launch; none of them has a mask or a floor."""
    row = table + 4 * tl.program_id(0)
    start, base, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    tid = tl.load(row + 3).to(tl.int32).to(tl.uint32, bitcast=True)
    i = tl.arange(0, 8 * LANES)
    inside = i < count
    at = start + i
    a = tl.load(theta + at, mask=inside, other=0.0)
    if HAS_UPDATES:
        m = a
        if HAS_MOMENTUM:
            m = tl.load(momentum + at, mask=inside, other=0.0)
        a, m = _updated(
            a, m, base, tid, keys, values, keys, 0, U, Q, inside, 0.0,
            PROBES, ONE, RESTORE, ALL, HAS_MOMENTUM, False, False, KIND, 0, 1, LANES, None,
        )  # fmt: skip
        if HAS_MOMENTUM:
            tl.store(momentum + at, m, mask=inside)
        tl.store(theta + at, a, mask=inside)
    z = tl.zeros([8 * LANES], tl.float32)
    for p in tl.static_range(PROBES):
        if (FRESH >> p) & 1:
            k, shared = U * Q + U + p, 2 * U + U * Q + PROBES
            z = _noise(base, tid, keys, k, shared, keys, 0, 0, 0, KIND, 0, LANES)
        if (SILENT >> p) & 1:
            probe = a
        else:
            probe = a + tl.load(values + U * Q + U + p) * z
        tl.store(out + total * p + at, probe, mask=inside)
        if NARROW:
            tl.store(narrow + total * p + at, probe.to(narrow.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def _rows(
    theta,
    rows,  # int64 [PROBES·per_probe]
    out,  # [PROBES·per_probe, width]
    keys,  # int32 [PROBES (+ 1), 2], of probes and of what they share
    values,  # [PROBES]: scales
    signs,  # int32 [J, total] (`_signs`), or none
    total,
    width,
    origin,  # index of theta's first element in its tensor
    per_probe,
    probes,
    tid,
    threshold,
    share,
    mask0,
    mask1,
    WORK: tl.constexpr,
    MASK: tl.constexpr,
    SILENT: tl.constexpr,
    NARROW: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (n, j): out[n] = θ[rows[n]] + scale·z[rows[n]], the j-th stretch that starts at a multiple of 128."""
    row = tl.program_id(0).to(tl.int64)
    theta -= origin  # where element 0 would be
    start = origin + tl.load(rows + row) * width
    base = start // 128 * 128 + tl.program_id(1).to(tl.int64) * (8 * LANES)
    at = base + tl.arange(0, 8 * LANES)
    inside = (at >= start) & (at < start + width)
    probe = tl.load(theta + at, mask=inside, other=0.0).to(WORK)
    if not SILENT:
        p = row // per_probe
        tid = tid.to(tl.uint32, bitcast=True)
        bit = (p % 32).to(tl.int32)
        z = _noise(base, tid, keys, p, probes, signs, p // 32, bit, total, KIND, WIDTH, LANES)
        a = probe
        probe = a + tl.load(values + p) * z.to(WORK)
        if MASK:
            probe = tl.where(_moving(a, base, tid, MASK, threshold, share, mask0, mask1, LANES), probe, a)
    if NARROW:
        probe = probe.to(tl.float32)
    tl.store(out + row * width + (at - start), probe.to(out.dtype.element_ty), mask=inside)
