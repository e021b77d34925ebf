"""Where things are: the tiles of a sequence, the rows of a tile, and their addresses.

The position of a row is (N − M) + i: its query's position, counted from the first own key of its sequence. Every index
is converted to int64 before it is multiplied by a stride.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.attention.arguments import Rows, Sequence


@triton.jit
def locate_tile(layout, tile, tokens, ROWS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, VARIANT: tl.constexpr):
    """(sequence, tile within it) of the tile-th tile of the batch. No tile spans two sequences.

    A sequence has `tokens` tokens, its queries or its keys. In the packed form it has as many as cu_seqlens says, and
    sequence S stands for the tokens after the last sequence. A sequence > S means that the tile does not exist.
    """
    if VARIANT.packed:
        s = tl.arange(0, VARIANT.block_s)
        first = tl.load(layout.cu_seqlens + s, mask=s <= layout.sequences, other=layout.queries)
        end = tl.load(layout.cu_seqlens + s + 1, mask=s < layout.sequences, other=layout.queries)
        tiles = tl.cdiv((end - first).to(tl.int32) * ROWS_PER_TOKEN, BLOCK)
        ends = tl.cumsum(tl.where(s <= layout.sequences, tiles, 0), 0)
        sequence = tl.sum((ends <= tile).to(tl.int32), 0)
        sequence = tl.where(tile >= tl.max(ends, 0), layout.sequences + 1, sequence)
        return sequence, tile - tl.max(tl.where(ends <= tile, ends, 0), 0)
    else:
        tiles = tl.maximum(tl.cdiv(tokens * ROWS_PER_TOKEN, BLOCK), 1)
        return tile // tiles, tile % tiles


@triton.jit
def prompt_of(layout, sequence):
    """The index of the prompt that a sequence sees."""
    if layout.prompt_index is not None:
        prompt = tl.load(layout.prompt_index + sequence, mask=sequence < layout.sequences, other=0).to(tl.int32)
    else:
        prompt = tl.where(layout.prompts == 1, 0, sequence)
    return prompt


@triton.jit
def prompt_length(layout, prompt):
    """The number of a prompt's keys without padding."""
    if layout.prompt_lengths is not None:
        length = tl.load(layout.prompt_lengths + prompt, mask=prompt < layout.prompts, other=0).to(tl.int32)
    else:
        length = layout.prompt_keys
    return length


@triton.jit
def sequence_of(layout, sequence, VARIANT: tl.constexpr):
    """The `Sequence` of an index in [0, S); S itself is accepted in the packed form only."""
    if VARIANT.packed:
        real = sequence < layout.sequences
        first = tl.load(layout.cu_seqlens + sequence).to(tl.int32)
        end = tl.load(layout.cu_seqlens + sequence + 1, mask=real, other=layout.queries).to(tl.int32)
        prompt = tl.where(real, prompt_of(layout, sequence), 0)
        length = tl.where(real, prompt_length(layout, prompt), 0)
        keys = tl.where(real, end - first, 0)
        return Sequence(first, end - first, 0, first, keys, 0, prompt, length)
    else:
        prompt = prompt_of(layout, sequence)
        keys = layout.keys
        if layout.key_lengths is not None:
            keys = tl.load(layout.key_lengths + sequence, mask=sequence < layout.sequences, other=0).to(tl.int32)
        offset = layout.keys - layout.queries
        return Sequence(
            sequence * layout.queries, layout.queries, sequence, 0, keys, offset, prompt, prompt_length(layout, prompt)
        )


@triton.jit
def stacked_sequences(layout, VARIANT: tl.constexpr):
    """All sequences stacked as one. Of its fields for keys only the prompt and the offset mean something."""
    first = sequence_of(layout, 0, VARIANT)
    queries = layout.sequences * layout.queries
    return Sequence(0, queries, 0, 0, first.keys, first.offset, first.prompt, first.prompt_keys)


@triton.jit
def rows_of(layout, sequence, start, kv_head, VARIANT: tl.constexpr):
    """The rows [start, start + BLOCK_M) of a sequence."""
    row = start + tl.arange(0, VARIANT.block_m)
    query = row // VARIANT.group
    head = kv_head * VARIANT.group + row % VARIANT.group
    if VARIANT.packed:
        batch = tl.zeros_like(row)
        token = sequence.first_query + query
        position = sequence.offset + query
    else:
        batch = (sequence.first_query + query) // layout.queries
        token = (sequence.first_query + query) % layout.queries
        position = sequence.offset + token
    return Rows(batch, token, head, position, query < sequence.queries)


@triton.jit
def position_span(layout, sequence, tile, VARIANT: tl.constexpr):
    """The smallest and the largest position among a tile's rows."""
    if VARIANT.stacked:
        first = sequence.offset
        last = sequence.offset + layout.queries - 1
    else:
        first = sequence.offset + tile * VARIANT.block_m // VARIANT.group
        after = tl.minimum((tile + 1) * VARIANT.block_m, sequence.queries * VARIANT.group)
        last = sequence.offset + (after - 1) // VARIANT.group
    return first, last


# --- memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def row_pointers(tensor, rows):
    """Pointers [BLOCK_M] to the first element of each row."""
    return (
        tensor.base
        + rows.batch.to(tl.int64) * tensor.batch_stride
        + rows.head.to(tl.int64) * tensor.head_stride
        + rows.token.to(tl.int64) * tensor.token_stride
    )


@triton.jit
def row_index(layout, rows):
    """The index [BLOCK_M] of each row in a contiguous [B, Hq, M]."""
    return (rows.batch.to(tl.int64) * layout.heads + rows.head) * layout.queries + rows.token


@triton.jit
def load_tile(pointers, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK] from pointers to rows of SIZE elements; 0 beyond SIZE and, if MASKED, in invalid rows."""
    column = tl.arange(0, BLOCK)
    at = pointers[:, None] + column[None, :]
    if MASKED:
        return tl.load(at, mask=valid[:, None] & (column[None, :] < SIZE), other=0.0)
    elif SIZE == BLOCK:
        return tl.load(at)
    else:
        return tl.load(at, mask=column[None, :] < SIZE, other=0.0)


@triton.jit
def store_tile(pointers, tile, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the valid rows of [rows, BLOCK], rounded to the dtype of the pointers."""
    column = tl.arange(0, BLOCK)
    mask = valid[:, None] & (column[None, :] < SIZE)
    tl.store(pointers[:, None] + column[None, :], tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def key_pointers(base, token_stride, start, BLOCK_N: tl.constexpr):
    """Pointers to the keys [start, start + BLOCK_N)."""
    return base + (start + tl.arange(0, BLOCK_N)).to(tl.int64) * token_stride


@triton.jit
def pointer_to(tensor, batch, head, token):
    """A pointer to the first element of a tensor's row (batch, head, token)."""
    at = tl.cast(batch, tl.int64) * tensor.batch_stride + tl.cast(head, tl.int64) * tensor.head_stride
    return tensor.base + at + tl.cast(token, tl.int64) * tensor.token_stride
