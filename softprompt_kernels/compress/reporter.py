"""The interface for progress: messages, stages, and figures of a stage. The command line draws them as bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Advances the bar of one stage."""

    def __call__(self, count: int, **figures: float) -> None:
        """`count` more units are done. `figures`, such as the loss of a step, are shown next to the bar."""


class Reporter(Protocol):
    """Receives messages and progress."""

    def message(self, text: str) -> None:
        """Show the line `text`."""

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A context manager for a stage of `total` units.

        `description` names the stage, and `unit` is the singular noun for one of its units. It gives an `Advance`.
        """


class SilentReporter:
    """Reports nothing."""

    def message(self, text: str) -> None:
        """Does nothing with `text`."""

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """A stage that shows nothing. Arguments as in `Reporter.progress`."""

        def advance(count: int, **figures: float) -> None:
            pass

        yield advance
