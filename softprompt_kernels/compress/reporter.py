"""What long work tells whoever started it: stages, progress and figures. The command line draws it; tests drop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called as work is done."""

    def __call__(self, count: int, **figures: float) -> None:
        """`count` more units are done; `figures` are shown beside the bar, as the loss of a step."""


class Reporter(Protocol):
    """Receives messages and progress."""

    def message(self, text: str) -> None:
        """One line for the reader."""

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A stage of `total` units, open as long as the context is."""


class SilentReporter:
    """Reports nothing."""

    def message(self, text: str) -> None:
        """Dropped."""

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Dropped."""

        def advance(count: int, **figures: float) -> None:
            pass

        yield advance
