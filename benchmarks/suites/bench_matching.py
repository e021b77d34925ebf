"""The suite `matching`; its cases are in matching_cases.py."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.case import Settings, measure
from benchmarks.suites.matching_cases import CASES, MatchingCase

SECONDS, ROUNDS = 6, 15


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_matching(benchmark: Any, case: MatchingCase, settings: Settings) -> None:
    measure(benchmark, "matching", case, settings, seconds=SECONDS, max_rounds=ROUNDS, extra=[])
