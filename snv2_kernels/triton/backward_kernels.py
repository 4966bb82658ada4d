"""The gradients of the depthwise convolutions as Triton kernels.

They are two launches. ``depthwise_gradient_kernel`` computes the convolution again, clears the
gradient where the ReLU cut off, convolves what is left with the weights turned round, which is
``grad_x``, and multiplies it by the inputs for the parameters' gradients; what passes through it
copies. ``depthwise_sums_kernel`` adds these products up in a fixed order.

A thread has a strip, ROWS x COLUMNS elements of the gradient and the inputs below them, of one
image after the other; so the inputs at each tap are registers, and each pair of an element of the
inputs and one that is left of the gradient near it is two multiply-adds: one for ``grad_x``, one
for a sum. What lies in its neighbours' strips, of rows and in channels-last of columns too, a
thread computes once more. In contiguous maps a row of strips is part of a warp, and columns beside
a strip are their threads' registers; where strips do not fill the power of two, the threads behind
the last have zeros, which the first and the last then find beside theirs. Rows of more strips than
that are several tiles, whose first and last THREADS_BESIDE threads have strips of their neighbours.

Sizes and strides are constants, so a thread works out few addresses; strips divide the maps, so
masks are for what is beside a strip alone. An element outside the map is zero, but its product is
not where the other one is infinite: so it is left out.

Loops carry the pointers, also those that run once. For each pointer that is computed where it is
used, the compiler looks for others through all that depends on it, which took it minutes.
"""

import triton
import triton.language as tl

from snv2_kernels.triton.depthwise_kernels import (
    _channels,
    _floats,
)
from snv2_kernels.triton.kernels import _program
from snv2_kernels.triton.row_kernels import (
    SUMS,
    _added,
    _advanced,
    _copied_row,
    _cut_row,
    _gradient_row,
    _halves,
    _load_row,
    _pointers,
    _results,
    _store_row,
    _with_neighbours,
    _zero_unless,
)


@triton.jit(do_not_specialize=["steps"])
def depthwise_gradient_kernel(  # noqa: PLR0912, PLR0915
    grad,  # [N, TIMES * C, G_HEIGHT * G_WIDTH], TIMES is 2 if as many pass through, else 1
    x,  # [N, TIMES * C, HEIGHT * WIDTH]
    weight,  # [C, 9]
    scale,  # [C]
    shift,  # [C]
    grad_x,  # [N, TIMES * C, HEIGHT * WIDTH]
    sums,  # [parts, SUMS, C]
    steps,  # images of a strip
    t_n,  # strips among images
    t_c,  # tiles of channels
    CHANNELS: tl.constexpr,  # C
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    G_N: tl.constexpr,
    G_C: tl.constexpr,
    G_P: tl.constexpr,
    X_N: tl.constexpr,
    X_C: tl.constexpr,
    X_P: tl.constexpr,
    Y_N: tl.constexpr,  # of grad_x
    Y_C: tl.constexpr,
    Y_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BC: tl.constexpr,
    BG: tl.constexpr,
    ONE: tl.constexpr,  # steps is 1
    LEAD: tl.constexpr,  # rows of the gradient that are loaded early
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PASSTHROUGH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    AXES: tl.constexpr,
):
    TIMES: tl.constexpr = 2 if PASSTHROUGH else 1
    UNIT: tl.constexpr = 2 if CHANNELS % 2 == 0 else 1  # channels that are loaded as one
    G_HEIGHT: tl.constexpr = (HEIGHT - 1) // STRIDE + 1
    G_WIDTH: tl.constexpr = (WIDTH - 1) // STRIDE + 1
    T_H: tl.constexpr = G_HEIGHT // ROWS
    T_W: tl.constexpr = G_WIDTH // COLUMNS
    WHOLE: tl.constexpr = T_H == 1
    WIDE: tl.constexpr = T_W == 1
    GATHERS: tl.constexpr = not CHANNELS_LAST and not WIDE
    THREADS_BESIDE: tl.constexpr = (
        0 if T_W <= BG or CHANNELS_LAST else 2 if COLUMNS * STRIDE == 1 else 1
    )
    PADDED: tl.constexpr = T_W != BG
    # Rows and columns of x.
    X_ROWS: tl.constexpr = min(STRIDE * ROWS, HEIGHT)
    X_COLUMNS: tl.constexpr = min(STRIDE * COLUMNS, WIDTH)
    SURE_ROWS: tl.constexpr = X_ROWS - (STRIDE * G_HEIGHT - HEIGHT) * (not WHOLE)
    SURE_COLUMNS: tl.constexpr = X_COLUMNS - (STRIDE * G_WIDTH - WIDTH) * (not WIDE)
    LAST_ROW: tl.constexpr = SURE_ROWS if SURE_ROWS < X_ROWS else -1
    LAST_COLUMN: tl.constexpr = SURE_COLUMNS if SURE_COLUMNS < X_COLUMNS else -1
    VECTOR: tl.constexpr = not CHANNELS_LAST and X_COLUMNS > 1 and SURE_COLUMNS == X_COLUMNS
    G_VECTOR: tl.constexpr = not CHANNELS_LAST and COLUMNS > 1
    # The first row and column of the gradient and of x that a thread has.
    GR: tl.constexpr = -1 if STRIDE == 1 and not WHOLE else 0
    GC: tl.constexpr = -1 if STRIDE == 1 and not WIDE else 0
    XR: tl.constexpr = STRIDE * GR - 1 if RELU and not WHOLE else 0
    XC: tl.constexpr = STRIDE * GC - 1 if RELU and not WIDE and CHANNELS_LAST else 0
    X_END: tl.constexpr = X_ROWS if WHOLE or not RELU else STRIDE * ROWS + 2
    X_COUNT: tl.constexpr = STRIDE * COLUMNS + 2 - XC if XC < 0 else X_COLUMNS
    G_FIRST: tl.constexpr = GC if CHANNELS_LAST else 0
    G_COUNT: tl.constexpr = COLUMNS + 1 - GC if CHANNELS_LAST and not WIDE else COLUMNS
    # The first column of x after those of other threads.
    X_FIRST: tl.constexpr = -1 if GATHERS and RELU else XC

    if CHANNELS_LAST:
        strips = T_W * T_H * t_n
        i_t, _, _ = _program(t_c, 1, AXES)
        o_part = (i_t * BG + tl.arange(0, BG))[:, None]
        m_own = o_part < strips
        o_t = tl.minimum(o_part, strips - 1)
        o_c = _channels(t_c, BC, AXES)
        m_c = o_c < CHANNELS
        o_c = tl.where(m_c, o_c, o_c % UNIT)
        o_c = tl.max_contiguous(tl.multiple_of(o_c, [1, UNIT]), [1, UNIT])
        i_n = o_t // (T_W * T_H)
        o_h = o_t // T_W % T_H * ROWS
        o_w = o_t % T_W * COLUMNS
        left, right = None, None
        m_x, m_g = None, None
    else:
        T_G: tl.constexpr = (T_W + BG - 2 * THREADS_BESIDE - 1) // (BG - 2 * THREADS_BESIDE)
        i_t, i_c, i_n = _program(t_c, t_n, AXES)
        o_part = i_n * (T_H * T_G) + i_t
        o_c = (i_c * BC + tl.arange(0, BC))[:, None]
        m_c = o_c < CHANNELS
        o_c = tl.minimum(o_c, CHANNELS - 1)
        o_g = tl.arange(0, BG)[None, :]
        o_t = i_t % T_G * (BG - 2 * THREADS_BESIDE) + o_g - THREADS_BESIDE
        o_h = tl.zeros([1, 1], tl.int32) + i_t // T_G * ROWS
        o_w = o_t * COLUMNS
        m_g = (o_t >= 0) & (o_t < T_W) if PADDED else None
        m_x = m_g if RELU else None
        m_own = o_t < T_W
        if THREADS_BESIDE:
            m_own = m_own & (o_g >= THREADS_BESIDE) & (o_g < BG - THREADS_BESIDE)
        left = tl.broadcast_to((o_g + BG - 1) % BG, [BC, BG])
        right = tl.broadcast_to((o_g + 1) % BG, [BC, BG])
    m_top = o_h > 0
    m_bottom = o_h + ROWS < G_HEIGHT
    m_left = o_w > 0
    m_right = o_w + COLUMNS < G_WIDTH
    m_row = STRIDE * o_h + X_ROWS <= HEIGHT
    m_column = STRIDE * o_w + X_COLUMNS <= WIDTH
    m_y = m_own & m_c

    w_at, weights, scaled, b_sums = (), (), (), ()
    for i in tl.static_range(9):
        w_at = w_at + (weight + o_c * 9 + i,)
    w_at = w_at + (scale + o_c, shift + o_c)
    for _ in tl.static_range(11):
        weights = weights + (tl.zeros(o_c.shape, tl.float32),)
    once = tl.minimum(tl.maximum(steps, 1), 1)  # LLVM knows that, and no pass before it
    for _ in range(once):
        loaded = ()
        for i in tl.static_range(11):
            loaded = loaded + (tl.load(w_at[i]),)
        weights = loaded
        w_at = _advanced((w_at,), 1)[0]
    b_scale, b_shift = weights[9], weights[10]
    for i in tl.static_range(9):
        scaled = scaled + (weights[i] * b_scale,)
    for _ in tl.static_range(SUMS + 6 if GATHERS else SUMS):
        b_sums = b_sums + (tl.zeros(m_y.shape, tl.float32),)

    p_c = o_c.to(tl.int64)
    i_n = i_n.to(tl.int64) * steps
    o_p = o_h * G_WIDTH + o_w
    p_g = grad + i_n * G_N + o_p.to(tl.int64) * G_P
    if PADDED and not RELU and not CHANNELS_LAST:
        o_t = tl.where(m_g, o_t, 0)
        o_p = o_h * (STRIDE * WIDTH) + o_t * (STRIDE * COLUMNS)
    else:
        o_p = o_h * (STRIDE * WIDTH) + o_w * STRIDE
    p_x = x + i_n * X_N + p_c * X_C + o_p.to(tl.int64) * X_P
    p_y = grad_x + i_n * Y_N + p_c * Y_C + o_p.to(tl.int64) * Y_P
    if PASSTHROUGH:
        p_x += CHANNELS * X_C
        p_a = p_y
        p_y += CHANNELS * Y_C
    if PASSTHROUGH and CHANNELS_LAST:
        o_g = _channels(t_c, 2 * BC, AXES)
        o_g = tl.where(o_g < 2 * CHANNELS, o_g, o_g % (2 * UNIT))
        o_g = tl.max_contiguous(tl.multiple_of(o_g, [1, 2 * UNIT]), [1, 2 * UNIT])
        p_g += o_g.to(tl.int64) * G_C
    else:
        p_g += p_c * (TIMES * G_C)

    x_at, g_at, y_at, a_at, c_at = (), (), (), (), ()
    for k in tl.static_range(XR, X_END):
        x_at = x_at + (_pointers(p_x + k * WIDTH * X_P, X_P, XC, X_COUNT, VECTOR),)
    for k in tl.static_range(GR, ROWS if WHOLE else ROWS + 1):
        p_k = p_g + k * G_WIDTH * G_P
        if PASSTHROUGH and not CHANNELS_LAST:
            if k >= 0 and k < ROWS:
                c_at = c_at + (_pointers(p_k, G_P, 0, COLUMNS, G_VECTOR),)
            p_k += G_C
        g_at = g_at + (_pointers(p_k, G_P, G_FIRST, G_COUNT, G_VECTOR),)
    for k in tl.static_range(X_ROWS):
        y_at = y_at + (_pointers(p_y + k * WIDTH * Y_P, Y_P, 0, X_COLUMNS, VECTOR),)
        if PASSTHROUGH:
            a_at = a_at + (_pointers(p_a + k * WIDTH * Y_P, Y_P, 0, COLUMNS, G_VECTOR),)

    for _ in range(once if ONE else steps):
        x_rows, g_rows, passed, rows, cuts = (), (), (), (), ()
        for p in tl.static_range(GR, ROWS + 1):
            # Load.
            for k in tl.static_range(len(x_rows), len(x_at)):
                if k + XR <= STRIDE * (p + LEAD) + 1:
                    m_k = m_x
                    if k + XR < 0 or k + XR >= SURE_ROWS:
                        m_k = STRIDE * o_h + (k + XR)
                        m_k = m_k >= 0 if k + XR < 0 else m_k < HEIGHT
                        if m_x is not None:
                            m_k = m_k & m_x
                    row = _load_row(
                        x_at[k], m_k, o_w * STRIDE, WIDTH, XC, X_COUNT, SURE_COLUMNS, VECTOR
                    )
                    x_rows = x_rows + (row,)
            for k in tl.static_range(len(g_rows), len(g_at)):
                if k + GR <= p + LEAD:
                    m_k = m_g
                    if k + GR < 0 or k + GR >= ROWS:
                        m_k = m_top if k + GR < 0 else m_bottom
                        if m_g is not None:
                            m_k = m_k & m_g
                    row = _load_row(g_at[k], m_k, o_w, G_WIDTH, G_FIRST, G_COUNT, COLUMNS, G_VECTOR)
                    if PASSTHROUGH and k + GR >= 0 and k + GR < ROWS:
                        if CHANNELS_LAST:
                            passed = passed + (_halves(row, 0, BG, BC),)
                        else:
                            passed = passed + (_copied_row(c_at[k + GR], m_y, G_VECTOR),)
                    if PASSTHROUGH and CHANNELS_LAST:
                        row = _halves(row, 1, BG, BC)
                    g_rows = g_rows + (row,)

            # Compute and store.
            if p < ROWS or not WHOLE:
                for k in tl.static_range(len(rows), len(x_rows)):
                    if k + XR <= STRIDE * p + 1:
                        row = _floats(x_rows[k])
                        if GATHERS and RELU:
                            row = _with_neighbours(
                                row, left, right, m_left, m_right, True, STRIDE == 1, PADDED
                            )
                        rows = rows + (row,)
                cut = _cut_row(
                    rows, g_rows[p - GR], weights, b_scale, b_shift,
                    p, XR, X_FIRST, G_FIRST, STRIDE, RELU,
                )  # fmt: skip
                if p >= 0 and p < ROWS:
                    for j in tl.static_range(COLUMNS):
                        b_sums = _added(b_sums, 9, cut[j - G_FIRST])
                if GATHERS:
                    cut = _with_neighbours(
                        cut, left, right, m_left, m_right, STRIDE == 1, True, PADDED
                    )
                cuts = cuts + (cut,)
            for q in tl.static_range(STRIDE * (p - 1), STRIDE * p):
                if q >= 0 and q < X_ROWS:
                    row = ()
                    for j in tl.static_range(X_COLUMNS):
                        row = row + (rows[q - XR][j - X_FIRST],)
                    out, b_sums = _gradient_row(
                        cuts, row, b_sums, scaled,
                        (m_top, m_bottom, m_left, m_right, m_row, m_column),
                        q, GR, GC, ROWS, COLUMNS, STRIDE, LAST_ROW, LAST_COLUMN, GATHERS,
                    )  # fmt: skip
                    _store_row(
                        y_at[q], _results(out, grad_x.dtype.element_ty, VECTOR),
                        m_y & m_row if q == LAST_ROW else m_y, m_column, VECTOR, LAST_COLUMN,
                    )  # fmt: skip
                    if PASSTHROUGH:
                        row = ()
                        for j in tl.static_range(len(a_at[q])):
                            row = row + (passed[q][j if not CHANNELS_LAST else j - G_FIRST],)
                        _store_row(a_at[q], row, m_y, m_column, G_VECTOR, -1)
        x_at, g_at, y_at = _advanced(x_at, X_N), _advanced(g_at, G_N), _advanced(y_at, Y_N)
        if PASSTHROUGH:
            a_at = _advanced(a_at, Y_N)
        if PASSTHROUGH and not CHANNELS_LAST:
            c_at = _advanced(c_at, G_N)

    if GATHERS:
        for i in tl.static_range(3):
            b_sums = _added(b_sums, 3 * i, _zero_unless(m_right, b_sums[SUMS + 3 + i]))
            b_sums = _added(b_sums, 3 * i + 2, _zero_unless(m_left, b_sums[SUMS + i]))
    s_at, totals = (), ()
    p_s = sums + o_part.to(tl.int64) * (SUMS * CHANNELS) + o_c
    for i in tl.static_range(SUMS):
        s_at = s_at + (p_s + i * CHANNELS,)
        b_s = b_sums[i]
        if not CHANNELS_LAST:
            b_s = tl.sum(_zero_unless(m_own, b_s) if PADDED else b_s, 1, keep_dims=True)
        totals = totals + (b_s,)
    for _ in range(once):
        for i in tl.static_range(SUMS):
            tl.store(s_at[i], totals[i], mask=m_y if CHANNELS_LAST else m_c)
        s_at = _advanced((s_at,), 1)[0]


@triton.jit
def depthwise_sums_kernel(
    sums,  # [parts, SUMS, C]
    weight,  # [C, 9]
    scale,  # [C]
    grad_weight,  # [C, 9]
    grad_scale,  # [C]
    grad_shift,  # [C]
    parts,
    channels,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    m_c = o_c < channels
    b_sums = ()
    for _ in tl.static_range(SUMS):
        b_sums = b_sums + (tl.zeros([BP, BC], tl.float32),)
    for i_p in range(0, parts, BP):
        o_p = (i_p + tl.arange(0, BP))[:, None]
        p_s = sums + o_p.to(tl.int64) * SUMS * channels + o_c
        m_s = (o_p < parts) & m_c
        added = ()
        for i in tl.static_range(SUMS):
            added = added + (b_sums[i] + tl.load(p_s + i * channels, mask=m_s, other=0.0),)
        b_sums = added
    b_scale = tl.load(scale + o_c, mask=m_c)
    b_y = tl.zeros([1, BC], tl.float32)
    for i in tl.static_range(9):
        b_s = tl.sum(b_sums[i], 0, keep_dims=True)
        b_y += b_s * tl.load(weight + o_c * 9 + i, mask=m_c)
        tl.store(grad_weight + o_c * 9 + i, b_s * b_scale, mask=m_c)
    tl.store(grad_scale + o_c, b_y, mask=m_c)
    tl.store(grad_shift + o_c, tl.sum(b_sums[9], 0, keep_dims=True), mask=m_c)
