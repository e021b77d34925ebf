"""Attention over [prompt ; own tokens], backward: what is summed over keys, and what the sums over rows begin with.

With the joint out and lse of prompt and own keys each segment's gradient is that of ordinary attention:

    Δ = rowsum(dO ∘ out) − dlse          P = 2^(S₂ − log₂e · lse)
    dS = P ∘ (dO Vᵀ − Δ)                 dQ = scale · dS' K,   dS' = dS ∘ (1 − (S / softcap)²)

One kernel makes both, Δ first: its tile of out and dO is in registers already. A row that saw no key has lse −inf; its
P and dO are taken as 0, whatever dO holds.

Cost: 6 · rows · keys seen · D FLOP; a program reads its rows once, and once each key that they see.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.key_loop import sweep_all
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
from softprompt_kernels.kernels.triton.attention.scores import LOG2E, score, score_slope


class RowTile(NamedTuple):
    """What the gradient of a tile of rows is made of."""

    query: Any  # [BLOCK_M, BLOCK_D]
    grad_out: Any  # [BLOCK_M, BLOCK_DV]
    lse: Any  # [BLOCK_M] base 2, +inf where the row saw no key, so that its weights are 0
    delta: Any  # [BLOCK_M]


@triton.jit
def score_gradient(scores, products, lse, delta, mask, scoring, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """P and dS', from S₂ and dO Vᵀ; lse and delta broadcast to them."""
    weights = tl.exp2(scores - lse)
    gradient = weights * (products - delta)
    if VARIANT.capped:
        gradient *= score_slope(scores, scoring, VARIANT)
    if MASKED:
        weights = tl.where(mask, weights, 0.0)
        gradient = tl.where(mask, gradient, 0.0)
    return weights, gradient


@triton.jit
def _add(grad_query, tile, key, value, mask, scoring, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    scores = score(tile.query, tl.trans(key), scoring, VARIANT)
    products = tl.dot(tile.grad_out, tl.trans(value), input_precision=VARIANT.precision)
    _, gradient = score_gradient(
        scores, products, tile.lse[:, None], tile.delta[:, None], mask, scoring, MASKED, VARIANT
    )
    total = tl.dot(gradient.to(key.dtype), key, grad_query, input_precision=VARIANT.precision)
    if MASKED and VARIANT.stacked:  # a NaN of one sequence's keys is not to reach the rows of others
        total = tl.where((tl.max(mask.to(tl.int32), 1) > 0)[:, None], total, grad_query)
    return total


@triton.jit
def query_gradient_kernel(
    query,
    inputs,
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
    """Δ and, if it is needed, dQ of one tile of rows of one key head. Grid: (tiles, Hkv).

    query [B, Hq, M, D]; inputs: keys and values; out, grad_out [B, Hq, M, Dv]; lse, grad_lse (or None) [B, Hq, M];
    grad_query [B, Hq, M, D]; delta [B, Hq, M] fp32.
    """
    kv_head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if VARIANT.stacked:
        sequence = whole_batch(layout, VARIANT)
    else:
        s, tile = locate(layout, tile, layout.queries, VARIANT.group, VARIANT.block_m, VARIANT)
        if s > layout.sequences:
            return
        sequence = sequence_of(layout, s, VARIANT)
    rows = rows_of(layout, sequence, tile * VARIANT.block_m, kv_head, VARIANT)
    at = row_index(layout, rows)
    lse_tile = tl.load(lse + at, mask=rows.valid, other=float("-inf"))
    seen = lse_tile != float("-inf")
    left = load_tile(row_pointers(grad_out, rows), rows.valid & seen, VARIANT.value_size, VARIANT.block_dv, True)
    product = load_tile(row_pointers(out, rows), rows.valid, VARIANT.value_size, VARIANT.block_dv, True).to(tl.float32)
    row_delta = tl.sum(product * left.to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + at, mask=rows.valid & seen, other=0.0)
    tl.store(delta + at, row_delta, mask=rows.valid)
    if NEED_QUERY:
        right = load_tile(row_pointers(query, rows), rows.valid, VARIANT.size, VARIANT.block_d, True)
        row_tile = RowTile(right, left, tl.where(seen, lse_tile * LOG2E, float("inf")), row_delta)
        total = tl.zeros([VARIANT.block_m, VARIANT.block_d], tl.float32)
        total = sweep_all(_add, total, row_tile, inputs, layout, sequence, rows, tile, kv_head, 0, scoring, VARIANT)
        pointers = row_pointers(grad_query, rows)
        store_tile(pointers, total * scoring.scale, rows.valid, VARIANT.size, VARIANT.block_d)
