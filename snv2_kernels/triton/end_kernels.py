"""The ends of a network as Triton kernels: the stem in one, the head in two.

Tiles and planes are those of :mod:`~snv2_kernels.triton.unit_kernels`.

The stem makes BM channels of BP pixels of the pooled map. It convolves at each of the nine places
of the pooling window, where four would do if neighbours shared theirs, and keeps the largest: the
products are few, and the map between convolution and pooling, four times the result, is never
written. Bias and activation come after the largest, which one that never falls does not change;
others come before.

The head's features are summed over the pixels of a tile of one image, in float32; the linear
layer adds the sums of an image's tiles up as it reads them, and so no order is left to chance.
"""

import triton
import triton.language as tl

from snv2_kernels.triton.unit_kernels import _bias_activate, _columns, _product, _weights


@triton.jit(
    do_not_specialize=["batch", "height", "width", "y_height", "y_width", "in_channels", "bias",
                       "slope", "rows"]
)  # fmt: skip
def stem_kernel(
    x,  # the caller's map [N, C, H * W], or BYTES
    scale,  # [C] of bytes
    shift,
    y,  # planes [M, N * P]
    weights,
    parameters,
    batch,
    in_channels,
    height,
    width,
    c_height,  # of the convolution's result
    c_width,
    pixels,  # P
    y_width,
    matrix,  # [M, C * 9]
    pitch,
    bias,  # [M]
    slope,  # [M], of a PReLU
    rows,
    x_n,
    x_c,
    x_p,
    y_c,
    BYTES: tl.constexpr,
    EACH: tl.constexpr,  # activate before the largest is taken
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_y, i_n, o_p = _columns(i_t // t_m, pixels, BP)
    m_p = i_n < batch
    p_n = (x + i_n * x_n)[None, :]
    b_y = tl.full((BM, BP), float("-inf"), tl.float32)
    for i in range(9):
        c_h = o_p // y_width * 2 + (i // 3 - 1)
        c_w = o_p % y_width * 2 + (i % 3 - 1)
        m_c = m_p & (c_h >= 0) & (c_h < c_height) & (c_w >= 0) & (c_w < c_width)
        b_i = tl.zeros((BM, BP), tl.float32)
        for k in range(0, in_channels * 9, BK):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < in_channels * 9
            b_h = c_h[None, :] * 2 + (o_k % 9 // 3 - 1)[:, None]
            b_w = c_w[None, :] * 2 + (o_k % 3 - 1)[:, None]
            m_x = m_k[:, None] & m_c[None, :]
            m_x &= (b_h >= 0) & (b_h < height) & (b_w >= 0) & (b_w < width)
            p_x = p_n + (o_k // 9).to(tl.int64)[:, None] * x_c
            p_x += (b_h * width + b_w).to(tl.int64) * x_p
            b_x = tl.load(p_x, mask=m_x, other=0)
            if BYTES:
                b_scale = tl.load(scale + o_k // 9, mask=m_k, other=0.0)
                b_shift = tl.load(shift + o_k // 9, mask=m_k, other=0.0)
                b_x = b_x.to(tl.float32) * b_scale[:, None] + b_shift[:, None]
                b_x = tl.where(m_x, b_x, 0.0).to(weights.dtype.element_ty)
            b_matrix = _weights(weights + matrix, pitch, o_m, o_k, m_m, m_k)
            b_i = _product(b_matrix, b_x, b_i, WIDENS)
        if EACH:
            b_i = _bias_activate(b_i, parameters, bias, slope, o_m, m_m, ACTIVATION)
        b_i = tl.where(m_c[None, :], b_i, float("-inf"))
        b_y = tl.maximum(b_y, b_i, propagate_nan=tl.PropagateNan.ALL)
    if not EACH:
        b_y = _bias_activate(b_y, parameters, bias, slope, o_m, m_m, ACTIVATION)
    p_y = y + o_m.to(tl.int64)[:, None] * y_c + o_y[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & (o_y < y_c)[None, :])


@triton.jit(do_not_specialize=["batch", "pixels", "table", "bias", "slope", "depth", "rows"])
def features_kernel(
    x,  # planes
    sums,  # [tiles of an image, N, M] float32
    tables,
    weights,
    parameters,
    batch,
    pixels,
    table,  # [K] planes of x
    matrix,  # [M, K]
    pitch,
    bias,  # [M]
    slope,  # [M], of a PReLU
    depth,
    rows,
    x_c,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    t_p = tl.cdiv(pixels, BP)
    i_n = (i_t // (t_m * t_p)).to(tl.int64)
    i_p = i_t // t_m % t_p
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    o_p = i_p * BP + tl.arange(0, BP)
    m_m, m_p = o_m < rows, o_p < pixels
    p_x = x + i_n * pixels + o_p[None, :]
    b_y = tl.zeros((BM, BP), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        b_c = tl.load(tables + table + o_k, mask=m_k, other=0).to(tl.int64)
        b_x = tl.load(p_x + b_c[:, None] * x_c, mask=m_k[:, None] & m_p[None, :], other=0.0)
        b_w = _weights(weights + matrix, pitch, o_m, o_k, m_m, m_k)
        b_y = _product(b_w, b_x, b_y, WIDENS)
    b_y = _bias_activate(b_y, parameters, bias, slope, o_m, m_m, ACTIVATION)
    b_y = tl.where(m_p[None, :], b_y, 0.0)
    p_sums = sums + (i_p * batch + i_n) * rows + o_m
    tl.store(p_sums, tl.sum(b_y, 1), mask=m_m)


@triton.jit(do_not_specialize=["batch", "pixels", "tiles", "bias", "depth", "rows"])
def linear_kernel(
    sums,  # [tiles, N, K] float32
    z,  # the caller's scores [N, M]
    weights,
    parameters,
    batch,
    pixels,  # that were summed
    tiles,
    matrix,  # [M, K]
    pitch,
    bias,  # [M]
    depth,
    rows,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    o_n = (i_t // t_m).to(tl.int64) * BP + tl.arange(0, BP)
    m_m, m_n = o_m < rows, o_n < batch
    b_y = tl.zeros((BM, BP), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        b_x = tl.zeros((BK, BP), tl.float32)
        for i in range(tiles):
            p_x = sums + (i * batch + o_n)[None, :] * depth + o_k[:, None]
            b_x += tl.load(p_x, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_x = (b_x / pixels).to(weights.dtype.element_ty)
        b_w = _weights(weights + matrix, pitch, o_m, o_k, m_m, m_k)
        b_y = _product(b_w, b_x, b_y, WIDENS)
    b_y += tl.load(parameters + bias + o_m, mask=m_m, other=0.0)[:, None]
    p_z = z + o_n[None, :] * rows + o_m[:, None]
    tl.store(p_z, b_y.to(z.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
