"""How a head loss is cut on a CPU: chunks of tokens, blocks of rows, parts of the weight, and the memory they take.

All buffers of a loss together stay within 64 MiB, or one token's logits where these alone are more:

    the logits and the copied hidden states of a chunk of tokens
    scratch for a block of rows that fits the cache
    for a 16-bit head, an fp32 copy of a part of the weight, where the GEMM needs one: a GEMM in 16 bits would round the
        logits
    the GEMM's own memory: with our GEMM 4 MiB, and 1 MiB per thread for up to 28 threads

C++ row kernels on given logits take 2 V numbers per thread.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.gemm import Gemm

# Of the 64 MiB. The rest is for scratch, for row gradients that are stored until the backward, and for what allocators
# lose.
CPU_WORKSPACE_BYTES = 56 * 2**20
_COPY_BYTES = 6 * 2**20  # of these, for fp32 copies of parts of weights
_BLOCK = 2**16  # elements of a scratch buffer


def kept_tokens(weights: Tensor | None) -> Tensor | None:
    """Indices of the tokens whose weight is not 0; None if all are kept."""
    if weights is None:
        return None
    kept = weights.nonzero().squeeze(1)
    return None if kept.shape[0] == weights.shape[0] else kept


def token_chunks(tokens: int, kept: Tensor | None, chunk: int) -> Iterator[slice | Tensor]:
    """The kept tokens (None: all), in chunks of at most `chunk` indices."""
    for start in range(0, tokens if kept is None else kept.shape[0], chunk):
        rows = slice(start, min(start + chunk, tokens))
        yield rows if kept is None else kept[start : start + chunk]


def chunk_size(
    tokens: int, requested: int | None, elements: int, weights: Sequence[Tensor], dtype: torch.dtype, gemm: Gemm
) -> int:
    """Tokens per chunk: as requested, or as many as fit the workspace with `elements` numbers each.

    Chunks have nearly equal sizes that are multiples of 8: GEMMs are slow at other sizes (48 tokens take less time than
    41).
    """
    if requested is not None:
        return max(1, min(tokens, requested))
    copied = any(_is_copied(weight, dtype, gemm) for weight in weights)
    budget = max(CPU_WORKSPACE_BYTES // 2, CPU_WORKSPACE_BYTES - gemm.workspace) - (_COPY_BYTES if copied else 0)
    fitting = max(1, budget // (elements * dtype.itemsize))
    fitting -= fitting % 8 if fitting > 8 else 0
    chunks = max(1, -(-tokens // fitting))
    even = -(-tokens // chunks)
    return max(1, min(tokens, fitting, -(-even // 8) * 8))


def block_size(vocab: int) -> int:
    """Rows of `vocab` numbers per block that fits the cache."""
    return max(1, _BLOCK // vocab)


def weight_parts(
    weights: Sequence[Tensor], dtype: torch.dtype, gemm: Gemm, most: int | None = None
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Weights with the same number of rows, cut into parts of at most `most` rows, ready for a GEMM in `dtype`.

    Yields the rows of a part, and that part of each weight. A weight that the GEMM cannot read is copied to `dtype`;
    parts are small enough for these copies.
    """
    height = weights[0].shape[0]
    step = most or max(1, height)
    copied = [_is_copied(weight, dtype, gemm) for weight in weights]
    row = sum(weight.shape[1] for weight, copy in zip(weights, copied, strict=True) if copy)
    if row:
        step = min(step, max(1, _COPY_BYTES // (row * dtype.itemsize)))
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


def pull_back(gradient: Tensor, weight: Tensor, gemm: Gemm) -> Tensor:
    """The gradient by the logits [n, V] times W [V, d]: the gradient by the hidden states [n, d]."""
    out = gradient.new_empty(gradient.shape[0], weight.shape[1])
    for rows, (part,) in weight_parts([weight], gradient.dtype, gemm, gemm.max_depth):
        gemm.multiply(out, gradient[:, rows], part, rows.start > 0)
    return out if weight.shape[0] else out.zero_()


def _is_copied(weight: Tensor, dtype: torch.dtype, gemm: Gemm) -> bool:
    return weight.dtype != dtype and not (gemm.mixed and weight.dtype.itemsize == 2)
