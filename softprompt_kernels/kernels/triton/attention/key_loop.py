"""The loop of a tile of rows over all keys that it sees, the prompt first: shared by the forward and dQ.

Key tiles that no row sees are skipped. Full tiles, where every row sees every key, need no mask; most tiles are full.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.addressing import (
    key_pointers,
    load_tile,
    pointer_to,
    position_span,
    sequence_of,
)
from softprompt_kernels.kernels.triton.attention.arguments import Keys
from softprompt_kernels.kernels.triton.attention.scores import position_mask


@triton.jit
def own_keys(key_values, sequence, kv_head, VARIANT: tl.constexpr):
    """The `Keys` of a sequence's own tokens."""
    key = pointer_to(key_values.key, sequence.batch, kv_head, sequence.first_key)
    value = pointer_to(key_values.value, sequence.batch, kv_head, sequence.first_key)
    return _keys(key, value, key_values.key.token_stride, key_values.value.token_stride, sequence.keys, 0, VARIANT)


@triton.jit
def prompt_keys(key_values, sequence, kv_head, VARIANT: tl.constexpr):
    """The `Keys` of the prompt that a sequence sees."""
    key = pointer_to(key_values.prompt_key, sequence.prompt, kv_head, 0)
    value = pointer_to(key_values.prompt_value, sequence.prompt, kv_head, 0)
    key_stride = key_values.prompt_key.token_stride
    value_stride = key_values.prompt_value.token_stride
    length = sequence.prompt_keys
    return _keys(key, value, key_stride, value_stride, length, length, VARIANT)


@triton.jit
def _keys(key, value, key_stride, value_stride, length, shift, VARIANT: tl.constexpr):
    if VARIANT.descriptors:
        key_block: tl.constexpr = [VARIANT.block_n, VARIANT.block_d]
        value_block: tl.constexpr = [VARIANT.block_n, VARIANT.block_dv]
        keys = tl.make_tensor_descriptor(key, [length, VARIANT.size], [key_stride, 1], key_block)
        values = tl.make_tensor_descriptor(value, [length, VARIANT.value_size], [value_stride, 1], value_block)
        return Keys(keys, values, key_stride, value_stride, length, shift)
    else:
        return Keys(key, value, key_stride, value_stride, length, shift)


@triton.jit
def seen_key_range(first, last, keys, scoring, split, VARIANT: tl.constexpr):
    """The keys that rows at positions [first, last] see: one of VARIANT.splits shares, as `split_range` returns it."""
    begin = 0
    end = keys.length
    full_begin = 0
    full_end = keys.length
    if VARIANT.causal:
        end = tl.minimum(end, last + keys.shift + 1)
        full_end = tl.minimum(end, first + keys.shift + 1)
    if VARIANT.windowed:
        begin = tl.maximum(0, first + keys.shift - scoring.window + 1)
        full_begin = tl.maximum(0, last + keys.shift - scoring.window + 1)
    return split_range(begin, end, full_begin, full_end, split, VARIANT.splits, VARIANT.block_n)


@triton.jit
def split_range(begin, end, full_begin, full_end, split, splits, BLOCK: tl.constexpr):
    """One of `splits` shares of the tiles of [begin, end), as (begin, full_begin, full_end, end).

    [begin, end) is what is seen at all, [full_begin, full_end) what is seen by every row (or sees every key). Returned
    are bounds of tiles: those that start in [full_begin, full_end) are full, those before and after need a mask.
    """
    end = tl.maximum(end, begin)
    first_full = tl.minimum(end, begin + tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK) * BLOCK)
    after_full = first_full + tl.maximum(full_end - first_full, 0) // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK), splits) * BLOCK
    begin = tl.minimum(end, begin + split * share)
    end = tl.minimum(end, begin + share)
    first_full = tl.minimum(end, tl.maximum(begin, first_full))
    after_full = tl.minimum(end, tl.maximum(first_full, after_full))
    return begin, first_full, after_full, end


@triton.jit
def loop_over_keys(
    STEP: tl.constexpr, state, rows, row_mask, keys, key_range, row_tile, scoring, VARIANT: tl.constexpr
):
    """The state after STEP on every key tile of `key_range`, which is what `seen_key_range` returns.

    STEP(state, row_tile, key, value, mask, scoring, MASKED, VARIANT) returns the next state. It gets keys [BLOCK_N, D]
    and values [BLOCK_N, Dv]. `row_mask` [BLOCK_M] says which rows see any of these keys; only masked tiles read it.
    """
    begin, full_begin, full_end, end = key_range
    if VARIANT.windowed:
        for start in tl.range(begin, full_begin, VARIANT.block_n):
            state = _step(STEP, state, rows, row_mask, keys, start, row_tile, scoring, True, VARIANT)
    for start in tl.range(full_begin, full_end, VARIANT.block_n):
        state = _step(STEP, state, rows, row_mask, keys, start, row_tile, scoring, False, VARIANT)
    for start in tl.range(full_end, end, VARIANT.block_n):
        state = _step(STEP, state, rows, row_mask, keys, start, row_tile, scoring, True, VARIANT)
    return state


@triton.jit
def _step(
    STEP: tl.constexpr,
    state,
    rows,
    row_mask,
    keys,
    start,
    row_tile,
    scoring,
    MASKED: tl.constexpr,
    VARIANT: tl.constexpr,
):
    index = start + tl.arange(0, VARIANT.block_n)
    exists = index < keys.length
    if VARIANT.descriptors:
        key = keys.key.load([start, 0])
        value = keys.value.load([start, 0])
    else:
        at_key = key_pointers(keys.key, keys.key_stride, start, VARIANT.block_n)
        at_value = key_pointers(keys.value, keys.value_stride, start, VARIANT.block_n)
        key = load_tile(at_key, exists, VARIANT.size, VARIANT.block_d, MASKED)
        value = load_tile(at_value, exists, VARIANT.value_size, VARIANT.block_dv, MASKED)
    mask = row_mask[:, None] & exists[None, :]
    if VARIANT.causal:
        mask = mask & position_mask(rows.position[:, None], (index - keys.shift)[None, :], scoring, VARIANT)
    return STEP(state, row_tile, key, value, mask, scoring, MASKED, VARIANT)


@triton.jit
def loop_over_prompt_and_own_keys(
    STEP: tl.constexpr,
    state,
    row_tile,
    key_values,
    layout,
    sequence,
    rows,
    tile,
    kv_head,
    split,
    scoring,
    VARIANT: tl.constexpr,
):
    """The state after the prompt keys and all own keys that the tile-th tile of a sequence's rows sees."""
    first, last = position_span(layout, sequence, tile, VARIANT)
    keys = prompt_keys(key_values, sequence, kv_head, VARIANT)
    key_range = seen_key_range(first, last, keys, scoring, split, VARIANT)
    state = loop_over_keys(STEP, state, rows, rows.valid, keys, key_range, row_tile, scoring, VARIANT)
    if VARIANT.stacked:
        first_query = tile * VARIANT.block_m // VARIANT.group
        last_query = tl.minimum(((tile + 1) * VARIANT.block_m - 1) // VARIANT.group, sequence.queries - 1)
        for batch in range(first_query // layout.queries, last_query // layout.queries + 1):
            keys = own_keys(key_values, sequence_of(layout, batch, VARIANT), kv_head, VARIANT)
            begin, _, _, end = seen_key_range(first, last, keys, scoring, split, VARIANT)
            of_batch = rows.valid & (rows.batch == batch)
            masked_range = (begin, begin, begin, end)
            state = loop_over_keys(STEP, state, rows, of_batch, keys, masked_range, row_tile, scoring, VARIANT)
    else:
        keys = own_keys(key_values, sequence, kv_head, VARIANT)
        key_range = seen_key_range(first, last, keys, scoring, split, VARIANT)
        state = loop_over_keys(STEP, state, rows, rows.valid, keys, key_range, row_tile, scoring, VARIANT)
    return state
