"""Attention over [prompt ; own tokens], forward: one online softmax over both, in registers.

For a tile of rows and each tile of keys that it sees, with m the largest score so far,

    P = 2^(S₂ − m)      l = Σ P      O += P V

where l and O are multiplied by 2^(m − m') when m grows to m'. At the end a sink adds 2^(sink · log₂e − m) to l, and

    out = O / l,    lse = ln 2 · m + ln l

With splits several programs share the keys of a tile of rows: each leaves its O / l and m + log₂ l in fp32, and
`merge_kernel` weighs them by 2^(part − all), in the order of the parts.

Cost: 4 · rows · keys seen · D FLOP; a program reads its rows once, and once each key that they see.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.key_loop import sweep_all
from softprompt_kernels.kernels.triton.attention.records import Rows
from softprompt_kernels.kernels.triton.attention.rows import (
    load_tile,
    locate,
    row_index,
    row_pointers,
    rows_of,
    sequence_of,
    store_tile,
    whole_batch,
)
from softprompt_kernels.kernels.triton.attention.scores import LN2, LOG2E, score


class Softmax(NamedTuple):
    """State of the online softmax; before any key m = −inf and l, O = 0."""

    m: Any  # [BLOCK_M]
    total: Any  # [BLOCK_M] l
    output: Any  # [BLOCK_M, BLOCK_DV] O


@triton.jit
def _update(state, query, key, value, mask, scoring, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    scores = score(query, tl.trans(key), scoring, VARIANT)
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    m = tl.maximum(state.m, tl.max(scores, 1))
    base = tl.where(m == float("-inf"), 0.0, m)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(state.m - base)
    before = state.output * shrink[:, None]
    output = tl.dot(weights.to(value.dtype), value, before, input_precision=VARIANT.precision)
    if MASKED and VARIANT.stacked:  # a NaN of one sequence's keys is not to reach the rows of others
        output = tl.where((tl.max(mask.to(tl.int32), 1) > 0)[:, None], output, before)
    return Softmax(m, state.total * shrink + tl.sum(weights, 1), output)


@triton.jit
def _add_sink(m, total, sink):
    """(m, l) with a sink in the denominator; a row that saw no key stays as it is."""
    sink *= LOG2E
    larger = tl.maximum(m, sink)
    with_sink = total * tl.exp2(m - larger) + tl.where(sink == larger, 1.0, tl.exp2(sink - larger))
    return tl.where(total == 0, m, larger), tl.where(total == 0, total, with_sink)


@triton.jit
def forward_kernel(
    query,
    inputs,
    sinks,
    out,
    lse,
    layout,
    scoring,
    VARIANT: tl.constexpr,
):
    """One tile of rows of one key head, or one part of its keys. Grid: (tiles, Hkv, splits).

    query [B, Hq, M, D]; inputs: keys and values; sinks [Hq] or None; out [B, Hq, M, Dv] and lse [B, Hq, M], or with
    splits fp32 parts [splits · B, Hq, M, Dv] and [splits, B, Hq, M], the latter base 2.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # Later tiles of a causal sequence see more keys, and start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if VARIANT.stacked:
        sequence = whole_batch(layout, VARIANT)
    else:
        s, tile = locate(layout, tile, layout.queries, VARIANT.group, VARIANT.block_m, VARIANT)
        if s > layout.sequences:
            return
        sequence = sequence_of(layout, s, VARIANT)
    rows = rows_of(layout, sequence, tile * VARIANT.block_m, kv_head, VARIANT)
    left = load_tile(row_pointers(query, rows), rows.valid, VARIANT.size, VARIANT.block_d, True)
    state = Softmax(
        tl.full([VARIANT.block_m], float("-inf"), tl.float32),
        tl.zeros([VARIANT.block_m], tl.float32),
        tl.zeros([VARIANT.block_m, VARIANT.block_dv], tl.float32),
    )
    state = sweep_all(_update, state, left, inputs, layout, sequence, rows, tile, kv_head, split, scoring, VARIANT)
    m = state.m
    total = state.total
    kept = 1.0
    if sinks is not None and VARIANT.splits == 1:
        m, total = _add_sink(m, total, tl.load(sinks + rows.head).to(tl.float32))
        kept = tl.exp2(state.m - m)
    inverse = tl.where(total == 0, 0.0, kept / total)
    log_sum = tl.where(total == 0, float("-inf"), m + tl.log2(total))
    if VARIANT.splits > 1:
        batches = 1 if VARIANT.packed else layout.sequences
        rows = Rows(rows.batch + split * batches, rows.token, rows.head, rows.relative, rows.valid)
    else:
        log_sum *= LN2
    store_tile(
        row_pointers(out, rows), state.output * inverse[:, None], rows.valid, VARIANT.value_size, VARIANT.block_dv
    )
    tl.store(lse + row_index(layout, rows), log_sum, mask=rows.valid)


@triton.jit
def merge_kernel(
    out_parts,
    lse_parts,
    sinks,
    out,
    lse,
    count,
    queries,
    heads,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse of `count` = B · Hq · M rows from their parts. Grid: (⌈count / BLOCK_M⌉,).

    out_parts [SPLITS, B, Hq, M, SIZE], lse_parts [SPLITS, B, Hq, M] base 2; out [B, Hq, M, SIZE], lse [B, Hq, M].
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < count
    token = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(SPLITS):
        part = tl.load(lse_parts + split * tl.cast(count, tl.int64) + row, mask=valid, other=float("-inf"))
        m = tl.maximum(m, part)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(SPLITS):
        at = split * tl.cast(count, tl.int64) + row
        weight = tl.exp2(tl.load(lse_parts + at, mask=valid, other=float("-inf")) - base)
        total += weight
        output += weight[:, None] * load_tile(out_parts + at * SIZE, valid, SIZE, BLOCK_D, True)
    kept = 1.0
    if sinks is not None:
        with_sink, total = _add_sink(m, total, tl.load(sinks + head).to(tl.float32))
        kept = tl.exp2(base - with_sink)
        base = with_sink
    output *= tl.where(total == 0, 0.0, kept / total)[:, None]
    rows = Rows(batch, token, head, token, valid)
    store_tile(row_pointers(out, rows), output, valid, SIZE, BLOCK_D)
    tl.store(lse + row, tl.where(total == 0, float("-inf"), (base + tl.log2(total)) * LN2), mask=valid)
