"""Progress: bars on a terminal, lines of text in a log file."""

import io

import pytest
from rich.console import Console

from softprompt_kernels.cli.display import show_table
from softprompt_kernels.cli.progress import PlainReporter, RichReporter, terminal_reporter
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.sizes import size


class Clock:
    """A clock that a test moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> tuple[PlainReporter, list[str], Clock]:
    """A reporter that prints every 10 s, its lines, and its clock."""
    lines: list[str] = []
    clock = Clock()
    return PlainReporter(lines.append, clock, interval=10.0), lines, clock


def test_a_log_gets_a_line_per_interval_with_rate_and_time_left(log):
    reporter, lines, clock = log
    with reporter.progress("Training", 100, "step") as advance:
        for _ in range(20):
            clock.now += 2
            advance(1, loss=0.25, heldout_kl=0.5)
    assert lines == [
        "Training: 5/100, 2 s/step, 3 min 10 s left, loss 0.25, heldout kl 0.5",
        "Training: 10/100, 2 s/step, 3 min 00 s left, loss 0.25, heldout kl 0.5",
        "Training: 15/100, 2 s/step, 2 min 50 s left, loss 0.25, heldout kl 0.5",
        "Training: 20/100, 2 s/step, 2 min 40 s left, loss 0.25, heldout kl 0.5",
        "Training: 20 steps in 40 s",
    ]


def test_steps_before_a_resumed_run_do_not_count_for_the_rate(log):
    reporter, lines, clock = log
    with reporter.progress("Training", 100, "step") as advance:
        advance(50)
        clock.now += 20
        advance(10)
    assert lines[0] == "Training: 60/100, 2 s/step, 1 min 20 s left"


def test_a_short_stage_is_one_line_and_a_failed_one_none(log):
    reporter, lines, clock = log
    with reporter.progress("Asking", 3, "query") as advance:
        clock.now += 0.4
        advance(3)
    with pytest.raises(RuntimeError), reporter.progress("Training", 3, "step"):
        raise RuntimeError
    reporter.message("done")
    assert lines == ["Asking: 3 queries in 0.4 s", "done"]


def test_fast_work_is_shown_in_units_per_second(log):
    reporter, lines, clock = log
    with reporter.progress("Asking", 1000, "query") as advance:
        advance(0)
        clock.now += 10
        advance(500)
    assert lines[0] == "Asking: 500/1000, 50 queries/s, 10 s left"


def test_a_terminal_gets_a_bar_with_figures():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    reporter = RichReporter(console)
    with reporter.progress("Training [kl]", 4, "step") as advance:
        reporter.message("a [line] above")
        for _ in range(4):
            advance(1, loss=0.125)
    text = console.file.getvalue()
    assert "Training [kl]" in text and "4/4" in text and "loss 0.125" in text and "a [line] above" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (754, "12 min 34 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (640, "640 B"), (3170, "3.2 kB"), (99_960, "100 kB"), (999_600, "1.0 MB"), (5_200_000_000, "5.2 GB")],
)
def test_sizes_are_readable(count, text):
    assert size(count) == text


def test_a_table_on_a_terminal_has_the_same_cells(monkeypatch, capsys):
    monkeypatch.setattr("softprompt_kernels.cli.display.on_terminal", lambda: True)
    show_table(["before", "KL"], [["no context", "0.500"], ["soft prompt", "0.100"]], highlight="soft prompt")
    out = capsys.readouterr().out
    for cell in ("before", "KL", "no context", "0.500", "soft prompt", "0.100"):
        assert cell in out


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_display_that_is_gone_does_not_end_the_run(monkeypatch, terminal):
    stream = Gone()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", stream)
    reporter = terminal_reporter()
    assert isinstance(reporter, RichReporter if terminal else PlainReporter)
    reporter.message("Loading")
    with reporter.progress("Training", 2, "step") as advance:
        advance(2, loss=0.5)
