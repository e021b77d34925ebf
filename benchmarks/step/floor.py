"""The floor of our ops in a training step: what their products alone would take.

Attention: its useful FLOP, at the measured rate of a large product. Loss: bare products of the sizes that it makes,
measured. Both are counted while a step runs, from what the ops ask of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.harness.comparison import ruler
from benchmarks.harness.recorded_calls import watched
from benchmarks.step.implementations import Side
from benchmarks.step.problem import timed
from benchmarks.step.profile import breakdown
from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs
from softprompt_kernels.kernels.reference.visibility import visibility

REPEATS = 3


@dataclass
class Work:
    """Of one step.

    Args:
        attention_flop: useful ones.
        loss_sizes: N, d, V of each call of the loss.
    """

    attention_flop: float = 0.0
    loss_sizes: list[tuple[int, int, int]] = field(default_factory=list)

    def seen(self, op: str, backend: str, function: str, arguments: tuple[Any, ...]) -> None:
        """Adds a call of a kernel."""
        problem = arguments[0]
        if op == "prompt_attention":
            needs = arguments[-1] if function == "backward" else None
            self.attention_flop += attention_flop(problem, needs)
        elif op == "linear_kl_div_from_moments":
            tokens = len(problem.hidden) if problem.weights is None else int(problem.weights.count_nonzero())
            self.loss_sizes.append((tokens, problem.hidden.shape[1], problem.head.weight.shape[0]))


def attention_flop(problem: AttentionProblem, needs: Needs | None) -> float:
    """Useful FLOP of a forward (`needs` None), or of a backward to what is needed."""
    heads, queries, size = problem.query.shape[1:]
    batch, prompt = problem.key.shape[0], problem.prompt_key.shape[2]
    visible = visibility(problem).visible
    visible = visible.expand(batch, queries, visible.shape[2])
    flop = 0
    for seen, key, value in ((visible[..., :prompt], 3, 4), (visible[..., prompt:], 1, 2)):
        products = 2 if needs is None else _backward_products(needs.query, needs[key], needs[value])
        flop += products * int(seen.sum())
    return 2.0 * size * heads * flop


def _backward_products(query: bool, key: bool, value: bool) -> int:
    """Scores; the gradient of scores, if queries or keys need theirs; and one for each that does."""
    if not (query or key or value):
        return 0
    return 1 + (query or key) + query + key + value


@dataclass(frozen=True)
class Cost:
    """Of a step, in seconds: parts by name, medians; what their sum is of the ops' products alone."""

    parts: dict[str, float]
    attention_floor: float
    loss_floor: float

    def of(self, prefix: str) -> float:
        """The parts whose name starts so."""
        return sum(seconds for name, seconds in self.parts.items() if name.startswith(prefix))

    @property
    def over_floor(self) -> float:
        """Seconds of both ops over those of their products."""
        return (self.of("attention op") + self.of("loss op")) / (self.attention_floor + self.loss_floor)

    def notes(self) -> list[str]:
        """For the report."""
        total, ops = self.of(""), ("attention op", "loss op")
        model = {"the model's products": self.of("model"), "its other operations": self.of("elsewhere")}
        shares = model | {name: self.of(name) for name in ops}
        floors = dict(zip(ops, (self.attention_floor, self.loss_floor), strict=True))
        return [
            f"a step of ours, {total:.2f} s under the profiler: "
            + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares.items()),
            ", ".join(f"{name} {self.of(name):.3f} s, {self.of(name) / floors[name]:.2f}× its products" for name in ops)
            + f"; both {self.over_floor:.2f}×",
        ]


def cost(side: Side, quick: bool) -> Cost:
    """Profiled steps, taking turns with the products that they are held against."""
    work = Work()
    with watched(work.seen):
        side.step()
    square, loss = ruler(quick), _products(work.loss_sizes)
    parts: list[dict[str, float]] = []
    square_seconds, loss_seconds = [], []
    for _ in range(1 if quick else REPEATS):
        parts.append(breakdown(side)[0])
        square_seconds += [timed(square.run)[1] for _ in range(5)]
        loss_seconds.append(timed(loss)[1])
    assert square.flop is not None
    rate = square.flop / median(square_seconds)
    names = {name for found in parts for name in found}
    return Cost(
        {name: median(found.get(name, 0.0) for found in parts) for name in names},
        work.attention_flop / rate,
        median(loss_seconds),
    )


def _products(sizes: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
    """To logits and back, for each size; run once, so that memory is there."""
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
