"""The cases of the suites `attention` and `kl`, and how one is measured.

A case is a problem of a given size. An implementation is a function that takes the inputs of a case and returns a call;
the call does the work once. What is made before the call (masks, buffers) is not timed and counts as input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.harness.recorded_calls import record_backends
from softprompt_kernels.bench.memory import PeakResident, in_fresh_process, release_freed_memory
from softprompt_kernels.bench.rounds import BASELINE, OURS, Comparison, Entry, Results, check_and_time

Implementation = Callable[[Any], Callable[[], Results]]
Rule = tuple[str, float]  # kind and limit, see requirements.py
COMPOSED = "composed"


class Case(Protocol):
    """A problem. It is pickled and made again in the process in which memory is measured."""

    @property
    def name(self) -> str:
        """Its sizes, as the table shows them."""

    @property
    def flop(self) -> float | None:
        """Useful FLOP; the same for every implementation."""

    @property
    def tolerance(self) -> float:
        """The largest accepted ‖difference‖ / ‖ours‖ between results."""

    @property
    def result_bytes(self) -> int:
        """Bytes of the results."""

    def inputs(self) -> Any:
        """The inputs, made from a fixed seed."""

    def implementations(self) -> Mapping[str, tuple[str, Implementation]]:
        """`name -> (role, implementation)`; the first is `OURS`."""

    def compiled(self) -> Mapping[str, tuple[str, Implementation]]:
        """The implementations that use torch.compile."""

    def rules(self) -> list[Rule]:
        """What is required of ours."""

    def tiny(self) -> Case:
        """The same problem in a size that takes no time."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run of the suites.

    Args:
        quick: tiny sizes and one round. The run shows that the suites work, not how fast the kernels are.
        compiled: also measure torch.compile.
    """

    quick: bool
    compiled: bool


def measure(
    benchmark: Any, suite: str, case: Case, settings: Settings, *, seconds: float, max_rounds: int, extra: list[Entry]
) -> None:
    """Compare the implementations of a case: results, time and peak memory.

    Args:
        benchmark: pytest-benchmark's fixture; the record goes to its `extra_info`.
        suite: the suite that the report shows the case under.
        seconds, max_rounds: see `check_and_time`.
        extra: further entries beside the case's own implementations.
    """
    case = case.tiny() if settings.quick else case
    inputs = case.inputs()
    implementations = dict(case.implementations())
    if settings.compiled:
        implementations |= case.compiled()
    backends: dict[str, set[str]] = {}
    entries = []
    for name, (role, implementation) in implementations.items():
        call = implementation(inputs)
        with record_backends() as backends[name]:
            call()
        if name == COMPOSED and backends[name] == backends[OURS]:
            continue  # ours already runs on the composed backend
        measured = role == OURS or not settings.quick
        peak = in_fresh_process(_peak_in_this_process, case, name, torch.get_num_threads()) if measured else None
        entries.append(Entry(name, role, call, case.flop if role in (OURS, BASELINE) else None, peak))
    comparison = Comparison([*entries, *extra], case.tolerance)
    check_and_time(benchmark, comparison, seconds=seconds, max_rounds=max_rounds, quick=settings.quick)
    benchmark.extra_info |= {
        "suite": suite,
        "case": case.name,
        "flop": case.flop,
        "backends": sorted(backends[OURS]),
        "rules": case.rules(),
        "result_bytes": case.result_bytes,
    }


def _peak_in_this_process(case: Case, name: str, threads: int) -> int:
    """Peak bytes of one run above the inputs. A tiny run before it sets up the libraries."""
    torch.set_num_threads(threads)
    compiled = name in case.compiled()
    _, implementation = (case.compiled() if compiled else case.implementations())[name]
    # Compiled code serves one size only, and compiling takes memory that a run does not: warm up at the full size.
    warm = case if compiled else case.tiny()
    warm_call = implementation(warm.inputs())
    warm_call()
    call = warm_call if compiled else implementation(case.inputs())
    del warm_call
    release_freed_memory()
    with PeakResident() as peak:
        results = call()
    del results
    return peak.growth
