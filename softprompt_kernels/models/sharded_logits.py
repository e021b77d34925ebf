"""The logits of a head whose rows are split over the ranks of a group: each rank gets those of the whole vocabulary.

Each rank computes its columns, `h W_rᵀ + b_r`, and gathers those of the others, N V numbers. The losses do
without them (`ops/sharded.py`). The gradient is exact where all ranks compute the same from the logits:
each takes the columns of its rows, and the parts of the hidden states' gradient are summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gathered_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
    """`[..., V]` of all ranks' rows, from the same `hidden [..., d]` on every rank. Differentiable. Collective."""
    own = nn.functional.linear(_Summed.apply(hidden, group), weight, bias)
    logits: Tensor = _Gathered.apply(own.reshape(-1, own.shape[-1]), group)
    return logits.view(*own.shape[:-1], -1)


class _Summed(torch.autograd.Function):
    """The identity, whose gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        total = grad_outputs[0].contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Gathered(torch.autograd.Function):
    """`[n, V_r]` of each rank to `[n, V]`; the gradient is that of the rank's own columns."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        import torch.distributed as dist

        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        widths = [own.new_empty(1, dtype=torch.int64) for _ in range(ranks)]
        dist.all_gather(widths, torch.full_like(widths[0], own.shape[1]), group=group)
        sizes = [int(width) for width in widths]
        most = max(sizes)  # backends gather tensors of one size
        parts = [own.new_empty(own.shape[0], most) for _ in range(ranks)]
        dist.all_gather(parts, nn.functional.pad(own, (0, most - own.shape[1])).contiguous(), group=group)
        start = sum(sizes[:rank])
        ctx.columns = slice(start, start + sizes[rank])
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0][:, ctx.columns], None
