"""Progress of long work on standard error, so that standard output holds results alone.

On a terminal a bar a stage, with rate, time left and figures. Elsewhere, as in a log, one line at the end of a stage
and one every now and then before it, without control codes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from softprompt_kernels.cli.display import duration
from softprompt_kernels.compress.reporter import Advance, Reporter

INTERVAL = 15.0
"""Seconds between the lines of a log."""


def terminal_reporter() -> Reporter:
    """Bars if standard error is a terminal, lines if not."""
    return RichReporter() if sys.stderr.isatty() else PlainReporter()


class RichReporter:
    """Bars.

    Args:
        console: where to; None: standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def message(self, text: str) -> None:
        """A line above the bar that is moving."""
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar that stays when it is full."""
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
    """Lines.

    Args:
        write: takes a line; None: standard error.
        clock: seconds from any start.
        interval: seconds between lines within a stage.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ) -> None:
        self.write = write or (lambda line: typer.echo(line, err=True))
        self.clock, self.interval = clock, interval

    def message(self, text: str) -> None:
        """One line."""
        self.write(text)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """A line every `interval` seconds, and one at the end unless the stage is left by an error."""
        begin = last = self.clock()
        done = before = 0
        since: float | None = None  # the first report: what a resumed run had done already comes with it

        def advance(count: int, **figures: float) -> None:
            nonlocal done, before, since, last
            done, now = done + count, self.clock()
            if since is None:
                since, before = now, done
            if now - last >= self.interval and done < total:
                last = now
                parts = [f"{done}/{total}"]
                if now > since and done > before:
                    speed = (done - before) / (now - since)
                    parts += [_rate(speed, unit), f"{duration((total - done) / speed)} left"]
                self.write(f"{description}: " + ", ".join(filter(None, [*parts, _figures(figures)])))

        yield advance
        self.write(f"{description}: {_count(done, unit)} in {duration(self.clock() - begin)}")


class _Rate(ProgressColumn):
    """Units a second, or seconds a unit where that reads better."""

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
