"""Instructions that the compiled CPU loops of `zoft.noise` need and Python has no words for."""

from typing import Any

import numba
import numba.extending
from llvmlite import ir
from numba import types

intrinsic: Any = numba.extending.intrinsic  # untyped: what it makes is called without its first argument
jit = numba.njit(fastmath=False)  # of functions that compiled code alone calls


@intrinsic
def fma(_context, x, y, z):
    """Return x·y + z rounded once (the instruction, or libm's exact fmaf where a CPU has none)."""
    return types.float32(types.float32, types.float32, types.float32), lambda _c, b, _s, args: b.fma(*args)


@intrinsic
def bits_of(_context, x):
    """Return the int32 with the bits of a float32."""
    return types.int32(types.float32), lambda c, b, s, args: b.bitcast(
        args[0], c.get_value_type(s.return_type)
    )


@intrinsic
def float_of(_context, x):
    """Return the float32 with the bits of an int32."""
    return types.float32(types.int32), lambda c, b, s, args: b.bitcast(
        args[0], c.get_value_type(s.return_type)
    )


@intrinsic
def truncated(_context, x):
    """Return a float32 as int32, toward zero."""
    return types.int32(types.float32), lambda c, b, s, args: b.fptosi(
        args[0], c.get_value_type(s.return_type)
    )


def _pointer(element):
    """An address (uint64) as a pointer to elements of this type."""

    @intrinsic
    def at(_context, address):
        signature = types.CPointer(element)(types.uint64)
        return signature, lambda c, b, s, args: b.inttoptr(args[0], c.get_value_type(s.return_type))

    return at


as_f32, as_f64 = _pointer(types.float32), _pointer(types.float64)
as_u16 = _pointer(types.uint16)


@intrinsic
def signs_of(_context, z, at, word):
    """Set z[at + b] = +1 if bit b of word is set else -1, b < 32, as vector code: LLVM finds none in the loop."""

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
