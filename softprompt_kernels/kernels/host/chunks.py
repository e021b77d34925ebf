"""Which tokens and words are worked on at a time, in how much memory, and the parts of a head's weight.

All buffers of a loss together stay within 64 MiB (and never below one token's logits), those of the library that
multiplies included, which, where that is our own, are 4 MiB and one for each of up to 28 threads: the logits and copied
hidden states of a chunk of tokens, scratch for a block of rows that fits the cache, and for a 16-bit head the fp32 copy
of a part of it where the library needs one, since a product in 16 bits would round the logits. (Row work in C++ from
given logits takes 2 V numbers a thread.)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.gemm import Products

BUDGET = 56 * 2**20  # bytes, all but scratch, row gradients that wait for the backward, and what allocators lose
_COPY = 6 * 2**20  # bytes of it, parts of weights in fp32
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


def chunk_size(
    tokens: int, requested: int | None, elements: int, weights: Sequence[Tensor], dtype: torch.dtype, products: Products
) -> int:
    """Tokens that are worked on at a time: as requested, or as many as fit the budget with `elements` numbers each.

    Chunks are of nearly equal size, and of multiples of 8: matrix products are slow at sizes between (48 tokens take
    less time than 41).
    """
    if requested is not None:
        return max(1, min(tokens, requested))
    copied = any(_is_copied(weight, dtype, products) for weight in weights)
    budget = max(BUDGET // 2, BUDGET - products.buffer) - (_COPY if copied else 0)
    fitting = max(1, budget // (elements * dtype.itemsize))
    fitting -= fitting % 8 if fitting > 8 else 0
    chunks = max(1, -(-tokens // fitting))
    even = -(-tokens // chunks)
    return max(1, min(tokens, fitting, -(-even // 8) * 8))


def block_size(vocab: int) -> int:
    """Rows that are worked on at a time."""
    return max(1, _BLOCK // vocab)


def weight_parts(
    weights: Sequence[Tensor], dtype: torch.dtype, products: Products, most: int | None = None
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The same rows of weights of one height, for products with `dtype`: at most `most`, few enough to be copied."""
    height = weights[0].shape[0]
    step = most or max(1, height)
    copied = [_is_copied(weight, dtype, products) for weight in weights]
    row = sum(weight.shape[1] for weight, copy in zip(weights, copied, strict=True) if copy)
    if row:
        step = min(step, max(1, _COPY // (row * dtype.itemsize)))
    copies = [
        weight.new_empty(min(step, height), weight.shape[1], dtype=dtype) if copy else None
        for weight, copy in zip(weights, copied, strict=True)
    ]
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        parts = [weight[rows] for weight in weights]
        yield (
            rows,
            [p if c is None else c[: p.shape[0]].copy_(p) for p, c in zip(parts, copies, strict=True)],
        )


def pull_back(gradient: Tensor, weight: Tensor, products: Products) -> Tensor:
    """[n, V] W -> [n, d]."""
    out = gradient.new_empty(gradient.shape[0], weight.shape[1])
    for rows, (part,) in weight_parts([weight], gradient.dtype, products, products.depth):
        products.multiply(out, gradient[:, rows], part, rows.start > 0)
    return out if weight.shape[0] else out.zero_()


def _is_copied(weight: Tensor, dtype: torch.dtype, products: Products) -> bool:
    return weight.dtype != dtype and not (products.narrow and weight.dtype.itemsize == 2)
