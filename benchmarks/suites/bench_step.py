"""The suite `step`: a training step of ours with cached moments, against transformers and PEFT.

Ours is `compress.Trainer.train_step` with a KV prompt, on the backend that the ops choose and on `composed`. The
baseline is a PEFT CARTRIDGE of the same size, the teacher run over context + query + output in every step, the logits
of all tokens, `F.kl_div` on those that predict the output, AdamW. They are in step/implementations.py. All get the same
batch and start from the same prompt; their first losses have to be the same, else the suite fails.

    python -m pytest -c benchmarks/pytest.ini benchmarks -k step --model .cache/SmolLM2-135M-Instruct

The table shows seconds and peak memory above the loaded model (see step/memory.py). The notes below it show the first
losses, the parts of our step and what cached moments cost before training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.case import Settings
from benchmarks.harness.recorded_calls import record_backends
from softprompt_kernels.bench.rounds import BASELINE, OURS, Comparison, Entry, Results, check_and_time

BATCH, MICRO_BATCH, NEW_TOKENS = 8, 4, 48
QUICK_NEW_TOKENS = 6
SECONDS, ROUNDS = 90, 5
OVER_FLOOR = 1.3  # limit of the ops' time over that of their bare GEMMs


def bench_step(benchmark: Any, pytestconfig: pytest.Config, settings: Settings, tmp_path: Path) -> None:
    model = pytestconfig.getoption("--model")
    if model is None:
        pytest.skip("needs --model")
    pytest.importorskip("peft")
    from benchmarks.step.first_step import first_step
    from benchmarks.step.floor import measure_cost
    from benchmarks.step.implementations import IMPLEMENTATIONS
    from benchmarks.step.memory import peak_of

    problem, preparation = _problem(pytestconfig, model, settings, tmp_path)
    measured = list(IMPLEMENTATIONS)[: 1 if settings.quick else None]
    peaks = {name: peak_of(name, problem) for name in measured}
    with record_backends() as backends:
        started = first_step(problem)
    ours = next(iter(started.implementations))
    entries = [
        Entry(name, OURS if name == ours else BASELINE, _only_step(implementation.step), None, peaks.get(name))
        for name, implementation in started.implementations.items()
    ]
    comparison = Comparison(entries, None)
    check_and_time(benchmark, comparison, seconds=SECONDS, max_rounds=ROUNDS, quick=settings.quick)
    cost = measure_cost(started.implementations[ours], settings.quick)
    benchmark.extra_info |= {
        "suite": "step",
        "case": f"B{len(problem.examples)} context {len(problem.context_ids)} prompt {problem.tokens}",
        "flop": None,
        "backends": sorted(backends),
        "losses": started.losses,
        "gradient_difference": started.gradient_difference,
        "preparation_seconds": asdict(preparation),
        "parts": cost.parts,
        "other_operations": cost.others,
        "ops_over_floor": cost.over_floor,
        "rules": [
            ("speedup over the fastest baseline", 1.0),
            ("time of the ops over their floor", OVER_FLOOR),
        ],
        "notes": [
            problem.describe(),
            "first losses: " + "; ".join(f"{name} {loss:.6f}" for name, loss in started.losses.items()),
            f"difference of the first gradients of the prompt: {started.gradient_difference:.1e} of their norm",
            *cost.notes(),
            f"before training, not in the step: {preparation.context:.2f} s for the context, once, and "
            f"{preparation.moments_per_sequence:.3f} s for the moments of each sequence, once",
        ],
    }


def _only_step(step: Callable[[], float]) -> Callable[[], Results]:
    """A step without results to compare: the first losses were compared before, and later prompts move apart."""

    def run() -> Results:
        step()
        return ()

    return run


def _problem(config: pytest.Config, model: Path, settings: Settings, folder: Path) -> Any:
    """The problem, and what its preparation cost."""
    from benchmarks.step.problem import make_problem
    from softprompt_kernels.compress import load_model
    from softprompt_kernels.compress.inputs import read_text
    from softprompt_kernels.compress.sources.queries import load_queries

    loaded, tokenizer = load_model(str(model), "float32", "cpu")
    return make_problem(
        str(model),
        loaded,
        tokenizer,
        read_text(config.getoption("--context"), "context"),
        load_queries(config.getoption("--queries"))[:BATCH],
        folder,
        micro_batch_size=MICRO_BATCH,
        new_tokens=QUICK_NEW_TOKENS if settings.quick else NEW_TOKENS,
    )
