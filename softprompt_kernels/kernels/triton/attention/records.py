"""What attention kernels are given, as named tuples: tensors with their strides, sizes, scalars and constants.

The names of sizes are those of `attention_problem`. A *row* is a query of one head; the g heads that share a key head
are neighbours: row r of a sequence is query r // g and head r % g of these, so that a tile of keys serves all of them.
"""

from typing import Any, NamedTuple


class Strided(NamedTuple):
    """A tensor [batch, heads, tokens, size] whose last stride is 1."""

    base: Any
    batch: Any
    head: Any
    token: Any


class Inputs(NamedTuple):
    """Keys and values, of sequences [B, Hkv, N, D or Dv] and of prompts [R, Hkv, P, D or Dv]; all `Strided`."""

    key: Any
    value: Any
    prompt_key: Any
    prompt_value: Any


class Layout(NamedTuple):
    """Sizes of a problem and what says which sequence sees what; names as in `attention_problem`."""

    cu_seqlens: Any  # [S + 1], packed form
    prompt_index: Any  # [S] or None
    prompt_lengths: Any  # [R] or None
    key_lengths: Any  # [B] or None
    sequences: Any  # S
    prompts: Any  # R
    queries: Any  # M
    keys: Any  # N
    prompt_keys: Any  # P
    heads: Any  # Hq


class Scoring(NamedTuple):
    """Scalars of the scores."""

    scale: Any
    softcap: Any  # 0 without
    window: Any  # 0 without


class Variant(NamedTuple):
    """The constants of a kernel."""

    group: int  # g
    size: int  # D
    value_size: int  # Dv
    causal: bool  # also where there is a window
    windowed: bool
    capped: bool
    packed: bool
    stacked: bool  # a tile's rows may be of several sequences, which see one prompt
    splits: int  # programs that share the keys of one tile of rows, or the rows of one tile of prompt keys
    precision: str  # of fp32 products
    descriptors: bool  # keys are loaded by tensor descriptors
    block_m: int  # rows
    block_n: int  # keys
    block_d: int  # D up to a power of 2
    block_dv: int
    block_s: int  # S + 1 up to a power of 2, packed form


class Sequence(NamedTuple):
    """One sequence, or all of a batch where a tile's rows may be of several."""

    first: Any  # its first query, counted over the batch
    queries: Any
    batch: Any  # of its own keys
    first_key: Any
    keys: Any  # own keys that are no padding
    offset: Any  # N − M
    prompt: Any  # which one it sees
    prompt_keys: Any  # of them that are no padding


class Rows(NamedTuple):
    """A tile of rows, [BLOCK_M] each."""

    batch: Any
    token: Any
    head: Any
    relative: Any
    valid: Any


class Keys(NamedTuple):
    """Keys and values of one sequence or prompt, and how far they are of its own keys."""

    key: Any  # pointers to the first, or descriptors of all
    value: Any
    key_token: Any  # strides
    value_token: Any
    count: Any  # that are no padding
    shift: Any
