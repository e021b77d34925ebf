"""Cases of the suite `kl`: a frozen head, forward and backward to the student's hidden states (or logits).

| kind | inputs | GEMMs of the head's size, U = 2·N·V·d FLOP each |
|---|---|---|
| live | hidden states of student and teacher | 3U: both logits, and the gradient of the student's hidden states |
| moments | hidden states of the student, cached moments of the teacher | 2U |
| logits | logits of student and teacher | none; the floor is one pass over the three tensors of that size |

Sizes, inputs and FLOP are those of `softprompt_kernels.testing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.harness.case import COMPOSED, Implementation, Rule
from benchmarks.suites import kl_implementations as losses
from benchmarks.suites.kl_implementations import Inputs
from softprompt_kernels.bench.rounds import BASELINE, FLOOR, OURS
from softprompt_kernels.testing.cases import KlDivCase, LinearKlDivCase, LinearKlDivFromMomentsCase

LIVE, MOMENTS, LOGITS = "live", "moments", "logits"
FLOOR_LIMIT = {LIVE: 1.08, MOMENTS: 1.10}  # limit of the time over that of the bare GEMMs
MEMORY_LIMIT = 64.0  # MiB beyond inputs and gradient


@dataclass(frozen=True)
class KlCase:
    """One problem.

    Args:
        kind: LIVE, MOMENTS or LOGITS.
        tokens, size, vocab: N, d, V.
    """

    kind: str
    tokens: int
    size: int
    vocab: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self._problem.shape}"

    @property
    def flop(self) -> float | None:
        return self._problem.flop() or None

    @property
    def tolerance(self) -> float:
        return 1e-3

    @property
    def result_bytes(self) -> int:
        return self._problem.result_bytes()

    def inputs(self) -> Inputs:
        if self.kind == LOGITS:
            return Inputs(*self._problem.inputs(), torch.empty(0))
        return self._problem.inputs()

    def implementations(self) -> Mapping[str, tuple[str, Implementation]]:
        of_kind = losses.BY_KIND[self.kind]
        return {
            OURS: (OURS, of_kind.ours),
            COMPOSED: (BASELINE, of_kind.composed),
            **{name: (BASELINE, baseline) for name, baseline in of_kind.baselines.items()},
            of_kind.floor_name: (FLOOR, of_kind.floor),
        }

    def compiled(self) -> Mapping[str, tuple[str, Implementation]]:
        return {name: (BASELINE, baseline) for name, baseline in losses.COMPILED[self.kind].items()}

    @property
    def _problem(self) -> KlDivCase | LinearKlDivCase | LinearKlDivFromMomentsCase:
        if self.kind == LOGITS:
            return KlDivCase(self.tokens, self.vocab)
        return (LinearKlDivCase if self.kind == LIVE else LinearKlDivFromMomentsCase)(
            self.tokens, self.size, self.vocab
        )

    def rules(self) -> list[Rule]:
        found: list[Rule] = [
            ("speedup over the fastest baseline", 1.0),
            ("peak MiB beyond inputs and gradient", MEMORY_LIMIT),
        ]
        if self.kind in FLOOR_LIMIT:
            found.append(("time over the floor", FLOOR_LIMIT[self.kind]))
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
