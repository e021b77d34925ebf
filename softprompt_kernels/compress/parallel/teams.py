"""Teams: ranks that work on one thing together, each with a part of its rows.

Row i belongs to rank i mod size of the team. What is a sum over rows is summed over the team: every rank has the same
sum then, to the last bit, and decides the same by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from softprompt_kernels.compress.parallel import ranks


@dataclass(frozen=True, eq=False)
class Team:
    """The team of this rank.

    Args:
        rank: of this rank in the team.
        size: of the team; 1 is a rank alone, for which nothing is exchanged.
        group: of torch.distributed.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the team, as `ranks.sum_`."""
        if self.size > 1:
            ranks.sum_(tensors, self.group)

    def largest(self, value: Tensor) -> Tensor:
        """The largest of the values of all ranks of the team, for a scalar."""
        if self.size == 1:
            return value
        every = value.new_zeros(self.size)
        every[self.rank] = value
        self.sum_([every])
        return every.max()

    def own(self, count: int) -> int:
        """How many of the first `count` rows are this rank's."""
        return max(0, -(-(count - self.rank) // self.size))


ALONE = Team()


class Place(NamedTuple):
    """Where this rank is among the teams.

    Args:
        number: of its team; a rank that is left over has one from `teams` on.
        teams: how many there are.
        team: its own.
    """

    number: int
    teams: int
    team: Team


@contextmanager
def in_teams(pieces: int, most: int) -> Iterator[Place]:
    """Within the context there is a team for each piece of work. With as many pieces as ranks, each rank is one.

    All ranks enter together, and leave together.

    Args:
        pieces: of work.
        most: ranks of a team.
    """
    size = max(1, min(ranks.world() // max(1, pieces), most))
    if size == 1:
        yield Place(ranks.rank(), ranks.world(), ALONE)
        return
    members = [range(number * size, (number + 1) * size) for number in range(pieces)]
    groups = [dist.new_group(list(one), timeout=ranks.TIMEOUT) for one in members]
    number, place = divmod(ranks.rank(), size)
    try:
        yield Place(number, pieces, Team(place, size, groups[number]) if number < pieces else ALONE)
    finally:
        for one, group in zip(members, groups, strict=True):
            if ranks.rank() in one:
                with suppress(RuntimeError, ValueError):
                    dist.destroy_process_group(group)
