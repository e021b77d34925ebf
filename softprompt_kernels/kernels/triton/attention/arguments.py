"""The arguments of the attention kernels, as named tuples: strided tensors, sizes, scalars and constants.

The letters are those of `kernels/problems/attention.py`. A *row* is one query of one head. The g heads that share a key
head are neighbours: row r of a sequence is query r // g and head r % g of that group, so one tile of keys serves all of
them.
"""

from typing import Any, NamedTuple


class Strided(NamedTuple):
    """A tensor [batch, heads, tokens, size] whose last stride is 1."""

    base: Any
    batch_stride: Any
    head_stride: Any
    token_stride: Any


class KeyValues(NamedTuple):
    """Own keys and values [B, Hkv, N, D or Dv] and those of prompts [R, Hkv, P, D or Dv]; all `Strided`."""

    key: Any
    value: Any
    prompt_key: Any
    prompt_value: Any


class Layout(NamedTuple):
    """The sizes of a problem, and the vectors that say which sequence sees which keys."""

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
    """The scalars of the scores."""

    scale: Any
    softcap: Any  # 0: none
    window: Any  # 0: none


class Variant(NamedTuple):
    """The compile-time constants of a kernel."""

    group: int  # g
    size: int  # D
    value_size: int  # Dv
    causal: bool  # true also where there is a window
    windowed: bool
    capped: bool
    packed: bool
    stacked: bool  # a tile may hold rows of several sequences, which all see the same prompt
    splits: int  # programs that share the keys of one tile of rows, or the rows of one tile of prompt keys
    precision: str  # of fp32 dots
    descriptors: bool  # keys are loaded by tensor descriptors
    block_m: int  # rows
    block_n: int  # keys
    block_d: int  # D rounded up to a power of 2
    block_dv: int
    block_s: int  # S + 1 rounded up to a power of 2, packed form


class Sequence(NamedTuple):
    """One sequence, or all sequences of a batch stacked as one."""

    first_query: Any  # counted over the batch
    queries: Any
    batch: Any  # index of its own keys
    first_key: Any
    keys: Any  # own keys without padding
    offset: Any  # N − M
    prompt: Any  # index of the prompt that it sees
    prompt_keys: Any  # keys of that prompt without padding


class Rows(NamedTuple):
    """A tile of rows, [BLOCK_M] each."""

    batch: Any
    token: Any
    head: Any
    position: Any  # (N − M) + i: the position of the query, counted from the first own key
    valid: Any


class Keys(NamedTuple):
    """The keys and values of one sequence or of one prompt; key i is at position i − shift."""

    key: Any  # pointer to the first one, or a descriptor of all
    value: Any
    key_stride: Any
    value_stride: Any
    length: Any  # without padding
    shift: Any  # 0 for own keys, the prompt's length for prompt keys
