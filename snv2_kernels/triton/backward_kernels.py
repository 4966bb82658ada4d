"""The gradients of the depthwise convolutions as Triton kernels.

They are three launches. ``depthwise_cut_kernel`` computes the convolution again, clears the
gradient where the ReLU cut off, writes what is left of it and the sums for the parameters'
gradients, and copies what passes through.
The second is the convolution turned round, of what is left: at stride 1
``convolve_kernel``, else ``depthwise_input_kernel``. ``depthwise_sums_kernel`` adds up, in a fixed
order. In one launch each of the nine taps of what is left would need a convolution of its own.

A program makes a tile [BP, BC]: BP pixels of a map, counted row by row, of BC channels. Taps are
nine loads of the same tile, moved. One of the first makes several tiles of an image, one below the
other, and writes one set of sums for all: for a single tile of few pixels, ten sums for each
channel would be much.
"""

import triton
import triton.language as tl

SUMS = tl.constexpr(10)  # of a channel: of gradient x input at each tap, and of the gradient


@triton.jit
def _tile(pixels, channels, BP: tl.constexpr, BC: tl.constexpr):
    """Image, pixels and channels of this program; tiles of one image come one after the other."""
    i_t = tl.program_id(0)
    t_p = tl.cdiv(pixels, BP)
    t_c = tl.cdiv(channels, BC)
    i_n = (i_t // (t_p * t_c)).to(tl.int64)
    i_c = i_t // t_p % t_c
    o_p = i_t % t_p * BP + tl.arange(0, BP)
    o_c = i_c * BC + tl.arange(0, BC)
    return i_n, i_c, o_p, o_c


@triton.jit
def _tap(p_x, i: tl.constexpr, o_h, o_w, m_p, m_c, height, width, x_p):
    """The inputs at tap ``i``, zero where there are none, and where there are."""
    b_h = o_h + (i // 3 - 1)
    b_w = o_w + (i % 3 - 1)
    m_tap = m_p & (b_h >= 0) & (b_h < height) & (b_w >= 0) & (b_w < width)
    m_x = m_tap[:, None] & m_c[None, :]
    p_tap = p_x + ((i // 3 - 1) * width + (i % 3 - 1)) * x_p
    return tl.load(p_tap, mask=m_x, other=0.0).to(tl.float32), m_x


@triton.jit
def _depthwise(
    p_x,  # [BP, BC], the tap in the middle
    weight,  # [C, 9]
    scale,  # [C]
    shift,  # [C]
    o_h,  # [BP], row and column of the tap in the middle
    o_w,
    o_c,  # [BC]
    m_p,  # [BP]
    m_c,  # [BC]
    height,
    width,
    x_p,
    RELU: tl.constexpr,
):
    b_y = tl.zeros(p_x.shape, tl.float32)  # [BP, BC]
    for i in tl.static_range(9):
        b_x, _ = _tap(p_x, i, o_h, o_w, m_p, m_c, height, width, x_p)
        b_y += b_x * tl.load(weight + o_c * 9 + i, mask=m_c, other=0.0)[None, :]
    b_scale = tl.load(scale + o_c, mask=m_c, other=0.0)
    b_shift = tl.load(shift + o_c, mask=m_c, other=0.0)
    b_y = b_y * b_scale[None, :] + b_shift[None, :]
    if RELU:
        b_y = tl.where(b_y < 0.0, 0.0, b_y)  # NaN stays
    return b_y


@triton.jit
def depthwise_cut_kernel(
    grad,  # [N, UNIT * C, P], UNIT is 2 if as many channels pass through, else 1
    x,  # [N, UNIT * C, H * W]
    weight,  # [C, 9]
    scale,  # [C]
    shift,  # [C]
    cut,  # [N, C, P]
    grad_x,  # [N, UNIT * C, H * W]
    sums,  # [N * strips, C, SUMS]
    channels,
    height,  # of x
    width,
    pixels,  # of grad
    g_width,
    steps,  # tiles of a strip
    g_n,
    g_c,
    g_p,
    x_n,
    x_c,
    x_p,
    t_n,  # of cut
    t_c,
    t_p,
    y_n,  # of grad_x
    y_c,
    y_p,
    BP: tl.constexpr,
    BC: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PASSTHROUGH: tl.constexpr,
):
    UNIT: tl.constexpr = 2 if PASSTHROUGH else 1
    strip = steps * BP
    i_n, _, _, o_c = _tile(tl.cdiv(pixels, strip), channels, 1, BC)
    i_s = tl.program_id(0) % tl.cdiv(pixels, strip)
    m_c = o_c < channels
    p_c = o_c.to(tl.int64)[None, :]
    o_s = tl.arange(0, 16)
    b_sums = tl.zeros([16, BC], tl.float32)
    for i_p in range(steps):
        o_p = i_s * strip + i_p * BP + tl.arange(0, BP)
        m_p = o_p < pixels
        o_h = o_p // g_width * STRIDE
        o_w = o_p % g_width * STRIDE
        o_x = o_p if STRIDE == 1 else o_h * width + o_w
        m_g = m_p[:, None] & m_c[None, :]
        p_p = o_p.to(tl.int64)[:, None]
        p_g = grad + i_n * g_n + p_p * g_p + p_c * UNIT * g_c
        p_x = x + i_n * x_n + o_x.to(tl.int64)[:, None] * x_p + p_c * x_c
        if PASSTHROUGH:
            p_y = grad_x + i_n * y_n + p_p * y_p + p_c * y_c
            tl.store(p_y, tl.load(p_g, mask=m_g), mask=m_g)
            p_g += g_c
            p_x += tl.cast(channels, tl.int64) * x_c
        b_g = tl.load(p_g, mask=m_g, other=0.0).to(tl.float32)  # [BP, BC]
        if RELU:
            b_y = _depthwise(
                p_x, weight, scale, shift, o_h, o_w, o_c, m_p, m_c, height, width, x_p, False
            )
            b_g = tl.where(b_y <= 0.0, 0.0, b_g)  # not for NaN
        tl.store(cut + i_n * t_n + p_p * t_p + p_c * t_c, b_g.to(cut.dtype.element_ty), mask=m_g)
        for i in tl.static_range(9):
            b_x, m_x = _tap(p_x, i, o_h, o_w, m_p, m_c, height, width, x_p)
            b_s = tl.sum(tl.where(m_x, b_g * b_x, 0.0), 0)  # [BC]
            b_sums += tl.where(o_s[:, None] == i, b_s[None, :], 0.0)
        b_sums += tl.where(o_s[:, None] == 9, tl.sum(b_g, 0)[None, :], 0.0)
    i_part = i_n * tl.cdiv(pixels, strip) + i_s
    p_s = sums + (i_part * channels + p_c) * SUMS + o_s[:, None]
    tl.store(p_s, b_sums, mask=(o_s < SUMS)[:, None] & m_c[None, :])


@triton.jit
def depthwise_input_kernel(
    cut,  # [N, C, P]
    weight,  # [C, 9]
    scale,  # [C]
    grad_x,  # [N, C, H * W]
    channels,
    height,
    width,
    pixels,  # of grad_x
    t_width,  # of cut
    t_n,
    t_c,
    t_p,
    y_n,
    y_c,
    y_p,
    BP: tl.constexpr,
    BC: tl.constexpr,
    STRIDE: tl.constexpr,
):
    i_n, _, o_p, o_c = _tile(pixels, channels, BP, BC)
    m_p, m_c = o_p < pixels, o_c < channels
    o_h = o_p // width
    o_w = o_p % width
    p_c = o_c.to(tl.int64)[None, :]
    p_cut = cut + i_n * t_n + p_c * t_c
    b_y = tl.zeros([BP, BC], tl.float32)
    for i in tl.static_range(9):
        b_h = o_h + (i // 3 - 1)
        b_w = o_w + (i % 3 - 1)
        m_tap = m_p & (b_h >= 0) & (b_h < height) & (b_w >= 0) & (b_w < width)
        m_tap = m_tap & (b_h % STRIDE == 0) & (b_w % STRIDE == 0)
        o_t = b_h // STRIDE * t_width + b_w // STRIDE
        p_t = p_cut + o_t.to(tl.int64)[:, None] * t_p
        b_t = tl.load(p_t, mask=m_tap[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_y += b_t * tl.load(weight + o_c * 9 + (8 - i), mask=m_c, other=0.0)[None, :]
    b_y *= tl.load(scale + o_c, mask=m_c, other=0.0)[None, :]
    p_y = grad_x + i_n * y_n + o_p.to(tl.int64)[:, None] * y_p + p_c * y_c
    tl.store(p_y, b_y.to(grad_x.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
def depthwise_sums_kernel(
    sums,  # [parts, C, SUMS]
    weight,  # [C, 9]
    scale,  # [C]
    grad_weight,  # [C, 9]
    grad_scale,  # [C]
    grad_shift,  # [C]
    parts,
    channels,
    BP: tl.constexpr,
):
    """One channel."""
    i_c = tl.program_id(0)
    o_s = tl.arange(0, 16)
    m_s = o_s < SUMS
    b_sums = tl.zeros([BP, 16], tl.float32)
    for i_p in range(0, parts, BP):
        o_p = (i_p + tl.arange(0, BP)).to(tl.int64)
        p_s = sums + (o_p[:, None] * channels + i_c) * SUMS + o_s[None, :]
        b_sums += tl.load(p_s, mask=(o_p < parts)[:, None] & m_s[None, :], other=0.0)
    b_s = tl.sum(b_sums, 0)
    b_w = tl.load(weight + i_c * 9 + o_s, mask=o_s < 9, other=0.0)
    tl.store(grad_weight + i_c * 9 + o_s, b_s * tl.load(scale + i_c), mask=o_s < 9)
    tl.store(grad_scale + i_c, tl.sum(tl.where(o_s < 9, b_s * b_w, 0.0), 0))
    tl.store(grad_shift + i_c, tl.sum(tl.where(o_s == 9, b_s, 0.0), 0))
