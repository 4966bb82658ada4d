"""cat_shuffle and its gradient as Triton kernels.

They move elements and know nothing of pixels or channels: a map is [N, outer, inner] with its inner
elements along memory, channels x pixels in contiguous maps and pixels x channels in channels-last.
Dimensions that lie in memory as one are one (``ops.py``); so a dense channels-last map is one row.

A program moves ROUNDS tiles [BO, BI], from row to row, or in channels-last along the rows, and
loads all before it stores any. Rows that begin at multiples of UNIT elements move in vectors of so
many: their sizes and strides are given in units, so that the compiler sees it. Where tiles divide
the rows of contiguous maps nothing has a mask: threads beyond a row's end move its last unit once
more. Of small planes that lie one after the other the size is a constant, so that a program works
out one address.
"""

import triton
import triton.language as tl


@triton.jit
def _program(t_1, t_2, AXES: tl.constexpr):
    """Returns this program's place among any x t_1 x t_2: the grid's axes, or, where those would be
    too long, by division."""
    if AXES:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.program_id(0)
    return i // t_1 // t_2, i % t_1, i // t_1 % t_2


@triton.jit
def _along_rows(
    i_o, i_i, k, outer, inner, BO: tl.constexpr, BI: tl.constexpr, ROUNDS: tl.constexpr
):
    """Returns rows [BO, 1] and elements [1, BI] of round k of a program, and which there are."""
    o_o = (i_o * BO + tl.arange(0, BO))[:, None]
    o_i = ((i_i * ROUNDS + k) * BI + tl.arange(0, BI))[None, :]
    return o_o.to(tl.int64), o_i.to(tl.int64), (o_o < outer) & (o_i < inner)


@triton.jit
def _down_rows(
    i_o, i_i, outer, inner, BO: tl.constexpr, BI: tl.constexpr,
    ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Returns rows [BO, 1] of the first round and elements [1, BI] of all."""
    o_o = (i_o * (BO * ROUNDS) + tl.arange(0, BO))[:, None]
    o_i = i_i * BI + tl.arange(0, BI)
    o_i = tl.where(o_i < inner, o_i, inner - UNIT + o_i % UNIT)
    o_i = tl.max_contiguous(tl.multiple_of(o_i, UNIT), UNIT)[None, :]
    return o_o, o_i.to(tl.int64)


@triton.jit
def cat_shuffle_kernel(
    a,  # [N, outer, inner]
    b,
    y,  # [N, 2 * outer, inner], or with channels-last [N, outer, 2 * inner]
    outer,
    inner,
    t_i,  # tiles of a row
    batch,
    a_n,
    a_o,
    b_n,
    b_o,
    y_n,
    y_o,  # from where a row of a goes to where the next goes
    y_b,  # and to where that of b goes, but for channels-last
    a_i,
    b_i,
    BO: tl.constexpr,
    BI: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
    PLANE: tl.constexpr,  # elements of each row where they lie one after the other, or 0
    EVEN: tl.constexpr,  # tiles divide the rows
    CHANNELS_LAST: tl.constexpr,
    AXES: tl.constexpr,
):
    i_o, i_i, i_n = _program(t_i, batch, AXES)
    inner *= UNIT
    a_o *= UNIT
    b_o *= UNIT
    y_o *= UNIT
    y_b *= UNIT
    if PLANE:
        inner, a_o, b_o, y_o, y_b = PLANE, PLANE, PLANE, 2 * PLANE, PLANE
    i_n = i_n.to(tl.int64) * UNIT
    a += i_n * a_n
    b += i_n * b_n
    y += i_n * y_n
    loaded = ()
    if CHANNELS_LAST:
        for k in tl.static_range(ROUNDS):
            o_o, o_i, m_x = _along_rows(i_o, i_i, k, outer, inner, BO, BI, ROUNDS)
            b_a = tl.load(a + o_o * a_o + o_i * a_i, mask=m_x)
            loaded = loaded + ((b_a, tl.load(b + o_o * b_o + o_i * b_i, mask=m_x)),)
        for k in tl.static_range(ROUNDS):
            o_o, o_y, m_y = _along_rows(i_o, i_i, k, outer, 2 * inner, BO, 2 * BI, ROUNDS)
            tl.store(y + o_o * y_o + o_y, tl.interleave(loaded[k][0], loaded[k][1]), mask=m_y)
    else:
        o_o, o_i = _down_rows(i_o, i_i, outer, inner, BO, BI, ROUNDS, UNIT)
        p_a = a + o_o.to(tl.int64) * a_o + o_i * a_i
        p_b = b + o_o.to(tl.int64) * b_o + o_i * b_i
        p_y = y + o_o.to(tl.int64) * y_o + o_i
        for k in tl.static_range(ROUNDS):
            p_k, p_l = p_a + k * BO * a_o, p_b + k * BO * b_o
            if EVEN:
                loaded = loaded + ((tl.load(p_k), tl.load(p_l)),)
            else:
                m_k = o_o + k * BO < outer
                loaded = loaded + ((tl.load(p_k, mask=m_k), tl.load(p_l, mask=m_k)),)
        for k in tl.static_range(ROUNDS):
            p_k = p_y + k * BO * y_o
            if EVEN:
                tl.store(p_k, loaded[k][0])
                tl.store(p_k + y_b, loaded[k][1])
            else:
                m_k = o_o + k * BO < outer
                tl.store(p_k, loaded[k][0], mask=m_k)
                tl.store(p_k + y_b, loaded[k][1], mask=m_k)


@triton.jit
def cat_shuffle_backward_kernel(
    grad,  # [N, 2 * outer, inner], or with channels-last [N, outer, 2 * inner]
    a,  # [N, outer, inner]
    b,
    outer,
    inner,
    t_i,
    batch,
    g_n,
    g_o,  # from where a row of a comes from to where the next comes from
    g_b,  # and to where that of b does, but for channels-last
    y_n,  # of a and b
    y_o,
    g_i,
    BO: tl.constexpr,
    BI: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    AXES: tl.constexpr,
):
    i_o, i_i, i_n = _program(t_i, batch, AXES)
    inner *= UNIT
    g_o *= UNIT
    g_b *= UNIT
    y_o *= UNIT
    if PLANE:
        inner, g_o, g_b, y_o = PLANE, 2 * PLANE, PLANE, PLANE
    i_n = i_n.to(tl.int64) * UNIT
    grad += i_n * g_n
    a += i_n * y_n
    b += i_n * y_n
    loaded = ()
    if CHANNELS_LAST:
        for k in tl.static_range(ROUNDS):
            o_o, o_g, m_g = _along_rows(i_o, i_i, k, outer, 2 * inner, BO, 2 * BI, ROUNDS)
            loaded = loaded + (tl.load(grad + o_o * g_o + o_g * g_i, mask=m_g),)
        for k in tl.static_range(ROUNDS):
            o_o, o_i, m_x = _along_rows(i_o, i_i, k, outer, inner, BO, BI, ROUNDS)
            b_a, b_b = tl.split(tl.reshape(loaded[k], [BO, BI, 2]))
            tl.store(a + o_o * y_o + o_i, b_a, mask=m_x)
            tl.store(b + o_o * y_o + o_i, b_b, mask=m_x)
    else:
        o_o, o_i = _down_rows(i_o, i_i, outer, inner, BO, BI, ROUNDS, UNIT)
        p_g = grad + o_o.to(tl.int64) * g_o + o_i * g_i
        o_y = o_o.to(tl.int64) * y_o + o_i
        for k in tl.static_range(ROUNDS):
            p_k = p_g + k * BO * g_o
            if EVEN:
                loaded = loaded + ((tl.load(p_k), tl.load(p_k + g_b)),)
            else:
                m_k = o_o + k * BO < outer
                loaded = loaded + ((tl.load(p_k, mask=m_k), tl.load(p_k + g_b, mask=m_k)),)
        for k in tl.static_range(ROUNDS):
            p_k, p_l = a + o_y + k * BO * y_o, b + o_y + k * BO * y_o
            if EVEN:
                tl.store(p_k, loaded[k][0])
                tl.store(p_l, loaded[k][1])
            else:
                m_k = o_o + k * BO < outer
                tl.store(p_k, loaded[k][0], mask=m_k)
                tl.store(p_l, loaded[k][1], mask=m_k)
