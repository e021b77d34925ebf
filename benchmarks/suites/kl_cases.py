"""Cases of the suite `kl`: a frozen head, forward and backward to the student's hidden states (or logits).

| kind | what is given | products of the head's size, U = 2·N·V·d FLOP |
|---|---|---|
| live | hidden states of both | 3U: both logits, and the pull-back of the difference |
| moments | the student's hidden states, the teacher reduced beforehand | 2U |
| logits | logits of both | none; the floor is one pass over the three tensors of that size |

The student is the teacher's hidden states and a tenth of noise, and the logits have a deviation of 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.harness.case import COMPOSED, Rule, Way
from benchmarks.harness.comparison import ALTERNATIVE, FLOOR, OURS
from benchmarks.suites import kl_implementations as ways
from benchmarks.suites.kl_implementations import Inputs

LIVE, MOMENTS, LOGITS = "live", "moments", "logits"
GEMMS = {LIVE: 3, MOMENTS: 2, LOGITS: 0}
FLOOR_LIMIT = {LIVE: 1.08, MOMENTS: 1.10}  # times that many bare products, required
MEMORY_LIMIT = 64.0  # MiB beyond inputs and gradient, required


@dataclass(frozen=True)
class KlCase:
    """N tokens, hidden states of size d, a vocabulary of V."""

    kind: str
    tokens: int
    size: int
    vocab: int

    @property
    def name(self) -> str:
        width = "" if self.kind == LOGITS else f" d{self.size}"
        return f"{self.kind} N{self.tokens}{width} V{self.vocab}"

    @property
    def flop(self) -> float | None:
        return GEMMS[self.kind] * 2.0 * self.tokens * self.size * self.vocab or None

    @property
    def tolerance(self) -> float:
        return 1e-3

    @property
    def result_bytes(self) -> int:
        return 4 * self.tokens * (self.vocab if self.kind == LOGITS else self.size)

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.vocab, self.size, generator=generator).mul_(3 / self.size**0.5)
        teacher = torch.randn(self.tokens, self.size, generator=generator)
        student = teacher + 0.1 * torch.randn(self.tokens, self.size, generator=generator)
        if self.kind == LOGITS:
            student, teacher = student @ weight.T, teacher @ weight.T
        return Inputs(student.requires_grad_(), teacher, weight)

    def ways(self) -> Mapping[str, tuple[str, Way]]:
        ours, composed, others, (floor_name, floor) = ways.OF_KIND[self.kind]
        return {
            OURS: (OURS, ours),
            COMPOSED: (ALTERNATIVE, composed),
            **{name: (ALTERNATIVE, way) for name, way in others.items()},
            floor_name: (FLOOR, floor),
        }

    def compiled(self) -> Mapping[str, tuple[str, Way]]:
        return {name: (ALTERNATIVE, way) for name, way in ways.COMPILED[self.kind].items()}

    def rules(self) -> list[Rule]:
        found: list[Rule] = [("never slower", 1.0), ("MiB beyond inputs and gradient", MEMORY_LIMIT)]
        if self.kind in FLOOR_LIMIT:
            found.append(("times the floor", FLOOR_LIMIT[self.kind]))
        return found

    def tiny(self) -> KlCase:
        return replace(self, tokens=5, size=8, vocab=40)


CASES = [
    KlCase(LIVE, 512, 576, 49152),
    KlCase(MOMENTS, 512, 576, 49152),
    KlCase(LOGITS, 512, 64, 49152),
    KlCase(LIVE, 1024, 896, 151936),
    KlCase(MOMENTS, 1024, 896, 151936),
]
