"""What branches other than pw, dw, pw take besides: a depthwise convolution alone, an average pool
beside a branch, and squeeze-and-excite, which needs the whole map before it can scale any of it.

A gate is two launches, the means of each image's channels and the two products, whose result is
small: [N, C] in float32. A pointwise convolution that reads the map next multiplies it while
loading, so that the scaled map is not written. Elsewhere one pass scales it, adds what a shortcut
brings and applies the activation behind, with one rounding. All sums are taken in one order.

Tiles and planes are those of :mod:`~snv2_kernels.triton.unit_kernels`.
"""

import triton
import triton.language as tl

from snv2_kernels.triton.activations import _activate
from snv2_kernels.triton.unit_kernels import (
    _bias_activate,
    _columns,
    _depthwise,
    _product,
    _store_map,
    _store_planes,
    _weights,
)


@triton.jit(
    do_not_specialize=["batch", "height", "width", "y_width", "table", "dw", "slope", "rows",
                       "y_table", "z_table"]
)  # fmt: skip
def depthwise_kernel(
    x,  # the caller's map, or planes
    y,  # planes, where TO_PLANES
    z,  # the caller's map [N, C', P], where TO_MAP
    tables,
    parameters,
    batch,
    height,
    width,
    pixels,  # P
    y_width,
    table,  # [M] channels of x
    dw,  # [M, WINDOW * WINDOW + 1]
    slope,  # [M]
    rows,
    y_table,  # [M] the plane of y of each row
    z_table,  # [M] the channel of z of each row
    x_n,
    x_c,
    x_p,
    y_c,
    z_n,
    z_c,
    z_p,
    STRIDE: tl.constexpr,
    TO_PLANES: tl.constexpr,
    TO_MAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DILATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_y, i_n, o_p = _columns(i_t // t_m, pixels, BP)
    o_h = o_p // y_width * STRIDE
    o_w = o_p % y_width * STRIDE
    m_p = i_n < batch
    b_c = tl.load(tables + table + o_m, mask=m_m, other=0).to(tl.int64)
    p_x = x + (i_n * x_n + (o_h * width + o_w).to(tl.int64) * x_p)[None, :] + b_c[:, None] * x_c
    b_y = _depthwise(
        p_x, parameters, dw, slope, o_m, m_m, o_h, o_w, m_p, height, width, x_p,
        WINDOW, DILATION, ACTIVATION,
    )  # fmt: skip
    b_y = b_y.to(x.dtype.element_ty)
    if TO_PLANES:
        _store_planes(b_y, y, tables, y_table, o_m, m_m, o_y, y_c)
    if TO_MAP:
        _store_map(b_y, z, tables, z_table, o_m, m_m, i_n, o_p, m_p, z_n, z_c, z_p)


@triton.jit(
    do_not_specialize=["batch", "height", "width", "y_width", "table", "slope", "rows", "y_table",
                       "z_table"]
)  # fmt: skip
def average_kernel(
    x,  # the caller's map, or planes
    y,  # planes, where TO_PLANES
    z,  # the caller's map [N, C', P], where TO_MAP
    tables,
    parameters,
    batch,
    height,
    width,
    pixels,  # P
    y_width,
    table,  # [M] channels of x
    slope,  # [M]
    rows,
    y_table,  # [M] the plane of y of each row
    z_table,  # [M] the channel of z of each row
    x_n,
    x_c,
    x_p,
    y_c,
    z_n,
    z_c,
    z_p,
    STRIDE: tl.constexpr,
    INSIDE: tl.constexpr,  # of the pixels inside the map, not of all nine
    TO_PLANES: tl.constexpr,
    TO_MAP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_y, i_n, o_p = _columns(i_t // t_m, pixels, BP)
    o_h = o_p // y_width * STRIDE
    o_w = o_p % y_width * STRIDE
    m_p = i_n < batch
    b_c = tl.load(tables + table + o_m, mask=m_m, other=0).to(tl.int64)
    p_x = x + (i_n * x_n + (o_h * width + o_w).to(tl.int64) * x_p)[None, :] + b_c[:, None] * x_c
    b_y = tl.zeros((BM, BP), tl.float32)
    b_k = tl.zeros((BP,), tl.float32)
    for tap in tl.static_range(9):
        d_h = tap // 3 - 1
        d_w = tap % 3 - 1
        i_h = o_h + d_h
        i_w = o_w + d_w
        m_t = m_p & (i_h >= 0) & (i_h < height) & (i_w >= 0) & (i_w < width)
        d_p = (d_h * width + d_w).to(tl.int64) * x_p
        b_y += tl.load(p_x + d_p, mask=m_m[:, None] & m_t[None, :], other=0.0).to(tl.float32)
        b_k += m_t.to(tl.float32)
    b_y = b_y / tl.maximum(b_k, 1.0)[None, :] if INSIDE else b_y / 9.0
    b_y = _activate(b_y, parameters + slope, o_m, m_m, ACTIVATION).to(x.dtype.element_ty)
    if TO_PLANES:
        _store_planes(b_y, y, tables, y_table, o_m, m_m, o_y, y_c)
    if TO_MAP:
        _store_map(b_y, z, tables, z_table, o_m, m_m, i_n, o_p, m_p, z_n, z_c, z_p)


@triton.jit(do_not_specialize=["pixels", "rows"])
def means_kernel(
    x,  # planes [M, N * P]
    means,  # [N, M] float32
    pixels,  # P
    rows,
    x_c,
    BM: tl.constexpr,
    BP: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    i_n = (i_t // t_m).to(tl.int64)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    p_x = x + o_m.to(tl.int64)[:, None] * x_c + i_n * pixels
    b_sum = tl.zeros((BM, BP), tl.float32)
    for p in range(0, pixels, BP):
        o_p = p + tl.arange(0, BP)
        m_x = m_m[:, None] & (o_p < pixels)[None, :]
        b_sum += tl.load(p_x + o_p[None, :], mask=m_x, other=0.0).to(tl.float32)
    tl.store(means + i_n * rows + o_m, tl.sum(b_sum, 1) / pixels, mask=m_m)


@triton.jit(
    do_not_specialize=["batch", "depth", "bias", "slope", "hidden", "gate_bias", "gate_slope"]
)
def gates_kernel(
    means,  # [N, K] float32
    gates,  # [N, K] float32
    weights,
    parameters,
    batch,
    depth,
    matrix,  # [H, K]
    pitch,
    bias,  # [H]
    slope,  # [H], of a PReLU
    hidden,
    gate_matrix,  # [K, H]
    gate_pitch,
    gate_bias,  # [K]
    gate_slope,  # [K]
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(depth, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    o_n = (i_t // t_m).to(tl.int64) * BP + tl.arange(0, BP)
    m_m, m_n = o_m < depth, o_n < batch
    b_y = tl.zeros((BM, BP), tl.float32)
    for i in range(0, hidden, BK):
        o_h = i + tl.arange(0, BK)
        m_h = o_h < hidden
        b_h = tl.zeros((BK, BP), tl.float32)
        for k in range(0, depth, BK):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < depth
            p_x = means + o_n[None, :] * depth + o_k[:, None]
            b_x = tl.load(p_x, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_w = _weights(weights + matrix, pitch, o_h, o_k, m_h, m_k)
            b_h = _product(b_w, b_x.to(weights.dtype.element_ty), b_h, WIDENS)
        b_h = _bias_activate(b_h, parameters, bias, slope, o_h, m_h, ACTIVATION)
        b_w = _weights(weights + gate_matrix, gate_pitch, o_m, o_h, m_m, m_h)
        b_y = _product(b_w, b_h.to(weights.dtype.element_ty), b_y, WIDENS)
    b_y = _bias_activate(b_y, parameters, gate_bias, gate_slope, o_m, m_m, GATE_ACTIVATION)
    p_y = gates + o_n[None, :] * depth + o_m[:, None]
    tl.store(p_y, b_y, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _gated(b_x, gates, channels, i_n, o_k, m_x):
    """Channels times their gates, in float32."""
    p_gate = gates + i_n[None, :] * channels + o_k[:, None]
    return b_x.to(tl.float32) * tl.load(p_gate, mask=m_x, other=0.0)


@triton.jit(
    do_not_specialize=["batch", "pixels", "bias", "slope", "depth", "rows", "y_table", "z_table"]
)
def pointwise_kernel(
    x,  # planes [K, N * P]
    gates,  # [N, K] float32, where GATED
    y,  # planes, where TO_PLANES
    z,  # the caller's map [N, C', P], where TO_MAP
    tables,
    weights,
    parameters,
    batch,
    pixels,
    matrix,  # [M, K]
    pitch,
    bias,  # [M]
    slope,  # [M], of a PReLU
    depth,
    rows,
    y_table,  # [M] the plane of y of each row
    z_table,  # [M] the channel of z of each row
    x_c,
    y_c,
    z_n,
    z_c,
    z_p,
    GATED: tl.constexpr,
    TO_PLANES: tl.constexpr,
    TO_MAP: tl.constexpr,
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
    b_y = tl.zeros((BM, BP), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        m_x = m_k[:, None] & m_p[None, :]
        b_x = tl.load(x + o_y[None, :] + o_k.to(tl.int64)[:, None] * x_c, mask=m_x, other=0.0)
        if GATED:
            b_x = _gated(b_x, gates, depth, i_n, o_k, m_x).to(x.dtype.element_ty)
        b_w = _weights(weights + matrix, pitch, o_m, o_k, m_m, m_k)
        b_y = _product(b_w, b_x, b_y, WIDENS)
    b_y = _bias_activate(b_y, parameters, bias, slope, o_m, m_m, ACTIVATION)
    b_y = b_y.to(x.dtype.element_ty)
    if TO_PLANES:
        _store_planes(b_y, y, tables, y_table, o_m, m_m, o_y, y_c)
    if TO_MAP:
        _store_map(b_y, z, tables, z_table, o_m, m_m, i_n, o_p, m_p, z_n, z_c, z_p)


@triton.jit(
    do_not_specialize=["batch", "pixels", "slope", "rows", "source_table", "y_table", "z_table"]
)
def scale_kernel(
    x,  # planes [M, N * P]
    gates,  # [N, M] float32, where GATED
    source,  # the caller's map, or planes; where ADDS
    y,  # planes, where TO_PLANES
    z,  # the caller's map [N, C', P], where TO_MAP
    tables,
    parameters,
    batch,
    pixels,
    slope,  # [M], of a PReLU
    rows,
    source_table,  # [M] the channel of source that is added to each row
    y_table,  # [M] the plane of y of each row
    z_table,  # [M] the channel of z of each row
    x_c,
    source_n,
    source_c,
    source_p,
    y_c,
    z_n,
    z_c,
    z_p,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    FLAT: tl.constexpr,
    TO_PLANES: tl.constexpr,
    TO_MAP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_y, i_n, o_p = _columns(i_t // t_m, pixels, BP)
    m_p = i_n < batch
    m_x = m_m[:, None] & m_p[None, :]
    b_x = tl.load(x + o_y[None, :] + o_m.to(tl.int64)[:, None] * x_c, mask=m_x, other=0.0)
    b_y = b_x.to(tl.float32)
    if GATED:
        b_y = _gated(b_x, gates, rows, i_n, o_m, m_x)
    if ADDS:
        b_c = tl.load(tables + source_table + o_m, mask=m_m, other=0).to(tl.int64)
        o_s = o_y if FLAT else i_n * source_n + o_p.to(tl.int64) * source_p
        p_s = source + o_s[None, :] + b_c[:, None] * source_c
        b_y += tl.load(p_s, mask=m_x, other=0.0).to(tl.float32)
    b_y = _activate(b_y, parameters + slope, o_m, m_m, ACTIVATION).to(x.dtype.element_ty)
    if TO_PLANES:
        _store_planes(b_y, y, tables, y_table, o_m, m_m, o_y, y_c)
    if TO_MAP:
        _store_map(b_y, z, tables, z_table, o_m, m_m, i_n, o_p, m_p, z_n, z_c, z_p)
