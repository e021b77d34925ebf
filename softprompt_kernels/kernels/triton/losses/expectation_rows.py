"""One tile of the vocabulary in the pass over all of it: from W h to exponentials, with an online softmax.

    z = scale · (W h + bias),   m' = max(m, max z),   f = exp(m − m'),   e = exp(z − m')
    row_sum = f row_sum + Σ e,   bias_sum = f bias_sum + Σ e · bias,   mean = f mean

A GEMM then adds Σ e W to the mean, with e in the dtype of W. For a 16-bit W, e is written in two parts: e rounded, and
what the rounding lost. The GEMMs of both parts together are as accurate as one GEMM with 16 bits of mantissa.

A program has one row (or a few short rows). It reads the row's part of the tile twice, the second time from the L1 or
L2 cache, and rescales the row's mean only where m has grown. Cost: one exponential per column.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.elementwise import INFINITY, LOG2E
from softprompt_kernels.kernels.triton.profiled import profiled


@profiled(do_not_specialize=["rows", "first"])  # which change from call to call
def exponentials_kernel(
    raw_logits,  # [rows, columns] fp32, W h
    bias,  # [columns] fp32 or None; −inf removes a column
    weights,  # [rows] or None; in rows of weight 0, e is 0 and the state does not change
    labels,  # [rows] int64 or None, indices into the whole vocabulary
    row_max,  # [rows] fp32, m; this and the next four are read and written
    row_sum,  # [rows] fp64
    bias_sum,  # [rows] fp64 or None
    label_logit,  # [rows] fp32 or None, z of the label
    mean,  # [rows, size] fp32 or None
    high,  # [rows, columns] output or None, part_scale · e; may be `raw_logits`
    low,  # [rows, columns] output or None, part_scale · e − high
    rows,
    columns,
    size,
    raw_logits_stride,
    mean_stride,
    high_stride,
    low_stride,
    scale,
    first,  # vocabulary index of the first column
    part_scale,  # a power of 2, so that fp16 can hold small e
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,  # columns of the tile, and elements of a mean
):
    """The exponentials of BLOCK_M rows of a tile, and their state after it. Grid: (⌈rows / BLOCK_M⌉,)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    kept = exists
    if weights is not None:
        kept = exists & (tl.load(weights + row, mask=exists, other=0.0) != 0)
    any_kept = tl.max(kept.to(tl.int32), 0)
    full = columns // BLOCK_N * BLOCK_N
    source = raw_logits + (row * raw_logits_stride)[:, None]

    if label_logit is not None:  # before any e overwrites it: the maximum over the row synchronises all threads
        label = tl.load(labels + row, mask=kept, other=-1)
        in_tile = kept & (label >= first) & (label < first + columns)
        label_z = tl.load(raw_logits + row * raw_logits_stride + (label - first), mask=in_tile, other=0.0)
        label_z *= scale
        if bias is not None:
            label_bias = tl.load(bias + (label - first), mask=in_tile, other=0.0)
            label_z = tl.where(label_bias == -INFINITY, -INFINITY, label_z + label_bias * scale)
        tl.store(label_logit + row, label_z, mask=in_tile)

    lane_max = tl.full((BLOCK_M, BLOCK_N), -INFINITY, tl.float32)
    for start in range(0, full * any_kept, BLOCK_N):
        z, _ = _logits(source, bias, start, columns, kept, scale, False, BLOCK_N)
        lane_max = tl.maximum(lane_max, z)
    for start in range(full * any_kept, columns * any_kept, BLOCK_N):
        z, _ = _logits(source, bias, start, columns, kept, scale, True, BLOCK_N)
        lane_max = tl.maximum(lane_max, z)
    old_max = tl.load(row_max + row, mask=kept, other=-INFINITY)
    new_max = tl.maximum(old_max, tl.max(lane_max, 1))
    base = tl.where(new_max == -INFINITY, 0.0, new_max)  # 0 while every logit was −inf

    lane_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lane_bias_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(full, columns, BLOCK_N):
        e, b = _exponentials(source, bias, base, start, columns, kept, scale, True, BLOCK_N)
        lane_sums += e
        lane_bias_sums += e * b
        _store(high, low, e * part_scale, row, high_stride, low_stride, start, columns, exists, True, BLOCK_N)
    for start in range(0, full, BLOCK_N):
        e, b = _exponentials(source, bias, base, start, columns, kept, scale, False, BLOCK_N)
        lane_sums += e
        lane_bias_sums += e * b
        _store(high, low, e * part_scale, row, high_stride, low_stride, start, columns, exists, False, BLOCK_N)

    rescale = tl.where(old_max == -INFINITY, 0.0, tl.exp2((old_max - base) * LOG2E))  # f
    rescale = tl.where(old_max == new_max, 1.0, rescale)
    tl.store(row_max + row, new_max, mask=kept)
    _rescale_and_add(row_sum, row, kept, rescale, tl.sum(lane_sums, 1))
    if bias_sum is not None:
        _rescale_and_add(bias_sum, row, kept, rescale, tl.sum(lane_bias_sums, 1))
    if mean is not None:
        grown = kept & (rescale != 1.0)
        for start in range(0, size * tl.max(grown.to(tl.int32), 0), BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            at = mean + (row * mean_stride)[:, None] + column[None, :]
            inside = grown[:, None] & (column < size)[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) * rescale[:, None], mask=inside)


@triton.jit
def _logits(source, bias, start, columns, kept, scale, TAIL: tl.constexpr, BLOCK_N: tl.constexpr):
    """z, −inf beyond the tile and in skipped rows; and the bias, 0 where it removes a column."""
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
        # Checked before scaling, so that the column is removed whatever the sign of `scale`.
        z = tl.where(b == -INFINITY, -INFINITY, (z + b) * scale)
        b = tl.where(b == -INFINITY, 0.0, b)
    else:
        z *= scale
    return tl.where(inside, z, -INFINITY), b


@triton.jit
def _exponentials(source, bias, base, start, columns, kept, scale, TAIL: tl.constexpr, BLOCK_N: tl.constexpr):
    """exp(z − base) and the bias."""
    z, b = _logits(source, bias, start, columns, kept, scale, TAIL, BLOCK_N)
    return tl.exp2((z - base[:, None]) * LOG2E), b


@triton.jit
def _store(
    high, low, e, row, high_stride, low_stride, start, columns, exists, TAIL: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Stores e as high and, where it is wanted, what the rounding of high lost as low."""
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
def _rescale_and_add(sums, row, kept, rescale, added):
    """sums [rows] fp64 = rescale · sums + added, in rows that are kept."""
    old = tl.load(sums + row, mask=kept, other=0.0)
    tl.store(sums + row, old * rescale.to(tl.float64) + added.to(tl.float64), mask=kept)
