"""Which tokens are worked on at a time, in how much memory, and the products with a head's weight.

All buffers of a loss together stay within 64 MiB (and never below one token's logits): the logits of a chunk of tokens,
scratch for a block of rows that fits the cache, and for a 16-bit head the fp32 copy of a part of it, since a product in
16 bits would round the logits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_LOGITS = 48 * 2**20  # bytes, the logits of a chunk
_COPY = 8 * 2**20  # bytes, a part of the weight in fp32
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


def chunk_size(tokens: int, requested: int | None, buffers: int, vocab: int, dtype: torch.dtype) -> int:
    """Tokens whose logits exist at a time: as requested, or as many as fit the budget in `buffers` buffers."""
    fitting = requested or _LOGITS // (buffers * vocab * dtype.itemsize)
    return max(1, min(tokens, fitting))


def block_size(vocab: int) -> int:
    """Rows that are worked on at a time."""
    return max(1, _BLOCK // vocab)


def head_logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [n, V] = hidden [n, d] Wᵀ + bias."""
    for rows, part in _parts(weight, hidden.dtype):
        torch.mm(hidden, part.mT, out=out[:, rows])
    if bias is not None:
        out += bias


def pull_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """[n, V] W -> [n, d]."""
    out = None
    for rows, part in _parts(weight, gradient.dtype):
        out = torch.mm(gradient[:, rows], part) if out is None else out.addmm_(gradient[:, rows], part)
    return gradient.new_zeros(gradient.shape[0], weight.shape[1]) if out is None else out


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the weight in `dtype`: all at once if it has that dtype, else in parts of a bounded size."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(1, _COPY // (weight.shape[1] * dtype.itemsize))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].to(dtype)
