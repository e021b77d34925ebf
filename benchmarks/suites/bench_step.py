"""The suite `step`: a training step of ours, on the chosen backend and on `composed`, and the obvious one.

The sides are those of step.py, on the demo's model and text. Their first losses have to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.case import Settings
from benchmarks.harness.comparison import ALTERNATIVE, OURS, Contest, Entry, Results, hold
from benchmarks.harness.recorded_calls import served_by

BATCH, MICRO_BATCH, NEW_TOKENS = 8, 4, 48
QUICK_NEW_TOKENS = 6
SECONDS, ROUNDS = 90, 5
OVER_FLOOR = 1.3  # times the ops' own products, required


def bench_step(benchmark: Any, pytestconfig: pytest.Config, settings: Settings, tmp_path: Path) -> None:
    model = pytestconfig.getoption("--model")
    if model is None:
        pytest.skip("it needs --model")
    pytest.importorskip("peft")
    from benchmarks.step.comparison import describe, first_steps
    from benchmarks.step.floor import cost
    from benchmarks.step.implementations import SIDES
    from benchmarks.step.memory import peak_of

    problem = _problem(pytestconfig, model, settings, tmp_path)
    measured = list(SIDES)[: 1 if settings.quick else None]
    peaks = {name: peak_of(name, problem) for name in measured}
    with served_by() as backends:
        sides, losses, difference = first_steps(problem)
    ours = next(iter(sides))
    entries = [
        Entry(name, OURS if name == ours else ALTERNATIVE, _stepping(side.step), None, peaks.get(name))
        for name, side in sides.items()
    ]
    hold(benchmark, Contest(entries, None), seconds=SECONDS, most=ROUNDS, quick=settings.quick)
    spent = cost(sides[ours], settings.quick)
    benchmark.extra_info |= {
        "suite": "step",
        "case": f"B{len(problem.examples)} context {len(problem.context_ids)} prompt {problem.tokens}",
        "flop": None,
        "served_by": sorted(backends),
        "losses": losses,
        "gradient_difference": difference,
        "parts": spent.parts,
        "over_own_floor": spent.over_floor,
        "rules": [("never slower", 1.0), ("ops over their own floor", OVER_FLOOR)],
        "notes": [
            describe(problem).splitlines()[0],
            *spent.notes(),
            f"first losses {', '.join(f'{name} {loss:.6f}' for name, loss in losses.items())}",
        ],
    }


def _stepping(step: Callable[[], float]) -> Callable[[], Results]:
    """Losses were compared before: later ones are of prompts that have moved apart."""

    def run() -> Results:
        step()
        return ()

    return run


def _problem(config: pytest.Config, model: Path, settings: Settings, folder: Path) -> Any:
    from benchmarks.step.problem import make_problem
    from softprompt_kernels.compress import load_model
    from softprompt_kernels.compress.inputs import read_text
    from softprompt_kernels.compress.sources.queries import load_queries

    loaded, tokenizer = load_model(str(model), "float32", "cpu")
    problem, _ = make_problem(
        str(model),
        loaded,
        tokenizer,
        read_text(config.getoption("--context"), "context"),
        load_queries(config.getoption("--queries"))[:BATCH],
        folder,
        micro_batch_size=MICRO_BATCH,
        new_tokens=QUICK_NEW_TOKENS if settings.quick else NEW_TOKENS,
    )
    return problem
