"""A sweep of a tile of rows over all keys that it sees, prompt first: what forward and dQ have in common.

Tiles of keys that no row sees are not touched; those that every row sees whole, which are most, pay no mask.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.records import Keys
from softprompt_kernels.kernels.triton.attention.rows import key_pointers, load_tile, pointer_to, row_span, sequence_of
from softprompt_kernels.kernels.triton.attention.scores import visible


@triton.jit
def own_keys(inputs, sequence, kv_head, VARIANT: tl.constexpr):
    """A sequence's own keys."""
    key = pointer_to(inputs.key, sequence.batch, kv_head, sequence.first_key)
    value = pointer_to(inputs.value, sequence.batch, kv_head, sequence.first_key)
    return _keys(key, value, inputs.key.token, inputs.value.token, sequence.keys, 0, VARIANT)


@triton.jit
def prompt_keys(inputs, sequence, kv_head, VARIANT: tl.constexpr):
    """The keys of the prompt that a sequence sees."""
    key = pointer_to(inputs.prompt_key, sequence.prompt, kv_head, 0)
    value = pointer_to(inputs.prompt_value, sequence.prompt, kv_head, 0)
    count = sequence.prompt_keys
    return _keys(key, value, inputs.prompt_key.token, inputs.prompt_value.token, count, count, VARIANT)


@triton.jit
def _keys(key, value, key_token, value_token, count, shift, VARIANT: tl.constexpr):
    if VARIANT.descriptors:
        key_block: tl.constexpr = [VARIANT.block_n, VARIANT.block_d]
        value_block: tl.constexpr = [VARIANT.block_n, VARIANT.block_dv]
        keys = tl.make_tensor_descriptor(key, [count, VARIANT.size], [key_token, 1], key_block)
        values = tl.make_tensor_descriptor(value, [count, VARIANT.value_size], [value_token, 1], value_block)
        return Keys(keys, values, key_token, value_token, count, shift)
    else:
        return Keys(key, value, key_token, value_token, count, shift)


@triton.jit
def seen_range(first, last, keys, scoring, split, VARIANT: tl.constexpr):
    """Which keys rows at [first, last] see, as `share_of` says it.

    The share of one of VARIANT.splits programs.
    """
    begin = 0
    end = keys.count
    begin_of_all = 0
    end_of_all = keys.count
    if VARIANT.causal:
        end = tl.minimum(end, last + keys.shift + 1)
        end_of_all = tl.minimum(end, first + keys.shift + 1)
    if VARIANT.windowed:
        begin = tl.maximum(0, first + keys.shift - scoring.window + 1)
        begin_of_all = tl.maximum(0, last + keys.shift - scoring.window + 1)
    return share_of(begin, end, begin_of_all, end_of_all, split, VARIANT.splits, VARIANT.block_n)


@triton.jit
def share_of(begin, end, begin_of_all, end_of_all, part, parts, BLOCK: tl.constexpr):
    """Tiles from `begin` on, as (begin, lead, tail, end) of one of `parts` shares of them.

    Those that start in [lead, tail) lie in [begin_of_all, end_of_all); those before and after them need a mask.
    """
    end = tl.maximum(end, begin)
    lead = tl.minimum(end, begin + tl.cdiv(tl.maximum(begin_of_all - begin, 0), BLOCK) * BLOCK)
    tail = lead + tl.maximum(end_of_all - lead, 0) // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK), parts) * BLOCK
    begin = tl.minimum(end, begin + part * share)
    end = tl.minimum(end, begin + share)
    lead = tl.minimum(end, tl.maximum(begin, lead))
    tail = tl.minimum(end, tl.maximum(lead, tail))
    return begin, lead, tail, end


@triton.jit
def sweep(STEP: tl.constexpr, state, rows, own, keys, seen, tile, scoring, VARIANT: tl.constexpr):
    """`state` after STEP on every tile of keys that the rows see.

    STEP(state, tile, key, value, mask, scoring, MASKED, VARIANT) is given keys [BLOCK_N, D] and values [BLOCK_N, Dv].
    `own` [BLOCK_M] says which rows see these keys at all, and is read in masked tiles only.
    """
    begin, lead, tail, end = seen
    if VARIANT.windowed:
        for start in tl.range(begin, lead, VARIANT.block_n):
            state = _step(STEP, state, rows, own, keys, start, tile, scoring, True, VARIANT)
    for start in tl.range(lead, tail, VARIANT.block_n):
        state = _step(STEP, state, rows, own, keys, start, tile, scoring, False, VARIANT)
    for start in tl.range(tail, end, VARIANT.block_n):
        state = _step(STEP, state, rows, own, keys, start, tile, scoring, True, VARIANT)
    return state


@triton.jit
def _step(
    STEP: tl.constexpr,
    state,
    rows,
    own,
    keys,
    start,
    tile,
    scoring,
    MASKED: tl.constexpr,
    VARIANT: tl.constexpr,
):
    index = start + tl.arange(0, VARIANT.block_n)
    exists = index < keys.count
    if VARIANT.descriptors:
        key = keys.key.load([start, 0])
        value = keys.value.load([start, 0])
    else:
        at_key = key_pointers(keys.key, keys.key_token, start, VARIANT.block_n)
        at_value = key_pointers(keys.value, keys.value_token, start, VARIANT.block_n)
        key = load_tile(at_key, exists, VARIANT.size, VARIANT.block_d, MASKED)
        value = load_tile(at_value, exists, VARIANT.value_size, VARIANT.block_dv, MASKED)
    mask = own[:, None] & exists[None, :]
    if VARIANT.causal:
        mask = mask & visible(rows.relative[:, None], (index - keys.shift)[None, :], scoring, VARIANT)
    return STEP(state, tile, key, value, mask, scoring, MASKED, VARIANT)


@triton.jit
def sweep_all(
    STEP: tl.constexpr,
    state,
    tile,
    inputs,
    layout,
    sequence,
    rows,
    index,
    kv_head,
    split,
    scoring,
    VARIANT: tl.constexpr,
):
    """`state` after the prompt and all own keys that the index-th tile of a sequence's rows sees."""
    first, last = row_span(layout, sequence, index, VARIANT)
    keys = prompt_keys(inputs, sequence, kv_head, VARIANT)
    seen = seen_range(first, last, keys, scoring, split, VARIANT)
    state = sweep(STEP, state, rows, rows.valid, keys, seen, tile, scoring, VARIANT)
    if VARIANT.stacked:
        first_query = index * VARIANT.block_m // VARIANT.group
        last_query = tl.minimum(((index + 1) * VARIANT.block_m - 1) // VARIANT.group, sequence.queries - 1)
        for batch in range(first_query // layout.queries, last_query // layout.queries + 1):
            keys = own_keys(inputs, sequence_of(layout, batch, VARIANT), kv_head, VARIANT)
            begin, _, _, end = seen_range(first, last, keys, scoring, split, VARIANT)
            own = rows.valid & (rows.batch == batch)
            state = sweep(STEP, state, rows, own, keys, (begin, begin, begin, end), tile, scoring, VARIANT)
    else:
        keys = own_keys(inputs, sequence, kv_head, VARIANT)
        seen = seen_range(first, last, keys, scoring, split, VARIANT)
        state = sweep(STEP, state, rows, rows.valid, keys, seen, tile, scoring, VARIANT)
    return state
