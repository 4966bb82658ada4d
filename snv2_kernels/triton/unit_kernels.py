"""A unit as two Triton kernels: pw1 + BN + activation, then dw + BN + activation + pw2 + BN +
activation with the shuffle in the store.

A program makes BM channels of BP pixels, and sums over BK channels at a time. The pixels of all
images are counted one after the other, so that planes of 7 x 7 fill a tile. The middle map is the
only one that is written on the way, in the map's dtype. The second kernel computes the depthwise
convolution of a tile again for each BM channels of the result: WINDOW * WINDOW loads from L1 and L2
beside BM products.

Between the units of a stage a map lies in planes, [planes, N * P] with rows that begin at multiples
of 16 elements (FLAT): one offset for a channel, gathered through a table. What a row has beyond its
last pixel is read and written like the rest, so that masks end at whole vectors; it never gets into
another column. The caller's maps have strides from image to image (n), channel to channel (c) and
pixel to pixel (p), and only those are written in logical order, what passes through included.

What a program of the second kernel makes follows from its number: channels of the main branch
first, then those of the projection (stride 2) or those that pass through (stride 1, into the
caller's map alone). Each row has the plane and the channel of the caller's map that it is stored to
in a table; that is the shuffle.

Tables, weights and parameters are those of a plan, and each operand an offset in them. Those that
say nothing about alignment are not to be specialised on: one compilation serves all units.
"""

import triton
import triton.language as tl

from snv2_kernels.triton.activations import _activate

# Columns of a window whose loads are under way together; seven would take registers that there are
# not in float32.
UNROLLED = tl.constexpr(5)


@triton.jit
def _columns(i_t, pixels, BP: tl.constexpr):
    """Of tile i_t: the number of each column among the pixels of all images, its image, and its
    pixel there. Images come in int64, pixels of one in int32."""
    first = i_t.to(tl.int64) * BP
    i_n = first // pixels
    o_p = (first - i_n * pixels).to(tl.int32) + tl.arange(0, BP)
    return first + tl.arange(0, BP), i_n + o_p // pixels, o_p % pixels


@triton.jit
def _product(b_w, b_x, b_y, WIDENS: tl.constexpr):
    if WIDENS:  # for the interpreter, which takes bfloat16 for integers here
        b_w = b_w.to(tl.float32)
        b_x = b_x.to(tl.float32)
    return tl.dot(b_w, b_x, b_y, input_precision="ieee")


@triton.jit
def _bias_activate(b_y, parameters, bias, slope, o_m, m_m, ACTIVATION: tl.constexpr):
    b_y += tl.load(parameters + bias + o_m, mask=m_m, other=0.0)[:, None]
    return _activate(b_y, parameters + slope, o_m, m_m, ACTIVATION)


@triton.jit
def _weights(matrix, pitch, o_m, o_k, m_m, m_k):
    p_w = matrix + o_m[:, None] * pitch + o_k[None, :]
    return tl.load(p_w, mask=m_m[:, None] & m_k[None, :], other=0.0)


@triton.jit
def _store_planes(b_y, y, tables, table, o_row, m_m, o_y, y_c):
    """To the plane of y that the table has for each row; what follows the last pixel too."""
    b_c = tl.load(tables + table + o_row, mask=m_m, other=0).to(tl.int64)
    p_y = y + b_c[:, None] * y_c + o_y[None, :]
    tl.store(p_y, b_y, mask=m_m[:, None] & (o_y < y_c)[None, :])


@triton.jit
def _store_map(b_y, z, tables, table, o_row, m_m, i_n, o_p, m_p, z_n, z_c, z_p):
    """To the channel of the caller's z that the table has for each row."""
    b_c = tl.load(tables + table + o_row, mask=m_m, other=0).to(tl.int64)
    p_z = z + b_c[:, None] * z_c + (i_n * z_n + o_p.to(tl.int64) * z_p)[None, :]
    tl.store(p_z, b_y, mask=m_m[:, None] & m_p[None, :])


@triton.jit(do_not_specialize=["batch", "table", "bias", "slope", "depth", "rows"])
def pw1_kernel(
    x,  # the caller's map, or planes
    y,  # planes [M, N * P]
    tables,
    weights,
    parameters,
    batch,
    pixels,
    table,  # [K] channels of x
    matrix,  # [M, K], rows `pitch` apart
    pitch,
    bias,  # [M]
    slope,  # [M], of a PReLU
    depth,
    rows,
    x_n,
    x_c,
    x_p,
    y_c,
    FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    o_m = i_t % t_m * BM + tl.arange(0, BM)
    o_y, i_n, o_p = _columns(i_t // t_m, pixels, BP)
    m_m = o_m < rows
    if FLAT:
        m_p = o_y < x_c
        p_x = x + o_y[None, :]
    else:
        m_p = i_n < batch
        p_x = x + (i_n * x_n + o_p.to(tl.int64) * x_p)[None, :]
    b_y = tl.zeros((BM, BP), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        b_c = tl.load(tables + table + o_k, mask=m_k, other=0).to(tl.int64)
        b_x = tl.load(p_x + b_c[:, None] * x_c, mask=m_k[:, None] & m_p[None, :], other=0.0)
        b_w = _weights(weights + matrix, pitch, o_m, o_k, m_m, m_k)
        b_y = _product(b_w, b_x, b_y, WIDENS)
    b_y = _bias_activate(b_y, parameters, bias, slope, o_m, m_m, ACTIVATION)
    p_y = y + o_m.to(tl.int64)[:, None] * y_c + o_y[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_p[None, :])


@triton.jit
def _add_tap(
    b_y, p_x, p_dw, m_k, m_row, i, j, o_w, width, x_p,
    WINDOW: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    b_w = o_w + j * DILATION
    m_tap = m_row & (b_w >= 0) & (b_w < width)
    p_tap = p_x + (i * width + j) * DILATION * x_p
    b_tap = tl.load(p_tap, mask=m_k[:, None] & m_tap[None, :], other=0.0)
    p_weight = p_dw + (WINDOW * i + j + WINDOW * WINDOW // 2)
    return b_y + b_tap.to(tl.float32) * tl.load(p_weight, mask=m_k, other=0.0)[:, None]


@triton.jit
def _depthwise(
    p_x,  # [BK, BP], the tap in the middle
    parameters,
    dw,  # [K, WINDOW * WINDOW + 1]: taps and the shift
    slope,  # [K]
    o_k,
    m_k,
    o_h,  # [BP], of the tap in the middle
    o_w,
    m_p,
    height,
    width,
    x_p,
    WINDOW: tl.constexpr,
    DILATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    TAPS: tl.constexpr = WINDOW * WINDOW
    REACH: tl.constexpr = WINDOW // 2
    p_dw = parameters + dw + o_k * (TAPS + 1)
    b_y = tl.zeros(p_x.shape, tl.float32)
    for i in range(-REACH, REACH + 1):
        b_h = o_h + i * DILATION
        m_row = m_p & (b_h >= 0) & (b_h < height)
        if WINDOW <= UNROLLED:
            for j in tl.static_range(-REACH, REACH + 1):
                b_y = _add_tap(b_y, p_x, p_dw, m_k, m_row, i, j, o_w, width, x_p, WINDOW, DILATION)
        else:
            for j in range(-REACH, REACH + 1):
                b_y = _add_tap(b_y, p_x, p_dw, m_k, m_row, i, j, o_w, width, x_p, WINDOW, DILATION)
    b_y += tl.load(p_dw + TAPS, mask=m_k, other=0.0)[:, None]
    return _activate(b_y, parameters + slope, o_k, m_k, ACTIVATION)


@triton.jit
def _dw_pw(
    p_x,  # [BP], the tap in the middle, in channel 0
    tables,
    weights,
    parameters,
    table,  # [K] channels of x, where GATHERS
    dw,  # [K, WINDOW * WINDOW + 1]: taps and the shift
    dw_slope,  # [K]
    matrix,  # [M, K]
    pitch,
    bias,  # [M]
    slope,  # [M]
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
    WINDOW: tl.constexpr,
    DILATION: tl.constexpr,
    DW_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    b_y = tl.zeros((BM, BP), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < depth
        b_c = tl.load(tables + table + o_k, mask=m_k, other=0) if GATHERS else o_k
        p_k = p_x[None, :] + b_c.to(tl.int64)[:, None] * x_c
        b_x = _depthwise(
            p_k, parameters, dw, dw_slope, o_k, m_k, o_h, o_w, m_p, height, width, x_p,
            WINDOW, DILATION, DW_ACTIVATION,
        )  # fmt: skip
        b_matrix = _weights(weights + matrix, pitch, o_m, o_k, m_m, m_k)
        b_y = _product(b_matrix, b_x.to(weights.dtype.element_ty), b_y, WIDENS)
    b_y = _bias_activate(b_y, parameters, bias, slope, o_m, m_m, ACTIVATION)
    return b_y.to(weights.dtype.element_ty)


@triton.jit(
    do_not_specialize=[
        "batch", "height", "width", "y_width", "table", "dw", "dw_slope", "bias", "slope",
        "depth", "rows", "side_table", "side_dw", "side_dw_slope", "side_bias", "side_slope",
        "side_depth", "side_rows", "y_table", "z_table",
    ]
)  # fmt: skip
def dw_pw2_kernel(
    middle,  # planes [K, N * H * W], unless FROM_X
    x,  # the unit's input: the caller's map, or planes
    y,  # planes, where TO_PLANES
    z,  # the caller's map [N, C', P], where TO_MAP
    tables,
    weights,
    parameters,
    batch,
    height,
    width,
    pixels,  # P
    y_width,
    table,  # [K] channels of x, where FROM_X
    dw,  # [K, WINDOW * WINDOW + 1]
    dw_slope,  # [K], of a PReLU
    matrix,  # [M, K]
    pitch,
    bias,  # [M]
    slope,  # [M]
    depth,
    rows,
    side_table,  # [S] channels of x: those that pass through, or what the projection gathers
    side_dw,  # the projection's, as the main branch's
    side_dw_slope,
    side_matrix,
    side_pitch,
    side_bias,
    side_slope,
    side_depth,
    side_rows,
    y_table,  # [M + S'] the plane of y of each row
    z_table,  # [M + S'] the channel of z of each row
    middle_c,
    x_n,
    x_c,
    x_p,
    y_c,
    z_n,
    z_c,
    z_p,
    STRIDE: tl.constexpr,
    FROM_X: tl.constexpr,
    PROJECTS: tl.constexpr,
    TO_PLANES: tl.constexpr,
    TO_MAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DILATION: tl.constexpr,
    DW_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SIDE_WINDOW: tl.constexpr,
    SIDE_DILATION: tl.constexpr,
    SIDE_DW_ACTIVATION: tl.constexpr,
    SIDE_ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    WIDENS: tl.constexpr,
):
    i_t = tl.program_id(0)
    t_m = tl.cdiv(rows, BM)
    t_s = tl.cdiv(side_rows, BM)
    i_m = i_t % (t_m + t_s)
    o_y, i_n, o_p = _columns(i_t // (t_m + t_s), pixels, BP)
    o_h = o_p // y_width * STRIDE
    o_w = o_p % y_width * STRIDE
    m_p = i_n < batch
    p_x = x + i_n * x_n
    on_side = i_m >= t_m
    o_m = tl.where(on_side, i_m - t_m, i_m) * BM + tl.arange(0, BM)
    m_m = o_m < tl.where(on_side, side_rows, rows)
    if on_side:
        if not PROJECTS:
            b_c = tl.load(tables + side_table + o_m, mask=m_m, other=0).to(tl.int64)
            p_a = (p_x + o_p.to(tl.int64) * x_p)[None, :] + b_c[:, None] * x_c
            b_y = tl.load(p_a, mask=m_m[:, None] & m_p[None, :], other=0.0)
        else:
            b_y = _dw_pw(
                p_x + (o_h * width + o_w).to(tl.int64) * x_p, tables, weights, parameters,
                side_table, side_dw, side_dw_slope, side_matrix, side_pitch, side_bias, side_slope,
                o_m, m_m, o_h, o_w, m_p, side_depth, height, width, x_c, x_p, True,
                SIDE_WINDOW, SIDE_DILATION, SIDE_DW_ACTIVATION, SIDE_ACTIVATION,
                BM, BP, BK, WIDENS,
            )  # fmt: skip
    elif FROM_X:
        b_y = _dw_pw(
            p_x + (o_h * width + o_w).to(tl.int64) * x_p, tables, weights, parameters,
            table, dw, dw_slope, matrix, pitch, bias, slope, o_m, m_m, o_h, o_w, m_p,
            depth, height, width, x_c, x_p, True,
            WINDOW, DILATION, DW_ACTIVATION, ACTIVATION, BM, BP, BK, WIDENS,
        )  # fmt: skip
    else:
        # At stride 1 the compiler is to see that pixels follow each other.
        o_x = o_y if STRIDE == 1 else i_n * height * width + o_h * width + o_w
        b_y = _dw_pw(
            middle + o_x, tables, weights, parameters, 0, dw, dw_slope, matrix, pitch, bias, slope,
            o_m, m_m, o_h, o_w, m_p, depth, height, width, middle_c, 1, False,
            WINDOW, DILATION, DW_ACTIVATION, ACTIVATION, BM, BP, BK, WIDENS,
        )  # fmt: skip
    o_row = o_m + tl.where(on_side, rows, 0)
    if TO_PLANES and (PROJECTS or not on_side):
        _store_planes(b_y, y, tables, y_table, o_row, m_m, o_y, y_c)
    if TO_MAP:
        _store_map(b_y, z, tables, z_table, o_row, m_m, i_n, o_p, m_p, z_n, z_c, z_p)
