"""Progress on standard error, so that standard output holds only results.

On a terminal each stage is a bar with rate, time left and figures. Elsewhere, as in a log file, a stage prints a line
every `INTERVAL` seconds and one at its end, without control codes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.compress.reporter import Advance, Reporter

INTERVAL = 15.0
"""Seconds between two lines of one stage."""


def terminal_reporter() -> Reporter:
    """Bars if standard error is a terminal, else lines."""
    return RichReporter() if sys.stderr.isatty() else PlainReporter()


class Lasting:
    """A stream whose reader may go away: a closed terminal or pipe ends the display, and not the run.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or leave it."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or leave it."""
        with suppress(OSError):
            self.stream.flush()


def lasting_stderr() -> TextIO:
    """Standard error as a `Lasting` stream."""
    return cast(TextIO, Lasting(sys.stderr))


class RichReporter:
    """Shows progress as bars.

    Args:
        console: where to print; None: standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=lasting_stderr())

    def message(self, text: str) -> None:
        """Print a line above the current bar."""
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar, which stays on the screen when it is full."""
        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Rate(unit),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self.console,
        )
        with bars:
            bar = bars.add_task(description, total=total, figures="")

            def advance(count: int, **figures: float) -> None:
                shown = {"figures": _figures(figures)} if figures else {}
                bars.update(bar, advance=count, **shown)  # type: ignore[arg-type]

            yield advance


class PlainReporter:
    """Shows progress as lines of text.

    Args:
        write: prints a line; None: to standard error.
        clock: returns the time in seconds.
        interval: seconds between two lines of one stage.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ) -> None:
        self.write = write or (lambda line: typer.echo(line, lasting_stderr()))
        self.clock, self.interval = clock, interval

    def message(self, text: str) -> None:
        """Print a line."""
        self.write(text)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """A line every `interval` seconds, and one at the end unless an error ends the stage."""
        begin = last_line = self.clock()
        done = done_at_first = 0
        first: float | None = None  # time of the first call, which includes the units that a resumed run had done

        def advance(count: int, **figures: float) -> None:
            nonlocal done, done_at_first, first, last_line
            done, now = done + count, self.clock()
            if first is None:
                first, done_at_first = now, done
            if now - last_line >= self.interval and done < total:
                last_line = now
                parts = [f"{done}/{total}"]
                if now > first and done > done_at_first:
                    speed = (done - done_at_first) / (now - first)
                    parts += [_rate(speed, unit), f"{duration((total - done) / speed)} left"]
                self.write(f"{description}: " + ", ".join(filter(None, [*parts, _figures(figures)])))

        yield advance
        self.write(f"{description}: {_count(done, unit)} in {duration(self.clock() - begin)}")


class _Rate(ProgressColumn):
    """A column with units per second, or with seconds per unit if the work is slow."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate(speed, self.unit) if speed else "", style="progress.data.speed")


def _rate(speed: float, unit: str) -> str:
    return f"{speed:.3g} {_plural(unit)}/s" if speed >= 1 else f"{1 / speed:.3g} s/{unit}"


def _count(count: int, unit: str) -> str:
    return f"{count} {unit if count == 1 else _plural(unit)}"


def _plural(unit: str) -> str:
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
