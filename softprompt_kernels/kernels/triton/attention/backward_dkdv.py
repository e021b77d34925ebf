"""Attention over [prompt ; own tokens], backward: what is summed over rows, dK and dV of own keys and of prompts.

With P, Δ and dS' as in `attention_query_gradient`,

    dV = Pᵀ dO,      dK = scale · dS'ᵀ Q

over every row that sees the key: for own keys those of one sequence, for a prompt those of all sequences that see it.
So one kernel serves both: a program has a tile of keys, and walks over sequences and over tiles of their rows. The rows
of a prompt are shared out to `splits` programs, so that short prompts fill the machine too; each leaves its sums in
fp32, and `fold_kernel` adds these in order. Prompt gradients are so summed in fp32, in the same order at every run,
and no buffer has a batch of prompts. Where every row sees the whole prompt and there is just one, the rows of the whole
batch are one run, and no tile of them is part empty.

Cost: 8 · rows · keys seen · D FLOP; a program reads its keys once, and once each row that sees them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.backward_dq import score_gradient
from softprompt_kernels.kernels.triton.attention.key_loop import own_keys, prompt_keys, share_of
from softprompt_kernels.kernels.triton.attention.records import Sequence
from softprompt_kernels.kernels.triton.attention.rows import (
    key_pointers,
    load_tile,
    locate,
    pointer_to,
    prompt_length,
    prompt_of,
    row_index,
    row_pointers,
    rows_of,
    sequence_of,
    store_tile,
)
from softprompt_kernels.kernels.triton.attention.scores import LOG2E, score, visible


class KeyTile(NamedTuple):
    """A tile of keys that gradients are summed for."""

    key: Any  # [BLOCK_N, BLOCK_D]
    value: Any  # [BLOCK_N, BLOCK_DV]
    position: Any  # [BLOCK_N], counted from the first own key of whoever sees it
    exists: Any  # [BLOCK_N], it is no padding
    first: Any  # position of the first and of the last that exists
    last: Any


class RowTensors(NamedTuple):
    """What is read of every row."""

    query: Any  # Strided
    grad_out: Any  # Strided
    lse: Any  # [B, Hq, M]
    delta: Any  # [B, Hq, M]


class Sums(NamedTuple):
    """dK / scale and dV of a tile of keys."""

    key: Any  # [BLOCK_N, BLOCK_D]
    value: Any  # [BLOCK_N, BLOCK_DV]


@triton.jit
def _rows_that_see(tile, sequence, scoring, part, parts, VARIANT: tl.constexpr):
    """The rows of a sequence that see a tile of keys, as `share_of` says it."""
    begin = 0
    end = sequence.queries
    begin_of_all = 0
    end_of_all = sequence.queries
    if VARIANT.causal:
        begin = tl.minimum(end, tl.maximum(0, tile.first - sequence.offset))
        begin_of_all = tl.maximum(0, tile.last - sequence.offset)
    if VARIANT.windowed:
        end = tl.minimum(end, tile.last - sequence.offset + scoring.window)
        end_of_all = tl.minimum(end, tile.first - sequence.offset + scoring.window)
    group = VARIANT.group
    return share_of(begin * group, end * group, begin_of_all * group, end_of_all * group, part, parts, VARIANT.block_m)


@triton.jit
def _add(
    sums,
    tile,
    start,
    tensors,
    layout,
    sequence,
    kv_head,
    scoring,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """`sums` and what the tile of a sequence's rows at `start` adds to them."""
    rows = rows_of(layout, sequence, start, kv_head, VARIANT)
    at = row_index(layout, rows)
    if MASKED:
        lse = tl.load(tensors.lse + at, mask=rows.valid, other=float("-inf"))
        delta = tl.load(tensors.delta + at, mask=rows.valid, other=0.0)
        seen = lse != float("-inf")
        lse = tl.where(seen, lse, float("inf"))
    else:
        lse = tl.load(tensors.lse + at)
        delta = tl.load(tensors.delta + at)
        seen = rows.valid
    query = load_tile(row_pointers(tensors.query, rows), rows.valid, VARIANT.size, VARIANT.block_d, MASKED)
    grad_out = load_tile(row_pointers(tensors.grad_out, rows), seen, VARIANT.value_size, VARIANT.block_dv, MASKED)
    mask = seen[None, :] & tile.exists[:, None]
    if VARIANT.causal:
        mask = mask & visible(rows.relative[None, :], tile.position[:, None], scoring, VARIANT)
    scores = score(tile.key, tl.trans(query), scoring, VARIANT)
    products = tl.dot(tile.value, tl.trans(grad_out), input_precision=VARIANT.precision)
    weights, gradient = score_gradient(
        scores, products, lse[None, :] * LOG2E, delta[None, :], mask, scoring, MASKED, VARIANT
    )
    grad_key = sums.key
    grad_value = sums.value
    if NEED_VALUE:
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=VARIANT.precision)
    if NEED_KEY:
        grad_key = tl.dot(gradient.to(query.dtype), query, grad_key, input_precision=VARIANT.precision)
    return Sums(grad_key, grad_value)


@triton.jit
def key_gradients_kernel(
    tensors,
    inputs,
    gradients,
    layout,
    own_tiles,
    scoring,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """dK and dV of one tile of own keys, or of one tile of a prompt's keys from a share of its rows.

    Grid: (own tiles + R · splits · prompt tiles, Hkv). tensors: what is read of rows; inputs: keys and values;
    gradients: shaped as those, None where not needed; with splits those of prompts are fp32 parts
    [splits · R, Hkv, P, D or Dv].
    """
    kv_head = tl.program_id(1)
    index = tl.program_id(0)
    own = index < own_tiles
    s, own_tile = locate(layout, tl.where(own, index, 0), layout.keys, 1, VARIANT.block_n, VARIANT)
    prompt_tiles = tl.maximum(tl.cdiv(layout.prompt_keys, VARIANT.block_n), 1)
    rest = tl.maximum(index - own_tiles, 0)
    part = rest // prompt_tiles % VARIANT.splits
    prompt = rest // prompt_tiles // VARIANT.splits
    one = sequence_of(layout, tl.minimum(s, layout.sequences), VARIANT)
    if own:
        keys = own_keys(inputs, one, kv_head, VARIANT)
        tokens = one.queries if VARIANT.packed else layout.keys
        tokens = tl.where(s > layout.sequences, 0, tokens)
        start = own_tile * VARIANT.block_n
        first_sequence = s
        last_sequence = s + 1
        parts = 1
        part = 0
    else:
        count = prompt_length(layout, prompt)
        keys = prompt_keys(inputs, Sequence(0, 0, 0, 0, 0, 0, prompt, count), kv_head, VARIANT)
        tokens = layout.prompt_keys
        start = rest % prompt_tiles * VARIANT.block_n
        first_sequence = 0
        last_sequence = tl.minimum(layout.sequences, 1) if VARIANT.stacked else layout.sequences
        parts = VARIANT.splits
    at = start + tl.arange(0, VARIANT.block_n)
    exists = at < keys.count
    key_at = key_pointers(keys.key, keys.key_token, start, VARIANT.block_n)
    value_at = key_pointers(keys.value, keys.value_token, start, VARIANT.block_n)
    tile = KeyTile(
        load_tile(key_at, exists, VARIANT.size, VARIANT.block_d, True),
        load_tile(value_at, exists, VARIANT.value_size, VARIANT.block_dv, True),
        at - keys.shift,
        exists,
        start - keys.shift,
        tl.minimum(start + VARIANT.block_n, keys.count) - 1 - keys.shift,
    )
    sums = Sums(
        tl.zeros([VARIANT.block_n, VARIANT.block_d], tl.float32),
        tl.zeros([VARIANT.block_n, VARIANT.block_dv], tl.float32),
    )
    last_sequence = tl.where(start < keys.count, last_sequence, first_sequence)
    for member in range(first_sequence, last_sequence):
        if own | (prompt_of(layout, member) == prompt):
            sequence = sequence_of(layout, member, VARIANT)
            if VARIANT.stacked:
                sequence = _whole_batch_for_prompts(layout, sequence, own)
            turn = (part + member) % parts  # so that short sequences do not all fall to the first program
            begin, lead, tail, end = _rows_that_see(tile, sequence, scoring, turn, parts, VARIANT)
            for row in tl.range(begin, lead, VARIANT.block_m):
                sums = _add(
                    sums, tile, row, tensors, layout, sequence, kv_head, scoring, NEED_KEY, NEED_VALUE, True, VARIANT
                )
            for row in tl.range(lead, tail, VARIANT.block_m):
                sums = _add(
                    sums, tile, row, tensors, layout, sequence, kv_head, scoring, NEED_KEY, NEED_VALUE, False, VARIANT
                )
            for row in tl.range(tail, end, VARIANT.block_m):
                sums = _add(
                    sums, tile, row, tensors, layout, sequence, kv_head, scoring, NEED_KEY, NEED_VALUE, True, VARIANT
                )
    # Padding is given a gradient of 0: nobody else writes there.
    grad_key = tl.where(exists[:, None], sums.key * scoring.scale, 0.0)
    grad_value = tl.where(exists[:, None], sums.value, 0.0)
    inside = at < tokens
    size: tl.constexpr = VARIANT.size
    value_size: tl.constexpr = VARIANT.value_size
    if own:
        _store(gradients.key, one.batch, kv_head, one.first_key + at, grad_key, inside, size, VARIANT.block_d)
        _store(
            gradients.value, one.batch, kv_head, one.first_key + at, grad_value, inside, value_size, VARIANT.block_dv
        )
    else:
        slot = rest // prompt_tiles % VARIANT.splits * layout.prompts + prompt
        _store(gradients.prompt_key, slot, kv_head, at, grad_key, inside, size, VARIANT.block_d)
        _store(gradients.prompt_value, slot, kv_head, at, grad_value, inside, value_size, VARIANT.block_dv)


@triton.jit
def _store(tensor, batch, head, token, tile, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one head of a tensor, if it is there."""
    if tensor is not None:
        store_tile(pointer_to(tensor, batch, head, token), tile, inside, SIZE, BLOCK)


@triton.jit
def _whole_batch_for_prompts(layout, sequence, own):
    """The sequence whose own keys a program has, or else all sequences as one."""
    return Sequence(
        tl.where(own, sequence.first, 0),
        tl.where(own, sequence.queries, layout.sequences * layout.queries),
        sequence.batch,
        sequence.first_key,
        sequence.keys,
        sequence.offset,
        sequence.prompt,
        sequence.prompt_keys,
    )


@triton.jit
def fold_kernel(
    parts,
    gradients,
    lse,
    delta,
    sinks,
    grad_sinks,
    layout,
    prompt_tiles,
    kv_heads,
    batches,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Sums what programs left in parts, in order, and dsinks. Grid: (R · Hkv · prompt tiles + Hq,).

    parts: dK and dV of prompts [SPLITS · R, Hkv, P, D or Dv] fp32; gradients: the same [R, Hkv, P, D or Dv]; lse, delta
    [B, Hq, M]; sinks, grad_sinks [Hq] or None, then the grid's last Hq programs are not there.

        dsink = − Σ 2^(log₂e (sink − lse)) Δ
    """
    index = tl.program_id(0)
    folds = layout.prompts * kv_heads * prompt_tiles
    if index < folds:
        at = index % prompt_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        head = index // prompt_tiles % kv_heads
        prompt = index // prompt_tiles // kv_heads
        inside = at < layout.prompt_keys
        if gradients.prompt_key is not None:
            sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for part in range(SPLITS):
                pointers = pointer_to(parts.prompt_key, part * layout.prompts + prompt, head, at)
                sums += load_tile(pointers, inside, SIZE, BLOCK_D, True)
            store_tile(pointer_to(gradients.prompt_key, prompt, head, at), sums, inside, SIZE, BLOCK_D)
        if gradients.prompt_value is not None:
            sums = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            for part in range(SPLITS):
                pointers = pointer_to(parts.prompt_value, part * layout.prompts + prompt, head, at)
                sums += load_tile(pointers, inside, VALUE_SIZE, BLOCK_DV, True)
            store_tile(pointer_to(gradients.prompt_value, prompt, head, at), sums, inside, VALUE_SIZE, BLOCK_DV)
    elif grad_sinks is not None:
        head = index - folds
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, batches * layout.queries, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            inside = row < batches * layout.queries
            at = (row // layout.queries).to(tl.int64) * layout.heads * layout.queries
            at += head * layout.queries + row % layout.queries
            row_lse = tl.load(lse + at, mask=inside, other=float("-inf"))
            seen = row_lse != float("-inf")
            share = tl.exp2(sink - tl.where(seen, row_lse * LOG2E, float("inf")))
            total -= share * tl.load(delta + at, mask=inside, other=0.0)
        tl.store(grad_sinks + head, tl.sum(total, 0).to(grad_sinks.dtype.element_ty))
