"""The floor of our ops in a training step: the time that their GEMMs alone would take.

    attention   its useful FLOP, at the measured rate of the reference GEMM
    loss        bare GEMMs of the sizes that the loss needs, measured

Both are derived from the calls that the ops make to the kernels while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.harness.recorded_calls import record_calls
from benchmarks.step.implementations import StepImplementation
from benchmarks.step.problem import timed
from benchmarks.step.profile import OTHER, breakdown
from softprompt_kernels.bench.rounds import reference_gemm
from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs
from softprompt_kernels.kernels.reference.visibility import visibility

REPEATS = 3
LARGEST_OTHERS = 12


@dataclass
class Work:
    """The work of the ops in one step.

    Args:
        attention_flop: useful FLOP of all attention calls.
        loss_sizes: N, d, V of each call of the loss.
    """

    attention_flop: float = 0.0
    loss_sizes: list[tuple[int, int, int]] = field(default_factory=list)

    def add_call(self, op: str, backend: str, function: str, arguments: tuple[Any, ...]) -> None:
        """Add the work of one call of a kernel's function."""
        problem = arguments[0]
        if op == "prompt_attention":
            needs = arguments[-1] if function == "backward" else None
            self.attention_flop += attention_flop(problem, needs)
        elif op == "linear_kl_div_from_moments":
            tokens = len(problem.hidden) if problem.weights is None else int(problem.weights.count_nonzero())
            self.loss_sizes.append((tokens, problem.hidden.shape[1], problem.head.weight.shape[0]))


def attention_flop(problem: AttentionProblem, needs: Needs | None) -> float:
    """Useful FLOP of a forward (`needs` is None), or of a backward to the gradients that are needed."""
    heads, queries, size = problem.query.shape[1:]
    batch, prompt = problem.key.shape[0], problem.prompt_key.shape[2]
    visible = visibility(problem).visible
    visible = visible.expand(batch, queries, visible.shape[2])
    pairs = 0  # of a query and a visible key, once for each GEMM
    # The prompt's segment and the own one, with the indices of key and value in `Needs`.
    for segment, key, value in ((visible[..., :prompt], 3, 4), (visible[..., prompt:], 1, 2)):
        gemms = 2 if needs is None else _backward_gemms(needs.query, needs[key], needs[value])
        pairs += gemms * int(segment.sum())
    return 2.0 * size * heads * pairs


def _backward_gemms(query: bool, key: bool, value: bool) -> int:
    """GEMMs of a backward: the scores; their gradient, if query or key needs one; one for each needed gradient."""
    if not (query or key or value):
        return 0
    return 1 + (query or key) + query + key + value


@dataclass(frozen=True)
class StepCost:
    """Seconds of one of our steps.

    Args:
        parts: medians of all parts by name, see profile.py.
        others: the largest events that "other operations" consists of, in one step.
        attention_floor, loss_floor: seconds of the GEMMs of each op alone.
    """

    parts: dict[str, float]
    others: dict[str, float]
    attention_floor: float
    loss_floor: float

    def of(self, prefix: str) -> float:
        """The sum of the parts whose name starts with `prefix`."""
        return sum(seconds for name, seconds in self.parts.items() if name.startswith(prefix))

    @property
    def over_floor(self) -> float:
        """Time of both ops over that of their GEMMs."""
        return (self.of("attention op") + self.of("loss op")) / (self.attention_floor + self.loss_floor)

    def notes(self) -> list[str]:
        """Lines for the report."""
        total, ops = self.of(""), ("attention op", "loss op")
        shares = {"GEMMs of the model": self.of("model"), OTHER: self.of(OTHER)}
        shares |= {name: self.of(name) for name in ops}
        floors = dict(zip(ops, (self.attention_floor, self.loss_floor), strict=True))
        return [
            f"profile of one of our steps ({total:.2f} s): "
            + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares.items()),
            "time of the ops over their bare GEMMs: "
            + ", ".join(f"{name} {self.of(name) / floors[name]:.2f}× ({self.of(name):.3f} s)" for name in ops)
            + f", both {self.over_floor:.2f}×",
        ]


def measure_cost(implementation: StepImplementation, quick: bool) -> StepCost:
    """Profile steps, in turns with the GEMMs that they are compared with."""
    work = Work()
    with record_calls(work.add_call):
        implementation.step()
    square, loss = reference_gemm(quick), _bare_gemms(work.loss_sizes)
    parts: list[dict[str, float]] = []
    others: dict[str, float] = {}
    square_seconds, loss_seconds = [], []
    for _ in range(1 if quick else REPEATS):
        found, others = breakdown(implementation)
        parts.append(found)
        square_seconds += [timed(square.run)[1] for _ in range(5)]
        loss_seconds.append(timed(loss)[1])
    assert square.flop is not None
    rate = square.flop / median(square_seconds)
    names = {name for found in parts for name in found}
    return StepCost(
        {name: median(found.get(name, 0.0) for found in parts) for name in names},
        dict(list(others.items())[:LARGEST_OTHERS]),
        work.attention_flop / rate,
        median(loss_seconds),
    )


def _bare_gemms(sizes: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
    """For each size a GEMM to logits and one back, into existing outputs; run once here, as a warm-up."""
    made = []
    for tokens, size, vocab in sizes:
        hidden, weight = torch.rand(tokens, size), torch.rand(vocab, size)
        made.append((hidden, weight, torch.zeros(tokens, vocab), torch.zeros(tokens, size)))

    def run() -> None:
        for hidden, weight, logits, gradient in made:
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=gradient)

    run()
    return run
