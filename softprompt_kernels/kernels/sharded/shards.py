"""How a vocabulary is split over the ranks of a group, and what the ranks tell each other.

Before it computes anything, a call gathers what each rank was given, 2 KiB of JSON a rank. Ranks that differ, or of
which one refuses its arguments, then all raise the same sentence, and none waits for another. This exchange is the only
place where the host waits. It is on CPU tensors where the group has a backend for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MESSAGE = 2048  # bytes of a rank's message
_REFUSED = "refused"


@dataclass(frozen=True)
class Shards:
    """A vocabulary of `total` entries, of which this rank holds `sizes[rank]` from `offset` on.

    Args:
        group: the process group.
        rank: this process in it.
        sizes: entries of each rank that count, in the order of the ranks; 0 is possible.
        rows: rows of all ranks, with those that do not count.
        largest: rows of the largest shard.
    """

    group: ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    rows: int
    largest: int

    @property
    def total(self) -> int:
        """Entries of all ranks that count."""
        return sum(self.sizes)

    @property
    def size(self) -> int:
        """Entries of this rank that count."""
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """Entries of the ranks before this one."""
        return sum(self.sizes[: self.rank])

    def own_labels(self, labels: Tensor) -> Tensor:
        """Labels of the whole vocabulary [N] as rows of this shard; −1 for those that other ranks hold."""
        local = labels - self.offset
        return torch.where((local >= 0) & (local < self.size), local, -1)

    def gather(self, rows: Tensor) -> Tensor:
        """The tensors [n, …] of all ranks, [ranks, n, …]."""
        out = rows.new_empty(len(self.sizes) * rows.shape[0], *rows.shape[1:])
        _gather(out, rows.contiguous(), self.group)
        return out.view(len(self.sizes), *rows.shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place of a contiguous tensor."""
        import torch.distributed as dist

        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor


def check_group(group: Any) -> None:
    """This process is a rank of the group.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it.
    """
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be None or a torch.distributed.ProcessGroup; got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this process; got a group without it")


@contextmanager
def refusals_shared(group: ProcessGroup | None, hidden: Any) -> Iterator[None]:
    """Within the context, an error of this rank is told to the others before it is raised here.

    `hidden` is an argument on the device of the call, unless it is wrong.
    """
    if group is None:
        yield
        return
    check_group(group)
    try:
        yield
    except Exception as error:  # of any type: the others would wait for this rank
        device = hidden.device if isinstance(hidden, Tensor) else torch.get_default_device()
        exchange(group, device, {_REFUSED: f"{type(error).__name__}: {error}"[:160]})
        raise


def agree(
    group: ProcessGroup, device: torch.device, rows: int, valid_vocab: int | None, facts: Mapping[str, object]
) -> Shards:
    """The split of the vocabulary, after the ranks have found that they were given the same.

    Args:
        group: of this process.
        device: where tensors of the group are.
        rows: rows of this rank's weight.
        valid_vocab: entries of the whole vocabulary that count, from its first on; None: all.
        facts: what must be the same on all ranks: name of an argument -> value, short.

    Raises:
        ValueError: the ranks differ, another one refused its arguments, or valid_vocab is out of range. On all ranks.
    """
    shared = {"valid_vocab": valid_vocab, **{name: str(value) for name, value in facts.items()}}
    told = exchange(group, device, {"rows": rows, **shared})
    _check_same(told, tuple(shared))
    heights = [int(each["rows"]) for each in told]
    total = sum(heights)
    if valid_vocab is not None and not 1 <= valid_vocab <= total:
        raise ValueError(
            f"valid_vocab must be None or in [1, {total}], the entries of all ranks of group; got {valid_vocab}"
        )
    counted, sizes = total if valid_vocab is None else valid_vocab, []
    for height in heights:
        sizes.append(min(height, counted))
        counted -= sizes[-1]
    import torch.distributed as dist

    return Shards(group, dist.get_rank(group), tuple(sizes), total, max(heights))


def exchange(group: ProcessGroup, device: torch.device, message: Mapping[str, object]) -> list[dict[str, Any]]:
    """The messages of all ranks, in their order. A message is JSON of at most 2 KiB."""
    import torch.distributed as dist

    if "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    data = json.dumps(message).encode().ljust(_MESSAGE)[:_MESSAGE]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    everyone = own.new_empty(dist.get_world_size(group) * _MESSAGE)
    _gather(everyone, own, group)
    return [json.loads(bytes(part)) for part in everyone.cpu().view(-1, _MESSAGE).numpy()]


def _gather(out: Tensor, own: Tensor, group: ProcessGroup) -> None:
    """out [ranks · n, …] becomes the tensors [n, …] of all ranks."""
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13
    gather(out, own, group=group)


def _check_same(told: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    refused = [f"rank {rank}: {each[_REFUSED]}" for rank, each in enumerate(told) if _REFUSED in each]
    if refused:
        raise ValueError(f"group: a rank refused its arguments ({'; '.join(refused)})")
    for name in names:
        values = [each.get(name) for each in told]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"{name} must be the same on all ranks of group; got {listed}")
