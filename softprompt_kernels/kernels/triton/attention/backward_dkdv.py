"""Attention over [prompt ; own tokens], backward: dK and dV of own keys and of prompts, which sum over rows.

With P, Δ and dS' as in `backward_dq.py`,

    dV = Pᵀ dO,      dK = scale · dS'ᵀ Q

over every row that sees the key: the rows of one sequence for own keys, the rows of all sequences that see the prompt
for prompt keys. One kernel serves both: a program holds a key tile and loops over sequences and over tiles of their
rows.

`splits` programs share the rows of a prompt's key tile, so that short prompts fill the machine too. Each of them writes
fp32 partial sums, and `reduce_splits_kernel` adds these up in order. So prompt gradients are summed in fp32, in the
same order in every run, and no buffer holds one prompt per sequence. Where there is just one prompt and every row sees
all of it, the rows of all sequences are stacked, so only the last tile of rows is partly empty.

Grid: program_id(0) counts first the tiles of own keys, then the tiles of prompt keys; program_id(1) is the kv head.

    index = program_id(0)
    own keys     (index < own_tiles):      index             = sequence · tiles + tile
    prompt keys  (rest of the programs):   index − own_tiles = (prompt · splits + split) · prompt_tiles + tile

So the tile counts fastest, then the split, then the prompt, and the kv head slowest (GPUs start axis 0 first). Programs
that run at the same time have neighbouring tiles of the same sequence, or of the same split of the same prompt: they
read the same rows of Q and dO, which then come from the L2 cache. (In the packed form sequences have different numbers
of own tiles, and `locate_tile` finds the sequence.)

Cost: 8 · rows · keys seen · D FLOP. A program reads its keys once, and every row that sees them once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.addressing import (
    key_pointers,
    load_tile,
    locate_tile,
    pointer_to,
    prompt_length,
    prompt_of,
    row_index,
    row_pointers,
    rows_of,
    sequence_of,
    store_tile,
)
from softprompt_kernels.kernels.triton.attention.arguments import Sequence
from softprompt_kernels.kernels.triton.attention.backward_dq import score_gradient
from softprompt_kernels.kernels.triton.attention.key_loop import own_keys, prompt_keys, split_range
from softprompt_kernels.kernels.triton.attention.scores import LOG2E, position_mask, score
from softprompt_kernels.kernels.triton.attention.work import backward_dkdv_flop
from softprompt_kernels.kernels.triton.profiled import profiled


class KeyTile(NamedTuple):
    """A tile of keys whose gradients a program computes."""

    key: Any  # [BLOCK_N, BLOCK_D]
    value: Any  # [BLOCK_N, BLOCK_DV]
    position: Any  # [BLOCK_N], counted from the first own key of the sequence that sees it
    exists: Any  # [BLOCK_N], false for padding
    first: Any  # positions of the first key and of the last that exists
    last: Any


class RowTensors(NamedTuple):
    """What the kernel reads of every row."""

    query: Any  # Strided
    grad_out: Any  # Strided
    lse: Any  # [B, Hq, M]
    delta: Any  # [B, Hq, M]


class Accumulators(NamedTuple):
    """dK / scale and dV of a tile of keys."""

    key: Any  # [BLOCK_N, BLOCK_D]
    value: Any  # [BLOCK_N, BLOCK_DV]


@triton.jit
def _seeing_row_range(key_tile, sequence, scoring, split, splits, VARIANT: tl.constexpr):
    """The rows of a sequence that see a key tile: one of `splits` shares, as `split_range` returns it."""
    begin = 0
    end = sequence.queries
    full_begin = 0
    full_end = sequence.queries
    if VARIANT.causal:
        begin = tl.minimum(end, tl.maximum(0, key_tile.first - sequence.offset))
        full_begin = tl.maximum(0, key_tile.last - sequence.offset)
    if VARIANT.windowed:
        end = tl.minimum(end, key_tile.last - sequence.offset + scoring.window)
        full_end = tl.minimum(end, key_tile.first - sequence.offset + scoring.window)
    group = VARIANT.group
    return split_range(begin * group, end * group, full_begin * group, full_end * group, split, splits, VARIANT.block_m)


@triton.jit
def _add_row_tile(
    accumulators,
    key_tile,
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
    """The accumulators with the part of the tile of a sequence's rows at `start` added."""
    rows = rows_of(layout, sequence, start, kv_head, VARIANT)
    at = row_index(layout, rows)
    if MASKED:
        lse = tl.load(tensors.lse + at, mask=rows.valid, other=float("-inf"))
        delta = tl.load(tensors.delta + at, mask=rows.valid, other=0.0)
        has_keys = lse != float("-inf")
        lse = tl.where(has_keys, lse, float("inf"))
    else:
        lse = tl.load(tensors.lse + at)
        delta = tl.load(tensors.delta + at)
        has_keys = rows.valid
    query = load_tile(row_pointers(tensors.query, rows), rows.valid, VARIANT.size, VARIANT.block_d, MASKED)
    grad_out = load_tile(row_pointers(tensors.grad_out, rows), has_keys, VARIANT.value_size, VARIANT.block_dv, MASKED)
    mask = has_keys[None, :] & key_tile.exists[:, None]
    if VARIANT.causal:
        mask = mask & position_mask(rows.position[None, :], key_tile.position[:, None], scoring, VARIANT)
    scores = score(key_tile.key, tl.trans(query), scoring, VARIANT)
    grad_weights = tl.dot(key_tile.value, tl.trans(grad_out), input_precision=VARIANT.precision)
    weights, grad_scores = score_gradient(
        scores, grad_weights, lse[None, :] * LOG2E, delta[None, :], mask, scoring, MASKED, VARIANT
    )
    grad_key = accumulators.key
    grad_value = accumulators.value
    if NEED_VALUE:
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=VARIANT.precision)
    if NEED_KEY:
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=VARIANT.precision)
    return Accumulators(grad_key, grad_value)


@profiled(backward_dkdv_flop)
def backward_dkdv_kernel(
    tensors,
    key_values,
    gradients,
    layout,
    own_tiles,
    scoring,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """dK and dV of one tile of own keys, or of one tile of a prompt's keys from one split of its rows.

    Grid: (own tiles + R · splits · prompt tiles, Hkv), in the order that the head of this file gives.

    tensors: what is read of rows; key_values: keys and values; gradients: shaped as these, None where not needed. With
    splits > 1 the gradients of prompts are fp32 partial sums [splits · R, Hkv, P, D or Dv].
    """
    kv_head = tl.program_id(1)
    index = tl.program_id(0)
    is_own = index < own_tiles
    s, own_tile = locate_tile(layout, tl.where(is_own, index, 0), layout.keys, 1, VARIANT.block_n, VARIANT)
    prompt_tiles = tl.maximum(tl.cdiv(layout.prompt_keys, VARIANT.block_n), 1)
    prompt_program = tl.maximum(index - own_tiles, 0)
    split = prompt_program // prompt_tiles % VARIANT.splits
    prompt = prompt_program // prompt_tiles // VARIANT.splits
    own_sequence = sequence_of(layout, tl.minimum(s, layout.sequences), VARIANT)
    if is_own:
        keys = own_keys(key_values, own_sequence, kv_head, VARIANT)
        tokens = own_sequence.queries if VARIANT.packed else layout.keys
        tokens = tl.where(s > layout.sequences, 0, tokens)  # S + 1: there is no such tile
        start = own_tile * VARIANT.block_n
        first_sequence = s
        last_sequence = s + 1
        splits = 1
        split = 0
    else:
        length = prompt_length(layout, prompt)
        # Only the prompt and its length are read.
        keys = prompt_keys(key_values, Sequence(0, 0, 0, 0, 0, 0, prompt, length), kv_head, VARIANT)
        tokens = layout.prompt_keys
        start = prompt_program % prompt_tiles * VARIANT.block_n
        first_sequence = 0
        last_sequence = tl.minimum(layout.sequences, 1) if VARIANT.stacked else layout.sequences
        splits = VARIANT.splits
    at = start + tl.arange(0, VARIANT.block_n)
    exists = at < keys.length
    key_at = key_pointers(keys.key, keys.key_stride, start, VARIANT.block_n)
    value_at = key_pointers(keys.value, keys.value_stride, start, VARIANT.block_n)
    key_tile = KeyTile(
        load_tile(key_at, exists, VARIANT.size, VARIANT.block_d, True),
        load_tile(value_at, exists, VARIANT.value_size, VARIANT.block_dv, True),
        at - keys.shift,
        exists,
        start - keys.shift,
        tl.minimum(start + VARIANT.block_n, keys.length) - 1 - keys.shift,
    )
    accumulators = Accumulators(
        tl.zeros([VARIANT.block_n, VARIANT.block_d], tl.float32),
        tl.zeros([VARIANT.block_n, VARIANT.block_dv], tl.float32),
    )
    last_sequence = tl.where(start < keys.length, last_sequence, first_sequence)
    for member in range(first_sequence, last_sequence):
        if is_own | (prompt_of(layout, member) == prompt):
            sequence = sequence_of(layout, member, VARIANT)
            if VARIANT.stacked:
                sequence = _stacked_for_prompts(layout, sequence, is_own)
            turn = (split + member) % splits  # so that short sequences do not all fall to the first split
            begin, full_begin, full_end, end = _seeing_row_range(key_tile, sequence, scoring, turn, splits, VARIANT)
            for row in tl.range(begin, full_begin, VARIANT.block_m):
                accumulators = _add_row_tile(
                    accumulators, key_tile, row, tensors, layout, sequence, kv_head, scoring, NEED_KEY, NEED_VALUE,
                    True, VARIANT,
                )  # fmt: skip
            for row in tl.range(full_begin, full_end, VARIANT.block_m):
                accumulators = _add_row_tile(
                    accumulators, key_tile, row, tensors, layout, sequence, kv_head, scoring, NEED_KEY, NEED_VALUE,
                    False, VARIANT,
                )  # fmt: skip
            for row in tl.range(full_end, end, VARIANT.block_m):
                accumulators = _add_row_tile(
                    accumulators, key_tile, row, tensors, layout, sequence, kv_head, scoring, NEED_KEY, NEED_VALUE,
                    True, VARIANT,
                )  # fmt: skip
    # Padding gets a gradient of 0 here: nothing else writes it.
    grad_key = tl.where(exists[:, None], accumulators.key * scoring.scale, 0.0)
    grad_value = tl.where(exists[:, None], accumulators.value, 0.0)
    inside = at < tokens
    size: tl.constexpr = VARIANT.size
    value_size: tl.constexpr = VARIANT.value_size
    if is_own:
        token = own_sequence.first_key + at
        _store(gradients.key, own_sequence.batch, kv_head, token, grad_key, inside, size, VARIANT.block_d)
        _store(gradients.value, own_sequence.batch, kv_head, token, grad_value, inside, value_size, VARIANT.block_dv)
    else:
        slot = prompt_program // prompt_tiles % VARIANT.splits * layout.prompts + prompt
        _store(gradients.prompt_key, slot, kv_head, at, grad_key, inside, size, VARIANT.block_d)
        _store(gradients.prompt_value, slot, kv_head, at, grad_value, inside, value_size, VARIANT.block_dv)


@triton.jit
def _store(tensor, batch, head, token, tile, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Stores rows of one head of a tensor, unless the tensor is None."""
    if tensor is not None:
        store_tile(pointer_to(tensor, batch, head, token), tile, inside, SIZE, BLOCK)


@triton.jit
def _stacked_for_prompts(layout, sequence, is_own):
    """The rows that a program loops over: those of the sequence for own keys, of all sequences stacked for a prompt."""
    return Sequence(
        tl.where(is_own, sequence.first_query, 0),
        tl.where(is_own, sequence.queries, layout.sequences * layout.queries),
        sequence.batch,
        sequence.first_key,
        sequence.keys,
        sequence.offset,
        sequence.prompt,
        sequence.prompt_keys,
    )


@profiled()
def reduce_splits_kernel(
    partial_sums,
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
    """Adds up the partial sums of the splits, in order, and computes dsinks. Grid: (R · Hkv · prompt tiles + Hq,).

    partial_sums: dK and dV of prompts [SPLITS · R, Hkv, P, D or Dv] fp32; gradients: the same [R, Hkv, P, D or Dv];
    lse, delta [B, Hq, M]; sinks, grad_sinks [Hq], or None without the last Hq programs.

        dsink = − Σ 2^(log₂e (sink − lse)) Δ
    """
    index = tl.program_id(0)
    reductions = layout.prompts * kv_heads * prompt_tiles
    if index < reductions:
        at = index % prompt_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        head = index // prompt_tiles % kv_heads
        prompt = index // prompt_tiles // kv_heads
        inside = at < layout.prompt_keys
        if gradients.prompt_key is not None:
            grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for split in range(SPLITS):
                pointers = pointer_to(partial_sums.prompt_key, split * layout.prompts + prompt, head, at)
                grad_key += load_tile(pointers, inside, SIZE, BLOCK_D, True)
            store_tile(pointer_to(gradients.prompt_key, prompt, head, at), grad_key, inside, SIZE, BLOCK_D)
        if gradients.prompt_value is not None:
            grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            for split in range(SPLITS):
                pointers = pointer_to(partial_sums.prompt_value, split * layout.prompts + prompt, head, at)
                grad_value += load_tile(pointers, inside, VALUE_SIZE, BLOCK_DV, True)
            store_tile(pointer_to(gradients.prompt_value, prompt, head, at), grad_value, inside, VALUE_SIZE, BLOCK_DV)
    elif grad_sinks is not None:
        head = index - reductions
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        grad_sink = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, batches * layout.queries, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            inside = row < batches * layout.queries
            at = (row // layout.queries).to(tl.int64) * layout.heads * layout.queries
            at += head * layout.queries + row % layout.queries
            row_lse = tl.load(lse + at, mask=inside, other=float("-inf"))
            has_keys = row_lse != float("-inf")
            sink_weight = tl.exp2(sink - tl.where(has_keys, row_lse * LOG2E, float("inf")))
            grad_sink -= sink_weight * tl.load(delta + at, mask=inside, other=0.0)
        tl.store(grad_sinks + head, tl.sum(grad_sink, 0).to(grad_sinks.dtype.element_ty))
