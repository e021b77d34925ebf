"""Runs a plan: checks each implementation against float64, times all of a case in turns, and measures their memory.

Each case is timed in two laps. Memory is measured between them, which takes seconds. The second lap has the same inputs
in other memory. So what lasts for a while (another process, a placement of the inputs in memory) shows as a difference
between the laps, and widens the intervals of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from statistics import median

import torch

from softprompt_kernels.bench.footprint import Footprint, measure_footprint
from softprompt_kernels.bench.implementations import is_compiled, left_out, prepare, refusal
from softprompt_kernels.bench.machine import OtherLoad
from softprompt_kernels.bench.peers.registry import PEERS
from softprompt_kernels.bench.plan import QUICK, Plan
from softprompt_kernels.bench.reference import Reference, reference_of, work_of
from softprompt_kernels.bench.timing import Timed, time_in_turns
from softprompt_kernels.errors import is_out_of_memory
from softprompt_kernels.testing.case import BACKWARD, FORWARD, Call, Case, Results, distance

CHECK_FLOP = 1e10  # of the float64 reference; larger cases are checked with fewer tokens or sequences
SECONDS = {True: 0.25, False: 1.0}  # of timing a row in a lap, in the suite "quick" and in the others
LAPS = 2


@dataclass(frozen=True)
class Row:
    """One implementation of one pass of one case.

    Args:
        op, shape, dtype, pass_: the problem.
        implementation: the name of a backend or a peer.
        timed: the times of all rounds.
        reference, bound: the workload beside it, and what bounds the op: "GEMM" or "memory".
        work, reference_work: FLOP or bytes of the op and of the workload.
        error: ‖result − float64‖ / ‖float64‖, the largest of the results.
        checked_shape: the shape that the error was measured at.
        footprint: memory above the inputs; None: not measured.
    """

    op: str
    shape: str
    dtype: str
    pass_: str
    implementation: str
    timed: Timed
    reference: str
    bound: str
    work: float
    reference_work: float
    error: float
    checked_shape: str
    footprint: Footprint | None = None

    @property
    def ours(self) -> bool:
        """Whether it is a backend of this package."""
        return self.implementation not in PEERS

    @property
    def seconds(self) -> float:
        """The median time."""
        return median(self.timed.seconds)

    @property
    def floor_seconds(self) -> float | None:
        """The time at the reference's rate; None where a forward before did a part of the pass."""
        if self.pass_ == BACKWARD and self.op != "prompt_attention":
            return None
        return median(self.timed.reference_seconds) / self.reference_work * self.work

    @property
    def problem(self) -> tuple[str, str, str, str]:
        """Op, shape, dtype and pass."""
        return self.op, self.shape, self.dtype, self.pass_

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs are matched by."""
        return (*self.problem, self.implementation)


@dataclass(frozen=True)
class LeftOut:
    """An implementation that was not measured."""

    op: str
    shape: str
    pass_: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """The result of a run.

    Args:
        rows: in the order of the table.
        left_out: what was not measured, and why.
        other_load: the largest share of the CPU time that other processes took while a case was timed.
    """

    rows: list[Row]
    left_out: list[LeftOut]
    other_load: float


def measure(
    plan: Plan,
    report: Callable[[str], None] = lambda text: None,
    rounds: int | None = None,
    memory: bool = True,
    keep: Callable[[Measured], None] = lambda measured: None,
) -> Measured:
    """Measure a plan.

    Args:
        plan: from `make_plan`.
        report: told what is measured next.
        rounds: the number of rounds; None: as many as fit the time, 16 to 40.
        memory: also measure memory, which starts a process for each implementation.
        keep: given all that is measured so far, after each case.

    Raises:
        RuntimeError: a backend's result is wrong.
    """
    rows: list[Row] = []
    missing: list[LeftOut] = []
    load = 0.0
    for case in plan.cases:
        report(case.name)
        problems, left = _prepare(plan, case)
        missing += left
        footprints: dict[str, dict[str, Footprint]] = {}
        for lap in range(LAPS):
            if lap > 0:
                inputs = case.inputs(plan.dtype, plan.device)
                problems = [problem.with_inputs(inputs) for problem in problems]
            for problem in problems:
                load = max(load, problem.time(plan, None if rounds is None else -(-rounds // LAPS)))
            if memory and lap == 0:
                report(f"{case.name}: memory")
                footprints = _footprints(plan, case, problems)
        rows += [row for problem in problems for row in problem.rows(plan, footprints)]
        keep(Measured(rows, missing, load))
    return Measured(rows, missing, load)


@dataclass(frozen=True)
class _Problem:
    """One pass of one case, with all that run it.

    Args:
        calls, errors, timed: by implementation.
        checked_shape: the shape that the errors were measured at.
    """

    case: Case
    pass_: str
    calls: dict[str, Call]
    errors: dict[str, float]
    checked_shape: str
    reference: Reference
    timed: dict[str, Timed]

    def with_inputs(self, inputs: object) -> _Problem:
        """The same with other memory, which can be faster or slower. What is compiled stays."""
        calls = {
            name: call if is_compiled(name) else prepare(self.case, name, inputs, self.pass_)
            for name, call in self.calls.items()
        }
        for call in calls.values():
            call()
        return replace(self, calls=calls)

    def time(self, plan: Plan, rounds: int | None) -> float:
        """Time all in turns; returns the share of the CPU time that other processes took."""
        with OtherLoad() as other:
            found = time_in_turns(
                list(self.calls.values()),
                self.reference.run,
                seconds=SECONDS[plan.title == QUICK],
                device=plan.device,
                rounds=rounds,
            )
        for name, timed in zip(self.calls, found, strict=True):
            before = self.timed.setdefault(name, Timed(timed.runs))
            before.seconds.extend(timed.seconds)
            before.reference_seconds.extend(timed.reference_seconds)
        return other.share

    def rows(self, plan: Plan, footprints: dict[str, dict[str, Footprint]]) -> list[Row]:
        """The rows of the table."""
        case, reference = self.case, self.reference
        work = work_of(case, self.pass_, plan.dtype, reference.bound)
        return [
            Row(
                case.op, case.shape, plan.dtype_name, self.pass_, name, timed, reference.name, reference.bound, work,
                reference.work, self.errors[name], self.checked_shape, footprints.get(name, {}).get(self.pass_),
            )
            for name, timed in self.timed.items()
        ]  # fmt: skip


def _prepare(plan: Plan, case: Case) -> tuple[list[_Problem], list[LeftOut]]:
    """All passes of a case, checked, and what was left out."""
    inputs = case.inputs(plan.dtype, plan.device)
    small = case.reduced(CHECK_FLOP)
    small_inputs = inputs if small == case else small.inputs(plan.dtype, plan.device)
    expected = small.reference(small_inputs)
    problems: list[_Problem] = []
    missing: list[LeftOut] = []
    for pass_ in [pass_ for pass_ in plan.passes if pass_ in case.passes]:
        calls: dict[str, Call] = {}
        errors: dict[str, float] = {}
        for name in (*plan.backends, *plan.peers):
            reason = _left_out(plan, case, name, pass_)
            if reason is None:
                reason, error = _check(small, name, small_inputs, pass_, _of_pass(expected, small, pass_), plan.dtype)
            if reason is None:
                try:
                    call = prepare(case, name, inputs, pass_)
                    call()
                except Exception as failed:
                    reason = _failure(name, failed)
                else:
                    errors[name], calls[name] = error, call
            if reason is not None:
                missing.append(LeftOut(case.op, case.shape, pass_, name, reason))
        if calls:
            reference = reference_of(case, pass_, plan.dtype, plan.device)
            problems.append(_Problem(case, pass_, calls, errors, small.shape, reference, {}))
    return problems, missing


def _left_out(plan: Plan, case: Case, name: str, pass_: str) -> str | None:
    if is_compiled(name) and plan.title == QUICK and name not in plan.named:
        reason = PEERS[name].left_out(case, pass_, plan.dtype, plan.device)
        return reason or f"it compiles for each size: name it with --peer {name} to measure it in this suite"
    return left_out(case, name, pass_, plan.dtype, plan.device, name in plan.named)


def _of_pass(results: Results, case: Case, pass_: str) -> Results:
    """What a pass gives, of the results of the last pass."""
    if len(case.passes) == 1:
        return results
    return results[:1] if pass_ == FORWARD else results[1:] if pass_ == BACKWARD else results


def _check(
    case: Case, name: str, inputs: object, pass_: str, expected: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[str | None, float]:
    """Why the results of an implementation cannot be used (None if they can), and their error."""
    try:
        found = prepare(case, name, inputs, pass_)()
    except Exception as error:
        return _failure(name, error), 0.0
    if [one.shape for one in found] != [other.shape for other in expected]:
        return "its results have other shapes", 0.0
    apart = max(distance(one, other) for one, other in zip(found, expected, strict=True))
    if apart <= case.tolerance(dtype):
        return None, apart
    text = f"its results differ from float64 by {apart:.1e}, accepted is {case.tolerance(dtype):.0e}"
    if name not in PEERS:
        raise RuntimeError(f"backend {name}, {case.name}, {pass_}: {text}")
    return text, apart


def _failure(name: str, error: Exception) -> str:
    """Why an implementation that raised is left out. An error of a backend, other than a refusal, is raised again."""
    if name not in PEERS:
        if type(error) is ValueError:
            return refusal(name, error)
        raise error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _footprints(plan: Plan, case: Case, problems: Sequence[_Problem]) -> dict[str, dict[str, Footprint]]:
    """By implementation and pass. A process that was killed, or that found no memory, gives none."""
    found: dict[str, dict[str, Footprint]] = {}
    for name in dict.fromkeys(name for problem in problems for name in problem.calls):
        passes = [problem.pass_ for problem in problems if name in problem.calls]
        try:
            found[name] = measure_footprint(case, name, passes, plan.dtype, plan.device)
        except (BrokenProcessPool, MemoryError, RuntimeError) as error:
            if not (isinstance(error, BrokenProcessPool) or is_out_of_memory(error)):
                raise
    return found
