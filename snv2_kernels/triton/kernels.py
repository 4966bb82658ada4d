"""The ops as Triton kernels: cat_shuffle, dw_conv3x3, split_dw_cat_shuffle.

A program makes a tile [BP, BC]: BP pixels of a map, counted row by row, of BC channels. Maps have
strides in elements from image to image (n), channel to channel (c) and pixel to pixel (p), so one
kernel serves both memory formats: the compiler sees which of ``_c`` and ``_p`` is 1, and lays
threads out along it.

The taps of a depthwise convolution are nine loads of the same tile, moved; eight of them hit L1,
where shared memory would cost a barrier and a halo for the same. Padding is a mask. Pixels are
counted in int32 (rows and columns are a division), elements in int64.

CHANNELS_LAST is about stores: the two halves of a shuffled result lie in rows of their own in
contiguous memory, and element by element in turn in channels-last, where they are put together in
registers and stored as one.
"""

import triton
import triton.language as tl


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
def _store_shuffled(
    y,  # [N, 2 * C, P]
    b_a,  # [BP, BC]
    b_b,
    i_n,
    i_c,
    o_p,
    o_c,
    m_p,
    channels,
    y_n,
    y_c,
    y_p,
    BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    p_y = y + i_n * y_n + o_p.to(tl.int64)[:, None] * y_p
    if CHANNELS_LAST:
        o_y = i_c * (2 * BC) + tl.arange(0, 2 * BC)
        m_y = m_p[:, None] & (o_y < 2 * channels)[None, :]
        tl.store(p_y + o_y.to(tl.int64)[None, :] * y_c, tl.interleave(b_a, b_b), mask=m_y)
    else:
        p_y += 2 * o_c.to(tl.int64)[None, :] * y_c
        m_y = m_p[:, None] & (o_c < channels)[None, :]
        tl.store(p_y, b_a, mask=m_y)
        tl.store(p_y + y_c, b_b, mask=m_y)


@triton.jit
def cat_shuffle_kernel(
    a,  # [N, C, P]
    b,  # [N, C, P]
    y,  # [N, 2 * C, P]
    channels,
    pixels,
    a_n,
    a_c,
    a_p,
    b_n,
    b_c,
    b_p,
    y_n,
    y_c,
    y_p,
    BP: tl.constexpr,
    BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    i_n, i_c, o_p, o_c = _tile(pixels, channels, BP, BC)
    m_p = o_p < pixels
    m_x = m_p[:, None] & (o_c < channels)[None, :]
    p_p = o_p.to(tl.int64)[:, None]
    p_c = o_c.to(tl.int64)[None, :]
    b_a = tl.load(a + i_n * a_n + p_p * a_p + p_c * a_c, mask=m_x)
    b_b = tl.load(b + i_n * b_n + p_p * b_p + p_c * b_c, mask=m_x)
    _store_shuffled(
        y, b_a, b_b, i_n, i_c, o_p, o_c, m_p, channels, y_n, y_c, y_p, BC, CHANNELS_LAST
    )


@triton.jit
def dw_conv3x3_kernel(
    x,  # [N, C, H * W]
    weight,  # [C, 9]
    scale,  # [C]
    shift,  # [C]
    y,  # [N, C, P]
    channels,
    height,  # of x
    width,
    pixels,  # of y
    y_width,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    BP: tl.constexpr,
    BC: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
):
    i_n, _, o_p, o_c = _tile(pixels, channels, BP, BC)
    m_p, m_c = o_p < pixels, o_c < channels
    o_h = o_p // y_width * STRIDE
    o_w = o_p % y_width * STRIDE
    # At stride 1 the compiler is to see that pixels follow each other.
    o_x = o_p if STRIDE == 1 else o_h * width + o_w
    p_c = o_c.to(tl.int64)[None, :]
    p_x = x + i_n * x_n + o_x.to(tl.int64)[:, None] * x_p + p_c * x_c
    b_y = _depthwise(p_x, weight, scale, shift, o_h, o_w, o_c, m_p, m_c, height, width, x_p, RELU)
    p_y = y + i_n * y_n + o_p.to(tl.int64)[:, None] * y_p + p_c * y_c
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
def split_dw_cat_shuffle_kernel(
    x,  # [N, 2 * C, P]
    weight,  # [C, 9]
    scale,  # [C]
    shift,  # [C]
    y,  # [N, 2 * C, P]
    channels,  # of a half
    height,
    width,
    pixels,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    BP: tl.constexpr,
    BC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    i_n, i_c, o_p, o_c = _tile(pixels, channels, BP, BC)
    m_p, m_c = o_p < pixels, o_c < channels
    p_c = o_c.to(tl.int64)[None, :]
    p_x = x + i_n * x_n + o_p.to(tl.int64)[:, None] * x_p
    b_a = tl.load(p_x + p_c * x_c, mask=m_p[:, None] & m_c[None, :])
    p_x += (p_c + channels) * x_c
    b_b = _depthwise(
        p_x,
        weight,
        scale,
        shift,
        o_p // width,
        o_p % width,
        o_c,
        m_p,
        m_c,
        height,
        width,
        x_p,
        True,
    )
    _store_shuffled(
        y, b_a, b_b.to(y.dtype.element_ty), i_n, i_c, o_p, o_c, m_p, channels,
        y_n, y_c, y_p, BC, CHANNELS_LAST,
    )  # fmt: skip
