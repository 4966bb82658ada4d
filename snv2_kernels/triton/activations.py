"""Activations inside the Triton kernels, in float32: what ``torch.nn.functional`` gives, NaN and
infinities included."""

import triton
import triton.language as tl

from snv2_kernels.packing.units import ACTIVATIONS

RELU = tl.constexpr(ACTIVATIONS.index("relu"))
IDENTITY = tl.constexpr(ACTIVATIONS.index("identity"))
RELU6 = tl.constexpr(ACTIVATIONS.index("relu6"))
PRELU = tl.constexpr(ACTIVATIONS.index("prelu"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
HARDSWISH = tl.constexpr(ACTIVATIONS.index("hardswish"))
SIGMOID = tl.constexpr(ACTIVATIONS.index("sigmoid"))
HARDSIGMOID = tl.constexpr(ACTIVATIONS.index("hardsigmoid"))


@triton.jit
def _clamp6(b_x):
    b_x = tl.where(b_x < 0.0, 0.0, b_x)
    return tl.where(b_x > 6.0, 6.0, b_x)


@triton.jit
def _exp(b_x):
    """Within two units in the last place for all results from 2^-115 on; smaller ones are not
    needed to the last place, as 1 is added. The hardware has 2^x, and ``x * log2(e)`` rounded would
    cost as many units as x has multiples of one half: so the whole part of the exponent is taken
    off exactly, as a multiple of a ln 2 of nine bits and what that lacks."""
    b_x = tl.where(b_x < -80.0, -80.0, b_x)
    b_x = tl.where(b_x > 90.0, 90.0, b_x)
    b_whole = tl.floor(b_x * 1.4426950408889634)
    b_rest = b_x - b_whole * 0.693359375
    b_rest += b_whole * 2.1219444005469057e-4
    return tl.exp2(b_rest * 1.4426950408889634) * tl.exp2(b_whole)


@triton.jit
def _activate(
    b_y,  # [BM, BP] float32
    slope,  # [M]
    o_m,  # [BM]
    m_m,
    ACTIVATION: tl.constexpr,
):
    if ACTIVATION == RELU:
        b_y = tl.where(b_y < 0.0, 0.0, b_y)  # NaN stays
    elif ACTIVATION == RELU6:
        b_y = _clamp6(b_y)
    elif ACTIVATION == PRELU:  # a leaky ReLU too
        b_slope = tl.load(slope + o_m, mask=m_m, other=0.0)
        b_y = tl.where(b_y > 0.0, b_y, b_y * b_slope[:, None])
    elif ACTIVATION == SILU:
        b_y = tl.div_rn(b_y, 1.0 + _exp(-b_y))
    elif ACTIVATION == HARDSWISH:
        b_y = b_y * _clamp6(b_y + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == SIGMOID:
        b_y = tl.div_rn(tl.full(b_y.shape, 1.0, tl.float32), 1.0 + _exp(-b_y))
    elif ACTIVATION == HARDSIGMOID:
        b_y = _clamp6(b_y + 3.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACTIVATION == IDENTITY)
    return b_y
