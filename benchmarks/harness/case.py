"""What a case of the suites `attention` and `kl` is, and how one is measured.

A case is a problem of some size. A way is a function from its inputs to a call that does the work once: what is made
before the call (masks, buffers) is not timed and counts as input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.harness.comparison import ALTERNATIVE, OURS, Contest, Entry, Results, hold
from benchmarks.harness.memory import PeakResident, give_back_freed, in_fresh_process
from benchmarks.harness.recorded_calls import served_by

Way = Callable[[Any], Callable[[], Results]]
Rule = tuple[str, float]  # see requirements.py
COMPOSED = "composed"


class Case(Protocol):
    """A problem. It is pickled, to be made again in the process that memory is measured in."""

    @property
    def name(self) -> str:
        """Its sizes, as the table shows them."""

    @property
    def flop(self) -> float | None:
        """Useful FLOP, of any way."""

    @property
    def tolerance(self) -> float:
        """Of the results of any two ways."""

    @property
    def result_bytes(self) -> int:
        """Of what a way returns."""

    def inputs(self) -> Any:
        """Made from a fixed seed."""

    def ways(self) -> Mapping[str, tuple[str, Way]]:
        """`name -> (role, way)`, the first is `OURS`."""

    def compiled(self) -> Mapping[str, tuple[str, Way]]:
        """Those that torch.compile makes."""

    def rules(self) -> list[Rule]:
        """What is required of ours."""

    def tiny(self) -> Case:
        """The same in a size that takes no time."""


@dataclass(frozen=True)
class Settings:
    """Of a run of the suites.

    Args:
        quick: tiny sizes, one round: whether it works, not how fast.
        compiled: measure torch.compile too.
        left_out: gets a sentence for all that was not measured.
    """

    quick: bool
    compiled: bool
    left_out: set[str] = field(default_factory=set)


def measure(
    benchmark: Any, suite: str, case: Case, settings: Settings, *, seconds: float, most: int, extra: list[Entry]
) -> None:
    """Hold the contest of a case.

    Args:
        benchmark: pytest-benchmark's fixture; its `extra_info` gets the record.
        suite: the report groups by it.
        seconds, most: of the rounds.
        extra: entries beside the case's own ways.
    """
    case = case.tiny() if settings.quick else case
    inputs = case.inputs()
    ways = dict(case.ways())
    if settings.compiled:
        ways |= case.compiled()
    served: dict[str, set[str]] = {}
    entries = []
    for name, (role, way) in ways.items():
        call = way(inputs)
        with served_by() as served[name]:
            call()
        if name == COMPOSED and served[name] == served[OURS]:
            continue  # ours already is
        measured = role == OURS or not settings.quick
        peak = in_fresh_process(_peak_here, case, name, torch.get_num_threads()) if measured else None
        entries.append(Entry(name, role, call, case.flop if role in (OURS, ALTERNATIVE) else None, peak))
    contest = Contest([*entries, *extra], case.tolerance)
    hold(benchmark, contest, seconds=seconds, most=most, quick=settings.quick)
    benchmark.extra_info |= {
        "suite": suite,
        "case": case.name,
        "flop": case.flop,
        "served_by": sorted(served[OURS]),
        "rules": case.rules(),
        "result_bytes": case.result_bytes,
    }


def _peak_here(case: Case, name: str, threads: int) -> int:
    """Bytes above the inputs that one run takes. A tiny run before it has set up the libraries."""
    torch.set_num_threads(threads)
    compiled = name in case.compiled()
    _, way = (case.compiled() if compiled else case.ways())[name]
    # What was compiled is for one size, and compiling takes memory that running does not.
    warm = case if compiled else case.tiny()
    warm_call = way(warm.inputs())
    warm_call()
    call = warm_call if compiled else way(case.inputs())
    del warm_call
    give_back_freed()
    with PeakResident() as peak:
        results = call()
    del results
    return peak.growth


def compile_afresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one size. What it made before is forgotten, since it gives up on a function of many sizes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def compiler_missing() -> str | None:
    """Why torch.compile cannot make code for this CPU; None if it can."""
    if sys.platform == "win32":
        return "torch.compile is not tried on Windows"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler"
    return None
