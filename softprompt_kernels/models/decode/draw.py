"""The next token of each row, from its logits.

    u ~ uniform, of the row        p = softmax(logits / temperature)        temperature 0: the argmax
    token = the first v with  Σ_{w ≤ v} p_w > u
    top_p < 1: of the largest p that together reach top_p, the smallest is a bound; every p_v below it becomes 0

Cost: one softmax over `[n, V]` for the rows that sample, and one sort for those with top_p < 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 256  # tokens whose probabilities are summed at once


def next_tokens(
    logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]
) -> Tensor:
    """`[n]` int64: one token a row of `logits [n, V]`; −1 where the logits are not finite.

    Args:
        logits: floating point.
        temperatures: n numbers of 0 or more; 0 takes the most probable token.
        top_p: n numbers from 0 to 1.
        uniform: n numbers in [0, 1); those of rows with temperature 0 are not used.
    """
    sampled = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if not sampled:
        return most_probable(logits)
    if len(sampled) == len(temperatures):
        return _drawn(logits, temperatures, top_p, uniform)
    tokens = most_probable(logits)
    index = torch.tensor(sampled, device="cpu").to(logits.device)
    of = ([values[row] for row in sampled] for values in (temperatures, top_p, uniform))
    return tokens.index_copy(0, index, _drawn(logits.index_select(0, index), *of))


def most_probable(logits: Tensor) -> Tensor:
    """`[n]` int64: the argmax of `logits [n, V]`; −1 where it is not finite."""
    peak, token = logits.max(dim=-1)
    return token.where(peak.isfinite(), -1)


def _drawn(logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]) -> Tensor:
    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").to(logits.device)

    temperature = temperatures[0] if len(set(temperatures)) == 1 else column(temperatures)
    return draw(logits, temperature, column(uniform), column(top_p) if min(top_p) < 1 else None)


def draw(logits: Tensor, temperature: float | Tensor, uniform: Tensor, top_p: Tensor | None = None) -> Tensor:
    """`[n]` int64: one token of each row of `softmax(logits / temperature)`; −1 where that is not finite.

    A block of tokens is found by the cumulative sum over blocks, then the token by that within the block. Both are
    float64: in fp32 the probabilities of rare tokens would be rounded to multiples of 6e-8. Only the sum of a block is
    in the dtype of the softmax.

    Args:
        logits: `[n, V]`.
        temperature: more than 0, or `[n]` of them.
        uniform: `[n]` float64 in [0, 1).
        top_p: `[n]` float64 from 0 to 1; None: 1 for all.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[:, None]
    probabilities = (logits.to(dtype) / temperature).softmax(dim=-1)
    if top_p is not None:
        probabilities = _most_probable_of(probabilities, top_p)
    if missing := -logits.shape[1] % _BLOCK:
        probabilities = pad(probabilities, (0, missing))
    blocks = probabilities.unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1]
    block, rest = _first_above(sums, uniform * total)
    within = blocks[torch.arange(block.numel(), device=block.device), block].cumsum(dim=-1, dtype=torch.float64)
    offset, _ = _first_above(within, rest)
    token = block * _BLOCK + offset
    return token.where(total.isfinite(), -1)


def _most_probable_of(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """`probabilities [n, V]` without those that top-p leaves out. Equal ones stay or go together; NaN stays."""
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    kept = (before < top_p[:, None]).sum(dim=-1).clamp(min=1)
    smallest = ordered.gather(1, kept[:, None] - 1)
    stays = (probabilities >= smallest) | (top_p >= 1)[:, None] | probabilities.isnan()
    return probabilities.where(stays, 0)


def _first_above(sums: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `sums [n, m]`, which do not decrease, the first column above `number [n]`, and by how much the
    number exceeds the column before.

    A number that is the last sum or, by rounding, more counts as a little less. So the column found always adds
    something: a token of probability 0 is never drawn.
    """
    number = torch.minimum(number, sums[:, -1].nextafter(sums.new_zeros(())))
    # right: the first sum above the number. What adds nothing has the sum of the one before it.
    column = torch.searchsorted(sums, number[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = sums.gather(1, (column - 1).clamp(min=0)).where(column > 0, 0)
    return column[:, 0], number - before[:, 0]
