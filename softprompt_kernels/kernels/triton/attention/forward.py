"""Attention over [prompt ; own tokens], forward: one online softmax over both, in registers.

For a tile of rows and each tile of keys that it sees, with m the largest score so far (row max),

    P = 2^(S₂ − m)      l = Σ P (row sum)      O += P V

When m grows to m', l and O are multiplied by 2^(m − m'). At the end a sink adds 2^(sink · log₂e − m) to l, and

    out = O / l,    lse = ln 2 · m + ln l

Split-KV: with splits > 1 several programs share the keys of a tile of rows. Each writes its O / l and its m + log₂ l in
fp32. `merge_kernel` adds them up in the order of the splits, each with the weight 2^(lse of the split − lse of all).

Cost: 4 · rows · keys seen · D FLOP. A program reads its rows once, and every key that they see once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.addressing import (
    load_tile,
    locate_tile,
    row_index,
    row_pointers,
    rows_of,
    sequence_of,
    stacked_sequences,
    store_tile,
)
from softprompt_kernels.kernels.triton.attention.arguments import Rows
from softprompt_kernels.kernels.triton.attention.key_loop import loop_over_prompt_and_own_keys
from softprompt_kernels.kernels.triton.attention.scores import LN2, LOG2E, score
from softprompt_kernels.kernels.triton.attention.work import forward_flop
from softprompt_kernels.kernels.triton.profiled import profiled


class Softmax(NamedTuple):
    """State of the online softmax; before the first key m = −inf and l, O = 0."""

    row_max: Any  # [BLOCK_M] m
    row_sum: Any  # [BLOCK_M] l
    output: Any  # [BLOCK_M, BLOCK_DV] O


@triton.jit
def _update(state, query, key, value, mask, scoring, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    scores = score(query, tl.trans(key), scoring, VARIANT)
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    row_max = tl.maximum(state.row_max, tl.max(scores, 1))
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(state.row_max - base)
    rescaled = state.output * rescale[:, None]
    output = tl.dot(weights.to(value.dtype), value, rescaled, input_precision=VARIANT.precision)
    if MASKED and VARIANT.stacked:  # keeps a NaN in one sequence's keys out of the rows of other sequences
        output = tl.where((tl.max(mask.to(tl.int32), 1) > 0)[:, None], output, rescaled)
    return Softmax(row_max, state.row_sum * rescale + tl.sum(weights, 1), output)


@triton.jit
def _add_sink(row_max, row_sum, sink):
    """(m, l) with a sink in the denominator. A row that saw no key does not change."""
    sink *= LOG2E
    new_max = tl.maximum(row_max, sink)
    with_sink = row_sum * tl.exp2(row_max - new_max) + tl.where(sink == new_max, 1.0, tl.exp2(sink - new_max))
    return tl.where(row_sum == 0, row_max, new_max), tl.where(row_sum == 0, row_sum, with_sink)


@profiled(forward_flop)
def forward_kernel(
    query,
    key_values,
    sinks,
    out,
    lse,
    layout,
    scoring,
    VARIANT: tl.constexpr,
):
    """One tile of rows of one key head, over all its keys or one split of them. Grid: (row tiles, Hkv, splits).

    query [B, Hq, M, D]; key_values: keys and values; sinks [Hq] or None; out [B, Hq, M, Dv] and lse [B, Hq, M]. With
    splits > 1 out and lse are fp32 partial results [splits · B, Hq, M, Dv] and [splits, B, Hq, M], this lse in base 2.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # Later tiles of a causal sequence see more keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if VARIANT.stacked:
        sequence = stacked_sequences(layout, VARIANT)
    else:
        s, tile = locate_tile(layout, tile, layout.queries, VARIANT.group, VARIANT.block_m, VARIANT)
        if s > layout.sequences:
            return
        sequence = sequence_of(layout, s, VARIANT)
    rows = rows_of(layout, sequence, tile * VARIANT.block_m, kv_head, VARIANT)
    query_tile = load_tile(row_pointers(query, rows), rows.valid, VARIANT.size, VARIANT.block_d, True)
    state = Softmax(
        tl.full([VARIANT.block_m], float("-inf"), tl.float32),
        tl.zeros([VARIANT.block_m], tl.float32),
        tl.zeros([VARIANT.block_m, VARIANT.block_dv], tl.float32),
    )
    state = loop_over_prompt_and_own_keys(
        _update, state, query_tile, key_values, layout, sequence, rows, tile, kv_head, split, scoring, VARIANT
    )
    row_max = state.row_max
    row_sum = state.row_sum
    rescale = 1.0
    if sinks is not None and VARIANT.splits == 1:
        row_max, row_sum = _add_sink(row_max, row_sum, tl.load(sinks + rows.head).to(tl.float32))
        rescale = tl.exp2(state.row_max - row_max)
    output_scale = tl.where(row_sum == 0, 0.0, rescale / row_sum)
    row_lse = tl.where(row_sum == 0, float("-inf"), row_max + tl.log2(row_sum))
    if VARIANT.splits > 1:
        batches = 1 if VARIANT.packed else layout.sequences
        rows = Rows(rows.batch + split * batches, rows.token, rows.head, rows.position, rows.valid)
    else:
        row_lse *= LN2
    store_tile(
        row_pointers(out, rows), state.output * output_scale[:, None], rows.valid, VARIANT.value_size, VARIANT.block_dv
    )
    tl.store(lse + row_index(layout, rows), row_lse, mask=rows.valid)


@profiled()
def merge_kernel(
    partial_out,
    partial_lse,
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
    """out and lse of `count` = B · Hq · M rows from those of the splits. Grid: (⌈count / BLOCK_M⌉,).

    partial_out [SPLITS, B, Hq, M, SIZE], partial_lse [SPLITS, B, Hq, M] base 2; out [B, Hq, M, SIZE], lse [B, Hq, M].
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < count
    token = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(SPLITS):
        split_lse = tl.load(partial_lse + split * tl.cast(count, tl.int64) + row, mask=valid, other=float("-inf"))
        row_max = tl.maximum(row_max, split_lse)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(SPLITS):
        at = split * tl.cast(count, tl.int64) + row
        weight = tl.exp2(tl.load(partial_lse + at, mask=valid, other=float("-inf")) - base)
        row_sum += weight
        output += weight[:, None] * load_tile(partial_out + at * SIZE, valid, SIZE, BLOCK_D, True)
    rescale = 1.0
    if sinks is not None:
        max_with_sink, row_sum = _add_sink(row_max, row_sum, tl.load(sinks + head).to(tl.float32))
        rescale = tl.exp2(base - max_with_sink)
        base = max_with_sink
    output *= tl.where(row_sum == 0, 0.0, rescale / row_sum)[:, None]
    rows = Rows(batch, token, head, token, valid)
    store_tile(row_pointers(out, rows), output, valid, SIZE, BLOCK_D)
    tl.store(lse + row, tl.where(row_sum == 0, float("-inf"), (base + tl.log2(row_sum)) * LN2), mask=valid)
