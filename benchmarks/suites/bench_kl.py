"""The suite `kl`; its cases are in kl_cases.py, the implementations in kl_implementations.py."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from benchmarks.harness.case import Settings, measure
from benchmarks.suites.kl_cases import CASES, KlCase

SECONDS, ROUNDS = 20, 7
# Tensors of the size of the logits that are in memory together: those of F.kl_div, of the floor and of a cached
# teacher, and some room.
LOGITS_AT_ONCE = 12


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_kl(benchmark: Any, case: KlCase, settings: Settings) -> None:
    needed = LOGITS_AT_ONCE * 4 * case.tokens * case.vocab
    if not settings.quick and psutil.virtual_memory().available < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free memory")
    measure(benchmark, "kl", case, settings, seconds=SECONDS, max_rounds=ROUNDS, extra=[])
