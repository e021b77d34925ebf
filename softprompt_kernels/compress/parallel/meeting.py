"""How the processes of a run find each other in a store that may hold what earlier attempts have left.

torchrun keeps one store while it restarts processes, and an earlier process may have died at any point. So each process
says hello with a word of its own, and rank 0 answers each word with the name of the new session:

    rank r    hello-r = word                               waits until welcome-r begins with its word
    rank 0                 welcome-r = word, session       waits for ready-session-r of all, and answers new words

All further keys have the session in their names.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import Store

from softprompt_kernels.errors import SoftPromptError

_PAUSE = 0.01


def meet(store: Store, rank: int, world: int, patience: timedelta) -> str:
    """The name of the new session, the same on all ranks, once all are here.

    Raises:
        SoftPromptError: some have not come in time.
    """
    end, word = time.monotonic() + patience.total_seconds(), uuid.uuid4().hex
    missing, answered = set(range(1, world)) if rank == 0 else {0}, dict[int, str]()
    if rank:
        store.set(f"hello-{rank}", word)
    while missing:
        if rank == 0:
            for other in [*missing]:
                if store.check([f"ready-{word}-{other}"]):
                    missing.discard(other)
                elif store.check([f"hello-{other}"]):
                    hello = store.get(f"hello-{other}").decode()
                    if answered.get(other) != hello:
                        store.set(f"welcome-{other}", f"{hello} {word}")
                        answered[other] = hello
        elif store.check([f"welcome-{rank}"]):
            to, session = store.get(f"welcome-{rank}").decode().split()
            if to == word:
                store.set(f"ready-{session}-{rank}", "1")
                return session
        if time.monotonic() > end:
            raise SoftPromptError(
                f"torchrun: process {rank} of {world} has waited {patience.total_seconds():.0f} s for process "
                f"{', '.join(map(str, sorted(missing)))}; accepted are {world} processes that are started together"
            )
        time.sleep(_PAUSE)
    return word
