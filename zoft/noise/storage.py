"""Loads and stores of `zoft.noise` as compiled CPU loops, and the rounding to fp16 and bf16 that they need.

Tensors come in as addresses with a storage code, so that numba compiles `run` twice at most (fp32 and fp64 work).
"""

import numpy as np
from numba import carray

from zoft.noise.intrinsics import as_f32, as_f64, as_u16, bits_of, float_of, jit, truncated

FP32, BF16, FP16, FP64, ZERO = 0, 1, 2, 3, 4  # storage codes; ZERO: no memory at all, every element is -0.0

_f = np.float32


@jit
def _from_fp16(h):
    magnitude = np.int32(h & 0x7FFF)
    bits = np.int32((magnitude << 13) + (112 << 23))
    bits = np.int32(bits + (112 << 23)) if magnitude >= 0x7C00 else bits
    bits = bits_of(_f(magnitude) * _f(2.0**-24)) if magnitude < 0x400 else bits
    return float_of(np.int32(bits | np.int32((h & 0x8000) << 16)))


@jit
def to_fp16(x):
    """Round to nearest even; beyond 65519.99 to infinity; NaN stays NaN."""
    bits = bits_of(x)
    magnitude = np.int32(bits & 0x7FFFFFFF)
    normal = np.int32(np.int32(magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13)
    normal = np.int32(0x7C00) if normal > 0x7C00 else normal
    small = np.int32(bits_of(float_of(magnitude) + _f(0.5)) - 0x3F000000)
    h = small if magnitude < (113 << 23) else normal
    h = np.int32(0x7E00) if magnitude > 0x7F800000 else h
    return np.uint16(np.int32(h | np.int32(np.int32(bits >> 16) & 0x8000)))


@jit
def to_bf16(x):
    """Round to nearest even; NaN stays NaN."""
    bits = bits_of(x)
    rounded = np.int32(bits + np.int32(0x7FFF + ((bits >> 16) & 1)))
    nan = np.int32(bits & 0x7FFFFFFF) > 0x7F800000
    return np.uint16((np.int32(bits | 0x400000) if nan else rounded) >> 16)


@jit
def to_fp16_stochastic(x, r):
    """Round up with the probability of the fraction lost, to 13 bits of it; finite x."""
    bits, r = bits_of(x), np.int32(np.int32(r) >> 3)
    magnitude = np.int32(bits & 0x7FFFFFFF)
    normal = np.int32(np.int32(magnitude - (112 << 23) + r) >> 13)
    normal = np.int32(0x7BFF) if normal > 0x7BFF else normal
    tiny = magnitude < (113 << 23)
    # units of 2⁻²⁴: the product is exact, the sum rounds once
    near = float_of(magnitude if tiny else np.int32(0)) * _f(2.0**24)
    h = truncated(near + _f(r) * _f(2.0**-13)) if tiny else normal
    return np.uint16(np.int32(h | np.int32(np.int32(bits >> 16) & 0x8000)))


@jit
def to_bf16_stochastic(x, r):
    """Round up with the probability of the fraction lost, all 16 bits of it; finite x."""
    return np.uint16(np.int32(bits_of(x) + np.int32(r)) >> 16)


@jit
def load(a, address, code, at, n):
    if code == FP32:
        source = carray(as_f32(address + np.uint64(4) * np.uint64(at)), n)
        for i in range(n):
            a[i] = source[i]
    elif code == BF16:
        half = carray(as_u16(address + np.uint64(2) * np.uint64(at)), n)
        for i in range(n):
            a[i] = float_of(np.int32(half[i] << 16))
    elif code == FP16:
        half = carray(as_u16(address + np.uint64(2) * np.uint64(at)), n)
        for i in range(n):
            a[i] = _from_fp16(half[i])
    elif code == FP64:
        wide = carray(as_f64(address + np.uint64(8) * np.uint64(at)), n)
        for i in range(n):
            a[i] = wide[i]
    else:
        for i in range(n):
            a[i] = -0.0  # the neutral element of addition, signs of zeros included


@jit
def store(a, address, code, at, n):
    if code == FP32:
        target = carray(as_f32(address + np.uint64(4) * np.uint64(at)), n)
        for i in range(n):
            target[i] = a[i]
    elif code == FP64:
        wide = carray(as_f64(address + np.uint64(8) * np.uint64(at)), n)
        for i in range(n):
            wide[i] = a[i]
    else:
        half = carray(as_u16(address + np.uint64(2) * np.uint64(at)), n)
        if code == BF16:
            for i in range(n):
                half[i] = to_bf16(_f(a[i]))
        else:
            for i in range(n):
                half[i] = to_fp16(_f(a[i]))


@jit
def store_stochastic(a, r, address, code, at, n):
    """Store a and leave in it the value stored."""
    half = carray(as_u16(address + np.uint64(2) * np.uint64(at)), n)
    if code == BF16:
        for i in range(n):
            half[i] = to_bf16_stochastic(_f(a[i]), r[i])
            a[i] = float_of(np.int32(half[i] << 16))
    else:
        for i in range(n):
            half[i] = to_fp16_stochastic(_f(a[i]), r[i])
            a[i] = _from_fp16(half[i])
