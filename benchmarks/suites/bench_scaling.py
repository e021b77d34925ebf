"""The suite `scaling`; its cases are in scaling_cases.py.

A comparison is one op with one growing size. Its entries are our implementation at each of the sizes.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.case import Settings
from benchmarks.harness.recorded_calls import record_backends
from benchmarks.suites.scaling_cases import AXES, Axis, summary
from softprompt_kernels.bench.rounds import OURS, PAIRED_VARIANT, Comparison, Entry, check_and_time

SECONDS, ROUNDS = 5, 15
QUICK_POINTS = 2


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def bench_scaling(benchmark: Any, axis: Axis, settings: Settings) -> None:
    points = [(size, case.tiny()) for size, case in axis.points[:QUICK_POINTS]] if settings.quick else axis.points
    entries, backends = [], set()
    for size, case in points:
        call = case.implementations()[OURS][1](case.inputs())
        with record_backends() as used:
            call()
        backends |= used
        entries.append(Entry(f"{axis.letter} {size}", PAIRED_VARIANT, call, case.flop))
    comparison = Comparison(entries, None)
    record = check_and_time(benchmark, comparison, seconds=SECONDS, max_rounds=ROUNDS, quick=settings.quick)
    benchmark.extra_info |= {
        "suite": "scaling",
        "case": axis.name,
        "in_table": False,
        "backends": sorted(backends),
        "op": axis.op,
        "letter": axis.letter,
        "sizes": [size for size, _ in points],
        "work": [axis.work(case) for _, case in points],
        "medians": [entry["median"] for entry in record["entries"][: len(points)]],
        "rules": [],
    }
    benchmark.extra_info["notes"] = [summary(benchmark.extra_info)]
