"""Compares two runs of the same machine, row by row, by the ratios of their times to the reference beside them.

| verdict | when |
|---|---|
| slower | the interval's lower limit is above 1 + threshold |
| faster | its upper limit is below 1 / (1 + threshold) |
| same | the whole interval is between these two |
| unclear | the interval is too wide to say; more rounds or a quieter machine would narrow it |

The interval is that of softprompt_kernels/bench/statistics.py, corrected for the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from softprompt_kernels.bench.measure import Row
from softprompt_kernels.bench.plan import Plan
from softprompt_kernels.bench.record import Run, machine_of
from softprompt_kernels.bench.statistics import ERROR_RATE, Interval, ratio_interval
from softprompt_kernels.bench.table import milliseconds
from softprompt_kernels.errors import SoftPromptError

SLOWER, FASTER, SAME, UNCLEAR = "slower", "faster", "same", "unclear"
NO_ROW = "the runs have no row in common: op, shape, dtype, pass and implementation must be equal"
STYLES = {SLOWER: "bold red", FASTER: "green", SAME: None, UNCLEAR: "yellow"}


@dataclass(frozen=True)
class Difference:
    """One row of two runs."""

    base: Row
    new: Row
    ratio: Interval  # new over base, of the times relative to the reference
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All rows of two runs.

    Args:
        differences: of the rows that both runs have.
        only_base, only_new: the other rows.
    """

    differences: list[Difference]
    only_base: list[Row]
    only_new: list[Row]

    @property
    def slower(self) -> list[Difference]:
        """The rows of our backends that are slower."""
        return [one for one in self.differences if one.verdict == SLOWER and one.new.ours]


def compare(base: Run, new: Run, threshold: float) -> Comparison:
    """Compare two runs.

    Args:
        base, new: the runs.
        threshold: what change matters; 0.1 is a tenth.

    Raises:
        SoftPromptError: the runs are of different machines or suites, or have no row in common.
    """
    _check_same(base, new.title, new.machine)
    before = {row.key: row for row in base.measured.rows}
    after = {row.key: row for row in new.measured.rows}
    both = [key for key in before if key in after]
    if not both:
        raise SoftPromptError(NO_ROW)
    differences = [_difference(before[key], after[key], threshold, ERROR_RATE / len(both)) for key in both]
    return Comparison(
        differences,
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
    )


def check_plan(base: Run, plan: Plan) -> None:
    """Check before a run that it can be compared with an earlier one.

    Args:
        base: the earlier run.
        plan: of the run to come, on this machine.

    Raises:
        SoftPromptError: as `compare`.
    """
    _check_same(base, plan.title, machine_of(plan))
    problems = {
        (case.op, case.shape, plan.dtype_name, pass_, name)
        for case in plan.cases
        for pass_ in plan.passes
        for name in (*plan.backends, *plan.peers)
    }
    if not any(row.key in problems for row in base.measured.rows):
        raise SoftPromptError(NO_ROW)


def _check_same(base: Run, title: str, machine: dict[str, Any]) -> None:
    different = [
        f"{name} {base.machine.get(name)!r} and {machine.get(name)!r}"
        for name in dict.fromkeys([*base.machine, *machine])
        if base.machine.get(name) != machine.get(name)
    ]
    if different:
        raise SoftPromptError(
            f"the runs are of different machines or installations ({'; '.join(different)}): their times cannot be "
            f"compared; measure both on the same one"
        )
    if base.title != title:
        raise SoftPromptError(f"the runs are of different suites: {base.title!r} and {title!r}")


def _difference(base: Row, new: Row, threshold: float, error_rate: float) -> Difference:
    ratio = ratio_interval(_relative(base), _relative(new), error_rate)
    return Difference(base, new, ratio, verdict_of(ratio, threshold))


def verdict_of(ratio: Interval, threshold: float) -> str:
    """What an interval says."""
    above, below = 1 + threshold, 1 / (1 + threshold)
    if ratio.low > above:
        return SLOWER
    if ratio.high < below:
        return FASTER
    return SAME if below <= ratio.low and ratio.high <= above else UNCLEAR


def _relative(row: Row) -> list[float]:
    """The times of all rounds, each over that of the reference beside it."""
    return [one / other for one, other in zip(row.timed.seconds, row.timed.reference_seconds, strict=True)]


def comparison_table(comparison: Comparison, threshold: float) -> RenderableType:
    """The rows, and a summary."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("problem, implementation", overflow="fold")
    for name in ("base", "new", "new / base", "interval", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for number, (_, group) in enumerate(groupby(comparison.differences, key=lambda one: one.new.problem)):
        for index, one in enumerate(group):
            if index == 0:
                if number:
                    table.add_row()
                table.add_row(f"{one.new.op} {one.new.shape}", style="bold")
                table.add_row(f"{one.new.pass_}, {one.new.dtype}", style="bold")
            low, middle, high = one.ratio
            table.add_row(
                f"  {one.new.implementation}",
                milliseconds(one.base.seconds),
                milliseconds(one.new.seconds),
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                one.verdict,
                style=STYLES[one.verdict],
            )
    counts = {verdict: sum(one.verdict == verdict for one in comparison.differences) for verdict in STYLES}
    lines = [
        f"\nnew / base is relative to the reference beside each measurement; slower means above {1 + threshold:g}.",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) + ".",
    ]
    for name, rows in (("the base run", comparison.only_base), ("the new run", comparison.only_new)):
        lines += [f"only in {name}, not compared: {' '.join(row.problem)} {row.implementation}" for row in rows]
    return Group(table, *(Text(line) for line in lines))
