"""Work shared out over ranks by its cost: the longest piece first, each to the rank that has least.

Every rank computes all shares, so nothing is exchanged. The largest share is at most 4/3 of the best possible (Graham
1969).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def shares(costs: Sequence[float], ranks: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """The pieces of each rank: indices in ascending order. With more ranks than pieces, some are empty.

    Args:
        costs: of the pieces, 0 or more.
        ranks: from 1.
        groups: of each piece; pieces of one group go to one rank, unless there are fewer groups than ranks.
    """
    pieces: dict[Hashable, list[int]] = {}
    for index in range(len(costs)):
        pieces.setdefault(index if groups is None else groups[index], []).append(index)
    if len(pieces) < ranks:
        pieces = {index: [index] for index in range(len(costs))}
    weighed = sorted(
        ((sum(costs[i] for i in own), own) for own in pieces.values()), key=lambda pair: (-pair[0], pair[1])
    )
    loads, found = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for cost, own in weighed:
        least = loads.index(min(loads))
        loads[least] += cost
        found[least] += own
    return [sorted(own) for own in found]
