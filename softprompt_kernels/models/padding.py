"""Own-token padding in the forms that the attention op knows.

Where nothing but the batch at hand matters and the kernels are good at it, what is real of it is packed: `Packing`.
Else rows stay rows, real keys first, `key_lengths` of them. Batches come padded on the right (training), on the left
(generation), or with holes; all are brought into that form by moving tokens, never by a mask in the kernel:

    order [B, N]     columns of a row, real ones first, each group in its old order
    inverse [B, N]   where each column went; `x.gather(order).gather(inverse) = x`

Queries need moving too when they do not sit at the end of the real keys. The op puts query i of M at own position
N − M + i; a row with n real keys wants its queries to end at n. `Placement` gives them a longer run of M' slots and
says which slot holds which query; the slots that are left over compute something that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True, eq=False)
class Packing:
    """The real tokens of a padded batch [B, M], one sequence after the other.

    Args:
        real: `[T]` int64, where they are in the flattened batch.
        cu_seqlens: `[B + 1]` int64, where sequences begin among them.
        own_positions: `[B, M]` int64, 0, 1, ... over the real tokens of a row; anything at padding.
        longest: at least as long as any sequence.
    """

    real: Tensor
    cu_seqlens: Tensor
    own_positions: Tensor
    longest: int

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Packing:
        """That of `mask [B, M]` (bool, True for a real token), on a device. Waits for the mask's.

        Raises:
            SoftPromptError: nothing is real.
        """
        counts = mask.to(torch.int64)
        real = counts.flatten().nonzero().squeeze(1)
        if real.numel() == 0:
            raise SoftPromptError("attention_mask: got padding alone, accepted is at least one real token")
        cu_seqlens = F.pad(counts.sum(dim=1).cumsum(0), (1, 0))
        own = (counts.cumsum(dim=1) - 1).clamp(min=0)
        return cls(real.to(device), cu_seqlens.to(device), own.to(device), mask.shape[1])

    def pack(self, tensor: Tensor) -> Tensor:
        """`[B, M]` to `[1, T]`."""
        return tensor.flatten().index_select(0, self.real)[None]


def is_right_padded(mask: Tensor) -> bool:
    """Whether in each row of `mask [B, N]` (bool) all real tokens come first. Waits for the device."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`order`, `inverse` `[B, N]` int64 of `mask [B, N]` (bool, True for a real token)."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor [B, H, N, D]` with token `index[b, s]` at s: `[B, H, S, D]`."""
    return tensor.take_along_dim(index[:, None, :, None], dim=2)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the M queries of each row sit in a run of M' slots that ends where the keys end.

    `query_of_slot [B, M']` and `slot_of_query [B, M]`, int64. Slots without a query repeat one, and queries that are
    padding read any slot.
    """

    query_of_slot: Tensor
    slot_of_query: Tensor

    @classmethod
    def at_row_ends(cls, lengths: Tensor, keys: int, queries: int, slack: int) -> Placement:
        """For rows whose last query is their last real token.

        Args:
            lengths: `[B]` int64, real keys of a row, these queries' own keys among them.
            keys: N, columns of the key tensor.
            queries: M.
            slack: at least `max(N − lengths)`, on the host.
        """
        slots = min(keys, queries + slack)
        # Query i of a row is its real token n − M + i; slot s stands for own position N − M' + s.
        first = (lengths - queries)[:, None] - (keys - slots)
        slot = torch.arange(slots, device=lengths.device)
        query = torch.arange(queries, device=lengths.device)
        return cls((slot - first).clamp(0, queries - 1), (query + first).clamp(0, slots - 1))

    @classmethod
    def by_order(cls, order: Tensor, inverse: Tensor, queries: int) -> Placement:
        """For the last M columns of any mask, from its `compaction`: M' = N."""
        keys = order.shape[1]
        return cls((order - (keys - queries)).clamp(min=0), inverse[:, keys - queries :])
