"""The suite `attention`; cases in attention_cases.py, ways in attention_ways.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness.case import Rule, Settings, measure
from benchmarks.harness.comparison import TWIN, Entry
from benchmarks.suites.attention_cases import BF16_TIME, CASES, ODD, ODD_COST, AttentionCase
from benchmarks.suites.attention_implementations import ours

SECONDS, ROUNDS = 4, 25


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_attention(benchmark: Any, case: AttentionCase, settings: Settings) -> None:
    twin, rules = _twin(case, settings)
    measure(benchmark, "attention", case, settings, seconds=SECONDS, most=ROUNDS, extra=twin)
    benchmark.extra_info["rules"] += rules


def _twin(case: AttentionCase, settings: Settings) -> tuple[list[Entry], list[Rule]]:
    """Ours on the problem that a case is measured against: fp32 for bf16, M = 256 for M = 257."""
    if case.dtype == torch.bfloat16:
        other, rules, name = replace(case, dtype=torch.float32), [("times the twin's time", BF16_TIME)], "ours, fp32"
    elif case in ODD:
        other, rules, name = replace(case, queries=256), [("times the twin's cost", ODD_COST)], "ours, M 256"
    else:
        return [], []
    other = other.tiny() if settings.quick else other
    return [Entry(name, TWIN, other.run(ours)(other.inputs()), other.flop)], rules
