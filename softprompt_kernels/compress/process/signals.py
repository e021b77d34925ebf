"""SIGTERM (Slurm, Kubernetes) and SIGHUP (a closed terminal) as interrupts, so that a run saves as at Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """The process was asked to end by a signal. What handles Ctrl-C handles it too.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


def signal_of(interrupt: KeyboardInterrupt) -> int:
    """The number of the signal that interrupted the process."""
    return interrupt.signal if isinstance(interrupt, Terminated) else signal.SIGINT


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Within the context, the first SIGTERM or SIGHUP raises `Terminated`.

    After it a SIGTERM or Ctrl-C ends the process at once. A SIGHUP is ignored then, because a terminal that closes
    sends several, from its shell and from the system.

    A signal that is ignored (as by nohup) or that the caller handles stays as it is. In other threads than the main one
    nothing changes, because Python has no handlers there.
    """
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in SIGNALS if in_main and signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else signal.SIG_IGN)
        raise Terminated(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
