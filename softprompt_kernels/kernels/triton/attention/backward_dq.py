"""Attention over [prompt ; own tokens], backward: dQ, which sums over keys, and the Δ that dK and dV need too.

With the joint out and lse over prompt and own keys, the gradient of each segment is that of ordinary attention:

    Δ = rowsum(dO ∘ out) − dlse          P = 2^(S₂ − log₂e · lse)          dP = dO Vᵀ
    dS = P ∘ (dP − Δ)                    dQ = scale · dS' K,   dS' = dS ∘ (1 − (S / softcap)²)

One kernel computes Δ and dQ: the O tile and the dO tile are in registers anyway. A row that saw no key has lse −inf;
its P is 0 and its dO is taken as 0, whatever dO holds.

Cost: 6 · rows · keys seen · D FLOP. A program reads its rows once, and every key that they see once.
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
from softprompt_kernels.kernels.triton.attention.key_loop import loop_over_prompt_and_own_keys
from softprompt_kernels.kernels.triton.attention.scores import LOG2E, score, score_slope
from softprompt_kernels.kernels.triton.attention.work import backward_dq_flop
from softprompt_kernels.kernels.triton.profiled import profiled


class RowTile(NamedTuple):
    """What dQ of a tile of rows is computed from, besides the keys."""

    query: Any  # [BLOCK_M, BLOCK_D]
    grad_out: Any  # [BLOCK_M, BLOCK_DV]
    lse: Any  # [BLOCK_M] base 2; +inf where the row saw no key, so that its weights are 0
    delta: Any  # [BLOCK_M]


@triton.jit
def score_gradient(scores, grad_weights, lse, delta, mask, scoring, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """P and dS' from S₂ and dP = dO Vᵀ; lse (base 2) and delta broadcast to their shape."""
    weights = tl.exp2(scores - lse)
    grad_scores = weights * (grad_weights - delta)
    if VARIANT.capped:
        grad_scores *= score_slope(scores, scoring, VARIANT)
    if MASKED:
        weights = tl.where(mask, weights, 0.0)
        grad_scores = tl.where(mask, grad_scores, 0.0)
    return weights, grad_scores


@triton.jit
def _add_key_tile(grad_query, row_tile, key, value, mask, scoring, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """dQ / scale with the part of one key tile added."""
    scores = score(row_tile.query, tl.trans(key), scoring, VARIANT)
    grad_weights = tl.dot(row_tile.grad_out, tl.trans(value), input_precision=VARIANT.precision)
    _, grad_scores = score_gradient(
        scores, grad_weights, row_tile.lse[:, None], row_tile.delta[:, None], mask, scoring, MASKED, VARIANT
    )
    added = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=VARIANT.precision)
    if MASKED and VARIANT.stacked:  # keeps a NaN in one sequence's keys out of the rows of other sequences
        added = tl.where((tl.max(mask.to(tl.int32), 1) > 0)[:, None], added, grad_query)
    return added


@profiled(backward_dq_flop)
def backward_dq_kernel(
    query,
    key_values,
    out,
    grad_out,
    lse,
    grad_lse,
    grad_query,
    delta,
    layout,
    scoring,
    NEED_QUERY: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Δ and, with NEED_QUERY, dQ of one tile of rows of one key head. Grid: (row tiles, Hkv).

    query [B, Hq, M, D]; key_values: keys and values; out, grad_out [B, Hq, M, Dv]; lse, grad_lse (or None) [B, Hq, M];
    grad_query [B, Hq, M, D]; delta [B, Hq, M] fp32.
    """
    kv_head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # as in the forward
    if VARIANT.stacked:
        sequence = stacked_sequences(layout, VARIANT)
    else:
        s, tile = locate_tile(layout, tile, layout.queries, VARIANT.group, VARIANT.block_m, VARIANT)
        if s > layout.sequences:
            return
        sequence = sequence_of(layout, s, VARIANT)
    rows = rows_of(layout, sequence, tile * VARIANT.block_m, kv_head, VARIANT)
    at = row_index(layout, rows)
    row_lse = tl.load(lse + at, mask=rows.valid, other=float("-inf"))
    has_keys = row_lse != float("-inf")
    grad_out_tile = load_tile(
        row_pointers(grad_out, rows), rows.valid & has_keys, VARIANT.value_size, VARIANT.block_dv, True
    )
    out_tile = load_tile(row_pointers(out, rows), rows.valid, VARIANT.value_size, VARIANT.block_dv, True).to(tl.float32)
    row_delta = tl.sum(out_tile * grad_out_tile.to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + at, mask=rows.valid & has_keys, other=0.0)
    tl.store(delta + at, row_delta, mask=rows.valid)
    if NEED_QUERY:
        query_tile = load_tile(row_pointers(query, rows), rows.valid, VARIANT.size, VARIANT.block_d, True)
        row_tile = RowTile(query_tile, grad_out_tile, tl.where(has_keys, row_lse * LOG2E, float("inf")), row_delta)
        accumulator = tl.zeros([VARIANT.block_m, VARIANT.block_d], tl.float32)
        accumulator = loop_over_prompt_and_own_keys(
            _add_key_tile, accumulator, row_tile, key_values, layout, sequence, rows, tile, kv_head, 0, scoring, VARIANT
        )
        pointers = row_pointers(grad_query, rows)
        store_tile(pointers, accumulator * scoring.scale, rows.valid, VARIANT.size, VARIANT.block_d)
