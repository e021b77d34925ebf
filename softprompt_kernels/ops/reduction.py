"""Row weights and reductions, the same for every loss."""

import torch
from torch import Tensor

from softprompt_kernels.ops import checks

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    """Raises ValueError for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def check_weights(weights: Tensor | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """weights as a flat [N] tensor of the given dtype. They may be a mask of bool or integers."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be None or a tensor; got {type(weights).__name__}")
    if weights.requires_grad:
        raise ValueError("weights must not require a gradient; pass weights.detach()")
    if weights.numel() != tokens:
        raise ValueError(f"weights must have N = {tokens} elements; got shape {list(weights.shape)}")
    checks.device("weights", weights, device)
    return weights.reshape(-1).to(dtype)


def reduce_rows(rows: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """`none`: the weighted rows [N]. `sum`: their sum. `mean`: that over the sum of weights; 0 where this is 0."""
    if weights is not None:
        rows = torch.where(weights == 0, 0, rows * weights)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if weights is None:
        return rows.sum() / max(rows.shape[0], 1)
    total = weights.sum()
    return rows.sum() / torch.where(total == 0, 1, total)
