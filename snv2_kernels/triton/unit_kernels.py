"""A unit as two Triton kernels: pw1 + BN + ReLU, then dw + BN + pw2 + BN + ReLU with the shuffle in
the store.

A program makes BM channels of BP pixels of one image, and sums over BK channels at a time. The
middle map is the only one that is written on the way, in the map's dtype. The second kernel
computes the depthwise convolution of a tile again for each BM channels of the result: nine loads
from L1 and L2 beside BM products.

What a program of the second kernel makes follows from its number: channels of the main branch
first, then those of the projection (stride 2) or those that pass through (stride 1). Each row has
the channel of the result that it is stored to in ``out_table``; that is the shuffle.
"""

import triton
import triton.language as tl


@triton.jit
def _product(b_w, b_x, b_y, WIDENS: tl.constexpr):
    if WIDENS:  # for the interpreter, which takes bfloat16 for integers here
        b_w = b_w.to(tl.float32)
        b_x = b_x.to(tl.float32)
    return tl.dot(b_w, b_x, b_y, input_precision="ieee")


@triton.jit
def pw1_kernel(
    x,  # [N, C, P]
    table,  # [K] channels of x
    matrix,  # [M, K]
    bias,  # [M]
    y,  # [N, M, P] contiguous
    depth,
    rows,
    pixels,
    x_n,
    x_c,
    x_p,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_p = tl.cdiv(pixels, BP)
    t_m = tl.cdiv(rows, BM)
    i_n = (i_t // (t_p * t_m)).to(tl.int64)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    o_p = i_t // t_m % t_p * BP + tl.arange(0, BP)
    m_m, m_p = o_m < rows, o_p < pixels
    p_x = x + i_n * x_n + o_p.to(tl.int64)[None, :] * x_p
    b_y = tl.zeros((BM, BP), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        b_c = tl.load(table + o_k, mask=m_k, other=0).to(tl.int64)
        b_x = tl.load(p_x + b_c[:, None] * x_c, mask=m_k[:, None] & m_p[None, :], other=0.0)
        p_w = matrix + o_m[:, None] * depth + o_k[None, :]
        b_w = tl.load(p_w, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_y = _product(b_w, b_x, b_y, WIDENS)
    b_y += tl.load(bias + o_m, mask=m_m, other=0.0)[:, None]
    b_y = tl.where(b_y < 0.0, 0.0, b_y)
    p_y = y + (i_n * rows + o_m)[:, None] * pixels + o_p[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_p[None, :])


@triton.jit
def _dw_pw(
    x,  # one image of the map
    table,  # [K] channels of x, where GATHERS
    dw,  # [K, 10]
    matrix,  # [M, K]
    bias,  # [M]
    o_m,
    m_m,
    o_h,  # [BP], of the tap in the middle
    o_w,
    m_p,
    depth,
    height,
    width,
    x_c,
    x_p,
    GATHERS: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    b_y = tl.zeros((BM, BP), tl.float32)
    p_p = (o_h * width + o_w).to(tl.int64)[None, :] * x_p
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        b_c = tl.load(table + o_k, mask=m_k, other=0) if GATHERS else o_k
        p_x = x + b_c.to(tl.int64)[:, None] * x_c + p_p
        b_x = tl.zeros((BK, BP), tl.float32)
        for i in tl.static_range(9):
            b_h = o_h + (i // 3 - 1)
            b_w = o_w + (i % 3 - 1)
            m_tap = m_p & (b_h >= 0) & (b_h < height) & (b_w >= 0) & (b_w < width)
            p_tap = p_x + ((i // 3 - 1) * width + (i % 3 - 1)) * x_p
            b_tap = tl.load(p_tap, mask=m_k[:, None] & m_tap[None, :], other=0.0).to(tl.float32)
            b_x += b_tap * tl.load(dw + o_k * 10 + i, mask=m_k, other=0.0)[:, None]
        b_x += tl.load(dw + o_k * 10 + 9, mask=m_k, other=0.0)[:, None]
        p_w = matrix + o_m[:, None] * depth + o_k[None, :]
        b_matrix = tl.load(p_w, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_y = _product(b_matrix, b_x.to(x.dtype.element_ty), b_y, WIDENS)
    b_y += tl.load(bias + o_m, mask=m_m, other=0.0)[:, None]
    return tl.where(b_y < 0.0, 0.0, b_y)


@triton.jit
def dw_pw2_kernel(
    middle,  # [N, K, H * W] contiguous
    dw,  # [K, 10]
    matrix,  # [M, K]
    bias,  # [M]
    x,  # [N, C, H * W], the unit's input
    side_table,  # [S] channels of x: those that pass through, or what the projection gathers
    side_dw,  # the projection's, as the main branch's
    side_matrix,
    side_bias,
    y,  # [N, C', P]
    out_table,  # [M + S'] channel of y of each row
    depth,
    rows,
    side_depth,
    side_rows,
    height,
    width,
    y_width,
    pixels,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_p = tl.cdiv(pixels, BP)
    t_m = tl.cdiv(rows, BM)
    t_s = tl.cdiv(side_rows, BM)
    i_n = (i_t // (t_p * (t_m + t_s))).to(tl.int64)
    i_m = i_t % (t_m + t_s)
    o_p = i_t // (t_m + t_s) % t_p * BP + tl.arange(0, BP)
    o_h = o_p // y_width * STRIDE
    o_w = o_p % y_width * STRIDE
    m_p = o_p < pixels
    p_x = x + i_n * x_n
    on_side = i_m >= t_m
    o_m = tl.where(on_side, i_m - t_m, i_m) * BM + tl.arange(0, BM)
    m_m = o_m < tl.where(on_side, side_rows, rows)
    if on_side:
        if STRIDE == 1:
            b_c = tl.load(side_table + o_m, mask=m_m, other=0).to(tl.int64)
            p_a = p_x + b_c[:, None] * x_c + o_p.to(tl.int64)[None, :] * x_p
            b_y = tl.load(p_a, mask=m_m[:, None] & m_p[None, :], other=0.0)
        else:
            b_y = _dw_pw(
                p_x, side_table, side_dw, side_matrix, side_bias, o_m, m_m, o_h, o_w, m_p,
                side_depth, height, width, x_c, x_p, True, BM, BP, BK, WIDENS,
            ).to(x.dtype.element_ty)  # fmt: skip
    else:
        p_middle = middle + i_n * depth * height * width
        b_y = _dw_pw(
            p_middle, side_table, dw, matrix, bias, o_m, m_m, o_h, o_w, m_p,
            depth, height, width, height * width, 1, False, BM, BP, BK, WIDENS,
        ).to(x.dtype.element_ty)  # fmt: skip
    b_c = tl.load(out_table + o_m + tl.where(on_side, rows, 0), mask=m_m, other=0).to(tl.int64)
    p_y = y + i_n * y_n + b_c[:, None] * y_c + o_p.to(tl.int64)[None, :] * y_p
    tl.store(p_y, b_y, mask=m_m[:, None] & m_p[None, :])
