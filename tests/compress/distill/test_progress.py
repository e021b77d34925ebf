"""What a training remembers: the best evaluation, how many came since then, and a step that is not recorded yet."""

import math

import pytest

from softprompt_kernels.compress.distill.progress import Progress, read_notes
from softprompt_kernels.compress.distill.trainer import StepReport

REPORT = StepReport(7, 0.1 + 0.2, 1e-30, 2e-2, 41, 0.25)


def after(*evaluations: tuple[int, float | None]) -> Progress:
    progress = Progress()
    for step, kl in evaluations:
        progress = progress.after(step, kl)
    return progress


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ([(0, 0.5)], Progress(0, 0, 0.5, 0)),
        ([(0, 0.5), (1, None), (2, 0.4)], Progress(2, 2, 0.4, 0)),
        ([(0, 0.5), (2, 0.4), (4, 0.6), (6, 0.5)], Progress(6, 2, 0.4, 2)),
        ([(0, 0.5), (2, 0.5)], Progress(2, 0, 0.5, 1)),  # equal is no improvement
        ([(0, 0.5), (2, math.nan), (4, math.inf)], Progress(4, 0, 0.5, 2)),
        ([(0, math.nan), (2, 0.4)], Progress(2, 2, 0.4, 0)),
        ([(0, 0.5), (2, 0.6), (4, 0.4)], Progress(4, 4, 0.4, 0)),
    ],
)
def test_the_lowest_evaluation_is_the_best(evaluations: list[tuple[int, float | None]], expected: Progress) -> None:
    assert after(*evaluations) == expected


def test_evaluations_that_are_repeated_after_a_crash_do_not_count_again() -> None:
    best = after((0, 0.5), (2, 0.6), (4, 0.3))._replace(recorded=0)
    assert best.after(2, 0.6).after(4, 0.3) == best._replace(recorded=4)
    assert best.after(2, 0.6).after(4, 0.3).after(6, 0.4).waited == 1


def test_notes_are_read_back_to_the_last_bit() -> None:
    progress = after((6, 1 / 3))
    assert read_notes(progress.notes(REPORT), 7) == (progress, REPORT)
    assert read_notes(progress.after(7, None).notes(REPORT), 7) == (progress.after(7, None), None)
    assert read_notes(Progress().notes(None), 0) == (Progress(), None)


def test_a_checkpoint_of_the_version_before_has_recorded_its_step() -> None:
    assert read_notes({}, 5) == (Progress(recorded=5), None)
