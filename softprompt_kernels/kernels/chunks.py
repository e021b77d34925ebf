"""Which tokens and words are worked on at a time, in how much memory, and the parts of a head's weight.

All buffers of a loss together stay within 64 MiB (and never below one token's logits): the logits and copied hidden
states of a chunk of tokens, scratch for a block of rows that fits the cache, and for a 16-bit head the fp32 copy of a
part of it, since a product in 16 bits would round the logits. (Row work in C++ from given logits takes 2 V numbers a
thread.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BUDGET = 62 * 2**20  # bytes, all but scratch
_COPY = 6 * 2**20  # bytes of it, a part of the weight in fp32
_BLOCK = 2**16  # elements of a scratch buffer


def kept_tokens(weights: Tensor | None) -> Tensor | None:
    """The tokens whose weight is not 0; None if all are kept."""
    if weights is None:
        return None
    kept = weights.nonzero().squeeze(1)
    return None if kept.shape[0] == weights.shape[0] else kept


def token_chunks(tokens: int, kept: Tensor | None, chunk: int) -> Iterator[slice | Tensor]:
    """Indices of at most `chunk` tokens at a time, that cover the kept ones."""
    for start in range(0, tokens if kept is None else kept.shape[0], chunk):
        rows = slice(start, min(start + chunk, tokens))
        yield rows if kept is None else kept[start : start + chunk]


def chunk_size(tokens: int, requested: int | None, elements: int, weight: Tensor, dtype: torch.dtype) -> int:
    """Tokens that are worked on at a time: as requested, or as many as fit the budget with `elements` numbers each.

    Chunks are of nearly equal size, and of multiples of 8: matrix products are slow at sizes between (48 tokens take
    less time than 41).
    """
    if requested is not None:
        return max(1, min(tokens, requested))
    budget = BUDGET if weight.dtype == dtype else BUDGET - _COPY
    fitting = max(1, budget // (elements * dtype.itemsize))
    fitting -= fitting % 8 if fitting > 8 else 0
    chunks = max(1, -(-tokens // fitting))
    even = -(-tokens // chunks)
    return max(1, min(tokens, fitting, -(-even // 8) * 8))


def block_size(vocab: int) -> int:
    """Rows that are worked on at a time."""
    return max(1, _BLOCK // vocab)


def head_logits(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out [n, V] = hidden [n, d] Wᵀ."""
    for columns, part in weight_parts(weight, hidden.dtype):
        torch.mm(hidden, part.mT, out=out[:, columns])


def pull_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """[n, V] W -> [n, d]."""
    out = None
    for rows, part in weight_parts(weight, gradient.dtype):
        out = torch.mm(gradient[:, rows], part) if out is None else out.addmm_(gradient[:, rows], part)
    return gradient.new_zeros(gradient.shape[0], weight.shape[1]) if out is None else out


def weight_parts(weight: Tensor, dtype: torch.dtype, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the weight in `dtype`, at most `most` at a time, and as copies of a bounded size in other dtypes."""
    step = most or max(1, weight.shape[0])
    if weight.dtype != dtype:
        step = min(step, max(1, _COPY // (weight.shape[1] * dtype.itemsize)))
    copy = None
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        part = weight[rows]
        if weight.dtype != dtype:
            copy = weight.new_empty(step, weight.shape[1], dtype=dtype) if copy is None else copy
            part = copy[: part.shape[0]].copy_(part)
        yield rows, part
