"""Small problems that are measured in a moment, and runs of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from softprompt_kernels.bench import measure as measuring
from softprompt_kernels.bench.measure import Measured
from softprompt_kernels.bench.plan import make_plan
from softprompt_kernels.bench.record import Run, run_of
from softprompt_kernels.kernels.cpu import native

SHAPES = {"prompt_attention": "B2 H4/2 M32 P16 D32", "kl_div": "N16 V2048"}
ROUNDS = 16


@pytest.fixture(autouse=True, scope="session")
def needs_the_cpu_backend() -> None:
    if reason := native.missing():
        pytest.skip(f"the cpu backend: {reason}")


@pytest.fixture(scope="session")
def run_here() -> Callable[..., Run]:
    """Measures the small problems, on one backend and without peers unless told otherwise."""

    def run(ops: Sequence[str] = tuple(SHAPES), **more: Any) -> Run:
        settings: dict[str, Any] = {"backends": ["cpu"], "peers": ["none"], "passes": ["forward+backward"], **more}
        rows, missing, load = [], [], 0.0
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the clock cannot see what other threads wait for
        try:
            for op in ops:
                plan = make_plan(ops=[op], shapes=[SHAPES[op]], **settings)
                found = measuring.measure(plan, rounds=ROUNDS, memory=False)
                rows, missing, load = rows + found.rows, missing + found.left_out, max(load, found.other_load)
            return run_of(plan, Measured(rows, missing, load))
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend cpu takes a fifth longer: each call spins for a fifth of its own time."""
    prepare = measuring.prepare

    def slowed(case: Any, name: str, inputs: Any, pass_: str) -> Callable[[], Any]:
        call = prepare(case, name, inputs, pass_)

        def run() -> Any:
            begin = time.thread_time()
            results = call()
            end = time.thread_time() + 0.2 * (time.thread_time() - begin)
            while time.thread_time() < end:
                pass
            return results

        return run if name == "cpu" else call

    monkeypatch.setattr(measuring, "prepare", slowed)
