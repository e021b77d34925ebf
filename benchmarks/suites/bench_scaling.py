"""The suite `scaling`; see scaling.py. A contest is one op and one growing size, its entries are the sizes."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.case import Settings
from benchmarks.harness.comparison import OURS, TWIN, Contest, Entry, hold
from benchmarks.harness.recorded_calls import served_by
from benchmarks.suites.scaling_cases import AXES, Axis, note

SECONDS, ROUNDS = 5, 15
QUICK_POINTS = 2


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def bench_scaling(benchmark: Any, axis: Axis, settings: Settings) -> None:
    points = [(size, case.tiny()) for size, case in axis.points[:QUICK_POINTS]] if settings.quick else axis.points
    entries, backends = [], set()
    for size, case in points:
        call = case.ways()[OURS][1](case.inputs())
        with served_by() as served:
            call()
        backends |= served
        entries.append(Entry(f"{axis.letter} {size}", TWIN, call, case.flop))
    record = hold(benchmark, Contest(entries, None), seconds=SECONDS, most=ROUNDS, quick=settings.quick)
    benchmark.extra_info |= {
        "suite": "scaling",
        "case": axis.name,
        "in_table": False,
        "served_by": sorted(backends),
        "op": axis.op,
        "letter": axis.letter,
        "sizes": [size for size, _ in points],
        "work": [axis.work(case) for _, case in points],
        "medians": [entry["median"] for entry in record["entries"][: len(points)]],
        "rules": [],
    }
    benchmark.extra_info["notes"] = [note(benchmark.extra_info)]
