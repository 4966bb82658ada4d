"""The depthwise convolutions among the ops: dw_conv3x3, split_dw_cat_shuffle.

A thread has a strip: ROWS x COLUMNS results of a channel. It reads the rows of its inputs once
each, all before it computes, so that many loads are under way; a row is a tuple of columns, each a
tensor of what the threads of a program have there, so neighbours are registers of one thread and
what falls outside the map is known in the registers that may. An element is converted once for
each row of results that it is part of, or less.

Threads lie along memory. In contiguous maps a tensor is [BC, BG], channels and neighbouring strips
of a row; where rows begin at multiples of COLUMNS elements, a row's columns are one vector. In
channels-last it is [BG, BC], and a thread has neighbouring channels, as many as are loaded as one.

Of inputs only the first row, the last and the columns beside a strip may lie outside the map where
strips divide it, and only their loads have masks; those of threads without a strip read what
another reads. Strides and sizes that are multiples of UNIT elements are given in units, so that the
compiler sees it. Elements are counted in int64.
"""

import triton
import triton.language as tl

from snv2_kernels.triton.kernels import _program


@triton.jit
def _apart(b_x, V: tl.constexpr):
    """Returns the V parts [A, B] of [A, B, V]."""
    if V == 1:
        return (tl.reshape(b_x, [b_x.shape[0], b_x.shape[1]]),)
    else:
        b_even, b_odd = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], V // 2, 2]))
        even, odd = _apart(b_even, V // 2), _apart(b_odd, V // 2)
        parts = ()
        for i in tl.static_range(V // 2):
            parts = parts + (even[i], odd[i])
        return parts


@triton.jit
def _together(parts, V: tl.constexpr):
    """Returns [A, B, V] of its V parts."""
    if V == 1:
        return tl.expand_dims(parts[0], 2)
    else:
        even, odd = (), ()
        for i in tl.static_range(V // 2):
            even = even + (parts[2 * i],)
            odd = odd + (parts[2 * i + 1],)
        b_even = _together(even, V // 2)
        b_x = tl.join(b_even, _together(odd, V // 2))
        return tl.reshape(b_x, [b_even.shape[0], b_even.shape[1], V])


@triton.jit
def _channels(t_c, BC: tl.constexpr, AXES: tl.constexpr):
    """Returns the channels [1, BC] of a program in channels-last."""
    _, i_c, _ = _program(t_c, 1, AXES)
    return (i_c * BC + tl.arange(0, BC))[None, :]


@triton.jit
def _strips(
    channels, t_w, t_h, t_c, batch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Returns what a program has: images, first rows, first columns, channels, and which strips and
    channels there are; for others, those of another thread."""
    if CHANNELS_LAST:
        strips = t_w * t_h * batch
        i_t, _, _ = _program(t_c, 1, AXES)
        o_t = (i_t * BG + tl.arange(0, BG))[:, None]
        o_c = _channels(t_c, BC, AXES)
        m_t, m_c = o_t < strips, o_c < channels
        o_t = tl.minimum(o_t, strips - 1)
        o_c = tl.where(o_c < channels, o_c, o_c % UNIT)
        o_c = tl.max_contiguous(tl.multiple_of(o_c, [1, UNIT]), [1, UNIT])
        i_n = o_t // (t_w * t_h)
        o_h = o_t // t_w % t_h
        o_w = o_t % t_w
    else:
        t_g = tl.cdiv(t_w, BG)
        i_t, i_c, i_n = _program(t_c, batch, AXES)
        o_c = (i_c * BC + tl.arange(0, BC))[:, None]
        o_h = tl.zeros([1, 1], tl.int32)
        if not WHOLE:
            o_h += i_t // t_g
        o_w = (i_t % t_g * BG + tl.arange(0, BG))[None, :]
        m_t, m_c = o_w < t_w, o_c < channels
        o_w = tl.minimum(o_w, t_w - 1)
        o_c = tl.minimum(o_c, channels - 1)
    return i_n.to(tl.int64), o_h * ROWS, o_w * COLUMNS, o_c, m_t, m_c


@triton.jit
def _load_row(
    p_x,  # of the column of x below the first column of results
    m_row,
    o_w,  # that column
    width,
    x_p,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    MASKED: tl.constexpr,  # the row may lie outside the map
    EXACT: tl.constexpr,  # strips divide the map
    EDGE: tl.constexpr,  # the last column may lie outside the map even so
):
    """Returns the inputs of a row of results, from the one left of them on."""
    m_left = o_w > 0
    if MASKED:
        m_left = m_left & m_row
    row = (tl.load(p_x - x_p, mask=m_left, other=0.0),)
    if VECTOR:
        p_v = p_x[:, :, None] + tl.arange(0, COLUMNS * STRIDE)[None, None, :] * x_p
        if MASKED:  # noqa: SIM108
            b_x = tl.load(p_v, mask=m_row, other=0.0)
        else:
            b_x = tl.load(p_v)
        row = row + _apart(b_x, COLUMNS * STRIDE)
    FIRST: tl.constexpr = COLUMNS * STRIDE if VECTOR else 0
    for j in tl.static_range(FIRST, (COLUMNS - 1) * STRIDE + 2):
        p_j = p_x + j * x_p
        if not EXACT or (EDGE and j == (COLUMNS - 1) * STRIDE + 1):
            m_right = o_w + j < width
            if MASKED:
                m_right = m_right & m_row
            row = row + (tl.load(p_j, mask=m_right, other=0.0),)
        elif MASKED:
            row = row + (tl.load(p_j, mask=m_row, other=0.0),)
        else:
            row = row + (tl.load(p_j),)
    return row


@triton.jit
def _load_results(
    p_x, m_x, o_w, width, x_p, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Returns a row of a strip, for _store_results."""
    if VECTOR:
        p_v = p_x[:, :, None] + tl.arange(0, COLUMNS)[None, None, :] * x_p
        return (tl.load(p_v, mask=m_x[:, :, None]),)
    else:
        row = ()
        for j in tl.static_range(COLUMNS):
            m_j = m_x if EXACT else m_x & (o_w + j < width)
            row = row + (tl.load(p_x + j * x_p, mask=m_j),)
        return row


@triton.jit
def _store_results(
    p_y, row, m_y, o_w, width, y_p,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    if VECTOR:
        p_v = p_y[:, :, None] + tl.arange(0, COLUMNS)[None, None, :] * y_p
        tl.store(p_v, row[0], mask=m_y[:, :, None])
    else:
        for j in tl.static_range(COLUMNS):
            tl.store(p_y + j * y_p, row[j], mask=m_y if EXACT else m_y & (o_w + j < width))


@triton.jit
def _floats(row):
    floats = ()
    for i in tl.static_range(len(row)):
        floats = floats + (row[i].to(tl.float32),)
    return floats


@triton.jit
def _taps(b_y, row, weights, AT: tl.constexpr, TAP: tl.constexpr):
    """Returns b_y and three taps of a row."""
    for i in tl.static_range(3):
        b_y = tl.fma(row[AT + i], tl.broadcast_to(weights[TAP + i], b_y.shape), b_y)
    return b_y


@triton.jit
def convolve_kernel(  # noqa: PLR0912, PLR0915
    x,  # [N, TIMES * C, H * W], TIMES is 2 if as many channels pass through, else 1
    weight,  # [C, 9]
    scale,  # [C]
    shift,  # [C]
    y,  # [N, TIMES * C, P]
    channels,  # C
    height,  # of x
    width,
    y_height,
    y_width,
    t_w,  # strips in a row
    t_h,  # and in a column
    t_c,  # tiles of channels
    batch,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BC: tl.constexpr,
    BG: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PASSTHROUGH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,  # a strip is as high as the map
    EVEN: tl.constexpr,  # strips divide the map's rows
    EXACT: tl.constexpr,  # and its columns
    WIDTH: tl.constexpr,  # of the inputs, or 0
    UNDER: tl.constexpr,  # the last row of inputs may lie outside the map even so
    EDGE: tl.constexpr,  # and the last column
    AXES: tl.constexpr,
):
    TIMES: tl.constexpr = 2 if PASSTHROUGH else 1
    LAST: tl.constexpr = (ROWS - 1) * STRIDE + 1  # row of inputs
    x_n *= X_UNIT
    y_n *= Y_UNIT
    if CHANNELS_LAST:
        channels *= X_UNIT
        x_p *= X_UNIT
        y_p *= Y_UNIT
    else:
        width *= X_UNIT
        x_c *= X_UNIT
        y_width *= Y_UNIT
        y_c *= Y_UNIT
    if WIDTH:
        width = WIDTH
        y_width = (WIDTH - 1) // STRIDE + 1
    i_n, o_h, o_w, o_c, m_t, m_c = _strips(
        channels, t_w, t_h, t_c, batch, ROWS, COLUMNS, BC, BG, X_UNIT, CHANNELS_LAST, WHOLE, AXES
    )
    weights = ()
    for i in tl.static_range(9):
        weights = weights + (tl.load(weight + o_c * 9 + i),)
    b_scale = tl.load(scale + o_c)
    b_shift = tl.load(shift + o_c)

    m_x = m_t & m_c
    p_c = o_c.to(tl.int64)
    x_row = width * x_p
    y_row = y_width * y_p
    p_x = x + i_n * x_n + p_c * x_c
    p_x += o_h.to(tl.int64) * STRIDE * x_row + o_w.to(tl.int64) * STRIDE * x_p
    p_y = y + i_n * y_n + o_h.to(tl.int64) * y_row + o_w.to(tl.int64) * y_p
    if PASSTHROUGH and CHANNELS_LAST:
        o_y = _channels(t_c, 2 * BC, AXES)
        m_y = m_t & (o_y < 2 * channels)
        p_y += o_y.to(tl.int64) * y_c
    else:
        m_y = m_x
        p_y += p_c * TIMES * y_c
    if PASSTHROUGH:
        p_a = p_x
        p_x += tl.cast(channels, tl.int64) * x_c

    # Load.
    passed = ()
    if WHOLE:
        rows = ((),)
    else:
        rows = (
            _load_row(
                p_x - x_row, o_h > 0, o_w * STRIDE, width, x_p,
                COLUMNS, STRIDE, VECTOR, True, EXACT, EDGE,
            ),
        )  # fmt: skip
    for k in tl.static_range(LAST + 1):
        if not (WHOLE and UNDER and k == LAST):
            row = _load_row(
                p_x, o_h * STRIDE + k < height, o_w * STRIDE, width, x_p,
                COLUMNS, STRIDE, VECTOR, (UNDER and k == LAST) or not EVEN, EXACT, EDGE,
            )  # fmt: skip
            rows = rows + (row,)
            p_x += x_row
        if PASSTHROUGH and k < ROWS:
            m_a = m_x if EVEN else m_x & (o_h + k < y_height)
            passed = passed + (_load_results(p_a, m_a, o_w, y_width, x_p, COLUMNS, VECTOR, EXACT),)
            p_a += x_row

    # Compute and store.
    for r in tl.static_range(ROWS):
        if r == 0 and not WHOLE:
            over = _floats(rows[0])
        if r == 0 or STRIDE == 2:
            at = _floats(rows[r * STRIDE + 1])
        if not (WHOLE and UNDER and r == ROWS - 1):
            under = _floats(rows[r * STRIDE + 2])
        out = ()
        for j in tl.static_range(COLUMNS):
            b_y = tl.zeros(m_x.shape, tl.float32)
            if r > 0 or not WHOLE:
                b_y = _taps(b_y, over, weights, j * STRIDE, 0)
            b_y = _taps(b_y, at, weights, j * STRIDE, 3)
            if not (WHOLE and UNDER and r == ROWS - 1):
                b_y = _taps(b_y, under, weights, j * STRIDE, 6)
            b_y = tl.fma(
                b_y, tl.broadcast_to(b_scale, b_y.shape), tl.broadcast_to(b_shift, b_y.shape)
            )
            if RELU:
                b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            out = out + (b_y.to(y.dtype.element_ty),)
        m_r = m_y if EVEN else m_y & (o_h + r < y_height)
        if PASSTHROUGH and CHANNELS_LAST:
            both = ()
            for j in tl.static_range(COLUMNS):
                both = both + (tl.interleave(passed[r][j], out[j]),)
            out = both
        elif PASSTHROUGH:
            _store_results(p_y, passed[r], m_r, o_w, y_width, y_p, COLUMNS, VECTOR, EXACT)
        if VECTOR:
            out = (_together(out, COLUMNS),)
        p_r = p_y + y_c if PASSTHROUGH and not CHANNELS_LAST else p_y
        _store_results(p_r, out, m_r, o_w, y_width, y_p, COLUMNS, VECTOR, EXACT)
        p_y += y_row
        if r < ROWS - 1:
            if STRIDE == 1:
                over, at = at, under
            else:
                over = under
