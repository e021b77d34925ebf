"""The suite `kl`; cases in kl_cases.py, ways in kl_ways.py."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from benchmarks.harness.case import Settings, measure
from benchmarks.suites.kl_cases import CASES, KlCase

SECONDS, ROUNDS = 20, 7
LOGITS_AT_ONCE = 12  # tensors of that size that F.kl_div, the floor and a kept teacher take together, and some room


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_kl(benchmark: Any, case: KlCase, settings: Settings) -> None:
    needed = LOGITS_AT_ONCE * 4 * case.tokens * case.vocab
    if not settings.quick and psutil.virtual_memory().available < needed:
        pytest.skip(f"it needs {needed / 2**30:.1f} GiB of free memory")
    measure(benchmark, "kl", case, settings, seconds=SECONDS, most=ROUNDS, extra=[])
