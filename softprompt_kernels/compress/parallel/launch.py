"""What `torchrun` says about this process. Nothing is imported, so the command line can ask before torch is loaded."""

from __future__ import annotations

import os
from typing import NamedTuple

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """This process among those of a run.

    Args:
        rank: its number, from 0.
        world: how many there are; 1 without torchrun.
        local_rank: its number among those of this machine.
        local_world: how many are on this machine.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int


ALONE = Launch(0, 1, 0, 1)


def launched() -> Launch:
    """What the environment says. Without all that a process group needs, this process is alone."""
    try:
        rank, world = (int(os.environ[name]) for name in NEEDED[:2])
        local, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (KeyError, ValueError):
        return ALONE
    found = all(os.environ.get(name) for name in NEEDED) and 0 <= rank < world
    return Launch(rank, world, local, local_world) if found else ALONE


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return launched().rank == 0
