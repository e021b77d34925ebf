"""A tile of the vocabulary in a sweep over all of it: products to exponentials, with the state of an online softmax.

    z = scale · (product + bias),   m' = max(m, max z),   f = exp(m − m'),   e = exp(z − m')
    total = f total + Σ e,   bias_total = f bias_total + Σ e · bias,   mean = f mean

The sum of e W is a matrix product's to add, of e in the dtype of W. Where that has 16 bits, e is written in two parts,
e rounded and what the rounding lost, whose products with W together are as good as one with 16 bits of mantissa.

A program has a row (or a few short ones). It reads the row's part of the tile twice, the second time while it is in the
L1 or L2 cache, and rescales the row's mean only where m has moved. One exponential a word.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.elementwise import INFINITY, LOG2E


@triton.jit(do_not_specialize=["rows", "first"])  # which change from call to call
def exponentials_kernel(
    products,  # [rows, columns] fp32
    bias,  # [columns] fp32 or None; −inf removes a word
    weights,  # [rows] or None; in rows of weight 0, e is 0 and the state stays
    labels,  # [rows] int64 or None, words of the whole vocabulary
    largest,  # [rows] fp32, m
    total,  # [rows] fp64
    bias_total,  # [rows] fp64 or None
    label_logit,  # [rows] fp32 or None, z of the label
    mean,  # [rows, size] fp32 or None
    high,  # [rows, columns] out or None, part_scale · e; may be `products`
    low,  # [rows, columns] out or None, part_scale · e − high
    rows,
    columns,
    size,
    products_stride,
    mean_stride,
    high_stride,
    low_stride,
    scale,
    first,  # word of the first column
    part_scale,  # a power of 2: fp16 has no small numbers
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,  # words, and numbers of a mean
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    kept = exists
    if weights is not None:
        kept = exists & (tl.load(weights + row, mask=exists, other=0.0) != 0)
    any_kept = tl.max(kept.to(tl.int32), 0)
    full = columns // BLOCK_N * BLOCK_N
    source = products + (row * products_stride)[:, None]

    if label_logit is not None:  # before any e takes its place: a maximum over the row waits for all threads
        label = tl.load(labels + row, mask=kept, other=-1)
        here = kept & (label >= first) & (label < first + columns)
        of_label = tl.load(products + row * products_stride + (label - first), mask=here, other=0.0)
        of_label *= scale
        if bias is not None:
            of_bias = tl.load(bias + (label - first), mask=here, other=0.0)
            of_label = tl.where(of_bias == -INFINITY, -INFINITY, of_label + of_bias * scale)
        tl.store(label_logit + row, of_label, mask=here)

    found = tl.full((BLOCK_M, BLOCK_N), -INFINITY, tl.float32)
    for start in range(0, full * any_kept, BLOCK_N):
        z, _ = _logits(source, bias, start, columns, kept, scale, False, BLOCK_N)
        found = tl.maximum(found, z)
    for start in range(full * any_kept, columns * any_kept, BLOCK_N):
        z, _ = _logits(source, bias, start, columns, kept, scale, True, BLOCK_N)
        found = tl.maximum(found, z)
    before = tl.load(largest + row, mask=kept, other=-INFINITY)
    after = tl.maximum(before, tl.max(found, 1))
    base = tl.where(after == -INFINITY, 0.0, after)  # no word yet

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(full, columns, BLOCK_N):
        e, b = _exponentials(source, bias, base, start, columns, kept, scale, True, BLOCK_N)
        sums += e
        bias_sums += e * b
        _store(high, low, e * part_scale, row, high_stride, low_stride, start, columns, exists, True, BLOCK_N)
    for start in range(0, full, BLOCK_N):
        e, b = _exponentials(source, bias, base, start, columns, kept, scale, False, BLOCK_N)
        sums += e
        bias_sums += e * b
        _store(high, low, e * part_scale, row, high_stride, low_stride, start, columns, exists, False, BLOCK_N)

    factor = tl.where(before == -INFINITY, 0.0, tl.exp2((before - base) * LOG2E))
    factor = tl.where(before == after, 1.0, factor)
    tl.store(largest + row, after, mask=kept)
    _add(total, row, kept, factor, tl.sum(sums, 1))
    if bias_total is not None:
        _add(bias_total, row, kept, factor, tl.sum(bias_sums, 1))
    if mean is not None:
        moved = kept & (factor != 1.0)
        for start in range(0, size * tl.max(moved.to(tl.int32), 0), BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            at = mean + (row * mean_stride)[:, None] + column[None, :]
            inside = moved[:, None] & (column < size)[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) * factor[:, None], mask=inside)


@triton.jit
def _logits(source, bias, start, columns, kept, scale, TAIL: tl.constexpr, BLOCK_N: tl.constexpr):
    """z, −inf where there is none, and the bias, 0 where it removes a word."""
    column = start + tl.arange(0, BLOCK_N)
    inside = kept[:, None]
    if TAIL:
        inside = inside & (column < columns)[None, :]
    z = tl.load(source + column[None, :], mask=inside, other=0.0)
    b = 0.0
    if bias is not None:
        if TAIL:
            b = tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
        else:
            b = tl.load(bias + column)[None, :]
        # Apart from the sum, so that a scale of any sign leaves it removed.
        z = tl.where(b == -INFINITY, -INFINITY, (z + b) * scale)
        b = tl.where(b == -INFINITY, 0.0, b)
    else:
        z *= scale
    return tl.where(inside, z, -INFINITY), b


@triton.jit
def _exponentials(source, bias, base, start, columns, kept, scale, TAIL: tl.constexpr, BLOCK_N: tl.constexpr):
    z, b = _logits(source, bias, start, columns, kept, scale, TAIL, BLOCK_N)
    return tl.exp2((z - base[:, None]) * LOG2E), b


@triton.jit
def _store(
    high, low, e, row, high_stride, low_stride, start, columns, exists, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    column = start + tl.arange(0, BLOCK_N)
    inside = exists[:, None]
    if TAIL:
        inside = inside & (column < columns)[None, :]
    if high is not None:
        rounded = e.to(high.dtype.element_ty)
        tl.store(high + (row * high_stride)[:, None] + column[None, :], rounded, mask=inside)
        if low is not None:
            lost = (e - rounded.to(tl.float32)).to(low.dtype.element_ty)
            tl.store(low + (row * low_stride)[:, None] + column[None, :], lost, mask=inside)


@triton.jit
def _add(total, row, kept, factor, added):
    old = tl.load(total + row, mask=kept, other=0.0)
    tl.store(total + row, old * factor.to(tl.float64) + added.to(tl.float64), mask=kept)
