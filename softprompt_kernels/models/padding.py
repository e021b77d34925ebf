"""Bring padded batches into the forms that the attention op accepts.

The op takes no mask. Batches come padded on the right (training), on the left (generation), or with padding between
real tokens. There are two forms for them:

- `Packing`: the real tokens of all rows become one sequence, with `cu_seqlens`. Used for a forward without a cache if
  the attention backend is good at packed sequences.
- Rows with real keys first, and `key_lengths`. `compaction` gives the gather indices that move the tokens:

      order [B, N]     columns of a row, real ones first, otherwise in the old order
      inverse [B, N]   the new column of each old one: `x.gather(order).gather(inverse) = x`

In the second form queries may have to move too. The op puts query i of M at own position N − M + i, but in a row with
n < N real keys the queries should end at n. `Placement` therefore puts the M queries into M' ≥ M slots and says which
slot holds which query. The output of the remaining slots is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True, eq=False)
class Packing:
    """The T real tokens of a padded batch `[B, M]`, one sequence after the other.

    Args:
        real: `[T]` int64, their indices in the flattened batch.
        cu_seqlens: `[B + 1]` int64, the first of the T tokens of each sequence, and T.
        own_positions: `[B, M]` int64, 0, 1, ... for the real tokens of a row; any value at padding.
        max_seqlen: an upper bound of the sequences' lengths.
    """

    real: Tensor
    cu_seqlens: Tensor
    own_positions: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Packing:
        """The packing of `mask [B, M]` (bool, True for a real token), on `device`. Waits for the device of `mask`.

        Raises:
            SoftPromptError: no token is real.
        """
        counts = mask.to(torch.int64)
        real = counts.flatten().nonzero().squeeze(1)
        if real.numel() == 0:
            raise SoftPromptError("attention_mask: got only padding, accepted is at least one real token")
        cu_seqlens = F.pad(counts.sum(dim=1).cumsum(0), (1, 0))
        own = (counts.cumsum(dim=1) - 1).clamp(min=0)
        return cls(real.to(device), cu_seqlens.to(device), own.to(device), mask.shape[1])

    def pack(self, tensor: Tensor) -> Tensor:
        """`[B, M]` to `[1, T]`."""
        return tensor.flatten().index_select(0, self.real)[None]


def is_right_padded(mask: Tensor) -> bool:
    """Whether all real tokens come first in each row of `mask [B, N]` (bool). Waits for the device."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The gather indices `order` and `inverse`, `[B, N]` int64, for `mask [B, N]` (bool, True for a real token)."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def gather_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: `out[b, h, s] = tensor[b, h, index[b, s]]`, from `[B, H, N, D]` to `[B, H, S, D]`."""
    return tensor.take_along_dim(index.to(tensor.device)[:, None, :, None], dim=2)  # layers may be on several devices


@dataclass(frozen=True, eq=False)
class Placement:
    """Puts the M queries of each row into M' slots. The last slot has the position of the last key column.

    `query_of_slot [B, M']` and `slot_of_query [B, M]`, int64. A slot without a query repeats some query. A query that
    is padding reads some slot.
    """

    query_of_slot: Tensor
    slot_of_query: Tensor

    @classmethod
    def at_row_ends(cls, lengths: Tensor, keys: int, queries: int, max_padding: int) -> Placement:
        """For rows whose last query is their last real token. M' = min(N, M + max_padding).

        Args:
            lengths: `[B]` int64, number of real keys of a row, including the keys of these queries.
            keys: N, columns of the key tensor.
            queries: M.
            max_padding: at least `max(N − lengths)`. A Python int, so that it need not be read from the device.
        """
        slots = min(keys, queries + max_padding)
        # Query i of a row is its real token n − M + i. Slot s has own position N − M' + s.
        first = (lengths - queries)[:, None] - (keys - slots)
        slot = torch.arange(slots, device=lengths.device)
        query = torch.arange(queries, device=lengths.device)
        return cls((slot - first).clamp(0, queries - 1), (query + first).clamp(0, slots - 1))

    @classmethod
    def from_compaction(cls, order: Tensor, inverse: Tensor, queries: int) -> Placement:
        """For queries in the last M columns of any mask, from its `compaction`. M' = N."""
        keys = order.shape[1]
        return cls((order - (keys - queries)).clamp(min=0), inverse[:, keys - queries :])

    @classmethod
    def behind_prefix(cls, order: Tensor, inverse: Tensor) -> Placement:
        """For queries of all N columns, from the mask's `compaction`. M' = N + 1.

        The last column of padding before a row's first real token gets a slot too, the one before all own keys, from
        where it sees the prefix alone. A loss with shifted labels reads its logits: they predict the first real token.
        """
        column = torch.arange(order.shape[1], device=order.device)
        last_padding = order[:, :1] - 1
        slot = torch.where(column == last_padding, 0, inverse + 1)
        return cls(torch.cat([last_padding.clamp(min=0), order], dim=1), slot)
