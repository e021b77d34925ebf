"""A failure or a signal on one rank, as all others hear of it.

The first rank that stops writes a record to the store of the process group: who, whether by an error or a signal, and
its words. Whoever waits for an exchange looks there every half second, and again when the connection to another rank
breaks. A rank that was killed leaves no record: its connections break.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.distributed import Store

from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.signals import Terminated, signal_of
from softprompt_kernels.errors import SoftPromptError

RECORD, HEARD, LEFT = "stopped", "heard", "left"  # keys of the store; each other rank than the first has a `left`
PATIENCE = 5.0  # seconds that a rank waits for rank 0 to hear of its end, or for the record of a rank that is gone
_PAUSE = 0.02


class OtherRankFailed(SoftPromptError):
    """Another rank of the run has failed. The message begins with its number."""


@dataclass(frozen=True)
class Stop:
    """Why a rank stopped.

    Args:
        rank: which.
        signal: the number of the signal; None for an error.
        words: of the error.
    """

    rank: int
    signal: int | None
    words: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Stop:
        """What to record of an exception."""
        if isinstance(error, Interrupted):
            return cls(rank, error.signal, "")
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, signal_of(error), "")
        text = " ".join(str(error).split())
        if isinstance(error, SoftPromptError | OSError) and text:
            return cls(rank, None, text)
        return cls(rank, None, ": ".join(filter(None, [type(error).__name__, text])))

    def raise_here(self) -> NoReturn:
        """Raise on a rank that hears of it."""
        if self.signal is not None:
            raise Terminated(self.signal)
        raise OtherRankFailed(f"process {self.rank}: {self.words}")


def record(store: Store, stop: Stop) -> Stop:
    """Write a record, unless another rank was first. Returns the record that stands."""
    stored: Any = store.compare_set(RECORD, "", json.dumps([stop.rank, stop.signal, stop.words]))
    return Stop(*json.loads(stored))


def recorded(store: Store) -> Stop | None:
    """The record; None while no rank has stopped."""
    return Stop(*json.loads(store.get(RECORD))) if store.check([RECORD]) else None


def raise_lost(store: Store, cause: BaseException) -> NoReturn:
    """Raise what another rank has recorded, after an exchange with it has failed; without a record, that it is gone."""
    end = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end:
            if (stop := recorded(store)) is not None:
                stop.raise_here()
            time.sleep(_PAUSE)
    except RuntimeError:  # the store is gone too
        pass
    raise OtherRankFailed(
        "another process of this run has ended without a word: it was killed, or its machine cannot be reached; the "
        "same command resumes the run"
    ) from cause


def hear(store: Store, rank: int, world: int, holds_store: bool) -> bool:
    """Rank 0 says that it knows of the end of the run, and the others wait for that. Returns whether rank 0 knows.

    Args:
        store: of the run.
        rank, world: of this rank, and how many there are.
        holds_store: whether the store ends with rank 0, which then waits until the others have looked.
    """
    if rank == 0:
        store.set(HEARD, "1")
        if holds_store:
            _wait_for(store, [f"{LEFT}-{other}" for other in range(1, world)])
        return True
    found = _wait_for(store, [HEARD])
    store.set(f"{LEFT}-{rank}", "1")
    return found


def _wait_for(store: Store, keys: list[str]) -> bool:
    """Whether all keys are there, within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True
