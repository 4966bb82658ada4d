"""Rows of a strip of the gradient of a depthwise convolution (``backward_kernels.py``).

A row is a tuple of its columns, each a tensor of what the threads of a program have there, and rows
are a tuple. A row or a column that lies outside the map, as is known when a kernel is compiled, is
in no tuple, and its products are not computed.
"""

import triton
import triton.language as tl

from snv2_kernels.triton.depthwise_kernels import _apart, _together

SUMS = tl.constexpr(10)  # of a channel: of gradient x input at each tap, and of the gradient


@triton.jit
def _zero_unless(mask, b_x):
    return tl.where(mask, b_x, 0.0)


@triton.jit
def _pointers(
    p_x, X_P: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr
):
    """Returns pointers to COUNT columns from FIRST on, or one tensor of all."""
    if VECTOR:
        return (p_x[:, :, None] + tl.arange(0, COUNT)[None, None, :] * X_P,)
    else:
        row = ()
        for j in tl.static_range(FIRST, FIRST + COUNT):
            row = row + (p_x + j * X_P,)
        return row


@triton.jit
def _advanced(rows, STEP: tl.constexpr):
    """Returns rows of pointers to the next image."""
    out = ()
    for k in tl.static_range(len(rows)):
        row = ()
        for j in tl.static_range(len(rows[k])):
            row = row + (rows[k][j] + STEP,)
        out = out + (row,)
    return out


@triton.jit
def _load_row(
    pointers, m_x, o_w, WIDTH: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, SURE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Returns COUNT columns from FIRST on, relative to o_w; those from 0 to SURE are in the map."""
    if VECTOR:
        if m_x is None:
            return _apart(tl.load(pointers[0]), COUNT)
        else:
            return _apart(tl.load(pointers[0], mask=m_x[:, :, None], other=0.0), COUNT)
    else:
        row = ()
        for j in tl.static_range(FIRST, FIRST + COUNT):
            if j >= 0 and j < SURE:
                m_j = m_x
            else:
                m_j = (o_w + j >= 0) if j < 0 else (o_w + j < WIDTH)
                if m_x is not None:
                    m_j = m_j & m_x
            if m_j is None:
                row = row + (tl.load(pointers[j - FIRST]),)
            else:
                row = row + (tl.load(pointers[j - FIRST], mask=m_j, other=0.0),)
        return row


@triton.jit
def _copied_row(pointers, m_x, VECTOR: tl.constexpr):
    """Returns what passes through of a row."""
    row = ()
    for j in tl.static_range(len(pointers)):
        row = row + (tl.load(pointers[j], mask=m_x[:, :, None] if VECTOR else m_x),)
    return row


@triton.jit
def _with_neighbours(
    row, left, right, m_left, m_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Returns a row of strips [BC, BG] and the columns beside it, which other threads have."""
    if LEFT:
        b_x = tl.gather(row[len(row) - 1], left, 1)
        beside = (b_x if PADDED else _zero_unless(m_left, b_x),) + row
    else:
        beside = row
    if RIGHT:
        b_x = tl.gather(row[0], right, 1)
        beside = beside + (b_x if PADDED else _zero_unless(m_right, b_x),)
    return beside


@triton.jit
def _cut_row(
    rows,  # of x, from XR on, whose columns are from XC on
    g_row,  # of grad, whose columns are from GC on
    weights,
    b_scale,
    b_shift,
    P: tl.constexpr,  # row of grad
    XR: tl.constexpr,
    XC: tl.constexpr,
    GC: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
):
    """Returns what the ReLU leaves of a row of the gradient."""
    cut = ()
    for c in tl.static_range(len(g_row)):
        b_g = g_row[c].to(tl.float32)
        if RELU:
            b_y = tl.zeros(b_g.shape, tl.float32)
            for i in tl.static_range(9):
                if STRIDE * P + i // 3 - 1 >= XR and STRIDE * P + i // 3 - 1 - XR < len(rows):
                    b_y = _tap(
                        b_y, rows[STRIDE * P + i // 3 - 1 - XR], weights[i],
                        STRIDE * (c + GC) + i % 3 - 1 - XC,
                    )  # fmt: skip
            b_y = tl.fma(
                b_y, tl.broadcast_to(b_scale, b_y.shape), tl.broadcast_to(b_shift, b_y.shape)
            )
            b_g = tl.where(b_y <= 0.0, 0.0, b_g)  # not for NaN
        cut = cut + (b_g,)
    return cut


@triton.jit
def _tap(b_y, row, b_w, AT: tl.constexpr):
    """Returns b_y and a row's element times a weight, if there is one."""
    if AT >= 0 and len(row) > AT:
        return tl.fma(row[AT], tl.broadcast_to(b_w, b_y.shape), b_y)
    else:
        return b_y


@triton.jit
def _added(sums, AT: tl.constexpr, b_x):
    """Returns sums after b_x was added to one of them."""
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (sums[i] + b_x if i == AT else sums[i],)
    return out


@triton.jit
def _multiplied(sums, AT: tl.constexpr, b_x, b_g):
    """Returns sums after a product was added to one of them."""
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (tl.fma(b_x, b_g, sums[i]) if i == AT else sums[i],)
    return out


@triton.jit
def _product(
    b_x, b_g, inside,
    P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LAST_ROW: tl.constexpr, LAST_COLUMN: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """Returns an element of x and one of the gradient, in row P and column C of a strip; zero
    instead of one where the other lies outside the map."""
    if P == -1:
        b_x = _zero_unless(inside[0], b_x)
    if P == ROWS:
        b_x = _zero_unless(inside[1], b_x)
    if C == -1 and not GATHERS:
        b_x = _zero_unless(inside[2], b_x)
    if C == COLUMNS and not GATHERS:
        b_x = _zero_unless(inside[3], b_x)
    if LAST_ROW:
        b_g = _zero_unless(inside[4], b_g)
    if LAST_COLUMN:
        b_g = _zero_unless(inside[5], b_g)
    return b_x, b_g


@triton.jit
def _products(
    out, sums, x_row, cut, b_w, inside,
    P: tl.constexpr, TAP: tl.constexpr, GC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
    LAST_ROW: tl.constexpr, LAST_COLUMN: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """Returns out and sums and the products of a row of x and row P of the gradient, from column GC
    on, in a tap. With GATHERS those with a column beside the strip have sums of their own."""
    row = ()
    for j in tl.static_range(len(x_row)):
        if (
            (j + 1 - TAP % 3) % STRIDE == 0
            and (j + 1 - TAP % 3) // STRIDE >= GC
            and (j + 1 - TAP % 3) // STRIDE - GC < len(cut)
        ):
            b_g = cut[(j + 1 - TAP % 3) // STRIDE - GC]
            row = row + (tl.fma(b_g, tl.broadcast_to(b_w, b_g.shape), out[j]),)
            b_x, b_g = _product(
                x_row[j], b_g, inside, P, (j + 1 - TAP % 3) // STRIDE,
                ROWS, COLUMNS, LAST_ROW, j == LAST_COLUMN, GATHERS,
            )  # fmt: skip
            if GATHERS and (j + 1 - TAP % 3) // STRIDE == -1:
                sums = _multiplied(sums, SUMS + TAP // 3, b_x, b_g)
            elif GATHERS and (j + 1 - TAP % 3) // STRIDE == COLUMNS:
                sums = _multiplied(sums, SUMS + 3 + TAP // 3, b_x, b_g)
            else:
                sums = _multiplied(sums, TAP, b_x, b_g)
        else:
            row = row + (out[j],)
    return row, sums


@triton.jit
def _gradient_row(
    cuts,  # rows of the cut gradient from GR on, whose columns are from GC on
    x_row,  # a row of x
    sums,
    weights,  # times the scale
    inside,  # whether what may lie outside the map does not: the gradient above, below, left and
    # right of the strip, the last row and column of x
    Q: tl.constexpr,  # row of x
    GR: tl.constexpr,
    GC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    LAST_ROW: tl.constexpr,  # of x that may lie outside the map
    LAST_COLUMN: tl.constexpr,
    GATHERS: tl.constexpr,
):
    """Returns a row of grad_x, and the sums with the products of this row of x."""
    out = ()
    for _ in tl.static_range(len(x_row)):
        out = out + (tl.zeros(x_row[0].shape, tl.float32),)
    for i in tl.static_range(9):
        if (
            (Q + 1 - i // 3) % STRIDE == 0
            and (Q + 1 - i // 3) // STRIDE >= GR
            and (Q + 1 - i // 3) // STRIDE - GR < len(cuts)
        ):
            out, sums = _products(
                out, sums, x_row, cuts[(Q + 1 - i // 3) // STRIDE - GR], weights[i], inside,
                (Q + 1 - i // 3) // STRIDE, i, GC, ROWS, COLUMNS, STRIDE,
                Q == LAST_ROW, LAST_COLUMN, GATHERS,
            )  # fmt: skip
    return out, sums


@triton.jit
def _halves(row, ODD: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr):
    """Returns the even or the odd channels of a row [BG, 2 * BC]."""
    out = ()
    for j in tl.static_range(len(row)):
        out = out + (tl.split(tl.reshape(row[j], [BG, BC, 2]))[ODD],)
    return out


@triton.jit
def _store_row(pointers, row, m_y, m_column, VECTOR: tl.constexpr, LAST: tl.constexpr):
    for j in tl.static_range(len(row)):
        if VECTOR:
            tl.store(pointers[j], row[j], mask=m_y[:, :, None])
        else:
            tl.store(pointers[j], row[j], mask=m_y & m_column if j == LAST else m_y)


@triton.jit
def _results(row, element: tl.constexpr, VECTOR: tl.constexpr):
    """Returns a row as it is stored."""
    out = ()
    for j in tl.static_range(len(row)):
        out = out + (row[j].to(element),)
    return (_together(out, len(row)),) if VECTOR else out
