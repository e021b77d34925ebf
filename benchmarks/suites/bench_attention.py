"""The suite `attention`; its cases are in attention_cases.py, the implementations in attention_implementations.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness.case import Rule, Settings, measure
from benchmarks.suites.attention_cases import BF16_TIME, CASES, UNALIGNED, UNALIGNED_COST, AttentionCase
from benchmarks.suites.attention_implementations import ours
from softprompt_kernels.bench.rounds import PAIRED_VARIANT, Entry

SECONDS, ROUNDS = 4, 25


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_attention(benchmark: Any, case: AttentionCase, settings: Settings) -> None:
    variant, rules = _paired_variant(case, settings)
    measure(benchmark, "attention", case, settings, seconds=SECONDS, max_rounds=ROUNDS, extra=variant)
    benchmark.extra_info["rules"] += rules


def _paired_variant(case: AttentionCase, settings: Settings) -> tuple[list[Entry], list[Rule]]:
    """Ours on the problem that the case is compared with: fp32 for bf16, M = 256 for M = 257."""
    rules: list[Rule]
    if case.dtype == torch.bfloat16:
        name, variant = "ours, fp32", replace(case, dtype=torch.float32)
        rules = [("time over the paired variant's", BF16_TIME)]
    elif case in UNALIGNED:
        name, variant = "ours, M 256", replace(case, queries=256)
        rules = [("time per FLOP over the paired variant's", UNALIGNED_COST)]
    else:
        return [], []
    variant = variant.tiny() if settings.quick else variant
    run = variant.implementation(ours)(variant.inputs())
    return [Entry(name, PAIRED_VARIANT, run, variant.flop)], rules
